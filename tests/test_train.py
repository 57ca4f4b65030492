import contextlib
import csv
import dataclasses
import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
from PIL import Image

import nervenet
from nervenet import BatchNorm2D, UNet
from nervenet.engine import backend
from nervenet.images.augment import ULTRASOUND
from nervenet.images.data import Loader, Reader, find_samples
from nervenet.losses import BCEWithLogitsLoss, DiceLoss, WeightedSum
from nervenet.optim import SGD, Adam, AdamW
from nervenet.study.segment import Segmenter, Settings, score
from nervenet.study.fit import Interrupted, fit, stopping_on_signals
from nervenet.study.report import progress, summaries
from nervenet.study.run_folder import RunFolder, claim, read_config
from nervenet.train import evaluate, predict, train_epoch, train_step

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


@pytest.mark.parametrize('norm', ['batch', None])
@pytest.mark.parametrize('dtype, learning_rate, tolerance', [('float64', 1e-3, 1e-9), ('float32', 2e-4, 1e-3)])
def test_twenty_steps_with_and_without_fast_paths_agree(norm, dtype, learning_rate, tolerance, rng):
    """On sizes that need no padding: in a padded corner, without norm, plain sums are exactly 0, on ReLU's kink, and fast ones not."""
    x = rng.random((3, 40, 56, 1)).astype(dtype)
    target = (x > 0.6).astype(dtype)

    def losses(context):
        model = UNet(base_channels=16, depth=3, norm=norm, rng=numpy.random.default_rng(1), dtype=dtype)
        loss, optimizer = WeightedSum([(1.0, DiceLoss()), (1.0, BCEWithLogitsLoss())]), Adam(model.parameters(), learning_rate)
        with context:
            return numpy.array([train_step(model, loss, optimizer, x, target) for _ in range(20)])

    fast, plain = losses(contextlib.nullcontext()), losses(nervenet.plain())
    assert fast[-1] < fast[0] - 0.05 and not numpy.array_equal(fast, plain)
    numpy.testing.assert_allclose(fast, plain, atol=tolerance)


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


@pytest.mark.parametrize('dtype, tolerance', [('float64', 1e-9), ('float32', 1e-3)])
def test_twenty_steps_on_a_device_equal_those_of_the_host(xp, dtype, tolerance):
    if xp is numpy:
        pytest.skip('this compares NumPy with a device')
    losses = {}
    for device in 'cpu', 'gpu':
        model = UNet(base_channels=8, depth=3, rng=numpy.random.default_rng(1), dtype=dtype).to(device)
        rng = numpy.random.default_rng(2)
        x = rng.random((3, 24, 40, 1)).astype(dtype)
        x, target = backend.move(x, device), backend.move((x > 0.6).astype(dtype), device)
        loss = WeightedSum([(1.0, DiceLoss()), (1.0, BCEWithLogitsLoss())])
        optimizer = AdamW(model.parameters(), 2e-4)
        losses[device] = [float(backend.to_cpu(train_step(model, loss, optimizer, x, target, max_norm=1.0))) for _ in range(20)]
    assert losses['gpu'][-1] < losses['gpu'][0] - 0.01
    numpy.testing.assert_allclose(losses['gpu'], losses['cpu'], rtol=0, atol=tolerance)


def test_an_epoch_on_a_device_copies_every_batch_in_once_and_the_scores_out_once(gpu, tmp_path, rng):
    write_pairs(tmp_path, rng, subjects=2, images=4)
    samples, reader = find_samples(tmp_path), Reader((16, 24))
    model = UNet(base_channels=2, depth=2, dropout=0.3, rng=rng).to('gpu')
    loss, optimizer = WeightedSum([(1.0, DiceLoss()), (1.0, BCEWithLogitsLoss())]), AdamW(model.parameters())
    for transform in None, ULTRASOUND:
        batches = Loader(samples, reader, 3, shuffle=True, transform=transform, device='gpu')
        for work, run in (('training', lambda: train_epoch(model, loss, optimizer, batches.epoch(1), max_norm=1.0)),
                          ('validation', lambda: evaluate(model, loss, batches.epoch(1)))):
            gpu.ledger.__init__()
            run()
            whole = [shape for shape in gpu.ledger.copies_in if len(shape) == 4 and shape[1:3] == (16, 24)]
            assert whole == [(n, 16, 24, 1) for n in (3, 3, 3, 3, 2, 2)], work          # image and mask of three batches
            few = [shape for shape in gpu.ledger.copies_in if shape not in whole]
            if transform is None:
                assert few == []
            else:                                                                       # what was drawn: matrices, control points, factors
                assert len(few) == 7 * len(batches) and all(numpy.prod(shape) <= 3 * 2 * 7 * 10 for shape in few)
            assert [len(shape) for shape in gpu.ledger.copies_out] == [1, 3], work      # all losses; all counts


