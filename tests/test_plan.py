import gc
import os
import random
import sys
import threading

import numpy
import pytest

import nervenet
from helpers import in_a_child
from nervenet.engine import memory, plan
from nervenet.engine.memory import empty
from nervenet.engine.parallel import set_threads
from nervenet.train import evaluate, predict, train_step

LIKE, SIZE = numpy.zeros(1, 'uint8'), 2**16


class Owner:
    """Stands for a model: what plans are kept for."""


@pytest.fixture
def fresh(monkeypatch):
    """No plans, no region and a pool of its own for one test, whose arrays must not outlive it."""
    monkeypatch.setattr(plan, '_models', {})
    monkeypatch.setattr(plan, '_region', None)
    monkeypatch.setattr(memory, '_pool', memory._Pool())
    yield
    gc.collect()


def step(owner, sizes, kind='step'):
    """Ask for arrays of these sizes one after the other, each dropped when the next but one is there; return their addresses."""
    addresses, held = [], []
    with plan.planned(owner, kind):
        for size in sizes:
            held.append(empty((size,), LIKE))
            addresses.append(held[-1].ctypes.data)
            held[-1][...] = len(addresses)
            assert all((array == number).all() for number, array in enumerate(held, len(addresses) - len(held) + 1))
            del held[:-2]
    return addresses


def in_region(address):
    start = plan._region.memory.ctypes.data
    return start <= address < start + plan._region.memory.nbytes


def overlapping(offsets, sizes, lives):
    return [(a, b) for a in offsets for b in offsets if a < b and lives[a][0] < lives[b][1] and lives[b][0] < lives[a][1]
            and offsets[a] < offsets[b] + sizes[b] and offsets[b] < offsets[a] + sizes[a]]


