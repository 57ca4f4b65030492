"""The main job, as it is called from a shell."""

import csv
import io
import json
import os
import shutil
import signal
import sys
from dataclasses import asdict

import numpy
import pytest
from PIL import Image

import nervenet
from helpers import TINY, assert_same_run, content, example, run_example, start_example, stopped_after, write_pairs
from nervenet import UNet
from nervenet.images.data import Loader, Reader
from nervenet.images.samples import DataError, find_samples
from nervenet.networks import NETWORKS
from nervenet.study.claims import claim
from nervenet.study.fit import PlateauSchedule
from nervenet.study.run_folder import read_config
from nervenet.study.segment import Segmenter, Settings, count_masks, score


def test_main_job_trains_and_leaves_a_run_folder(tmp_path, rng):
    write_pairs(tmp_path / 'data' / 'train', rng)
    done = run_example('train_unet.py', '--data', tmp_path / 'data', '--size', '15x24', '--base-channels', 2, '--depth', 2, '--epochs', 2,
                       '--loss', 'dice+bce', '--optimizer', 'adamw', '--out', tmp_path / 'run')
    assert done.returncode == 0, done.stderr
    assert 'size: 15x24 becomes 16x24, a multiple of 2^depth = 4' in done.stdout
    for part in ('training:    8 images of 2 subjects', 'validation:  4 images of 1 subject\n', 'empty mask', 'mean training mask',
                 '2/2', 'dicecoefs: ['):
        assert part in done.stdout
    assert {path.name for path in (tmp_path / 'run').iterdir()} >= {
        'config.json', 'history.csv', 'best.npz', 'last.npz', 'summary.txt'}
    config = json.loads((tmp_path / 'run' / 'config.json').read_text())
    assert set(config['training_subjects']).isdisjoint(config['validation_subjects'])
    assert nervenet.load(tmp_path / 'run' / 'last.npz').config['input_std'] > 0
    averaged = json.loads((tmp_path / 'run' / 'settings.json').read_text())['last.npz']['flip average']
    last, samples = nervenet.load(tmp_path / 'run' / 'last.npz'), find_samples(tmp_path / 'data')
    validation = Loader([sample for sample in samples if sample.subject in config['validation_subjects']], Reader((16, 24)), 8)
    assert averaged == score(last, validation.epoch(0), Settings(flip_average=True))
    assert f'mirrored image\n\naccuracies: [{averaged["accuracy"]:.4f}]' in (tmp_path / 'run' / 'summary.txt').read_text()

    # What was trained predicts: a mask of the image's own size for each image, a bad file is skipped and told.
    (tmp_path / 'data' / 'train' / '9_1.tif').write_bytes(b'II*')
    predicted = run_example('predict.py', '--model', tmp_path / 'run' / 'best.npz', '--input', tmp_path / 'data', '--output', tmp_path / 'masks',
                            '--submission', tmp_path / 'submission.csv')
    assert predicted.returncode == 1 and 'Traceback' not in predicted.stderr
    assert 'skipped: ' in predicted.stderr and '1 of 13 images skipped or not scored: 9_1' in predicted.stderr
    assert '12 images predicted' in predicted.stdout and 'mean training mask' in predicted.stdout
    mask = numpy.array(Image.open(tmp_path / 'masks' / '1_1_mask.png'))
    assert mask.shape == (24, 36) and set(numpy.unique(mask)) <= {0, 255} and not list((tmp_path / 'masks').glob('*overlay*'))
    results = list(csv.DictReader(io.StringIO((tmp_path / 'masks' / 'results.csv').read_text())))
    assert int(results[0]['area']) == (mask > 0).sum() and len(results) == 12 and 0 <= float(results[0]['dice']) <= 1
    assert len((tmp_path / 'submission.csv').read_text().splitlines()) == 13

    # A mask that cannot be read keeps an image from being scored, not from being predicted; nothing is overwritten.
    Image.fromarray(rng.integers(0, 255, (24, 36), dtype='uint8')).save(tmp_path / 'data' / 'train' / '1_1_mask.tif')
    options = '--model', tmp_path / 'run' / 'best.npz', '--input', tmp_path / 'data'
    smeared = run_example('predict.py', *options, '--output', tmp_path / 'smeared', '--submission', tmp_path / 'submission.csv')
    assert smeared.returncode == 1 and 'submission.csv: exists already' in smeared.stderr and not (tmp_path / 'smeared').exists()
    smeared = run_example('predict.py', *options, '--output', tmp_path / 'smeared')
    assert smeared.returncode == 1 and 'predicted, but not scored: ' in smeared.stderr and '--mask-threshold' in smeared.stderr
    assert '12 images predicted' in smeared.stdout and (tmp_path / 'smeared' / '1_1_mask.png').exists()
    scored = run_example('predict.py', *options, '--output', tmp_path / 'scored', '--mask-threshold', 128)
    assert 'predicted, but not scored' not in scored.stderr and 'skipped' in scored.stderr

    looked = run_example('look_inside.py', '--model', tmp_path / 'run' / 'best.npz', '--image', tmp_path / 'data' / 'train' / '1_1.tif',
                         '--output', tmp_path / 'look', '--pixel', '3,4')
    assert looked.returncode == 0, looked.stderr
    assert 'pixel (3, 4)' in looked.stdout
    assert {path.name for path in (tmp_path / 'look').iterdir()} == {'stages.png', 'joins.png', 'depends.png'}


def test_main_job_stopped_by_a_signal_exits_130_and_goes_on_to_the_same_end(tmp_path, rng, main):
    write_pairs(tmp_path / 'data', rng)
    options = ['--data', tmp_path / 'data', *TINY, '--epochs', 20, '--batch-size', 2, '--dropout', 0.2, '--augment', 'default',
               '--inner-share', 0.4]
    main(*options, '--out', tmp_path / 'whole')
    for number in signal.SIGINT, signal.SIGTERM:
        run = tmp_path / str(int(number))
        process = start_example('train_unet.py', *options, '--out', run)
        said = next((line for line in process.stdout if line.startswith('2/20')), None)     # None if it ended before
        process.send_signal(number)
        _, error = process.communicate()
        assert said, error
        assert process.returncode == 130 and 'Traceback' not in error, error
        assert 'stopping after this batch; once more to stop at once' in error and f'train_unet.py --resume {run}' in error
        assert 2 <= nervenet.load_checkpoint(run / 'last.npz')[1]['epoch'] < 20
        main('--resume', run)
        assert_same_run(run, tmp_path / 'whole')
        for name in ('summary.txt', 'settings.json', 'predictions.png', 'curves.png', 'config.json'):
            assert (run / name).read_bytes() == (tmp_path / 'whole' / name).read_bytes(), name


