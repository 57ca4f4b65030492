from pathlib import Path

import numpy
import pytest

import nervenet
from nervenet import CheckpointError, UNet
from nervenet.images.augment import median_filter
from nervenet.study.checkpoint import load_checkpoint
from nervenet.study.segment import Segmenter, Settings, choose_from, choose_temperature, count_masks, describe, model_files, score
from nervenet.train import predict


@pytest.fixture
def model(rng):
    return UNet(base_channels=2, depth=1, rng=rng)


def test_probabilities_come_back_at_each_image_own_size(model, rng):
    segmenter = Segmenter(model, (16, 24))
    images = [rng.random(size, dtype='float32') for size in ((16, 24), (1, 1), (45, 31))]
    probabilities = segmenter.probabilities(images)
    assert [p.shape for p in probabilities] == [image.shape for image in images]
    numpy.testing.assert_allclose(probabilities[0], predict(model, images[0][None, :, :, None])[0, :, :, 0], rtol=1e-4)


def test_images_are_filtered_as_those_the_network_was_trained_on(model, rng):
    image = rng.random((32, 48), dtype='float32')
    plain, filtered = (Segmenter(model, (16, 24), median_filter=size) for size in (None, 3))
    small = plain.prepare(image)
    numpy.testing.assert_array_equal(filtered.prepare(image), median_filter(small, 3))
    assert (filtered.prepare(image) != small).any()
    numpy.testing.assert_allclose(filtered.probabilities([small])[0], predict(model, median_filter(small, 3)[None, :, :, None])[0, :, :, 0],
                                  rtol=1e-4)


def test_flip_average_is_the_mean_of_both_directions(model, rng):
    image = rng.random((16, 24), dtype='float32')
    plain, flipped, averaged = (Segmenter(model, (16, 24), Settings(flip_average=flip)).probabilities([given])[0]
                                for flip, given in ((False, image), (False, image[:, ::-1]), (True, image)))
    numpy.testing.assert_allclose(averaged, (plain + flipped[:, ::-1]) / 2, rtol=1e-5)


def test_images_of_any_dtype_that_says_what_is_white_are_predicted_alike(model, rng):
    segmenter, levels = Segmenter(model, (16, 24)), rng.integers(0, 256, (30, 40), dtype='uint8')
    expected = segmenter.probabilities([levels / numpy.float32(255)])[0]
    assert expected.std() > 0.001
    for image in (levels, levels.astype('uint16') * 257, levels / 255):
        numpy.testing.assert_allclose(segmenter.probabilities([image])[0], expected, atol=1e-6)
    binary = levels > 99
    numpy.testing.assert_array_equal(*(segmenter.probabilities([image])[0] for image in (binary, binary.astype('float32'))))
    for wrong in (levels.astype('float32'), levels.astype(int), levels[..., None], levels / 255 - 0.5):
        with pytest.raises(ValueError, match=r'an image .*expected'):
            segmenter.probabilities([wrong])
    assert segmenter.probabilities([]) == []


def test_intensities_far_from_those_of_training_are_odd(rng):
    image = rng.normal(0.4, 0.2, (30, 40)).clip(0, 1).astype('float32')
    trained = Segmenter(UNet(base_channels=2, depth=1, input_mean=0.4, input_std=0.2, rng=rng), (30, 40))
    assert trained.oddity(image) == trained.oddity(trained.prepare((image * 255).astype('uint8'))) == ''
    assert trained.oddity(image / 16) == 'much darker'
    assert Segmenter(UNet(base_channels=2, depth=1, rng=rng), (30, 40)).oddity(image / 16) == '', 'training is unknown'


def test_mask_is_cut_at_the_threshold_and_empty_below_the_minimal_area():
    probability = numpy.zeros((10, 10))
    probability[2:4, 5] = 0.6
    assert Settings(threshold=0.5).mask(probability).sum() == 2
    assert not Settings(threshold=0.6).mask(probability).any()
    assert Settings(minimal_area=0.02).mask(probability).sum() == 2
    assert not Settings(minimal_area=0.03).mask(probability).any()


def test_only_the_largest_component_is_kept_and_its_area_counts():
    probability = numpy.zeros((10, 10))
    probability[2:4, 5], probability[7, 1:5], probability[8, 5] = 0.9, 0.6, 0.9        # pieces of 2, 4 and 1 pixels, the last at a corner
    mask = Settings(largest_component=True).mask(probability)
    assert mask.sum() == 4 and mask[7, 1:5].all()
    assert Settings(minimal_area=0.05).mask(probability).any()
    assert not Settings(minimal_area=0.05, largest_component=True).mask(probability).any()
    assert Settings(threshold=0.7, largest_component=True).mask(probability).sum() == 2
    assert not Settings(threshold=0.95, largest_component=True).mask(probability).any()


