import contextlib
import copy
import pickle
import threading

import numpy
import pytest

from nervenet import (Add, BatchNorm2D, Concat, Conv2D, ConvTranspose2D, Dropout, LeakyReLU, MaxPool2D, ReLU, Sigmoid, Upsample2D, convolution,
                      plain)
from nervenet.convolution import Geometry
from nervenet.engine import backend, pixelwise
from nervenet.layers import inference, sigmoid
from nervenet.networks.optimised_resunet import Stack

LAYERS = {
    'relu': (lambda rng: ReLU(), [(2, 5, 6, 3)]),
    'leaky relu': (lambda rng: LeakyReLU(0.2), [(2, 5, 6, 3)]),
    'sigmoid': (lambda rng: Sigmoid(), [(2, 5, 6, 3)]),
    'concat': (lambda rng: Concat(), [(2, 5, 6, 3), (2, 5, 6, 4)]),
    'concat of four': (lambda rng: Concat(), [(2, 5, 6, C) for C in (3, 1, 4, 2)]),
    'add': (lambda rng: Add(), [(2, 5, 6, 3)] * 2),
    'add three': (lambda rng: Add(), [(2, 5, 6, 3)] * 3),
    'stack': (lambda rng: Stack(), [(2, 5, 6, 3), (1, 5, 6, 3), (3, 5, 6, 3)]),
    'maxpool, overlapping': (lambda rng: MaxPool2D(5, stride=1, padding=2), [(2, 5, 6, 3)]),
    'maxpool 3×2, stride 2×1': (lambda rng: MaxPool2D((3, 2), (2, 1), (1, 0)), [(2, 5, 6, 3)]),
    'nearest': (lambda rng: Upsample2D((2, 3)), [(2, 5, 6, 3)]),
    'bilinear': (lambda rng: Upsample2D((3, 2), 'bilinear'), [(2, 5, 6, 3)]),
    'maxpool': (lambda rng: MaxPool2D(2), [(2, 5, 6, 3)]),
    'conv': (lambda rng: Conv2D(3, 4, rng=rng), [(2, 5, 6, 3)]),
    'conv, stride 2': (lambda rng: Conv2D(3, 4, (3, 5), stride=(2, 1), rng=rng), [(2, 5, 6, 3)]),
    'conv, dilated': (lambda rng: Conv2D(3, 4, (3, 5), dilation=(2, 1), rng=rng), [(2, 5, 6, 3)]),
    'transposed conv': (lambda rng: ConvTranspose2D(3, 4, rng=rng), [(2, 5, 6, 3)]),
    'batch norm': (lambda rng: BatchNorm2D(3), [(2, 5, 6, 3)]),
    'dropout': (lambda rng: Dropout(0.4, rng=rng), [(2, 5, 6, 3)]),
}


def layer_and_inputs(name, rng):
    make, shapes = LAYERS[name]
    layer = make(rng)
    for array in layer.params.values():
        array += rng.standard_normal(array.shape).astype(array.dtype)
    return layer, [rng.standard_normal(shape).astype('float32') for shape in shapes]


def run(layer, inputs, dy):
    dx = layer.backward(dy)
    return [*(dx if isinstance(dx, tuple) else (dx,)), *layer.grads.values()]


@pytest.mark.parametrize('name', LAYERS)
def test_float32_stays_float32_and_arguments_stay_as_they_were(name, xp, rng):
    layer, inputs = layer_and_inputs(name, rng)
    device = 'cpu' if xp is numpy else 'gpu'
    layer.to(device)
    inputs = [backend.move(x, device) for x in inputs]
    before = [backend.to_cpu(x).copy() for x in inputs]
    y = layer.forward(*inputs)
    assert y.dtype == numpy.float32 and y.shape == layer.output_shape(*(x.shape for x in inputs))
    dy = backend.move(rng.standard_normal(y.shape).astype('float32'), device)
    dy_before = backend.to_cpu(dy).copy()
    for array in run(layer, inputs, dy) + list(layer.buffers.values()):
        assert array.dtype == numpy.float32 and backend.device_of(array) == device
    for array, old in zip([*inputs, dy], [*before, dy_before]):
        assert numpy.array_equal(backend.to_cpu(array), old)


