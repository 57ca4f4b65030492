"""Training: one step, one epoch, one fit.

Everything this library computes comes together in the few lines of `train_step`; the rest of this file repeats them, keeps
score, and writes down what happened.
"""

import contextlib
import csv
import io
import json
import sys
import time
from pathlib import Path

import numpy

from .backend import device_of, move, to_cpu
from .checkpoint import atomic_write, save
from .layers import sigmoid
from .metrics import SegmentationScores
from .optim import clip_gradients

SCORES = ('soft_dice_pooled', 'soft_dice_per_image', 'dice_pooled', 'dice_per_image', 'iou_pooled', 'iou_per_image', 'accuracy',
          'foreground_share')


def train_step(model, loss, optimizer, x, target, max_norm=None, observe=None):
    """Make one step on the batch x (N, H, W, C_in), target (N, H, W, C_out); return the loss before it, 0-d.

    `max_norm` bounds the norm of the whole gradient; `observe` is passed on to the model's forward.
    """
    value = loss.forward(model.forward(x, observe), target)
    model.backward(loss.backward())
    if max_norm is not None:
        clip_gradients(model.gradients(), max_norm)
    optimizer.step(model.gradients())
    return value


def predict(model, x):
    """Return the foreground probabilities (N, H, W, C_out), in [0, 1], of the images x (N, H, W, C_in) in inference mode."""
    with inference(model):
        return sigmoid(model.forward(x))


@contextlib.contextmanager
def inference(*layers):
    """Within this context the layers are in inference mode and keep nothing; afterwards each is as it was, caches included."""
    before = [(layer, layer.training, layer.keep_cache, layer.cache) for outer in layers for _, layer in outer.layers()]
    for layer in layers:
        layer.eval()
    try:
        yield
    finally:
        for layer, training, keep_cache, cache in before:
            layer.training, layer.keep_cache, layer.cache = training, keep_cache, cache


def train_epoch(model, loss, optimizer, batches, schedule=None, max_norm=None):
    """Train on every batch once; return the scores over the epoch, a dict of name → float, 'loss' among them.

    The scores are those of the changing network on the batches as it met them, in training mode: a running account at no
    extra cost, not the score of the network at the end.

    Raises FloatingPointError, naming the batch, when the loss is no finite number.
    """
    model.train()
    device = device_of(model.head.params['weight'])
    scores, losses, images = SegmentationScores(), [], []
    for x, target in batches:
        x, target = move(x, device), move(target, device)

        def count(stage, y):
            if stage == 'head':
                scores.update(sigmoid(y), target)

        if schedule is not None:
            optimizer.learning_rate = schedule(optimizer.steps)
        losses.append(train_step(model, loss, optimizer, x, target, max_norm, observe=count))
        images.append(len(x))
        if device == 'cpu' and not numpy.isfinite(losses[-1]):      # on a GPU, looking at each step would make the host wait
            break
    return account(scores, losses, images)


def evaluate(model, loss, batches):
    """Return the scores of the model on every batch, in inference mode: a dict of name → float, 'loss' among them."""
    device = device_of(model.head.params['weight'])
    scores, losses, images = SegmentationScores(), [], []
    with inference(model, loss):
        for x, target in batches:
            logits = model.forward(move(x, device))
            target = move(target, device)
            losses.append(loss.forward(logits, target))
            scores.update(sigmoid(logits), target)
            images.append(len(x))
    return account(scores, losses, images)


def account(scores, losses, images):
    """Return all scores and the mean loss, each batch weighted by its number of images. Raises FloatingPointError."""
    losses = [float(to_cpu(value)) for value in losses]
    for number, value in enumerate(losses, 1):
        if not numpy.isfinite(value):
            raise FloatingPointError(f'the loss is {value} at batch {number}: lower --learning-rate, or look at that batch')
    return {'loss': float(numpy.average(losses, weights=images)), **scores.compute()}


def fit(model, loss, optimizer, training, validation, epochs, run, schedule=None, max_norm=None):
    """Train for `epochs` epochs, scoring `validation` after each, and record everything in `run`, a RunFolder.

    `training` and `validation` are Loaders; the number of an epoch decides their order and randomness. Yields a row after each
    epoch: a dict of 'epoch', 'learning_rate', 'seconds', 'images_per_second', 'train_…' and 'validation_…' for each of the scores.
    """
    for epoch in range(1, epochs + 1):
        start, part = time.perf_counter(), 'training'
        try:
            with numpy.errstate(over='ignore', invalid='ignore'):       # a diverged network gets one clear error, below
                batches = progress(training.epoch(epoch), len(training), f'epoch {epoch}/{epochs}')
                trained = train_epoch(model, loss, optimizer, batches, schedule, max_norm)
                speed, part = len(training.samples) / (time.perf_counter() - start), 'validation'
                validated = evaluate(model, loss, validation.epoch(epoch))
        except FloatingPointError as error:
            kept = f'. The last good epoch is in {run.last}' if run.history else ''
            raise FloatingPointError(f'epoch {epoch}, {part}: {error}{kept}') from error
        row = {'epoch': epoch, 'learning_rate': optimizer.learning_rate, 'seconds': round(time.perf_counter() - start, 2),
               'images_per_second': round(speed, 1),
               **{f'train_{name}': trained[name] for name in ('loss', *SCORES)},
               **{f'validation_{name}': validated[name] for name in ('loss', *SCORES)}}
        run.record(row, model)
        yield row