@pytest.mark.parametrize('wrong', [0, -1.0, float('nan'), float('inf')])
def test_a_temperature_out_of_range_is_refused(wrong):
    with pytest.raises(ValueError, match='temperature is .*; expected a number above 0'):
        Settings(temperature=wrong)


@pytest.mark.parametrize('wrong', [dict(threshold=1.0), dict(threshold=-0.1), dict(minimal_area=1), dict(threshold=float('nan'))])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match='expected a number from 0'):
        Settings(**wrong)


class Fixed(nervenet.Layer):
    """A network whose logits are the image itself."""

    dtype = numpy.dtype('float32')

    def __init__(self):
        super().__init__()
        self.children = {'head': nervenet.Conv2D(1, 1)}

    def forward(self, x):
        return x


def test_settings_are_chosen_where_dice_per_image_is_best(rng):
    """Foreground has probability 0.7, background 0.6, and an image without nerve a small false alarm of 0.9."""
    masks = numpy.zeros((4, 20, 20, 1), 'float32')
    masks[:3, 4:12, 6:14] = 1
    p = numpy.where(masks > 0, 0.7, 0.6)
    p[3, 0, 0] = 0.9
    images = numpy.log(p / (1 - p)).astype('float32')
    settings, score = choose_from([count_masks(Fixed(), lambda: [(images, masks)])])
    assert 0.6 <= settings.threshold < 0.7 and settings.minimal_area > 1 / 400 and not settings.flip_average
    assert score == pytest.approx(1.0)


def test_a_candidate_must_be_better_by_a_margin(rng):
    """The best threshold is not that of the simplest settings: it takes over only where it gains more than 0.002."""
    masks = numpy.zeros((1, 40, 100, 1), 'float32')
    masks[0, :25] = 1                                              # 2500 pixels of 4000
    for missed, expected in ((2, 0.5), (200, 0.35)):               # of these some have a probability of 0.4: Dice 0.9996 or 0.958
        p = numpy.where(masks > 0, 0.95, 0.05)
        p.flat[:missed] = 0.4
        settings, score = choose_from([count_masks(Fixed(), lambda: [(numpy.log(p / (1 - p)).astype('float32'), masks)],
                                                   thresholds=numpy.array([0.35, 0.5]))])
        assert settings.threshold == expected and (score == 1) == (expected == 0.35)


def test_the_largest_component_is_chosen_where_it_helps():
    """A second piece, as sure as the first and too large for a minimal area to drop, is a false alarm in every image."""
    masks = numpy.zeros((3, 20, 30, 1), 'float32')
    masks[:, 4:12, 6:14] = 1
    p = numpy.where(masks > 0, 0.9, 0.1)
    p[:, 15:19, 20:26] = 0.9                                       # 24 pixels of 600
    settings, score = choose_from([count_masks(Fixed(), lambda: [(numpy.log(p / (1 - p)).astype('float32'), masks)])])
    assert settings.largest_component and score == 1 and settings.minimal_area == 0
    p[:, 15:19, 20:26] = 0.1
    assert not choose_from([count_masks(Fixed(), lambda: [(numpy.log(p / (1 - p)).astype('float32'), masks)])])[0].largest_component


@pytest.mark.parametrize('true', [0.5, 3.0])
def test_the_temperature_makes_probabilities_what_they_say(rng, true):
    """Masks are drawn from probabilities σ(x / T), and the network says x; far from them all it says is 0 with certainty."""
    logits = rng.normal(0, 3, (6, 40, 60, 1)).astype('float32')
    masks = (rng.random(logits.shape) < 1 / (1 + numpy.exp(-logits / true))).astype('float32')
    logits[:, :, 30:], masks[:, :, 30:] = -30, 0
    batches = [(logits[:4], masks[:4]), (logits[4:], masks[4:])]
    assert choose_temperature(Fixed(), batches) == pytest.approx(true, rel=0.08)
    assert choose_temperature(Fixed(), [(logits, 0 * masks)]) == 1


