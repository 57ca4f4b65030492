"""Lists of calls: they compute, step after step, just what the operations would compute anew."""

import contextlib
import functools
import gc
import os
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy
import pytest

from nervenet import UNet, convolution, predict
from nervenet.convolution import Geometry
from nervenet.convolution.kept import _of as kept_of
from nervenet.engine import calls, memory, parallel, plan
from nervenet.engine.memory import empty, is_lent
from nervenet.engine.plan import planned
from nervenet.losses import DiceLoss
from nervenet.networks import NETWORKS
from nervenet.optim import SGD
from nervenet.train import train_step

from helpers import planted

SHAPE = 2, 32, 48, 1


@pytest.fixture
def seen(monkeypatch):
    """What became of every `run` in a step: [(the function, whether its calls came from a list), …], of which functions close over nothing."""
    operations, operation = [], plan._Step.operation

    def watched(step, key):
        found = operation(step, key)
        assert key[0].__closure__ is None and key[0].__name__ != '<lambda>'
        operations.append((key[0], found is not None and found.lanes is not None))
        return found

    monkeypatch.setattr(plan._Step, 'operation', watched)
    return operations


@contextlib.contextmanager
def nothing_listed():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan._Step, 'operation', lambda step, key: None)
        yield


def network(name, norm, **options):
    depth = {} if name == 'resnet' else {'depth': 3}
    return NETWORKS[name](base_channels=18, norm=norm, rng=numpy.random.default_rng(5), **depth, **options)


@pytest.fixture(autouse=True)
def nothing_left_of_other_tests():
    """A model that is still waited for by the garbage collector may have the region made anew at any moment."""
    gc.collect()


def trained(model, steps=7):
    """Train on other images in each step; return all parameters and buffers and the losses, and what is then predicted of other images."""
    rng, optimizer, losses = numpy.random.default_rng(6), SGD(model.parameters(), 0.05), []
    for _ in range(steps):
        x = rng.random(SHAPE, 'float32')
        losses.append(float(train_step(model, DiceLoss(), optimizer, x, (rng.random(SHAPE) < 0.3).astype('float32'))))
    model.drop_gradients()
    probabilities = []
    for _ in range(steps):
        probabilities.append(predict(model, rng.random(SHAPE, 'float32')))
        for array in model.parameters().values():
            array *= 0.99                                               # prediction reads the weights of now
    return {**model.state_dict(), 'losses': numpy.array(losses), **{f'prediction {i}': p for i, p in enumerate(probabilities)}}


def differing(a, b):
    return {name for name in a if not numpy.array_equal(a[name], b[name])}


@pytest.mark.parametrize('norm', [None, 'batch'])
@pytest.mark.parametrize('name', NETWORKS)
def test_lists_give_the_bits_of_operations_done_anew(name, norm, seen):
    listed = trained(network(name, norm))
    assert sum(from_list for _, from_list in seen) > 0.3 * len(seen)
    with nothing_listed():
        assert differing(listed, trained(network(name, norm))) == set()


@pytest.mark.parametrize('file, old, new', [
    ('convolution/strips.py', 'yield partial(numpy.matmul, _cut_rows(a', 'yield int; numpy.matmul(_cut_rows(a'),
    ('convolution/strips.py', 'yield partial(numpy.add.reduce, terms', 'yield int; numpy.add.reduce(terms'),
    ('convolution/winograd_2d.py', 'yield partial(numpy.copyto, taps.reshape(weight.shape), weight)', 'taps.reshape(weight.shape)[...] = weight'),
    ('convolution/winograd_1d.py', 'yield partial(numpy.copyto, contiguous, x)', 'contiguous[...] = x; yield int'),
    ('convolution/patches.py', 'yield partial(numpy.copyto, patches, windows)', 'patches[...] = windows; yield int'),
    ('convolution/strips.py', 'yield partial(numpy.copyto, out, total.reshape(out.shape))', 'out[...] = total.reshape(out.shape); yield int'),
    ('convolution/im2col.py', 'yield partial(numpy.copyto, columns, taps)', 'columns[...] = taps'),
    ('engine/pixelwise.py', 'yield partial(formula, a, b, out=out[rows])', 'formula(a, b, out=out[rows])'),
    ('engine/pooling.py', 'yield partial(copy_into, rest, dy[block])', 'rest[...] = dy[block]')], ids=lambda value: value.split('(')[0])
def test_what_is_done_while_listing_is_found_out(file, old, new):
    """As above, with a call that is made when it should be listed."""
    with nothing_listed():
        right = trained(network('unet', 'batch'))
    with planted(f'nervenet/{file}', old, new), numpy.errstate(all='ignore'):
        assert differing(right, trained(network('unet', 'batch')))


