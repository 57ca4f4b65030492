"""The networks beside the U-Net, and their blocks: sizes, known answers, and that everything works for each of them."""

import numpy
import pytest

import nervenet
from nervenet import Conv2D, OptimisedResUNet, RefineNet, ResNetUNet, ResUNet, UNet, predict
from nervenet.engine import backend, parallel
from nervenet.networks import NETWORKS
from nervenet.networks.optimised_resunet import DenseAtrousConvolution, ResidualMultiKernelPooling
from nervenet.networks.refinenet import ChainedPooling, ConvolutionUnit
from nervenet.networks.residual import BasicBlock, PreActivationBlock

PARTS = {'without DAC': (OptimisedResUNet, dict(dac=False)), 'without RMP': (OptimisedResUNet, dict(rmp=False)),
         'without both': (OptimisedResUNet, dict(dac=False, rmp=False))}
KINDS = {name: (kind, {}) for name, kind in NETWORKS.items()} | PARTS
every_network = pytest.mark.parametrize('kind, options', KINDS.values(), ids=KINDS)


def small(kind, rng, **options):
    """Return a network whose biases, norms and last weights are not at their symmetric starting values."""
    model = kind(**{'base_channels': 3, 'depth': 2, 'rng': rng, 'dtype': float, **options})
    for array in model.parameters().values():
        array += 0.1 * rng.standard_normal(array.shape)
    return model


def assert_close(results, expected, tolerance):
    """Where a norm follows, a shift before it has a gradient of 0, made of rounding: so the largest of them sets the scale for all."""
    lengths = [numpy.linalg.norm(reference) for reference in expected]
    for result, reference, length in zip(results, expected, lengths):
        assert result.dtype == reference.dtype
        assert numpy.linalg.norm(result - reference) <= tolerance * max(length, 0.01 * max(lengths))


@pytest.mark.parametrize('kind, options, parameters, multiply_adds', [
    (UNet, {}, 1_942_289, 565), (ResUNet, {}, 2_074_545, 697), (ResNetUNet, {}, 840_017, 606), (RefineNet, {}, 2_184_521, 558),
    (OptimisedResUNet, {}, 977_466, 655), (OptimisedResUNet, dict(dac=False, rmp=False), 515_505, 531), (ResUNet, dict(depth=3), 515_505, 531),
    (ResUNet, dict(base_channels=32, depth=3), 2_057_057, 2118)])
def test_sizes_at_base_16(kind, options, parameters, multiply_adds):
    """Counted by hand from the published structures, but for the first convolution's share."""
    model = kind(**{'base_channels': 16, **options})
    assert sum(array.size for array in model.parameters().values()) == parameters
    assert round(model.multiply_adds((1, 96, 128, 1)) / 1e6) == multiply_adds


@every_network
@pytest.mark.parametrize('size', [(1, 1), (1, 9), (13, 19), (50, 26)])
def test_any_size_goes_in_and_comes_out_with_a_gradient(kind, options, size, rng):
    model = small(kind, rng, in_channels=2, out_channels=3, **options)
    x = rng.random((2, *size, 2))
    assert predict(model, x).shape == (2, *size, 3)
    logits = model.forward(x)
    assert logits.shape == (2, *size, 3) and numpy.isfinite(model.backward(numpy.ones_like(logits))).all()
    assert predict(model, numpy.zeros((0, *size, 2))).shape == (0, *size, 3)


@every_network
@pytest.mark.parametrize('norm', ['batch', None])
def test_the_fast_way_gives_what_the_plain_one_gives_in_float32(kind, options, norm, rng):
    model = small(kind, rng, norm=norm, base_channels=8, dtype='float32', **options)
    x, dlogits = rng.random((2, 30, 41, 1), dtype='float32'), rng.standard_normal((2, 30, 41, 1)).astype('float32')

    def run():
        results = [model.forward(x), model.backward(dlogits)]
        return results + [array.copy() for array in model.gradients().values()] + [predict(model, x)]

    state = {name: array.copy() for name, array in model.state_dict().items()}
    fast = run()
    model.load_state_dict(state)
    with nervenet.plain():
        expected = run()
    assert_close(fast, expected, 1e-2)