def test_augmentation_on_a_device_gives_the_batches_of_the_host(xp, tmp_path, rng):
    write_pairs(tmp_path, rng, subjects=2, images=3)
    device = 'cpu' if xp is numpy else 'gpu'
    transform = dataclasses.replace(ULTRASOUND, speckle_range=0.0)                      # each device draws its own noise
    loaders = [Loader(find_samples(tmp_path), Reader((16, 24)), 4, seed=3, shuffle=True, transform=transform, device=where)
               for where in ('cpu', device)]
    for epoch in 1, 2:
        for host, there in zip(*(loader.epoch(epoch) for loader in loaders), strict=True):
            assert all(backend.device_of(array) == device for array in there)
            numpy.testing.assert_allclose(backend.to_cpu(there[0]), host[0], atol=1e-5)
            assert (backend.to_cpu(there[1]) != host[1]).mean() < 0.01                  # a pixel on the edge may round the other way


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


def test_logits_that_are_not_finite_stop_the_epoch_before_the_step_and_name_batch_and_first_layer(rng):
    model = UNet(base_channels=2, depth=1, dropout=0.5, rng=rng)
    good, bad = batch(rng), batch(rng)
    bad[0][0, 0, 0, 0] = numpy.nan
    with pytest.raises(FloatingPointError, match='not finite at batch 2; .* are in the images: lower --learning-rate'):
        train_epoch(model, DiceLoss(), Adam(model.parameters()), [good, bad, good])
    assert all(numpy.isfinite(array).all() for array in model.parameters().values()), 'the bad batch was learned from'
    for prefix, name in ('downs.0.conv2', 'weight'), ('ups.0.norm1', 'bias'), ('head', 'bias'):
        model = UNet(base_channels=2, depth=1, dropout=0.5, rng=rng)
        model.parameters()[f'{prefix}.{name}'][...] = numpy.nan
        with pytest.raises(FloatingPointError, match=rf'the output of {prefix} \(its {name} is not\)'):
            train_epoch(model, DiceLoss(), Adam(model.parameters()), [good])
        assert all('forward' not in vars(layer) for _, layer in model.layers()), 'the layers are still watched'


def test_a_value_that_overflows_on_its_way_names_the_layer_where_it_did(rng):
    model = UNet(base_channels=2, depth=1, norm=None, rng=rng)
    model.parameters()['ups.0.conv1.weight'][...] = 1e25
    model.parameters()['ups.0.conv2.weight'][...] = 1e25
    with numpy.errstate(over='ignore', invalid='ignore'), pytest.raises(
            FloatingPointError, match=r'the output of ups.0.conv2 \(its parameters are finite\)'):
        train_epoch(model, DiceLoss(), Adam(model.parameters()), [batch(rng)])