def test_resume_refuses_other_options_and_changed_images_in_one_line(tmp_path, rng, main, capsys):
    write_pairs(tmp_path / 'data', rng)
    main('--data', tmp_path / 'data', *TINY, '--epochs', 1, '--out', tmp_path / 'run')
    main('--resume', tmp_path / 'run', '--epochs', 1, '--size', '15x24', '--device', 'auto', '--out', tmp_path / 'run')     # the same
    for arguments, message in (['--batch-size', 3], '--batch-size is 3, but {}/config.json has 8'), (['--norm', 'none'], 'is None, but {}'), (
            ['--depth', 1], '--depth is 1, but {}/config.json has 2'), (['--out', 'x'], '--resume {} goes on in that folder, --out is x'):
        with pytest.raises(SystemExit):
            main('--resume', tmp_path / 'run', *arguments)
        assert message.format(tmp_path / 'run') in capsys.readouterr().err.splitlines()[-1]
    for suffix in '', '_mask':
        (tmp_path / 'data' / f'1_1{suffix}.tif').unlink()
    with pytest.raises(ValueError, match='config.json: the baselines are others now; have images or masks changed. Bring them back, or start a new run'):
        main('--resume', tmp_path / 'run')
    with pytest.raises(FileNotFoundError, match='no run to resume'):
        main('--resume', tmp_path / 'missing')
    path = tmp_path / 'run' / 'config.json'
    config = json.loads(path.read_text())
    for name, value, message in (('size', 3, "config.json: argument --size: '3' is not of the form HxW"),
                                 ('loss', 'x', "argument --loss: invalid choice: 'x'"),
                                 ('data', 3, 'no such folder; if the images lie elsewhere now: --resume .* --data DIR'),
                                 ('epochs', 0, "argument --epochs: '0' is not a whole"),
                                 ('batch_size', 'x', "argument --batch-size: 'x' is not a whole"),
                                 ('batch_size', None, 'config.json: lacks a value of batch_size'),
                                 ('size', None, 'config.json: lacks a value of size')):
        path.write_text(json.dumps({**config, name: value}))
        with pytest.raises(ValueError, match=message):
            main('--resume', tmp_path / 'run')


def test_a_run_goes_on_when_its_data_have_moved(tmp_path, rng, main, monkeypatch):
    write_pairs(tmp_path / 'data', rng)
    options = ['--data', tmp_path / 'data', *TINY, '--epochs', 2]
    main(*options, '--out', tmp_path / 'whole')
    with stopped_after(1, main, monkeypatch):
        main(*options, '--out', tmp_path / 'run')
    (tmp_path / 'data').rename(tmp_path / 'moved')
    with pytest.raises(ValueError, match='data: no such folder'):
        main('--resume', tmp_path / 'run')
    main('--resume', tmp_path / 'run', '--data', tmp_path / 'moved')
    assert_same_run(tmp_path / 'run', tmp_path / 'whole')


def test_folders_that_cannot_be_made_and_files_that_are_folders_are_told_in_one_line(tmp_path, rng):
    write_pairs(tmp_path / 'data', rng)
    (tmp_path / 'file').write_text('in the way')
    for name, arguments, message in (
            ('train_unet.py', ['--data', tmp_path / 'data', '--out', tmp_path / 'file' / 'run'], 'cannot be made a folder (Not a directory); choose another --out'),
            ('train_unet.py', ['--data', tmp_path / 'data', '--out', tmp_path / 'file'], 'cannot be made a folder (File exists); choose another --out'),
            ('train_unet.py', ['--data', tmp_path / 'data', '--folds', 2, '--split', tmp_path, '--out', tmp_path / 'run'], f'{tmp_path}: cannot be read (Is a directory)'),
            ('train_unet.py', ['--size', '3'], "'3' is not of the form HxW"),
            ('predict.py', ['--model', 'X', '--input', 'X', '--output', 'X', '--mask-threshold', 'nan'], "'nan' is not a positive number"),
            ('predict.py', ['--model', tmp_path, '--input', tmp_path, '--output', tmp_path / 'masks'], f'{tmp_path}: is a folder')):
        done = run_example(name, *arguments)
        assert done.returncode != 0 and message in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
        assert 'Errno' not in done.stderr and not (tmp_path / 'run').exists()


def test_the_main_job_runs_on_a_device_and_goes_on_elsewhere(gpu, tmp_path, rng, main, capsys, monkeypatch):
    write_pairs(tmp_path / 'data', rng)
    # Gradient descent: Adam makes steps of full size of gradients that are nothing but rounding.
    options = ['--data', tmp_path / 'data', *TINY[:-2], '--epochs', 3, '--inner-share', 0.4, '--augment', 'default', '--speckle-range', 0,
               '--optimizer', 'sgd', '--learning-rate', 0.05]
    main(*options, '--device', 'cpu', '--out', tmp_path / 'host')
    options += ['--precision', 'fp32']
    main(*options, '--device', 'gpu', '--out', tmp_path / 'device')
    assert 'device: gpu (stand-in, fp32)' in capsys.readouterr().out

    for first, then in ('gpu', 'cpu'), ('cpu', 'gpu'):
        run = tmp_path / first
        with stopped_after(2, main, monkeypatch):
            main(*options, '--device', first, '--out', run)
        main('--resume', run, '--device', then, '--precision', 'fp32')
        assert f'So far the run was computed on the {first} in fp32, now it is on the {then} in fp32, which' in capsys.readouterr().out
    ends = [nervenet.load(tmp_path / name / 'last.npz').parameters() for name in ('host', 'device', 'gpu', 'cpu')]
    for other in ends[1:]:
        for name in other:
            numpy.testing.assert_allclose(other[name], ends[0][name], rtol=0, atol=1e-3, err_msg=name)
    start = UNet(base_channels=2, depth=2, rng=numpy.random.default_rng(0)).parameters()
    assert max(abs(start[name] - ends[0][name]).max() for name in start) > 0.03

    predict_job = example('predict')
    for device, precision, compute_type in ('cpu', 'fp32', 1), ('gpu', 'fp32', 1), ('gpu', 'tf32', gpu.TF32):
        gpu.ledger.__init__()
        predict_job.main(list(map(str, ['--model', tmp_path / 'device' / 'last.npz', '--input', tmp_path / 'data', '--device', device,
                                        '--precision', precision, '--output', tmp_path / f'masks on {device} in {precision}'])))
        assert (len(gpu.ledger.products) > 10) == (device == 'gpu') and gpu.compute_type == compute_type      # 1 is of the probe
    masks = [numpy.stack([numpy.asarray(Image.open(path)) for path in sorted((tmp_path / f'masks on {where}').glob('*_mask.png'))])
             for where in ('cpu in fp32', 'gpu in fp32', 'gpu in tf32')]
    assert masks[0].any() and all((masks[0] != other).mean() < 0.01 for other in masks[1:])


