import contextlib
import dataclasses

import numpy
import pytest

import nervenet
from helpers import write_pairs
from nervenet import BatchNorm2D, UNet
from nervenet.engine import backend
from nervenet.images.augment import ULTRASOUND
from nervenet.images.data import Loader, Reader
from nervenet.images.samples import find_samples
from nervenet.losses import BCEWithLogitsLoss, DiceLoss, WeightedSum
from nervenet.optim import SGD, Adam, AdamW
from nervenet.train import evaluate, predict, train_epoch, train_step


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

    class NotANumber(DiceLoss):
        def forward(self, logits, target):
            return super().forward(logits, target) * numpy.nan

    loss = NotANumber() if xp is numpy else DiceLoss()
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
