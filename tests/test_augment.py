import dataclasses
import json
import math

import numpy
import pytest

from nervenet.engine import backend
from nervenet.images.augment import (FILL_MODES, ULTRASOUND, Augmentation, affine, median_filter, positions,
                                     resample, smooth_field, spline_basis)

EVERYTHING = dataclasses.replace(ULTRASOUND, vertical_flip=True)
ONE_EACH = {'rotation_range': 20, 'width_shift_range': 0.2, 'height_shift_range': 0.3, 'shear_range': 15,
            'zoom_range': 0.3, 'horizontal_flip': True, 'vertical_flip': True, 'elastic_range': 0.1,
            'gamma_range': (0.5, 2.0), 'gain_range': 0.4, 'speckle_range': 0.3}


def to_device(xp, *arrays):
    """Return copies of NumPy arrays where `xp` computes."""
    return [backend.move(numpy.array(array, order='C'), 'cpu' if xp is numpy else 'gpu') for array in arrays]


def transformed(xp, image, mask, matrix, fill_mode='nearest', cval=0.0, displacement=None):
    """Return image and mask (N, H, W, C) after `resample` with one matrix for all, as NumPy arrays."""
    N, H, W, _ = image.shape
    matrices = numpy.stack([matrix] * N).astype(image.dtype)
    image, mask, matrices = to_device(xp, image, mask, matrices)
    if displacement is not None:
        displacement, = to_device(xp, displacement.astype(image.dtype))
    source = positions(matrices, (H, W), displacement)
    return tuple(map(backend.to_cpu, resample(image, mask, source, fill_mode, cval)))


def pair(rng, N=2, H=12, W=16, C=1, dtype='float32'):
    return rng.random((N, H, W, C)).astype(dtype), (rng.random((N, H, W, 2)) < 0.4).astype(dtype)


def blob(H, W, centre_y, centre_x, radius_y, radius_x):
    """An ellipse, (1, H, W, 1) float64: no symmetry of the image is one of it."""
    y, x = numpy.ogrid[:H, :W]
    return ((((y - centre_y) / radius_y)**2 + ((x - centre_x) / radius_x)**2) < 1).astype('float64')[None, ..., None]


def area_and_centroid(mask):
    y, x = numpy.nonzero(mask[0, ..., 0])
    return len(y), y.mean(), x.mean()


def run(augmentation, images, masks, seeds, xp=numpy):
    rngs = [numpy.random.default_rng([7, seed]) for seed in seeds]
    return tuple(map(backend.to_cpu, augmentation(*to_device(xp, images, masks), rngs)))


# --- Exact transforms -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('dtype', ['float32', 'float64'])
@pytest.mark.parametrize('size', [(12, 16), (7, 5), (5, 8)])
def test_flips_are_exact(xp, rng, size, dtype):
    image, mask = pair(rng, 2, *size, 3, dtype)
    for flip, axes in (((True, False), 1), ((False, True), 2), ((True, True), (1, 2))):
        new_image, new_mask = transformed(xp, image, mask, affine(size, flip=flip))
        assert new_image.dtype == new_mask.dtype == dtype
        assert numpy.array_equal(new_image, numpy.flip(image, axes))
        assert numpy.array_equal(new_mask, numpy.flip(mask, axes))


@pytest.mark.parametrize('length', [8, 9])
@pytest.mark.parametrize('turns', [-1, 1, 2, 3, 4])
def test_quarter_turns_are_exact_and_counter_clockwise(xp, rng, length, turns):
    image, mask = pair(rng, 2, length, length, 2)
    new_image, new_mask = transformed(xp, image, mask, affine((length, length), rotation=90 * turns))
    assert numpy.array_equal(new_image, numpy.rot90(image, turns, (1, 2)))
    assert numpy.array_equal(new_mask, numpy.rot90(mask, turns, (1, 2)))


