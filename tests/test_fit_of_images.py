"""How images of other shapes come to the network's size, and how what it says comes back: --fit."""

import json
from dataclasses import replace

import numpy
import pytest
from PIL import Image

import nervenet
from helpers import TINY, example
from nervenet import CheckpointError, UNet
from nervenet.images.augment import median_filter
from nervenet.images.data import (FITS, Filtered, Reader, crop_warning, data_warning, fitted, intensity_statistics, places, resize,
                                  resize_mask, unfitted)
from nervenet.images.samples import find_samples
from nervenet.study.checkpoint import load_checkpoint
from nervenet.study.options import parse
from nervenet.study.segment import Segmenter, Settings

SHAPES = (64, 96), (1, 1), (1, 1000), (1000, 1), (3, 7), (139, 192), (420, 580), (97, 13), (65, 95), (2, 3), (5, 99999)
SIZES = (64, 96), (96, 64), (33, 47), (1, 1), (2, 128)


def extent(sides):
    return tuple(side.stop - side.start for side in sides)


def assert_is_in_the_middle(sides, shape):
    for side, length in zip(sides, shape):
        assert 0 <= side.start < side.stop <= length
        assert 0 <= (length - side.stop) - side.start <= 1                              # an odd rest is below and to the right


def assert_has_proportions(box, shape):
    """One side of the box is as long as it can be, the other the nearest whole number that keeps the proportions, and at least 1."""
    height, width = box
    assert abs(height - shape[0] / shape[1] * width) <= 0.5 + 1e-9 or abs(width - shape[1] / shape[0] * height) <= 0.5 + 1e-9 or 1 in box


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('shape', SHAPES)
def test_padding_shows_all_and_cropping_fills_all_in_proportion(shape, size):
    whole, full = (slice(0, shape[0]), slice(0, shape[1])), (slice(0, size[0]), slice(0, size[1]))
    assert places(shape, size, 'squeeze') == (whole, full)
    part, place = places(shape, size, 'pad')
    assert part == whole and (extent(place)[0] == size[0] or extent(place)[1] == size[1])
    assert_is_in_the_middle(place, size)
    assert_has_proportions(extent(place), shape)
    part, place = places(shape, size, 'crop')
    assert place == full and (extent(part)[0] == shape[0] or extent(part)[1] == shape[1])
    assert_is_in_the_middle(part, shape)
    assert_has_proportions(extent(part), size)


def test_an_unknown_fit_is_refused():
    with pytest.raises(ValueError, match="fit is 'stretch'; expected one of pad, crop, squeeze"):
        places((3, 4), (5, 6), 'stretch')


@pytest.mark.parametrize('fit', FITS)
@pytest.mark.parametrize('shape', SHAPES)
def test_what_is_fitted_fills_its_place_and_comes_back_to_its_part_and_nowhere_else(shape, fit):
    size = 32, 48
    part, place = places(shape, size, fit)
    image = numpy.full(shape, 0.5, 'float32')
    there = fitted(image, size, fit)
    expected = numpy.zeros(size, 'float32')
    expected[place] = 0.5
    numpy.testing.assert_array_equal(there, expected)
    back = unfitted(numpy.full(size, 0.25, 'float32'), shape, fit)
    expected = numpy.zeros(shape, 'float32')
    expected[part] = 0.25
    numpy.testing.assert_array_equal(back, expected)
    mask = fitted(numpy.ones(shape, 'uint8'), size, fit, by=resize_mask)
    assert mask.dtype == numpy.uint8
    numpy.testing.assert_array_equal(mask, there > 0)


