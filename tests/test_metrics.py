import itertools

import numpy
import pytest

from nervenet.engine import backend
from nervenet.losses import DiceLoss
from nervenet.metrics import Baselines, SegmentationScores, ratio


def images(*rows):
    """Return images of one row: (N, 1, W, 1)."""
    return numpy.array(rows, dtype=float)[:, None, :, None]


def score(probabilities, target, **options):
    scores = SegmentationScores(**options)
    scores.update(probabilities, target)
    return scores.compute()


def mean_mask(*batches):
    baselines = Baselines()
    for batch in batches:
        baselines.update(batch)
    return baselines.mean_mask()


def test_scores_of_two_images_by_hand():
    p = images([0.9, 0.8, 0.2, 0.0], [0.6, 0.0, 0.0, 0.0])
    y = images([1.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0])
    # image 1: Σpy 1.1, Σp 1.9, Σy 2, predicted 2, both 1, right 2 of 4
    # image 2: Σpy 0, Σp 0.6, Σy 0, predicted 1, right 3 of 4
    assert score(p, y) == pytest.approx({
        'soft_dice_pooled': 2 * 1.1 / (2.5 + 2), 'soft_dice_per_image': (2 * 1.1 / 3.9 + 0) / 2,
        'dice_pooled': 2 / (3 + 2), 'dice_per_image': (2 / 4 + 0) / 2,
        'iou_pooled': 1 / 4, 'iou_per_image': (1 / 3 + 0) / 2,
        'accuracy': 5 / 8, 'accuracy_per_image': (2 / 4 + 3 / 4) / 2,
        'foreground_share': 3 / 8, 'true_foreground_share': 2 / 8})


def test_empty_against_empty_scores_one_and_empty_against_anything_scores_zero():
    empty, some = images([0, 0, 0]), images([0, 1, 0])
    names = [f'{name}_{kind}' for name in ('soft_dice', 'dice', 'iou') for kind in ('pooled', 'per_image')]
    for p, y, expected in (empty, empty, 1), (empty, some, 0), (some, empty, 0), (some, some, 1):
        scores = score(p, y)
        assert [scores[name] for name in names] == [expected] * len(names)


def test_empty_images_count_as_one_per_image_but_not_pooled():
    p, y = images([1, 1, 0], [0, 0, 0]), images([0, 1, 0], [0, 0, 0])
    scores = score(p, y)
    assert scores['dice_pooled'] == pytest.approx(2 / 3) and scores['dice_per_image'] == pytest.approx((2 / 3 + 1) / 2)


def test_ratio_divides_and_gives_one_for_nothing_of_nothing():
    assert ratio(numpy.array([0.0, 1.0, 0.0]), numpy.array([0.0, 2.0, 3.0])).tolist() == [1, 0.5, 0]


def test_counts_accumulate_over_batches_of_any_size(xp, rng):
    p, y = rng.random((7, 5, 4, 2)).astype('float32'), rng.random((7, 5, 4, 2)) < 0.2
    expected = score(p, y)
    for cuts in ((3,), (1, 2, 6)):
        scores = SegmentationScores()
        for batch in numpy.split(numpy.arange(7), cuts):
            scores.update(xp.asarray(p[batch]), xp.asarray(y[batch]))
        result = scores.compute()
        assert result == pytest.approx(expected, rel=1e-12) and all(type(value) is float for value in result.values())


def test_images_of_different_sizes_can_be_scored_together(rng):
    scores, counts = SegmentationScores(), numpy.zeros(3)
    for size in ((3, 4), (5, 7)):
        p, y = rng.random((1, *size, 1)), rng.random((1, *size, 1)) < 0.5
        scores.update(p, y)
        counts += (p > 0.5)[y].sum(), (p > 0.5).sum() + y.sum(), y.size
    assert scores.compute()['dice_pooled'] == pytest.approx(2 * counts[0] / counts[1])
    assert scores.compute()['accuracy'] == pytest.approx(1 - (counts[1] - 2 * counts[0]) / counts[2])


def test_pooled_scores_of_several_channels_are_means_over_channels(rng):
    p, y = rng.random((3, 5, 4, 2)), rng.random((3, 5, 4, 2)) < [0.2, 0.6]
    channels = [score(p[..., c:c + 1], y[..., c:c + 1]) for c in range(2)]
    for name, value in score(p, y).items():
        assert value == pytest.approx((channels[0][name] + channels[1][name]) / 2)


def test_the_dice_of_an_image_is_the_mean_over_its_channels(rng):
    p, y = rng.random((4, 5, 6, 3)), rng.random((4, 5, 6, 3)) < 0.5
    scores = SegmentationScores()
    scores.update(p[:3], y[:3])
    scores.update(p[3:], y[3:])
    overlap, both = (((p > 0.5) & y).sum(axis=(1, 2)), (p > 0.5).sum(axis=(1, 2)) + y.sum(axis=(1, 2)))      # (4, 3)
    numpy.testing.assert_allclose(scores.dice_of_images(), (2 * overlap / both).mean(axis=1))


