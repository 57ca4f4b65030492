import itertools
import math

import numpy
import pytest

from nervenet.study.segment import Settings
from nervenet.study.uncertainty import (Assessment, Calibration, band, decompose, entropy, near_truth, risk_coverage,
                                        roc_area, spearman, sureness, temperature, with_temperature)

LN2 = math.log(2)


def samples(*probabilities):
    """Return samples (T, 2, 3) that give every pixel the same T probabilities."""
    return numpy.stack([numpy.full((2, 3), p) for p in probabilities])


def calibration(p, y, **options):
    counted = Calibration(**options)
    counted.update(p, y)
    return counted.compute()


def drawn(rng, p):
    """Return a truth that is foreground with probability p."""
    return rng.random(p.shape) < p


# --- Maps, and one number for an image --------------------------------------------------------------------------------

def test_entropy_by_hand():
    expected = [LN2, 0.25 * math.log(4) + 0.75 * math.log(4 / 3), 0.25 * math.log(4) + 0.75 * math.log(4 / 3)]
    numpy.testing.assert_allclose(entropy(numpy.array([0.5, 0.25, 0.75])), expected)
    sure = entropy(numpy.array([0, 1], 'float32'))
    assert sure.dtype == 'float64' and (0 < sure).all() and (sure < 2e-6).all(), 'clipped, in float64, and so finite'
    assert entropy(numpy.zeros((0, 2))).shape == (0, 2)


@pytest.mark.parametrize('given, mean, total, information', [
    ((0.5, 0.5, 0.5), 0.5, LN2, 0),                             # all say that they do not know
    ((0.2,), 0.2, entropy(0.2), 0), ((0.2, 0.2), 0.2, entropy(0.2), 0),
    ((0, 1, 1, 0), 0.5, LN2, LN2),                              # each is sure, and half are wrong
    ((0.2, 0.6), 0.4, entropy(0.4), entropy(0.4) - (entropy(0.2) + entropy(0.6)) / 2)])
def test_entropy_is_what_all_do_not_know_and_what_they_disagree_about(given, mean, total, information):
    maps = decompose(samples(*given))
    for found, expected in zip(maps, (mean, total, total - information, information)):
        numpy.testing.assert_allclose(found, numpy.full((2, 3), expected), atol=2e-6)


def test_information_lies_between_nothing_and_the_entropy_of_a_coin(rng):
    p = rng.beta(0.2, 0.2, (7, 50, 40))
    p[:, 0, 0], p[:, 0, 1] = [0, 0, 0, 0, 0, 0, 7e-7], 0.3      # a clip of the mean alone would make the first negative
    p[:, 1] = p[0, 1]                                           # all say the same, and rounding could make it less than nothing
    mean, total, aleatoric, information = decompose(p)
    numpy.testing.assert_allclose(mean, p.mean(axis=0), atol=1e-7)
    numpy.testing.assert_allclose(total, aleatoric + information, atol=1e-12)
    assert (0 <= information).all() and (information <= total).all() and (total <= LN2 + 1e-15).all()
    assert information[0, 0] > 1e-8


def test_sureness_is_the_mean_dice_of_all_pairs(rng):
    p = rng.random((4, 9, 8))
    masks = p > 0.5
    dice = [2 * (a & b).sum() / (a.sum() + b.sum()) for a, b in itertools.combinations(masks, 2)]
    assert sureness(p) == pytest.approx(numpy.mean(dice)) and len(set(dice)) > 1
    assert sureness(p, Settings(threshold=0.9).mask) == pytest.approx(
        numpy.mean([2 * (a & b).sum() / (a.sum() + b.sum()) for a, b in itertools.combinations(p > 0.9, 2)]))


def test_sureness_of_empty_masks():
    assert sureness(samples(0.1, 0.2, 0.3)) == 1, 'all agree that there is nothing'
    assert sureness(samples(0.6, 0.9)) == 1 and sureness(samples(0.1, 0.9)) == 0
    assert sureness(samples(0.1, 0.1, 0.9)) == pytest.approx(1 / 3)
    assert sureness(samples(0.6, 0.9), lambda p: p > 0.95) == 1


