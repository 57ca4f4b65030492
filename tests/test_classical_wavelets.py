import re

import numpy
import pytest

from nervenet.classical import wavelets
from nervenet.classical.wavelets import TRANSFORMS, Coefficients, box_features, feature_names, region_features

every_transform = pytest.mark.parametrize('name', TRANSFORMS)
HAAR, MORPHOLOGICAL, MEDIAN = TRANSFORMS['haar'], TRANSFORMS['morphological-haar'], TRANSFORMS['median']
SUBBANDS = ['horizontal', 'vertical', 'diagonal']
SIZES = (1, 1), (1, 6), (2, 2), (5, 7), (16, 24), (33, 50)


def same(a, b, tolerance=0.0):
    """Are two decompositions the same?"""
    return a.size == b.size and all(x.shape == y.shape and abs(x - y).max() <= tolerance
                                    for x, y in zip([a.coarse, *a.details], [b.coarse, *b.details], strict=True))


def changed(coefficients, coarse, details):
    """Return Coefficients with the functions `coarse` and `details` applied."""
    return Coefficients(coarse(coefficients.coarse), [details(each) for each in coefficients.details], coefficients.size)


@every_transform
@pytest.mark.parametrize('size', SIZES, ids=str)
def test_an_image_of_integers_comes_back_to_the_last_bit(name, size, rng):
    for levels in 1, 2, 3, 5:
        for image in rng.integers(0, 256, size, dtype='uint8'), rng.integers(-10**6, 10**6, size):
            back = TRANSFORMS[name].reconstruct(TRANSFORMS[name].decompose(image, levels))
            assert back.dtype == numpy.float64 and numpy.array_equal(back, image), levels


@every_transform
def test_an_image_of_floats_comes_back_to_rounding_in_its_dtype(name, rng):
    for dtype, tolerance in ('float32', 1e-6), ('float64', 1e-15):
        image = rng.random((21, 30)).astype(dtype)
        coefficients = TRANSFORMS[name].decompose(image)
        back = TRANSFORMS[name].reconstruct(coefficients)
        assert {array.dtype for array in (back, coefficients.coarse, *coefficients.details)} == {numpy.dtype(dtype)}
        assert abs(back - image).max() < 4 * tolerance


@every_transform
def test_a_decomposition_leaves_the_image_as_it_is_and_says_its_sizes(name, rng):
    image = rng.random((21, 30))
    before = image.copy()
    coarse, details, size = TRANSFORMS[name].decompose(image)
    assert numpy.array_equal(image, before) and size == (21, 30) and len(details) == 3
    expected = [(21, 30)] * 3 if name == 'median' else [(11, 15), (6, 8), (3, 4)]
    assert [each.shape for each in details] == [(3, *shape) for shape in expected] and coarse.shape == expected[-1]


def test_one_square_by_hand():
    a, b, c, d = 1.0, 2.0, 4.0, 9.0
    for transform, coarse in (HAAR, 8), (MORPHOLOGICAL, 1):
        found = transform.decompose(numpy.array([[a, b], [c, d]]), 1)
        assert found.coarse.tolist() == [[coarse]] and found.details[0].ravel().tolist() == [-3, -5, 2]


def test_the_morphological_coarse_image_is_the_darkest_pixel_of_each_square(rng):
    image = rng.permutation(6 * 8).reshape(6, 8) - 20
    assert numpy.array_equal(MORPHOLOGICAL.decompose(image, 1).coarse, image.reshape(3, 2, 4, 2).min(axis=(1, 3)))


def test_medians_by_hand():
    found = MEDIAN.decompose(numpy.array([[1, 5, 2], [7, 3, 3], [0, 4, 9]]), 1)
    # medians of 3 along rows: 1 2 2 | 7 3 3 | 0 4 9; of these along columns: 1 2 2 | 1 3 3 | 0 4 9
    assert found.coarse.tolist() == [[1, 2, 2], [1, 3, 3], [0, 4, 9]]
    horizontal, vertical, diagonal = found.details[0].tolist()
    assert vertical == [[0, 0, 0], [6, 0, 0], [0, 0, 0]]
    assert horizontal == [[0, 3, 0], [0, 0, 0], [0, 0, 0]] and diagonal == [[0] * 3] * 3     # the rest: 0 3 0 | 0 0 0 | 0 0 0


