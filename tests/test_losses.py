import math

import numpy
import pytest

from nervenet.engine import backend
from nervenet.losses import BCEWithLogitsLoss, DiceLoss, WeightedSum

LOSSES = {
    'dice': lambda: DiceLoss(),
    'dice per image': lambda: DiceLoss(smooth=0.5, per_image=True),
    'bce': lambda: BCEWithLogitsLoss(),
    'sum': lambda: WeightedSum([(1.0, DiceLoss()), (0.5, BCEWithLogitsLoss())]),
}


def logit(p):
    return numpy.log(p / (1 - p))


def pixels(*values):
    """Return values as images of one row: (N, 1, W, 1)."""
    return numpy.array(values, dtype=float)[:, None, :, None]


def test_dice_loss_of_two_images_by_hand():
    p, y = pixels([0.5, 0.25], [0.75, 0.5]), pixels([1, 0], [0, 0])
    # image 1: Σpy = 0.5, Σp = 0.75, Σy = 1; image 2: Σpy = 0, Σp = 1.25, Σy = 0
    assert DiceLoss(smooth=1.0).forward(logit(p), y) == pytest.approx(-(2 * 0.5 + 1) / (2 + 1 + 1))
    assert DiceLoss(smooth=1.0, per_image=True).forward(logit(p), y) == pytest.approx(-(2 / 2.75 + 1 / 2.25) / 2)


def test_dice_loss_gradient_by_hand():
    p, y, loss = pixels([0.5, 0.25]), pixels([1, 0]), DiceLoss(smooth=1.0)
    loss.forward(logit(p), y)
    overlap, extent = 2, 2.75
    expected = pixels([(overlap / extent**2 - 2 / extent) * 0.25, overlap / extent**2 * 0.1875])
    numpy.testing.assert_allclose(loss.backward(), expected, rtol=1e-12)


def test_gradient_of_dice_loss_per_image_is_that_of_each_image_over_their_number(rng):
    logits, target = rng.standard_normal((3, 4, 5, 1)), (rng.random((3, 4, 5, 1)) < 0.3).astype(float)
    loss, alone = DiceLoss(per_image=True), DiceLoss()
    loss.forward(logits, target)
    dlogits = loss.backward()
    for n in range(3):
        alone.forward(logits[n:n + 1], target[n:n + 1])
        numpy.testing.assert_allclose(dlogits[n:n + 1], alone.backward() / 3, rtol=1e-12)


def test_dice_loss_averages_over_channels(rng):
    logits, target = rng.standard_normal((2, 3, 4, 3)), (rng.random((2, 3, 4, 3)) < 0.3).astype(float)
    for per_image in (False, True):
        loss = DiceLoss(per_image=per_image)
        channels = [loss.forward(logits[..., c:c + 1], target[..., c:c + 1]) for c in range(3)]
        assert loss.forward(logits, target) == pytest.approx(numpy.mean(channels))


def test_dice_loss_of_perfect_and_of_two_empty_masks_is_minus_one():
    for target in (pixels([1, 0, 1]), pixels([0, 0, 0])):
        for per_image in (False, True):
            assert DiceLoss(per_image=per_image).forward(1e4 * (2 * target - 1), target) == -1


def test_bce_by_hand():
    p, y, loss = pixels([0.8, 0.3]), pixels([1, 0]), BCEWithLogitsLoss()
    assert loss.forward(logit(p), y) == pytest.approx(-(math.log(0.8) + math.log(0.7)) / 2)
    numpy.testing.assert_allclose(loss.backward(), pixels([-0.1, 0.15]), rtol=1e-12)
    assert loss.forward(numpy.zeros((2, 3, 4, 1)), numpy.zeros((2, 3, 4, 1))) == pytest.approx(math.log(2))


def test_weighted_sum_adds_values_and_gradients(rng):
    logits, target = rng.standard_normal((2, 3, 4, 1)), (rng.random((2, 3, 4, 1)) < 0.3).astype(float)
    dice, bce, both = DiceLoss(), BCEWithLogitsLoss(), WeightedSum([(2.0, DiceLoss()), (0.5, BCEWithLogitsLoss())])
    expected = 2 * dice.forward(logits, target) + 0.5 * bce.forward(logits, target)
    assert both.forward(logits, target) == pytest.approx(expected)
    numpy.testing.assert_allclose(both.backward(), 2 * dice.backward() + 0.5 * bce.backward(), rtol=1e-12)