def test_the_band_holds_the_pixels_whose_square_meets_foreground(rng):
    for margin, size in itertools.product((0, 1, 3, 50), ((12, 17), (1, 20), (9, 1))):
        prediction, truth = rng.random(size) > 0.95, (rng.random(size) > 0.97) * 255
        prediction[0, 0] = truth[-1, -1] = 1
        there = numpy.argwhere(prediction | (truth > 0))
        expected = [[abs(there - pixel).max(axis=1).min() <= margin for pixel in ((r, c) for c in range(size[1]))]
                    for r in range(size[0])]
        numpy.testing.assert_array_equal(band(prediction, truth, margin), expected)


def test_the_band_of_one_pixel_and_of_nothing():
    nothing, pixel = numpy.zeros((40, 50)), numpy.zeros((40, 50))
    pixel[20, 4] = 1
    for near in band(nothing, pixel), band(pixel, nothing):
        rows, columns = numpy.nonzero(near)
        assert (rows.min(), rows.max(), columns.min(), columns.max(), near.sum()) == (10, 30, 0, 14, 21 * 15), '10 pixels, cut at the edge'
    assert band(nothing, nothing).all() and band(nothing, nothing).dtype == bool


# --- Calibration ------------------------------------------------------------------------------------------------------

def test_calibration_is_what_its_definition_says(rng):
    p = numpy.concatenate([rng.random(300), numpy.arange(16) / 15, [0, 1, 1]])
    y = drawn(rng, p**2)
    found, ece = calibration(p, y), 0
    for b in range(15):
        inside = [i for i in range(len(p)) if min(int(p[i] * 15), 14) == b]
        assert found['count'][b] == len(inside)
        assert found['mean'][b] == pytest.approx(p[inside].mean()) and found['share'][b] == pytest.approx(y[inside].mean())
        ece += len(inside) / len(p) * abs(p[inside].mean() - y[inside].mean())
    clipped = p.clip(1e-7, 1 - 1e-7)
    assert found['ece'] == pytest.approx(ece) and found['brier'] == pytest.approx(((p - y)**2).mean())
    assert found['nll'] == pytest.approx(-numpy.where(y, numpy.log(clipped), numpy.log(1 - clipped)).mean())


def test_calibration_accumulates_over_arrays_of_any_shape_and_dtype(rng):
    p = rng.random((4, 6, 5)).astype('float32')
    y, counted = drawn(rng, p), Calibration()
    for image, mask in zip(p, (y[0], y[1].astype('uint8') * 255, y[2].astype('float32'), y[3])):
        counted.update(image, mask)
    counted.update(p[:0], y[:0])
    found, expected = counted.compute(), calibration(p.ravel(), y.ravel())
    for name in expected:
        numpy.testing.assert_allclose(found[name], expected[name], err_msg=name)
    assert counted.counts.shape == (3, 15), 'nothing is kept of a pixel'


def test_sums_over_very_many_pixels_stay_exact():
    counted, p = Calibration(), numpy.full(1000, 0.1, 'float32')
    counted.squares = counted.logs = 1e9                        # where float32 is 64 from one number to the next
    counted.update(p, p > 1)
    assert counted.squares - 1e9 == pytest.approx(10, abs=1e-4) and counted.logs - 1e9 == pytest.approx(-1000 * math.log(0.9), abs=1e-4)


@pytest.mark.parametrize('n', [1000, 100_000])
def test_the_error_of_labels_drawn_as_stated_vanishes_with_their_number(rng, n):
    p = rng.random(n)
    found = calibration(p, drawn(rng, p))
    assert found['ece'] < 3 / math.sqrt(n)                      # 15 bins of n/15: expected about 1.2 / √n
    assert found['brier'] == pytest.approx(1 / 6, abs=1 / math.sqrt(n)) and found['nll'] == pytest.approx(0.5, abs=2 / math.sqrt(n))


