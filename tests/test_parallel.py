"""Blocks on threads: order, errors, nesting, concurrency, BLAS, and that nothing is left behind."""

import contextlib
import contextvars
import json
import multiprocessing
import operator
import os
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy
import pytest

from helpers import in_a_child
from nervenet.engine import parallel
from nervenet.engine.parallel import cut, cut_images, one_thread_per_product, parallel_for, set_threads
from nervenet.engine.pixelwise import channel_sums


def wait_until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, 'waited 10 s'
        time.sleep(0.01)


def helpers():
    return [thread for thread in threading.enumerate() if thread.name == 'nervenet helper']


def meet(parties):
    """Return a work function whose blocks return only once `parties` of them run at the same time."""
    barrier = threading.Barrier(parties)

    def work(block):
        barrier.wait(10)
        return block, threading.get_ident()
    return work


@pytest.fixture
def two_blas_threads():
    if parallel._blas.set is None:
        pytest.skip('the BLAS behind NumPy cannot be asked for its threads')
    before = parallel._blas.get()
    parallel._blas.set(2)
    yield
    parallel._blas.set(before)


@pytest.mark.parametrize('threads', [1, 2, 3, 8])
def test_results_come_in_block_order(threads):
    with set_threads(threads):
        assert parallel_for(range(50), lambda block: block * block) == [block * block for block in range(50)]
        assert parallel_for([], lambda block: 1 / 0) == []
        assert parallel_for(iter('ab'), str.upper) == ['A', 'B']              # more threads than blocks


def test_blocks_run_at_the_same_time():
    with set_threads(3):
        idents = {ident for _, ident in parallel_for(range(3), meet(3))}
    assert len(idents) == 3 and threading.get_ident() in idents


@pytest.mark.parametrize('threads', [1, 2, 4])
def test_the_error_of_the_first_failing_block_arrives_as_itself(threads):
    error, started = KeyError('block 5'), []

    def work(block):
        started.append(block)
        if block == 5:
            time.sleep(0.02)                        # block 6, on another thread, fails earlier in time
            raise error
        if block == 6:
            raise ValueError('block 6')

    with set_threads(threads):
        with pytest.raises(KeyError) as caught:
            parallel_for(range(100), work)
        assert caught.value is error
        assert len(started) < 100                   # no further block starts
        assert parallel_for(range(3), lambda block: block) == [0, 1, 2]       # and the next call works


def test_no_block_runs_on_after_an_error_has_reached_the_caller():
    finished = []

    def work(block):
        if block == 0:
            raise ValueError
        time.sleep(0.05)
        finished.append(block)

    with set_threads(2), pytest.raises(ValueError):
        parallel_for(range(2), work)
    before = list(finished)
    time.sleep(0.1)
    assert finished == before


def test_a_nested_call_runs_where_it_is():
    def inner(block):
        time.sleep(0.002)                           # time for another thread to take the next block
        return threading.get_ident()

    def outer(block):
        together.wait(10)                           # so that one outer block runs in the caller, the other in a helper
        return {threading.get_ident(), *parallel_for(range(8), inner)}

    together = threading.Barrier(2)
    with set_threads(2):
        parallel_for(range(2), meet(2))
        with set_threads(4):
            assert [len(idents) for idents in parallel_for(range(2), outer)] == [1, 1]