def test_at_one_scale_not_a_pixel_moves(rng):
    image = rng.random((20, 31), dtype='float32')
    padded = fitted(image, (25, 31), 'pad')
    numpy.testing.assert_array_equal(padded[2:22], image)                               # 5 rows are left, 2 of them above
    assert not padded[:2].any() and not padded[22:].any()
    numpy.testing.assert_array_equal(unfitted(padded, image.shape, 'pad'), image)
    cropped = fitted(image, (20, 24), 'crop')
    numpy.testing.assert_array_equal(cropped, image[:, 3:27])                           # 7 columns are left, 3 of them on the left
    back = unfitted(cropped, image.shape, 'crop')
    numpy.testing.assert_array_equal(back[:, 3:27], cropped)
    assert back.shape == image.shape and not back[:, :3].any() and not back[:, 27:].any()


@pytest.mark.parametrize('fit', FITS)
@pytest.mark.parametrize('shape', [(97, 141), (141, 97), (240, 90), (61, 300)])
def test_a_disc_comes_back_where_it_was_and_stays_round_but_when_squeezed(shape, fit):
    rows, columns = numpy.mgrid[:shape[0], :shape[1]]
    centre, radius = (shape[0] / 2 + 6, shape[1] / 2 - 8), 17
    mask = ((rows - centre[0])**2 + (columns - centre[1])**2 < radius**2).astype('uint8')
    small = fitted(mask, (64, 96), fit, by=resize_mask)
    back = unfitted(small, shape, fit, by=resize_mask)
    assert 2 * (mask & back).sum() / (mask.sum() + back.sum()) > 0.93
    for axis in 0, 1:
        assert abs(numpy.nonzero(back)[axis].mean() - numpy.nonzero(mask)[axis].mean()) < 0.5
    height, width = (numpy.ptp(places) + 1 for places in numpy.nonzero(small))
    if fit == 'squeeze':
        assert height / width == pytest.approx(64 / shape[0] * shape[1] / 96, rel=0.15)
    else:
        assert abs(height - width) <= 2


# --- Training ---------------------------------------------------------------------------------------------------------

def write(folder, name, image, mask):
    folder.mkdir(exist_ok=True)
    Image.fromarray(numpy.rint(image * 255).astype('uint8')).save(folder / f'{name}.png')
    Image.fromarray(mask.astype('uint8') * 255).save(folder / f'{name}_mask.png')


@pytest.fixture
def data(tmp_path, rng):
    """Images of 30×20, narrow, and 20×60, wide, of three subjects each; foreground is bright, and on the left in the wide ones."""
    for subject in range(1, 7):
        for number in range(1, 4):
            image = 0.3 * rng.random((30, 20) if subject % 2 else (20, 60)) + 0.1
            mask = numpy.zeros(image.shape, bool)
            mask[6 + subject:14 + subject, 2 + number:12 + number] = True
            image[mask] += 0.4
            write(tmp_path / 'data', f'{subject}_{number}', image, mask)
    return tmp_path / 'data'


