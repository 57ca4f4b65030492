"""examples/predict.py with a tiny network: what it reads, what it leaves out, what it says."""

import csv
import importlib.util
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy
import pytest
from PIL import Image

import nervenet
from nervenet.engine.parallel import set_threads
from nervenet.images.reading import read_image, read_mask
from nervenet.images.samples import DataError
from nervenet.study import figures
from nervenet.study.segment import Segmenter, count_masks, describe
from nervenet.study.uncertainty import Assessment, decompose, near_truth, sureness

ROOT = Path(__file__).parents[1]
MEAN, STD = 0.4, 0.2


@pytest.fixture
def job():
    specification = importlib.util.spec_from_file_location('predict', ROOT / 'examples' / 'predict.py')
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def data(tmp_path, rng):
    """A network, and three frames with masks."""
    network = nervenet.UNet(base_channels=2, depth=1, input_mean=MEAN, input_std=STD, rng=rng)
    network.parameters()['head.weight'][:] *= 100                            # so that it reacts
    nervenet.save(tmp_path / 'model.npz', network, size=[16, 24], settings={})
    (tmp_path / 'data').mkdir()
    for name in ('1_1', '1_2', '2_1'):
        frame(tmp_path / 'data' / f'{name}.png', rng)
        mask = numpy.zeros((20, 30), 'uint8')
        mask[5:9, 7:15] = 255
        Image.fromarray(mask).save(tmp_path / 'data' / f'{name}_mask.png')
    return tmp_path / 'data'


def frame(path, rng, scale=255, dtype='uint8'):
    """Write a frame whose intensities are those of training, where `scale` is white."""
    pixels = rng.normal(MEAN, 1.2 * STD, (20, 30)).clip(0, 1)               # a little more, since resizing smooths
    Image.fromarray((pixels * scale).astype(dtype)).save(path)
    return pixels


def run(job, data, *inputs, **options):
    """Predict the inputs, by default the folder, and return the rows of results.csv."""
    arguments = ['--model', data.parent / 'model.npz', '--input', *(inputs or [data]), '--output', data.parent / 'out']
    for name, value in options.items():
        arguments += [f'--{name.replace("_", "-")}', *([] if value is None else [value])]
    job.main(list(map(str, arguments)))
    return list(csv.DictReader((data.parent / 'out' / 'results.csv').read_text(encoding='utf-8').splitlines()))


def test_masks_given_by_a_pattern_are_compared_with_and_not_predicted(job, data, capsys):
    rows = run(job, data, *sorted(data.glob('*.png')), submission=data.parent / 's.csv')
    assert [row['image'] for row in rows] == ['1_1', '1_2', '2_1'] and all(row['dice'] for row in rows)
    assert [line.split(',')[0] for line in (data.parent / 's.csv').read_text().splitlines()] == ['img', '1_1', '1_2', '2_1']
    said = capsys.readouterr().out
    assert '3 of the files left out, being masks, going by name and place: 1_1_mask.png, 1_2_mask.png, 2_1_mask.png' in said
    assert 'WARNING' not in said and 'with a mask' not in said
    with pytest.raises(DataError, match='1_2_mask.png: is a mask'):
        run(job, data, data / '1_1_mask.png', data / '1_2_mask.png')


def test_results_are_those_of_images_predicted_one_by_one(job, data, rng):
    segmenter, _ = Segmenter.from_file(data.parent / 'model.npz')
    for number in range(3, 10):
        frame(data / f'2_{number}.png', rng)
    Image.fromarray(rng.integers(0, 256, (33, 41), dtype='uint8')).save(data / '2_10.tif', compression='tiff_lzw')
    (data / '2_5.png').write_bytes(b'damaged')
    rows = run(job, data, batch_size=4)
    assert [row['image'] for row in rows] == ['1_1', '1_2', '2_1', '2_3', '2_4', '2_6', '2_7', '2_8', '2_9', '2_10']
    assert {path.name for path in (data.parent / 'out').iterdir()} == {'results.csv', *(f'{row["image"]}_mask.png' for row in rows)}
    for row in rows:
        image = read_image(next(data.glob(f'{row["image"]}.*')))
        probability, = segmenter.probabilities([image])
        mask = segmenter.settings.mask(probability)
        assert 0 < mask.sum() < mask.size
        written = Image.open(data.parent / 'out' / f'{row["image"]}_mask.png')
        assert written.mode == 'L'
        numpy.testing.assert_array_equal(numpy.array(written), 255 * mask)
        dice = ''
        if (data / f'{row["image"]}_mask.png').exists():
            truth = read_mask(data / f'{row["image"]}_mask.png')
            dice = round(2 * (mask & (truth > 0)).sum() / (mask.sum() + truth.sum()), 4)
        assert row == {key: str(value) for key, value in {'image': row['image'], **describe(mask, probability), 'dice': dice}.items()}