def test_a_quarter_turn_of_an_oblong_image_is_exact_about_its_centre(xp, rng):
    image, mask = pair(rng, 1, 6, 10)
    new_image, new_mask = transformed(xp, image, mask, affine((6, 10), rotation=90), 'constant')
    for old, new in ((image, new_image), (mask, new_mask)):                  # the middle 6×6 turn; beside it is outside
        expected = numpy.zeros_like(old)
        expected[:, :, 2:8] = numpy.rot90(old[:, :, 2:8], 1, (1, 2))
        assert numpy.array_equal(new[:, :, 2:8], expected[:, :, 2:8])
        assert numpy.array_equal(new[:, :, :2], numpy.zeros_like(old[:, :, :2]))


@pytest.mark.parametrize('shift', [(0, 0), (3, 0), (0, -4), (-2, 5), (11, 15), (40, -40)])
def test_whole_pixel_shifts_are_exact(xp, rng, shift):
    image, mask = pair(rng)
    for fill_mode, mode in (('nearest', 'edge'), ('reflect', 'symmetric'), ('constant', 'constant')):
        new_image, new_mask = transformed(xp, image, mask, affine((12, 16), shift=shift), fill_mode)
        for old, new in ((image, new_image), (mask, new_mask)):
            around = numpy.pad(old, ((0, 0), (50, 50), (50, 50), (0, 0)), mode=mode)
            assert numpy.array_equal(new, around[:, 50 - shift[0]:62 - shift[0], 50 - shift[1]:66 - shift[1]])


def test_changes_are_seen_in_the_order_flip_zoom_shear_rotation_shift():
    size, homogeneous = (11, 20), numpy.array([2.0, 3.0, 1.0])
    steps = [{'flip': (True, False)}, {'zoom': 1.3}, {'shear': 12}, {'rotation': 25}, {'shift': (2, -3)}]
    together = affine(size, **{name: value for step in steps for name, value in step.items()})
    one_by_one = homogeneous
    for step in steps:
        one_by_one = numpy.linalg.inv(affine(size, **step)) @ one_by_one     # forward: from source to output
    numpy.testing.assert_allclose(numpy.linalg.inv(together) @ homogeneous, one_by_one, atol=1e-12)


# --- Where a mask goes ------------------------------------------------------------------------------------------------

def moved_point(y, x, size, rotation=0.0, shift=(0.0, 0.0), shear=0.0, zoom=1.0):
    """Where the point (y, x) is seen afterwards, step by step in the words of `affine`."""
    centre_y, centre_x = (size[0] - 1) / 2, (size[1] - 1) / 2
    up, right = centre_y - y, x - centre_x                                   # as in mathematics: y upwards
    up, right = up * zoom, right * zoom
    right += math.tan(math.radians(shear)) * -up                             # deeper is further right
    turned = complex(right, up) * complex(math.cos(math.radians(rotation)), math.sin(math.radians(rotation)))
    return centre_y - turned.imag + shift[0], centre_x + turned.real + shift[1]


@pytest.mark.parametrize('change', [
    {'rotation': 30}, {'rotation': -75}, {'shear': 20}, {'shear': -35}, {'zoom': 1.4}, {'zoom': 0.6},
    {'shift': (9, -13)},
    {'rotation': 20, 'shear': -10, 'zoom': 1.2, 'shift': (-6.5, 8.25)}], ids=str)
def test_area_and_centroid_of_a_mask_move_as_computed(xp, change):
    size = (96, 128)
    mask = blob(*size, 40, 75, 12, 20)
    new_image, new_mask = transformed(xp, mask, mask, affine(size, **change))
    (area, y, x), (new_area, new_y, new_x) = area_and_centroid(mask), area_and_centroid(new_mask)
    assert new_area == pytest.approx(area * change.get('zoom', 1.0)**2, rel=0.02)
    assert (new_y, new_x) == pytest.approx(moved_point(y, x, size, **change), abs=0.15)
    assert new_image.sum() == pytest.approx(new_area, rel=0.02)