def test_a_pixel_at_the_threshold_is_background():
    assert score(images([0.5, 0.51]), images([1, 1]))['foreground_share'] == 0.5
    assert score(images([0.3, 0.51]), images([1, 1]), threshold=0.2)['foreground_share'] == 1


def test_targets_of_any_dtype_and_any_foreground_value_count_alike(rng):
    p, y = rng.random((6, 5, 4, 1)), rng.random((6, 5, 4, 1)) < rng.random((5, 4, 1))
    for target in (y.astype('uint8'), y.astype('uint8') * 255, y.astype('float32'), y.astype('float64')):
        assert score(p, target) == score(p, y) and numpy.array_equal(mean_mask(target), mean_mask(y))


def test_soft_dice_is_minus_the_dice_loss_up_to_its_smoothing(rng):
    logits, y = rng.standard_normal((3, 20, 30, 1)), (rng.random((3, 20, 30, 1)) < 0.3).astype(float)
    scores = score(1 / (1 + numpy.exp(-logits)), y)
    assert scores['soft_dice_pooled'] == pytest.approx(-DiceLoss(smooth=1e-9).forward(logits, y))
    assert scores['soft_dice_per_image'] == pytest.approx(-DiceLoss(smooth=1e-9, per_image=True).forward(logits, y))


def test_counts_do_not_round():
    p = numpy.full((1, 4096, 4096, 1), 1, 'float32')            # 2²⁴ pixels: the last whole number float32 can count to
    p[0, 0, 0] = 0.25
    assert score(p, p > 0.5)['soft_dice_pooled'] == 2 * (2**24 - 1) / (2**24 - 0.75 + 2**24 - 1)


def test_scores_refuse_what_cannot_be_scored():
    with pytest.raises(ValueError, match=r'\(1, 1, 3, 1\).*\(1, 1, 2, 1\)'):
        SegmentationScores().update(images([0, 0, 0]), images([0, 0]))
    with pytest.raises(ValueError, match='nothing to score'):
        SegmentationScores().compute()
    for threshold in (-0.1, 1, 128):
        with pytest.raises(ValueError, match='threshold'):
            SegmentationScores(threshold)


@pytest.mark.parametrize('values', [(0, 0.3), (0, 2), (-1, 0), (1, 255), (0, 254), (numpy.nan, 0), (0, 1e-3)])
def test_targets_that_are_no_masks_are_refused_and_on_a_device_make_the_scores_nan(values, xp):
    target, p = images(values, [0, 0]), images([0.0, 1.0], [0, 1])
    if xp is numpy:
        for count in lambda: score(p, target), lambda: mean_mask(target):
            with pytest.raises(ValueError, match='target holds the values .*; expected 0 and 1, or 0 and 255'):
                count()
        return
    scores = score(xp.asarray(p), xp.asarray(target))
    assert numpy.isnan(list(scores.values())).all()
    with pytest.raises(ValueError, match='other values than 0 and 1'):
        mean_mask(xp.asarray(target))


@pytest.mark.parametrize('values', [(0, 1.01), (-0.01, 1), (0, numpy.inf), (-numpy.inf, 0)])
def test_probabilities_out_of_range_are_refused_and_on_a_device_make_the_scores_nan(values, xp):
    p, target = images(values, [0, 0]), images([0, 1], [0, 1])
    if xp is numpy:
        low, high = map(float, (min(values), max(values)))
        with pytest.raises(ValueError, match=f'probabilities lie from {low} to {high}; expected 0 to 1'):
            score(p, target)
    else:
        with numpy.errstate(invalid='ignore'):
            assert numpy.isnan(list(score(xp.asarray(p), xp.asarray(target)).values())).all()
    with pytest.raises(ValueError, match='probabilities lie from 0 to 255'):
        score((images([0, 1]) * 255).astype('uint8'), images([0, 1]))


def test_predicted_masks_of_whole_numbers_score_as_their_probabilities_do(rng):
    p, y = rng.random((3, 5, 4, 1)) < 0.4, rng.random((3, 5, 4, 1)) < 0.3
    for dtype in 'uint8', 'int64', 'float32', 'float64':
        assert score(p.astype(dtype), y) == score(p, y)


def test_an_image_with_a_probability_of_nan_has_no_score(xp):
    p, y = images([0.9, 0.2, numpy.nan], [0.9, 0.8, 0.1]), images([1, 0, 0], [1, 1, 1])
    scores = SegmentationScores()
    scores.update(xp.asarray(p), xp.asarray(y))
    assert numpy.isnan(list(scores.compute().values())).all()
    dice = scores.dice_of_images()
    assert numpy.isnan(dice[0]) and dice[1] == pytest.approx(2 * 2 / (2 + 3))