def test_temperature_acts_on_every_prediction(rng):
    image = rng.normal(0, 2, (16, 24)).astype('float32')
    image = (image - image.min()) / numpy.ptp(image)                # as intensities; its values are the logits
    cold = Segmenter(Fixed(), (16, 24), Settings(temperature=0.5))
    expected = 1 / (1 + numpy.exp(-2 * image))
    numpy.testing.assert_allclose(cold.maps([image])[0], expected, rtol=1e-5)
    assert 0 < (cold.maps([image - 0.5])[0] > 0.5).sum() == (image > 0.5).sum() < image.size, 'the mask above one half stays as it is'
    numpy.testing.assert_allclose(cold.samples([image])[0], [expected, expected], rtol=1e-5)
    averaged = Segmenter(Fixed(), (16, 24), Settings(temperature=0.5, flip_average=True)).maps([image])[0]
    numpy.testing.assert_allclose(averaged, expected, rtol=1e-5)
    masks = (rng.random((1, 16, 24, 1)) < 0.5).astype('float32')
    counts = count_masks(Fixed(), lambda: [(image[None, ..., None], masks)], thresholds=numpy.array([0.7]), temperature=0.5)['counts']
    assert (counts[:, 0, 0, 1] == (expected > 0.7).sum()).all() and 0 < (expected > 0.7).sum() != (image > numpy.log(0.7 / 0.3)).sum()
    found = score(Fixed(), [(image[None, ..., None], masks)], Settings(threshold=0.7, temperature=0.5))
    assert found['accuracy'] == pytest.approx(((expected > 0.7) == (masks[0, ..., 0] > 0)).mean())


def test_score_averages_over_flips_if_the_settings_say_so(model, rng):
    images, masks = rng.random((3, 16, 24, 1), dtype='float32'), (rng.random((3, 16, 24, 1)) < 0.5).astype('float32')
    p, mirrored = predict(model, images), predict(model, images[:, :, ::-1])[:, :, ::-1]
    averaged = (p + mirrored) / 2
    threshold = float(numpy.median(averaged))
    for flip_average, probabilities in ((False, p), (True, averaged)):
        found = score(model, [(images, masks)], Settings(threshold=threshold, flip_average=flip_average))
        cut = probabilities > threshold
        assert found['accuracy'] == pytest.approx((cut == (masks > 0)).mean())
    assert ((p > threshold) != (averaged > threshold)).any()


def test_score_is_that_of_the_masks_the_settings_make(rng):
    masks = (rng.random((5, 12, 16, 1)) < 0.3).astype('float32')
    images = rng.normal(3 * masks - 1.5, 1).astype('float32')
    areas = sorted((images > -0.4).mean(axis=(1, 2, 3)))                # as σ(−0.4) is about 0.4
    settings = Settings(threshold=0.4, minimal_area=float(areas[2]))
    predicted = [settings.mask(1 / (1 + numpy.exp(-image))) for image in images]
    assert 0 < sum(mask.any() for mask in predicted) < 5
    dice = [2 * (mask & (truth > 0)).sum() / (mask.sum() + truth.sum()) for mask, truth in zip(predicted, masks)]
    scores = score(Fixed(), [(images[:3], masks[:3]), (images[3:], masks[3:])], settings)
    assert scores['dice_per_image'] == pytest.approx(numpy.mean(dice))
    assert not any(name.startswith('soft_') for name in scores), 'of masks, not of probabilities'


def test_describe_gives_area_centroid_and_confidence():
    mask, probability = numpy.zeros((6, 8), bool), numpy.full((6, 8), 0.25)
    assert describe(mask, probability) == {'area': 0, 'share': 0.0, 'row': '', 'column': '', 'confidence': 0.75}
    mask[2:4, 5] = True
    probability[2:4, 5] = 0.8, 0.9
    assert describe(mask, probability) == {'area': 2, 'share': round(2 / 48, 6), 'row': 2.5, 'column': 5.0, 'confidence': 0.85}
    mask[0, 0], probability[0, 0] = True, 1                              # corners, and a hole between them that does not count
    mask[5, 7], probability[5, 7] = True, 0.25
    assert describe(mask, probability) == {'area': 4, 'share': round(4 / 48, 6), 'row': 2.5, 'column': 4.2, 'confidence': 0.7375}


@pytest.mark.parametrize('extra, message', [
    (dict(), 'gives None as the size'), (dict(size=[48]), r'gives \[48\] as the size'), (dict(size='ab'), "gives 'ab'"),
    (dict(size=[16, 24], settings={'treshold': 0.5}), 'its settings'), (dict(size=[16, 24], settings={'threshold': 'a'}), 'its settings'),
    (dict(size=[16, 24], median_filter=4), 'gives 4 as the size of its median filter'),
    (dict(size=[16, 24], mean_training_mask='x'), 'mean training mask is not an array')])
def test_a_file_that_lacks_what_a_segmenter_needs_gives_one_clear_error(model, tmp_path, extra, message):
    nervenet.save(tmp_path / 'model.npz', model, **extra)
    with pytest.raises(CheckpointError, match=message) as error:
        Segmenter.from_file(tmp_path / 'model.npz')
    assert 'model.npz' in str(error.value) and '\n' not in str(error.value)