@every_network
def test_the_number_of_threads_changes_no_bit(kind, options, rng):
    model, x = small(kind, rng, base_channels=8, dtype='float32', **options), rng.random((6, 48, 64, 1), dtype='float32')
    results = []
    state = {name: array.copy() for name, array in model.state_dict().items()}
    for threads in 1, 3:
        model.load_state_dict(state)
        with parallel.set_threads(threads):
            logits = model.forward(x)
            model.backward(logits)
            results.append([logits, predict(model, x), *(array.copy() for array in model.gradients().values())])
    assert all(numpy.array_equal(one, other) for one, other in zip(*results))


@every_network
@pytest.mark.parametrize('dtype, tolerance', [('float64', 1e-9), ('float32', 1e-2)])
def test_a_device_gives_what_the_host_gives(kind, options, dtype, tolerance, rng, xp):
    device = 'cpu' if xp is numpy else 'gpu'
    model = small(kind, rng, dtype=dtype, **options)
    x, dlogits = rng.random((2, 21, 26, 1)).astype(dtype), rng.standard_normal((2, 21, 26, 1)).astype(dtype)
    state = {name: array.copy() for name, array in model.state_dict().items()}
    expected = [model.forward(x), model.backward(dlogits), *(array.copy() for array in model.gradients().values()), predict(model, x)]
    model.load_state_dict(state)
    model.to(device)
    moved = backend.move(x, device)
    results = [model.forward(moved), model.backward(backend.move(dlogits, device)), *model.gradients().values(), predict(model, moved)]
    assert_close([*map(backend.to_cpu, results)], expected, tolerance)


@every_network
def test_stages_are_observed_and_joins_are_among_the_layers(kind, options, rng):
    model, seen = small(kind, rng, **options), {}
    model.forward(rng.random((1, 50, 49, 1)), observe=lambda name, y: seen.update({name: y.shape}))
    assert seen['head'] == (1, 50, 49, 1) and len(seen) >= 5
    assert {*model.joins()} <= {*seen} and model.joins()
    layers = {layer for _, layer in model.layers()}
    assert all(layer in layers for layer in model.joins().values())


@every_network
def test_summary_foresees_what_training_keeps(kind, options, rng):
    model = kind(base_channels=4, depth=2, rng=rng, **options)
    model.forward(rng.random((1, 48, 64, 1), dtype='float32'))
    kept = {}
    for _, layer in model.layers():
        values = [array for value in layer.cache or () for array in (value if isinstance(value, tuple) else (value,))]
        kept |= {_owner(array): _owner_bytes(array) for array in values if isinstance(array, numpy.ndarray) and array.ndim == 4}
    foreseen = float(model.summary((48, 64)).splitlines()[-2].split()[-1])
    assert abs(sum(kept.values()) / 2**20 / foreseen - 1) < 0.2


@every_network
def test_the_receptive_field_is_where_the_logit_depends_on_the_image(kind, options, rng):
    """No unit outside its receptive field matters, and with positive weights those at its ends do, where nothing is padded."""
    model = kind(base_channels=1, depth=1, norm=None, rng=rng, dtype=float, **options)
    for array in model.parameters().values():
        array[...] = abs(array) + 0.01                                          # nothing cancels, no ReLU is shut
    x = rng.random((1, 120, 126, 1))
    logits = model.forward(x)
    for axis, position in (0, 60), (0, 61), (1, 62):
        first, last = model.receptive_field('head', position, axis, x.shape[1:3])
        assert 0 <= first <= position <= last < x.shape[1 + axis], 'a larger image is needed'
        dlogits = numpy.zeros_like(logits)
        dlogits[(slice(None),) * (1 + axis) + (position,)] = 1
        model.forward(x)
        seen = numpy.flatnonzero(abs(model.backward(dlogits)).sum(axis=(0, 2 - axis, 3)))
        assert first <= seen[0] and seen[-1] <= last
        if kind in (UNet, ResUNet, ResNetUNet) or options == dict(dac=False, rmp=False):        # no maximum of overlapping windows chooses
            assert seen[0] - first <= (kind is UNet) and last - seen[-1] <= (kind is UNet)


def _owner(array):
    while isinstance(array.base, numpy.ndarray):
        array = array.base
    return id(array)


def _owner_bytes(array):
    while isinstance(array.base, numpy.ndarray):
        array = array.base
    return array.nbytes


