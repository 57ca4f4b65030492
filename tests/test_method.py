"""Every number that the main job reports, computed in another way from the images and the model files it leaves.

Here are plain loops over arrays that hold all images of a part; of the library only the network, its loss, the augmentation and the
reading of model files are used, which have tests of their own. `check_method` also serves test_planted_bugs.py.
"""

import csv
import functools
import itertools
import json
import math
import re

import numpy
import pytest
from PIL import Image

import nervenet
from nervenet.images.augment import ULTRASOUND
from nervenet.losses import BCEWithLogitsLoss, DiceLoss, WeightedSum

SEED, EPOCHS, BATCH, RATE, CLIP = 2, 4, 3, 0.1, 0.3
OPTIONS = ['--size', '16x24', '--base-channels', 2, '--depth', 1, '--device', 'cpu', '--epochs', EPOCHS, '--batch-size', BATCH,
           '--optimizer', 'sgd', '--learning-rate', RATE, '--clip-norm', CLIP, '--inner-share', 0.3, '--seed', SEED, '--schedule', 'cosine',
           '--average-weights', 0.25]


@functools.cache
def pair(subject, image):
    """Return an image and its mask, (16, 24) uint8: four of each of eight subjects, at the size of the network; the fourth is empty."""
    rng, (rows, columns) = numpy.random.default_rng([3, subject, image]), numpy.mgrid[:16, :24]
    centre = rng.uniform([4, 6], [12, 18])
    mask = ((rows - centre[0])**2 + (columns - centre[1])**2 < 12 + 2 * subject) & (image < 4)
    return (20 + 10 * subject + 70 * mask + 50 * rng.random(mask.shape)).astype('uint8'), mask.astype('uint8')


def write_images(folder):
    folder.mkdir()
    for subject in range(1, 9):
        for image in range(1, 5):
            grey, mask = pair(subject, image)
            Image.fromarray(grey).save(folder / f'{subject}_{image}.png')
            Image.fromarray(255 * mask).save(folder / f'{subject}_{image}_mask.png')


def part(subjects):
    """Return (images, masks) of the subjects, (N, 16, 24, 1) each: in [0, 1], and 0 or 1."""
    images, masks = zip(*(pair(int(subject), image) for subject in sorted(subjects, key=int) for image in range(1, 5)))
    return (numpy.stack(images)[..., None] / 255).astype('float32'), numpy.stack(masks)[..., None].astype('float32')


def overlap_scores(p, y, threshold=0.5):
    """Return the scores of probabilities p against masks y, (N, H, W, 1), one image after the other."""
    def share(above, below):
        return above / below if below else 1.0

    m = (p > threshold).astype(float)
    p, y = p.astype(float), y.astype(float)
    images = list(zip(p, m, y))
    return {'soft_dice_pooled': share(2 * (p * y).sum(), p.sum() + y.sum()), 'dice_pooled': share(2 * (m * y).sum(), m.sum() + y.sum()),
            'iou_pooled': share((m * y).sum(), numpy.maximum(m, y).sum()), 'accuracy': (m == y).mean(), 'foreground_share': m.mean(),
            'soft_dice_per_image': numpy.mean([share(2 * (a * c).sum(), a.sum() + c.sum()) for a, b, c in images]),
            'dice_per_image': numpy.mean([share(2 * (b * c).sum(), b.sum() + c.sum()) for a, b, c in images]),
            'iou_per_image': numpy.mean([share((b * c).sum(), numpy.maximum(b, c).sum()) for a, b, c in images])}


def assert_scores(reported, expected, prefix=''):
    for name, value in expected.items():
        if prefix + name in reported:
            assert float(reported[prefix + name]) == pytest.approx(value, abs=2e-5), prefix + name
    assert any(prefix + name in reported for name in expected)


def mean_loss(model, images, masks):
    """Return Dice loss + cross-entropy of the network, the mean over images."""
    p, y, total = nervenet.predict(model, images).astype(float), masks.astype(float), 0.0
    for of_image, true in zip(p, y):
        total -= (2 * (of_image * true).sum() + 1) / (of_image.sum() + true.sum() + 1)
        total -= numpy.log(numpy.where(true == 1, of_image, 1 - of_image)).mean()
    return total / len(images)


def best_set(masks):
    """Return the mean mask cut where its pooled Dice on `masks` is best, (H, W), found by trying every cut."""
    q = masks.mean(axis=0)[..., 0].astype(float)
    cuts = [q >= level for level in numpy.unique(q)]
    return max(cuts, key=lambda cut: 2 * q[cut].sum() / (cut.sum() + q.sum()))


