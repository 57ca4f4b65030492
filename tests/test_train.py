import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
from PIL import Image

import nervenet
from nervenet import BatchNorm2D, UNet, backend
from nervenet.data import Loader, Reader, find_samples
from nervenet.losses import BCEWithLogitsLoss, DiceLoss, WeightedSum
from nervenet.optim import SGD, Adam, AdamW
from nervenet.train import RunFolder, evaluate, fit, predict, progress, train_epoch, train_step

ROOT = Path(__file__).parents[1]


def write_pairs(folder, rng, subjects=3, images=4, size=(24, 36)):
    """Write pairs in the Kaggle layout: a bright disc on noise, and its mask."""
    folder.mkdir(parents=True, exist_ok=True)
    rows, columns = numpy.mgrid[:size[0], :size[1]]
    for subject in range(1, subjects + 1):
        for image in range(1, images + 1):
            centre = rng.uniform([8, 8], [size[0] - 8, size[1] - 8])
            mask = (rows - centre[0])**2 + (columns - centre[1])**2 < 36
            grey = 60 + 100 * mask + 30 * rng.random(size)
            Image.fromarray(grey.astype('uint8')).save(folder / f'{subject}_{image}.tif')
            Image.fromarray((255 * mask).astype('uint8')).save(folder / f'{subject}_{image}_mask.tif')


def batch(rng, device='cpu', size=(12, 20)):
    x = rng.random((3, *size, 1), dtype='float32')
    target = (x > 0.6).astype('float32')
    return backend.move(x, device), backend.move(target, device)


@pytest.mark.parametrize('optimizer', [lambda p: SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=1e-4), Adam, AdamW])
@pytest.mark.parametrize('norm', ['batch', None])
@pytest.mark.parametrize('loss', [DiceLoss, lambda: WeightedSum([(1.0, DiceLoss(per_image=True)), (0.5, BCEWithLogitsLoss())])])
def test_whole_training_step_mixes_no_host_and_device_arrays(xp, rng, loss, norm, optimizer):
    """Forward, loss, backward, clipping, step: the stand-in refuses every implicit mix, and the host gives the same numbers."""
    parameters = []
    for device in {'cpu', 'cpu' if xp is numpy else 'gpu'}:
        model = UNet(base_channels=3, depth=2, norm=norm, dropout=0.0, input_mean=0.3, input_std=0.5,
                     rng=numpy.random.default_rng(1)).to(device)
        x, target = batch(numpy.random.default_rng(2), device)
        criterion, stepper = loss(), optimizer(model.parameters())
        for _ in range(3):
            value = train_step(model, criterion, stepper, x, target, max_norm=1.0)
            assert value.shape == () and backend.device_of(value) == device
        for name, array in model.state_dict().items():
            assert array.dtype == numpy.float32 and backend.device_of(array) == device, name
        parameters.append({name: backend.to_cpu(array) for name, array in model.parameters().items()})
    for name in parameters[0]:
        numpy.testing.assert_allclose(parameters[-1][name], parameters[0][name], rtol=2e-3, atol=2e-4, err_msg=name)


def test_training_step_updates_every_parameter_and_lowers_the_loss(rng):
    model = UNet(base_channels=4, depth=2, rng=rng)
    before = {name: array.copy() for name, array in model.parameters().items()}
    x, target = batch(rng)
    loss, optimizer = DiceLoss(), Adam(model.parameters(), 1e-2)
    values = [float(train_step(model, loss, optimizer, x, target)) for _ in range(30)]
    assert values[-1] < values[0] - 0.2
    assert all((array != before[name]).any() for name, array in model.parameters().items())


def test_training_epoch_and_evaluation_run_on_either_backend(xp, rng):
    device = 'cpu' if xp is numpy else 'gpu'
    model = UNet(base_channels=2, depth=1, dropout=0.2, rng=rng).to(device)
    batches = [tuple(map(numpy.copy, batch(rng))) for _ in range(2)]
    scores = train_epoch(model, DiceLoss(), Adam(model.parameters()), batches, schedule=lambda step: 0.01 / (step + 1), max_norm=1.0)
    assert -1 <= scores['loss'] <= 0 and 0 <= scores['dice_pooled'] <= 1
    scores = evaluate(model, DiceLoss(), batches)
    assert scores['loss'] == pytest.approx(-scores['soft_dice_pooled'], abs=0.01)