# --- Known answers of the blocks ----------------------------------------------------------------------------------------

def zeroed(layer, *kept):
    for name, array in layer.parameters().items():
        if name not in kept:
            array[...] = 0
    return layer


def test_residual_blocks_without_weights_let_their_input_pass(rng):
    x = rng.standard_normal((2, 6, 7, 3))
    assert numpy.array_equal(zeroed(ConvolutionUnit(3, rng=rng, dtype=float)).forward(x), x)
    assert numpy.array_equal(zeroed(DenseAtrousConvolution(3, rng=rng, dtype=float)).forward(x), x)
    assert numpy.array_equal(zeroed(ChainedPooling(3, rng=rng, dtype=float)).forward(x), numpy.maximum(x, 0))
    for norm in 'batch', None:
        assert numpy.array_equal(BasicBlock(3, 3, norm=norm, rng=rng, dtype=float).forward(x), numpy.maximum(x, 0)), 'how a basic block starts'


def test_what_is_added_begins_small(rng):
    for weight in ConvolutionUnit(64, rng=rng).conv2.params['weight'], *(conv.params['weight'] for conv in ChainedPooling(64, rng=rng).convs):
        assert abs(weight.std() / numpy.sqrt(2 / (9 * 64)) - 0.1) < 0.005


def test_a_residual_block_is_the_sum_of_its_ways(rng):
    for block in (PreActivationBlock(3, 5, 2, rng=rng, dtype=float), PreActivationBlock(3, 5, first=True, norm=None, rng=rng, dtype=float),
                  BasicBlock(3, 5, 2, rng=rng, dtype=float)):
        x, way = rng.standard_normal((2, 8, 10, 3)), {}
        y = block.forward(x)
        for name in 'main', 'shortcut':
            way[name] = x
            for layer in (getattr(block, part) for part in getattr(block, name)):
                way[name] = way[name] if layer is None else layer.forward(way[name])
        expected = way['main'] + way['shortcut']
        numpy.testing.assert_allclose(y, numpy.maximum(expected, 0) if block.last else expected, atol=1e-12)


def test_a_convolution_with_stride_2_is_every_second_value_of_that_with_stride_1(rng):
    x = rng.standard_normal((2, 9, 12, 3))
    for kernel_size in 1, 3:
        one, two = (Conv2D(3, 4, kernel_size, stride, rng=numpy.random.default_rng(0), dtype=float) for stride in (1, 2))
        numpy.testing.assert_allclose(two.forward(x), one.forward(x)[:, ::2, ::2], atol=1e-12)


def test_the_branches_of_dense_atrous_convolution_span_3_7_9_and_19_pixels(rng):
    x = numpy.zeros((1, 25, 25, 1))
    x[0, 12, 12] = 1
    spans = []
    dac = DenseAtrousConvolution(1, rng=rng, dtype=float)
    for name, array in dac.parameters().items():
        array[...] = name.endswith('weight')
    for kept in range(4):
        relu = dac.relu.forward
        dac.relu.forward = lambda b: numpy.concatenate([relu(part) * (i == kept) for i, part in enumerate(numpy.split(b, 4))])
        y = dac.forward(x) - x
        del dac.relu.forward
        seen = numpy.flatnonzero(y[0, 12, :, 0])
        spans.append(int(seen[-1] - seen[0] + 1))
    assert spans == [3, 7, 9, 19]