@pytest.mark.parametrize('name', LOSSES)
@pytest.mark.parametrize('dtype', ['float32', 'float64'])
def test_losses_are_stable_for_logits_of_ten_thousand(name, dtype):
    logits = numpy.array([-1e4, -1e4, 1e4, 1e4, -90, 90, 0], dtype).reshape(1, 1, 7, 1)
    target = numpy.array([0, 1, 0, 1, 1, 0, 1], dtype).reshape(1, 1, 7, 1)
    with numpy.errstate(all='raise', under='ignore'):
        loss = LOSSES[name]()
        value, dlogits = loss.forward(logits, target), loss.backward()
    assert numpy.isfinite(value) and numpy.isfinite(dlogits).all() and numpy.abs(dlogits).max() > 0
    if name == 'bce':
        assert value == pytest.approx((2e4 + 180 + math.log(2)) / 7, rel=1e-6)
        numpy.testing.assert_allclose(dlogits.ravel() * 7, [0, -1, 1, 0, -1, 1, -0.5], atol=1e-6)


@pytest.mark.parametrize('name', LOSSES)
def test_device_gives_what_the_host_gives_and_gradients_keep_the_dtype_of_the_logits(name, xp, rng):
    logits, target = rng.standard_normal((3, 5, 4, 2)), (rng.random((3, 5, 4, 2)) < 0.3)
    loss = LOSSES[name]()
    expected = loss.forward(logits, target), loss.backward()
    for dtype, tolerance in (('float32', 1e-5), ('float64', 1e-12)):
        for target_dtype in ('float32', 'float64', 'uint8', 'bool'):
            value = loss.forward(xp.asarray(logits.astype(dtype)), xp.asarray(target.astype(target_dtype)))
            dlogits = loss.backward()
            assert value.shape == () and value.dtype == 'float64' and dlogits.dtype == dtype
            assert backend.device_of(value) == backend.device_of(dlogits) == ('cpu' if xp is numpy else 'gpu')
            numpy.testing.assert_allclose(backend.to_cpu(value), expected[0], rtol=tolerance)
            numpy.testing.assert_allclose(backend.to_cpu(dlogits), expected[1], rtol=tolerance, atol=tolerance / 100)


@pytest.mark.parametrize('name', LOSSES)
def test_sums_accumulate_in_double_precision(name, rng):
    """Added up in float32, these values are off by 1e-7 and more; what remains is the rounding of each value."""
    logits = rng.standard_normal((1, 512, 512, 2)).astype('float32')
    target = rng.random(logits.shape) < 0.3
    exact = LOSSES[name]().forward(logits.astype('float64'), target)
    assert LOSSES[name]().forward(logits, target) == pytest.approx(exact, rel=0, abs=5e-9)


@pytest.mark.parametrize('name', LOSSES)
def test_losses_change_none_of_their_arguments(name, rng):
    logits, target = rng.standard_normal((2, 3, 4, 1)), (rng.random((2, 3, 4, 1)) < 0.3).astype(float)
    before = logits.copy(), target.copy()
    loss = LOSSES[name]()
    loss.forward(logits, target)
    loss.backward()
    assert numpy.array_equal(logits, before[0]) and numpy.array_equal(target, before[1])


@pytest.mark.parametrize('name', LOSSES)
def test_different_shapes_are_refused_with_both_shapes(name):
    with pytest.raises(ValueError, match=r'\(2, 3, 4, 1\).*\(2, 3, 1, 1\)'):
        LOSSES[name]().forward(numpy.zeros((2, 3, 4, 1)), numpy.zeros((2, 3, 1, 1)))


@pytest.mark.parametrize('name', LOSSES)
@pytest.mark.parametrize('value', [255, 1.0001, -0.0001, -1, math.nan, math.inf])
def test_targets_outside_zero_to_one_are_refused_and_on_a_device_make_the_loss_nan(name, value, xp):
    logits, target = numpy.zeros((2, 3, 4, 1), 'float32'), numpy.zeros((2, 3, 4, 1), 'float32' if value != 255 else 'uint8')
    target[1, 2, 3, 0] = value
    loss = LOSSES[name]()
    if xp is numpy:
        with pytest.raises(ValueError, match='target holds values from .* to .*divide a mask of 0 and 255 by 255'):
            loss.forward(logits, target)
        assert all(part.cache is None for _, part in loss.layers())
    else:
        with numpy.errstate(invalid='ignore'):
            assert numpy.isnan(backend.to_cpu(loss.forward(xp.asarray(logits), xp.asarray(target))))