@pytest.mark.parametrize('dtype', ['float32', 'float64'])
@pytest.mark.parametrize('fill_mode', FILL_MODES)
def test_an_image_equal_to_its_mask_stays_aligned_with_it(xp, dtype, fill_mode):
    """Where four neighbours agree both give their value; elsewhere the thresholded mean may differ from the nearest."""
    geometric = dataclasses.replace(ULTRASOUND, gamma_range=0, gain_range=0, speckle_range=0, vertical_flip=True,
                                    rotation_range=40, fill_mode=fill_mode)
    mask = blob(96, 128, 40, 75, 12, 20).astype(dtype).repeat(6, axis=0)
    image, new_mask = run(geometric, mask, mask, range(6), xp)
    differ = (image >= 0.5) != (new_mask == 1)
    assert differ.mean() < 0.004 and not numpy.array_equal(new_mask, mask)
    certain = (image == 0) | (image == 1)
    assert certain.mean() > 0.95 and numpy.array_equal(image[certain], new_mask[certain])


def test_masks_stay_binary_and_images_stay_in_range(xp, rng):
    image, mask = pair(rng, 6, 17, 23, 2)
    strong = Augmentation(**{**ONE_EACH, 'gain_range': (1.5, 3.0), 'fill_mode': 'constant', 'cval': 0.5})
    new_image, new_mask = run(strong, image, mask, range(6), xp)
    assert numpy.isin(new_mask, (0, 1)).all() and 0 < new_mask.mean() < 1
    assert new_image.min() >= 0 and new_image.max() == 1
    assert new_image.shape == image.shape and new_mask.shape == mask.shape


# --- The look-up against a plain one ----------------------------------------------------------------------------------

def plain_pixel(image, r, c, fill_mode, outside):
    """Pixel (r, c), whole numbers, of an image (H, W) that goes on beyond its edges."""
    H, W = image.shape
    if fill_mode == 'constant' and not (0 <= r < H and 0 <= c < W):
        return outside
    if fill_mode == 'reflect':
        r, c = ((list(range(n)) + list(range(n))[::-1])[i % (2 * n)] for i, n in ((r, H), (c, W)))
    return image[min(max(r, 0), H - 1), min(max(c, 0), W - 1)]


@pytest.mark.parametrize('size', [(9, 13), (1, 6), (4, 1)])
@pytest.mark.parametrize('fill_mode', FILL_MODES)
def test_resampling_equals_a_plain_look_up_of_every_pixel(xp, rng, fill_mode, size):
    H, W = size
    image, mask = pair(rng, 2, H, W, 2, 'float64')
    y, x = rng.uniform(-1.5 * H, 2.5 * H, (2, H, W)), rng.uniform(-1.5 * W, 2.5 * W, (2, H, W))
    for n, (tie_y, tie_x) in enumerate([(-0.5, W - 0.5), (0.5, 0.5), (H - 1, W - 1)]):       # ties and a corner
        y[0].flat[n], x[0].flat[n] = tie_y, tie_x
    result = resample(*to_device(xp, image, mask), to_device(xp, y, x), fill_mode, 0.3)
    new_image, new_mask = map(backend.to_cpu, result)
    for n, i, j, c in numpy.ndindex(2, H, W, 2):
        r, s = math.floor(y[n, i, j]), math.floor(x[n, i, j])
        down, right = y[n, i, j] - r, x[n, i, j] - s
        expected = sum(weight * plain_pixel(image[n, ..., c], r + a, s + b, fill_mode, 0.3)
                       for a, b, weight in ((0, 0, (1 - down) * (1 - right)), (0, 1, (1 - down) * right),
                                            (1, 0, down * (1 - right)), (1, 1, down * right)))
        assert new_image[n, i, j, c] == pytest.approx(expected, abs=1e-12)
        nearest = plain_pixel(mask[n, ..., c], math.floor(y[n, i, j] + 0.5), math.floor(x[n, i, j] + 0.5), fill_mode, 0)
        assert new_mask[n, i, j, c] == nearest


