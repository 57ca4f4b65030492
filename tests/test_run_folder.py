import ast
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy
import pytest

import nervenet
from helpers import ROOT, train
from nervenet import UNet
from nervenet.images.data import Loader
from nervenet.optim import Adam
from nervenet.study.checkpoint import CheckpointError
from nervenet.study.claims import claim
from nervenet.study.run_folder import RunFolder, check_resumable, read_config, room_for_results
from nervenet.study.segment import Settings


def test_a_run_folder_is_never_written_over(tmp_path):
    RunFolder(tmp_path / 'run', {}).release()
    with pytest.raises(FileExistsError, match='choose another --out, or go on with the run in it: --resume'):
        RunFolder(tmp_path / 'run', {})


def test_a_foreign_folder_is_refused_and_nothing_in_it_is_touched(tmp_path):
    (tmp_path / 'download.partial').write_text('mine')
    with pytest.raises(FileExistsError, match='choose another --out$'):
        RunFolder(tmp_path, {})
    assert os.listdir(tmp_path) == ['download.partial']


def test_a_folder_belongs_to_one_process(tmp_path):
    run = RunFolder(tmp_path / 'run', {})
    with pytest.raises(BlockingIOError, match='run is in use: another process is training there'):
        RunFolder(tmp_path / 'run', {}, resume=True)
    run.release()
    RunFolder(tmp_path / 'run', {}, resume=True)
    release = claim(tmp_path)
    command = f'from nervenet.study.claims import claim; claim({str(tmp_path)!r})'
    held = subprocess.run([sys.executable, '-c', command], capture_output=True, text=True, cwd=ROOT)
    assert 'is in use' in held.stderr
    release()


def test_resuming_names_both_values_of_what_differs(loaders, tmp_path):
    train(loaders, tmp_path / 'run', epochs=1)[1].release()
    with pytest.raises(ValueError, match=r'config.json: norm is batch there and None now'):
        train(loaders, tmp_path / 'run', epochs=1, norm=None, resume=True)
    model = UNet(base_channels=3, depth=2, dropout=0.1, input_mean=0.25)
    run = RunFolder(tmp_path / 'run', {'size': [16, 24], 'norm': 'batch', 'epochs': 1}, resume=True)
    with pytest.raises(ValueError, match='input_mean 0.0, this run gives 0.25; have the images changed'):
        run.restore(model, Adam(model.parameters()))
    with pytest.raises(FileNotFoundError, match='no run to resume; start one with --out'):
        read_config(tmp_path / 'missing')
    (tmp_path / 'config.json').write_text('{"size":')
    with pytest.raises(ValueError, match='config.json: cannot be read'):
        read_config(tmp_path)


def test_resuming_a_complete_run_trains_no_more_and_keeps_its_files(loaders, tmp_path):
    _, run, rows = train(loaders, tmp_path / 'run')
    for path in run.last, run.best:
        run.finish_model_file(path, settings={'threshold': 0.3})
    run.release()
    before = {path.name: path.read_bytes() for path in run.path.iterdir()}
    _, resumed, more = train(loaders, tmp_path / 'run', resume=True)
    assert more == [] and resumed.history == rows
    resumed.release()
    assert {path.name: path.read_bytes() for path in run.path.iterdir()} == before
    _, extra = nervenet.load_checkpoint(run.last)
    assert 'state' not in extra and extra['settings'] == {'threshold': 0.3}