def test_a_run_remembers_where_it_is_computed_and_how(gpu, tmp_path, rng, main, capsys, monkeypatch):
    write_pairs(tmp_path / 'data', rng)
    config = tmp_path / 'run' / 'config.json'
    given, fit = [], main.module.fit

    def watched(model, loss, optimizer, training, validation, epochs, run, schedule, max_norm, inner, *rest):
        given.append([model.device, training.device, validation.device, inner.device])
        return fit(model, loss, optimizer, training, validation, epochs, run, schedule, max_norm, inner, *rest)

    monkeypatch.setattr(main.module, 'fit', watched)
    steps = [  # data, options, what is stored then, what is said of it
        ('data', ['--data', tmp_path / 'data', *TINY[:-2], '--epochs', 4, '--inner-share', 0.4, '--out', tmp_path / 'run'],
         ('gpu', 'tf32'), None),
        ('moved', ['--resume', tmp_path / 'run', '--data', tmp_path / 'moved'], ('gpu', 'tf32'), None),
        ('moved', ['--resume', tmp_path / 'run', '--device', 'cpu'], ('cpu', 'fp32'), 'on the gpu in tf32, now it is on the cpu in fp32'),
        ('moved', ['--resume', tmp_path / 'run', '--device', 'auto'], ('cpu', 'fp32'), None)]
    before = tmp_path / 'data'
    for epoch, (data, options, (device, precision), said) in enumerate(steps, 1):
        before = before.rename(tmp_path / data)
        with stopped_after(epoch, main, monkeypatch):
            main(*options)
        out, stored = capsys.readouterr().out, json.loads(config.read_text())
        assert (stored['device'], stored['precision'], stored['data']) == (device, precision, str(before))
        assert said in out if said else 'not bit for bit' not in out
        assert given.pop() == [device] * 4
    stored = json.loads(config.read_text())
    stored.pop('precision')                                 # as before there was a choice
    config.write_text(json.dumps(stored))
    main('--resume', tmp_path / 'run')
    assert 'not bit for bit' not in capsys.readouterr().out and (tmp_path / 'run' / 'summary.txt').exists()

    main('--data', before, *TINY[:-2], '--epochs', 1, '--inner-share', 0.4, '--out', tmp_path / 'other')
    monkeypatch.setattr(gpu, 'capability', '75')
    with pytest.raises(RuntimeError, match='this GPU has compute capability 7.5; expected a GPU of 8.0 or higher'):
        main('--resume', tmp_path / 'other')


def test_folds_trained_side_by_side_in_several_processes_equal_those_trained_by_one(tmp_path, rng, main, capsys):
    write_pairs(tmp_path / 'data', rng, subjects=4, images=3)
    options = ['--data', tmp_path / 'data', *TINY, '--epochs', 2, '--folds', 3]
    for process in [start_example('train_unet.py', *options, '--out', tmp_path / 'beside', '--fold', fold) for fold in (1, 3)]:
        _, error = process.communicate()
        assert process.returncode == 0, error
    assert (tmp_path / 'beside' / 'summary.txt').read_text().startswith('2 of 3 folds; not complete yet: 2\n')
    with pytest.raises(FileExistsError, match='go on with the cross-validation in it: --resume'):
        main(*options, '--out', tmp_path / 'beside')
    with pytest.raises(ValueError, match='one fold of a cross-validation: give --resume .* --fold 3'):
        main('--resume', tmp_path / 'beside' / 'fold_3')
    with pytest.raises(ValueError, match='epochs is 2 there and 3 now'):
        main(*options, '--out', tmp_path / 'beside', '--fold', 2, '--epochs', 3)

    main.module.train, train = lambda *args, **kwargs: pytest.fail('a complete fold was trained again'), main.module.train
    main('--resume', tmp_path / 'beside', '--fold', 1)
    main.module.train = train
    (tmp_path / 'beside' / 'fold_2').mkdir()                                            # killed before it wrote anything
    release = claim(tmp_path / 'beside' / 'fold_2')
    main('--resume', tmp_path / 'beside')
    assert 'skipped: ' in capsys.readouterr().out
    with pytest.raises(BlockingIOError):
        main('--resume', tmp_path / 'beside', '--fold', 2)
    release()
    main('--resume', tmp_path / 'beside')
    text = (tmp_path / 'beside' / 'summary.txt').read_text()
    assert text.startswith('3 of 3 folds\n') and '(hard Dice, pooled)' in text and text in capsys.readouterr().out

    main(*options, '--out', tmp_path / 'alone', '--split', tmp_path / 'beside' / 'split.json')
    assert (tmp_path / 'alone' / 'summary.txt').read_text() == text
    configs = [read_config(tmp_path / 'alone' / f'fold_{fold}') for fold in (1, 2, 3)]
    assert sorted(sum((config['validation_subjects'] for config in configs), [])) == ['1', '2', '3', '4']
    for fold, config in enumerate(configs, 1):
        assert set(config['training_subjects']).isdisjoint(config['validation_subjects'])
        assert_same_run(tmp_path / 'alone' / f'fold_{fold}', tmp_path / 'beside' / f'fold_{fold}')