def test_stored_settings_are_used_and_can_be_replaced(model, tmp_path):
    nervenet.save(tmp_path / 'model.npz', model, size=(16, 24), settings={'threshold': 0.3, 'minimal_area': 0.01, 'flip_average': True})
    segmenter, _ = Segmenter.from_file(tmp_path / 'model.npz', threshold=0.4)
    assert segmenter.size == (16, 24) and segmenter.settings == Settings(0.4, 0.01, True)


def counted(model, rng, **more):
    images, masks = rng.random((4, 16, 24, 1), dtype='float32'), (rng.random((4, 16, 24, 1)) < 0.3).astype('float32')
    return {'size': [16, 24], 'settings': {}, 'held_out': count_masks(model, lambda: [(images, masks)]), **more}


@pytest.fixture
def files(tmp_path, rng):
    """Three model files that may predict together, and their models."""
    models = [UNet(base_channels=2, depth=1, rng=seed) for seed in range(3)]
    for number, model in enumerate(models):
        model.parameters()['head.weight'][...] *= 5
        nervenet.save(tmp_path / f'{number}.npz', model, **counted(model, rng))
    return [tmp_path / f'{number}.npz' for number in range(3)], models


def test_several_networks_predict_by_the_mean_of_their_probabilities(files, rng):
    paths, models = files
    segmenter, extras = Segmenter.from_files(paths, flip_average=False)
    images = [rng.random((16, 24), dtype='float32') for _ in range(2)]
    alone = [Segmenter(model, (16, 24)).maps(images) for model in models]
    for number, p in enumerate(segmenter.maps(images)):
        numpy.testing.assert_allclose(p, numpy.mean([maps[number] for maps in alone], axis=0), atol=1e-6)
    numpy.testing.assert_allclose(segmenter.maps(images, (0, 2))[1], (alone[0][1] + alone[2][1]) / 2, atol=1e-6)
    assert len(extras) == 3 and segmenter.model is segmenter.models[0] and segmenter.maps([]) == []

    drawn = segmenter.samples(images, (1, 2))
    mirrored = [Segmenter(model, (16, 24)).maps([image[:, ::-1] for image in images]) for model in models]
    assert len(drawn) == 2 and drawn[0].shape == (4, 16, 24)
    for number in range(2):
        expected = [alone[1][number], mirrored[1][number][:, ::-1], alone[2][number], mirrored[2][number][:, ::-1]]
        numpy.testing.assert_allclose(drawn[number], expected, atol=1e-6)
    for flip in False, True:
        one = Segmenter(models, (16, 24), Settings(flip_average=flip))
        for samples, p in zip(one.samples(images), one.maps(images)):
            numpy.testing.assert_array_equal(one.map_of(samples), p, 'the map of the same passes')


def test_with_dropout_each_sample_is_another_and_all_can_be_repeated(rng):
    model, image = UNet(base_channels=4, depth=2, dropout=0.5, rng=rng), rng.random((16, 24), dtype='float32')
    model.parameters()['head.weight'][...] *= 20
    segmenter = Segmenter(model, (16, 24), Settings(temperature=2.0))
    own = model.dropout.rng
    drawn, = segmenter.dropout_samples([image], 30)
    assert drawn.shape == (30, 16, 24) and len(numpy.unique(drawn[:, 8, 8])) == 30
    numpy.testing.assert_array_equal(drawn, segmenter.dropout_samples([image], 30)[0])
    assert model.dropout.rng is own and not model.dropout.training
    once = segmenter.maps([image])[0]
    assert numpy.corrcoef(drawn.mean(axis=0).ravel(), once.ravel())[0, 1] > 0.8, 'around what is said without dropout'
    numpy.testing.assert_array_equal(once, segmenter.maps([image])[0])
    model.dropout.p = 0.0
    numpy.testing.assert_allclose(segmenter.dropout_samples([image], 2)[0], [once, once], rtol=1e-4)