def test_batches_without_a_pixel_count_for_nothing(xp):
    p, y = images([0.9, 0.2, 0.7], [0.9, 0.8, 0.1]), images([1, 0, 0], [1, 1, 1])
    scores, baselines = SegmentationScores(), Baselines()
    for empty in ((0, 1, 3, 1), (2, 0, 3, 1), (0, 7, 7, 2)):
        scores.update(xp.asarray(numpy.zeros(empty)), xp.asarray(numpy.zeros(empty, 'uint8')))
        baselines.update(xp.asarray(numpy.zeros(empty)))
    with pytest.raises(ValueError, match='nothing to score'):
        scores.compute()
    with pytest.raises(ValueError, match='no mask was counted'):
        baselines.mean_mask()
    scores.update(xp.asarray(p), xp.asarray(y))
    scores.update(xp.asarray(p[:0]), xp.asarray(y[:0]))
    baselines.update(xp.asarray(y))
    baselines.update(xp.asarray(y[:0]))
    assert scores.compute() == score(p, y) and baselines.images == 2
    assert numpy.array_equal(backend.to_cpu(baselines.mean_mask()), mean_mask(y))
    assert baselines.compute([xp.asarray(y[:0]), xp.asarray(y)]) == baselines.compute([xp.asarray(y)])


def test_dice_of_images_is_the_hard_dice_of_each_and_means_over_all_channels(rng):
    p, y = rng.random((4, 5, 6, 3)), rng.random((4, 5, 6, 3)) < [0.1, 0.5, 0.9]
    scores = SegmentationScores()
    for part in slice(0, 1), slice(1, 4):
        scores.update(p[part], y[part])
    m = p > 0.5
    by_hand = [[2 * (m[n, ..., c] & y[n, ..., c]).sum() / (m[n, ..., c].sum() + y[n, ..., c].sum()) for c in range(3)]
               for n in range(4)]
    assert scores.dice_of_images() == pytest.approx(numpy.mean(by_hand, axis=1))
    assert scores.compute()['dice_per_image'] == pytest.approx(numpy.mean(by_hand))
    assert numpy.ptp(by_hand, axis=1).min() > 0.1                       # so that no channel stands for the others


def test_what_is_no_batch_of_images_is_refused():
    for shape in (3, 4), (2, 3, 4):
        with pytest.raises(ValueError, match=r'not \(N, H, W, C\)'):
            score(numpy.zeros(shape), numpy.zeros(shape))
        with pytest.raises(ValueError, match=r'expected \(N, H, W, C\)'):
            mean_mask(numpy.zeros(shape))


def test_mean_mask_is_the_best_set_of_pixels_for_its_own_masks(rng):
    """Compared with every one of the 2⁸ masks, by pooled Dice over the training masks."""
    for _ in range(6):
        masks = (rng.random((3, 2, 4, 1)) < rng.random((2, 4, 1))).astype(float)
        best = max(score(numpy.broadcast_to(numpy.reshape(bits, (2, 4, 1)), masks.shape), masks)['dice_pooled']
                   for bits in itertools.product([0.0, 1.0], repeat=8))
        found = numpy.broadcast_to(mean_mask(masks), masks.shape)
        assert score(found, masks)['dice_pooled'] == pytest.approx(best)


def test_mean_mask_by_hand():
    masks = images([1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0])      # shares 1, 1/2, 1/4, 0
    # Dice of the first k pixels: 2·1/(1 + 1.75), 2·1.5/(2 + 1.75), 2·1.75/(3 + 1.75) = 0.727, 0.8, 0.737
    assert mean_mask(masks[:3], masks[3:])[0, :, 0].tolist() == [1, 1, 0, 0]


def test_mean_mask_of_empty_masks_is_empty_and_channels_are_cut_apart(rng):
    assert not mean_mask(numpy.zeros((2, 3, 4, 1))).any()
    for _ in range(10):
        masks = (rng.random((5, 3, 4, 2)) < rng.random((3, 4, 2)) * [1, 0.5]).astype(float)
        for c in range(2):
            assert numpy.array_equal(mean_mask(masks)[..., c], mean_mask(masks[..., c:c + 1])[..., 0])


def test_baselines_score_another_part(xp, rng):
    training, validation = rng.random((2, 6, 5, 4, 1)) < rng.random((5, 4, 1))
    baselines = Baselines()
    for batch in (training[:4], training[4:]):
        baselines.update(xp.asarray(batch.astype('float32')))
    assert backend.device_of(baselines.mean_mask()) == ('cpu' if xp is numpy else 'gpu')
    scores = baselines.compute(xp.asarray(batch.astype('float32')) for batch in (validation[:1], validation[1:]))
    mean = numpy.broadcast_to(mean_mask(training), validation.shape)
    assert scores == {'empty mask': score(numpy.zeros(validation.shape), validation),
                      'mean training mask': score(mean, validation)}
    for part in scores.values():
        assert part['soft_dice_pooled'] == part['dice_pooled'] and part['soft_dice_per_image'] == part['dice_per_image']


def test_baselines_refuse_masks_of_different_sizes_and_no_masks():
    baselines = Baselines()
    with pytest.raises(ValueError, match='no mask was counted'):
        baselines.compute([])
    baselines.update(numpy.zeros((2, 3, 4, 1)))
    with pytest.raises(ValueError, match=r'\(3, 5, 1\).*\(3, 4, 1\)'):
        baselines.update(numpy.zeros((2, 3, 5, 1)))