KILLED_WHILE_TRAINING = '''
import itertools, os, random, shutil, signal, sys, time, zipfile
from pathlib import Path
import numpy
from nervenet import UNet
from nervenet.images.augment import ULTRASOUND
from nervenet.images.data import Loader
from nervenet.losses import DiceLoss
from nervenet.optim import Adam
from nervenet.study.fit import fit
from nervenet.study.run_folder import RunFolder
sys.path.insert(0, sys.argv[3])
from helpers import SAMPLES as samples
from helpers import Made, assert_same_run

baselines = {'empty mask': {name: 0.5 for name in ('dice_pooled', 'dice_per_image', 'iou_pooled', 'accuracy')}}

def train(path):
    training = Loader(samples[:4], Made(), 2, seed=1, shuffle=True, positive_share=0.75, transform=ULTRASOUND)
    validation, inner = Loader(samples[4:6], Made(), 2), Loader(samples[6:], Made(), 2)
    model = UNet(base_channels=2, depth=1, dropout=0.3, rng=numpy.random.default_rng(2))
    optimizer = Adam(model.parameters(), 0.02)
    run = RunFolder(path, {'size': [8, 12]}, resume=True)
    run.restore(model, optimizer)
    for row in fit(model, DiceLoss(), optimizer, training, validation, 4, run, max_norm=1.0, inner=inner, patience=3):
        pass
    for model_file in run.last, run.best:
        run.finish_model_file(model_file, settings={'threshold': 0.4})
    run.summarize(baselines)

def killed_at(owner, name, call, after):
    original, calls = getattr(owner, name), itertools.count(1)
    def function(*args, **kwargs):
        number = next(calls)
        if number == call and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **kwargs)
        if number == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(owner, name, function)

def run_in_child(path, stage=None, seconds=None):
    """Return True if the child came to its end, False if it was killed before."""
    child = os.fork()
    if child == 0:
        if stage:
            killed_at(*stage)
        train(path)
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert status == 0 or os.WTERMSIG(status) == signal.SIGKILL, status
    return status == 0

folder, kills = Path(sys.argv[1]), int(sys.argv[2])
start = time.perf_counter()
assert run_in_child(folder / 'whole')
length = time.perf_counter() - start
# Before and after each step of each write of the run, then at random moments, some several times in one run.
stages = [(owner, name, call, after) for owner, name, calls in ((os, 'replace', range(1, 17)), (os, 'fsync', range(1, 33)),
          (zipfile.ZipFile, 'close', range(1, 12)), (zipfile.ZipFile, 'open', range(1, 300, 23)))
          for call in calls for after in (False, True)]
chance, count, runs = random.Random(kills), 0, 0
chosen = iter(stages if kills >= len(stages) else chance.sample(stages, kills // 2))
at_stages = 0
while count < kills:
    assert runs < 20 + 5 * kills, f'{runs} runs, and only {count} of them killed'
    path = folder / 'killed'
    stage = next(chosen, None)
    if stage:
        killed = not run_in_child(path, stage=stage)
        at_stages += killed
        count += killed
    while count < kills and (not stage or chance.random() < 0.3) and not run_in_child(path, seconds=chance.uniform(0, length)):
        count += 1
    while not run_in_child(path):
        pass
    assert_same_run(path, folder / 'whole')
    assert (path / 'summary.txt').read_bytes() == (folder / 'whole' / 'summary.txt').read_bytes()
    shutil.rmtree(path)
    runs += 1
print(f'{count} kills, {at_stages} at chosen steps of writing, in {runs} runs: every run equals the uninterrupted one, bit for bit')
'''


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
def test_a_run_killed_at_any_moment_and_resumed_equals_an_uninterrupted_one(tmp_path):
    """NERVENET_KILLS=500 tries so many; 146 and more hit every step of every write."""
    kills = os.environ.get('NERVENET_KILLS', '10')
    done = subprocess.run([sys.executable, '-c', KILLED_WHILE_TRAINING, str(tmp_path), kills, str(Path(__file__).parent)],
                          capture_output=True, text=True, cwd=ROOT, timeout=120 + 30 * int(kills))
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)


NAMED_AT_ONCE = '''
import sys, time
from nervenet.study import run_folder
class Clock(run_folder.datetime.datetime):
    @classmethod
    def now(cls):
        return cls(2026, 1, 2, 3, 4, 5)
run_folder.datetime.datetime = Clock
time.sleep(max(0, float(sys.argv[1]) - time.time()))
print([str(run_folder.dated_folder()) for _ in range(20)])
'''