def test_a_run_that_goes_on_has_the_rate_of_its_plateau(tmp_path, rng, main, monkeypatch):
    """The rate follows from the rows that were stored, and is that of a run that never stopped."""
    monkeypatch.setattr(PlateauSchedule.__init__, '__defaults__', (0, 0.2, 1, 0))               # warmup_steps, factor, patience, begun
    write_pairs(tmp_path / 'data', rng)
    options = '--data', tmp_path / 'data', *TINY, '--epochs', 8, '--inner-share', 0.5, '--schedule', 'plateau', '--learning-rate', 0.5
    main(*options, '--out', tmp_path / 'whole')
    with stopped_after(3, main, monkeypatch):
        main(*options, '--out', tmp_path / 'stopped')
    main('--resume', tmp_path / 'stopped')
    rows = list(csv.DictReader((tmp_path / 'whole' / 'history.csv').read_text().splitlines()))
    rates = [float(row['learning_rate']) for row in rows]
    assert len(set(rates)) > 1 and rates == sorted(rates, reverse=True)
    assert_same_run(tmp_path / 'whole', tmp_path / 'stopped')


def test_a_split_by_image_says_that_it_leaks(tmp_path, rng, main, capsys):
    write_pairs(tmp_path / 'data', rng, subjects=2, images=4)
    main('--data', tmp_path / 'data', *TINY, '--epochs', 1, '--folds', 2, '--leaky-split-by-image', '--out', tmp_path / 'run')
    out = capsys.readouterr().out
    assert out.splitlines()[2].startswith('LEAKS: split by image')
    for path in (tmp_path / 'run', tmp_path / 'run' / 'fold_1'):
        assert (path / 'summary.txt').read_text().startswith('LEAKS: split by image')
    split = json.loads((tmp_path / 'run' / 'split.json').read_text())
    assert 'leaks' in split['by'] and len(split['folds'][0]['subjects']) == 4
    with pytest.raises(ValueError, match='is a split by image: leaks, .*; expected one by subject'):
        main('--data', tmp_path / 'data', *TINY, '--folds', 2, '--split', tmp_path / 'run' / 'split.json', '--out', tmp_path / 'new')


def test_scores_without_known_subjects_begin_with_a_warning(tmp_path, rng, main, capsys):
    write_pairs(tmp_path / 'all', rng)
    for path in list((tmp_path / 'all').iterdir()):
        folder = tmp_path / 'data' / ('masks' if path.stem.endswith('_mask') else 'images')
        folder.mkdir(parents=True, exist_ok=True)
        path.rename(folder / path.name.replace('_mask', ''))
    main('--data', tmp_path / 'data', *TINY, '--epochs', 1, '--folds', 2, '--out', tmp_path / 'run')
    assert capsys.readouterr().out.splitlines()[2].startswith('WARNING: no subject is known')
    for path in (tmp_path / 'run', tmp_path / 'run' / 'fold_2'):
        assert (path / 'summary.txt').read_text().startswith('WARNING: no subject is known')


def test_a_refused_resume_changes_nothing(tmp_path, rng, main):
    write_pairs(tmp_path / 'data', rng)
    write_pairs(tmp_path / 'other', rng, subjects=5)
    main('--data', tmp_path / 'data', *TINY, '--epochs', 1, '--folds', 2, '--fold', 1, '--out', tmp_path / 'run')
    before = {path: path.read_bytes() for path in (tmp_path / 'run').rglob('*') if path.is_file()}
    for options in (['--resume', tmp_path / 'run'], [*TINY, '--epochs', 1, '--folds', 2, '--fold', 2, '--out', tmp_path / 'run']):
        with pytest.raises(ValueError, match='split.json: no fold has subject 4'):
            main(*options, '--data', tmp_path / 'other')
    assert before == {path: path.read_bytes() for path in (tmp_path / 'run').rglob('*') if path.is_file()}


def test_preview_draws_augmented_pairs_and_stops(tmp_path, rng, main, capsys):
    write_pairs(tmp_path / 'data', rng)
    options = ['--data', tmp_path / 'data', *TINY, '--preview-augmentation', tmp_path / 'pairs.png', '--out', tmp_path / 'run']
    main(*options, '--rotation-range', 30, '--fill-mode', 'reflect')
    picture = numpy.asarray(Image.open(tmp_path / 'pairs.png'))
    columns = numpy.flatnonzero((picture != 255).any(axis=(0, 2)))
    assert (numpy.diff(columns) > 5).sum() >= 4, 'five pictures side by side'
    assert not (tmp_path / 'run').exists()
    with pytest.raises(ValueError, match='no augmentation is on; give --augment default'):
        main(*options[:-4], '--preview-augmentation', tmp_path / 'other.png', '--augment', 'none')
    with pytest.raises(ValueError, match='pairs.png exists already'):
        main(*options)
    with pytest.raises(ValueError, match='pairs.jpg is to be a picture; expected a name that ends in .png'):
        main(*options[:-4], '--preview-augmentation', tmp_path / 'pairs.jpg')
    main(*options[:-4], '--preview-augmentation', tmp_path / 'new' / 'pairs.png')
    assert (tmp_path / 'new' / 'pairs.png').exists()
    with pytest.raises(OSError, match='cannot be made a folder .*; choose another --preview-augmentation'):
        main(*options[:-4], '--preview-augmentation', tmp_path / 'pairs.png' / 'more.png')


def test_options_of_the_data_reach_training(tmp_path, rng, main):
    write_pairs(tmp_path / 'data', rng)
    for name in '1_1', '2_2', '3_1':
        Image.new('L', (36, 24)).save(tmp_path / 'data' / f'{name}_mask.tif')
    losses = []
    for number, changed in enumerate(([], ['--augment', 'none'], ['--foreground-share', '0.99'], ['--median-filter', '3'],
                                      ['--inner-share', '0.4'])):
        main('--data', tmp_path / 'data', *TINY, '--epochs', 1, *changed, '--out', tmp_path / str(number))
        losses.append(next(csv.DictReader(io.StringIO((tmp_path / str(number) / 'history.csv').read_text())))['train_loss'])
    assert len(set(losses)) == 5, losses
    assert nervenet.load_checkpoint(tmp_path / '3' / 'best.npz')[1]['median_filter'] == 3
    assert Segmenter.from_file(tmp_path / '3' / 'last.npz')[0].median_filter == 3


def test_out_of_memory_says_how_much_is_needed_and_what_lowers_it(tmp_path, rng, main, monkeypatch):
    write_pairs(tmp_path / 'data', rng)

    def fit(*args):
        raise MemoryError('Unable to allocate 3 TiB')

    monkeypatch.setattr(main.module, 'fit', fit)
    monkeypatch.setattr(UNet, 'training_memory', lambda self, shape: {(8, 16, 24, 1): 5 * 2**29}[shape])
    with pytest.raises(MemoryError, match=r'a training step on 8 images of 16x24 with --base-channels 2 and --depth 2 needs about 2.5 GiB, '
                                          r'lower --batch-size first \(Unable to allocate 3 TiB\)'):
        main('--data', tmp_path / 'data', *TINY, '--out', tmp_path / 'run')


