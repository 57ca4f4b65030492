"""The blocks of networks, what is done at once, and what is said of a network without computing anything."""

import contextlib
import copy
import pickle
import threading
import warnings

import numpy
import pytest

import nervenet
from nervenet import BatchNorm2D, Concat, Conv2D, DoubleConv, Down, Layer, LeakyReLU, ReLU, UNet, Up, predict
from nervenet.engine import backend, parallel, paths
from nervenet.networks import NETWORKS
from nervenet.networks.fusing import back_in_sequence, in_sequence
from nervenet.networks.network import Network, padded, padded_size
from nervenet.networks.summary import Part, trace


def norm_with_statistics(channels, rng, dtype='float64'):
    norm = BatchNorm2D(channels, dtype=dtype)
    for arrays in norm.params, norm.buffers:
        for name in arrays:
            arrays[name] = rng.uniform(0.5, 2, channels).astype(dtype)
    return norm


@pytest.mark.parametrize('dtype, tolerance', [('float64', 1e-12), ('float32', 2e-5)])
@pytest.mark.parametrize('channels', [(1, 4), (6, 5), (40, 44)])
@pytest.mark.parametrize('options', [dict(bias=False), dict(bias=True), dict(bias=False, dilation=(2, 3)), dict(bias=False, stride=2)],
                         ids=str)
def test_a_norm_done_by_the_convolution_gives_what_both_give(xp, rng, options, channels, dtype, tolerance):
    conv, norm = Conv2D(*channels, rng=rng, dtype=dtype, **options), norm_with_statistics(channels[1], rng, dtype)
    if options['bias']:
        conv.params['bias'] = rng.standard_normal(channels[1]).astype(dtype)
    device = 'cpu' if xp is numpy else 'gpu'
    conv.to(device).eval(), norm.to(device).eval()
    x = xp.asarray(rng.standard_normal((2, 20, 27, channels[0])).astype(dtype))
    before = backend.to_cpu(conv.params['weight']).copy()
    with paths.paths_taken() as taken:
        y = backend.to_cpu(in_sequence(x, conv, norm))
    assert 'norm folded into the convolution' in taken
    expected = backend.to_cpu(norm.forward(conv.forward(x)))
    assert y.dtype == dtype and numpy.array_equal(backend.to_cpu(conv.params['weight']), before)
    numpy.testing.assert_allclose(y, expected, rtol=0, atol=tolerance * abs(expected).max())


def test_layers_of_other_kinds_are_left_to_themselves(rng):
    """A subclass may compute anything; an activation that no shortcut knows must not be taken for another."""
    class Doubled(Conv2D):
        def forward(self, x):
            return 2 * super().forward(x)

    class Centred(BatchNorm2D):
        def forward(self, x):
            return super().forward(x) - 1

    x = rng.standard_normal((2, 6, 7, 3))
    for conv in Conv2D(3, 4, rng=rng, dtype=float), Doubled(3, 4, rng=rng, dtype=float):
        for norm in norm_with_statistics(4, rng), Centred(4, dtype=float), None:
            for activation in ReLU(), LeakyReLU(0.3), None:
                layers = [layer.eval() for layer in (conv, norm, activation) if layer is not None]
                expected = x
                for layer in layers:
                    expected = layer.forward(expected)
                numpy.testing.assert_allclose(in_sequence(x, conv, norm, activation), expected, rtol=1e-11, atol=1e-11)


def test_norms_are_done_by_convolutions_in_inference_only(rng, monkeypatch):
    model, x = UNet(base_channels=3, depth=2, rng=rng, dtype='float64'), rng.random((2, 12, 16, 1))
    for _ in range(3):
        model.forward(x)                                                    # running statistics of their own
    ran, statistics = [], BatchNorm2D.statistics
    monkeypatch.setattr(BatchNorm2D, 'statistics', lambda norm, *inputs: ran.append(norm) or statistics(norm, *inputs))
    with nervenet.plain():
        expected = model.eval().forward(x)
    assert len(ran) == 10                                                   # two in the stem, in each of two downs and of two ups
    numpy.testing.assert_allclose(model.forward(x), expected, rtol=1e-10)
    assert len(ran) == 10
    numpy.testing.assert_allclose(model.eval(keep_cache=True).forward(x), expected, rtol=1e-10)
    assert len(ran) == 20
    model.train().forward(x)
    assert len(ran) == 30
    numpy.testing.assert_allclose(predict(model, x), predict(copy.deepcopy(model).eval(), x), rtol=1e-12)
    assert len(ran) == 30