def test_dense_atrous_convolution_against_its_equation_and_untied_copies(rng):
    dac, x = DenseAtrousConvolution(2, rng=rng, dtype=float), rng.standard_normal((2, 9, 11, 2))
    for array in dac.parameters().values():
        array += 0.2 * rng.standard_normal(array.shape)
    K = {name: getattr(dac, name) for name in ('conv1', 'conv3', 'conv5', 'conv_p')}

    def branch(*names):
        """Return a copy of each layer of a branch, as layers of their own."""
        layers = []
        for name in names:
            copy = Conv2D(2, 2, K[name].geometry.kernel_size, dilation=K[name].geometry.dilation, dtype=float)
            copy.params = {key: array.copy() for key, array in K[name].params.items()}
            layers.append((name, copy))
        return layers

    branches = [branch('conv1'), branch('conv3', 'conv_p'), branch('conv1', 'conv3', 'conv_p'), branch('conv1', 'conv3', 'conv5', 'conv_p')]
    expected, outputs = x.copy(), []
    for layers in branches:
        y = x
        for _, layer in layers:
            y = layer.forward(y)
        outputs.append(y)
        expected += numpy.maximum(y, 0)
    numpy.testing.assert_allclose(dac.forward(x), expected, atol=1e-12)

    dy = rng.standard_normal(x.shape)
    dx, sums = dy.copy(), {name: {key: 0 for key in layer.params} for name, layer in K.items()}
    for layers, y in zip(branches, outputs):
        d = dy * (y > 0)
        for name, layer in reversed(layers):
            d = layer.backward(d)
            for key, gradient in layer.grads.items():
                sums[name][key] = sums[name][key] + gradient
        dx += d
    numpy.testing.assert_allclose(dac.backward(dy), dx, atol=1e-12)
    for name, layer in K.items():
        for key, gradient in layer.grads.items():
            numpy.testing.assert_allclose(gradient, sums[name][key], atol=1e-10)


def test_known_answers_of_residual_multi_kernel_pooling(rng):
    rmp = ResidualMultiKernelPooling(3, rng=rng, dtype=float)
    rmp.conv.params['bias'][...] = 0.25
    values = numpy.array([1.0, -2, 3])
    y = rmp.forward(numpy.ones((2, 7, 13, 1)) * values)
    assert y.shape == (2, 7, 13, 7) and sum(array.size for array in rmp.parameters().values()) == 4
    numpy.testing.assert_allclose(y[..., :4], (values @ rmp.conv.params['weight'][0, 0] + 0.25)[0])
    numpy.testing.assert_allclose(y[..., 4:] - values, 0)
    x = rng.standard_normal((1, 12, 18, 3))
    P, bias, y = rmp.conv.params['weight'][0, 0], rmp.conv.params['bias'], rmp.forward(x)
    for i, k in enumerate((2, 3, 5, 6)):                                        # in the authors' order: pool, P, enlarge
        pooled = x[:, :12 // k * k, :18 // k * k].reshape(1, 12 // k, k, 18 // k, k, 3).max(axis=(2, 4)) @ P + bias
        numpy.testing.assert_allclose(y[..., i:i + 1], nervenet.Upsample2D(2, 'bilinear').forward(pooled, (12, 18)), atol=1e-12)
    with pytest.raises(ValueError, match='5×9 .* smaller than the kernel'):
        rmp.forward(rng.standard_normal((1, 5, 9, 3)))


def test_chained_pooling_of_an_even_map_adds_it_once_for_each_link(rng):
    pooling = zeroed(ChainedPooling(3, rng=rng, dtype=float))
    for conv in pooling.convs:
        conv.params['weight'][1, 1] = numpy.eye(3)
    numpy.testing.assert_allclose(pooling.forward(numpy.full((1, 8, 9, 3), 0.7)), 3 * 0.7)


def test_images_smaller_than_what_the_pools_need_are_enlarged_by_padding(rng):
    with_pools, without = (OptimisedResUNet(base_channels=2, depth=2, rmp=rmp, rng=rng) for rmp in (True, False))
    assert (with_pools.padded_size((5, 30)), without.padded_size((5, 30))) == ((24, 32), (8, 32))
    assert with_pools.config['rmp'] and not without.config['rmp'] and without.config['dac']


@every_network
def test_numbers_out_of_range_are_refused(kind, options):
    for wrong, message in ((dict(depth=0), 'depth is 0'), (dict(base_channels=1.5), 'base_channels is 1.5'), (dict(norm='layer'), "norm is 'layer'"),
                           (dict(dropout=1), 'dropout probability is 1'), (dict(input_std=0), 'input_std is 0')):
        with pytest.raises(ValueError, match=message):
            kind(**{**options, **wrong})


@every_network
@pytest.mark.parametrize('p', [0.0, 0.4])
def test_dropout_acts_in_training_alone(kind, options, p, rng):
    model, x = small(kind, rng, dropout=p, norm=None, **options), rng.random((1, 24, 24, 1))
    assert numpy.array_equal(model.forward(x), model.forward(x)) == (p == 0)
    assert numpy.array_equal(predict(model, x), predict(model, x))