def test_concurrent_callers_do_not_disturb_each_other(rng):
    a = rng.standard_normal((6, 40, 40))
    expected, results = [matrix @ matrix for matrix in a], {}

    def caller(name):
        for _ in range(20):
            results[name] = parallel_for(range(6), lambda block: a[block] @ a[block])
            assert len(helpers()) <= 2              # for all callers together

    wait_until(lambda: not helpers())
    with set_threads(3):
        threads = [threading.Thread(target=caller, args=(name,)) for name in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(numpy.array_equal(result, expected) for result in results.values()) and len(results) == 4


def test_blocks_see_the_context_of_the_caller():
    variable = contextvars.ContextVar('variable', default='unset')
    variable.set('set')
    with set_threads(3):
        assert {name for name in parallel_for(range(9), lambda block: variable.get())} == {'set'}
        work = meet(3)

        def divide(block):
            work(block)
            return numpy.ones(1) / numpy.zeros(1)

        with numpy.errstate(divide='raise'), pytest.raises(FloatingPointError):
            parallel_for(range(3), divide)
        with numpy.errstate(divide='ignore'):
            parallel_for(range(3), divide)


def test_no_thread_is_left_behind():
    wait_until(lambda: not helpers())
    with set_threads(4):
        parallel_for(range(4), meet(4))
    assert len(helpers()) == 3                      # they wait for more work
    wait_until(lambda: not helpers())
    assert (parallel._helpers.alive, parallel._helpers.idle) == (0, 0)
    with set_threads(4):
        parallel_for(range(4), meet(4))             # and are started again when needed


def test_waiting_helpers_are_used_again():
    wait_until(lambda: not helpers())
    with set_threads(3):
        first = {ident for _, ident in parallel_for(range(3), meet(3))}
        wait_until(lambda: parallel._helpers.idle == 2)
        assert {ident for _, ident in parallel_for(range(3), meet(3))} == first


def test_waiting_helpers_keep_no_arrays_alive():
    class Block:
        deleted = False

        def __del__(self):
            Block.deleted = True

    with set_threads(2):
        parallel_for([Block(), Block()], lambda block: None)
    wait_until(lambda: Block.deleted)


def test_a_job_that_waits_for_a_busy_helper_keeps_no_arrays_alive():
    class Block:
        alive = 0

        def __init__(self):
            Block.alive += 1

        def __del__(self):
            Block.alive -= 1

    busy, release = threading.Barrier(3), threading.Event()

    def keep_busy(block):
        busy.wait(10)
        release.wait(10)

    wait_until(lambda: not helpers())
    with set_threads(2):
        other = threading.Thread(target=parallel_for, args=(range(2), keep_busy))
        other.start()
        busy.wait(10)                               # the only helper is at work for the other caller
        parallel_for([Block(), Block()], lambda block: None)
        alive = Block.alive
        release.set()
        other.join()
    assert alive == 0


def test_helpers_leave_after_many_short_calls_from_many_threads():
    """A helper may find that another has taken the job it was started for."""
    def caller():
        for _ in range(100):
            parallel_for(range(3), lambda block: None)

    with set_threads(5):
        threads = [threading.Thread(target=caller) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    wait_until(lambda: not helpers())
    assert (parallel._helpers.alive, parallel._helpers.idle, parallel._helpers.jobs.qsize()) == (0, 0, 0)


def test_cut_covers_the_range_in_nearly_equal_parts_of_at_most_the_size():
    for length in range(13):
        for size in range(8):
            parts = [range(length)[part] for part in cut(length, size)]
            assert [index for part in parts for index in part] == list(range(length))
            sizes = [len(part) for part in parts] or [1]
            assert max(sizes) <= max(size, 1) and min(sizes) >= max(1, max(sizes) - 1)
            assert len(parts) == -(-length // max(size, 1))             # no more than it takes


def test_cut_images_gives_several_small_images_or_strips_of_one():
    whole = slice(0, 6)
    assert cut_images(3, 6, 12) == [(slice(0, 1), whole), (slice(1, 3), whole)]
    assert cut_images(2, 6, 6) == [(slice(0, 1), whole), (slice(1, 2), whole)]
    assert cut_images(2, 6, 3) == [(slice(n, n + 1), rows) for n in (0, 1) for rows in (slice(0, 3), slice(3, 6))]
    assert [rows for _, rows in cut_images(1, 13, 3)] == [slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 8), slice(8, 10), slice(10, 13)]
    assert [len(cut_images(images, 13, rows)) for images, rows in [(1, 5), (3, 5), (2, 5), (1, 1), (1, 12)]] == [4, 12, 6, 13, 2]


@pytest.mark.skipif(not hasattr(os, 'sched_getaffinity'), reason='this system does not say which cores a process may use')
def test_only_cores_that_this_process_may_use_count(monkeypatch):
    monkeypatch.setattr(os, 'sched_getaffinity', lambda process: {3, 5, 7})
    monkeypatch.setattr(os, 'cpu_count', lambda: 64)
    monkeypatch.delenv('NERVENET_THREADS', raising=False)
    assert parallel.number_of_threads() == 3
    monkeypatch.setenv('NERVENET_THREADS', '2')             # the environment says less, or more, and the program has the last word
    assert parallel.number_of_threads() == 2
    with parallel.set_threads(4):
        assert parallel.number_of_threads() == 4
    monkeypatch.setenv('NERVENET_THREADS', 'all')
    with pytest.raises(ValueError, match="NERVENET_THREADS is 'all'; expected a whole number"):
        parallel.number_of_threads()


def test_set_threads_holds_and_returns():
    available = parallel.number_of_threads()
    with set_threads(5):
        assert parallel.number_of_threads() == 5
        with set_threads(None):
            assert parallel.number_of_threads() == available
        assert parallel.number_of_threads() == 5
    assert parallel.number_of_threads() == available
    set_threads(2)
    assert parallel.number_of_threads() == 2
    set_threads(None)
    with pytest.raises(ValueError, match='number of threads is 0'):
        set_threads(0)


@pytest.mark.skipif(parallel._blas.set is None, reason='the BLAS behind NumPy cannot be asked for its threads')
def test_blas_uses_one_thread_while_blocks_run_and_its_own_number_afterwards():
    before = parallel._blas.get()
    try:
        parallel._blas.set(2)
        for threads in (1, 3):
            with set_threads(threads):
                assert set(parallel_for(range(4), lambda block: parallel._blas.get())) == {1}
                assert parallel._blas.get() == 2
                with pytest.raises(ZeroDivisionError):
                    parallel_for(range(4), lambda block: 1 / 0)
                assert parallel._blas.get() == 2
    finally:
        parallel._blas.set(before)


@pytest.mark.skipif(parallel._blas.set is None, reason='the BLAS behind NumPy cannot be asked for its threads')
def test_blas_returns_to_its_own_number_when_the_last_of_several_callers_is_done():
    before, started, release = parallel._blas.get(), threading.Event(), threading.Event()

    def stay(block):
        started.set()
        release.wait(10)
        return parallel._blas.get()

    try:
        parallel._blas.set(2)
        results = []
        other = threading.Thread(target=lambda: results.extend(parallel_for([0], stay)))
        other.start()
        assert started.wait(10)
        assert parallel_for([0], lambda block: parallel._blas.get()) == [1]
        assert parallel._blas.get() == 1            # the other caller's block still runs
        release.set()
        other.join()
        assert results == [1] and parallel._blas.get() == 2
    finally:
        parallel._blas.set(before)


# Places of products, 'file:function', that need no context; a place is all places that begin so.
ON_A_GPU = 'convolution/runs.py', 'engine/backend.py:probe_gpu'
TOO_SMALL_FOR_THREADS = 'images/augment.py:affine', 'study/kfold.py:folds_by_subject'
ONLY_COMPARED_WITH_A_TOLERANCE = 'gradcheck.py', 'images/copies.py:_blocks'


@pytest.mark.skipif(parallel._blas.set is None, reason='the BLAS behind NumPy cannot be asked for its threads')
def test_every_product_in_the_library_runs_on_one_blas_thread():
    program = Path(__file__).with_name('products.py')
    result = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=120,
                            env=os.environ | {'PYTHONPATH': os.pathsep.join(filter(None, sys.path))})
    assert (result.returncode, result.stderr) == (0, '')
    left_alone = ON_A_GPU + TOO_SMALL_FOR_THREADS + ONLY_COMPARED_WITH_A_TOLERANCE
    places = json.loads(result.stdout)
    assert len(places) > 20 and all(any(place.startswith(known) for place in places) for known in left_alone)
    wrong = {place: counts for place, counts in places.items() if counts != [1] and not place.startswith(left_alone)}
    assert not wrong, ('number of BLAS threads of these products; expected 1: put those with another number into parallel_for or '
                       f'one_thread_per_product(), and have tests/products.py run those with none: {wrong}')


def test_one_thread_per_product_decorates_functions_too(two_blas_threads):
    @one_thread_per_product()
    def count():
        return parallel._blas.get()

    assert [count(), count(), parallel._blas.get()] == [1, 1, 2]


def test_without_a_settable_blas_everything_still_runs(monkeypatch):
    monkeypatch.setattr(parallel._blas, 'set', None)
    monkeypatch.setattr(parallel._blas, 'get', None)
    assert parallel_for(range(3), lambda block: block) == [0, 1, 2]
    assert 'cannot be set' in parallel.describe_blas()


needs_fork = pytest.mark.skipif(not hasattr(os, 'fork'), reason='this system cannot fork')


@needs_fork
def test_a_forked_child_and_the_end_of_the_program_are_clean():
    program = '''
import os, threading, warnings
warnings.simplefilter('ignore', DeprecationWarning)     # Python warns of forking beside threads; here it must work
from nervenet.engine.parallel import parallel_for, set_threads
set_threads(3)
barrier = threading.Barrier(3)
parallel_for(range(3), lambda block: barrier.wait(10))
child = os.fork()
if child == 0:
    barrier = threading.Barrier(3)
    parallel_for(range(3), lambda block: barrier.wait(10))
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
print('clean')
'''
    result = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (0, 'clean\n', '')


def outcome_of_child(work):
    """Fork; return 0 if `work()` is true in the child, a negative number if it did not come to an end within 20 s."""
    return os.waitstatus_to_exitcode(os.waitpid(in_a_child(work), 0)[1])


@contextlib.contextmanager
def another_thread(work):
    """Run `work(started, release)` in a thread that the body finds started, and that is released and waited for after it."""
    started, release = threading.Event(), threading.Event()
    thread = threading.Thread(target=work, args=(started, release))
    thread.start()
    try:
        assert started.wait(10)
        yield
    finally:
        release.set()
        thread.join()


def computes():
    """Say whether blocks run here, on helpers too, and leave BLAS with two threads and without a user."""
    together = meet(2)
    with set_threads(2):
        idents = {ident for ((_, ident),) in parallel_for(range(2), lambda block: parallel_for([block], together))}
    return len(idents) == 2 and parallel._blas_users == [] and parallel._blas.get() == 2


@needs_fork
@pytest.mark.parametrize('lock', ['_helpers.lock', '_blas_changed'])
def test_a_child_computes_though_another_thread_held_a_lock_at_the_fork(lock, two_blas_threads):
    def hold(started, release):
        with operator.attrgetter(lock)(parallel):
            started.set()
            release.wait(0.3)

    with another_thread(hold):
        assert outcome_of_child(computes) == 0
    assert computes()


@needs_fork
def test_a_fork_waits_until_no_other_thread_is_in_a_block(two_blas_threads):
    finished = []

    def stay(started, release):
        def work(block):
            started.set()
            release.wait(0.3)
            finished.append(block)
        parallel_for(range(1), work)

    with another_thread(stay):
        assert outcome_of_child(lambda: finished == [0] and computes()) == 0
    assert computes()


@needs_fork
def test_who_multiplies_already_can_go_on_while_a_fork_waits_for_it(two_blas_threads, monkeypatch):
    monkeypatch.setattr(parallel, 'PATIENCE', 2)                        # after that the child would come too early
    finished = []

    def stay(started, release):
        def work(block):
            together.wait(10)                       # one block in the caller, one in a helper
            started.set()
            wait_until(lambda: parallel._forks == 1)
            parallel_for(range(3), lambda inner: inner)
            finished.append(block)

        together = threading.Barrier(2)
        with set_threads(2), one_thread_per_product():
            parallel_for(range(2), work)
            parallel_for(range(2), lambda block: finished.append(block))

    with another_thread(stay):
        assert outcome_of_child(lambda: len(finished) == 4 and computes()) == 0


@needs_fork
def test_nobody_starts_to_multiply_while_a_fork_waits(two_blas_threads):
    """With blocks of several threads that overlap without end, a fork would never come."""
    stop = threading.Event()

    def multiply():
        while not stop.is_set():
            parallel_for(range(1), lambda block: time.sleep(0.02))

    threads = [threading.Thread(target=multiply) for _ in range(4)]
    for thread in threads:
        thread.start()
    outcomes = [outcome_of_child(lambda: parallel._blas_users == [] and computes()) for _ in range(20)]
    stop.set()
    for thread in threads:
        thread.join()
    assert outcomes == [0] * 20 and computes()


@needs_fork
def test_a_fork_comes_in_the_end_though_a_block_waits_for_it_and_the_child_is_right(two_blas_threads, monkeypatch):
    monkeypatch.setattr(parallel, 'PATIENCE', 0.1)

    def stay(started, release):
        parallel_for(range(1), lambda block: (started.set(), release.wait(10)))

    with another_thread(stay):
        assert outcome_of_child(computes) == 0
        assert len(parallel._blas_users) == 1
    assert computes()


@needs_fork
def test_a_block_can_fork_and_the_child_goes_on_in_it(two_blas_threads, monkeypatch):
    def work(block):
        meet(block)
        return outcome_of_child(lambda: parallel_for(range(3), lambda inner: inner) == [0, 1, 2])

    def meet(block):
        together.wait(10)                           # so that one block forks in a helper, for which the caller waits
        if block == 0:
            monkeypatch.setattr(parallel._blas_changed, 'wait_for', lambda *args, **kwargs: waited.append(block))
        together.wait(10)

    together, waited = threading.Barrier(2), []
    with set_threads(2):
        assert parallel_for(range(2), work) == [0, 0]
    assert not waited
    monkeypatch.undo()
    with one_thread_per_product():
        assert outcome_of_child(lambda: len(parallel._blas_users) == 1 and parallel._blas.get() == 1) == 0
    assert computes()


@needs_fork
def test_children_of_a_busy_parent_finish_and_compute_what_it_computes(rng):
    a = rng.standard_normal((300, 16, 16)).astype('float32')
    expected, stop, wrong = numpy.matmul(a, a), threading.Event(), []

    def right():
        return numpy.array_equal(numpy.concatenate(parallel_for(range(3), lambda n: numpy.matmul(a[n::3], a[n::3]))),
                                 numpy.concatenate([expected[n::3] for n in range(3)]))

    def multiply():
        while not stop.is_set():
            if not right():
                wrong.append(1)

    with set_threads(2):
        threads = [threading.Thread(target=multiply) for _ in range(2)]
        for thread in threads:
            thread.start()
        outcomes = [outcome_of_child(right) for _ in range(40)]
        stop.set()
        for thread in threads:
            thread.join()
    assert outcomes == [0] * 40 and not wrong


@pytest.mark.skipif('fork' not in multiprocessing.get_all_start_methods(), reason='this system cannot fork')
def test_a_pool_of_forked_workers_computes_what_one_process_computes():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', DeprecationWarning)
        with multiprocessing.get_context('fork').Pool(3) as workers:
            results = workers.map(channel_sums_of_noise, range(24))
    for seed, result in enumerate(results):
        assert numpy.array_equal(result, channel_sums_of_noise(seed))


def channel_sums_of_noise(seed):
    return channel_sums(numpy.random.default_rng(seed).standard_normal((4, 64, 64, 8), dtype='float32'))[0]


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
def test_a_signal_while_a_fork_waits_leaves_nothing_locked():
    """In a process of its own, which must end by itself: a thread multiplies, a fork waits for it, and Ctrl-C comes."""
    program = '''
import os, signal, threading, time
from nervenet.engine.parallel import one_thread_per_product, parallel_for
inside, leave = threading.Event(), threading.Event()
def multiply():
    with one_thread_per_product():
        inside.set()
        leave.wait(20)
thread = threading.Thread(target=multiply)
thread.start()
inside.wait()
signal.signal(signal.SIGALRM, signal.default_int_handler)
signal.setitimer(signal.ITIMER_REAL, 0.2)
try:
    child = os.fork()
except KeyboardInterrupt:
    child = None
if child == 0:
    os._exit(parallel_for([1, 2], lambda block: block) != [1, 2])
assert child is None or os.waitpid(child, 0)[1] == 0
leave.set()
thread.join()
assert parallel_for([1, 2], lambda block: block) == [1, 2]
print('done')
'''
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', program], capture_output=True, text=True, timeout=60,
                          env=os.environ | {'PYTHONPATH': os.pathsep.join(filter(None, sys.path))})
    assert done.stdout.strip() == 'done', done.stderr