def test_a_loss_that_is_not_finite_stops_the_epoch_and_names_the_batch(xp, rng):
    """On a device the host looks at the end of the epoch only; on the CPU this is a loss that fails with good logits."""
    device = 'cpu' if xp is numpy else 'gpu'
    model = UNet(base_channels=2, depth=1, rng=rng).to(device)
    good, bad = batch(rng), batch(rng)
    bad[0][0, 0, 0, 0] = numpy.nan
    loss = WeightedSum([(float('nan'), DiceLoss())]) if xp is numpy else DiceLoss()
    with pytest.raises(FloatingPointError, match=f'the loss is nan at batch {1 if xp is numpy else 2}: lower --learning-rate'):
        train_epoch(model, loss, Adam(model.parameters()), [good, bad, good])


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
    with pytest.raises(FloatingPointError, match=r'epoch 1, (training|validation): the l.* at batch') as error:
        list(fit(model, BCEWithLogitsLoss(), SGD(model.parameters(), 1e30), *loaders, 2, run))
    assert 'last good epoch' not in str(error.value), 'there is none yet'
    model.head.params['bias'][:] = 0
    run.history.append({'epoch': 1})
    model.stem.children['conv1'].params['weight'][:] = numpy.nan
    with pytest.raises(FloatingPointError, match='The last good epoch is in .*last.npz'):
        list(fit(model, BCEWithLogitsLoss(), SGD(model.parameters(), 0.1), *loaders, 2, run))


@pytest.fixture
def loaders(tmp_path, rng):
    write_pairs(tmp_path / 'data', rng)
    samples, reader = find_samples(tmp_path / 'data'), Reader((16, 24))
    return Loader(samples[:8], reader, 3, seed=1, shuffle=True), Loader(samples[8:], reader, 3)


def train(loaders, folder, seed=1, epochs=3, resume=False, norm='batch', **options):
    model = UNet(base_channels=3, depth=2, norm=norm, dropout=0.1, rng=numpy.random.default_rng(seed))
    optimizer = Adam(model.parameters(), 0.01)
    run = RunFolder(folder, {'size': [16, 24], 'norm': norm}, resume)
    run.restore(model, optimizer)
    rows = list(fit(model, DiceLoss(), optimizer, *loaders, epochs, run, lambda step: 0.01 / (1 + step), **options))
    return model, run, rows


def without_times(value):
    """Return `value`, nested as it is, without what the clock says."""
    if isinstance(value, dict):
        return {name: without_times(item) for name, item in value.items() if name not in ('seconds', 'images_per_second', 'waited_seconds')}
    return list(map(without_times, value)) if isinstance(value, list) else value


def content(path):
    """Return all that a model file holds, times aside, as one comparable value."""
    model, extra = nervenet.load_checkpoint(path)

    def comparable(value):
        if isinstance(value, dict):
            return {name: comparable(item) for name, item in value.items()}
        return (value.dtype, value.shape, value.tobytes()) if isinstance(value, numpy.ndarray) else value

    return comparable({'config': model.config, **model.state_dict(), **without_times(extra)})


def assert_same_run(path, other):
    assert sorted(os.listdir(path)) == sorted(os.listdir(other))
    assert content(path / 'last.npz') == content(other / 'last.npz')
    assert (path / 'best.npz').read_bytes() == (other / 'best.npz').read_bytes()
    histories = [[without_times(row) for row in csv.DictReader(io.StringIO((folder / 'history.csv').read_text()))]
                 for folder in (path, other)]
    assert histories[0] == histories[1]


@pytest.mark.parametrize('norm', ['batch', None])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path, loaders, norm):
    """Stopped in the middle of an epoch, with dropout, augmentation, sampling, a schedule and running averages on the way."""
    training, validation = loaders
    training = Loader(training.samples, training.reader, 3, seed=4, shuffle=True, positive_share=1.0 if norm else None,
                      transform=ULTRASOUND)
    whole, run, _ = train((training, validation), tmp_path / 'whole', epochs=5, norm=norm)
    for stop_after in (1, 9, 12):                         # batches, of three and two in an epoch
        folder, asked = tmp_path / f'{stop_after}', []

        def stop():
            asked.append(1)
            return len(asked) == stop_after

        with pytest.raises(Interrupted):
            train((training, validation), folder, epochs=5, norm=norm, stop=stop)
        model, resumed, rows = train((training, validation), folder, epochs=5, norm=norm, resume=True)
        assert len(rows) == 5 - (stop_after - 1) // 5 and len(resumed.history) == 5
        assert_same_run(folder, tmp_path / 'whole')
        resumed.release()