def test_evaluation_scores_every_image_and_weights_batches_by_their_images(rng):
    model = UNet(base_channels=2, depth=1, rng=rng)
    x, target = rng.random((5, 8, 8, 1), dtype='float32'), (rng.random((5, 8, 8, 1)) < 0.3).astype('float32')
    whole = evaluate(model, BCEWithLogitsLoss(), [(x, target)])
    parts = evaluate(model, BCEWithLogitsLoss(), [(x[:4], target[:4]), (x[4:], target[4:])])
    assert whole.keys() == parts.keys()
    for name in whole:
        assert whole[name] == pytest.approx(parts[name], rel=1e-5), name


def test_predict_uses_running_statistics_gives_probabilities_and_restores_the_mode(rng):
    model = UNet(base_channels=2, depth=1, rng=rng)
    x, _ = batch(rng)
    model.forward(x)
    probabilities = predict(model, x)
    assert model.training and all(layer.training for _, layer in model.layers())
    assert probabilities.shape == x.shape and 0 < probabilities.min() < probabilities.max() < 1
    alone = predict(model, x[:1])
    numpy.testing.assert_allclose(alone, probabilities[:1], rtol=1e-4)          # one image does not depend on its neighbours
    statistics = [layer for _, layer in model.layers() if isinstance(layer, BatchNorm2D)][0].buffers['running_mean'].copy()
    predict(model, x)
    assert numpy.array_equal(statistics, model.stem.children['norm1'].buffers['running_mean'])
    predict(model.eval(), x)
    assert not model.training


def test_a_loss_that_is_not_finite_stops_the_epoch_and_names_the_batch(rng):
    model = UNet(base_channels=2, depth=1, rng=rng)
    good, bad = batch(rng), batch(rng)
    bad[0][0, 0, 0, 0] = numpy.nan
    with pytest.raises(FloatingPointError, match='the loss is nan at batch 2: lower --learning-rate'):
        train_epoch(model, DiceLoss(), Adam(model.parameters()), [good, bad, good])


def test_inference_leaves_modes_and_caches_as_they_were(rng):
    model = UNet(base_channels=2, depth=1, rng=rng).eval(keep_cache=True)
    x, target = batch(rng)
    logits = model.forward(x)
    predict(model, x)
    assert not model.training and model.backward(logits).shape == x.shape
    loss = DiceLoss()
    evaluate(model, loss, [(x, target)])
    assert loss.training and loss.cache is None, 'the last batch must not stay in memory'
    with pytest.raises(ValueError):
        predict(model, x[..., :0])
    assert model.keep_cache


def test_a_run_that_diverges_names_epoch_part_and_what_is_kept(loaders, tmp_path):
    model = UNet(base_channels=2, depth=1, norm=None, rng=numpy.random.default_rng(0))
    run = RunFolder(tmp_path / 'run', {'size': [16, 24]})
    with pytest.raises(FloatingPointError, match=r'epoch 1, (training|validation): the loss is nan at batch') as error:
        list(fit(model, BCEWithLogitsLoss(), SGD(model.parameters(), 1e30), *loaders, 2, run))
    assert 'last good epoch' not in str(error.value), 'there is none yet'
    model.head.params['bias'][:] = 0
    run.history.append({})
    model.stem.children['conv1'].params['weight'][:] = numpy.nan
    with pytest.raises(FloatingPointError, match='The last good epoch is in .*last.npz'):
        list(fit(model, BCEWithLogitsLoss(), SGD(model.parameters(), 0.1), *loaders, 2, run))


@pytest.fixture
def loaders(tmp_path, rng):
    write_pairs(tmp_path / 'data', rng)
    samples, reader = find_samples(tmp_path / 'data'), Reader((16, 24))
    return Loader(samples[:8], reader, 3, seed=1, shuffle=True), Loader(samples[8:], reader, 3)