def test_overlays_are_drawn_where_they_are_asked_for(job, data):
    run(job, data, overlays=None)
    image, truth = read_image(data / '1_1.png'), read_mask(data / '1_1_mask.png')
    mask = numpy.array(Image.open(data.parent / 'out' / '1_1_mask.png')) > 0
    numpy.testing.assert_array_equal(numpy.array(Image.open(data.parent / 'out' / '1_1_overlay.png')),
                                     numpy.array(figures.overlay(image, mask, truth, size=image.shape)))


def test_probabilities_are_written_with_16_bits(job, data):
    run(job, data, probabilities=None)
    segmenter, _ = Segmenter.from_file(data.parent / 'model.npz')
    for name in '1_1', '2_1':
        written = Image.open(data.parent / 'out' / f'{name}_probability.png')
        expected, = segmenter.probabilities([read_image(data / f'{name}.png')])
        assert written.mode == 'I;16' and abs(numpy.asarray(written) / 65535 - expected).max() < 1e-4 and expected.std() > 0.01


def test_a_mask_that_cannot_be_written_ends_it_and_leaves_nothing_half_written(job, data, monkeypatch):
    def full(image, file, *rest, **options):
        file.write(b'half')
        if '1_2' in file.name:
            raise OSError(28, 'No space left on device')

    monkeypatch.setattr(Image.Image, 'save', full)
    with pytest.raises(OSError, match='No space left'):
        run(job, data, batch_size=1)
    names = {path.name for path in (data.parent / 'out').iterdir()}
    assert '1_1_mask.png' in names <= {'1_1_mask.png', '2_1_mask.png'}
    assert not [thread for thread in threading.enumerate() if thread.name.startswith('background')]


def test_what_has_no_mask_is_counted(job, data, capsys):
    (data / '2_1_mask.png').unlink()
    assert [bool(row['dice']) for row in run(job, data)] == [True, True, False]
    assert 'These scores cover 2 of 3 images: 1 have no mask.' in capsys.readouterr().out
    os.rename(data.parent / 'out', data.parent / 'first')
    Image.fromarray(numpy.arange(600, dtype='uint16').reshape(20, 30)).save(data / '1_1_mask.png')              # smeared
    assert [bool(row['dice']) for row in run(job, data)] == [False, True, False]
    assert 'These scores cover 1 of 3 images: 1 have no mask, 1 have one and are not scored.' in capsys.readouterr().out


def test_intensities_far_from_those_of_training_are_warned_of_with_an_option_that_works(job, data, rng, capsys):
    right = run(job, data)
    assert 'WARNING' not in capsys.readouterr().out
    for path in data.glob('?_?.png'):
        Image.fromarray(numpy.array(Image.open(path)).astype('uint16') * 16).save(path)
    os.rename(data.parent / 'out', data.parent / 'first')
    dark = run(job, data)
    said = capsys.readouterr().out
    assert 'WARNING: 3 of 3 images are much darker than those the network was trained on' in said and ': 1_1, 1_2, 2_1' in said
    assert '1_1 uses few levels of its 16 bits: if it holds fewer bits, give --white 4095' in said
    os.rename(data.parent / 'out', data.parent / 'second')
    mended = run(job, data, white=4095)
    assert 'WARNING' not in capsys.readouterr().out
    confidence = [[float(row['confidence']) for row in rows] for rows in (right, dark, mended)]
    numpy.testing.assert_allclose(confidence[0], confidence[2], atol=0.01)
    assert abs(numpy.subtract(confidence[0], confidence[1])).max() > 0.02


def test_masks_that_are_mostly_foreground_are_warned_of(job, data, capsys):
    mask = Image.open(data / '1_2_mask.png')
    Image.fromarray(255 - numpy.array(mask)).save(data / '1_2_mask.png')
    run(job, data)
    said = capsys.readouterr().out
    assert 'WARNING: 1 of 3 masks are foreground for more than half (inverted?): 1_2_mask.png' in said


def test_names_and_terminals_that_are_not_utf8_end_no_prediction(data, rng):
    name = os.fsdecode(b'M\xfcller_\xc3\xa9_1')
    try:
        frame(data / f'{name}.png', rng)
    except OSError:
        pytest.skip('this file system refuses such names')
    (data / '3_1.jp2').write_bytes(b'')
    (data / f'{name}.jp2').write_bytes(b'')
    done = subprocess.run([sys.executable, ROOT / 'examples' / 'predict.py', '--model', data.parent / 'model.npz', '--input', data,
                           '--output', data.parent / 'out', '--device', 'cpu'], capture_output=True, check=False,
                          env={**os.environ, 'PYTHONPATH': str(ROOT), 'PYTHONIOENCODING': 'ascii', 'PYTHONUTF8': '0'})
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((data.parent / 'out' / 'results.csv').read_text(encoding='utf-8').splitlines()))
    assert [row['image'] for row in rows] == ['1_1', '1_2', '2_1', 'M\\xfcller_é_1']
    assert all((data.parent / 'out' / f'{row["image"]}_mask.png').exists() for row in rows)
    assert b'files of other formats (3_1.jp2, M\\udcfcller_\\xe9_1.jp2)' in done.stdout