def test_a_constant_probability():
    y = numpy.arange(1000) % 2 == 0
    found = calibration(numpy.full(1000, 0.9), y)
    assert found['ece'] == pytest.approx(0.4) and found['brier'] == pytest.approx((0.01 + 0.81) / 2)
    assert found['nll'] == pytest.approx(-(math.log(0.9) + math.log(0.1)) / 2)
    assert found['count'].tolist() == [0] * 13 + [1000, 0]
    assert numpy.isnan(found['mean']).sum() == numpy.isnan(found['share']).sum() == 14
    base = calibration(numpy.full(1000, 0.3), numpy.arange(1000) < 300)
    assert base['ece'] == pytest.approx(0, abs=1e-12) and base['brier'] == pytest.approx(0.3 * 0.7), 'the base rate everywhere'


def test_certainty():
    right = calibration(numpy.array([0.0, 1.0]), numpy.array([0, 1]))
    assert right['ece'] == right['brier'] == 0 and right['nll'] == pytest.approx(1e-7)
    assert right['count'].tolist() == [1] + [0] * 13 + [1] and right['mean'][[0, -1]].tolist() == right['share'][[0, -1]].tolist() == [0, 1]
    wrong = calibration(numpy.array([0.0, 1.0]), numpy.array([1, 0]))
    assert wrong['ece'] == wrong['brier'] == 1 and wrong['nll'] == pytest.approx(-math.log(1e-7))
    assert calibration(numpy.array([0.2, 0.8]), numpy.array([0, 1]), bins=1)['ece'] == pytest.approx(0)


@pytest.mark.parametrize('true', [0.1, 0.5, 1, 3, 12])
def test_temperature_undoes_the_one_that_was_applied(rng, true):
    z = rng.normal(0, 1.5, (100, 300))
    y = drawn(rng, 1 / (1 + numpy.exp(-z)))
    sharp = 1 / (1 + numpy.exp(-z * true))                      # too sure by the factor `true`
    inside = abs(z * true) < 16                                 # a probability beyond is clipped
    assert temperature(sharp[inside], y[inside]) == pytest.approx(true, rel=0.03)


def test_temperature_is_where_the_likelihood_is_best(rng):
    p = rng.beta(0.5, 0.5, 2000)
    y = drawn(rng, 0.3 + 0.4 * p)
    T = temperature(p, y * 255)
    nll = [calibration(with_temperature(p, t), y)['nll'] for t in (T, T / 1.01, T * 1.01, 1)]
    assert T > 1.5 and nll[0] < min(nll[1:]) and nll[3] > 1.1 * nll[0]


def test_temperature_stays_in_its_range():
    p = numpy.array([0.2, 0.7, 0.0, 1.0])
    assert temperature(p, p > 0.5) == pytest.approx(0.05, rel=1e-3), 'all are right: as sure as can be'
    assert temperature(p, p < 0.5) == pytest.approx(20, rel=1e-3)


def test_temperature_by_hand():
    numpy.testing.assert_allclose(with_temperature(numpy.array([0.8, 0.2, 0.5]), 2), [2 / 3, 1 / 3, 0.5])       # odds 4 → 2
    numpy.testing.assert_allclose(with_temperature(numpy.array([0.8, 0.2, 0.5]), 0.5), [16 / 17, 1 / 17, 0.5])  # odds 4 → 16
    numpy.testing.assert_allclose(with_temperature(numpy.linspace(0, 1, 50), 1), numpy.linspace(0, 1, 50), atol=1.1e-7)