@pytest.mark.parametrize('kernel, stride, padding, C_in, C_out', [(1, 1, 0, 4, 3), (2, 2, 0, 4, 3), (3, 1, 'same', 4, 5), (3, 1, 'same', 16, 12),
                                                                  (3, 1, 'same', 40, 36), (3, 2, 1, 6, 5)])
def test_what_does_not_lie_side_by_side_is_read_anew_in_each_step(kernel, stride, padding, C_in, C_out, seen):
    """A layer may be given part of an array, cut off at the sides: to make it contiguous is a copy."""
    rng, model = numpy.random.default_rng(0), Model()
    geometry, weight = Geometry(kernel, stride, padding), rng.random((kernel, kernel, C_in, C_out))
    H_out, W_out = geometry.output_size((16, 24))
    whole_x, whole_dy = numpy.empty((3, 16, 28, C_in)), numpy.empty((3, H_out, W_out + 4, C_out))
    x, dy = whole_x[:, :, 2:-2], whole_dy[:, :, 2:-2]

    def three():
        return (convolution.forward(x, weight, geometry), convolution.input_gradient(dy, weight, (16, 24), geometry),
                convolution.weight_gradient(x, dy, geometry))

    for _ in range(6):
        whole_x[...], whole_dy[...] = rng.random(whole_x.shape), rng.random(whole_dy.shape)
        with planned(model, 'a test'):
            found = [array.copy() for array in three()]
        assert all(numpy.array_equal(a, b) for a, b in zip(found, three()))


@pytest.mark.parametrize('name', NETWORKS)
def test_prepared_weights_that_are_out_of_date_are_held_by_no_list(name):
    model, x = network(name, 'batch'), numpy.random.default_rng(0).random(SHAPE, 'float32')
    for images in x, x[:1], x:
        for _ in range(5):
            predict(model, images)
    kept = [kept_of[layer] for _, layer in model.layers() if layer in kept_of]
    own = {id(array) for array in model.parameters().values()}                              # what needs no preparation
    prepared = [weakref.ref(U) for one in kept for results in one.results.values() for U in arrays_of(results) if id(U) not in own]
    del kept
    assert prepared
    optimizer = SGD(model.parameters(), 0.01)
    train_step(model, DiceLoss(), optimizer, x, x)
    gc.collect()
    assert not [U for U in prepared if U() is not None]


def arrays_of(results):
    if isinstance(results, numpy.ndarray):
        yield results
    elif isinstance(results, (tuple, list)):
        for result in results:
            yield from arrays_of(result)


def test_no_list_keeps_what_belongs_to_the_pool(seen):
    """A place of the plan that is still taken is served by the pool, whose pieces go back."""
    model, x = Model(), numpy.random.default_rng(0).random((5, 70000))
    for _ in range(4):
        step_of(_scaled, model, x)
    with planned(model, 'a test'):
        held = empty(x.shape, x)
    pool = memory.pool()
    pool.sort_in()
    used = pool.used
    for _ in range(5):
        assert numpy.array_equal(step_of(_scaled, model, x), 2 * x) and not seen[-1][1]
        pool.sort_in()
        assert pool.used == used
    assert is_lent(held)
    del held
    for _ in range(3):
        step_of(_scaled, model, x)
    assert seen[-1][1]


@pytest.mark.parametrize('name', NETWORKS)
def test_in_a_steady_step_nearly_all_calls_come_from_lists(name, seen):
    model, rng = network(name, 'batch'), numpy.random.default_rng(0)
    x, optimizer = rng.random(SHAPE, 'float32'), SGD(model.parameters(), 0.01)
    for step in (lambda: train_step(model, DiceLoss(), optimizer, x, x), lambda: predict(model, x)):
        for _ in range(6):
            step()
        seen.clear()
        step()
        missed = [function.__name__ for function, from_list in seen if not from_list]
        assert len(missed) <= 0.1 * len(seen), missed
        model.drop_gradients()


@pytest.mark.parametrize('threads', [1, 2, 5])
def test_the_number_of_threads_may_change_and_changes_no_bit(threads):
    model, rng = network('unet', 'batch'), numpy.random.default_rng(0)
    images = rng.random((8, *SHAPE), 'float32')
    with nothing_listed():
        expected = [predict(model, x) for x in images]
    for number in threads, 3, threads:
        with parallel.set_threads(number):
            for x, y in zip(images, expected):
                assert numpy.array_equal(predict(model, x), y)


