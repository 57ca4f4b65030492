"""What several test files need: images to train on, runs of the library and of the examples, and how two runs are compared."""

import contextlib
import csv
import importlib.util
import io
import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
from PIL import Image

import nervenet
from nervenet import UNet
from nervenet.losses import DiceLoss
from nervenet.optim import Adam
from nervenet.study.fit import fit
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


def train(loaders, folder, seed=1, epochs=3, resume=False, norm='batch', **options):
    model = UNet(base_channels=3, depth=2, norm=norm, dropout=0.1, rng=numpy.random.default_rng(seed))
    optimizer = Adam(model.parameters(), 0.01)
    run = RunFolder(folder, {'size': [16, 24], 'norm': norm, 'epochs': epochs}, resume)
    run.restore(model, optimizer)
    rows = list(fit(model, DiceLoss(), optimizer, *loaders, epochs, run, lambda step: 0.01 / (1 + step), **options))
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
    assert sorted(os.listdir(path)) == sorted(os.listdir(other))
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
