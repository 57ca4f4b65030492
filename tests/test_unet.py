import numpy
import pytest

import nervenet
from nervenet import UNet
from nervenet.engine import backend

ARCHITECTURES = {'norm': dict(norm='batch'), 'no norm': dict(norm=None), 'dropout': dict(dropout=0.3), 'shallow': dict(depth=1),
                 'colour, two classes': dict(in_channels=3, out_channels=2)}


def small_unet(rng, **options):
    """A small U-Net whose biases and norms are not at their symmetric starting values."""
    model = UNet(**{'base_channels': 3, 'depth': 2, 'rng': rng, 'dtype': float, **options})
    for name, array in model.parameters().items():
        if array.ndim == 1:
            array += 0.3 * rng.standard_normal(array.shape)
    return model


def test_names_are_those_of_the_architecture():
    model = UNet(base_channels=2, depth=2, norm=None)
    assert list(model.parameters()) == [
        f'{stage}.{array}' for stage in
        ('stem.conv1', 'stem.conv2', 'downs.0.conv1', 'downs.0.conv2', 'downs.1.conv1', 'downs.1.conv2', 'ups.0.upconv', 'ups.0.conv1',
         'ups.0.conv2', 'ups.1.upconv', 'ups.1.conv1', 'ups.1.conv2', 'head') for array in ('weight', 'bias')]
    shapes = {name: array.shape for name, array in model.parameters().items()}
    assert shapes['downs.1.conv1.weight'] == (3, 3, 4, 8) and shapes['ups.0.upconv.weight'] == (2, 2, 4, 8)
    assert shapes['ups.0.conv1.weight'] == (3, 3, 8, 4) and shapes['head.weight'] == (1, 1, 2, 1)


def test_a_convolution_that_a_norm_follows_has_no_bias_and_buffers_are_saved():
    state = UNet(base_channels=2, depth=1).state_dict()
    assert {'stem.norm1.weight', 'stem.norm1.bias', 'stem.norm1.running_mean', 'stem.norm1.running_var', 'ups.0.upconv.bias',
            'head.bias'} <= state.keys()
    assert 'stem.conv1.bias' not in state
    assert 'stem.norm1.running_mean' not in UNet(base_channels=2, depth=1).parameters()