def test_an_image_beyond_the_limit_of_pixels_costs_one_line(data):
    script = 'from PIL import Image; Image.MAX_IMAGE_PIXELS = 500; import sys, predict; predict.main(sys.argv[1:])'
    arguments = '--model', data.parent / 'model.npz', '--input', data / '1_1.png', '--output', data.parent / 'out'
    done = subprocess.run([sys.executable, '-c', script, *arguments], capture_output=True, text=True, check=False,
                          env={**os.environ, 'PYTHONPATH': f'{ROOT}{os.pathsep}{ROOT / "examples"}'})
    line, last = done.stderr.strip().splitlines()
    assert line.startswith('skipped: ') and '1_1.png: has more than 500 pixels' in line and '1 of 1 images skipped' in last


def ensemble(data, rng, *trained_on, pattern=None):
    """Write a model file for each tuple of subjects that a network was trained on."""
    images, masks = rng.random((2, 16, 24, 1), dtype='float32'), (rng.random((2, 16, 24, 1)) < 0.3).astype('float32')
    for number, subjects in enumerate(trained_on, 1):
        network = nervenet.UNet(base_channels=2, depth=1, input_mean=MEAN, input_std=STD, rng=number)
        network.parameters()['head.weight'][:] *= 100
        (data.parent / 'cv' / f'fold_{number}').mkdir(parents=True)
        nervenet.save(data.parent / 'cv' / f'fold_{number}' / 'last.npz', network, size=[16, 24], settings={}, training_subjects=list(subjects),
                      reading={'subject_pattern': pattern}, held_out=count_masks(network.eval(), lambda: [(images, masks)]))
    return data.parent / 'cv'


@pytest.mark.parametrize('pattern', [None, '^(.)_', '(?P<subject>.)_(.)'])
def test_a_subject_is_predicted_by_the_networks_that_have_not_seen_it(pattern, job, data, rng, capsys):
    folder = ensemble(data, rng, ['1'], ['2'], ['1', '2'], pattern=pattern)
    job.main([*map(str, ['--model', folder, '--input', data, '--output', data.parent / 'out', '--threshold', 0.5, '--no-flip-average',
                         '--minimal-area', 0])])
    said = capsys.readouterr().out
    assert '3 of 3 images with a mask are of subjects, by their names, that some of the 3 networks were trained or chosen on' in said
    for name, fold in ('1_1', 2), ('1_2', 2), ('2_1', 1):
        segmenter, _ = Segmenter.from_file(folder / f'fold_{fold}' / 'last.npz', threshold=0.5, flip_average=False, minimal_area=0)
        expected = segmenter.probabilities([read_image(data / f'{name}.png')])[0] > 0.5
        mask = numpy.asarray(Image.open(data.parent / 'out' / f'{name}_mask.png')) > 0
        assert numpy.array_equal(mask, expected)


def test_who_was_chosen_on_is_no_stranger(job, data, rng, capsys):
    path = ensemble(data, rng, ['3'], ['2']) / 'fold_1' / 'last.npz'
    network, extra = nervenet.load_checkpoint(path)
    nervenet.save(path, network, **extra, inner_subjects=['1'])
    rows = list(run_with(job, data, path, 'alone'))
    assert '2 of 3 are of subjects, by their names, that the network was trained or chosen on' in capsys.readouterr().out and all(row['dice'] for row in rows)
    rows = list(run_with(job, data, path.parents[1], 'both'))
    assert '3 of 3 images with a mask are of subjects, by their names, that some of the 2 networks were trained or chosen on' in capsys.readouterr().out


def test_what_all_networks_have_seen_is_predicted_and_not_scored(job, data, rng, capsys):
    folder = ensemble(data, rng, ['1', '2'], ['1'])
    rows = list(run_with(job, data, folder, 'out'))
    assert [bool(row['dice']) for row in rows] == [False, False, True] and len(rows) == 3
    assert '2 are of subjects that all of them were trained or chosen on: predicted by all, and not scored' in capsys.readouterr().out
    rows = list(run_with(job, data, folder / 'fold_2' / 'last.npz', 'alone'))
    assert all(row['dice'] for row in rows)
    assert '2 of 3 are of subjects, by their names, that the network was trained or chosen on: these scores are flattered' in capsys.readouterr().out


