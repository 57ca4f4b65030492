import copy
import math
import pickle
import tracemalloc

import numpy
import pytest

from nervenet.engine import backend
from nervenet.optim import SGD, Adam, AdamW, ConstantSchedule, CosineSchedule, clip_gradients

OPTIMIZERS = {
    'SGD': lambda parameters: SGD(parameters, 0.1),
    'SGD with everything': lambda parameters: SGD(parameters, 0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    'Adam': lambda parameters: Adam(parameters, 0.1),
    'Adam with decay': lambda parameters: Adam(parameters, 0.1, weight_decay=0.01),
    'AdamW': lambda parameters: AdamW(parameters, 0.1),
}


def walk(make, gradients, start=1.0):
    """Return the values that one parameter takes, for a sequence of gradients."""
    parameters, values = {'w': numpy.array([start])}, []
    optimizer = make(parameters)
    for gradient in gradients:
        optimizer.step({'w': numpy.array([gradient], float)})
        values.append(parameters['w'][0])
    return values


def parameters_and_gradients(rng, dtype='float32', steps=1):
    shapes = {'a.weight': (3, 3, 2, 4), 'a.bias': (4,), 'b.weight': (5,)}
    draw = lambda: {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
    return draw(), [draw() for _ in range(steps)]


# Sequences by hand: w = 1, then gradients 1, 2, −1 (or fewer).

def test_sgd_by_hand():
    assert walk(lambda p: SGD(p, 0.1), [1, 2, -1]) == pytest.approx([0.9, 0.7, 0.8])


def test_momentum_by_hand():
    # v: 1, 0.5·1 + 2 = 2.5, 0.5·2.5 − 1 = 0.25
    assert walk(lambda p: SGD(p, 0.1, momentum=0.5), [1, 2, -1]) == pytest.approx([0.9, 0.65, 0.625])


def test_nesterov_by_hand():
    # g + 0.5·v: 1 + 0.5 = 1.5, 2 + 1.25 = 3.25, −1 + 0.125 = −0.875
    assert walk(lambda p: SGD(p, 0.1, momentum=0.5, nesterov=True), [1, 2, -1]) == pytest.approx([0.85, 0.525, 0.6125])


def test_weight_decay_is_added_to_the_gradient_by_hand():
    # g + 0.2·w: 1 + 0.2 = 1.2, 2 + 0.2·0.88 = 2.176
    assert walk(lambda p: SGD(p, 0.1, weight_decay=0.2), [1, 2]) == pytest.approx([0.88, 0.6624])


def test_adam_by_hand():
    # β = 0.5, 0.75 and ε = 0.5. Step 1: m̂ = 0.5/0.5 = 1, v̂ = 0.25/0.25 = 1.
    # Step 2: m = 0.25 + 1 = 1.25, m̂ = 1.25/0.75; v = 0.1875 + 1 = 1.1875, v̂ = 1.1875/0.4375.
    first = 1 - 0.1 * 1 / (1 + 0.5)
    second = first - 0.1 * (1.25 / 0.75) / (math.sqrt(1.1875 / 0.4375) + 0.5)
    assert walk(lambda p: Adam(p, 0.1, betas=(0.5, 0.75), eps=0.5), [1, 2]) == pytest.approx([first, second])


def test_adam_with_weight_decay_by_hand():
    # The decay is part of g = 1 + 0.2·1 = 1.2, so m̂ = 1.2 and √v̂ = 1.2.
    assert walk(lambda p: Adam(p, 0.1, eps=0.5, weight_decay=0.2), [1]) == pytest.approx([1 - 0.1 * 1.2 / 1.7])


def test_adamw_by_hand():
    # The decay is not part of g = 1: w shrinks by the factor 1 − 0.1·0.2, then the step with m̂ = √v̂ = 1.
    assert walk(lambda p: AdamW(p, 0.1, eps=0.5, weight_decay=0.2), [1]) == pytest.approx([0.98 - 0.1 / 1.5])
    assert walk(lambda p: AdamW(p, 0.1), [0]) == pytest.approx([0.999])


def test_adam_takes_first_steps_of_the_learning_rate_whatever_the_scale_of_the_gradient():
    for scale in (1e-4, 1, 1e4):
        assert walk(lambda p: Adam(p, 0.1), [scale, scale]) == pytest.approx([0.9, 0.8], rel=1e-4)


def test_a_new_learning_rate_acts_at_once():
    for make in (lambda p: SGD(p, 0.1, momentum=0.5), Adam, AdamW):
        parameters = {'w': numpy.array([1.0])}
        optimizer = make(parameters)
        optimizer.step({'w': numpy.array([1.0])})
        before = parameters['w'].copy()
        optimizer.learning_rate = 0
        optimizer.step({'w': numpy.array([1.0])})
        assert parameters['w'] == before


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_steps_are_in_place_keep_the_dtype_and_only_read_the_gradients(name, xp, rng):
    results = []
    for module in {numpy, xp}:
        host, sequence = parameters_and_gradients(numpy.random.default_rng(5), steps=3)
        parameters = {key: module.asarray(value) for key, value in host.items()}
        arrays = dict(parameters)
        optimizer = OPTIMIZERS[name](parameters)
        for gradients in sequence:
            given = {key: module.asarray(value) for key, value in reversed(gradients.items())}      # in any order
            optimizer.step(given)
            assert all(numpy.array_equal(backend.to_cpu(given[key]), gradients[key]) for key in gradients)
        assert all(parameters[key] is arrays[key] and parameters[key].dtype == 'float32' for key in arrays)
        results.append({key: backend.to_cpu(value) for key, value in parameters.items()})
    for key in results[0]:
        numpy.testing.assert_allclose(results[0][key], results[-1][key], rtol=1e-5)


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_one_parameter_does_not_disturb_another(name, rng):
    """The scratch buffers are shared: each parameter must move as it would alone."""
    together, sequence = parameters_and_gradients(rng, 'float64', steps=3)
    alone = {key: {key: value.copy()} for key, value in together.items()}
    optimizer, optimizers = OPTIMIZERS[name](together), {key: OPTIMIZERS[name](value) for key, value in alone.items()}
    for gradients in sequence:
        optimizer.step(gradients)
        for key in alone:
            optimizers[key].step({key: gradients[key]})
    for key in alone:
        assert numpy.array_equal(together[key], alone[key][key])


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_a_step_allocates_nothing(name):
    parameters, gradients = {'w': numpy.ones(100_000)}, {'w': numpy.ones(100_000)}
    optimizer = OPTIMIZERS[name](parameters)
    optimizer.step(gradients)                                   # its temporary arrays are from now on used again
    tracemalloc.start()
    optimizer.step(gradients)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000                                        # bytes; one array has 800,000


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_a_loaded_state_continues_bit_for_bit(name, rng):
    parameters, sequence = parameters_and_gradients(rng, steps=6)
    optimizer = OPTIMIZERS[name](parameters)
    for gradients in sequence[:3]:
        optimizer.step(gradients)
    state = {key: numpy.array(value) for key, value in optimizer.state_dict().items()}         # as a file gives it back
    copies = {key: value.copy() for key, value in parameters.items()}
    resumed = OPTIMIZERS[name](copies)
    resumed.load_state_dict(state)
    assert resumed.steps == 3
    for gradients in sequence[3:]:
        optimizer.step(gradients)
        resumed.step(gradients)
    assert all(numpy.array_equal(parameters[key], copies[key]) for key in parameters)


def test_a_state_moves_to_the_device_of_the_parameters_and_goes_on_there(xp, rng):
    host, (first, second) = parameters_and_gradients(rng, steps=2)
    optimizer = Adam(host)
    optimizer.step(first)
    loaded = Adam({key: xp.asarray(value) for key, value in host.items()})
    loaded.load_state_dict(optimizer.state_dict())
    for key, value in optimizer.state_dict().items():
        if key != 'steps':
            assert numpy.array_equal(backend.to_cpu(loaded.state_dict()[key]), value)
    optimizer.step(second)
    loaded.step({key: xp.asarray(value) for key, value in second.items()})
    for key, value in host.items():
        numpy.testing.assert_allclose(backend.to_cpu(loaded.parameters[key]), value, rtol=1e-5)


def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(rng):
    parameters, (gradients,) = parameters_and_gradients(rng)
    optimizer = Adam(parameters)
    optimizer.step(gradients)
    before = {key: numpy.array(value) for key, value in optimizer.state_dict().items()}
    state = {key: value * 2 for key, value in before.items()}
    without = lambda missing: {key: value for key, value in state.items() if key != missing}
    for bad, message in ((without('mean.a.bias'), 'mean.a.bias is missing'),
                         (state | {'velocity.a.bias': numpy.zeros(4)}, 'velocity.a.bias is unknown'),
                         (state | {'mean.a.bias': numpy.zeros(5)}, r'mean.a.bias has shape \(5,\), expected \(4,\)'),
                         (without('steps'), "no entry 'steps'")):
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(bad)
    assert all(numpy.array_equal(value, before[key]) for key, value in optimizer.state_dict().items())


def test_gradients_that_do_not_match_are_refused_and_nothing_moves(rng):
    parameters, (gradients,) = parameters_and_gradients(rng)
    before = {key: value.copy() for key, value in parameters.items()}
    optimizer = SGD(parameters, 0.1)
    for bad, message in (({key: value for key, value in gradients.items() if key != 'a.bias'}, 'a.bias is missing'),
                         (gradients | {'c': numpy.zeros(1)}, 'c is unknown'),
                         (gradients | {'a.bias': numpy.zeros(1)}, r'a.bias has shape \(1,\), expected \(4,\)'),
                         ({}, 'a.bias is missing; a.weight is missing; b.weight is missing')):
        with pytest.raises(ValueError, match=message):
            optimizer.step(bad)
    assert optimizer.steps == 0 and all(numpy.array_equal(parameters[key], before[key]) for key in before)


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_gradients_of_another_dtype_are_refused_and_nothing_moves(name, xp, rng):
    parameters, (gradients,) = parameters_and_gradients(rng)
    parameters, gradients = ({key: xp.asarray(value) for key, value in arrays.items()} for arrays in (parameters, gradients))
    optimizer = OPTIMIZERS[name](parameters)
    optimizer.step(gradients)
    before = {key: backend.to_cpu(value).copy() for key, value in (parameters | optimizer.arrays()).items()}
    for dtype in 'float64', 'float16', 'complex64', 'int32':
        with pytest.raises(ValueError, match=f'gradient of a.bias is {dtype} and the parameter float32'):
            optimizer.step(gradients | {'a.bias': gradients['a.bias'].astype(dtype)})
    assert optimizer.steps == 1
    for key, value in (parameters | optimizer.arrays()).items():
        assert numpy.array_equal(backend.to_cpu(value), before[key])


@pytest.mark.parametrize('rate', [math.nan, math.inf, -0.1])
def test_a_learning_rate_that_is_no_rate_is_refused_before_anything_moves(rate, rng):
    for make in OPTIMIZERS.values():
        parameters, (gradients,) = parameters_and_gradients(rng)
        before = {key: value.copy() for key, value in parameters.items()}
        optimizer = make(parameters)
        optimizer.learning_rate = rate
        with pytest.raises(ValueError, match='learning_rate is'):
            optimizer.step(gradients)
        assert optimizer.steps == 0 and all(numpy.array_equal(parameters[key], before[key]) for key in before)


@pytest.mark.parametrize('number', [numpy.float64, numpy.float32, numpy.array])
def test_hyperparameters_that_are_numbers_of_numpy_give_the_very_steps_of_pythons(number, xp):
    """In float32 throughout: with numbers of NumPy, float32 arrays become float64 where they meet, and are rounded twice."""
    makers = {
        'SGD': lambda p, n: SGD(p, n(0.125), momentum=n(0.75), nesterov=True, weight_decay=n(0.25)),
        'Adam': lambda p, n: Adam(p, n(0.125), betas=(n(0.75), n(0.875)), eps=n(0.25), weight_decay=n(0.5)),
        'AdamW': lambda p, n: AdamW(p, n(0.125), betas=(n(0.75), n(0.875)), eps=n(0.25), weight_decay=n(0.5))}
    for name, make in makers.items():
        results = []
        for kind in float, number:
            host, sequence = parameters_and_gradients(numpy.random.default_rng(5), steps=3)
            parameters = {key: xp.asarray(value) for key, value in host.items()}
            optimizer = make(parameters, kind)
            for key, value in vars(optimizer).items():
                if key not in ('parameters', 'state'):
                    assert all(type(part) in (float, int, bool) for part in (value if isinstance(value, tuple) else [value])), key
            for gradients in sequence:
                gradients = {key: xp.asarray(value) for key, value in gradients.items()}
                clip_gradients(gradients, kind(2.0))
                assert all(value.dtype == 'float32' for value in gradients.values())
                optimizer.learning_rate = CosineSchedule(kind(0.5), kind(8), kind(1), kind(0.25))(optimizer.steps)
                assert type(optimizer.learning_rate) is float
                optimizer.learning_rate = kind(0.5 / 2**optimizer.steps)
                optimizer.step(gradients)
            assert all(value.dtype == 'float32' for value in parameters.values())
            results.append({key: backend.to_cpu(value) for key, value in parameters.items()})
        assert all(numpy.array_equal(results[0][key], results[1][key]) for key in results[0])


@pytest.mark.parametrize('copied', [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=['deepcopy', 'pickle'])
@pytest.mark.parametrize('name', OPTIMIZERS)
def test_a_copy_of_an_optimizer_is_independent_and_goes_on_as_the_original_does(name, copied, xp, rng):
    parameters, sequence = parameters_and_gradients(rng, steps=4)
    parameters = {key: xp.asarray(value) for key, value in parameters.items()}
    sequence = [{key: xp.asarray(value) for key, value in gradients.items()} for gradients in sequence]
    optimizer = OPTIMIZERS[name](parameters)
    for gradients in sequence[:2]:
        optimizer.step(gradients)
    alone = copied(optimizer)
    arrays, both = copied((parameters, optimizer))                      # as a model and its optimizer: they stay together
    assert all(both.parameters[key] is arrays[key] for key in arrays)
    before = {key: backend.to_cpu(value).copy() for key, value in (parameters | optimizer.arrays()).items()}
    for gradients in sequence[2:]:
        alone.step(gradients)
        both.step(gradients)
    assert optimizer.steps == 2 and alone.steps == both.steps == 4
    for key, value in (parameters | optimizer.arrays()).items():
        assert numpy.array_equal(backend.to_cpu(value), before[key])
    for gradients in sequence[2:]:
        optimizer.step(gradients)
    for other in alone, both:
        for key, value in (optimizer.parameters | optimizer.arrays()).items():
            assert numpy.array_equal(backend.to_cpu(value), backend.to_cpu((other.parameters | other.arrays())[key]))


def test_defaults_are_those_of_the_papers_and_leave_plain_sgd_plain():
    """By what they do to one parameter over a few steps, beside the same with every number given."""
    gradients = [1.0, -0.5, 2.0, 0.25]
    for default, given in ((lambda p: SGD(p, 0.1), lambda p: SGD(p, 0.1, momentum=0, nesterov=False, weight_decay=0)),
                           (Adam, lambda p: Adam(p, 0.001, betas=(0.9, 0.999), eps=1e-8, weight_decay=0)),
                           (AdamW, lambda p: AdamW(p, 0.001, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01))):
        assert walk(default, gradients) == walk(given, gradients)


def test_every_optimizer_finds_the_minimum_of_a_stretched_bowl():
    for make in (lambda p: SGD(p, 0.01), lambda p: SGD(p, 0.01, momentum=0.9),
                 lambda p: SGD(p, 0.01, momentum=0.9, nesterov=True), lambda p: Adam(p, 0.05),
                 lambda p: AdamW(p, 0.05, weight_decay=1e-6)):
        parameters = {'w': numpy.array([3.0, -2.0])}
        optimizer = make(parameters)
        for _ in range(1500):
            optimizer.step({'w': parameters['w'] * [1, 50]})
        assert numpy.abs(parameters['w']).max() < 1e-3


@pytest.mark.parametrize('dtype', ['float32', 'float64'])
def test_clipping_by_hand(xp, dtype):
    def gradients():                                            # of norm 5
        return {'a': xp.asarray(numpy.array([[3.0, 0.0]], dtype)), 'b': xp.asarray(numpy.array([-4.0], dtype))}

    for max_norm, factor in ((2.5, 0.5), (5, 1), (100, 1)):
        given = gradients()
        arrays = dict(given)
        norm = clip_gradients(given, max_norm)
        assert norm.shape == () and backend.to_cpu(norm) == 5
        assert backend.device_of(norm) == ('cpu' if xp is numpy else 'gpu')
        assert all(given[key] is arrays[key] and given[key].dtype == dtype for key in arrays)
        for key, value in gradients().items():
            assert numpy.array_equal(backend.to_cpu(given[key]), factor * backend.to_cpu(value))


def test_clipping_leaves_zero_gradients_alone_and_counts_in_double_precision():
    gradients = {'a': numpy.zeros((2, 3), 'float32')}
    assert clip_gradients(gradients, 1.0) == 0 and not gradients['a'].any()
    gradients = {'a': numpy.array([1e30, 1e30], 'float32')}     # squares beyond float32
    assert clip_gradients(gradients, 1.0) == pytest.approx(math.sqrt(2) * 1e30)
    assert gradients['a'] == pytest.approx(math.sqrt(0.5))


@pytest.mark.parametrize('bad', [math.nan, math.inf])
def test_clipping_shows_gradients_that_are_not_finite(bad, xp):
    gradients = {'a': xp.asarray(numpy.array([3.0, bad], 'float32')), 'b': xp.asarray(numpy.array([-4.0], 'float32'))}
    with numpy.errstate(invalid='ignore'):
        norm = backend.to_cpu(clip_gradients(gradients, 1.0))
    assert numpy.array_equal(norm, bad, equal_nan=True)
    rest = [backend.to_cpu(gradients['a'])[0], backend.to_cpu(gradients['b'])[0]]
    assert numpy.isnan(backend.to_cpu(gradients['a'])[1]) and (numpy.isnan(rest).all() if math.isnan(bad) else rest == [0, 0])


def test_the_norm_is_that_of_all_gradients_together_and_bounds_the_step():
    """Each array alone is within the bound; of plain SGD, the step is as long as the clipped gradient times the rate."""
    parameters = {'a': numpy.zeros(3), 'b': numpy.zeros((2, 2))}
    gradients = {'a': numpy.full(3, 0.5), 'b': numpy.full((2, 2), -0.5)}
    assert clip_gradients(gradients, 1.0) == pytest.approx(math.sqrt(7) / 2)
    assert sum((g * g).sum() for g in gradients.values()) == pytest.approx(1)
    SGD(parameters, 0.25).step(gradients)
    assert math.sqrt(sum((w * w).sum() for w in parameters.values())) == pytest.approx(0.25)


def test_schedules_say_the_rate_of_the_step_that_follows_exactly():
    """A step early or late shows at each edge: first step, end of the warm-up, last step."""
    assert [ConstantSchedule(1.0, 2)(step) for step in range(4)] == [0.5, 1.0, 1.0, 1.0]
    schedule = CosineSchedule(1.0, total_steps=6, warmup_steps=2, final=0.0)
    values = [0.5, 1.0, 1.0, 0.5 + 0.5 * math.cos(math.pi / 4), 0.5, 0.5 - 0.5 * math.cos(math.pi / 4), 0.0, 0.0]
    assert [schedule(step) for step in range(8)] == pytest.approx(values, abs=1e-15)
    assert schedule(2) == 1.0 and schedule(5) > 0 and schedule(6) == 0 and schedule(1) == 1.0


def test_constant_schedule_by_hand():
    assert [ConstantSchedule(0.4)(step) for step in (0, 5)] == [0.4, 0.4]
    schedule = ConstantSchedule(0.4, warmup_steps=4)
    assert [schedule(step) for step in range(6)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4])


def test_cosine_schedule_by_hand():
    schedule = CosineSchedule(0.8, total_steps=10, warmup_steps=2, final=0.2)
    assert [schedule(step) for step in (0, 1, 2)] == pytest.approx([0.4, 0.8, 0.8])
    half = math.sqrt(0.5)
    assert [schedule(step) for step in (4, 6, 8)] == pytest.approx([0.5 + 0.3 * half, 0.5, 0.5 - 0.3 * half])
    assert [schedule(step) for step in (10, 11, 1000)] == pytest.approx([0.2, 0.2, 0.2])
    assert CosineSchedule(0.8, total_steps=10)(0) == 0.8 and CosineSchedule(0.8, total_steps=10)(10) == 0
    assert all(type(schedule(step)) is float for step in range(12))


@pytest.mark.parametrize('make, message', [
    (lambda p: SGD(p, -0.1), 'learning_rate is -0.1'), (lambda p: SGD(p, math.nan), 'learning_rate is nan'),
    (lambda p: SGD(p, 0.1, momentum=1.0), 'momentum is 1.0'),
    (lambda p: SGD(p, math.inf), 'learning_rate is inf'), (lambda p: SGD(p, 0.1, momentum=math.nan), 'momentum is nan'),
    (lambda p: SGD(p, 0.1, weight_decay=math.nan), 'weight_decay is nan'),
    (lambda p: Adam(p, betas=(0.9, math.nan)), r'betas\[1\] is nan'),
    (lambda p: Adam(p, eps=math.nan), 'eps is nan'), (lambda p: Adam(p, eps=math.inf), 'eps is inf'),
    (lambda p: Adam(p, eps=-1), 'eps is -1'),
    (lambda p: clip_gradients(p, math.nan), 'max_norm is nan'), (lambda p: clip_gradients(p, math.inf), 'max_norm is inf'),
    (lambda p: clip_gradients(p, -1), 'max_norm is -1'), (lambda p: ConstantSchedule(math.nan), 'base is nan'),
    (lambda p: CosineSchedule(1, math.inf), 'total_steps is inf'), (lambda p: CosineSchedule(1, math.nan), 'total_steps is nan'),
    (lambda p: SGD(p, 0.1, nesterov=True), 'needs a momentum'),
    (lambda p: SGD(p, 0.1, weight_decay=-1), 'weight_decay is -1'),
    (lambda p: Adam(p, betas=(1.0, 0.9)), r'betas\[0\] is 1.0'),
    (lambda p: Adam(p, betas=(0.9, -0.1)), r'betas\[1\] is -0.1'), (lambda p: Adam(p, eps=0), 'eps is 0'),
    (lambda p: Adam({}), 'no parameters'), (lambda p: clip_gradients(p, 0), 'max_norm is 0'),
    (lambda p: ConstantSchedule(-1), 'base is -1'), (lambda p: ConstantSchedule(1, -1), 'warmup_steps is -1'),
    (lambda p: CosineSchedule(1, total_steps=5, warmup_steps=5), 'total_steps is 5'),
    (lambda p: CosineSchedule(1, total_steps=5, final=-1), 'final is -1')])
def test_bad_hyperparameters_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make({'w': numpy.ones(3)})