def test_one_resampling_of_float32_agrees_with_float64(xp, rng):
    image, mask = pair(rng, 4, 24, 30)
    smooth = Augmentation(**{**ONE_EACH, 'speckle_range': 0})                # noise of another dtype is other noise
    results = [run(smooth, image.astype(dtype), mask.astype(dtype), range(4), xp) for dtype in ('float32', 'float64')]
    assert [[array.dtype for array in result] for result in results] == [['float32'] * 2, ['float64'] * 2]
    numpy.testing.assert_allclose(results[0][0], results[1][0], atol=2e-5)
    assert (results[0][1] != results[1][1]).mean() < 0.002                   # a tie may fall to either side


# --- Elastic deformation ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('length, spacing', [(96, 24.0), (128, 24.0), (7, 3.5), (1, 1.0), (5, 0.25)])
def test_spline_weights_are_positive_and_sum_to_one(length, spacing):
    basis = spline_basis(length, spacing)
    assert (basis >= -1e-15).all() and ((basis > 1e-15).sum(1) <= 4).all()
    numpy.testing.assert_allclose(basis.sum(1), 1, atol=1e-12)
    # The weighted mean of the control points' places is the pixel's own place: straight lines stay straight.
    places = (numpy.arange(basis.shape[1]) - 1) * spacing
    numpy.testing.assert_allclose(basis @ places, numpy.arange(length), atol=1e-12)


def test_elastic_deformation_stays_within_its_range_and_is_smooth(xp, rng):
    augmentation, size = Augmentation(elastic_range=0.1), (48, 80)
    controls = numpy.stack([augmentation.controls(augmentation.draw(rng, size), size) for _ in range(20)])
    field = backend.to_cpu(smooth_field(*to_device(xp, controls), size, 12.0))
    assert field.shape == (20, 2, 48, 80) and controls.max() <= 4.8
    assert 1 < abs(field).max() <= 4.8
    assert abs(numpy.diff(field, 3, axis=2)).max() < 6 * 4.8 * 8 / 12**3     # of a cubic spline they are small


def test_elastic_deformation_in_its_range_never_folds(rng):
    """Control points at the limit, in random patterns of ±, leave every area positive; twice that does not."""
    spacing, size, folds = 24.0, (96, 96), 0
    for _ in range(200):
        controls = 0.48 * spacing * rng.choice([-1.0, 1.0], (1, 2, 7, 7))
        down, right = smooth_field(controls, size, spacing)[0]
        y, x = down + numpy.arange(96.0)[:, None], right + numpy.arange(96.0)
        (yy, yx), (xy, xx) = numpy.gradient(y), numpy.gradient(x)
        assert (yy * xx - yx * xy).min() > 0
        folded = (2 * yy - 1) * (2 * xx - 1) - 4 * yx * xy                   # the same of twice the displacement
        folds += folded.min() < 0
    assert folds


def test_a_deformation_is_carried_by_image_and_mask_alike(xp):
    """A displacement, the same everywhere, is the shift the other way: the output pixel looks there for its source."""
    mask = blob(20, 30, 8, 14, 4, 7)
    field = numpy.broadcast_to(numpy.array([2.0, -3.0])[None, :, None, None], (1, 2, 20, 30)).copy()
    for turned in (affine((20, 30)), affine((20, 30), rotation=180)):
        new_image, new_mask = transformed(xp, mask, mask, turned, 'constant', displacement=field)
        once, _ = transformed(xp, mask, mask, turned, 'constant')
        expected = numpy.roll(once, (-2, 3), (1, 2))                         # background all around: nothing comes in
        assert numpy.array_equal(new_image, expected) and numpy.array_equal(new_mask, expected)


# --- The draws --------------------------------------------------------------------------------------------------------

def test_with_everything_off_the_arguments_themselves_come_back(xp, rng):
    images, masks = to_device(xp, *pair(rng))
    rngs = [numpy.random.default_rng(n) for n in range(2)]
    for nothing in (Augmentation(), Augmentation(fill_mode='reflect', cval=1)):
        new_images, new_masks = nothing(images, masks, rngs)
        assert new_images is images and new_masks is masks