@functools.cache
def train_by_hand(subjects):
    """Train on the subjects as the options say: gradient descent with Nesterov momentum, clipped, along half a cosine.

    Return (the weighted mean of the networks after every eighth step and after each epoch, the mean loss of each epoch).
    """
    images, masks = part(subjects)
    model = nervenet.UNet(base_channels=2, depth=1, input_mean=float(images.mean(dtype=float)), input_std=float(images.std(dtype=float)),
                          rng=numpy.random.default_rng(SEED))
    loss = WeightedSum([(1.0, DiceLoss(per_image=True)), (1.0, BCEWithLogitsLoss())])
    velocity = {name: 0 for name in model.parameters()}
    per_epoch = math.ceil(len(images) / BATCH)
    total, step, losses, met = EPOCHS * per_epoch, 0, [], {}
    warmup = min(total // 10, per_epoch)
    for epoch in range(1, EPOCHS + 1):
        order, epoch_losses = numpy.arange(len(images)), []
        numpy.random.default_rng([SEED, epoch]).shuffle(order)
        for start in range(0, len(order), BATCH):
            chosen = order[start:start + BATCH]
            rngs = [numpy.random.default_rng([SEED, epoch, int(index), 1]) for index in chosen]
            x, y = ULTRASOUND(images[chosen], masks[chosen], rngs)
            epoch_losses += [float(loss.forward(model.forward(x), y))] * len(chosen)
            model.backward(loss.backward())
            norm = math.sqrt(sum((g.astype(float)**2).sum() for g in model.gradients().values()))
            rate = (RATE * (step + 1) / warmup if step < warmup else
                    RATE * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2)
            for name, w in model.parameters().items():
                g = model.gradients()[name] * min(1, CLIP / norm)
                velocity[name] = 0.9 * velocity[name] + g
                w -= rate * (g + 0.9 * velocity[name])
            step += 1
            if step % 8 == 0 or start + BATCH >= len(order):
                met[step] = {name: array.astype(float) for name, array in model.state_dict().items()}
        losses.append(numpy.mean(epoch_losses))
    parts = numpy.diff(numpy.array([0, *met])**3.0) / total**3                       # a mean age of a quarter: k^2 is integrated
    for name, array in model.state_dict().items():
        array[...] = sum(part * state[name] for part, state in zip(parts, met.values()))
    return model, losses


def mask_of(p, settings):
    """Return the masks (N, H, W, 1) that settings make of probabilities: cut, rid of lesser pieces, and emptied where the area is too small."""
    m = p > settings['threshold']
    m = numpy.stack([largest(one[..., 0])[..., None] for one in m]) if settings['largest_component'] else m
    return m & (m.mean(axis=(1, 2, 3), keepdims=True) >= settings['minimal_area'])


def largest(mask):
    """Return the largest piece of a mask (H, W), in which pixels touch at their sides, by flooding one after the other."""
    left, best = {*zip(*numpy.nonzero(mask))}, set()
    while left:
        piece, edge = set(), {min(left)}
        while edge:
            piece |= edge
            edge = {(y + i, x + j) for y, x in edge for i, j in ((0, 1), (1, 0), (0, -1), (-1, 0))} & left - piece
        left, best = left - piece, max(best, piece, key=len)
    kept = numpy.zeros_like(mask)
    kept[tuple(numpy.array([*best], int).reshape(-1, 2).T)] = True
    return kept


def fitted_temperature(model, images, masks):
    """Return the temperature with the least cross-entropy on pixels that have foreground, true or predicted, at most one pixel away."""
    p, y = (array[..., 0] for array in (nervenet.predict(model, images).astype(float), masks))
    there = numpy.pad((p > 0.5) | (y > 0), [(0, 0), (1, 1), (1, 1)])
    near = sum(there[:, i:i + y.shape[1], j:j + y.shape[2]] for i in range(3) for j in range(3)) > 0
    near |= ~near.any(axis=(1, 2), keepdims=True)                               # where there is none, all pixels count
    x, y, T = numpy.log(p[near] / (1 - p[near])), y[near], 1.0
    for width in 20, 1.2, 1.01, 1.0005:                                         # finer and finer
        tried = (T * numpy.geomspace(1 / width, width, 401)).clip(0.05, 20)
        T = tried[numpy.argmin([numpy.logaddexp(0, numpy.where(y > 0, -x, x) / t).mean() for t in tried])]
    return T


def probabilities(model, images, settings):
    p = [nervenet.predict(model, images), nervenet.predict(model, images[:, :, ::-1].copy())[:, :, ::-1]][:1 + settings['flip_average']]
    return numpy.mean([1 / (1 + (1 / one.astype(float) - 1)**(1 / settings['temperature'])) for one in p], axis=0)


def chosen_settings(model, images, masks):
    """Return (settings, score) by trying every candidate, from the simplest on; each must be better by 0.002 than the one before."""
    best, best_score, temperature = None, None, fitted_temperature(model, images, masks)
    for flip, piece in itertools.product((False, True), (False, True)):
        for area in 0, 0.0025, 0.005, 0.01, 0.015, 0.02:
            candidates = [{'threshold': round(0.1 + 0.05 * i, 2), 'minimal_area': area, 'flip_average': flip, 'largest_component': piece,
                           'temperature': temperature} for i in range(17)]
            p = probabilities(model, images, candidates[0])
            scores = [overlap_scores(mask_of(p, each).astype(float), masks)['dice_per_image'] for each in candidates]
            if best is None:
                best, best_score = candidates[8], scores[8]
            if max(scores) > best_score + 0.002:
                best, best_score = candidates[int(numpy.argmax(scores))], max(scores)
    return best, best_score


def check_method(folder, main):
    """Run the main job in `folder`, and compare all it reports with what the functions above find."""
    write_images(folder / 'data')
    main('--data', folder / 'data', *OPTIONS, '--out', folder / 'run')
    run = folder / 'run'
    config, settings = (json.loads((run / name).read_text()) for name in ('config.json', 'settings.json'))
    subjects = {name: config[f'{name}_subjects'] for name in ('training', 'inner', 'validation')}
    assert sorted(sum(subjects.values(), [])) == [str(n) for n in range(1, 9)] and all(subjects.values())
    parts = {name: part(who) for name, who in subjects.items()}
    (last, last_extra), (best, best_extra) = (nervenet.load_checkpoint(run / name) for name in ('last.npz', 'best.npz'))
    with open(run / 'history.csv', newline='') as file:
        history = list(csv.DictReader(file))

    # What is measured before training, on the training part.
    images, masks = parts['training']
    assert last.config['input_mean'] == pytest.approx(images.mean(dtype=float), abs=1e-6)
    assert last.config['input_std'] == pytest.approx(images.std(dtype=float), abs=1e-6)
    mean_mask = best_set(masks)
    assert numpy.array_equal(last_extra['mean_training_mask'], mean_mask) and 0 < mean_mask.mean() < 0.5
    y = parts['validation'][1]
    assert_scores(config['baselines']['empty mask'], overlap_scores(0 * y, y))
    assert_scores(config['baselines']['mean training mask'], overlap_scores(numpy.broadcast_to(mean_mask[..., None], y.shape), y))

    # The training.
    model, losses = train_by_hand(tuple(subjects['training']))
    assert [int(row['epoch']) for row in history] == [1, 2, 3, 4] and last_extra['epoch'] == EPOCHS
    assert [float(row['train_loss']) for row in history] == pytest.approx(losses, abs=1e-4)
    for name, array in model.parameters().items():
        numpy.testing.assert_allclose(last.parameters()[name], array, atol=2e-5, err_msg=name)

    # The scores of the last epoch, and the best one.
    for name in 'inner', 'validation':
        images, masks = parts[name]
        assert_scores(history[-1], {**overlap_scores(nervenet.predict(last, images), masks), 'loss': mean_loss(last, images, masks),
                                    'true_foreground_share': masks.mean()}, f'{name}_')
    inner = [float(row['inner_dice_pooled']) for row in history]
    number = best_extra['epoch']
    assert inner[number - 1] == max(inner) and number != EPOCHS, 'else the two files would be one: another SEED'
    assert_scores(history[number - 1], overlap_scores(nervenet.predict(best, parts['inner'][0]), parts['inner'][1]), 'inner_')

    # The choices, and what they score.
    images, masks = parts['validation']
    for name, network, extra in ('last.npz', last, last_extra), ('best.npz', best, best_extra):
        expected, there = chosen_settings(network, *parts['inner'])
        assert settings[name]['settings'] == extra['settings'] == pytest.approx(expected, rel=5e-3), name
        assert settings[name]['dice per image there'] == pytest.approx(there, abs=1e-5)
        found = mask_of(probabilities(network, images, expected), expected).astype(float)
        assert_scores(settings[name]['validation'], overlap_scores(found, masks))
    averaged = overlap_scores(probabilities(last, images, {'flip_average': True, 'temperature': 1}), masks)
    assert_scores(settings['last.npz']['flip average'], averaged)

    # The summary: the last epoch, the one that the inner subjects chose, the last one averaged, the last one with their settings.
    hard_dice = [float(text) for text in re.findall(r'^hard dice: \[(.*)\]', (run / 'summary.txt').read_text(), re.M)]
    rows = [float(history[epoch - 1]['validation_dice_pooled']) for epoch in (EPOCHS, number)]
    expected = [*rows, averaged['dice_pooled'], settings['last.npz']['validation']['dice_pooled']]
    assert hard_dice == pytest.approx(expected, abs=6e-5) and len(set(hard_dice)) == 4


def test_every_number_that_the_main_job_reports_is_found_again_in_another_way(tmp_path, main):
    check_method(tmp_path, main)