@pytest.mark.parametrize('arguments, message', [
    (['--data', 'MISSING'], 'no such folder'), (['--data', 'DATA', '--size', '96'], 'not of the form HxW'),
    (['--data', 'DATA', '--epochs', '0'], 'whole number of at least 1'), (['--data', 'DATA', '--learning-rate', 'nan'], 'positive'),
    (['--data', 'DATA', '--dropout', '1.5'], 'is not a number from 0 up to, not including, 1'), (['--data', 'DATA', '--out', 'DATA'], 'choose another --out'),
    (['--data', 'DATA', '--validation-share', '2'], 'is not a number from 0 up to, not including, 1'), (['--data', 'DATA', '--seed=-1'], 'whole number of at least 0'),
    (['--data', 'DATA', '--depth', '60'], '--depth is 60; expected at most 12'),
    (['--data', 'DATA', '--mask-threshold', '999'], 'no training mask holds any foreground')])
def test_bad_arguments_give_one_line_and_a_failing_exit_status(arguments, message, tmp_path, rng):
    write_pairs(tmp_path / 'data', rng, subjects=2, images=2)
    places = {'MISSING': tmp_path / 'missing', 'DATA': tmp_path / 'data'}
    done = run_example('train_unet.py', *(places.get(argument, argument) for argument in arguments), '--device', 'cpu')
    assert done.returncode != 0 and 'Traceback' not in done.stderr
    assert message in done.stderr.splitlines()[-1]


@pytest.mark.parametrize('arguments, message', [
    (['--median-filter', 4], '--median-filter is 4; expected an odd size from 3 to 99'), (['--patience', 3], '--patience needs --inner-share'),
    (['--fold', 2], '--fold is 2 and --folds not given; expected --fold from 1 to --folds'), (['--split', 'X'], '--split needs --folds'),
    (['--schedule', 'plateau'], '--schedule plateau needs --inner-share'), (['--label', 1, '--mask-threshold', 9], 'give one of them'),
    (['--label', 0], "'0' is not the number of a class"), (['--test-masks', '.'], '--test-masks has no meaning without --test'),
    (['--test', '.', '--leaky-split-by-image'], '--leaky-split-by-image has no meaning with --test'),
    (['--folds', 1], '--folds is 1; expected 2 or more'),
    (['--folds', 2, '--fold', 3], '--fold is 3 and --folds 2'), (['--foreground-share', 1.5], 'is not a share between 0 and 1'),
    (['--folds', 2, '--validation-share', 0.5], '--validation-share has no meaning with --folds'),
    (['--folds', 5], '2 subjects cannot be dealt into 5 folds'), (['--rotation-range', -3], 'rotation_range is -3'),
    (['--foreground-share', 0.5], 'are to be without foreground, and there are none')])
def test_options_that_do_not_go_together_are_refused_in_one_line(arguments, message, tmp_path, rng, main, capsys):
    write_pairs(tmp_path / 'data', rng, subjects=2, images=2)
    with pytest.raises((SystemExit, ValueError)) as error:
        main('--data', tmp_path / 'data', *TINY, '--out', tmp_path / 'run', *arguments)
    said = capsys.readouterr().err.splitlines()[-1] if error.type is SystemExit else str(error.value)
    assert message in said and '\n' not in said
    assert not (tmp_path / 'run').exists()


@pytest.fixture
def no_image_is_read(monkeypatch):
    monkeypatch.setattr(Reader, 'read', lambda reader, sample: pytest.fail(f'{sample.name} was read'))


@pytest.mark.parametrize('arguments, message', [
    (['--out', 'TAKEN'], 'choose another --out'), (['--dropout', '1.5'], 'is not a number from 0'),
    (['--size', '99999x99999'], 'GiB are free'), (['--resume', 'FOREIGN'], 'no run to resume'),
    (['--out', 'FILE/run'], 'cannot be made a folder'), (['--folds', 9], '3 subjects cannot be dealt into 9 folds'),
    (['--folds', 2, '--split', 'FILE'], 'is not a split'), (['--folds', 2, '--out', 'TAKEN'], 'choose another --out'),
    (['--init', 'FILE'], 'not a readable model file'), (['--subject-pattern', '([0-9])_1'], 'finds no subject'),
    (['--folds', 3, '--fold', 2, '--out', 'CV'], 'epochs is 7 there and 200 now'),
    (['--resume', 'USED', '--data', 'DATA'], 'another process is training there')])
def test_what_can_be_refused_is_refused_before_an_image_is_read(arguments, message, tmp_path, rng, main, capsys, no_image_is_read):
    write_pairs(tmp_path / 'data', rng)
    for name in 'taken', 'foreign', 'cv', 'used':
        (tmp_path / name).mkdir()
        (tmp_path / name / 'notes.txt').write_text('mine')
    (tmp_path / 'file').write_text('mine')
    options = vars(main.module.parse(['--data', str(tmp_path / 'data')]))
    options = {name: value for name, value in options.items() if name not in ('out', 'fold', 'resume', 'preview_augmentation')}
    config = options | {'data': str(tmp_path / 'data'), 'device': 'cpu', 'precision': 'fp32'}
    (tmp_path / 'cv' / 'config.json').write_text(json.dumps(config | {'folds': 3, 'epochs': 7}))
    (tmp_path / 'used' / 'config.json').write_text(json.dumps(config))
    before = sorted(tmp_path.rglob('*'))
    release = claim(tmp_path / 'used')
    places = {name.upper(): tmp_path / name for name in ('taken', 'foreign', 'file', 'cv', 'data', 'used')} | {
        'FILE/run': tmp_path / 'file' / 'run'}
    given = [places.get(argument, argument) for argument in arguments]
    with pytest.raises((SystemExit, Exception)) as error:
        main(*([] if '--resume' in given else ['--data', tmp_path / 'data', *([] if '--out' in given else ['--out', tmp_path / 'new'])]),
             '--device', 'cpu', *given)
    release()
    said = capsys.readouterr().err if error.type is SystemExit else str(error.value)
    assert message in said and not isinstance(error.value, pytest.fail.Exception)
    assert sorted(tmp_path.rglob('*')) == before