@pytest.mark.parametrize('size', [(1, 1), (1, 7), (2, 2), (13, 19), (16, 16), (33, 5)])
@pytest.mark.parametrize('options', ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_any_image_size_goes_in_and_comes_out_training_included(size, options, rng, xp):
    model = small_unet(rng, dtype='float32', **options)
    device = 'cpu' if xp is numpy else 'gpu'
    model.to(device)
    x = backend.move(rng.random((2, *size, model.in_channels), dtype='float32'), device)
    logits = model.forward(x)
    assert logits.shape == (2, *size, model.config['out_channels']) and logits.dtype == numpy.float32
    dx = model.backward(logits)
    assert dx.shape == x.shape and dx.dtype == numpy.float32
    assert all(numpy.isfinite(backend.to_cpu(gradient)).all() for gradient in model.gradients().values())


def test_a_size_that_needs_no_padding_gets_none_and_padding_changes_nothing_beyond_its_reach(rng):
    """With running statistics, a pixel whose receptive field lies inside the image does not see the padding."""
    model = small_unet(rng, depth=1).eval()
    image = rng.random((1, 40, 41, 1))
    assert numpy.allclose(model.forward(image)[:, :, :20], model.forward(image[:, :, :40])[:, :, :20], rtol=1e-12)


def test_the_model_standardises_its_input(rng):
    model, same = (small_unet(numpy.random.default_rng(3), **options) for options in (dict(input_mean=0.4, input_std=0.2), {}))
    x = rng.random((2, 8, 8, 1))
    logits = model.forward(x)
    assert numpy.allclose(logits, same.forward((x - 0.4) / 0.2), rtol=1e-12)
    assert numpy.allclose(model.backward(logits), same.backward(logits) / 0.2, rtol=1e-9)


def test_images_of_the_wrong_kind_are_refused():
    model = UNet(base_channels=2, depth=1)
    with pytest.raises(ValueError, match='images are uint8, this model computes in float32'):
        model.forward(numpy.zeros((1, 8, 8, 1), numpy.uint8))
    with pytest.raises(ValueError, match=r'\(1, 8, 8\), expected \(N, H, W, 1\)'):
        model.forward(numpy.zeros((1, 8, 8), numpy.float32))


@pytest.mark.parametrize('options, message', [
    (dict(depth=0), 'depth is 0'), (dict(base_channels=1.5), 'base_channels is 1.5'), (dict(norm='layer'), "norm is 'layer'"),
    (dict(input_std=0), 'input_std is 0'), (dict(dropout=1), 'dropout probability is 1')])
def test_bad_architectures_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        UNet(**options)


def test_config_builds_the_same_architecture_and_state_carries_the_model(rng):
    model = small_unet(rng, dropout=0.2, input_mean=0.3)
    x = rng.random((2, 9, 8, 1))
    model.forward(x)
    copy = UNet(**model.config, dtype=model.dtype)
    copy.load_state_dict(model.state_dict())
    assert numpy.array_equal(copy.eval().forward(x), model.eval().forward(x))


def test_loading_a_state_is_strict_and_changes_nothing_on_failure(rng):
    model = small_unet(rng)
    before = {name: array.copy() for name, array in model.state_dict().items()}
    state = {name: array + 1 for name, array in before.items()}
    state['head.extra'] = state.pop('head.bias')
    state['stem.conv2.weight'] = numpy.zeros((3, 3, 3, 4))
    with pytest.raises(ValueError) as error:
        model.load_state_dict(state)
    for part in ('head.bias is missing', 'head.extra is unknown', 'stem.conv2.weight has shape (3, 3, 3, 4), expected (3, 3, 3, 3)'):
        assert part in str(error.value)
    assert all(numpy.array_equal(before[name], array) for name, array in model.state_dict().items())


def test_observe_sees_every_stage(rng):
    model, seen = small_unet(rng), {}
    logits = model.forward(rng.random((1, 13, 19, 1)), seen.__setitem__)
    assert {name: y.shape[1:] for name, y in seen.items()} == {
        'stem': (16, 20, 3), 'downs.0': (8, 10, 6), 'downs.1': (4, 5, 12), 'ups.0': (8, 10, 6), 'ups.1': (16, 20, 3), 'head': (13, 19, 1)}
    assert numpy.array_equal(seen['head'], logits)


def test_receptive_field_is_exactly_what_an_output_pixel_depends_on(rng):
    """With positive weights nothing cancels and a raised pixel wins every pooling window: the output sees it if it can."""
    model = small_unet(rng, norm=None).eval()
    for array in model.parameters().values():
        array[...] = abs(array) + 0.01
    x = rng.random((1, 64, 64, 1))
    with nervenet.plain():                                      # the fast paths round a little differently beside the raised row
        logits = model.forward(x)
        for position in (31, 32, 33, 34):
            first, last = model.receptive_field('head', position)
            for row, is_seen in (first - 1, False), (first, True), (last, True), (last + 1, False):
                raised = x.copy()
                raised[0, row] += 1000
                assert (model.forward(raised)[0, position, 30] != logits[0, position, 30]) == is_seen


def test_summary_counts_what_the_model_holds(rng):
    model = UNet(base_channels=4, depth=3, rng=rng)
    lines = model.summary((45, 60)).splitlines()
    total = lines[-2].split()
    assert total[0] == 'total' and int(total[1].replace(',', '')) == sum(p.size for p in model.parameters().values())
    row = next(line.split() for line in lines if line.startswith('ups.2.conv1'))
    assert row[1] == '48×64×4' and row[2] == '288' and int(row[3].replace(',', '')) == 9 * 8 * 4 * 48 * 64
    assert next(line.split() for line in lines if line.startswith('stem.relu2'))[-1] == '5'


def test_summary_foresees_what_training_keeps(rng):
    """The column of kept memory against the arrays that the caches really hold, each counted once."""
    for options in ({}, dict(norm=None), dict(dropout=0.5)):
        model = UNet(base_channels=4, depth=2, rng=rng, **options)
        model.forward(rng.random((1, 32, 48, 1), dtype='float32'))
        kept = {}
        for prefix, layer in model.layers():
            values = [array for value in layer.cache or () for array in (value if isinstance(value, tuple) else (value,))]
            kept |= {id(array): array.nbytes for array in values if isinstance(array, numpy.ndarray) and array.ndim == 4}
        foreseen = float(model.summary((32, 48)).splitlines()[-2].split()[-1])
        assert abs(sum(kept.values()) / 2**20 / foreseen - 1) < 0.1


def test_without_the_gradient_of_the_images_all_others_are_the_same(rng):
    model = UNet(base_channels=4, depth=2, rng=rng, dtype='float64')
    x, dlogits = rng.random((2, 13, 18, 1)), rng.standard_normal((2, 13, 18, 1))
    model.forward(x)
    assert model.backward(dlogits).shape == x.shape
    expected = {name: array.copy() for name, array in model.gradients().items()}
    model.forward(x)
    assert model.backward(dlogits, input_gradient=False) is None
    assert all(numpy.array_equal(expected[name], array) for name, array in model.gradients().items())


def test_training_memory_grows_with_batch_image_and_width():
    model = UNet(base_channels=8, depth=3)
    one = model.training_memory((1, 96, 128, 1))
    assert model.training_memory((1, 96, 121, 1)) == one                        # padded to a multiple of 8
    fixed = 2 * one - model.training_memory((2, 96, 128, 1))                    # what does not depend on the batch
    assert 0 < fixed < one
    assert model.training_memory((16, 96, 128, 1)) == fixed + 16 * (one - fixed)
    assert UNet(base_channels=16, depth=3).training_memory((1, 96, 128, 1)) > one


def test_padding_comes_after_standardising_and_is_the_mean_grey(rng):
    """So an image of the mean grey looks the same to the network with and without padding, inside its reach."""
    model = small_unet(rng, norm=None, input_mean=0.4, input_std=0.2)
    grey = numpy.full((1, 13, 18, 1), 0.4)
    prepared = model.prepare(grey)
    assert prepared.shape == (1, 16, 20, 1) and not prepared.any()
    x = rng.random((1, 13, 18, 1))
    padded = model.prepare(x)
    assert not padded[:, 13:].any() and not padded[:, :, 18:].any()
    numpy.testing.assert_allclose(padded[:, :13, :18], (x - 0.4) / 0.2)


def test_a_step_drops_the_gradients_of_the_last_one_before_it_needs_memory(rng):
    model, seen = small_unet(rng, dtype='float32'), []
    x = rng.random((1, 8, 8, 1), dtype='float32')
    loss, optimizer = nervenet.DiceLoss(), nervenet.SGD(model.parameters(), 0.1)
    nervenet.train_step(model, loss, optimizer, x, numpy.ones_like(x))
    assert all(gradient is not None for gradient in model.gradients().values())
    nervenet.train_step(model, loss, optimizer, x, numpy.ones_like(x), observe=lambda name, y: seen.extend(model.gradients().values()))
    assert seen and all(gradient is None for gradient in seen)
    model.backward(model.forward(x))
    model.forward(x)
    assert all(gradient is not None for gradient in model.gradients().values())         # a forward alone touches none


def test_intensities_of_another_scale_are_refused_where_the_model_standardises(rng):
    model, x = small_unet(rng, input_mean=0.4, input_std=0.2), rng.random((1, 9, 8, 1))
    for wrong, said in ((255 * x, 'values from .* to 2'), ((x - 0.4) / 0.2, 'values from -'), (x - 0.1, 'values from -0.')):
        with pytest.raises(ValueError, match=said):
            nervenet.predict(model, wrong)
    nervenet.predict(model, x)
    nervenet.predict(small_unet(rng), (x - 0.4) / 0.2)                      # without standardising, the images may be


def test_an_empty_batch_gives_empty_logits(rng):
    assert nervenet.predict(small_unet(rng, input_mean=0.4), numpy.zeros((0, 9, 8, 1))).shape == (0, 9, 8, 1)


def test_a_seed_stands_for_a_generator(rng):
    for make in lambda rng: UNet(base_channels=2, depth=2, rng=rng), lambda rng: nervenet.DoubleConv(2, 2, rng=rng), lambda rng: nervenet.Up(
            4, 2, rng=rng), lambda rng: nervenet.Conv2D(2, 3, rng=rng):
        seeded, generated = make(0).parameters(), make(numpy.random.default_rng(0)).parameters()
        assert all(numpy.array_equal(seeded[name], generated[name]) for name in generated)
    block = nervenet.DoubleConv(3, 3, rng=0)
    assert not numpy.array_equal(block.conv1.params['weight'], block.conv2.params['weight'])