@pytest.mark.parametrize('name', ONE_EACH)
def test_arguments_are_not_written_into_and_each_setting_does_something(xp, rng, name):
    image, mask = pair(rng, 6)
    images, masks = to_device(xp, image, mask)
    rngs = [numpy.random.default_rng(n) for n in range(6)]
    new_images, new_masks = Augmentation(**{name: ONE_EACH[name]})(images, masks, rngs)
    assert numpy.array_equal(backend.to_cpu(images), image) and numpy.array_equal(backend.to_cpu(masks), mask)
    assert not numpy.array_equal(backend.to_cpu(new_images), image)
    grey_only = name in ('gamma_range', 'gain_range', 'speckle_range')
    assert numpy.array_equal(backend.to_cpu(new_masks), mask) == grey_only


@pytest.mark.parametrize('fill_mode', FILL_MODES)
def test_the_result_of_a_sample_does_not_depend_on_its_batch(xp, rng, fill_mode):
    augmentation = dataclasses.replace(EVERYTHING, fill_mode=fill_mode)
    image, mask = pair(rng, 5, 18, 26, 2)
    together = run(augmentation, image, mask, range(5), xp)
    for n in range(5):
        alone = run(augmentation, image[n:n + 1], mask[n:n + 1], [n], xp)
        for all_, one in zip(together, alone):
            assert numpy.array_equal(all_[n:n + 1], one)
    swapped = run(augmentation, image[::-1], mask[::-1], range(5)[::-1], xp)
    assert all(numpy.array_equal(a, b[::-1]) for a, b in zip(together, swapped))
    other = run(augmentation, image, mask, range(1, 6), xp)
    assert not numpy.array_equal(together[0], other[0])


def test_device_gives_what_the_host_gives(xp, rng):
    image, mask = pair(rng, 3, 18, 26)
    smooth = dataclasses.replace(EVERYTHING, speckle_range=0)                # a device draws noise of its own
    for host, device in zip(run(smooth, image, mask, range(3)), run(smooth, image, mask, range(3), xp)):
        numpy.testing.assert_allclose(host, device, atol=1e-5)


@pytest.mark.parametrize('name', ONE_EACH)
def test_a_setting_changes_no_draw_of_the_others(name):
    others = {key: value for key, value in ONE_EACH.items() if key != name}
    parts = {'rotation_range': ['rotation'], 'shear_range': ['shear'], 'zoom_range': ['zoom'], 'gamma_range': ['gamma'],
             'gain_range': ['gain'], 'speckle_range': ['speckle'], 'elastic_range': [],
             'horizontal_flip': ['flip'], 'vertical_flip': ['flip'], 'width_shift_range': ['shift'],
             'height_shift_range': ['shift']}
    for seed in range(20):
        with_, without = (vars(Augmentation(**settings).draw(numpy.random.default_rng(seed), (12, 16)))
                          for settings in (ONE_EACH, others))
        assert {key for key in with_ if with_[key] != without[key]} <= set(parts[name])
        for part, axis, of in (('flip', 0, 'vertical_flip'), ('flip', 1, 'horizontal_flip'),
                               ('shift', 0, 'height_shift_range'), ('shift', 1, 'width_shift_range')):
            assert of == name or with_[part][axis] == without[part][axis]


def test_the_noise_is_the_same_whatever_else_is_on(rng):
    image, mask = pair(rng, 3, dtype='float64')
    speckled, _ = run(Augmentation(speckle_range=0.01), image, mask, range(3))
    halved = Augmentation(speckle_range=0.01, gain_range=(0.5, 0.5), zoom_range=(1, 1))
    both, _ = run(halved, image, mask, range(3))
    inside = (0 < speckled) & (speckled < 1)
    numpy.testing.assert_allclose(both[inside], speckled[inside] / 2, rtol=1e-12)