@pytest.mark.parametrize('norm', ['batch', None])
@pytest.mark.parametrize('kind, shapes', [(DoubleConv, [(2, 6, 8, 3)]), (Down, [(2, 6, 8, 3)]), (Up, [(2, 3, 4, 6), (2, 6, 8, 4)])])
def test_a_block_survives_pickle_and_copy_between_forward_and_backward(kind, shapes, norm, rng):
    block = kind(shapes[0][3], 4, norm, rng=rng, dtype=float)
    inputs = [rng.standard_normal(shape) for shape in shapes]
    dy = rng.standard_normal(block.forward(*inputs).shape)
    others = pickle.loads(pickle.dumps(block)), copy.deepcopy(block)
    expected, gradients = block.backward(dy), block.gradients()
    for other in others:
        for result, reference in zip(other.backward(dy), expected):
            assert numpy.array_equal(result, reference)
        assert all(numpy.array_equal(gradients[name], array) for name, array in other.gradients().items())


def test_an_up_keeps_both_halves_and_not_the_join(rng):
    up, x, skip = Up(6, 3, rng=rng), *(rng.random(shape, dtype='float32') for shape in ((1, 4, 5, 6), (1, 8, 10, 3)))
    y = up.forward(x, skip)
    (first, second), = up.conv1.cache
    assert first is skip and second.shape == skip.shape and up.concat.cache is None
    up.backward(y)
    assert all(layer.cache is None for _, layer in up.layers())