def test_a_finished_run_is_trained_on_and_an_unfinished_one_first_to_its_end(tmp_path, rng, main, capsys, monkeypatch):
    write_pairs(tmp_path / 'data', rng)
    with stopped_after(1, main, monkeypatch):
        main('--data', tmp_path / 'data', *TINY, '--epochs', 2, '--schedule', 'cosine', '--out', tmp_path / 'run')
    with pytest.raises(SystemExit):
        main('--resume', tmp_path / 'run', '--epochs', 3)
    assert f'--epochs is 3, but {tmp_path / "run" / "config.json"} has 2, and {tmp_path / "run"} has not come to its end; ' \
           f'first train it to there: --resume {tmp_path / "run"}' in capsys.readouterr().err
    main('--resume', tmp_path / 'run')
    main('--resume', tmp_path / 'run', '--epochs', 4)
    out = capsys.readouterr().out
    assert 'Epochs 3 to 4 were added to a run of 2' in out and 'not bit for bit a run of 4 epochs' in out
    config, history = read_config(tmp_path / 'run'), nervenet.load_checkpoint(tmp_path / 'run' / 'last.npz')[1]['history']
    assert (config['epochs'], config['begun']) == (4, 2) and [row['epoch'] for row in history] == [1, 2, 3, 4]
    assert history[2]['learning_rate'] == history[0]['learning_rate'] > history[1]['learning_rate'], 'the schedule begins anew'
    assert history[3]['learning_rate'] == history[1]['learning_rate'], 'and ends as that of two epochs does'
    with pytest.raises(SystemExit):
        main('--resume', tmp_path / 'run', '--epochs', 3)
    assert '--epochs is 3, but' in capsys.readouterr().err
    before = {path.name: path.read_bytes() for path in (tmp_path / 'run').iterdir()}
    main('--resume', tmp_path / 'run')
    assert before == {path.name: path.read_bytes() for path in (tmp_path / 'run').iterdir()}


def test_a_finished_cross_validation_is_trained_on_fold_by_fold(tmp_path, rng, main, capsys):
    write_pairs(tmp_path / 'data', rng, images=2)
    options = ['--data', tmp_path / 'data', *TINY, '--folds', 2, '--out', tmp_path / 'run']
    main(*options, '--epochs', 1, '--fold', 1)
    with pytest.raises(SystemExit):
        main('--resume', tmp_path / 'run', '--epochs', 2)
    assert f'{tmp_path / "run" / "fold_2"} has not come to its end' in capsys.readouterr().err
    main('--resume', tmp_path / 'run')
    with pytest.raises(ValueError, match='epochs is 1 there and 2 now'):
        main(*options, '--epochs', 2, '--fold', 2)
    main('--resume', tmp_path / 'run', '--epochs', 2, '--fold', 2)
    assert (tmp_path / 'run' / 'summary.txt').read_text().startswith('1 of 2 folds; not complete yet: 1\n')
    main('--resume', tmp_path / 'run')
    assert (tmp_path / 'run' / 'summary.txt').read_text().startswith('2 of 2 folds\n')
    assert [(config['epochs'], config['begun']) for config in (read_config(tmp_path / 'run' / f'fold_{n}') for n in (1, 2))] == [(2, 1)] * 2


def test_a_run_can_start_from_the_network_of_a_file(tmp_path, rng, main, capsys):
    write_pairs(tmp_path / 'data', rng, subjects=6)
    main('--data', tmp_path / 'data', *TINY, '--epochs', 1, '--out', tmp_path / 'first')
    model = tmp_path / 'first' / 'best.npz'
    options = ['--data', tmp_path / 'data', '--size', '16x24', '--device', 'cpu', '--learning-rate', '1e-30', '--epochs', 1]
    capsys.readouterr()
    main(*options, '--init', model, '--out', tmp_path / 'same')                 # the same split: what is set aside was set aside then
    assert 'comes from a run on the same data' not in capsys.readouterr().out
    main(*options, '--init', model, '--validation-share', 0.6, '--out', tmp_path / 'wider')
    assert 'comes from a run on the same data that was trained on' in capsys.readouterr().out
    assert (tmp_path / 'wider' / 'summary.txt').read_text().startswith('WARNING: ') and read_config(tmp_path / 'same')['init'] == str(model)
    first, same = (nervenet.load(path).parameters() for path in (model, tmp_path / 'same' / 'last.npz'))
    assert all(numpy.array_equal(first[name], same[name]) for name in first)
    copied = tmp_path / 'copied.npz'
    copied.write_bytes(model.read_bytes())
    main(*options, '--init', copied, '--out', tmp_path / 'other')
    assert 'WARNING' not in capsys.readouterr().out, 'where it comes from is not known'
    copied.unlink()
    main('--resume', tmp_path / 'other')                # which holds all that it needs by now


def test_validation_without_foreground_is_told_before_training_and_in_the_summary(tmp_path, rng, main, capsys):
    write_pairs(tmp_path / 'data', rng)
    for image in 1, 2, 3, 4:
        Image.new('L', (36, 24)).save(tmp_path / 'data' / f'2_{image}_mask.tif')
    main('--data', tmp_path / 'data', *TINY, '--epochs', 2, '--folds', 3, '--out', tmp_path / 'run')
    warning = 'WARNING: none of the 4 validation masks holds any foreground (subjects 2): '
    out, = [text for text in capsys.readouterr().out.split('\nFold ') if warning in text]
    assert out.index(warning) < out.index('run folder:') and out.count(warning) == 2
    fold = tmp_path / 'run' / f'fold_{out[0]}'
    assert (fold / 'summary.txt').read_text().startswith(warning)
    settings = json.loads((fold / 'settings.json').read_text())['best.npz']
    assert settings['chosen on'] == 'nothing' and settings['settings']['threshold'] == 0.5
    history = nervenet.load_checkpoint(fold / 'last.npz')[1]['history']
    assert settings['epoch'] == min(history, key=lambda row: row['validation_loss'])['epoch']
    text = (tmp_path / 'run' / 'summary.txt').read_text()
    assert text.startswith(f'3 of 3 folds; no foreground at all is validated in fold {out[0]}, where Dice says little\n')