def train(loaders, folder, seed=1, epochs=3):
    model = UNet(base_channels=3, depth=2, dropout=0.1, rng=numpy.random.default_rng(seed))
    run = RunFolder(folder, {'size': [16, 24]})
    rows = list(fit(model, DiceLoss(), Adam(model.parameters(), 0.01), *loaders, epochs, run))
    return model, run, rows


def test_fit_records_the_run(loaders, tmp_path):
    model, run, rows = train(loaders, tmp_path / 'run')
    assert json.loads((run.path / 'config.json').read_text()) == {'size': [16, 24]}
    written = list(csv.DictReader(io.StringIO((run.path / 'history.csv').read_text())))
    assert [int(row['epoch']) for row in written] == [1, 2, 3]
    assert float(written[2]['validation_dice_pooled']) == rows[2]['validation_dice_pooled']
    last, extra = nervenet.load_checkpoint(run.last)
    assert extra['epoch'] == 3 and extra['size'] == [16, 24]
    assert all(numpy.array_equal(array, last.state_dict()[name]) for name, array in model.state_dict().items())
    _, extra = nervenet.load_checkpoint(run.best)
    best = max(rows, key=lambda row: row['validation_dice_pooled'])
    assert extra['epoch'] == best['epoch'] and extra['scores']['validation_dice_pooled'] == best['validation_dice_pooled']


def test_a_seed_reproduces_a_run_bit_for_bit(loaders, tmp_path):
    states = [train(loaders, tmp_path / name, seed)[0].state_dict() for name, seed in (('a', 1), ('b', 1), ('c', 2))]
    assert all(numpy.array_equal(states[0][name], states[1][name]) for name in states[0])
    assert any((states[0][name] != states[2][name]).any() for name in states[0])


def test_a_run_folder_is_never_written_over(tmp_path):
    RunFolder(tmp_path / 'run', {})
    with pytest.raises(FileExistsError, match='choose another --out'):
        RunFolder(tmp_path / 'run', {})


def test_summary_has_the_reference_form(loaders, tmp_path):
    _, run, rows = train(loaders, tmp_path / 'run', epochs=1)
    scores = {'dice_pooled': 0.4, 'dice_per_image': 0.5, 'iou_pooled': 0.3, 'accuracy': 0.9}
    text = run.summarize({'empty mask': scores})
    assert (run.path / 'summary.txt').read_text() == text
    for line in (f'accuracies: [{rows[0]["validation_accuracy"]:.4f}]', f'losses: [{rows[0]["validation_loss"]:.4f}]',
                 f'dicecoefs: [{rows[0]["validation_soft_dice_pooled"]:.4f}]', 'average ious: ', '± 0.0000', 'empty mask: hard dice 0.4000'):
        assert line in text


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_passes_everything_through_with_a_bar_on_a_terminal_and_plain_lines_elsewhere():
    terminal, file, quick = Terminal(), io.StringIO(), io.StringIO()
    for stream, seconds in (terminal, 30), (file, 0), (quick, 30):
        assert list(progress(range(5), 5, 'epoch 1/2', stream, seconds)) == list(range(5))
    assert '\repoch 1/2 [' in terminal.getvalue() and 'left' in terminal.getvalue() and terminal.getvalue().endswith('\r\x1b[K')
    assert file.getvalue().splitlines()[2].startswith('epoch 1/2  3/5') and '\r' not in file.getvalue()
    assert quick.getvalue() == ''


# The main job, as it is called from a shell.

def run_example(*arguments, name='train_unet.py'):
    environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
    return subprocess.run([sys.executable, str(ROOT / 'examples' / name), *map(str, arguments)], capture_output=True, text=True,
                          env=environment, stdin=subprocess.DEVNULL)