@pytest.mark.parametrize('T', [0.05, 1, 3, 20, 1e9])
@pytest.mark.parametrize('dtype', ['float32', 'float64'])
def test_temperature_leaves_the_mask_as_it_is(rng, T, dtype):
    half = numpy.array(0.5, dtype)
    p = numpy.concatenate([[half, numpy.nextafter(half, half * 0), numpy.nextafter(half, half * 2), 0, 1],
                           rng.random(1000, dtype)]).astype(dtype)
    scaled = with_temperature(p, T)
    numpy.testing.assert_array_equal(scaled > 0.5, p > 0.5)
    assert (0 <= scaled).all() and (scaled <= 1).all()


# --- Where, and on which images, the errors are -----------------------------------------------------------------------

def by_pairs(score, positive):
    pairs = [(a, b) for a in score[positive] for b in score[~positive]]
    return sum((a > b) + 0.5 * (a == b) for a, b in pairs) / len(pairs)


@pytest.mark.parametrize('levels', [1, 2, 5, 10_000])
def test_the_area_is_that_of_all_pairs(rng, levels):
    score, positive = rng.integers(0, levels, 60) / 7, rng.random(60) < 0.3
    assert roc_area(score, positive) == pytest.approx(by_pairs(score, positive))
    assert roc_area(-score, positive) == pytest.approx(1 - by_pairs(score, positive))


def test_the_area_by_hand():
    positive = numpy.array([True, False, False])
    for score, expected in ([3, 2, 1], 1), ([1, 2, 3], 0), ([2, 1, 3], 0.5), ([2, 2, 1], 0.75), ([0, 0, 0], 0.5), ([0, -math.inf, 0], 0.75):
        assert roc_area(numpy.array(score), positive) == roc_area(score, positive.astype(int)) == expected