def test_threads_may_predict_with_one_model_at_once(seen):
    model, rng = network('unet', 'batch'), numpy.random.default_rng(0)
    images = rng.random((6, *SHAPE), 'float32')
    with nothing_listed():
        expected = [predict(model, x) for x in images]

    def work(start):
        return [i for i in range(start, start + 12) if not numpy.array_equal(predict(model, images[i % 6]), expected[i % 6])]

    with ThreadPoolExecutor(4) as threads:
        assert [*threads.map(work, range(4))] == 4 * [[]]
    assert any(from_list for _, from_list in seen)


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='no forks here')
def test_a_forked_child_lists_anew():
    model, x = network('unet', None), numpy.random.default_rng(0).random(SHAPE, 'float32')
    expected = [predict(model, x) for _ in range(5)][-1]
    child = os.fork()
    if child == 0:
        right = False
        try:
            right = all(numpy.array_equal(predict(model, x), expected) for _ in range(5)) and not numpy.array_equal(predict(model, x / 2), expected)
        finally:
            os._exit(0 if right else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert numpy.array_equal(predict(model, x), expected)


def _scaled(block, x, y, factor):
    yield functools.partial(numpy.multiply, x[block], factor, out=y[block])


def _failing(block, x, y, factor):
    yield from _scaled(block, x, y, factor)
    yield functools.partial(int, 'no number')


def step_of(function, model, x, factor=2.0):
    with planned(model, 'a test'):
        y = empty(x.shape, x)
        calls.run(function, [slice(0, 3), slice(3, 5)], x, y, factor)
        return y.copy()


class Model:
    pass


def test_other_arguments_are_never_served_by_the_list(seen):
    model, x = Model(), numpy.random.default_rng(0).random((5, 7))
    for _ in range(5):
        assert numpy.array_equal(step_of(_scaled, model, x), 2 * x)
    assert seen[-1] == (_scaled, True)
    x += 1
    assert numpy.array_equal(step_of(_scaled, model, x), 2 * x) and seen[-1][1]             # other numbers, the same array
    assert numpy.array_equal(step_of(_scaled, model, x, 3.0), 3 * x) and not seen[-1][1]
    for other in (x.copy(), x[::-1], x[:, ::-1], x.astype('float32')):
        for _ in range(3):
            assert numpy.array_equal(step_of(_scaled, model, other), 2 * other)
        assert numpy.array_equal(step_of(_scaled, model, x), 2 * x)


def test_arrays_of_another_kind_are_worked_out_each_time(seen):
    class Kind(numpy.ndarray):
        pass

    model, x = Model(), numpy.random.default_rng(0).random((5, 7)).view(Kind)
    for _ in range(5):
        assert numpy.array_equal(step_of(_scaled, model, x), 2 * x) and not (seen and seen[-1][1])


def test_an_error_of_a_call_is_raised_and_the_next_step_is_right():
    model, x = Model(), numpy.random.default_rng(0).random((5, 7))
    for _ in range(5):
        with pytest.raises(ValueError, match='no number'):
            step_of(_failing, model, x)
    for _ in range(5):
        assert numpy.array_equal(step_of(_scaled, model, x), 2 * x)


def test_lists_hold_no_place_of_the_region_and_go_with_the_model():
    model, x = network('unet', None), numpy.random.default_rng(0).random(SHAPE, 'float32')
    for _ in range(5):
        predict(model, x)
    with planned(model, 'inference', x.shape):
        step = memory.this_thread.step
        lease = step.region.lease(0, 1)                                                     # what has ended is noticed now
        assert lease is not None and step.region.taken == 1
        lists = [weakref.ref(call) for operation in step.operations for lane in operation.lanes or [] for call in lane]
    assert len(lists) > 100
    del model, step, lease
    gc.collect()
    assert not [call for call in lists if call() is not None]


@pytest.mark.parametrize('sizes_differ', [False, True])
def test_lists_beyond_the_end_of_a_step_go_with_it(sizes_differ):
    model, x = Model(), numpy.random.default_rng(0).random((5, 7))

    def step(number):
        with planned(model, 'a test'):
            for _ in range(number):
                y = empty((5, 7 + 600 * (sizes_differ and number < 3)), x)[:, :7]
                calls.run(_scaled, [slice(0, 5)], x, y, 2.0)

    for _ in range(5):
        step(3)
    plans = plan._models[id(model)].values()
    listed = [weakref.ref(call) for one in plans for steps in one.operations.values() for operation in steps
              for lane in operation.lanes for call in lane]
    assert len(listed) == 3
    step(1)
    assert sum(call() is not None for call in listed) == (0 if sizes_differ else 1)


def test_lists_of_a_region_that_is_replaced_go_with_it():
    small, large = network('unet', None), UNet(base_channels=18, depth=3, rng=numpy.random.default_rng(0))
    x = numpy.random.default_rng(0).random((4, 64, 96, 1), 'float32')
    for _ in range(5):
        predict(small, x[:1, :32, :32])
    region = weakref.ref(plan._region.memory)
    for _ in range(3):
        predict(large, x)
    assert region() is None
    assert numpy.array_equal(predict(small, x[:1, :32, :32]), predict(small, x[:1, :32, :32]))