def test_a_reader_fits_image_and_mask_alike(data):
    samples = find_samples(data)
    for fit in FITS:
        reader = Reader((16, 24), fit=fit)
        for sample in samples[2:4]:
            image, mask = (numpy.array(Image.open(path)) for path in (sample.image_path, sample.mask_paths[0]))
            small, small_mask = reader.read(sample)
            numpy.testing.assert_allclose(small / 65535, fitted((image / 255).astype('float32'), (16, 24), fit), atol=1e-5)
            numpy.testing.assert_array_equal(small_mask, fitted(mask // 255, (16, 24), fit, by=resize_mask))
            assert reader.place(sample) == places(image.shape, (16, 24), fit)[1]


def test_black_around_an_image_counts_neither_in_the_statistics_nor_as_an_oddity(tmp_path, rng):
    for number in range(6):
        image = numpy.clip(rng.normal(0.7, 0.1, (16, 24)), 0, 1)
        write(tmp_path / 'data', f'{number}_1', image, numpy.indices(image.shape)[0] > (3 if number == 2 else 12))
    samples = find_samples(tmp_path / 'data')
    exact, padded = Reader((16, 24)), Reader((16, 96), fit='pad')
    mean, std = intensity_statistics(samples, exact)
    assert intensity_statistics(samples, padded) == (mean, std) and mean == pytest.approx(0.7, abs=0.02)
    filtered = Filtered(Reader((16, 96), fit='pad'), lambda image: image)
    assert intensity_statistics(samples, filtered) == (mean, std)
    # Of the padded masks none covers more than a quarter; the one that is inverted is still told, and no image is dark.
    for reader in exact, padded, filtered:
        assert data_warning(samples, reader, mean, std) == 'WARNING: 1 of 6 masks are foreground for more than half (inverted?): 2_1'
    segmenter = Segmenter(UNet(base_channels=2, depth=1, input_mean=mean, input_std=std, rng=rng), (16, 96), fit='pad')
    image = numpy.clip(rng.normal(0.7, 0.1, (32, 48)), 0, 1)
    assert segmenter.oddity(segmenter.prepare(image), image.shape) == ''
    assert segmenter.oddity(segmenter.prepare(image / 8), image.shape) == 'much darker'


def test_cropping_says_once_how_much_foreground_it_cuts_away(tmp_path, data, main, capsys):
    samples = find_samples(data)
    reader = Reader((16, 24), fit='crop')
    lost = {sample.name: reader.lost(sample) for sample in samples}
    # Of 60 columns those from 15 to 44 are seen, of 30 rows those from 8 to 20: foreground begins at column 2 + number, row 6 + subject.
    assert {name: share for name, share in lost.items() if name[0] in '24'} == {f'{s}_{n}': 1.0 for s in (2, 4) for n in (1, 2, 3)}
    assert lost['1_1'] == pytest.approx(1 / 8) and lost['3_1'] == 0
    said = crop_warning(samples, Filtered(reader, lambda image: image))
    hit = sum(share > 0 for share in lost.values())
    assert said.startswith(f'WARNING: --fit crop cuts foreground away in {hit} of 18 images, of the most in 2_1 (100% of it), 2_2 (100% of it)')
    assert crop_warning([sample for sample in samples if sample.subject == '3'], reader) == ''
    for options in [], ['--folds', 2]:
        main('--data', data, *TINY, '--fit', 'crop', '--epochs', 1, '--out', tmp_path / f'run{len(options)}', *options)
        before_training = capsys.readouterr().out.partition('epoch')[0]
        assert before_training.count('--fit crop cuts foreground away in') == 1
        assert said in (tmp_path / f'run{len(options)}' / 'summary.txt').read_text()


def test_a_run_is_what_its_fit_is_from_training_to_prediction(tmp_path, data, main, capsys):
    main('--data', data, *TINY, '--fit', 'pad', '--median-filter', 3, '--epochs', 1, '--out', tmp_path / 'run')
    assert json.loads((tmp_path / 'run' / 'config.json').read_text())['fit'] == 'pad'
    for name in 'best.npz', 'last.npz':
        assert load_checkpoint(tmp_path / 'run' / name)[1]['fit'] == 'pad'
    main('--resume', tmp_path / 'run', '--fit', 'pad')
    with pytest.raises(SystemExit):
        main('--resume', tmp_path / 'run', '--fit', 'crop')
    assert '--fit is crop, but' in capsys.readouterr().err

    segmenter, extra = Segmenter.from_file(tmp_path / 'run' / 'last.npz')
    assert segmenter.fit == 'pad'
    reader = Filtered(Reader((16, 24), fit='pad'), lambda image: median_filter(image, 3))
    for sample in find_samples(data)[2:4]:                                              # one of either shape
        image = numpy.array(Image.open(sample.image_path))
        numpy.testing.assert_allclose(segmenter.prepare(image), reader.read(sample)[0] / 65535, atol=2e-5)

    example('predict').main(['--model', str(tmp_path / 'run' / 'last.npz'), '--input', str(data), '--output', str(tmp_path / 'out'), '--probabilities',
                             '--uncertainty', '--threshold', '0.3'])
    said = capsys.readouterr().out
    assert '16x24, fit pad' in said and 'mean training mask' in said
    segmenter.settings = replace(segmenter.settings, threshold=0.3)
    for name in '1_1', '2_1':
        image = numpy.array(Image.open(data / f'{name}.png'))
        probability, = segmenter.probabilities([image])
        written = numpy.array(Image.open(tmp_path / 'out' / f'{name}_probability.png'))
        assert probability.shape == image.shape and abs(written / 65535 - probability).max() < 1e-4
        numpy.testing.assert_array_equal(numpy.array(Image.open(tmp_path / 'out' / f'{name}_mask.png')) > 0, segmenter.mask(probability))
        expected = unfitted(extra['mean_training_mask'], image.shape, 'pad', by=resize_mask)
        numpy.testing.assert_array_equal(example('predict').mean_mask_at(extra)(image.shape), expected)


def test_the_preview_of_augmentation_shows_the_fit(tmp_path, data, main):
    wide = tmp_path / 'wide'
    for path in data.glob('2_*'):
        wide.mkdir(exist_ok=True)
        path.rename(wide / path.name)
    shades = {}
    for fit in 'pad', 'squeeze':
        main('--data', wide, '--size', '32x32', '--fit', fit, '--augment', 'none', '--horizontal-flip', '--preview-augmentation', tmp_path / f'{fit}.png')
        picture = numpy.array(Image.open(tmp_path / f'{fit}.png').convert('L'))
        shades[fit] = (picture < 8).mean()
    assert shades['pad'] > shades['squeeze'] + 0.3                                      # 20×60 fills a third of a square


# --- Prediction -------------------------------------------------------------------------------------------------------

class Logits(nervenet.Layer):
    """A network that takes an image for probabilities."""

    dtype = numpy.float32

    def __init__(self):
        super().__init__()
        self.children = {'head': nervenet.Conv2D(1, 1)}

    def forward(self, x):
        p = x.clip(1e-6, 1 - 1e-6)
        return numpy.log(p / (1 - p))


def test_probabilities_come_back_to_the_pixels_they_are_of(rng):
    image = rng.random((20, 30), dtype='float32')
    padded, = Segmenter(Logits(), (20, 50), fit='pad').probabilities([image])
    numpy.testing.assert_allclose(padded, image, atol=1e-5)
    cropped, = Segmenter(Logits(), (20, 20), fit='crop').probabilities([image])
    numpy.testing.assert_allclose(cropped[:, 5:25], image[:, 5:25], atol=1e-5)
    assert not cropped[:, :5].any() and not cropped[:, 25:].any()


@pytest.mark.parametrize('fit, shape, seen', [('squeeze', (20, 40), 800), ('pad', (20, 40), 1600), ('crop', (20, 40), 400), ('pad', (40, 80), 6400)])
def test_the_minimal_area_is_a_share_of_what_the_network_sees(fit, shape, seen):
    """Where it is chosen, in training, areas are counted in pictures of the network's size, with what is around an image and without what is cut off."""
    probability = numpy.zeros(shape, 'float32')
    probability.flat[:40] = 1
    for share, found in ((40 / seen - 1e-6, True), (40 / seen + 1e-6, False)):
        assert Segmenter(Logits(), (20, 20), Settings(minimal_area=share), fit=fit).mask(probability).any() == found


def test_files_say_the_fit_and_those_of_before_were_squeezed(tmp_path, rng):
    model = UNet(base_channels=2, depth=1, rng=rng)
    counts = {'thresholds': numpy.array([0.5]), 'pixels': 384, 'counts': numpy.zeros((2, 2, 1, 3, 1), 'int32')}
    for name, extra in (('before', {}), ('squeeze', {'fit': 'squeeze'}), ('pad', {'fit': 'pad'}), ('odd', {'fit': 'stretch'}), ('number', {'fit': 3})):
        nervenet.save(tmp_path / f'{name}.npz', model, size=[16, 24], held_out=counts, **extra)
    assert Segmenter.from_file(tmp_path / 'before.npz')[0].fit == 'squeeze' and Segmenter.from_file(tmp_path / 'pad.npz')[0].fit == 'pad'
    assert Segmenter.from_files([tmp_path / 'before.npz', tmp_path / 'squeeze.npz'])[0].fit == 'squeeze'
    for name in 'odd', 'number':
        with pytest.raises(CheckpointError, match=f'{name}.npz: gives .* as the way that images come to its size, expected one of pad, crop, squeeze'):
            Segmenter.from_file(tmp_path / f'{name}.npz')
    with pytest.raises(CheckpointError, match='pad.npz: its fit is pad, that of .*before.npz is squeeze'):
        Segmenter.from_files([tmp_path / 'before.npz', tmp_path / 'pad.npz'])


def test_both_ways_to_predict_count_the_minimal_area_as_training_does(tmp_path, rng):
    network = UNet(base_channels=2, depth=1, rng=rng)
    nervenet.save(tmp_path / 'model.npz', network, size=[16, 24], settings={}, fit='pad')
    (tmp_path / 'frames').mkdir()
    Image.fromarray(rng.integers(0, 256, (20, 90), dtype='uint8')).save(tmp_path / 'frames' / 'a.png')
    probability, = Segmenter.from_file(tmp_path / 'model.npz')[0].probabilities([numpy.array(Image.open(tmp_path / 'frames' / 'a.png'))])
    threshold = numpy.median(probability)
    share = (probability > threshold).sum() / (20 * 90 * 16 / 5)                        # the frame fills 5 of 16 rows
    for factor, found in ((0.99, True), (1.01, False)):
        options = ['--model', tmp_path / 'model.npz', '--device', 'cpu', '--threshold', threshold, '--minimal-area', factor * share]
        for name, where in (('predict', ['--input', tmp_path / 'frames']), ('live', ['--folder', tmp_path / 'frames', '--existing', '--frames', 1])):
            out = tmp_path / f'{name}{found}'
            example(name).main([str(option) for option in (*options, *where, '--output', out)])
            assert (numpy.array(Image.open(out / 'a_mask.png')) > 0).any() == found


def test_live_frames_are_fitted_as_in_training(tmp_path, rng, capsys):
    network = UNet(base_channels=2, depth=1, rng=rng)
    network.parameters()['head.weight'][:] *= 100
    nervenet.save(tmp_path / 'model.npz', network, size=[16, 24], settings={}, fit='crop')
    (tmp_path / 'frames').mkdir()
    Image.fromarray(rng.integers(0, 256, (20, 90), dtype='uint8')).save(tmp_path / 'frames' / 'a.png')
    example('live').main(['--model', str(tmp_path / 'model.npz'), '--folder', str(tmp_path / 'frames'), '--existing', '--frames', '1', '--device', 'cpu',
                          '--output', str(tmp_path / 'out')])
    segmenter, _ = Segmenter.from_file(tmp_path / 'model.npz')
    expected = segmenter.mask(segmenter.probabilities([numpy.array(Image.open(tmp_path / 'frames' / 'a.png'))])[0])
    numpy.testing.assert_array_equal(numpy.array(Image.open(tmp_path / 'out' / 'a_mask.png')) > 0, expected)
    assert expected.any() and not expected[:, :30].any() and not expected[:, 60:].any()


def test_synthetic_ultrasound_needs_no_fit(capsys):
    assert parse([]).fit == 'squeeze'
    with pytest.raises(SystemExit):
        parse(['--fit', 'pad'])
    assert '--fit pad has no meaning without --data' in capsys.readouterr().err


def test_resize_itself_is_as_it_was(rng):
    image = rng.random((20, 30), dtype='float32')
    numpy.testing.assert_array_equal(fitted(image, (7, 9), 'squeeze'), resize(image, (7, 9)))
    numpy.testing.assert_array_equal(unfitted(image, (45, 31), 'squeeze'), resize(image, (45, 31)))