@pytest.mark.skipif(os.name != 'posix' or sys.platform == 'darwin', reason='file names are Unicode there')
def test_names_that_are_no_unicode_and_terminals_that_know_ascii_alone_end_nothing(tmp_path, rng):
    write_pairs(tmp_path / 'data', rng, images=2)
    for image in 1, 2:
        for suffix in '.tif', '_mask.tif':
            os.rename(tmp_path / 'data' / f'2_{image}{suffix}', os.fsencode(tmp_path / 'data') + b'/N\xe9_%d%s' % (image, suffix.encode()))
            if suffix == '_mask.tif':
                Image.new('L', (36, 24)).save(os.fsencode(tmp_path / 'data') + b'/N\xe9_%d%s' % (image, suffix.encode()), 'TIFF')
    done = run_example('train_unet.py', '--data', tmp_path / 'data', *TINY, '--epochs', 1, '--folds', 3, '--subject-pattern', '(.+)_',
                       '--out', os.fsdecode(os.fsencode(tmp_path) + b'/r\xfcn'), PYTHONIOENCODING='ascii')
    assert done.returncode == 0, done.stderr
    assert '(subjects N\\' in done.stdout and '\\xb1' in done.stdout, 'escapes'
    folder, = (path for path in tmp_path.iterdir() if path.name != 'data')
    assert 'average hard dice' in (folder / 'summary.txt').read_text(encoding='utf-8')
    assert '(subjects N' in ''.join(path.read_text(encoding='utf-8') for path in folder.glob('fold_*/summary.txt'))
    again = run_example('train_unet.py', '--resume', folder, PYTHONIOENCODING='ascii')
    assert again.returncode == 0 and 'Fold 3 of 3 is complete' in again.stdout


@pytest.mark.parametrize('name', [name for name in NETWORKS if name != 'unet'])
def test_every_network_trains_resumes_predicts_and_can_be_looked_into(name, tmp_path, rng, main, monkeypatch, capsys):
    write_pairs(tmp_path / 'data', rng)
    parts = ['--no-dac', '--median-filter', 3] if name == 'optimised-resunet' else []
    options = ['--data', tmp_path / 'data', *TINY, '--model', name, *parts, '--epochs', 3, '--norm', 'batch', '--dropout', 0.2]
    main(*options, '--out', tmp_path / 'whole')
    assert f'network:     {NETWORKS[name].__name__} of ' in capsys.readouterr().out
    with stopped_after(2, main, monkeypatch):
        main(*options, '--out', tmp_path / 'run')
    main('--resume', tmp_path / 'run')
    assert_same_run(tmp_path / 'run', tmp_path / 'whole')
    last = tmp_path / 'run' / 'last.npz'
    assert type(nervenet.load(last)) is NETWORKS[name] and nervenet.load(last).config.get('dac') == (False if parts else None)

    main('--data', tmp_path / 'data', '--init', last, '--size', '16x24', '--epochs', 1, '--device', 'cpu', '--out', tmp_path / 'tuned')
    assert type(nervenet.load(tmp_path / 'tuned' / 'last.npz')) is NETWORKS[name]
    example('predict').main([*map(str, ['--model', last, '--input', tmp_path / 'data', '--output', tmp_path / 'masks'])])
    assert len(list((tmp_path / 'masks').glob('*_mask.png'))) == 12
    example('look_inside').main([*map(str, ['--model', last, '--image', tmp_path / 'data' / '1_1.tif', '--output', tmp_path / 'look'])])
    assert {path.name for path in (tmp_path / 'look').iterdir()} == {'stages.png', 'joins.png', 'depends.png'}
    with pytest.raises(SystemExit):
        main('--data', tmp_path / 'data', '--init', last, '--model', 'unet', '--out', tmp_path / 'other')
    assert f'--model is unet, but the network in {last} has {name}; leave out --model' in capsys.readouterr().err


def test_the_networks_of_a_cross_validation_predict_together(tmp_path, rng, main, capsys):
    write_pairs(tmp_path / 'data', rng)
    main('--data', tmp_path / 'data', *TINY, '--epochs', 2, '--folds', 3, '--out', tmp_path / 'run')
    capsys.readouterr()
    predict_job = example('predict')
    predict_job.main([*map(str, ['--model', tmp_path / 'run', '--input', tmp_path / 'data', '--output', tmp_path / 'masks', '--uncertainty'])])
    said = capsys.readouterr().out
    assert said.count('last.npz, epoch 2, 16x24') == 3 and 'chosen from what each network made of the subjects that it had not seen' in said
    assert '12 of 12 images with a mask are of subjects, by their names, that some of the 3 networks were trained or chosen on' in said
    assert len(list((tmp_path / 'masks').glob('*_uncertainty.png'))) == 12
    for fold in 1, 2, 3:
        _, extra = nervenet.load_checkpoint(tmp_path / 'run' / f'fold_{fold}' / 'last.npz')
        subjects = read_config(tmp_path / 'run' / f'fold_{fold}')
        assert extra['training_subjects'] == subjects['training_subjects'] and extra['held_out']['counts'].shape[::4] == (2, 4)
        reader = Reader((16, 24))
        unseen = [sample for sample in find_samples(tmp_path / 'data') if sample.subject in subjects['validation_subjects']]
        images, masks = next(Loader(unseen, reader, 4).epoch(0))
        network, temperature = nervenet.load(tmp_path / 'run' / f'fold_{fold}' / 'last.npz'), extra['settings']['temperature']
        again = count_masks(network, lambda: [(images, masks)], temperature=temperature)
        numpy.testing.assert_array_equal(extra['held_out']['counts'], again['counts'])
        assert 'held_out' not in nervenet.load_checkpoint(tmp_path / 'run' / f'fold_{fold}' / 'best.npz')[1]