@pytest.mark.parametrize('axis', (0, 1))
@pytest.mark.parametrize('window', (3, 5, 9, 17))
def test_medians_along_an_axis_are_those_of_numpy(axis, window, rng):
    image = rng.integers(0, 30, (7, 12)).astype(float)
    found = wavelets.median(image, window, axis)
    for y, x in numpy.ndindex(image.shape):
        line, at = (image[:, x], y) if axis == 0 else (image[y], x)
        assert found[y, x] == numpy.median([line[min(max(i, 0), len(line) - 1)] for i in range(at - window // 2, at + window // 2 + 1)])


def test_level_j_of_the_median_decomposition_takes_two_to_the_j_and_one_pixels(rng):
    image = rng.random((20, 30))
    for window in 3, 5, 9:
        image = wavelets.median(wavelets.median(image, window, 1), window, 0)
    assert numpy.array_equal(MEDIAN.decompose(numpy.random.default_rng(20150518).random((20, 30)), 3).coarse, image)


def test_haar_keeps_the_energy_and_the_others_do_not(rng):
    image = rng.random((16, 24)) + 1

    def energy(transform):
        coefficients = transform.decompose(image, 3)
        return sum((each**2).sum() for each in (coefficients.coarse, *coefficients.details))
    assert energy(HAAR) == pytest.approx((image**2).sum(), rel=1e-13)
    assert all(abs(energy(transform) / (image**2).sum() - 1) > 0.05 for transform in (MORPHOLOGICAL, MEDIAN))


def test_only_haar_is_linear(rng):
    a, b = rng.random((2, 13, 18))
    for name, transform in TRANSFORMS.items():
        of_a, of_b = transform.decompose(a), transform.decompose(b)
        total = Coefficients(of_a.coarse + of_b.coarse, [x + y for x, y in zip(of_a.details, of_b.details)], of_a.size)
        assert same(transform.decompose(a + b), total, 1e-13) == (name == 'haar')


@every_transform
def test_details_do_not_see_the_brightness_and_follow_the_contrast(name, rng):
    image, gain = rng.integers(0, 100, (13, 18)), 2**3 if name == 'haar' else 1
    of_image = TRANSFORMS[name].decompose(image)
    assert same(TRANSFORMS[name].decompose(image + 50), changed(of_image, lambda x: x + 50 * gain, lambda x: x))
    assert same(TRANSFORMS[name].decompose(3 * image), changed(of_image, lambda x: 3 * x, lambda x: 3 * x))
    negative = same(TRANSFORMS[name].decompose(-image), changed(of_image, lambda x: -x, lambda x: -x))
    assert negative == (name != 'morphological-haar')                   # the darkest pixel of the negative was the brightest


@pytest.mark.parametrize('name', ('haar', 'morphological-haar'))
def test_turning_the_image_about_its_diagonal_swaps_horizontal_and_vertical(name, rng):
    image = rng.integers(0, 100, (13, 18))
    turned, straight = TRANSFORMS[name].decompose(image.T), TRANSFORMS[name].decompose(image)
    assert numpy.array_equal(turned.coarse, straight.coarse.T)
    for a, b in zip(turned.details, straight.details):
        assert numpy.array_equal(a, b.transpose(0, 2, 1)[[1, 0, 2]])


def test_stripes_are_in_the_map_of_their_direction():
    rows, columns = numpy.mgrid[:12, :12] % 2
    for transform in TRANSFORMS.values():
        for pattern, there in (columns, 0), (rows, 1):
            strength = abs(transform.decompose(pattern, 1).details[0][:, 2:-2, 2:-2]).sum(axis=(1, 2))
            assert strength[there] > 0 and strength.sum() == strength[there]
    for transform in HAAR, MORPHOLOGICAL:
        strength = abs(transform.decompose(rows ^ columns, 1).details[0]).sum(axis=(1, 2))
        assert strength[2] > 0 and strength[:2].tolist() == [0, 0]


def test_a_lone_bright_pixel_falls_wholly_into_the_details_but_of_haar():
    image = numpy.full((16, 24), 40)
    image[5, 8] = 255
    for transform in MEDIAN, MORPHOLOGICAL:
        assert (transform.decompose(image).coarse == 40).all()
        assert abs(transform.decompose(image).details[0]).max() > 0
    assert (HAAR.decompose(image).coarse != 8 * 40).sum() == 1


def test_medians_pass_a_sharp_edge_as_it_is():
    image = numpy.where(numpy.arange(24) < 11, 20, 90) * numpy.ones((16, 1), int)
    coefficients = MEDIAN.decompose(image)
    assert numpy.array_equal(coefficients.coarse, image) and not any(each.any() for each in coefficients.details)
    assert any(each.any() for each in HAAR.decompose(image).details)


def test_a_map_holds_for_each_pixel_the_coefficient_of_its_square(rng):
    image = rng.random((11, 14))
    for transform, side in (HAAR, 2), (MORPHOLOGICAL, 2), (MEDIAN, 1):
        coefficients = transform.decompose(image, 3)
        maps = coefficients.maps()
        assert list(maps) == [f'{subband} {level}' for level in (1, 2, 3) for subband in SUBBANDS] + ['coarse']
        for (name, map), (y, x) in zip(maps.items(), rng.integers(0, (11, 14), (10, 2)), strict=True):
            subband, _, level = name.partition(' ')
            place = y // side**int(level or 3), x // side**int(level or 3)
            whole = coefficients.details[int(level) - 1][SUBBANDS.index(subband)] if level else coefficients.coarse
            assert map.shape == (11, 14) and map[y, x] == whole[place]


# --- Features ---------------------------------------------------------------------------------------------------------

def by_loops(coefficients, image, pixels):
    """Return the features of the region of these pixels, a list of (row, column), one by one."""
    features = []
    for name, map in {**coefficients.maps(), 'image': image}.items():
        values = numpy.array([map[pixel] for pixel in pixels], dtype=float)
        mean = abs(values).mean() if name not in ('coarse', 'image') else values.mean()
        features += [mean, ((values - values.mean())**2).mean()**0.5]
    return features + [numpy.mean([y for y, _ in pixels]) / (image.shape[0] - 1), numpy.mean([x for _, x in pixels]) / (image.shape[1] - 1)]


@every_transform
def test_features_of_regions_are_those_of_loops(name, rng):
    image, labels = rng.integers(-128, 128, (11, 14)), rng.integers(0, 5, (11, 14))
    coefficients = TRANSFORMS[name].decompose(image, 2)
    expected = [by_loops(coefficients, image, list(zip(*numpy.nonzero(labels == label)))) for label in range(5)]
    found = region_features(coefficients, image, labels)
    assert found.shape == (5, 18) and found == pytest.approx(numpy.array(expected), rel=1e-10, abs=1e-10)


@every_transform
def test_features_of_boxes_are_those_of_loops(name, rng):
    image, points = rng.integers(-128, 128, (11, 14)), rng.integers(0, (11, 14), (20, 2))
    points[:2] = (0, 0), (10, 13)
    coefficients = TRANSFORMS[name].decompose(image, 2)
    for side in 1, 5, 17:
        found = box_features(coefficients, image, points, side)
        for row, (y, x) in zip(found, points.tolist(), strict=True):
            near = [(i, j) for i in range(11) for j in range(14) if max(abs(i - y), abs(j - x)) <= side // 2]
            expected = by_loops(coefficients, image, near)
            assert row[:-2] == pytest.approx(expected[:-2], rel=1e-8, abs=1e-5)    # a deviation of 0 is the root of rounding
            assert row[-2:].tolist() == [y / 10, x / 13]


def test_a_box_is_a_region(rng):
    image, labels = rng.random((20, 31)), numpy.zeros((20, 31), int)
    labels[4:13, 10:19] = 1
    coefficients = MEDIAN.decompose(image)
    box, region = box_features(coefficients, image, [(8, 14)], 9)[0], region_features(coefficients, image, labels)[1]
    assert box == pytest.approx(region, rel=1e-9)


def test_the_features_have_names_in_their_order(rng):
    names, image = feature_names(3), numpy.zeros((16, 16))
    image[:, ::2] = 1                                                       # stripes of one pixel: they are in one map alone
    features = box_features(HAAR.decompose(image, 3), image, [(8, 12)], 3)[0]
    assert len(names) == len(features) == 24 and names[-2:] == ['row', 'column']
    found = {name: value for name, value in zip(names, features) if abs(value) > 1e-9}
    assert found == pytest.approx({'mean of horizontal 1': 1, 'mean of coarse': 4, 'mean of image': 1 / 3,
                                   'deviation of image': (2 / 9)**0.5, 'row': 8 / 15, 'column': 12 / 15})


def test_a_deviation_survives_a_bright_image(rng):
    image = rng.random((40, 50))
    points = rng.integers(0, (40, 50), (10, 2))
    dark, bright = (box_features(MEDIAN.decompose(x, 1), x, points)[:, :-2] for x in (image, image + 1e6))
    assert bright[:, 1::2] == pytest.approx(dark[:, 1::2], rel=1e-6, abs=1e-8)
    flat = numpy.full((40, 50), 1e6)
    assert (box_features(HAAR.decompose(flat), flat, points)[:, 1:-2:2] == 0).all()


# --- What may not be given --------------------------------------------------------------------------------------------

@pytest.mark.parametrize('image, said', (
    (numpy.zeros((2, 3, 1)), 'shape (2, 3, 1) and dtype float64; expected (H, W)'), (numpy.zeros((0, 3)), 'shape (0, 3)'),
    (numpy.zeros((2, 3), complex), 'dtype complex128'), (numpy.array([[0.0, numpy.nan]]), 'each a finite number')))
def test_what_is_no_image_is_refused(image, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        HAAR.decompose(image)


def test_what_is_no_number_of_levels_is_refused():
    for levels in 0, 1.5:
        with pytest.raises(ValueError, match=f'levels is {levels}, expected a whole number of at least 1'):
            MEDIAN.decompose(numpy.zeros((4, 4)), levels)


@pytest.mark.parametrize('labels, said', (
    (numpy.zeros((4, 5), int), 'and labels (4, 5) differ in height or width'), (numpy.zeros((4, 6)), 'dtype float64'),
    (numpy.full((4, 6), -1), 'expected (H, W) of whole numbers from 0')))
def test_labels_that_do_not_fit_are_refused(labels, said):
    image = numpy.zeros((4, 6))
    with pytest.raises(ValueError, match=re.escape(said)):
        region_features(HAAR.decompose(image), image, labels)


@pytest.mark.parametrize('points, side, said', (
    ([(0, 6)], 3, 'each a pixel of an image of (4, 6)'), ([(-1, 0)], 3, 'each a pixel'), ([0, 1], 3, 'points have shape (2,)'),
    ([(0.5, 1.0)], 3, 'dtype float64'), ([(0, 1)], 4, 'side is 4; expected an odd number'), ([(0, 1)], 0, 'side is 0')))
def test_boxes_that_do_not_fit_are_refused(points, side, said):
    image = numpy.zeros((4, 6))
    with pytest.raises(ValueError, match=re.escape(said)):
        box_features(HAAR.decompose(image), image, points, side)


def test_an_image_of_another_size_than_its_coefficients_is_refused():
    with pytest.raises(ValueError, match=re.escape('the image has shape (4, 5) and the coefficients are of one of (4, 6)')):
        region_features(HAAR.decompose(numpy.zeros((4, 6))), numpy.zeros((4, 5)), numpy.zeros((4, 6), int))