def test_main_job_trains_and_leaves_a_run_folder(tmp_path, rng):
    write_pairs(tmp_path / 'data' / 'train', rng)
    done = run_example('--data', tmp_path / 'data', '--size', '15x24', '--base-channels', 2, '--depth', 2, '--epochs', 2,
                       '--loss', 'dice+bce', '--optimizer', 'adamw', '--out', tmp_path / 'run')
    assert done.returncode == 0, done.stderr
    assert 'size: 15x24 becomes 16x24, a multiple of 2^depth = 4' in done.stdout
    for part in ('training:    8 images of 2 subjects', 'validation:  4 images of 1 subjects', 'empty mask', 'mean training mask',
                 '2/2', 'average dicecoefs'):
        assert part in done.stdout
    assert {path.name for path in (tmp_path / 'run').iterdir()} >= {
        'config.json', 'history.csv', 'best.npz', 'last.npz', 'summary.txt'}
    config = json.loads((tmp_path / 'run' / 'config.json').read_text())
    assert set(config['training_subjects']).isdisjoint(config['validation_subjects'])
    assert nervenet.load(tmp_path / 'run' / 'last.npz').config['input_std'] > 0

    # What was trained predicts: a mask of the image's own size for each image, a bad file is skipped and told.
    (tmp_path / 'data' / 'train' / '9_1.tif').write_bytes(b'II*')
    predicted = run_example('--model', tmp_path / 'run' / 'best.npz', '--input', tmp_path / 'data', '--output', tmp_path / 'masks',
                            '--submission', tmp_path / 'submission.csv', name='predict.py')
    assert predicted.returncode == 1 and 'Traceback' not in predicted.stderr
    assert 'skipped: ' in predicted.stderr and '1 of 13 files could not be read: 9_1' in predicted.stderr
    assert '12 images predicted' in predicted.stdout and 'mean training mask' in predicted.stdout
    mask = numpy.array(Image.open(tmp_path / 'masks' / '1_1_mask.png'))
    assert mask.shape == (24, 36) and set(numpy.unique(mask)) <= {0, 255} and (tmp_path / 'masks' / '1_1_overlay.png').exists()
    results = list(csv.DictReader(io.StringIO((tmp_path / 'masks' / 'results.csv').read_text())))
    assert int(results[0]['area']) == (mask > 0).sum() and len(results) == 12 and 0 <= float(results[0]['dice']) <= 1
    assert len((tmp_path / 'submission.csv').read_text().splitlines()) == 13

    looked = run_example('--model', tmp_path / 'run' / 'best.npz', '--image', tmp_path / 'data' / 'train' / '1_1.tif',
                         '--output', tmp_path / 'look', '--pixel', '3,4', name='look_inside.py')
    assert looked.returncode == 0, looked.stderr
    assert 'pixel (3, 4)' in looked.stdout
    assert {path.name for path in (tmp_path / 'look').iterdir()} == {'stages.png', 'joins.png', 'depends.png'}


@pytest.mark.parametrize('arguments, message', [
    (['--data', 'MISSING'], 'no such folder'), (['--data', 'DATA', '--size', '96'], 'not of the form HxW'),
    (['--data', 'DATA', '--epochs', '0'], 'whole number of at least 1'), (['--data', 'DATA', '--learning-rate', 'nan'], 'positive'),
    (['--data', 'DATA', '--dropout', '1.5'], 'dropout probability is 1.5'), (['--data', 'DATA', '--out', 'DATA'], 'choose another --out'),
    (['--data', 'DATA', '--validation-share', '2'], 'share between 0 and 1'), (['--data', 'DATA', '--seed=-1'], 'whole number of at least 0'),
    (['--data', 'DATA', '--depth', '60'], '--depth is 60; expected at most 12'),
    (['--data', 'DATA', '--mask-threshold', '999'], 'no training mask holds any foreground')])
def test_bad_arguments_give_one_line_and_a_failing_exit_status(arguments, message, tmp_path, rng):
    write_pairs(tmp_path / 'data', rng, subjects=2, images=2)
    places = {'MISSING': tmp_path / 'missing', 'DATA': tmp_path / 'data'}
    done = run_example(*(places.get(argument, argument) for argument in arguments), '--device', 'cpu')
    assert done.returncode != 0 and 'Traceback' not in done.stderr
    assert message in done.stderr.splitlines()[-1]


def test_one_layer_by_hand_agrees_with_the_library():
    done = run_example(name='one_layer.py')
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('largest difference from the library') == 4