def test_draws_fill_their_ranges_evenly():
    augmentation, H, W = Augmentation(**ONE_EACH), 50, 80
    draws = [augmentation.draw(numpy.random.default_rng([3, n]), (H, W)) for n in range(2000)]
    for values, low, high in (
            ([d.rotation for d in draws], -20, 20), ([d.shear for d in draws], -15, 15),
            ([d.shift[0] for d in draws], -0.3 * H, 0.3 * H), ([d.shift[1] for d in draws], -0.2 * W, 0.2 * W),
            ([d.zoom for d in draws], 0.7, 1.3), ([d.gamma for d in draws], 0.5, 2),
            ([d.gain for d in draws], 0.6, 1.4), ([d.speckle for d in draws], 0, 0.3)):
        share = (numpy.array(values) - low) / (high - low)
        assert 0 <= share.min() < 0.01 and 0.99 < share.max() <= 1
        assert share.mean() == pytest.approx(0.5, abs=0.03) and share.std() == pytest.approx(12**-0.5, abs=0.015)
    flips = numpy.array([d.flip for d in draws])
    assert flips.mean(0) == pytest.approx(0.5, abs=0.05)
    rows = [[d.rotation, *d.shift, d.shear, d.zoom, *d.flip, d.gamma, d.gain, d.speckle] for d in draws]
    assert abs(numpy.corrcoef(numpy.array(rows, float).T) - numpy.eye(10)).max() < 0.1       # no draw is used twice


def test_settings_survive_a_file():
    for augmentation in (ULTRASOUND, Augmentation(**ONE_EACH)):
        assert Augmentation(**json.loads(json.dumps(dataclasses.asdict(augmentation)))) == augmentation


# --- Grey levels ------------------------------------------------------------------------------------------------------

def test_gamma_then_gain_act_on_every_pixel_and_are_clipped(xp, rng):
    image, mask = pair(rng, 2)
    new_image, new_mask = run(Augmentation(gamma_range=(2, 2), gain_range=(1.5, 1.5)), image, mask, range(2), xp)
    numpy.testing.assert_allclose(new_image, numpy.minimum(image.astype('float64')**2 * 1.5, 1), rtol=1e-5)
    assert numpy.array_equal(new_mask, mask)


def test_speckle_is_proportional_to_the_intensity_and_independent_from_pixel_to_pixel(xp):
    image = numpy.full((1, 100, 120, 1), 0.5, 'float32')
    image[:, :, 40:80], image[:, :, 80:] = 0.25, 0
    augmentation = Augmentation(speckle_range=0.2)
    new_image, _ = run(augmentation, image, numpy.zeros_like(image), [5], xp)
    strength = augmentation.draw(numpy.random.default_rng([7, 5]), (100, 120)).speckle
    noise = new_image[0, :, :80, 0].astype('float64') / image[0, :, :80, 0] - 1
    assert noise.mean() == pytest.approx(0, abs=0.05 * strength)
    assert noise[:, :40].std() == pytest.approx(strength, rel=0.05)
    assert noise[:, 40:].std() == pytest.approx(strength, rel=0.05)
    assert abs(numpy.corrcoef(noise[:, :-1].ravel(), noise[:, 1:].ravel())[0, 1]) < 0.05
    assert not new_image[:, :, 80:].any()                                    # no echo, no grain


# --- Bad settings -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('settings, parts', [
    ({'rotation_range': -1}, ['rotation_range is -1', 'degrees from 0 to 180']),
    ({'rotation_range': 'ten'}, ["rotation_range is 'ten'", 'degrees']),
    ({'rotation_range': math.nan}, ['rotation_range is nan']),
    ({'shear_range': 90}, ['shear_range is 90', 'degrees from 0 to 80']),
    ({'width_shift_range': 12}, ['width_shift_range is 12', 'share of the width']),
    ({'height_shift_range': 1}, ['height_shift_range is 1', 'share of the height']),
    ({'zoom_range': 1.5}, ['zoom_range is 1.5', 'from 1 − r to 1 + r']),
    ({'zoom_range': (1.2, 0.8)}, ['zoom_range is (1.2, 0.8)', 'low ≤ high']),
    ({'gamma_range': (0, 1)}, ['gamma_range is (0, 1)']),
    ({'gain_range': (1, 2, 3)}, ['gain_range is (1, 2, 3)', 'pair']),
    ({'horizontal_flip': 'yes'}, ["horizontal_flip is 'yes'", 'True or False']),
    ({'elastic_range': 0.2}, ['elastic_range is 0.2', 'from 0 to 0.12', 'elastic_grid 4']),
    ({'elastic_grid': 0}, ['elastic_grid is 0', 'from 1 up']),
    ({'speckle_range': 2}, ['speckle_range is 2', 'from 0 to 1']),
    ({'cval': 255}, ['cval is 255', 'intensity from 0 to 1']),
    ({'fill_mode': 'wrap'}, ["fill_mode is 'wrap'", 'nearest', 'reflect', 'constant']),
], ids=str)
def test_a_bad_setting_is_refused_by_name_with_what_is_expected(settings, parts):
    with pytest.raises(ValueError) as error:
        Augmentation(**settings)
    assert '\n' not in str(error.value) and all(part in str(error.value) for part in parts)


