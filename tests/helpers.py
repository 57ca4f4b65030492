"""What several test files need: images to train on, runs of the library and of the examples, and how two runs are compared."""

import contextlib
import csv
import importlib
import importlib.util
import io
import os
import signal
import subprocess
import sys
import types
import warnings
from pathlib import Path

import numpy
import pytest
from PIL import Image

import nervenet
from nervenet import UNet
from nervenet.images.samples import Sample
from nervenet.losses import DiceLoss
from nervenet.optim import Adam
from nervenet.study.fit import WeightAverage, fit
from nervenet.study.run_folder import RunFolder

ROOT = Path(__file__).parents[1]
TINY = '--size', '16x24', '--base-channels', '2', '--depth', '2', '--device', 'cpu'          # a network for the main job


def write_pairs(folder, rng, subjects=3, images=4, size=(24, 36)):
    """Write pairs in the Kaggle layout: a bright disc on noise, and its mask."""
    folder.mkdir(parents=True, exist_ok=True)
    rows, columns = numpy.mgrid[:size[0], :size[1]]
    for subject in range(1, subjects + 1):
        for image in range(1, images + 1):
            centre = rng.uniform([8, 8], [size[0] - 8, size[1] - 8])
            mask = (rows - centre[0])**2 + (columns - centre[1])**2 < 36
            grey = 60 + 100 * mask + 30 * rng.random(size)
            Image.fromarray(grey.astype('uint8')).save(folder / f'{subject}_{image}.tif')
            Image.fromarray((255 * mask).astype('uint8')).save(folder / f'{subject}_{image}_mask.tif')


def train(loaders, folder, seed=1, epochs=3, resume=False, norm='batch', share=0, **options):
    model = UNet(base_channels=3, depth=2, norm=norm, dropout=0.1, rng=numpy.random.default_rng(seed))
    optimizer = Adam(model.parameters(), 0.01)
    run = RunFolder(folder, {'size': [16, 24], 'norm': norm, 'epochs': epochs}, resume)
    average = WeightAverage(model, share) if share else None
    run.restore(model, optimizer, average)
    rows = list(fit(model, DiceLoss(), optimizer, *loaders, epochs, run, lambda step: 0.01 / (1 + step), average=average, **options))
    return model, run, rows


def without_times(value):
    """Return `value`, nested as it is, without what the clock says."""
    if isinstance(value, dict):
        times = 'seconds', 'images_per_second', 'waited_seconds'
        return {name: without_times(item) for name, item in value.items() if name not in times}
    return list(map(without_times, value)) if isinstance(value, list) else value


def content(path):
    """Return all that a model file holds, times aside, as one comparable value."""
    model, extra = nervenet.load_checkpoint(path)

    def comparable(value):
        if isinstance(value, dict):
            return {name: comparable(item) for name, item in value.items()}
        return (value.dtype, value.shape, value.tobytes()) if isinstance(value, numpy.ndarray) else value

    return comparable({'config': model.config, **model.state_dict(), **without_times(extra)})


def assert_same_run(path, other):
    names = [sorted(name for name in os.listdir(folder) if not name.startswith('claim_')) for folder in (path, other)]     # of live RunFolders
    assert names[0] == names[1]
    assert content(path / 'last.npz') == content(other / 'last.npz')
    assert (path / 'best.npz').read_bytes() == (other / 'best.npz').read_bytes()
    histories = [[without_times(row) for row in csv.DictReader(io.StringIO((folder / 'history.csv').read_text()))]
                 for folder in (path, other)]
    assert histories[0] == histories[1]


def example(name):
    """Return the module of a script in examples/."""
    specification = importlib.util.spec_from_file_location(name, ROOT / 'examples' / f'{name}.py')
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def start_example(name, *arguments, cwd=None, **environment):
    """Start a script in examples/ as from a shell, with more variables in the `environment`; return the process."""
    return subprocess.Popen([sys.executable, str(ROOT / 'examples' / name), *map(str, arguments)], cwd=cwd, text=True,
                            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env={**os.environ, 'PYTHONPATH': str(ROOT), **environment})


def run_example(name, *arguments, cwd=None, **environment):
    """Run a script in examples/ to its end; return what it said and how it ended."""
    process = start_example(name, *arguments, cwd=cwd, **environment)
    out, error = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, out, error)


@contextlib.contextmanager
def stopped_after(epochs, main, monkeypatch):
    """Within this context the main job is stopped by Ctrl-C after so many epochs."""
    def print_epoch(history, number):
        if len(history) == epochs:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(main.module, 'print_epoch', print_epoch)
        yield


class Made:
    """A reader of small images that follow from their names; every second one shows something."""

    size = 8, 12

    def read(self, sample):
        rng = numpy.random.default_rng(int(sample.name))
        mask = (rng.random(self.size) < 0.3) * (int(sample.name) % 2)
        return (20000 * mask + rng.integers(0, 40000, self.size)).astype('uint16'), mask.astype('uint8')


SAMPLES = [Sample(str(number), str(number), None, None) for number in range(8)]


def in_a_child(work):
    """Fork; return the pid of a child that ends with 0 if `work()` is true, and is killed after 20 s."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', DeprecationWarning)             # Python warns of forking beside threads; here it must work
        child = os.fork()
    if child == 0:
        signal.alarm(20)
        code = 1
        try:
            code = 0 if work() else 2
        finally:
            os._exit(code)
    return child


def functions_of(namespace, module):
    """Yield (name, function) of all functions and methods that a module defines, unwrapped."""
    for name, value in list(namespace.items()):
        members = vars(value).items() if isinstance(value, type) and value.__module__ == module else [('', value)]
        for member, function in members:
            function = getattr(function, '__func__', None) or getattr(function, 'fget', None) or function
            function = getattr(function, '__wrapped__', function)
            if isinstance(function, types.FunctionType) and function.__module__ == module:
                yield f'{name}.{member}', function


@contextlib.contextmanager
def planted(file, text, becomes):
    """Within this context the code of a module of the library is that of its source with `text` replaced, wherever it was imported."""
    module = importlib.import_module('.'.join(Path(file).with_suffix('').parts))
    namespace = {'__name__': module.__name__, '__package__': module.__package__, '__file__': module.__file__}
    exec(compile(changed(file, text, becomes), module.__file__, 'exec'), namespace)
    broken = dict(functions_of(namespace, module.__name__))
    before = [(function, function.__code__, function.__defaults__, broken[name])
              for name, function in functions_of(vars(module), module.__name__)]
    try:
        for function, _, _, other in before:
            function.__code__, function.__defaults__ = other.__code__, other.__defaults__
        yield
    finally:
        for function, code, defaults, _ in before:
            function.__code__, function.__defaults__ = code, defaults


def changed(file, text, becomes):
    source = (ROOT / file).read_text()
    assert source.count(text) == 1, f'{file} holds {text!r} {source.count(text)} times: plant the bug in the code as it is now'
    return source.replace(text, becomes)