def test_resuming_a_complete_run_trains_no_more_and_keeps_its_files(loaders, tmp_path):
    _, run, rows = train(loaders, tmp_path / 'run')
    for path in run.last, run.best:
        run.complete(path, settings={'threshold': 0.3})
    run.release()
    before = {path.name: path.read_bytes() for path in run.path.iterdir()}
    _, resumed, more = train(loaders, tmp_path / 'run', resume=True)
    assert more == [] and resumed.history == rows
    assert {path.name: path.read_bytes() for path in run.path.iterdir()} == before
    _, extra = nervenet.load_checkpoint(run.last)
    assert 'state' not in extra and extra['settings'] == {'threshold': 0.3}


def test_inner_subjects_choose_the_best_epoch_and_when_to_stop(loaders, tmp_path):
    training, validation = loaders
    inner = Loader(training.samples[:3], training.reader, 2)

    class Scripted(Loader):
        """Masks that agree with what any network predicts less and less from the second epoch on."""

        def epoch(self, number):
            for images, masks in super().epoch(number):
                yield images, numpy.full_like(masks, number == 2)

    inner.__class__ = Scripted
    _, run, rows = train(loaders, tmp_path / 'run', epochs=9, inner=inner, patience=3)
    scores = [row['inner_dice_pooled'] for row in rows]
    best = int(numpy.argmax(scores)) + 1
    assert len(rows) == min(best + 3, 9) < 9, scores
    assert nervenet.load_checkpoint(run.best)[1]['epoch'] == best
    assert 'inner_dice_pooled' in nervenet.load_checkpoint(run.best)[1]['scores']
    run.release()
    assert train(loaders, tmp_path / 'run', epochs=9, inner=inner, patience=3, resume=True)[2] == [], 'a stopped run stays stopped'
    text = run.summarize({'empty mask': {name: 0.5 for name in ('dice_pooled', 'dice_per_image', 'iou_pooled', 'accuracy')}},
                         {key: dict.fromkeys(('dice_pooled', 'dice_per_image', 'iou_pooled', 'iou_per_image', 'accuracy'), score)
                          for key, score in (('validation', 0.25), ('flip average', 0.75))})
    assert f'after the epoch that was best on the inner subjects: {best}' in text and f'[{rows[best - 1]["validation_loss"]:.4f}]' in text
    assert 'chosen on the inner subjects\n\naccuracies: [0.2500]' in text
    assert 'averaged with that of the mirrored image\n\naccuracies: [0.7500]' in text


def test_a_folder_belongs_to_one_process(tmp_path):
    run = RunFolder(tmp_path / 'run', {})
    with pytest.raises(BlockingIOError, match='run is in use: another process is training there'):
        RunFolder(tmp_path / 'run', {}, resume=True)
    run.release()
    RunFolder(tmp_path / 'run', {}, resume=True)
    release = claim(tmp_path)
    held = subprocess.run([sys.executable, '-c', f'from nervenet.study.run_folder import claim; claim({str(tmp_path)!r})'], capture_output=True,
                          text=True, cwd=ROOT)
    assert 'is in use' in held.stderr
    release()


def test_resuming_names_both_values_of_what_differs(loaders, tmp_path):
    train(loaders, tmp_path / 'run', epochs=1)[1].release()
    with pytest.raises(ValueError, match=r'config.json: norm is batch there and None now'):
        train(loaders, tmp_path / 'run', norm=None, resume=True)
    model = UNet(base_channels=3, depth=2, dropout=0.1, input_mean=0.25)
    run = RunFolder(tmp_path / 'run', {'size': [16, 24], 'norm': 'batch'}, resume=True)
    with pytest.raises(ValueError, match='input_mean 0.0, this run gives 0.25; have the images changed'):
        run.restore(model, Adam(model.parameters()))
    with pytest.raises(FileNotFoundError, match='no run to resume; start one with --out'):
        read_config(tmp_path / 'missing')
    (tmp_path / 'config.json').write_text('{"size":')
    with pytest.raises(ValueError, match='config.json: cannot be read'):
        read_config(tmp_path)