def test_arrays_that_do_not_belong_together_are_refused(rng):
    image, mask = pair(rng)
    rngs = [numpy.random.default_rng(n) for n in range(2)]
    for images, masks, generators in ((image, mask[:, :-1], rngs), (image, mask, rngs[:1]), (image[0], mask[0], rngs)):
        with pytest.raises(ValueError, match='generators differ'):
            ULTRASOUND(images, masks, generators)
    with pytest.raises(ValueError, match="fill_mode is 'wrap'"):
        resample(image, mask, (image[..., 0], image[..., 0]), 'wrap')


def test_values_out_of_range_are_refused_and_not_clipped_away(xp, rng):
    image, mask = pair(rng)
    rngs = [numpy.random.default_rng(n) for n in range(2)]
    for images, masks, what in ((image * 255, mask, r'images hold values from .*expected intensities in \[0, 1\]'),
                                (image - 0.5, mask, 'images hold values from -'),
                                (image * numpy.nan, mask, 'images hold values from nan'),
                                (image, mask * 255, 'masks hold values from 0 to 255; expected 0 and 1 only')):
        for augmentation in ULTRASOUND, Augmentation():
            if xp is numpy:
                with pytest.raises(ValueError, match=what):
                    augmentation(images, masks, rngs)
        if xp is not numpy:
            changed = run(ULTRASOUND, images, masks, range(2), xp)
            assert numpy.isnan(changed[0] if masks is mask else changed[1]).any()
    for dtype in ('uint8', 'uint16', 'int64'):
        with pytest.raises(ValueError, match=f'images are of dtype {dtype}; expected floats'):
            run(ULTRASOUND, (image * 255).astype(dtype), mask, range(2), xp)
    with pytest.raises(ValueError, match='images are of dtype uint8; expected floats'):
        resample(image.astype('uint8'), mask, (image[..., 0], image[..., 0]))


def test_masks_of_any_dtype_are_taken(rng):
    image, mask = pair(rng)
    expected = run(ULTRASOUND, image, mask, range(2))[1]
    for dtype in ('bool', 'uint8', 'float64'):
        found = run(ULTRASOUND, image, mask.astype(dtype), range(2))[1]
        assert found.dtype == dtype and numpy.array_equal(found, expected)


def test_a_batch_of_nothing_comes_back_as_nothing(xp, rng):
    image, mask = pair(rng)
    for array, expected in zip(run(ULTRASOUND, image[:0], mask[:0], [], xp), (image[:0], mask[:0])):
        assert array.shape == expected.shape and array.dtype == expected.dtype
    assert median_filter(image[:0], 3).shape == median_filter(image[:0], 13).shape == image[:0].shape


def test_what_is_outside_the_image_is_background_in_the_mask_whatever_cval_is(xp, rng):
    image, mask = pair(rng, 1)
    shifted = Augmentation(width_shift_range=0.9, fill_mode='constant', cval=1.0)
    new_image, new_mask = run(shifted, image, mask * 0, [3], xp)
    assert (new_image == 1).mean() > 0.1 and not new_mask.any()