def test_settings_of_several_are_chosen_from_what_each_made_of_its_own_part(files, rng):
    paths, models = files
    together = choose_from([load_checkpoint(path)[1]['held_out'] for path in paths])
    assert Segmenter.from_files(paths)[0].settings == together[0]
    assert Segmenter.from_files(paths, threshold=0.77)[0].settings.threshold == 0.77
    images, masks = rng.random((6, 16, 24, 1), dtype='float32'), (rng.random((6, 16, 24, 1)) < 0.3).astype('float32')
    whole = choose_from([count_masks(models[0], lambda: [(images, masks)])])
    parts = [count_masks(models[0], lambda part=part: [(images[part], masks[part])]) for part in (slice(0, 2), slice(2, 6))]
    assert choose_from(parts) == whole, 'a part at a time, as if at once'
    warm = [{**load_checkpoint(path)[1], 'settings': {'temperature': T}} for path, T in zip(paths, (1.0, 2.0, 4.0))]
    for path, model, extra in zip(paths, models, warm):
        nervenet.save(path, model, **extra)
    together, kept = Segmenter.from_files(paths)[0], Segmenter.from_files(paths, temperature=3.0)[0]
    assert together.temperatures == [1, 2, 4] and kept.temperatures == [3, 3, 3]
    for number, (T, model) in enumerate(zip((1.0, 2.0, 4.0), models)):
        alone = Segmenter(model, (16, 24), Settings(temperature=T))
        for method in Segmenter.samples, lambda one, x, members=None: one.dropout_samples(x, 2, members):
            numpy.testing.assert_array_equal(method(together, [images[0, :, :, 0]], (number,)), method(alone, [images[0, :, :, 0]]))
    with pytest.raises(CheckpointError, match='at different thresholds or sizes'):
        choose_from([parts[0], {**parts[1], 'pixels': 7}])


@pytest.mark.parametrize('change, message', [(dict(size=[16, 32]), r'1.npz: its size is \[16, 32\], that of .*0.npz is \[16, 24\]'),
                                             (dict(median_filter=3), '1.npz: its median_filter is 3, that of .* is None'),
                                             (dict(held_out=None), '1.npz: does not say what its network made of subjects it had not seen'),
                                             (dict(held_out={'thresholds': [1]}), '1.npz: does not say what'),
                                             (dict(held_out={'thresholds': numpy.array([.5]), 'pixels': 384, 'counts': numpy.zeros((2, 1, 3, 4), int)}),
                                              '1.npz: does not say what')])
def test_networks_that_do_not_go_together_are_refused(files, change, message, rng):
    (first, second, _), models = files
    extra = {name: value for name, value in counted(models[1], rng, **change).items() if value is not None}
    nervenet.save(second, models[1], **extra)
    with pytest.raises(CheckpointError, match=message):
        Segmenter.from_files([first, second])


def test_a_folder_stands_for_the_last_networks_of_its_folds(tmp_path):
    for number in range(1, 12):
        (tmp_path / 'cv' / f'fold_{number}').mkdir(parents=True)
        (tmp_path / 'cv' / f'fold_{number}' / 'last.npz').touch()
    (tmp_path / 'cv' / 'fold_backup').mkdir()
    files = [tmp_path / 'cv' / f'fold_{n}' / 'last.npz' for n in range(1, 12)]
    assert model_files([tmp_path / 'cv', 'x.npz', files[0]]) == [*files, Path('x.npz')], 'each once'
    (tmp_path / 'cv' / 'config.json').write_text('{"folds": 12}')
    with pytest.raises(CheckpointError, match='cv: fold 12 of 12 has no network yet; train it, or give the files'):
        model_files([tmp_path / 'cv'])
    (tmp_path / 'chains' / 'fold_1').mkdir(parents=True)
    (tmp_path / 'chains' / 'fold_1' / 'chain.npz').touch()
    with pytest.raises(CheckpointError, match='chains: holds chains, which predict alone; give one of them, such as .*fold_1/chain.npz'):
        model_files([tmp_path / 'chains'])
    (tmp_path / 'run').mkdir()
    with pytest.raises(CheckpointError, match='run: is a folder, and not that of a cross-validation; give a model file, such as .*run/best.npz'):
        model_files([tmp_path / 'run'])
    (tmp_path / 'run' / 'last.npz').touch()
    with pytest.raises(CheckpointError, match='such as .*run/last.npz'):
        model_files([tmp_path / 'run'])


@pytest.mark.parametrize('extra, message', [(dict(reading={'subject_pattern': '('}), 'no regular expression with a group'), (dict(reading={'subject_pattern': '1'}), 'with a group'),
                                            (dict(reading={'subject_pattern': 5}), 'of the masks'), (dict(reading={'label': []}), 'of the masks'), (dict(reading=3), 'of the masks'), (dict(training_subjects=5), 'no list of names')])
def test_what_a_file_says_of_its_training_is_checked_before_it_is_believed(model, tmp_path, extra, message):
    nervenet.save(tmp_path / 'm.npz', model, size=[16, 24], settings={}, **extra)
    with pytest.raises(CheckpointError, match=message):
        Segmenter.from_file(tmp_path / 'm.npz')