def test_a_foreign_folder_is_refused_and_nothing_in_it_is_touched(tmp_path):
    (tmp_path / 'download.partial').write_text('mine')
    with pytest.raises(FileExistsError, match='choose another --out$'):
        RunFolder(tmp_path, {})
    assert os.listdir(tmp_path) == ['download.partial']


@pytest.fixture
def usual_interrupt():
    """Ctrl-C raises KeyboardInterrupt, also where this process was started in the background and told to ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_the_first_signal_asks_to_stop_and_the_second_stops(capfd, usual_interrupt):
    with pytest.raises(KeyboardInterrupt):
        with stopping_on_signals() as stop:
            assert not stop()
            signal.raise_signal(signal.SIGINT)
            assert stop() and 'once more to stop at once' in capfd.readouterr().err
            signal.raise_signal(signal.SIGINT)
    before = signal.getsignal(signal.SIGTERM)
    with stopping_on_signals() as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop() and signal.getsignal(signal.SIGTERM) is before
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


KILLED_WHILE_TRAINING = '''
import itertools, os, random, shutil, signal, sys, time, zipfile
from pathlib import Path
import numpy
from nervenet import UNet
from nervenet.images.augment import ULTRASOUND
from nervenet.images.data import Loader, Sample
from nervenet.losses import DiceLoss
from nervenet.optim import Adam
from nervenet.study.fit import fit
from nervenet.study.run_folder import RunFolder
sys.path.insert(0, sys.argv[3])
from test_train import assert_same_run

class Made:
    size = 8, 12
    def read(self, sample):
        rng = numpy.random.default_rng(int(sample.name))
        mask = (rng.random(self.size) < 0.3) * (int(sample.name) % 2)
        return (20000 * mask + rng.integers(0, 40000, self.size)).astype('uint16'), mask.astype('uint8')

samples = [Sample(str(number), str(number), None, None) for number in range(8)]
baselines = {'empty mask': {name: 0.5 for name in ('dice_pooled', 'dice_per_image', 'iou_pooled', 'accuracy')}}

def train(path):
    training = Loader(samples[:4], Made(), 2, seed=1, shuffle=True, positive_share=0.75, transform=ULTRASOUND)
    validation, inner = Loader(samples[4:6], Made(), 2), Loader(samples[6:], Made(), 2)
    model = UNet(base_channels=2, depth=1, dropout=0.3, rng=numpy.random.default_rng(2))
    optimizer = Adam(model.parameters(), 0.02)
    run = RunFolder(path, {'size': [8, 12]}, resume=True)
    run.restore(model, optimizer)
    for row in fit(model, DiceLoss(), optimizer, training, validation, 4, run, max_norm=1.0, inner=inner, patience=3):
        pass
    for model_file in run.last, run.best:
        run.complete(model_file, settings={'threshold': 0.4})
    run.summarize(baselines)

def killed_at(owner, name, call, after):
    original, calls = getattr(owner, name), itertools.count(1)
    def function(*args, **kwargs):
        number = next(calls)
        if number == call and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **kwargs)
        if number == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(owner, name, function)

def run_in_child(path, stage=None, seconds=None):
    """Return True if the child came to its end, False if it was killed before."""
    child = os.fork()
    if child == 0:
        if stage:
            killed_at(*stage)
        train(path)
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert status == 0 or os.WTERMSIG(status) == signal.SIGKILL, status
    return status == 0

folder, kills = Path(sys.argv[1]), int(sys.argv[2])
start = time.perf_counter()
assert run_in_child(folder / 'whole')
length = time.perf_counter() - start
# Before and after each step of each write of the run, then at random moments, some several times in one run.
stages = [(owner, name, call, after) for owner, name, calls in ((os, 'replace', range(1, 17)), (os, 'fsync', range(1, 33)),
          (zipfile.ZipFile, 'close', range(1, 12)), (zipfile.ZipFile, 'open', range(1, 300, 23))) for call in calls for after in (False, True)]
chance, count, runs = random.Random(kills), 0, 0
chosen = iter(stages if kills >= len(stages) else chance.sample(stages, kills // 2))
at_stages = 0
while count < kills:
    path = folder / 'killed'
    stage = next(chosen, None)
    if stage:
        killed = not run_in_child(path, stage=stage)
        at_stages += killed
        count += killed
    while count < kills and (not stage or chance.random() < 0.3) and not run_in_child(path, seconds=chance.uniform(0, length)):
        count += 1
    while not run_in_child(path):
        pass
    assert_same_run(path, folder / 'whole')
    assert (path / 'summary.txt').read_bytes() == (folder / 'whole' / 'summary.txt').read_bytes()
    shutil.rmtree(path)
    runs += 1
print(f'{count} kills, {at_stages} of them at chosen steps of writing, in {runs} runs: every run equals the uninterrupted one, bit for bit')
'''


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
def test_a_run_killed_at_any_moment_and_resumed_equals_an_uninterrupted_one(tmp_path):
    """NERVENET_KILLS=500 tries so many; 146 and more hit every step of every write."""
    kills = os.environ.get('NERVENET_KILLS', '10')
    done = subprocess.run([sys.executable, '-c', KILLED_WHILE_TRAINING, str(tmp_path), kills, str(Path(__file__).parent)],
                          capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)


def test_fit_records_the_run(loaders, tmp_path):
    model, run, rows = train(loaders, tmp_path / 'run')
    assert json.loads((run.path / 'config.json').read_text()) == {'size': [16, 24], 'norm': 'batch'}
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
    RunFolder(tmp_path / 'run', {}).release()
    with pytest.raises(FileExistsError, match='choose another --out, or go on with the run in it: --resume'):
        RunFolder(tmp_path / 'run', {})


def test_summary_has_the_reference_form(loaders, tmp_path):
    _, run, rows = train(loaders, tmp_path / 'run', epochs=1)
    scores = {'dice_pooled': 0.4, 'dice_per_image': 0.5, 'iou_pooled': 0.3, 'accuracy': 0.9}
    text = run.summarize({'empty mask': scores})
    assert (run.path / 'summary.txt').read_text() == text
    for line in (f'accuracies: [{rows[0]["validation_accuracy"]:.4f}]', f'losses: [{rows[0]["validation_loss"]:.4f}]',
                 f'dicecoefs: [{rows[0]["validation_soft_dice_pooled"]:.4f}]', 'empty mask: hard dice 0.4000, per'):
        assert line in text
    assert 'average' not in text and '±' not in text                         # of one run
    other = rows[0] | {'validation_accuracy': rows[0]['validation_accuracy'] - 0.2}
    text = summaries([[rows[0]], [other]], [{'empty mask': scores}] * 2, [{}] * 2)
    assert f'average accuracies: {rows[0]["validation_accuracy"] - 0.1:.4f} ± 0.1000' in text
    assert 'empty mask: hard dice 0.4000 ± 0.0000' in text


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

def start_example(*arguments, name='train_unet.py'):
    return subprocess.Popen([sys.executable, str(ROOT / 'examples' / name), *map(str, arguments)], stdin=subprocess.DEVNULL,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env={**os.environ, 'PYTHONPATH': str(ROOT)})


def run_example(*arguments, name='train_unet.py'):
    process = start_example(*arguments, name=name)
    out, error = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, out, error)


def test_main_job_trains_and_leaves_a_run_folder(tmp_path, rng):
    write_pairs(tmp_path / 'data' / 'train', rng)
    done = run_example('--data', tmp_path / 'data', '--size', '15x24', '--base-channels', 2, '--depth', 2, '--epochs', 2,
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
    predicted = run_example('--model', tmp_path / 'run' / 'best.npz', '--input', tmp_path / 'data', '--output', tmp_path / 'masks',
                            '--submission', tmp_path / 'submission.csv', name='predict.py')
    assert predicted.returncode == 1 and 'Traceback' not in predicted.stderr
    assert 'skipped: ' in predicted.stderr and '1 of 13 images skipped or not scored: 9_1' in predicted.stderr
    assert '12 images predicted' in predicted.stdout and 'mean training mask' in predicted.stdout
    mask = numpy.array(Image.open(tmp_path / 'masks' / '1_1_mask.png'))
    assert mask.shape == (24, 36) and set(numpy.unique(mask)) <= {0, 255} and (tmp_path / 'masks' / '1_1_overlay.png').exists()
    results = list(csv.DictReader(io.StringIO((tmp_path / 'masks' / 'results.csv').read_text())))
    assert int(results[0]['area']) == (mask > 0).sum() and len(results) == 12 and 0 <= float(results[0]['dice']) <= 1
    assert len((tmp_path / 'submission.csv').read_text().splitlines()) == 13

    # A mask that cannot be read keeps an image from being scored, not from being predicted; nothing is overwritten.
    Image.fromarray(rng.integers(0, 255, (24, 36), dtype='uint8')).save(tmp_path / 'data' / 'train' / '1_1_mask.tif')
    options = '--model', tmp_path / 'run' / 'best.npz', '--input', tmp_path / 'data'
    smeared = run_example(*options, '--output', tmp_path / 'smeared', '--submission', tmp_path / 'submission.csv', name='predict.py')
    assert smeared.returncode == 1 and 'submission.csv: exists already' in smeared.stderr and not (tmp_path / 'smeared').exists()
    smeared = run_example(*options, '--output', tmp_path / 'smeared', name='predict.py')
    assert smeared.returncode == 1 and 'predicted, but not scored: ' in smeared.stderr and '--mask-threshold' in smeared.stderr
    assert '12 images predicted' in smeared.stdout and (tmp_path / 'smeared' / '1_1_mask.png').exists()
    scored = run_example(*options, '--output', tmp_path / 'scored', '--mask-threshold', 128, name='predict.py')
    assert 'predicted, but not scored' not in scored.stderr and 'skipped' in scored.stderr

    looked = run_example('--model', tmp_path / 'run' / 'best.npz', '--image', tmp_path / 'data' / 'train' / '1_1.tif',
                         '--output', tmp_path / 'look', '--pixel', '3,4', name='look_inside.py')
    assert looked.returncode == 0, looked.stderr
    assert 'pixel (3, 4)' in looked.stdout
    assert {path.name for path in (tmp_path / 'look').iterdir()} == {'stages.png', 'joins.png', 'depends.png'}


TINY = '--size', '16x24', '--base-channels', '2', '--depth', '2', '--device', 'cpu'


@pytest.fixture
def main():
    """The main function of examples/train_unet.py, called here and now."""
    specification = importlib.util.spec_from_file_location('train_unet', ROOT / 'examples' / 'train_unet.py')
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)

    def call(*arguments):
        module.main(list(map(str, arguments)))
    call.module = module
    return call


def test_main_job_stopped_by_a_signal_exits_130_and_goes_on_to_the_same_end(tmp_path, rng, main):
    write_pairs(tmp_path / 'data', rng)
    options = ['--data', tmp_path / 'data', *TINY, '--epochs', 20, '--batch-size', 2, '--dropout', 0.2, '--augment', 'default',
               '--inner-share', 0.4]
    main(*options, '--out', tmp_path / 'whole')
    for number in signal.SIGINT, signal.SIGTERM:
        run = tmp_path / str(int(number))
        process = start_example(*options, '--out', run)
        while not process.stdout.readline().startswith('2/20'):
            pass
        process.send_signal(number)
        _, error = process.communicate()
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
    for arguments, message in (['--epochs', 3], '--epochs is 3, but {}/config.json has 1'), (['--norm', 'none'], 'is None, but {}'), (
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
        done = run_example(*arguments, name=name)
        assert done.returncode != 0 and message in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
        assert 'Errno' not in done.stderr and not (tmp_path / 'run').exists()


@contextlib.contextmanager
def stopped_after(epochs, main, monkeypatch):
    """Within this context the main job is stopped by Ctrl-C after so many epochs."""
    def print_epoch(history, number):
        if len(history) == epochs:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(main.module, 'print_epoch', print_epoch)
        yield


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

    specification = importlib.util.spec_from_file_location('predict', ROOT / 'examples' / 'predict.py')
    predict_job = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(predict_job)
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
    for process in [start_example(*options, '--out', tmp_path / 'beside', '--fold', fold) for fold in (1, 3)]:
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


def test_a_split_by_image_says_that_it_leaks(tmp_path, rng, main, capsys):
    write_pairs(tmp_path / 'data', rng, subjects=2, images=4)
    main('--data', tmp_path / 'data', *TINY, '--epochs', 1, '--folds', 2, '--leaky-split-by-image', '--out', tmp_path / 'run')
    out = capsys.readouterr().out
    assert out.splitlines()[1].startswith('LEAKS: split by image')
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
    assert capsys.readouterr().out.splitlines()[1].startswith('WARNING: no subject is known')
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


def test_scans_are_augmented_and_endless_synthetic_images_are_not(main, tmp_path):
    parse = main.module.parse
    assert (parse([]).augment, parse([]).epochs) == ('none', 5)
    scans = parse(['--data', str(tmp_path)])
    assert (scans.augment, scans.epochs) == ('default', 15)
    given = parse(['--data', str(tmp_path), '--augment', 'none', '--epochs', '3'])
    assert (given.augment, given.epochs) == ('none', 3)


def test_single_options_replace_those_of_the_recipe(main):
    parse, augmentation = main.module.parse, main.module.augmentation
    assert augmentation(parse(['--augment', 'default'])) == ULTRASOUND
    changed = augmentation(parse(['--augment', 'default', '--zoom-range', '0.25', '--no-horizontal-flip', '--fill-mode', 'nearest']))
    assert (changed.zoom_range, changed.horizontal_flip, changed.fill_mode) == (0.25, False, 'nearest')
    assert changed.rotation_range == ULTRASOUND.rotation_range


def test_options_of_the_data_reach_training(tmp_path, rng, main):
    write_pairs(tmp_path / 'data', rng)
    for name in '1_1', '2_2', '3_1':
        Image.new('L', (36, 24)).save(tmp_path / 'data' / f'{name}_mask.tif')
    losses = []
    for number, changed in enumerate(([], ['--augment', 'none'], ['--nerve-share', '0.99'], ['--median-filter', '3'],
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
    with pytest.raises(MemoryError, match=r'a training step on 8 images of 16x24 with --base-channels 2 needs about 2.5 GiB, '
                                          r'lower --batch-size first \(Unable to allocate 3 TiB\)'):
        main('--data', tmp_path / 'data', *TINY, '--out', tmp_path / 'run')


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


@pytest.mark.parametrize('arguments, message', [
    (['--median-filter', 4], '--median-filter is 4; expected an odd size from 3 to 99'), (['--patience', 3], '--patience needs --inner-share'),
    (['--fold', 2], '--fold is 2 and --folds not given; expected --fold from 1 to --folds'), (['--split', 'X'], '--split needs --folds'),
    (['--folds', 2, '--fold', 3], '--fold is 3 and --folds 2'), (['--nerve-share', 1.5], 'is not a share between 0 and 1'),
    (['--folds', 2, '--validation-share', 0.5], '--validation-share has no meaning with --folds'),
    (['--folds', 5], '2 subjects cannot be dealt into 5 folds'), (['--rotation-range', -3], 'rotation_range is -3'),
    (['--nerve-share', 0.5], 'are to be without foreground, and there are none')])
def test_options_that_do_not_go_together_are_refused_in_one_line(arguments, message, tmp_path, rng, main, capsys):
    write_pairs(tmp_path / 'data', rng, subjects=2, images=2)
    with pytest.raises((SystemExit, ValueError)) as error:
        main('--data', tmp_path / 'data', *TINY, '--out', tmp_path / 'run', *arguments)
    said = capsys.readouterr().err.splitlines()[-1] if error.type is SystemExit else str(error.value)
    assert message in said and '\n' not in said
    assert not (tmp_path / 'run').exists()


def test_one_layer_by_hand_agrees_with_the_library():
    done = run_example(name='one_layer.py')
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('largest difference from the library') == 4