def run_with(job, data, model, out, *options):
    job.main([*map(str, ['--model', model, '--input', data, '--output', data.parent / out, *options])])
    return csv.DictReader((data.parent / out / 'results.csv').read_text(encoding='utf-8').splitlines())


@pytest.mark.parametrize('processes', [1, 2])
def test_uncertainty_is_drawn_told_and_judged(processes, job, data, rng, capsys):
    """Each image by the networks that have not seen its subject: the first and third are of others for 2, the second for 1."""
    folder = ensemble(data, rng, ['1'], ['2'], ['1'])
    with set_threads(processes):
        rows = list(run_with(job, data, folder, 'out', '--uncertainty', '--flip-average', '--batch-size', 2, '--threshold', 0.4))
    said = capsys.readouterr().out
    segmenter, _ = Segmenter.from_files(sorted(folder.glob('*/last.npz')), flip_average=True, threshold=0.4)
    assessment = Assessment()
    assert [row['image'] for row in rows] == ['1_1', '1_2', '2_1']
    for row in rows:
        image, truth = read_image(data / f'{row["image"]}.png'), read_mask(data / f'{row["image"]}_mask.png')
        samples, = segmenter.samples([segmenter.prepare(image)], (1,) if row['image'][0] == '1' else (0, 2))
        probability = segmenter.restore(samples.mean(axis=0), image.shape)
        mask = segmenter.mask(probability)
        numpy.testing.assert_array_equal(numpy.asarray(Image.open(data.parent / 'out' / f'{row["image"]}_mask.png')) > 0, mask)
        agreement = sureness(samples, segmenter.settings.mask)
        assert float(row['sureness']) == round(agreement, 4) and float(row['dice']) == round(2 * (mask & truth).sum() / (mask.sum() + truth.sum()), 4)
        mean, total, _, information = (segmenter.restore(values.astype('float32'), image.shape) for values in decompose(samples))
        assessment.update(row['image'][0], round(agreement, 4), 2 * (mask & truth).sum() / (mask.sum() + truth.sum()),
                          near_truth(mask, truth, 10, probability=probability, mean=mean, total=total, information=information))
        shown = numpy.asarray(Image.open(data.parent / 'out' / f'{row["image"]}_uncertainty.png'))
        picture = numpy.round(image * 255).astype('uint8')
        panels = [figures.overlay(picture, mask, truth)] + [figures.heat(picture, values.clip(0), largest=numpy.log(2)) for values in (total, information)]
        expected = figures.grid([panels], column_titles=['prediction', 'not sure: entropy', 'disagreement: mutual information'])
        numpy.testing.assert_array_equal(shown, numpy.asarray(expected))
    for line in assessment.lines((1, 0.9, 0.8, 0.5)):
        assert line in said
    assert 'mean of samples: expected calibration error' in said and 'area under the ROC for wrong pixels there: entropy' in said
    with Image.open(data.parent / 'out' / 'calibration.png') as shown:
        assert shown.width > 700
    (data / '1_1_mask.png').unlink(), (data / '1_2_mask.png').unlink(), (data / '2_1_mask.png').unlink()
    rows = list(run_with(job, data, folder / 'fold_1' / 'last.npz', 'one', '--uncertainty'))
    assert all(0 <= float(row['sureness']) <= 1 and not row['dice'] for row in rows) and 'surest' not in capsys.readouterr().out
    assert not (data.parent / 'one' / 'calibration.png').exists()


def test_dropout_is_kept_on_only_where_there_is_some(job, data, rng, tmp_path, capsys):
    settings = dict(size=[16, 24], settings={'temperature': 1.5})
    for p in (0.0, 0.5):
        nervenet.save(tmp_path / f'{p}.npz', nervenet.UNet(base_channels=2, depth=1, dropout=p, rng=rng), **settings)
    with pytest.raises(DataError, match='0.0.npz was trained without dropout, so there is none to keep on; leave --dropout-samples out, or'):
        run_with(job, data, tmp_path / '0.0.npz', 'none', '--uncertainty', '--dropout-samples', 4)
    assert not (tmp_path / 'none').exists()
    row, *_ = run_with(job, data, tmp_path / '0.5.npz', 'some', '--uncertainty', '--dropout-samples', 4)
    segmenter, _ = Segmenter.from_file(tmp_path / '0.5.npz')
    samples, = segmenter.dropout_samples([segmenter.prepare(read_image(data / f'{row["image"]}.png'))], 4)
    assert float(row['sureness']) == round(sureness(samples, segmenter.settings.mask), 4) and len(samples) == 4
    for options, said in ((['--dropout-samples', 4], 'no meaning without --uncertainty'), (['--uncertainty', '--dropout-samples', 1], 'expected 2 or more')):
        with pytest.raises(SystemExit):
            run_with(job, data, tmp_path / '0.5.npz', 'not', *options)
        assert said in capsys.readouterr().err