def test_threads_that_cannot_start_cost_speed_and_no_result(monkeypatch):
    monkeypatch.setattr(parallel, '_helpers', parallel._Helpers())

    def refuse(thread):
        raise RuntimeError("can't start new thread")

    with set_threads(3), monkeypatch.context() as patch:
        patch.setattr(threading.Thread, 'start', refuse)
        assert parallel_for(range(6), lambda block: block) == list(range(6))
        assert parallel._helpers.alive == 0
    with set_threads(3):
        assert parallel_for(range(6), lambda block: block) == list(range(6)) and parallel._helpers.alive > 0
    for wrong in (0, 2.5, float('nan')):
        with pytest.raises(ValueError, match='number of threads is'):
            set_threads(wrong)


def test_blocks_come_in_even_numbers_unless_they_would_be_small():
    block_size = parallel.block_size
    assert block_size(100, 100, 50) == 50 and block_size(99, 100, 50) == 99
    assert block_size(300, 100, 50) == 75 and block_size(400, 100, 50) == 100 and block_size(401, 100, 50) == 67
    assert block_size(0, 10, 4) == 0 and block_size(1, 1, 0) == 1 and block_size(3, 2, 0) == 2
    assert all(block_size(total, most, half) <= most for total in range(1, 60) for most in range(1, 20) for half in range(10))