def test_elastic_deformation_and_speckle_have_generators_of_their_own():
    for n in range(20):
        draw = Augmentation().draw(numpy.random.default_rng(n), (12, 16))
        assert draw.elastic_seed != draw.speckle_seed


# --- Median filter ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('size', [3, 5, 7])
@pytest.mark.parametrize('fill_mode', ['nearest', 'reflect'])
def test_median_filter_equals_the_median_of_every_window(xp, rng, size, fill_mode):
    images = rng.random((2, 9, 6, 3)).astype('float32')
    reach, mode = size // 2, {'nearest': 'edge', 'reflect': 'symmetric'}[fill_mode]
    for x in (images, rng.integers(0, 5, images.shape).astype('uint16')):    # whole numbers: many equal values
        around = numpy.pad(x, ((0, 0), (reach, reach), (reach, reach), (0, 0)), mode)
        filtered = backend.to_cpu(median_filter(*to_device(xp, x), size, fill_mode))
        assert filtered.dtype == x.dtype and filtered.shape == x.shape
        for n, i, j, c in numpy.ndindex(x.shape):
            assert filtered[n, i, j, c] == numpy.median(around[n, i:i + size, j:j + size, c])
    plane = backend.to_cpu(median_filter(*to_device(xp, images[0, ..., 1]), size, fill_mode))
    assert numpy.array_equal(plane, backend.to_cpu(median_filter(*to_device(xp, images), size, fill_mode))[0, ..., 1])


@pytest.mark.parametrize('size', [9, 11, 13, 25, 99])
@pytest.mark.parametrize('dtype', ['float32', 'float64', 'uint8', 'uint16', 'int16', 'bool'])
def test_a_large_median_filter_is_exact(xp, rng, size, dtype):
    """By NumPy's median, on levels all different, on few, and on bands that one window holds whole."""
    H, W, reach = 7, 10, size // 2
    few = (rng.random((H, W)) * 4).astype(dtype)
    many = rng.permutation(H * W).reshape(H, W).astype(dtype)
    bands = numpy.repeat(numpy.arange(H), W).reshape(H, W).astype(dtype)
    images = numpy.stack([few, many, bands, few[::-1]])[..., None].reshape(2, 2, H, W).transpose(0, 2, 3, 1)         # (2, H, W, 2)
    filtered = backend.to_cpu(median_filter(*to_device(xp, images), size))
    around = numpy.pad(images, ((0, 0), (reach, reach), (reach, reach), (0, 0)), 'edge')
    windows = numpy.lib.stride_tricks.sliding_window_view(around, (size, size), axis=(1, 2))
    expected = numpy.sort(windows.reshape(2, H, W, 2, size**2), axis=-1)[..., size**2 // 2]
    assert filtered.dtype == dtype and numpy.array_equal(filtered, expected)


def test_a_large_median_filter_of_a_large_image_is_exact(rng):
    image = numpy.cumsum(rng.normal(size=(70, 83)), axis=0).astype('float32')
    windows = numpy.lib.stride_tricks.sliding_window_view(numpy.pad(image, 10, 'symmetric'), (21, 21))
    assert numpy.array_equal(median_filter(image, 21, 'reflect'), numpy.median(windows, axis=(2, 3)))


def test_median_filter_removes_grains_and_leaves_edges():
    image = numpy.zeros((20, 30), 'float32')
    image[:, 15:] = 0.75
    grainy = image.copy()
    grainy[4, 4], grainy[10, 22] = 1, 0
    before = grainy.copy()
    assert numpy.array_equal(median_filter(grainy, 3), image) and numpy.array_equal(grainy, before)


@pytest.mark.parametrize('arguments', [(4,), (1,), (-3,), (3.0,), (3, 'constant')])
def test_median_filter_refuses_even_sizes_and_unknown_edges(arguments):
    with pytest.raises(ValueError, match='expected an odd size from 3 up'):
        median_filter(numpy.zeros((8, 8), 'float32'), *arguments)
    with pytest.raises(ValueError, match=r'shape \(8, 8, 3\)'):
        median_filter(numpy.zeros((8, 8, 3), 'float32'))
