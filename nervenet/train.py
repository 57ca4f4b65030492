"""Training: one step, one epoch, one fit.

Everything this library computes comes together in the few lines of `train_step`; the rest of this file repeats them, keeps
score, and writes down what happened, so that a run that was stopped, or killed, goes on as if nothing had happened.
"""

import contextlib
import csv
import io
import json
import os
import signal
import sys
import time
import weakref
from pathlib import Path

import numpy

from .backend import get_array_module, move, to_cpu
from .checkpoint import atomic_write, load_checkpoint, save
from .data import make_folder, refuse_content
from .layers import sigmoid
from .metrics import SegmentationScores
from .optim import clip_gradients

try:
    import fcntl
except ImportError:                     # Windows: there, nobody is kept from training in one folder twice at a time
    fcntl = None

WHERE = 'data', 'device', 'precision'     # of a config: where the data lie and what computes; a run may go on elsewhere
SCORES = ('soft_dice_pooled', 'soft_dice_per_image', 'dice_pooled', 'dice_per_image', 'iou_pooled', 'iou_per_image', 'accuracy',
          'foreground_share')
HARD_SCORES = 'dice_pooled', 'dice_per_image', 'iou_pooled', 'iou_per_image', 'accuracy'        # of masks


def train_step(model, loss, optimizer, x, target, max_norm=None, observe=None):
    """Make one step on the batch x (N, H, W, C_in), target (N, H, W, C_out); return the loss before it, 0-d.

    `max_norm` bounds the norm of the whole gradient; `observe` is passed on to the model's forward.
    """
    value = loss.forward(model.forward(x, observe), target)
    model.backward(loss.backward(), input_gradient=False)
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

    Raises FloatingPointError, naming the batch, when logits or loss are no finite numbers. On the CPU that is at once, for logits
    before the step that would spoil the parameters, and the first layer at fault is named too. On a GPU, where looking at each
    step would make the host wait, only the losses are looked at, at the end of the epoch.
    """
    model.train()
    device = model.device
    scores, losses, images = SegmentationScores(), [], []
    for number, (x, target) in enumerate(batches, 1):
        x, target = move(x, device), move(target, device)
        before = generator_states(model)

        def count(stage, y):
            if stage == 'head':
                if device == 'cpu' and not numpy.isfinite(y).all():
                    set_generator_states(model, before)
                    raise FloatingPointError(f'the logits are not finite at batch {number}; the first values that are not are '
                                             f'in {first_not_finite(model, x)}: lower --learning-rate, or look at that batch')
                scores.update(sigmoid(y), target)

        if schedule is not None:
            optimizer.learning_rate = schedule(optimizer.steps)
        losses.append(train_step(model, loss, optimizer, x, target, max_norm, observe=count))
        images.append(len(x))
        if device == 'cpu' and not numpy.isfinite(losses[-1]):
            break
    return account(scores, losses, images)


def first_not_finite(model, x):
    """Return, in words, where the first NaN or infinite value appears on the way of x (N, H, W, C) through the model."""
    if not numpy.isfinite(x).all():
        return 'the images'
    found = []

    def watched(name, layer, forward):
        def function(*inputs):
            y = forward(*inputs)
            if not found and not numpy.isfinite(y).all():
                spoilt = [f'its {key} is not' for key, array in layer.params.items() if not numpy.isfinite(array).all()]
                found.append(f'the output of {name} ({", ".join(spoilt) or "its parameters are finite"})')
            return y
        return function

    innermost = [(prefix[:-1], layer) for prefix, layer in model.layers() if not layer.children]
    try:
        for name, layer in innermost:
            layer.forward = watched(name, layer, layer.forward)         # hides the method of the class
        model.forward(x)
    finally:
        for _, layer in innermost:
            del layer.forward
    return found[0] if found else 'no layer'


def generator_states(model):
    """Return {name of a layer: state of its random generator}, of the layers that draw."""
    return {name: layer.rng.bit_generator.state for name, layer in model.layers() if hasattr(layer, 'rng')}


def set_generator_states(model, states):
    """Bring the random generators of the model's layers into the states that `generator_states` returned."""
    for name, layer in model.layers():
        if hasattr(layer, 'rng'):
            layer.rng.bit_generator.state = states[name]


def evaluate(model, loss, batches):
    """Return the scores of the model on every batch, in inference mode: a dict of name → float, 'loss' among them."""
    device = model.device
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
    losses = to_cpu(get_array_module(*losses).stack(losses)).tolist()               # fetched once, not one by one
    for number, value in enumerate(losses, 1):
        if not numpy.isfinite(value):
            raise FloatingPointError(f'the loss is {value} at batch {number}: lower --learning-rate, or look at that batch')
    return {'loss': float(numpy.average(losses, weights=images)), **scores.compute()}