def test_arrays_that_live_at_once_never_overlap_in_a_layout_and_it_is_little_larger_than_they_are():
    rng = random.Random(0)
    for _ in range(50):
        lives = {number: (number, rng.randint(number + 1, 60)) for number in range(60)}
        sizes = {number: rng.randint(1, 50) * plan.PAGE // 2 for number in lives}
        offsets = plan.lay_out(sizes, lives)
        assert not overlapping(offsets, sizes, lives)
        assert all(offset % plan.PAGE == 0 for offset in offsets.values())
        needed = max(sum(sizes[number] for number, (born, gone) in lives.items() if born <= now < gone) for now in range(60))
        assert needed <= max(offsets[number] + sizes[number] for number in lives) <= 1.3 * needed


def test_a_step_is_watched_and_the_next_ones_lie_in_one_region_as_large_as_needed_at_once(fresh):
    owner, sizes = Owner(), [SIZE, 3 * SIZE, 2 * SIZE, SIZE, 5 * SIZE]
    step(owner, sizes)
    assert plan._region is None
    second, third = step(owner, sizes), step(owner, sizes)
    assert second == third and all(map(in_region, second))
    assert plan._region.memory.nbytes == 8 * SIZE                      # the three neighbours that need most: 2 + 1 + 5
    assert memory._pool.total == 0                                    # what the watched step left is given back


def test_a_step_that_asks_for_other_sizes_is_served_all_the_same_and_planned_anew(fresh):
    owner = Owner()
    for sizes in ([SIZE, 2 * SIZE, SIZE], [SIZE, 2 * SIZE, SIZE], [SIZE, 3 * SIZE, SIZE, SIZE]):
        addresses = step(owner, sizes)
    assert in_region(addresses[0]) and not in_region(addresses[1]) and not in_region(addresses[3])
    assert all(map(in_region, step(owner, [SIZE, 3 * SIZE, SIZE, SIZE])))


def test_a_place_whose_array_or_a_view_of_it_still_lives_is_not_handed_out(fresh):
    owner, like = Owner(), numpy.zeros(1, 'float32')

    def one(keep):
        with plan.planned(owner):
            array = empty((SIZE,), like)
            if keep:
                array[...] = keep
                return array[10:, None][::3]

    one(0), one(0)
    held = [one(number) for number in range(1, 6)]
    assert in_region(held[0].ctypes.data) and not any(in_region(view.ctypes.data) for view in held[1:])
    assert all((view == number).all() for number, view in enumerate(held, 1))
    address = held[0].ctypes.data
    del held[0]
    again = one(9)
    assert again.ctypes.data == address                                 # free again


def test_what_outlives_its_step_comes_from_the_pool_and_does_not_hold_the_region(fresh):
    owner, like, held = Owner(), numpy.zeros(1, 'float32'), []
    for _ in range(4):
        with plan.planned(owner):
            inner = empty((SIZE,), like)
            held.append(empty((2 * SIZE,), like))
        inner_address = inner.ctypes.data
        del inner
    assert in_region(inner_address) and not any(in_region(array.ctypes.data) for array in held)


def test_what_is_dropped_before_the_next_step_lies_in_the_region_to_its_end(fresh):
    """As gradients do: the next step begins without them."""
    owner, like, gradient = Owner(), numpy.zeros(1, 'float32'), None
    for _ in range(4):
        del gradient
        with plan.planned(owner):
            first = empty((SIZE,), like)
            gradient = empty((SIZE,), like)
            del first
            last = empty((SIZE,), like)
            assert not numpy.shares_memory(last, gradient)
            del last
    assert in_region(gradient.ctypes.data)


def test_a_step_that_is_broken_off_changes_no_plan(fresh):
    owner, sizes = Owner(), [SIZE, 2 * SIZE]
    step(owner, sizes), step(owner, sizes)
    with pytest.raises(KeyError), plan.planned(owner, 'step'):
        empty((SIZE,), LIKE)
        raise KeyError
    assert memory.this_thread.step is None
    assert all(map(in_region, step(owner, sizes)))


def test_plans_share_a_region_that_shrinks_and_goes_with_their_models(fresh):
    small, large = Owner(), Owner()
    for _ in range(2):
        step(small, [SIZE, SIZE]), step(large, [9 * SIZE, SIZE])
    assert plan._region.memory.nbytes == 10 * SIZE
    del large
    step(small, [SIZE, SIZE])
    assert plan._region.memory.nbytes == 2 * SIZE
    del small
    assert plan._region is None and not plan._models


def test_a_model_remembers_its_last_kinds_of_steps_only(fresh):
    owner = Owner()
    for kind in range(2 * plan.MOST_PLANS):
        step(owner, [SIZE], kind)
        step(owner, [SIZE], 'often')
    assert len(plan._models[id(owner)]) == plan.MOST_PLANS and ('often',) in plan._models[id(owner)]


def test_several_threads_in_planned_steps_never_share_an_array(fresh):
    owner, wrong, rng = Owner(), [], random.Random(0)
    step(owner, [SIZE] * 6), step(owner, [SIZE] * 6)

    def work(mark, rng):
        held = []
        for _ in range(60):
            with plan.planned(owner, 'step'):
                for _ in range(6):
                    array = empty((SIZE,), LIKE)
                    array[...] = mark
                    held.append(array[rng.randrange(SIZE):])
                    if rng.random() < 0.7:
                        held.pop(rng.randrange(len(held)))
                    if not all((view == mark).all() for view in held[-8:]):
                        wrong.append(mark)
            del held[:-20]

    threads = [threading.Thread(target=work, args=(mark, random.Random(mark))) for mark in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='this system cannot fork')
def test_parent_and_forked_child_do_not_write_into_each_others_region(fresh):
    owner, like = Owner(), numpy.zeros(1, 'float32')

    def one(value):
        with plan.planned(owner):
            array = empty((SIZE,), like)
            array[...] = value
            return array

    one(0)
    one(0)
    held = one(1)

    def child():
        assert plan._region is None and (held == 1).all()
        assert (one(2) == 2).all() and (held == 1).all()

    in_a_child(child)
    assert (held == 1).all() and in_region(held.ctypes.data)


def model_and_batch(norm='batch', N=3):
    rng = numpy.random.default_rng(0)
    x = rng.random((N, 32, 48, 1)).astype('float32')
    return nervenet.UNet(base_channels=4, depth=2, norm=norm, rng=0), x, (x > 0.7).astype('float32')


@pytest.mark.parametrize('threads', [1, 3])
@pytest.mark.parametrize('norm', ['batch', None])
def test_a_network_asks_for_the_same_arrays_in_every_step(norm, threads, fresh):
    model, x, target = model_and_batch(norm)
    loss, optimizer = nervenet.DiceLoss(), nervenet.Adam(model.parameters(), 1e-3)
    kinds = {'training': lambda: train_step(model, loss, optimizer, x, target), 'inference': lambda: predict(model, x),
             'evaluation': lambda: evaluate(model, loss, [(x, target)])}
    with set_threads(threads):
        for kind, work in kinds.items():
            for _ in range(4):
                work()
            one, = (one for key, one in plan._models[id(model)].items() if key[0] == kind)
            assert one.places and one.last is None
            assert all(place is not None for _, place in one.places)
    assert memory._pool.used == 0


def test_a_planned_training_gives_the_same_bits_as_one_without_plan(fresh, monkeypatch):
    def train():
        model, x, target = model_and_batch()
        loss, optimizer = nervenet.DiceLoss(), nervenet.Adam(model.parameters(), 1e-3)
        values = [float(train_step(model, loss, optimizer, x, target)) for _ in range(4)]
        return values, [predict(model, x) for _ in range(3)], model.parameters()

    planned = train()
    monkeypatch.setattr(plan._Plan, 'seen', lambda self, step: None)
    unplanned = train()
    assert planned[0] == unplanned[0]
    assert all((a == b).all() for a, b in zip(planned[1], unplanned[1]))
    assert all((array == unplanned[2][name]).all() for name, array in planned[2].items())


def test_threads_that_meet_many_kinds_of_steps_get_along(fresh):
    owner, errors = Owner(), []

    def work(rng):
        try:
            for _ in range(400):
                kind = rng.randrange(40)
                step(owner, [SIZE * (1 + kind % 3)] * rng.randrange(1, 4), kind)
        except Exception as error:
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(random.Random(number),)) for number in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not errors and len(plan._models[id(owner)]) <= plan.MOST_PLANS