@pytest.mark.parametrize('name', set(LAYERS) - {'dropout'})
def test_device_gives_what_the_host_gives(name, xp, rng):
    layer, inputs = layer_and_inputs(name, rng)
    y = layer.forward(*inputs)
    dy = rng.standard_normal(y.shape).astype('float32')
    expected = [y, *run(layer, inputs, dy)]
    device = 'cpu' if xp is numpy else 'gpu'
    layer.to(device)
    y = layer.forward(*(backend.move(x, device) for x in inputs))
    results = [y, *run(layer, inputs, backend.move(dy, device))]
    for result, reference in zip(results, expected):
        numpy.testing.assert_allclose(backend.to_cpu(result), reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', LAYERS)
def test_backward_frees_the_cache_and_inference_keeps_none(name, rng):
    layer, inputs = layer_and_inputs(name, rng)
    y = layer.forward(*inputs)
    layer.backward(numpy.ones_like(y))
    assert layer.cache is None
    with pytest.raises(RuntimeError, match='call forward first'):
        layer.backward(numpy.ones_like(y))
    layer.eval().forward(*inputs)
    assert layer.cache is None
    layer.eval(keep_cache=True).forward(*inputs)
    layer.backward(numpy.ones_like(y))


@pytest.mark.parametrize('name', LAYERS)
def test_grads_have_the_keys_and_shapes_of_params_and_are_assigned(name, rng):
    layer, inputs = layer_and_inputs(name, rng)
    layer.eval(keep_cache=True)
    results = []
    for _ in range(2):
        assert {key: grad.shape for key, grad in layer.grads.items()} == {key: value.shape for key, value in layer.params.items()}
        y = layer.forward(*inputs)
        layer.backward(numpy.ones_like(y))
        results.append({key: grad.copy() for key, grad in layer.grads.items()})
    for key in layer.grads:
        assert numpy.array_equal(results[0][key], results[1][key]), 'a second backward must not add to the first'


def test_relu_has_derivative_zero_at_zero():
    relu = ReLU()
    assert relu.forward(numpy.array([-1.0, 0.0, 2.0])).tolist() == [0, 0, 2]
    assert relu.backward(numpy.array([5.0, 6.0, 7.0])).tolist() == [0, 0, 7]


def test_sigmoid_is_stable_for_large_inputs():
    x = numpy.array([-1e4, -50, 0, 50, 1e4])
    y = Sigmoid().forward(x)
    numpy.testing.assert_allclose(y, [0, 0, 0.5, 1, 1], atol=1e-15)


@pytest.mark.parametrize('dtype, low', [('float32', -87), ('float64', -700)])
def test_sigmoid_keeps_its_digits_in_both_tails(dtype, low, xp):
    x = numpy.linspace(low, -low, 2001)
    expected = numpy.exp(-numpy.logaddexp(0, -x.astype('longdouble')))
    y = backend.to_cpu(sigmoid(xp.asarray(x.astype(dtype))))
    exact = numpy.exp(-numpy.logaddexp(0, -x.astype(dtype).astype('longdouble')))
    assert y.dtype == dtype and (abs(y / exact - 1) < 4 * numpy.finfo(dtype).eps).all() and abs(y - expected).max() < 1e-5
    with numpy.errstate(all='raise', under='ignore'):
        assert sigmoid(numpy.array([-numpy.inf, -1e30, 1e30, numpy.inf], dtype)).tolist() == [0, 0, 1, 1]


def test_concat_refuses_sizes_that_differ_with_both_shapes():
    with pytest.raises(ValueError, match=r'\(1, 13, 16, 8\) and \(1, 12, 16, 4\)'):
        Concat().forward(numpy.zeros((1, 13, 16, 8)), numpy.zeros((1, 12, 16, 4)))


def test_max_pooling_sends_the_gradient_to_the_first_maximum():
    pool = MaxPool2D(2)
    x = numpy.array([[3.0, 1, 5, 5], [3, 3, 5, 5], [0, 1, 2, 9]]).reshape(1, 3, 4, 1)
    assert pool.forward(x)[0, :, :, 0].tolist() == [[3, 5]]
    assert pool.backward(numpy.array([[7.0, 8]]).reshape(1, 1, 2, 1))[0, :, :, 0].tolist() == [
        [7, 0, 8, 0], [0, 0, 0, 0], [0, 0, 0, 0]]


def test_max_pooling_refuses_an_image_smaller_than_its_window():
    with pytest.raises(ValueError, match=r'an input of 1×6 .* is smaller than the kernel, which spans 2×2'):
        MaxPool2D(2).forward(numpy.zeros((1, 1, 6, 1)))


def test_convolution_against_the_definition(rng):
    """Every output computed by the sum in the docstring of `plain.py`, one scalar at a time."""
    N, H, W, C_in, C_out, (KH, KW), (SH, SW), (PH, PW), (DH, DW) = 2, 7, 9, 2, 3, (3, 2), (2, 1), (1, 2), (2, 3)
    conv = Conv2D(C_in, C_out, (KH, KW), (SH, SW), (PH, PW), dilation=(DH, DW), rng=rng, dtype=float)
    conv.params['bias'][:] = rng.standard_normal(C_out)
    x = rng.standard_normal((N, H, W, C_in))
    y = conv.forward(x)
    for n, r, c, k in numpy.ndindex(y.shape):
        expected = conv.params['bias'][k]
        for i, j, channel in numpy.ndindex(KH, KW, C_in):
            row, column = r * SH + i * DH - PH, c * SW + j * DW - PW
            if 0 <= row < H and 0 <= column < W:
                expected += x[n, row, column, channel] * conv.params['weight'][i, j, channel, k]
        assert abs(y[n, r, c, k] - expected) < 1e-12


def test_transposed_convolution_is_the_adjoint_of_convolution(rng):
    """⟨conv(x), y⟩ = ⟨x, transposed(y)⟩ when both hold the same weight."""
    conv = Conv2D(3, 5, kernel_size=2, stride=2, padding=0, bias=False, rng=rng, dtype=float)
    transposed = ConvTranspose2D(5, 3, bias=False, rng=rng, dtype=float)
    transposed.params['weight'][...] = conv.params['weight']
    x, y = rng.standard_normal((2, 6, 8, 3)), rng.standard_normal((2, 3, 4, 5))
    assert numpy.isclose((conv.forward(x) * y).sum(), (x * transposed.forward(y)).sum(), rtol=1e-12)


def test_transposed_convolution_paints_one_patch_per_pixel(rng):
    layer = ConvTranspose2D(2, 3, rng=rng, dtype=float)
    layer.params['bias'][:] = [1, 2, 3]
    x = numpy.zeros((1, 2, 3, 2))
    x[0, 1, 2, 0] = 4.0
    y = layer.forward(x) - [1, 2, 3]
    numpy.testing.assert_allclose(y[0, 2:4, 4:6], 4 * layer.params['weight'][:, :, :, 0])
    y[0, 2:4, 4:6] = 0
    assert not y.any()


@pytest.mark.parametrize('make, message', [
    (lambda: Conv2D(1, 1, kernel_size=2), "padding='same' needs an odd kernel, got 2×2"),
    (lambda: Conv2D(0, 1), 'in_channels is 0'), (lambda: Conv2D(1, 1, stride=0), 'stride is 0'),
    (lambda: Conv2D(1, 1, padding=-1), 'padding is -1'), (lambda: Conv2D(1, 1, (3, 3, 3)), 'expected a number or a pair'),
    (lambda: ConvTranspose2D(1, 1, 2, 1), 'stride equal to its kernel'), (lambda: Dropout(1.0), 'dropout probability is 1.0'),
    (lambda: Conv2D(3, 1).forward(numpy.zeros((1, 4, 4, 2))), r'\(1, 4, 4, 2\), expected \(N, H, W, 3\)'),
    (lambda: Conv2D(1, 1, 5, padding=0).forward(numpy.zeros((1, 4, 4, 1))), 'an input of 4×4 .* smaller than the kernel, which spans 5×5')])
def test_bad_arguments_are_refused_with_value_and_expectation(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_he_initialisation_has_variance_two_over_fan_in(rng):
    weight = Conv2D(64, 96, rng=rng).params['weight']
    assert abs(weight.var() * (9 * 64) / 2 - 1) < 0.02 and abs(weight.mean()) < 1e-3
    weight = ConvTranspose2D(64, 96, rng=rng).params['weight']
    assert abs(weight.var() * 64 / 2 - 1) < 0.05


def test_the_same_seed_gives_the_same_weights():
    first, second, other = (Conv2D(3, 4, rng=numpy.random.default_rng(seed)).params['weight'] for seed in (1, 1, 2))
    assert numpy.array_equal(first, second) and not numpy.array_equal(first, other)


def test_batch_norm_makes_mean_zero_and_variance_one_then_weight_and_bias(rng):
    norm = BatchNorm2D(3, dtype=float)
    norm.params['weight'][:], norm.params['bias'][:] = [1, 2, 3], [4, 5, 6]
    y = norm.forward(7 + 5 * rng.standard_normal((4, 5, 6, 3)))
    numpy.testing.assert_allclose(y.mean(axis=(0, 1, 2)), [4, 5, 6], rtol=1e-10)
    numpy.testing.assert_allclose(y.std(axis=(0, 1, 2)), [1, 2, 3], rtol=1e-5)


def test_running_statistics_are_the_unbiased_averages_and_serve_inference(rng):
    norm = BatchNorm2D(3, momentum=0.25, dtype=float)
    x = 2 + 3 * rng.standard_normal((4, 5, 6, 3))
    norm.forward(x)
    mean, var = x.mean(axis=(0, 1, 2)), x.var(axis=(0, 1, 2), ddof=1)
    numpy.testing.assert_allclose(norm.buffers['running_mean'], 0.25 * mean, rtol=1e-12)
    numpy.testing.assert_allclose(norm.buffers['running_var'], 0.75 + 0.25 * var, rtol=1e-12)
    y = norm.eval().forward(x)
    numpy.testing.assert_allclose(y, (x - 0.25 * mean) / numpy.sqrt(0.75 + 0.25 * var + 1e-5), rtol=1e-10)
    numpy.testing.assert_allclose(norm.buffers['running_mean'], 0.25 * mean, rtol=1e-12)


def test_with_one_value_per_channel_the_running_variance_keeps_its_old_value():
    norm = BatchNorm2D(2, dtype=float)
    y = norm.forward(numpy.array([3.0, 4.0]).reshape(1, 1, 1, 2))
    assert norm.buffers['running_var'].tolist() == [1, 1] and y.tolist() == [[[[0, 0]]]]


def test_float32_batch_statistics_are_accumulated_in_float64(rng):
    x = (1000 + rng.standard_normal((1, 1000, 1000, 1))).astype('float32')
    norm = BatchNorm2D(1)
    y = norm.forward(x)
    assert abs(y.std(dtype=float) - 1) < 1e-4 and abs(y.mean(dtype=float)) < 1e-4


def test_dropout_keeps_the_expected_value_and_its_mask(rng, xp):
    layer = Dropout(0.25, rng=rng)
    x = xp.ones((50, 20, 10, 10), 'float32')
    y = backend.to_cpu(layer.forward(x))
    assert set(numpy.unique(y)) == {numpy.float32(0), numpy.float32(1 / 0.75)}
    assert abs((y == 0).mean() - 0.25) < 0.01
    assert numpy.array_equal(backend.to_cpu(layer.backward(x)), y)
    assert layer.eval().forward(x) is x


def test_complex_numbers_pass_through_forward(rng):
    """Complex-step differentiation needs it: f(x + ih) = f(x) + ih·f'(x)."""
    for name in set(LAYERS) - {'dropout'}:
        layer, inputs = layer_and_inputs(name, rng)
        y = layer.forward(*(x.astype(complex) + 1e-20j for x in inputs))
        assert y.dtype == complex and abs(y.imag).max() > 0 and abs(y.imag).max() < 1e-15
    weight = rng.standard_normal((3, 3, 2, 2)).astype(complex)
    assert convolution.forward(rng.standard_normal((1, 4, 4, 2)), weight, Geometry(3, padding=1)).dtype == complex


@pytest.mark.parametrize('make, inputs', [(MaxPool2D, [(2, 13, 18, 3)]), (lambda: MaxPool2D(3), [(3, 13, 17, 2)]),
                                          (Concat, [(2, 13, 18, 3), (2, 13, 18, 5)])])
def test_work_shared_by_rows_gives_what_one_piece_gives(make, inputs, rng, monkeypatch):
    layer, inputs = make(), [rng.standard_normal(shape) for shape in inputs]
    dy = rng.standard_normal(layer.output_shape(*(x.shape for x in inputs)))

    def results():
        y = layer.forward(*inputs)
        dx = layer.backward(dy)
        return [y, *(dx if isinstance(dx, tuple) else [dx])]

    whole = results()
    monkeypatch.setattr(pixelwise, 'BLOCK_VALUES', 60)
    assert all(numpy.array_equal(one, other) for one, other in zip(whole, results(), strict=True))


def test_leaky_relu_lets_a_share_pass_below_zero_and_at_it():
    layer = LeakyReLU(0.25)
    assert layer.forward(numpy.array([-4.0, 0.0, 2.0])).tolist() == [-1, 0, 2]
    assert layer.backward(numpy.array([8.0, 8.0, 8.0])).tolist() == [2, 2, 8]
    for slope in (-0.1, 1.0, float('nan')):
        with pytest.raises(ValueError, match='negative_slope is'):
            LeakyReLU(slope)


@pytest.mark.parametrize('name', LAYERS)
def test_the_plain_formulas_give_what_the_fast_ones_give(name, rng):
    layer, inputs = layer_and_inputs(name, numpy.random.default_rng(1))
    same, _ = layer_and_inputs(name, numpy.random.default_rng(1))
    dy = rng.standard_normal(layer.forward(*inputs).shape).astype('float32')
    fast = [same.forward(*inputs), *run(same, inputs, dy), *same.buffers.values()]
    same, _ = layer_and_inputs(name, numpy.random.default_rng(1))
    with plain():
        expected = [same.forward(*inputs), *run(same, inputs, dy), *same.buffers.values()]
    for result, reference in zip(fast, expected, strict=True):
        assert result.dtype == reference.dtype == numpy.float32
        numpy.testing.assert_allclose(result, reference, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize('mode', ['training', 'inference'])
def test_the_plain_batch_norm_and_the_fast_one_agree(mode, rng, xp):
    """On many values far from 0, of channels that differ, in float64: forward, all gradients, running statistics."""
    device = 'cpu' if xp is numpy else 'gpu'
    norms = [BatchNorm2D(5, dtype=float) for _ in range(2)]
    weight, bias, mean, var = rng.standard_normal((4, 5))
    x, dy = 3 + [1, 2, 3, 4, 5] * rng.standard_normal((3, 40, 50, 5)), rng.standard_normal((3, 40, 50, 5))
    results = []
    for norm, context in zip(norms, (contextlib.nullcontext(), plain())):
        norm.params.update(weight=weight.copy(), bias=bias.copy())
        norm.buffers.update(running_mean=mean.copy(), running_var=1 + var**2)
        norm.to(device)
        if mode == 'inference':
            norm.eval(keep_cache=True)
        with context:
            y = norm.forward(backend.move(x, device))
            results.append([y, norm.backward(backend.move(dy, device)), *norm.grads.values(), *norm.buffers.values()])
    for fast, reference in zip(*results):
        numpy.testing.assert_allclose(backend.to_cpu(fast), backend.to_cpu(reference), rtol=1e-10, atol=1e-10)


def test_batch_norm_of_one_value_per_channel_is_its_bias_however_large_the_value(rng):
    x = (1e4 * rng.standard_normal((1, 1, 1, 6))).astype('float32')
    for context in (contextlib.nullcontext(), plain()):
        norm = BatchNorm2D(6)
        norm.params.update(weight=rng.standard_normal(6).astype('float32'), bias=rng.standard_normal(6).astype('float32'))
        with context:
            assert numpy.array_equal(norm.forward(x)[0, 0, 0], norm.params['bias'])
            assert not norm.backward(rng.standard_normal(x.shape).astype('float32')).any() and not norm.grads['weight'].any()


def test_running_statistics_with_momentum_1_are_those_of_the_batch(rng):
    norm = BatchNorm2D(3, momentum=1)
    norm.forward((1e4 * rng.standard_normal((2, 9, 11, 3))).astype('float32'))
    x = (7 + 1e-3 * rng.standard_normal((2, 9, 11, 3))).astype('float32')
    norm.forward(x)
    numpy.testing.assert_allclose(norm.buffers['running_mean'], x.mean(axis=(0, 1, 2), dtype=float), rtol=1e-7)
    numpy.testing.assert_allclose(norm.buffers['running_var'], x.var(axis=(0, 1, 2), dtype=float, ddof=1), rtol=1e-4)


@pytest.mark.parametrize('arguments, said', [(dict(momentum=1.5), 'momentum is 1.5'), (dict(momentum=float('nan')), 'momentum is nan'),
                                             (dict(eps=0), 'eps is 0'), (dict(channels=0), 'channels is 0')])
def test_a_batch_norm_that_cannot_be_is_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        BatchNorm2D(**{'channels': 3} | arguments)


@pytest.mark.parametrize('name', LAYERS)
def test_layers_keep_what_they_say_and_survive_pickle_and_copy_after_a_forward(name, rng):
    layer, inputs = layer_and_inputs(name, rng)
    y = layer.forward(*inputs)
    kept = {id(value) for value in layer.cache if value is not None}
    assert ('input' in layer.keeps) == any(id(x) in kept for x in inputs)
    assert ('output' in layer.keeps) == any(value.size == y.size for value in layer.cache
                                            if isinstance(value, numpy.ndarray) and id(value) not in set(map(id, inputs)))
    dy = rng.standard_normal(y.shape).astype('float32')
    for other in pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer):
        for result, expected in zip(run(other, inputs, dy), run(copy.deepcopy(layer), inputs, dy), strict=True):
            assert numpy.array_equal(result, expected)


def test_inference_holds_in_its_own_thread_and_changes_no_layer(rng):
    norm, x = BatchNorm2D(3), rng.standard_normal((2, 4, 5, 3)).astype('float32')
    y = norm.forward(x)
    cache, seen = norm.cache, []
    with inference():
        assert not norm.training and not norm.keep_cache
        norm.forward(x)
        thread = threading.Thread(target=lambda: seen.append((norm.training, norm.keep_cache)))
        thread.start()
        thread.join()
    assert norm.training and norm.keep_cache and norm.cache is cache and seen == [(True, True)]
    assert norm.backward(y).shape == x.shape


def test_defaults_are_those_of_other_libraries():
    norm, conv, upconv = BatchNorm2D(2), Conv2D(2, 3), ConvTranspose2D(2, 3)
    assert (norm.momentum, norm.eps) == (0.1, 1e-5) and LeakyReLU().negative_slope == 0.01
    assert conv.geometry == Geometry((3, 3), (1, 1), (1, 1), (1, 1)) and upconv.geometry == Geometry((2, 2), (2, 2), (0, 0), (1, 1))
    assert MaxPool2D().geometry == Geometry((2, 2), (2, 2)) and 'bias' in conv.params and 'bias' in upconv.params


@pytest.mark.parametrize('kernel_size, dilation', [((5, 3), 1), ((3, 7), (2, 1)), (1, 1), (3, (1, 4))])
def test_same_padding_keeps_the_size_of_any_image(kernel_size, dilation, rng):
    conv = Conv2D(2, 3, kernel_size, dilation=dilation, rng=rng)
    for size in (1, 1), (9, 4), (2, 13):
        assert conv.forward(rng.random((1, *size, 2), dtype='float32')).shape == (1, *size, 3)
    x = numpy.zeros((1, 9, 11, 2), 'float32')
    x[0, 4, 5, 0] = 1                                                       # its echo is the kernel, turned, about the same place
    y = conv.forward(x)[0]
    rows, columns, _ = numpy.nonzero(y)
    assert rows.min() + rows.max() == 8 and columns.min() + columns.max() == 10


def test_eval_forgets_what_was_kept_and_train_does_not_bring_it_back(rng):
    conv = Conv2D(2, 3, rng=rng)
    y = conv.forward(rng.random((1, 4, 5, 2), dtype='float32'))
    assert conv.eval().cache is None and conv.eval(keep_cache=True).cache is None
    with pytest.raises(RuntimeError, match='call forward first'):
        conv.train().backward(y)


def test_dropout_drops_each_value_by_itself(rng):
    mask = Dropout(0.5, rng=rng).forward(numpy.ones((4, 10, 11, 6), 'float32')) > 0
    for axis in range(4):                                                   # along no axis do all drop together
        assert 0.3 < mask.any(axis=axis).mean() and not mask.all(axis=axis).all()
        assert (mask.std(axis=axis) > 0).mean() > 0.8


def test_the_gradients_of_weight_and_bias_need_no_gradient_of_the_input(rng):
    conv, x = Conv2D(3, 4, rng=rng, dtype=float), rng.standard_normal((2, 5, 6, 3))
    dy = rng.standard_normal(conv.forward(x).shape)
    assert conv.backward(dy).shape == x.shape
    expected = dict(conv.grads)
    conv.forward(x)
    assert conv.backward(dy, input_gradient=False) is None
    assert all(numpy.array_equal(conv.grads[name], expected[name]) for name in expected)
    numpy.testing.assert_allclose(conv.grads['bias'], dy.sum(axis=(0, 1, 2)), rtol=1e-12)
