"""Folds as jobs: the scripts in README, as they stand there."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers import TINY, write_pairs

ROOT = Path(__file__).parents[1]
BASH = shutil.which('bash')
pytestmark = pytest.mark.skipif(BASH is None, reason='needs bash')


def recipes():
    """Return the batch script of Slurm and the line of GNU parallel, text."""
    text = (ROOT / 'README.md').read_text()
    script, = re.findall(r'^    (#!/bin/bash\n(?:    .*\n)+)', text, re.M)
    line, = re.findall(r'^    (NERVENET_THREADS=1 parallel .*\n)', text, re.M)
    return script.replace('\n    ', '\n'), line


@pytest.mark.parametrize('recipe', recipes())
def test_recipes_are_bash(recipe):
    checked = subprocess.run([BASH, '-n'], input=recipe, text=True, capture_output=True)
    assert checked.returncode == 0 and checked.stderr == '', checked.stderr


def test_recipes_name_every_fold():
    script, line = recipes()
    assert '#SBATCH --array=1-5 ' in script and '--folds 5 --fold "$SLURM_ARRAY_TASK_ID"' in script
    assert '--folds 5 --fold {} ' in line and line.endswith(' ::: 1 2 3 4 5\n')


@pytest.fixture
def job(tmp_path, rng):
    """Return a function that starts the job of one fold of three, as Slurm or parallel would."""
    write_pairs(tmp_path / 'data', rng, subjects=3)
    (tmp_path / 'bin').mkdir()
    (tmp_path / 'bin' / 'python').write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (tmp_path / 'bin' / 'python').chmod(0o755)
    run = f'{tmp_path / "run"} --epochs 30 {" ".join(map(str, TINY))}'

    def start(fold, by):
        script, line = (recipe.replace('--folds 5', '--folds 3').replace(' DIR ', f' {tmp_path / "data"} ').replace('RUN', run) for recipe in recipes())
        environment = {**os.environ, 'PATH': f'{tmp_path / "bin"}:{os.environ["PATH"]}', 'PYTHONPATH': str(ROOT), 'NERVENET_THREADS': '1'}
        if by == 'Slurm':
            file = tmp_path / f'folds_{fold}.sh'                # of its own: bash reads a script while it runs
            file.write_text(script)
            command, environment = [BASH, file], environment | {'SLURM_ARRAY_TASK_ID': str(fold), 'SLURM_JOB_ID': f'70{fold}'}
        else:
            wrapped = re.fullmatch(r'NERVENET_THREADS=1 parallel --jobs 5 (.*) ::: 1 2 3 4 5\n', line)[1].replace('{}', str(fold))
            command = [BASH, '-c', 'exec ' + wrapped]
        return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return start


def test_a_cross_validation_is_finished_by_jobs_of_which_one_was_killed_and_one_stopped(tmp_path, job):
    whole, jobs = tmp_path / 'run', {fold: job(fold, by) for fold, by in ((1, 'Slurm'), (2, 'Slurm'), (3, 'parallel'))}
    for fold, number in (1, signal.SIGTERM), (2, signal.SIGKILL):
        while not (whole / f'fold_{fold}' / 'history.csv').exists():
            assert jobs[fold].poll() is None, jobs[fold].communicate()
            time.sleep(0.01)
        jobs[fold].send_signal(number)
    said = {fold: (*process.communicate(), process.returncode) for fold, process in jobs.items()}
    assert [said[fold][2] for fold in (1, 2, 3)] == [130, -signal.SIGKILL, 0], said
    text = (whole / 'summary.txt').read_text()
    assert text.startswith('1 of 3 folds; not complete yet: 1, 2\n') and text in said[3][0]
    assert re.search(r'^fold 1: \d+ of 30 epochs, stopped$', text, re.M)
    assert re.search(rf'^fold 2: \d+ of 30 epochs, died: process {jobs[2].pid} on \S+, Slurm job 702, last sign of life 20', text, re.M)

    again = [job(fold, 'Slurm') for fold in (1, 2)]
    said = [(*process.communicate(), process.returncode) for process in again]
    assert [code for _, _, code in said] == [0, 0], said
    assert all('going on after epoch' in out for out, _, _ in said), said
    text = (whole / 'summary.txt').read_text()
    assert text.startswith('3 of 3 folds\n\n') and sum(text in out for out, _, _ in said) >= 1, 'whoever finishes last has them all'
    assert sorted(os.listdir(whole)) == ['config.json', 'curves.png', 'fold_1', 'fold_2', 'fold_3', 'report.html', 'split.json', 'summary.txt']
    assert not [*whole.glob('*/claim_*')]