class Interrupted(Exception):
    """Training was asked to stop, and did, between two batches."""


@contextlib.contextmanager
def stopping_on_signals():
    """Yield a function that says whether Ctrl-C or SIGTERM has asked to stop; the second time they stop the process at once."""
    asked = []

    def ask(number, frame):
        asked.append(number)
        set_handlers(before)
        os.write(2, b'\nstopping after this batch; once more to stop at once\n')     # print may not run twice at a time

    def set_handlers(handlers):
        return {number: signal.signal(number, handler) for number, handler in handlers.items()}

    before = set_handlers({signal.SIGINT: ask, signal.SIGTERM: ask})
    try:
        yield lambda: bool(asked)
    finally:
        set_handlers(before)


def fit(model, loss, optimizer, training, validation, epochs, run, schedule=None, max_norm=None, inner=None, patience=None,
        stop=lambda: False):
    """Train until `epochs` epochs are done, scoring `validation` after each, and record everything in `run`, a RunFolder.

    `training` and `validation` are Loaders; the number of an epoch decides their order and randomness. Yields a row after each
    epoch: a dict of 'epoch', 'learning_rate', 'seconds', 'images_per_second', 'waited_seconds' (how long training waited for its
    batches), 'train_…' and 'validation_…' for each of the scores.

    inner     a Loader of subjects that neither other part holds: the best epoch is chosen on them instead of on `validation`,
              whose scores then are honest; rows get 'inner_…' scores
    patience  stop after so many epochs without a better one
    stop      asked after each batch; once it returns True, Interrupted is raised

    Epochs that `run` has already are not repeated: `RunFolder.restore` puts model and optimizer behind the last of them, and
    since every draw follows from the seed, the epoch and the restored states, training goes on bit for bit as without a stop.
    """
    def watched(batches):
        for batch in batches:
            yield batch
            if stop():
                raise Interrupted

    parts = {'validation': validation} | ({} if inner is None else {'inner': inner})
    while len(run.history) < epochs and not (patience and run.epochs_since_best() >= patience):
        epoch = len(run.history) + 1
        start, part = time.perf_counter(), 'training'
        try:
            with numpy.errstate(over='ignore', invalid='ignore'):       # a diverged network gets one clear error, below
                batches = progress(watched(training.epoch(epoch)), len(training), f'epoch {epoch}/{epochs}')
                scores = {'train': train_epoch(model, loss, optimizer, batches, schedule, max_norm)}
                speed, waited = len(training.samples) / (time.perf_counter() - start), training.waited_seconds
                for part, loader in parts.items():
                    scores[part] = evaluate(model, loss, watched(loader.epoch(epoch)))
        except FloatingPointError as error:
            kept = f'. The last good epoch is in {run.last}' if run.history else ''
            raise FloatingPointError(f'epoch {epoch}, {part}: {error}{kept}') from error
        row = {'epoch': epoch, 'learning_rate': optimizer.learning_rate, 'seconds': round(time.perf_counter() - start, 2),
               'images_per_second': round(speed, 1), 'waited_seconds': round(waited, 3),
               **{f'{part}_{name}': values[name] for part, values in scores.items() for name in ('loss', *SCORES)}}
        run.record(row, model, optimizer)
        yield row


def claim(folder, wait=False):
    """Keep other processes from claiming the folder, until this one ends or calls the function that is returned.

    If another process has claimed it, wait until it is free, or, by default, raise BlockingIOError. A killed process keeps no
    claim. It takes a system and a disk that know `flock`; on others, as on Windows, nothing is claimed.
    """
    if fcntl is None:
        return lambda: None
    file = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(file)
        raise BlockingIOError(f'{folder} is in use: another process is training there') from None
    except OSError:                     # some network folders refuse: then as on Windows
        os.close(file)
        return lambda: None
    return lambda: os.close(file)