@pytest.mark.parametrize('name', LOSSES)
def test_soft_targets_and_bool_and_whole_numbers_are_taken(name, xp):
    logits = xp.asarray(numpy.linspace(-2, 2, 24).reshape(2, 3, 4, 1))
    for target in (numpy.linspace(0, 1, 24), numpy.arange(24) % 2 == 0, numpy.arange(24) % 2, numpy.ones(24, 'uint8')):
        target = target.reshape(2, 3, 4, 1)
        value, as_float = (backend.to_cpu(LOSSES[name]().forward(logits, xp.asarray(y))) for y in (target, target * 1.0))
        assert numpy.isfinite(value) and value == as_float


@pytest.mark.parametrize('name', LOSSES)
@pytest.mark.parametrize('shape', [(3, 4), (2, 3, 4), (0, 3, 4, 1), (2, 3, 0, 1), (1, 2, 3, 4, 1)])
def test_what_is_no_batch_of_images_is_refused(name, shape):
    with pytest.raises(ValueError, match='must be .N, H, W, C. with at least one pixel'):
        LOSSES[name]().forward(numpy.zeros(shape), numpy.zeros(shape))


@pytest.mark.parametrize('name', LOSSES)
@pytest.mark.parametrize('logits, target', [
    ('uint8', 'float32'), ('int64', 'bool'), ('bool', 'bool'), ('float32', 'U1'), ('float32', 'O')])
def test_logits_that_are_no_floating_point_numbers_and_targets_that_are_no_numbers_are_refused(name, logits, target):
    with pytest.raises(ValueError, match='expected floating-point logits, and a target of numbers'):
        LOSSES[name]().forward(numpy.zeros((1, 2, 2, 1), logits), numpy.zeros((1, 2, 2, 1), target))


@pytest.mark.parametrize('number', [numpy.float64, numpy.float32, numpy.array])
def test_gradients_keep_the_dtype_of_the_logits_though_weights_and_smooth_are_numbers_of_numpy(number, xp, rng):
    logits, target = rng.standard_normal((2, 3, 4, 1)), (rng.random((2, 3, 4, 1)) < 0.3)
    for dtype in 'float32', 'float64':
        results = []
        for kind in float, number:
            dice, per_image = DiceLoss(smooth=kind(0.5)), DiceLoss(smooth=kind(0.25), per_image=True)
            inner = WeightedSum([(kind(2.0), per_image)])
            loss = WeightedSum([(kind(0.5), dice), (kind(2.0), BCEWithLogitsLoss()), (kind(0.25), inner)])
            value = loss.forward(xp.asarray(logits.astype(dtype)), xp.asarray(target.astype('float64')))
            dlogits = loss.backward()
            assert value.dtype == 'float64' and value.shape == () and dlogits.dtype == dtype
            results.append((backend.to_cpu(value), backend.to_cpu(dlogits)))
        assert results[0][0] == results[1][0] and numpy.array_equal(results[0][1], results[1][1])


def test_dice_smooth_is_one_by_default():
    y = pixels([1, 0, 0], [0, 0, 0])
    logits = logit(0.5 * y + 0.25)
    for per_image in False, True:
        assert DiceLoss().smooth == 1.0
        assert DiceLoss(per_image=per_image).forward(logits, y) == DiceLoss(1.0, per_image).forward(logits, y)
    # Σpy = 0.75, Σp = 0.75 + 5 · 0.25 = 2, Σy = 1
    assert DiceLoss().forward(logits, y) == pytest.approx(-(2 * 0.75 + 1) / (2 + 1 + 1))


@pytest.mark.parametrize('name', LOSSES)
def test_each_forward_serves_one_backward_and_the_cache_is_freed(name, rng):
    loss = LOSSES[name]()
    with pytest.raises(RuntimeError, match='forward first'):
        loss.backward()
    loss.forward(rng.standard_normal((2, 3, 4, 1)), numpy.ones((2, 3, 4, 1)))
    loss.backward()
    assert all(part.cache is None for _, part in loss.layers())
    with pytest.raises(RuntimeError, match='forward first'):
        loss.backward()


@pytest.mark.parametrize('make, message', [
    (lambda: DiceLoss(smooth=0), 'smooth is 0'), (lambda: DiceLoss(smooth=-1), 'smooth is -1'),
    (lambda: DiceLoss(smooth=math.nan), 'smooth is nan'), (lambda: DiceLoss(smooth=math.inf), 'smooth is inf'),
    (lambda: WeightedSum([]), 'at least one'),
    (lambda: WeightedSum([(math.nan, DiceLoss())]), r'weights .* \[nan\]; expected finite'),
    (lambda: WeightedSum([(1, DiceLoss()), (math.inf, DiceLoss())]), r'\[1.0, inf\]; expected finite')])
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
