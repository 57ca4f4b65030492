"""engine/workers.py: order, errors, and what is left behind, with threads and with processes."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing

import pytest
from helpers import ROOT

from nervenet.engine import workers
from nervenet.engine.parallel import number_of_threads, set_threads
from nervenet.engine.workers import in_background, in_processes

needs_fork = pytest.mark.skipif(not workers.CAN_FORK, reason='this system cannot fork')


@pytest.fixture(autouse=True)
def nothing_is_left():
    yield
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith('background')]
    assert not multiprocessing.active_children()


def test_several_threads_keep_the_order_and_chains_of_them_end_with_the_caller():
    def slow(number):
        time.sleep(0.01 * (number % 3 == 0))
        return number

    with closing(in_background(slow, range(20), 4, threads=3)) as first, closing(in_background(slow, first, 4, threads=3)) as second:
        assert list(second) == list(range(20))
    with closing(in_background(slow, range(20), 4, threads=3)) as first, closing(in_background(slow, first, 4, threads=3)) as second:
        assert next(second) == 0


@needs_fork
def test_processes_keep_the_order_and_share_the_threads():
    known = {'a lock, which cannot be sent': threading.Lock(), 'factor': 3}
    both = multiprocessing.get_context('fork').Barrier(2)

    def slow(number):
        if number < 2:
            both.wait(60)
        time.sleep(0.02 * (number % 3 == 0))
        os.kill(os.getpid(), signal.SIGINT)                        # as a terminal sends Ctrl-C to all: it is the caller's
        return known['factor'] * number, os.getpid(), number_of_threads()

    with set_threads(5):
        found, pids, threads = zip(*in_processes(slow, range(12), 2))
    assert found == tuple(range(0, 36, 3)) and len({*pids}) == 2 and os.getpid() not in pids and {*threads} == {2}


@pytest.mark.parametrize('number, can_fork', [(1, True), (3, False)])
def test_where_processes_are_not_to_be_had_this_one_computes(number, can_fork, monkeypatch):
    monkeypatch.setattr(workers, 'CAN_FORK', can_fork)
    assert {*in_processes(lambda item: os.getpid(), range(4), number)} == {os.getpid()}


@needs_fork
def test_few_items_are_taken_in_advance_and_a_caller_that_leaves_leaves_no_process():
    taken = []
    with closing(in_processes(lambda item: -item, (taken.append(n) or n for n in range(100)), 2)) as found:
        assert next(found) == 0 and len(taken) <= 5
        assert len(multiprocessing.active_children()) == 2


@needs_fork
def test_an_error_in_a_process_is_raised_as_itself_and_in_its_place():
    def picky(number):
        if number == 3:
            raise LookupError('number 3')
        return number

    seen = []
    with pytest.raises(LookupError, match='number 3'):
        for number in in_processes(picky, range(9), 2):
            seen.append(number)
    assert seen == [0, 1, 2]


@needs_fork
def test_a_process_that_is_ended_from_outside_is_one_clear_error():
    with pytest.raises(RuntimeError, match='ended from outside, for lack of memory perhaps; take less at once, or NERVENET_THREADS=1'):
        list(in_processes(lambda number: number == 2 and os.kill(os.getpid(), signal.SIGKILL), range(5), 2))


@needs_fork
@pytest.mark.parametrize('sent', ['SIGKILL', 'SIGTERM', 'SIGINT'])
def test_processes_end_with_the_one_that_made_them(sent):
    """The script names its processes once all are at work; whoever asks for more than they can do is ended by a signal to it alone."""
    script = ('import os, time; from nervenet.engine.workers import in_processes\n'
              'work = lambda n: (time.sleep(0.05), os.getpid())[1]\n'
              'for n, pid in enumerate(in_processes(work, iter(int, 1), 3)): print(pid, flush=True)')
    with subprocess.Popen([sys.executable, '-c', script], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler)) as process:
        pids = set()
        while len(pids) < 3:                        # a busy machine may start the last of them late
            pids.add(int(process.stdout.readline()))
        process.send_signal(getattr(signal, sent))
        process.communicate(timeout=20)
    assert process.returncode != 0
    until = time.monotonic() + 10
    while any(map(alive, pids)) and time.monotonic() < until:
        time.sleep(0.02)
    assert not any(map(alive, pids))


def alive(pid):
    try:
        with open(f'/proc/{pid}/stat') as file:
            return file.read().rpartition(') ')[2][0] != 'Z'
    except OSError:
        return False