def test_runs_that_start_in_the_same_second_get_folders_of_their_own(tmp_path):
    command = [sys.executable, '-c', NAMED_AT_ONCE, str(time.time() + 1)]
    environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path, env=environment) for _ in range(3)]
    made = [name for process in processes for name in ast.literal_eval(process.communicate()[0])]
    assert len(set(made)) == 60 and {Path(name).name for name in made} == set(os.listdir(tmp_path / 'runs'))
    assert min(made) == 'runs/2026-01-02_03-04-05' and 'runs/2026-01-02_03-04-05_60' in made


def test_a_folder_that_work_has_left_empty_is_taken_away_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in None, tmp_path / 'run':
        with pytest.raises(ZeroDivisionError), room_for_results(path) as room:
            assert room.is_dir() and not list(room.iterdir())
            raise ZeroDivisionError
        assert not room.exists()
        with pytest.raises(ZeroDivisionError), room_for_results(path) as room:
            (room / 'last.npz').write_text('kept')
            raise ZeroDivisionError
        assert (room / 'last.npz').exists()
    (tmp_path / 'mine').mkdir()
    with pytest.raises(ZeroDivisionError), room_for_results(tmp_path / 'mine'):
        raise ZeroDivisionError
    assert (tmp_path / 'mine').is_dir(), 'it was there before'
    with pytest.raises(FileExistsError, match='choose another --out$'), room_for_results(tmp_path / 'run'):
        pass
    with room_for_results(tmp_path / 'run', joins=True) as room:
        assert room == tmp_path / 'run'


def test_a_run_that_is_in_use_or_damaged_is_refused_before_any_work(loaders, tmp_path):
    _, run, _ = train(loaders, tmp_path / 'run', epochs=1)
    with pytest.raises(BlockingIOError, match='another process is training there'):
        check_resumable(run.path)
    run.release()
    check_resumable(run.path)
    whole, damaged = run.last.read_bytes(), run.last.read_bytes()[:-100]
    run.last.write_bytes(damaged)
    with pytest.raises(CheckpointError, match='last.npz: not a readable model file'):
        check_resumable(run.path)
    run.last.write_bytes(whole)
    (tmp_path / 'cv' / 'fold_2').mkdir(parents=True)
    (tmp_path / 'cv' / 'fold_2' / 'last.npz').write_bytes(damaged)
    with pytest.raises(CheckpointError, match='fold_2/last.npz'):
        check_resumable(tmp_path / 'cv')


def test_where_there_is_no_foreground_to_choose_on_nothing_is_chosen(loaders, tmp_path, capsys):
    training, validation = loaders

    class Empty(Loader):
        def epoch(self, number):
            for images, masks in super().epoch(number):
                yield images, masks * 0

    empty = Empty(validation.samples, validation.reader, 3)
    for name, inner in ('inner', empty), ('validation', None):
        _, run, _ = train((training, validation if inner else empty), tmp_path / name, epochs=1, inner=inner)
        chosen = run.choose_settings('cpu', validation if inner else empty, inner, numpy.zeros((16, 24), 'uint8'))
        stored = nervenet.load_checkpoint(run.best)[1]['settings']
        assert stored == chosen['best.npz']['settings'] == asdict(Settings())
        assert chosen['last.npz']['chosen on'] == 'nothing'
        assert f'on the {name} subjects, who have no foreground to choose on' in capsys.readouterr().out


@pytest.mark.parametrize('temperature, is_told', [(20.0, True), (19.9985, True), (0.05, True), (12.0, False)])
def test_a_temperature_at_an_end_of_those_tried_is_told(loaders, tmp_path, capsys, monkeypatch, temperature, is_told):
    monkeypatch.setattr('nervenet.study.run_folder.choose_temperature', lambda network, batches: temperature)
    _, run, _ = train(loaders, tmp_path / 'run', epochs=1)
    run.choose_settings('cpu', loaders[1], None, numpy.zeros((16, 24), 'uint8'))
    assert ('last.npz: the temperature is at an end of those tried, 0.05 to 20' in capsys.readouterr().out) == is_told
