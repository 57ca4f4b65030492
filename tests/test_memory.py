import gc
import threading

import numpy
import pytest

from nervenet.engine import backend, memory
from nervenet.engine.memory import empty, scratch
from nervenet.engine.parallel import parallel_for, set_threads

LARGE = (5, memory.LEAST_BYTES // 4)                    # of float32: five times the least size that is pooled


@pytest.fixture
def pool(monkeypatch):
    """A pool of its own for one test. Arrays made in it must not outlive the test."""
    monkeypatch.setattr(memory, '_pool', memory._Pool())
    yield memory._pool
    gc.collect()


def address(array):
    return array.ctypes.data


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