class RunFolder:
    """The folder of one training run: config.json, history.csv, best.npz, last.npz, summary.txt.

    `best.npz` is the epoch with the highest pooled hard Dice on the inner subjects, if there are any, else on the validation
    part. It was chosen by looking at that part, so its score there flatters it. `last.npz` is the network after the last epoch.

    Until the run is complete, `last.npz` also holds the history, the optimizer and the states of the random generators, and is
    the only truth: it is written first and whole, and what a kill kept from being written after it is made again from it.
    """

    def __init__(self, path, config, resume=False):
        """Make the folder and write `config`, a dict that JSON can hold, into it; or, with `resume`, take up what is there.

        The folder belongs to this process until the RunFolder is gone. Raises BlockingIOError if another process has it,
        FileExistsError if it holds a run that is not to be resumed, ValueError if that run's config differs from this one.
        """
        self.path = Path(path)
        self.best, self.last, self.history = self.path / 'best.npz', self.path / 'last.npz', []
        self.config = json.loads(json.dumps(config))
        make_folder(self.path, '--out')
        self.release = weakref.finalize(self, claim(self.path))
        if resume and (self.path / 'config.json').exists():
            check_config(self.path / 'config.json', self.config)
            move_config(self.path / 'config.json', self.config)
        else:
            refuse_content(self.path, '--out', but=['config.json.partial'], or_else=or_go_on(self.path, 'run'))
            write_config(self.path / 'config.json', config)

    def write(self, name, text):
        with atomic_write(self.path / name) as file:
            file.write(text.encode())

    def restore(self, model, optimizer):
        """Bring model and optimizer to where they were after the last recorded epoch, and the records with them.

        Raises CheckpointError for a damaged file, ValueError for one of another network.
        """
        if not self.last.exists():
            return
        stored, extra = load_checkpoint(self.last)
        if stored.config != model.config:
            name = next(name for name in model.config if stored.config[name] != model.config[name])
            raise ValueError(f'{self.last}: its network has {name} {stored.config[name]}, this run gives '
                             f'{model.config[name]}; have the images changed?')
        model.load_state_dict(stored.state_dict())
        self.history = extra['history']
        if 'state' in extra:                                    # absent once the run is complete
            optimizer.load_state_dict(extra['state']['optimizer'])
            set_generator_states(model, extra['state']['generators'])
            self.write_records(model)

    def epochs_since_best(self):
        return self.history[-1]['epoch'] - best_row(self.history)['epoch'] if self.history else 0

    def record(self, row, model, optimizer):
        """Add an epoch's row, and save the model as last.npz and, if it is the best so far, as best.npz."""
        self.history.append(row)
        save(self.last, model, **self.extra(), history=self.history,
             state={'optimizer': optimizer.state_dict(), 'generators': generator_states(model)})
        self.write_records(model)

    def write_records(self, model):
        """Write what follows from last.npz: history.csv, and best.npz if the last epoch is the best."""
        if self.epochs_since_best() == 0:
            save(self.best, model, **self.extra())
        text = io.StringIO()
        writer = csv.DictWriter(text, self.history[-1].keys(), lineterminator='\n')
        writer.writeheader()
        writer.writerows(self.history)
        self.write('history.csv', text.getvalue())

    def extra(self):
        """Return what a file says of its network: how images must be prepared for it, its epoch and its scores."""
        row = self.history[-1]
        return {'epoch': row['epoch'], 'size': self.config['size'], 'median_filter': self.config.get('median_filter'),
                'scores': {name: value for name, value in row.items() if name.startswith(('validation_', 'inner_'))}}

    def complete(self, path, **extra):
        """Add `extra` to last.npz or best.npz, `path`, and take away what only resuming needs."""
        model, before = load_checkpoint(path)
        before.pop('state', None)
        save(path, model, **{**before, **extra})

    def summarize(self, baselines, chosen=None, note=''):
        """Write summary.txt, the sign that the run is complete, and return its text. For the arguments see `summaries`."""
        text = summaries([self.history], [baselines], [chosen or {}], note)
        self.write('summary.txt', text)
        return text


def read_config(folder):
    """Return the config of the run in `folder`, a dict. Raises FileNotFoundError or ValueError, saying what was expected."""
    path = Path(folder) / 'config.json'
    if not path.is_file():
        raise FileNotFoundError(f'{path}: no such file, so there is no run to resume; start one with --out {folder}')
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f'{path}: cannot be read ({error})') from None
    if not isinstance(config, dict):
        raise ValueError(f'{path}: holds a {type(config).__name__}, expected the settings of a run')
    return config


def or_go_on(folder, what):
    """Return how an error about `folder` may end: the way to go on with what lies in it, '' if it holds nothing of ours."""
    return f', or go on with the {what} in it: --resume {folder}' if (folder / 'config.json').exists() else ''


def check_config(path, config):
    """Raise ValueError, naming both values, if the config in the file `path` says another thing than `config`.

    Where the folder lies, which versions are at work and what WHERE names makes no difference.
    """
    stored = read_config(path.parent)
    for name in sorted((stored.keys() | config.keys()) - {'out', 'nervenet', 'numpy', *WHERE}):
        if stored.get(name) != config.get(name):
            old, new = (str(values.get(name)) for values in (stored, config))
            old, new = (text if len(text) <= 60 else text[:60] + '…' for text in (old, new))
            of_data = name == 'baselines' or name.endswith(('_images', '_subjects'))
            raise ValueError(f'{path}: '
                             + ('the baselines are others now' if name == 'baselines' else f'{name} is {old} there and {new} now')
                             + ('; have images or masks changed? Bring them back' if of_data else '; change it back')
                             + ', or start a new run with another --out')