class RunFolder:
    """The folder of one training run: config.json, history.csv, best.npz, last.npz, summary.txt.

    `best.npz` is the epoch with the highest pooled hard Dice on the validation part. It was chosen by looking at that part, so
    its score there flatters it: it is for use, not for reporting. `last.npz` is what the fixed schedule ends with.
    """

    def __init__(self, path, config):
        """Make the folder and write `config`, a dict that JSON can hold, into it.

        Raises FileExistsError if the folder already holds a run: nothing is overwritten.
        """
        self.path = Path(path)
        self.best, self.last, self.history = self.path / 'best.npz', self.path / 'last.npz', []
        self.config = config
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise FileExistsError(f'{self.path} already exists and is not an empty folder; choose another --out')
        self.path.mkdir(parents=True, exist_ok=True)
        self.write('config.json', json.dumps(config, indent=2) + '\n')

    def write(self, name, text):
        with atomic_write(self.path / name) as file:
            file.write(text.encode())

    def record(self, row, model):
        """Add an epoch's row to history.csv and save the model, as last.npz and, if it is the best so far, as best.npz."""
        best = max((old['validation_dice_pooled'] for old in self.history), default=-1.0)
        self.history.append(row)
        text = io.StringIO()
        writer = csv.DictWriter(text, row.keys(), lineterminator='\n')
        writer.writeheader()
        writer.writerows(self.history)
        self.write('history.csv', text.getvalue())
        extra = {'epoch': row['epoch'], 'size': self.config['size'],
                 'scores': {name: value for name, value in row.items() if name.startswith('validation_')}}
        save(self.last, model, **extra)
        if row['validation_dice_pooled'] > best:
            save(self.best, model, **extra)

    def summarize(self, baselines):
        """Write summary.txt from the last epoch and the baselines, and return its text."""
        text = summary([self.history[-1]], baselines)
        self.write('summary.txt', text)
        return text


def summary(rows, baselines):
    """Return the text of summary.txt: a list for each score, one value per row (a run, or one per fold), and mean ± deviation.

    `dicecoefs` is the soft Dice coefficient; with a loss of DiceLoss alone it is about minus the loss.
    """
    columns = [('accuracies', 'accuracy', 'share of pixels that are right'),
               ('losses', 'loss', 'validation loss, mean over batches weighted by their images'),
               ('ious', 'iou_pooled', 'hard IoU, pooled'), ('ious per image', 'iou_per_image', 'hard IoU, mean over images'),
               ('dicecoefs', 'soft_dice_pooled', 'soft Dice, pooled'),
               ('soft dice per image', 'soft_dice_per_image', 'soft Dice, mean over images'),
               ('hard dice', 'dice_pooled', 'hard Dice, pooled'),
               ('hard dice per image', 'dice_per_image', 'hard Dice, mean over images')]
    lines = ['Scores on validation subjects after the last epoch', '']
    for title, name, meaning in columns:
        values = [row[f'validation_{name}'] for row in rows]
        lines += [f'{title}: [{", ".join(f"{value:.4f}" for value in values)}]    ({meaning})']
    lines.append('')
    for title, name, _ in columns:
        values = [row[f'validation_{name}'] for row in rows]
        lines.append(f'average {title}: {numpy.mean(values):.4f} ± {numpy.std(values):.4f}')
    lines += ['', 'The same subjects without looking at the image', '']
    for name, scores in baselines.items():
        lines.append(f'{name}: hard dice {scores["dice_pooled"]:.4f}, per image {scores["dice_per_image"]:.4f}, '
                     f'iou {scores["iou_pooled"]:.4f}, accuracy {scores["accuracy"]:.4f}')
    return '\n'.join(lines) + '\n'


def progress(items, total, label, stream=None, seconds=30):
    """Yield `items`, showing the share done, the speed and the time left.

    On a terminal that is a bar, wiped at the end; elsewhere a plain line every so many `seconds`. `total` is how
    many items there will be.
    """
    stream = sys.stderr if stream is None else stream
    terminal, start = stream.isatty(), time.perf_counter()
    shown = -1.0 if terminal else start                 # a terminal shows the first item at once
    try:
        for done, item in enumerate(items, 1):
            yield item
            now = time.perf_counter()
            if now - shown < (0.1 if terminal else seconds):
                continue
            shown, speed = now, done / (now - start)
            left, filled = round((total - done) / speed), 30 * done // total
            state = f'{done}/{total}  {speed:.1f} batches/s  {left // 60}:{left % 60:02d} left'
            stream.write(f'\r{label} [{"█" * filled}{"·" * (30 - filled)}] {state} \x1b[K' if terminal else f'{label}  {state}\n')
            stream.flush()
    finally:                                            # also when the loop is left half-way
        if terminal:
            stream.write('\r\x1b[K')
            stream.flush()