def test_rank_correlation(rng):
    a = rng.permutation(20).astype(float)
    assert spearman(a, a**3) == 1 and spearman(a, -numpy.exp(a)) == -1 and spearman([1, 2], [5, 4]) == -1
    b = rng.permutation(20).astype(float)                       # without ties, by the squares of the differences of ranks
    assert spearman(a, b) == pytest.approx(1 - 6 * ((a - b)**2).sum() / (20 * (20**2 - 1)))
    # with ties: ranks 1, 2½, 2½, 4 against 1, 2, 3, 4; Pearson is 4.5 / √(4.5·5)
    assert spearman([0, 5, 5, 9], [1, 2, 3, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert abs(spearman(rng.random(10_000), rng.random(10_000))) < 0.05


def test_risk_and_coverage_by_hand():
    score, dice = [0.4, 0.1, 0.3, 0.2], [0.9, 0.8, 0.1, 0.6]                # the surest first: 0.9, 0.1, 0.6, 0.8
    found = risk_coverage(score, dice, (1, 0.75, 0.5, 0.3, 0.25, 0.01))
    assert found['score']['dice'] == pytest.approx([0.6, 1.6 / 3, 0.5, 0.5, 0.9, 0.9]), 'shares are rounded up to images'
    assert found['oracle']['dice'] == pytest.approx([0.6, 2.3 / 3, 0.85, 0.85, 0.9, 0.9])
    assert found['random']['dice'] == pytest.approx([0.6] * 6)
    assert found['score']['mean'] == pytest.approx((0.9 + 0.5 + 1.6 / 3 + 0.6) / 4)
    assert found['oracle']['mean'] == pytest.approx((0.9 + 0.85 + 2.3 / 3 + 0.6) / 4) and found['random']['mean'] == pytest.approx(0.6)


def test_images_of_one_score_stay_by_chance():
    """Expected of every order in which equal scores could come, none of which is the order of the files."""
    score, dice = numpy.array([2, 1, 2, 1, 1, 3]), numpy.array([0.5, 0.9, 0.3, 0.2, 0.7, 0.6])
    curves = [numpy.cumsum(dice[list(order)]) / numpy.arange(1, 7) for order in itertools.permutations(range(6))
              if (numpy.diff(score[list(order)]) <= 0).all()]
    assert len(curves) == 2 * 6
    coverages = [k / 6 for k in range(1, 7)]
    found = risk_coverage(score, dice, coverages)
    assert found['score']['dice'] == pytest.approx(numpy.mean(curves, axis=0))
    assert found['score']['mean'] == pytest.approx(numpy.mean(curves))
    equal = risk_coverage(numpy.ones(6), dice, coverages)
    assert equal['score'] == equal['random']
    assert equal['random']['dice'] == pytest.approx([dice.mean()] * 6)


def test_risk_and_coverage_of_few_and_of_many_images(rng):
    assert risk_coverage([3], [0.7]) == {name: {'dice': [0.7] * 6, 'mean': 0.7} for name in ('score', 'oracle', 'random')}
    assert risk_coverage(numpy.arange(100), numpy.arange(100) < 93, (0.07,))['score']['dice'] == [0], 'seven images, none more by rounding'
    dice = rng.random(50)
    found = risk_coverage(dice + 0.2 * rng.random(50), dice)
    assert found['random']['mean'] < found['score']['mean'] < found['oracle']['mean']
    assert risk_coverage(dice**2, dice)['score'] == found['oracle'] and found['oracle']['dice'] == sorted(found['oracle']['dice'])


# --- Errors -----------------------------------------------------------------------------------------------------------

ONES, MAP = numpy.ones(3), numpy.ones((2, 2))


@pytest.mark.parametrize('call, message', [
    (lambda: entropy(ONES * 3), 'lie from 3.0 to 3.0; expected 0 to 1: take the sigmoid'),
    (lambda: entropy(ONES * -0.01), 'expected 0 to 1'),
    (lambda: entropy(ONES * math.nan), 'from nan to nan; expected 0 to 1'),
    (lambda: decompose(MAP), r'\(2, 2\); expected \(T, H, W\), and T at least 1'),
    (lambda: decompose(numpy.ones((0, 2, 2))), 'T at least 1'),
    (lambda: decompose(samples(0.5, -4)), 'expected 0 to 1'),
    (lambda: sureness(samples(0.5)), r'\(1, 2, 3\); expected \(T, H, W\), and T at least 2'),
    (lambda: band(MAP, MAP[:1]), r'prediction \(2, 2\) and truth \(1, 2\) differ'),
    (lambda: band(ONES, ONES), r'are not \(H, W\)'),
    (lambda: band(MAP, MAP, -1), 'margin is -1, expected a whole number of at least 0'),
    (lambda: band(MAP, MAP, 1.5), 'margin is 1.5'),
    (lambda: Calibration(0), 'bins is 0, expected a whole number of at least 1'),
    (lambda: Calibration().compute(), 'no pixel was counted'),
    (lambda: calibration(ONES[:0], ONES[:0]), 'no pixel was counted'),
    (lambda: calibration(ONES, MAP), r'probabilities \(3,\) and truth \(2, 2\) differ'),
    (lambda: calibration(MAP, MAP.ravel()), r'probabilities \(2, 2\) and truth \(4,\) differ'),
    (lambda: calibration(ONES * 2, ONES), 'expected 0 to 1'),
    (lambda: calibration(ONES, ONES / 2), 'a score needs a mask'),
    (lambda: temperature(ONES[:0], ONES[:0]), 'no pixel was given'),
    (lambda: temperature(ONES * 9, ONES), 'expected 0 to 1'),
    (lambda: temperature(ONES, ONES / 2), 'a score needs a mask'),
    (lambda: with_temperature(ONES, 0), 'temperature is 0; expected a number above 0'),
    (lambda: with_temperature(ONES, math.nan), 'temperature is nan'),
    (lambda: with_temperature(ONES, math.inf), 'temperature is inf'),
    (lambda: with_temperature(ONES * 2, 1), 'expected 0 to 1'),
    (lambda: roc_area(ONES, ONES > 0), '3 of 3 are positive; expected some of either class'),
    (lambda: roc_area(ONES, ONES < 0), '0 of 3 are positive'),
    (lambda: roc_area(MAP, MAP > 0), r'expected \(N,\) and \(N,\)'),
    (lambda: roc_area([1, math.nan], [0, 1]), 'no NaN'),
    (lambda: spearman([1, 2], ONES), r'\(2,\) and \(3,\); expected'),
    (lambda: spearman([1, 2, 3], ONES), 'all 3 numbers of one side are equal'),
    (lambda: spearman(ONES, [1, 2, 3]), 'all 3 numbers of one side are equal'),
    (lambda: spearman([1], [2]), 'all 1 numbers'),
    (lambda: spearman([], []), 'N at least 1'),
    (lambda: risk_coverage([], []), 'N at least 1'),
    (lambda: risk_coverage([1], [math.nan]), 'no NaN'),
    (lambda: risk_coverage([1], [1], (0.5, 0)), r'coverages are \(0.5, 0\); expected shares above 0, up to 1'),
    (lambda: risk_coverage([1], [1], (90,)), 'up to 1')])
def test_what_has_no_answer_is_refused(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert '\n' not in str(caught.value)


def test_an_assessment_by_hand():
    """Two subjects of two images each; of the first image two of four pixels are foreground, and one is wrong."""
    truth, mask = numpy.array([[1, 1, 0, 0]]), numpy.array([[1, 0, 0, 0]]) > 0
    p = numpy.array([[0.9, 0.4, 0.1, 0.1]])
    near = near_truth(mask, truth, 0, probability=p, mean=p / 2, total=entropy(p), information=-p)
    assert near['truth'].tolist() == [1, 1] and near['wrong'].tolist() == [False, True] and near['probability'].tolist() == [0.9, 0.4]
    near = near_truth(mask, truth, 9, probability=p, mean=p / 2, total=entropy(p), information=-p)
    assessment = Assessment()
    for subject, sure, dice in ('a', 0.9, 0.8), ('a', 0.5, 0.6), ('b', 0.4, 0.2), ('b', 0.6, 0.1):
        assessment.update(subject, sure, dice, near)
    said = assessment.lines((1, 0.5))
    assert said[1].split() == ['by', 'agreement', 'of', 'masks', '0.425', '0.450', '0.544']
    assert said[2].split()[-2:] == ['0.700', '0.615'] and said[3].split()[-2:] == ['0.425', '0.425']
    assert said[4] == 'rank correlation of agreement and Dice, 4 images: 0.40' and said[5].endswith('2 subjects: 1.00')
    assert said[6] == 'least sure of: subject b (agreement 0.50, Dice 0.15), subject a (agreement 0.70, Dice 0.70); lowest Dice: subject b (0.15)'
    assert said[7].startswith('prediction:      expected calibration error 0.225,'), '(0.1 + 0.6 + 0.1 + 0.1) / 4'
    assert said[8].startswith('mean of samples: expected calibration error 0.363,'), '(0.55 + 0.8 + 0.05 + 0.05) / 4'
    assert said[9] == 'area under the ROC for wrong pixels there: entropy 1.000, mutual information 0.333'


def test_an_assessment_keeps_few_pixels_and_tells_what_it_can():
    mask = numpy.ones((50, 101), bool)
    near = near_truth(mask, mask.astype('uint8'), 0, probability=mask * 0.9, mean=mask * 0.9, total=mask * 0.1, information=mask * 0.1)
    assessment = Assessment()
    assessment.update('a', 0.9, 1.0, near)
    assert assessment.pixels[0].shape == (3, 842) and assessment.prediction.compute()['count'].sum() == 5050
    assert not any('ROC' in line or 'rank' in line for line in assessment.lines((1, 0.5))), 'nothing is wrong, and there is one image'


def test_probabilities_beyond_one_by_the_rounding_of_float32_are_taken():
    above = numpy.nextafter(numpy.float32(1), numpy.float32(2)) * numpy.ones(2, 'float32')
    assert calibration(above, above > 0)['count'][-1] == 2 and entropy(above).max() < 2e-6
    assert calibration(1 - above, above > 2)['count'][0] == 2