def test_threads_predict_with_one_model_in_training_mode_and_change_nothing(rng):
    model, x = UNet(base_channels=4, depth=2, rng=rng), rng.random((6, 1, 20, 28, 1), dtype='float32')
    model.forward(x[0])
    state, caches = {k: v.copy() for k, v in model.state_dict().items()}, [layer.cache for _, layer in model.layers()]
    expected, results = [predict(model, image) for image in x], {}
    threads = [threading.Thread(target=lambda n=n: results.update({n: [predict(model, x[n]) for _ in range(5)]})) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(numpy.array_equal(y, expected[n]) for n in range(6) for y in results[n])
    assert all(numpy.array_equal(state[name], array) for name, array in model.state_dict().items())
    assert all(layer.cache is cache for (_, layer), cache in zip(model.layers(), caches)) and model.training


class Strange(Network):
    """Another network: dilated and strided convolutions and a leaky unit, then back to the size of the image."""

    def __init__(self, *, rng=None, dtype=numpy.float32):
        super().__init__(dict(in_channels=2, out_channels=1, input_mean=0, input_std=1), 3, dtype)
        options = dict(rng=rng, dtype=dtype)
        self.wide = Conv2D(2, 3, (3, 5), dilation=(4, 1), **options)
        self.unit = LeakyReLU(0.1)
        self.down = Conv2D(3, 4, 3, stride=3, padding=0, **options)
        self.up = nervenet.ConvTranspose2D(4, 1, 3, 3, **options)
        self.add_children('wide', 'unit', 'down', 'up')

    def forward(self, x, observe=None):
        H, W = x.shape[1:3]
        observe = observe or (lambda name, y: None)
        x = self.unit.forward(self.wide.forward(self.prepare(x)))
        observe('wide', x)
        x = self.up.forward(self.down.forward(x))[:, :H, :W]
        observe('up', x)
        return x

    def backward(self, dlogits, input_gradient=True):
        H, W = dlogits.shape[1:3]
        dy = self.up.backward(self.pad(dlogits))
        return self.input_gradient_of(self.wide.backward(self.unit.backward(self.down.backward(dy))), (H, W))


def test_the_summary_serves_a_network_it_has_never_seen(rng):
    model = Strange(rng=rng)
    lines = [line.split() for line in model.summary((10, 14)).splitlines()]
    assert lines[1:3] == [['wide', '12×15×3', '93', f'{12 * 15 * 90:,}', '0.00'], ['unit', '12×15×3', '0', '0', '0.00', '9']]
    assert [line[0] for line in lines[1:-1]] == ['wide', 'unit', 'down', 'up', 'total']
    assert model.receptive_field('wide', 10, axis=0) == (6, 14) and model.receptive_field('wide', 10, axis=1) == (8, 12)
    assert model.receptive_field('up', 10, axis=0) == (5, 15) and model.widest_field('up') == 11
    with pytest.raises(ValueError, match="there is no stage 'head'; expected one of wide, up"):
        model.receptive_field('head', 3)


def test_the_receptive_field_is_exact_along_both_axes(rng):
    model = Strange(rng=rng, dtype=float).eval()
    for array in model.parameters().values():
        array[...] = abs(array) + 0.01
    x = rng.random((1, 30, 33, 2))
    with nervenet.plain():
        logits = model.forward(x)
        for axis in (0, 1):
            for position in (12, 13, 14):
                first, last = model.receptive_field('up', position, axis)
                seen = []
                for place in range(30):
                    raised = x.copy()
                    raised[(slice(None),) * (1 + axis) + (place,)] += 1000
                    if (model.forward(raised) != logits).take(position, axis=1 + axis).any():
                        seen.append(place)
                assert (seen[0], seen[-1]) == (first, last), (axis, position)


def test_looking_at_a_network_leaves_it_as_it_is(rng):
    model = UNet(base_channels=3, depth=2, rng=rng)
    x = rng.random((1, 8, 12, 1), dtype='float32')
    logits = model.forward(x)
    caches = [layer.cache for _, layer in model.layers()]
    model.summary((20, 30)), model.widest_field('head'), model.training_memory((2, 20, 30, 1))
    assert all(layer.cache is cache and 'forward' not in vars(layer) for (_, layer), cache in zip(model.layers(), caches))
    model.backward(logits)


def test_sizes_are_rounded_up_and_images_padded_at_the_bottom_and_right(rng):
    assert padded_size((13, 16), 8) == (16, 16) and padded_size((3, 50), 8, 48) == (48, 56)
    x = rng.random((1, 3, 4, 2))
    larger = padded(x, (4, 4))
    assert larger.shape == (1, 4, 4, 2) and numpy.array_equal(larger[:, :3], x) and not larger[:, 3:].any()
    assert padded(larger, (4, 4)) is larger


def test_every_network_is_known_by_a_name_and_exported():
    assert NETWORKS['unet'] is UNet and all(issubclass(network, Network) and issubclass(network, Layer) for network in NETWORKS.values())


def test_a_trace_follows_what_is_cut_off_at_the_end_and_refuses_what_it_would_get_wrong(rng):
    class Cut(Strange):
        start, stop = 0, 7

        def forward(self, x, observe=None):
            x = self.wide.forward(self.prepare(x))[:, self.start:self.stop, :]
            y = self.up.forward(self.down.forward(x))
            observe('up', y)
            return y

    model = Cut(rng=rng)
    made, stages, _ = trace(model, (1, 12, 15, 2))
    assert [y.shape[1:3] for y in made] == [(12, 15), (2, 5), (6, 15)]
    assert stages['up'].input_range(4, 4, 0) == (-1, 9)                         # upconv: row 1 → rows 3 to 5 → ∓4
    model.start = 1
    with pytest.raises(NotImplementedError, match='a trace follows'):
        model.summary((12, 15))


def test_a_trace_tells_which_part_of_what_was_taken(rng):
    made, _, _ = trace(NETWORKS['optimised-resunet'](base_channels=2, rng=rng), (2, 48, 64, 1))
    by_name = {y.name: y for y in made}
    part, = by_name['downs.2.dac.conv5'].inputs
    assert (type(part.layer), part.layer.index, part.inputs) == (Part, (slice(2, None),), (by_name['downs.2.dac.conv3'],))
    assert part.shape == (2, 6, 8, 16) and by_name['downs.2.dac.conv3'].shape == (4, 6, 8, 16)


def test_a_norm_is_done_by_the_layer_s_own_convolution(rng, monkeypatch):
    """Whatever a convolution comes to know, it must not vanish in inference."""
    conv, norm = Conv2D(3, 4, bias=False, rng=rng, dtype=float).eval(), norm_with_statistics(4, rng).eval()
    apply, x = Conv2D.apply, rng.standard_normal((2, 6, 7, 3))
    monkeypatch.setattr(Conv2D, 'apply', lambda layer, x, weight, bias, **options: apply(layer, 5 * x, weight, bias, **options))
    numpy.testing.assert_allclose(in_sequence(x, conv, norm), norm.forward(conv.forward(x)), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize('C', [8, 40])
@pytest.mark.parametrize('skip', [(2, 28, 32), (2, 36, 36), (1, 32, 32), (2, 32, 30)])
def test_a_join_that_does_not_fit_is_refused_with_both_shapes(skip, C, rng):
    up, x = Up(2 * C, C, rng=rng), rng.random((2, 16, 16, 2 * C), dtype='float32')
    for way in contextlib.nullcontext, nervenet.plain:
        with way(), pytest.raises(ValueError, match=rf'cannot join \({skip[0]}, {skip[1]}, {skip[2]}, {C}\).*differ before the channels'):
            up.forward(x, rng.random((*skip, C), dtype='float32'))
    with pytest.raises(ValueError, match='cannot join .* float64'):
        up.forward(x, rng.random((2, 32, 32, C)))


@pytest.mark.parametrize('norm', ['batch', None])
def test_whoever_replaces_a_backward_is_asked(norm, rng):
    block, x = DoubleConv(6, 6, norm, rng=rng, dtype=float), rng.standard_normal((2, 20, 24, 6))
    dy = rng.standard_normal(block.forward(x).shape)
    expected, gradients = block.backward(dy), {name: array.copy() for name, array in block.gradients().items()}
    for name, layer in block.children.items():
        asked, backward = [], layer.backward
        layer.backward = lambda dy: asked.append(name) or backward(dy)
        block.forward(x)
        numpy.testing.assert_allclose(block.backward(dy), expected, rtol=1e-9)
        assert asked == [name]
        for key, array in block.gradients().items():
            numpy.testing.assert_allclose(array, gradients[key], rtol=1e-9, atol=1e-12)
        del layer.backward


@pytest.mark.parametrize('first', [ReLU, Concat])
def test_nothing_is_returned_where_no_input_gradient_is_asked_for(first, rng):
    conv, x = Conv2D(8, 5, rng=rng, dtype=float), rng.standard_normal((2, 20, 24, 8))
    layers = first(), conv
    y = in_sequence((x[..., :3], x[..., 3:]) if first is Concat else x, *layers)
    assert back_in_sequence(numpy.ones_like(y), *layers, input_gradient=False) is None
    assert conv.grads['weight'].any()


def test_a_prepared_forward_leaves_no_cache_of_an_earlier_one(rng):
    block, x = DoubleConv(6, 6, rng=rng), rng.random((2, 20, 24, 6), dtype='float32')
    block.forward(x)
    for _, layer in block.layers():
        layer.training = layer.keep_cache = False
    block.forward(x)
    assert all(layer.cache is None for _, layer in block.layers())


def test_what_was_not_written_does_not_enter_a_result(rng):
    """In one thread, scratch memory of one dtype is used again for another: its bits may be anything."""
    with parallel.set_threads(1), warnings.catch_warnings():
        warnings.simplefilter('error')
        for W in range(20, 36):
            for dtype in 'float64', 'float32':
                layers = Concat(), Conv2D(32, 16, rng=rng, dtype=dtype), ReLU()
                pair = tuple(rng.standard_normal((2, 32, W, 16)).astype(dtype) for _ in range(2))
                with numpy.errstate(all='raise', under='ignore'):
                    y = in_sequence(pair, *layers)
                    back_in_sequence(y, *layers)


def test_fields_of_maps_enlarged_to_the_size_of_others_are_looked_for_everywhere(rng):
    """By hand: the widest field of all units, at a size at which the windows of multi-kernel pooling do not repeat."""
    model = nervenet.OptimisedResUNet(base_channels=1, depth=2, rng=rng)
    _, stages, _ = trace(model, (1, 96, 128, 1))
    widths = [last - first + 1 for axis, length in enumerate((96, 128)) for first, last in
              (stages['head'].input_range(place, place, axis) for place in range(length))]
    assert model.widest_field('head', (96, 128)) == max(widths) == 171
