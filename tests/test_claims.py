"""One process at a time in a folder, on one machine or several, with flock and without."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nervenet.study import claims
from nervenet.study.claims import claim, claims_in, whose

ROOT = Path(__file__).parents[1]


@pytest.fixture(params=['flock', 'no flock'])
def lock(request, monkeypatch):
    """The system's lock, or a disk that has none."""
    if request.param == 'no flock':
        monkeypatch.setattr(claims, 'fcntl', None)
    elif claims.fcntl is None:
        pytest.skip('this system has no flock')


def leave(folder, silent_for=0, **what):
    """Put the claim of a process of another machine there, whose last sign of life is so many seconds old."""
    file = folder / 'claim_elsewhere_7_1'
    file.write_text(json.dumps({'host': 'elsewhere', 'process': 7, **what}))
    os.utime(file, (time.time() - silent_for,) * 2)


def test_a_folder_has_one_owner_until_it_is_given_back(lock, tmp_path):
    release = claim(tmp_path)
    with pytest.raises(BlockingIOError, match=rf'is in use: another process is training there, process {os.getpid()} on \S+, last sign of life 20'):
        claim(tmp_path)
    assert len(claims_in(tmp_path)) == 1, 'who has lost leaves nothing behind'
    release()
    release()
    assert claims_in(tmp_path) == []
    claim(tmp_path)()


def test_one_on_another_machine_is_known_by_its_signs_of_life(lock, tmp_path):
    leave(tmp_path, silent_for=100, job='88_2', start=0)
    with pytest.raises(BlockingIOError, match='process 7 on elsewhere, Slurm job 88_2, last sign of life'):
        claim(tmp_path)
    leave(tmp_path, silent_for=claims.SILENCE + 20)
    release = claim(tmp_path)
    assert [name.split('_')[1] for name in claims_in(tmp_path)] == [claims.HOST], 'what the dead have left is gone'
    release()


def test_a_job_that_slurm_starts_again_need_not_wait(lock, tmp_path, monkeypatch):
    leave(tmp_path, job='88', start=0)
    monkeypatch.setenv('SLURM_JOB_ID', '88')
    with pytest.raises(BlockingIOError):
        claim(tmp_path)
    monkeypatch.setenv('SLURM_RESTART_COUNT', '1')
    claim(tmp_path)()


def test_a_claim_that_is_being_written_counts(lock, tmp_path):
    (tmp_path / 'claim_elsewhere_7_1').write_text('')
    with pytest.raises(BlockingIOError, match='which has just begun'):
        claim(tmp_path)


@pytest.mark.skipif(os.name != 'posix', reason='here it is not asked whether a process lives')
def test_a_process_that_was_killed_while_it_wrote_its_claim_keeps_nothing(lock, tmp_path):
    ended = subprocess.Popen([sys.executable, '-c', ''])
    ended.wait()
    (tmp_path / f'claim_{claims.HOST}_{ended.pid}_1').write_text('')
    release = claim(tmp_path)
    assert len(claims_in(tmp_path)) == 1 and str(ended.pid) not in claims_in(tmp_path)[0].split('_')
    release()


HELD = '''
import sys, time
from nervenet.study import claims
claims.fcntl = claims.fcntl if sys.argv[2] == 'flock' else None
claims.claim(sys.argv[1])
print('held', flush=True)
time.sleep(60)
'''


@pytest.mark.skipif(os.name != 'posix', reason='here it is not asked whether a process lives')
def test_a_killed_process_on_this_machine_keeps_nothing_and_is_told(lock, tmp_path, request):
    fold = tmp_path / 'fold'
    fold.mkdir()
    kind = request.node.callspec.params['lock']
    held = subprocess.Popen([sys.executable, '-c', HELD, fold, kind], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert held.stdout.readline() == 'held\n'
    release = claim(tmp_path)                               # as whoever writes the summary does
    assert whose(fold, tmp_path).startswith(f'in training: process {held.pid} on ')
    with pytest.raises(BlockingIOError):
        claim(fold)
    held.send_signal(signal.SIGKILL)
    held.communicate()
    assert whose(fold, tmp_path).startswith(f'died: process {held.pid} on ')
    claim(fold)()
    assert whose(fold, tmp_path) == 'stopped'
    release()


def test_signs_of_life_come_by_themselves_and_end_with_the_claim(lock, tmp_path, monkeypatch):
    monkeypatch.setattr(claims, 'BEAT', 0.02)
    release = claim(tmp_path)
    file = tmp_path / claims_in(tmp_path)[0]
    os.utime(file, (1, 1))
    while file.stat().st_mtime == 1:
        time.sleep(0.01)
    file.unlink()                                           # another machine has waited long enough
    with pytest.raises(BlockingIOError, match='another one has gone on there'):
        release.check()
    time.sleep(0.1)
    assert not file.exists(), 'a sign of life brings no claim back'
    release()


RACING = '''
import sys, time
from nervenet.study import claims
claims.fcntl = None
path = claims.Path(sys.argv[1])
for turn in range(15):
    release = claims.claim(path, wait=True)
    with open(path / 'owner', 'x'):
        time.sleep(0.002)
    (path / 'owner').unlink()
    release()
'''


def test_without_flock_never_two_processes_have_a_folder(tmp_path):
    processes = [subprocess.Popen([sys.executable, '-c', RACING, tmp_path], stderr=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(3)]
    for process in processes:
        assert process.communicate()[1] == ''
    assert os.listdir(tmp_path) == []


def test_files_of_others_are_left_alone(tmp_path):
    (tmp_path / 'claim_form.txt').write_text('[]')
    os.utime(tmp_path / 'claim_form.txt', (0, 0))
    claim(tmp_path)()
    assert [path.name for path in tmp_path.iterdir()] == ['claim_form.txt'] and claims_in(tmp_path) == []