def test_networks_that_may_have_seen_anybody_do_not_claim_to_know_strangers(tmp_path, rng, main, capsys):
    write_pairs(tmp_path / 'data', rng)
    options = [*TINY, '--epochs', 1]
    main('--data', tmp_path / 'data', *options, '--folds', 2, '--leaky-split-by-image', '--out', tmp_path / 'leaky')
    main('--data', tmp_path / 'data', *options, '--out', tmp_path / 'run')
    main('--data', tmp_path / 'data', *options, '--init', tmp_path / 'run' / 'best.npz', '--out', tmp_path / 'tuned')
    for path, why in ('leaky/fold_1', 'it was split by image'), ('run', None), ('tuned', f'it started from another, {tmp_path / "run" / "best.npz"}'):
        extra = nervenet.load_checkpoint(tmp_path / path / 'last.npz')[1]
        assert extra.get('perhaps_seen') == why and ('held_out' in extra) == ('validation_subjects' in extra) == (why is None)
        assert extra.get('training_subjects') == (None if 'leaky' in path else read_config(tmp_path / path)['training_subjects'])
    predict = example('predict')

    def predicted(*options):
        predict.main([*map(str, ['--input', tmp_path / 'data', '--output', tmp_path / 'masks', *options])])

    with pytest.raises(nervenet.CheckpointError, match='made of subjects it had not seen; .* not of --validation-share 0, --init or a split by image'):
        predicted('--model', tmp_path / 'leaky')
    with pytest.raises(DataError, match='--held-out: whom the network has seen is not known, since it started from another'):
        predicted('--model', tmp_path / 'tuned' / 'last.npz', '--held-out')
    capsys.readouterr()
    predicted('--model', tmp_path / 'tuned' / 'last.npz')
    assert '8 of 12 are of subjects, by their names, that the network was trained or chosen on' in capsys.readouterr().out
    for path in (tmp_path / 'data').iterdir():
        path.rename(path.with_name('other' + path.name))
    shutil.rmtree(tmp_path / 'masks')
    predicted('--model', tmp_path / 'tuned' / 'last.npz')
    assert 'The network may have seen any of these subjects, since it started from another' in capsys.readouterr().out


def test_once_the_recipe_is_settled_all_subjects_are_trained_on(tmp_path, rng, main, capsys):
    write_pairs(tmp_path / 'data', rng)
    options = ['--data', tmp_path / 'data', *TINY, '--epochs', 4, '--validation-share', 0]
    main(*options, '--out', tmp_path / 'run')
    said = capsys.readouterr().out
    assert 'training:    12 images of 3 subjects\n' in said and 'validation:' not in said and 'baseline' not in said
    files = {path.name for path in (tmp_path / 'run').iterdir()}
    assert files >= {'last.npz', 'history.csv', 'summary.txt', 'curves.png', 'report.html', 'settings.json'}
    assert files.isdisjoint({'best.npz', 'predictions.png', 'learning.gif', 'validation.csv'})
    assert (tmp_path / 'run' / 'summary.txt').read_text().startswith('All subjects were trained on, so nobody is left to score')
    assert 'so nobody is left to score' in (tmp_path / 'run' / 'report.html').read_text()
    _, extra = nervenet.load_checkpoint(tmp_path / 'run' / 'last.npz')
    assert extra['settings'] == asdict(Settings()) and extra['training_subjects'] == ['1', '2', '3'] and 'state' not in extra

    example('predict').main([*map(str, ['--model', tmp_path / 'run' / 'last.npz', '--input', tmp_path / 'data', '--output', tmp_path / 'masks'])])
    assert '12 of 12 are of subjects, by their names, that the network was trained or chosen on: these scores are flattered' in capsys.readouterr().out

    main(*options, '--inner-share', 0.4, '--out', tmp_path / 'inner')
    chosen = json.loads((tmp_path / 'inner' / 'settings.json').read_text())
    assert chosen['last.npz']['chosen on'] == 'inner subjects' and 'validation' not in chosen['last.npz'] and (tmp_path / 'inner' / 'best.npz').exists()
    assert 'held_out' not in nervenet.load_checkpoint(tmp_path / 'inner' / 'last.npz')[1]
    for extra in ['--leaky-split-by-image'], ['--folds', 2]:
        with pytest.raises(SystemExit):
            main(*options, *extra, '--out', tmp_path / 'not')


def test_a_run_on_all_subjects_is_resumed_bit_for_bit(tmp_path, rng, main, monkeypatch):
    write_pairs(tmp_path / 'data', rng)
    options = ['--data', tmp_path / 'data', *TINY, '--epochs', 3, '--validation-share', 0]
    main(*options, '--out', tmp_path / 'whole')
    with stopped_after(2, main, monkeypatch):
        main(*options, '--out', tmp_path / 'run')
    main('--resume', tmp_path / 'run')
    assert content(tmp_path / 'run' / 'last.npz') == content(tmp_path / 'whole' / 'last.npz')


def test_the_default_loss_is_that_of_what_is_trained_on(tmp_path, rng, main, capsys):
    write_pairs(tmp_path / 'data', rng)
    main('--data', tmp_path / 'data', *TINY, '--epochs', 1, '--out', tmp_path / 'run')
    assert read_config(tmp_path / 'run')['loss'] == 'dice-per-image+bce' and 'false alarms' not in capsys.readouterr().out
    for path in list((tmp_path / 'data').glob('*_[2-4]_mask.tif')):
        Image.fromarray(numpy.zeros_like(numpy.asarray(Image.open(path)))).save(path)
    main('--data', tmp_path / 'data', *TINY, '--epochs', 1, '--out', tmp_path / 'few')
    assert 'Only 25% of the training images hold foreground: --loss dice+bce may give fewer false alarms.' in capsys.readouterr().out
    assert 'Only 25%' in (tmp_path / 'few' / 'summary.txt').read_text()
    main(*TINY, '--epochs', 1, '--out', tmp_path / 'synthetic')
    assert read_config(tmp_path / 'synthetic')['loss'] == 'dice+bce'


def test_the_plan_is_told_before_training(tmp_path, rng, main, capsys, monkeypatch):
    """12 images of 3 subjects in two folds: 8 or 4 for training, in 200 epochs, of which three steps are timed."""
    write_pairs(tmp_path / 'data', rng)
    asked = []
    monkeypatch.setattr(main.module, 'seconds_of', lambda *arguments: asked.append(arguments[3:]) or 6.0)
    monkeypatch.setattr(main.module, 'fit', lambda *arguments: sys.exit('no further'))
    options = ['--data', tmp_path / 'data', '--size', '16x24', '--base-channels', 2, '--depth', 1, '--device', 'cpu', '--folds', 2, '--fold', 2]
    for number, extra, plan, timed in ((1, [], '200 epochs of 2 steps of 4 images, about 20 minutes here for each fold', ((4, 16, 24, 1), 2, 4)),
                                       (2, ['--epochs', 7], '7 epochs of 2 steps of 4 images, less than a minute here for each fold', ((4, 16, 24, 1), 2, 4)),
                                       (3, ['--batch-size', 64], '200 epochs of 1 steps of 8 images', ((8, 16, 24, 1), 1, 4))):
        with pytest.raises(SystemExit, match='no further'):
            main(*options, '--batch-size', 4, *extra, '--out', tmp_path / str(number))
        assert f'plan:        {plan}' in capsys.readouterr().out and asked[-1] == timed
