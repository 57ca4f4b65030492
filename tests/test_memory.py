import gc
import mmap
import os
import queue
import threading
from pathlib import Path

import numpy
import pytest

from helpers import in_a_child
from nervenet import UNet
from nervenet.engine import backend, memory
from nervenet.engine.memory import empty, scratch
from nervenet.engine.parallel import parallel_for, set_threads
from nervenet.train import predict

LARGE = (5, memory.LEAST_BYTES // 4)                    # of float32: five times the least size that is pooled


@pytest.fixture
def pool(monkeypatch):
    """A pool of its own for one test. Arrays made in it must not outlive the test."""
    monkeypatch.setattr(memory, '_pool', memory._Pool())
    yield memory._pool
    gc.collect()


def address(array):
    return array.ctypes.data


needs_fork = pytest.mark.skipif(not hasattr(os, 'fork'), reason='this system cannot fork')


def outcome(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize('dtype', ['float32', 'float64', 'complex128'])
def test_empty_has_shape_dtype_and_device_of_what_it_is_like(xp, dtype, pool):
    like = backend.move(numpy.zeros(3, dtype), 'cpu' if xp is numpy else 'gpu')
    for shape in (LARGE, (2, 3), (0, 4), ()):
        array = empty(shape, like)
        assert array.shape == shape and array.dtype == dtype and backend.get_array_module(array) is xp
        array[...] = 1
        assert (backend.to_cpu(array) == 1).all()


def test_memory_is_used_again_only_after_the_last_view_of_it_is_gone(pool):
    like = numpy.zeros(1, 'float32')
    array = empty(LARGE, like)
    first, view = address(array), array[1:, ::2].T
    del array
    other = empty(LARGE, like)
    assert address(other) != first                      # a view still lives
    view[...] = 7
    other[...] = 1
    assert (view == 7).all()
    del view
    third = empty((LARGE[1], LARGE[0]), like)           # another shape of the same size
    assert address(third) == first and address(other) != first


def test_little_more_memory_is_held_than_was_in_use_at_once(pool):
    like, rng, held = numpy.zeros(1, 'float32'), numpy.random.default_rng(0), []
    for _ in range(300):
        while held and rng.random() < 0.5:
            held.pop(int(rng.integers(len(held))))
        held.append(empty((int(rng.integers(memory.LEAST_BYTES // 4, memory.LEAST_BYTES)),), like))
        in_use = sum(array.nbytes for array in held)
        waiting = sum(piece.nbytes for piece in pool.waiting)
        assert in_use <= pool.used <= memory.WASTE * in_use
        assert pool.total == pool.used + waiting <= memory.SLACK * pool.peak
    held.clear()


def test_the_smallest_piece_that_fits_is_taken_and_of_equals_the_one_used_last(pool):
    like, size = numpy.zeros(1, 'uint8'), memory.LEAST_BYTES
    arrays = {name: empty((factor * size,), like) for name, factor in (('large', 14), ('first', 12), ('last', 12), ('small', 10))}
    place = {name: address(array) for name, array in arrays.items()}
    for name in ('first', 'last', 'large', 'small'):
        del arrays[name]                                # its memory returns
    taken = [empty((11 * size,), like) for _ in range(3)]
    assert [address(array) for array in taken] == [place['last'], place['first'], place['large']]


def test_the_memory_that_has_been_waiting_longest_is_given_back_first(pool):
    like, size = numpy.zeros(1, 'uint8'), memory.LEAST_BYTES
    arrays = [empty((factor * size,), like) for factor in (8, 9, 10)]
    last = address(arrays[2])
    while arrays:
        arrays.pop(0)
    held = empty((20 * size,), like)                    # nothing fits; with all, 47 would be there where 27 were in use at most
    assert [address(piece) for piece in pool.waiting] == [last] and pool.total == held.nbytes + pool.waiting[0].nbytes


def test_one_thread_at_a_time_takes_memory(pool):
    taken = []
    thread = threading.Thread(target=lambda: taken.append(pool.take(memory.LEAST_BYTES).nbytes))
    with pool.lock:
        thread.start()
        thread.join(0.1)
        assert not taken
    thread.join()
    assert taken == [memory.LEAST_BYTES]


def test_too_much_is_a_memory_error_and_changes_no_account(pool):
    kept = empty(LARGE, numpy.zeros(1, 'float32'))
    before = pool.used, pool.total
    for size in 2**55, 2**62:
        with pytest.raises(MemoryError, match='Unable to allocate'):
            pool.take(size)
    assert (pool.used, pool.total) == before == (kept.nbytes, kept.nbytes)


def test_arrays_in_use_never_overlap_though_threads_come_and_go(pool):
    like, overlaps = numpy.zeros(1, 'float32'), []

    def work(number):
        for round in range(200):
            array = empty(LARGE, like)
            array[...] = number * 1000 + round
            if not (array == number * 1000 + round).all():
                overlaps.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not overlaps
    empty(LARGE, like)
    assert pool.used == numpy.prod(LARGE) * 4 and pool.total <= memory.SLACK * pool.peak


def test_scratch_is_reused_in_a_thread_and_never_shared_between_threads():
    a = scratch('test', (3, 5), 'float32')
    a[...] = 1
    b = scratch('test', (4, 2), 'float64')
    assert a.shape == (3, 5) and a.dtype == 'float32' and b.shape == (4, 2) and b.dtype == 'float64'
    assert numpy.shares_memory(scratch('test', (2,), 'uint8'), b)
    assert not numpy.shares_memory(scratch('other', (4, 2), 'float64'), b)
    assert b.ctypes.data % 64 == 0
    barrier = threading.Barrier(2)

    def work(block):
        mine = scratch('test', (1000,), 'int64')
        barrier.wait(10)
        mine[...] = block
        barrier.wait(10)
        return (mine == block).all()

    with set_threads(2):
        assert all(parallel_for(range(2), work))


@needs_fork
def test_a_forked_child_and_its_parent_do_not_write_into_each_others_arrays(pool):
    like = numpy.zeros(1, 'float32')
    array, waiting = empty(LARGE, like), empty(LARGE, like)
    array[...], waiting[...] = 1, 1
    del waiting
    to_child, to_parent = os.pipe(), os.pipe()

    def work():
        new = empty(LARGE, like)
        array[...], new[...] = 2, 3
        os.write(to_parent[1], b'.')
        os.read(to_child[0], 1)                         # the parent has written meanwhile
        return (array == 2).all() and (new == 3).all()

    child = in_a_child(work)
    os.read(to_parent[0], 1)
    new = empty(LARGE, like)
    assert (array == 1).all()
    array[...], new[...] = 4, 5
    os.write(to_child[1], b'.')
    assert outcome(child) == 0 and (array == 4).all() and (new == 5).all()
    for end in (*to_child, *to_parent):
        os.close(end)


@needs_fork
def test_workers_that_predict_with_one_model_at_once_predict_what_it_predicts(rng):
    model, x = UNet(base_channels=4, depth=2, rng=rng), rng.random((4, 96, 128, 1), dtype='float32')
    expected = predict(model, x)
    children = [in_a_child(lambda: all(numpy.array_equal(predict(model, x), expected) for _ in range(2))) for _ in range(8)]
    assert numpy.array_equal(predict(model, x), expected)
    assert [outcome(child) for child in children] == [0] * 8


@needs_fork
def test_a_child_can_take_memory_whatever_another_thread_was_at_and_its_account_holds(pool):
    like = numpy.zeros(1, 'float32')
    held, free, stop = [empty(LARGE, like) for _ in range(2)], [empty(LARGE, like) for _ in range(4)], threading.Event()
    del free

    def take_and_return():
        while not stop.is_set():
            empty((LARGE[0], LARGE[1] + len(held)), like)

    def work():
        fresh = pool.total == pool.peak == pool.used >= 2 * held[0].nbytes and not pool.waiting
        array = empty((LARGE[0], LARGE[1] * 8), like)
        grown = pool.used >= 2 * held[0].nbytes + array.nbytes
        held.clear()
        del array
        empty(LARGE, like)
        waiting = sum(piece.nbytes for piece in pool.waiting)
        return fresh and grown and pool.total == pool.used + waiting <= memory.SLACK * pool.peak

    thread = threading.Thread(target=take_and_return)
    thread.start()
    outcomes = [outcome(in_a_child(work)) for _ in range(30)]
    stop.set()
    thread.join()
    held.clear()
    assert outcomes == [0] * 30


@needs_fork
def test_a_fork_waits_for_who_holds_the_lock_of_the_pool(pool):
    locked = threading.Event()

    def hold():
        with pool.lock:
            locked.set()
            stop.wait(0.3)

    stop, thread = threading.Event(), threading.Thread(target=hold)
    thread.start()
    locked.wait(10)
    child = in_a_child(lambda: empty(LARGE, numpy.zeros(1)).shape == LARGE)
    thread.join()
    assert outcome(child) == 0 and not pool.lock.locked()


@pytest.mark.skipif(not os.path.exists('/sys/kernel/mm/transparent_hugepage/enabled'), reason='this system has no huge pages')
def test_large_arrays_lie_in_huge_pages():
    if '[never]' in Path('/sys/kernel/mm/transparent_hugepage/enabled').read_text() or not hasattr(mmap, 'MADV_HUGEPAGE'):
        pytest.skip('huge pages are switched off')

    def huge():
        lines = Path('/proc/self/smaps').read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith('AnonHugePages'))

    before, array = huge(), memory.pages(2**26)
    array[::4096] = 1
    assert huge() - before >= 2**16 / 2                 # kB, of 64 MiB: half of it at least, where memory is in pieces


def test_arrays_never_overlap_while_views_are_cut_freed_elsewhere_and_collected_at_odd_moments(pool):
    """Threads hold views of some arrays in cycles, hand others on to be freed by others, and look whether their own stay."""
    like, faults, handed = numpy.zeros(1, 'float32'), [], queue.SimpleQueue()

    class Cycle:
        def __init__(self, view):
            self.view, self.self = view, self

    def work(number):
        rng, mine = numpy.random.default_rng(number), []
        for round in range(150):
            value = number * 1000 + round
            array = empty((int(rng.integers(1, 5)), memory.LEAST_BYTES // 4), like)
            array[...] = value
            view = array[::2, 5:-5].T if rng.random() < 0.5 else array.reshape(-1)[3:].view('int32')[1:].view('float32')
            mine.append((view, value))
            del array
            if rng.random() < 0.5:
                Cycle(mine[int(rng.integers(len(mine)))][0])            # garbage that only the collector finds
            if rng.random() < 0.3:
                handed.put(mine.pop(int(rng.integers(len(mine)))))
            if rng.random() < 0.3 and not handed.empty():
                mine.append(handed.get())
            while len(mine) > 6:
                view, value = mine.pop(int(rng.integers(len(mine))))
                if not (view == value).all():
                    faults.append(value)

    threshold = gc.get_threshold()
    gc.set_threshold(7)
    try:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        gc.set_threshold(*threshold)
    while not handed.empty():
        handed.get()
    gc.collect()
    assert not faults
    empty(LARGE, like)
    assert pool.used == numpy.prod(LARGE) * 4