def move_config(path, config):
    """Write into the config in the file `path` where, by `config`, it goes on: what WHERE names."""
    stored = read_config(path.parent)
    moved = {**stored, **{name: config[name] for name in WHERE if name in config}}
    if moved != stored:
        write_config(path, moved)


def write_config(path, config):
    with atomic_write(path) as file:
        file.write((json.dumps(config, indent=2) + '\n').encode())


def best_row(history):
    """Return the first row with the highest pooled hard Dice: of the inner subjects, if there are any, else in validation.

    Of equals, the one with the highest soft Dice: while no probability is above one half yet, all hard scores are 0.
    """
    part = 'inner' if 'inner_dice_pooled' in history[0] else 'validation'
    return max(history, key=lambda row: (row[f'{part}_dice_pooled'], row[f'{part}_soft_dice_pooled']))


def summaries(histories, baselines, chosen, note=''):
    """Return the text of summary.txt for one run or several folds: the last epoch, and what inner subjects, if any, chose.

    For each history `baselines` holds {name: scores}, and `chosen` what settings.json says of last.npz: the scores of the last
    network on the validation subjects, 'flip average' with each prediction averaged with that of the mirrored image, 'validation'
    with the settings that the inner subjects, if there are any, chose. `note` is what is to be said first.
    """
    text = note and note + '\n\n'
    text += summary([history[-1] for history in histories], baselines)
    if 'inner_dice_pooled' in histories[0][-1]:
        rows = [best_row(history) for history in histories]
        text += '\n' + summary(rows, [], 'Scores on validation subjects after the epoch that was best on the inner subjects: '
                               + ', '.join(str(row['epoch']) for row in rows))
    for key, how in (('flip average', 'each prediction averaged with that of the mirrored image'),
                     ('validation', 'with threshold, minimal area and flip average chosen on the inner subjects')):
        scores = [each[key] for each in chosen if key in each]
        if len(scores) == len(chosen):                      # a mean over some of the folds would look like one over all
            text += '\n' + summary([{f'validation_{name}': each[name] for name in HARD_SCORES} for each in scores], [],
                                   f'Scores on validation subjects after the last epoch, {how}')
    return text


def summary(rows, baselines, title='Scores on validation subjects after the last epoch'):
    """Return a list for each score, one value per row (a run, or one per fold), and of folds mean ± deviation; the same of baselines.

    `dicecoefs` is the soft Dice coefficient; with a loss of DiceLoss alone it is about minus the loss.
    """
    columns = [('accuracies', 'accuracy', 'share of pixels that are right'),
               ('losses', 'loss', 'validation loss, mean over batches weighted by their images'),
               ('ious', 'iou_pooled', 'hard IoU, pooled'), ('ious per image', 'iou_per_image', 'hard IoU, mean over images'),
               ('dicecoefs', 'soft_dice_pooled', 'soft Dice, pooled'),
               ('soft dice per image', 'soft_dice_per_image', 'soft Dice, mean over images'),
               ('hard dice', 'dice_pooled', 'hard Dice, pooled'),
               ('hard dice per image', 'dice_per_image', 'hard Dice, mean over images')]
    columns = [column for column in columns if f'validation_{column[1]}' in rows[0]]

    def of_rows(column):
        return [row[f'validation_{column}'] for row in rows]

    def average(values):
        return f'{numpy.mean(values):.4f}' + (f' ± {numpy.std(values):.4f}' if len(values) > 1 else '')

    lines = [title, '']
    for name, column, meaning in columns:
        lines.append(f'{name}: [{", ".join(f"{value:.4f}" for value in of_rows(column))}]    ({meaning})')
    if len(rows) > 1:
        lines.append('')
        for name, column, _ in columns:
            lines.append(f'average {name}: {average(of_rows(column))}')
    if baselines:
        lines += ['', 'The same subjects without looking at the image', '']
        for name in baselines[0]:
            shown = {'hard dice': 'dice_pooled', 'per image': 'dice_per_image', 'iou': 'iou_pooled', 'accuracy': 'accuracy'}
            lines.append(f'{name}: ' + ', '.join(f'{title} {average([scores[name][column] for scores in baselines])}'
                                                 for title, column in shown.items()))
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
