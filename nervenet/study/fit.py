"""Training to the end: epoch after epoch, each recorded, stopped between two batches when somebody asks for it."""

import contextlib
import copy
import math
import os
import signal
import threading
import time

import numpy

from ..checks import in_range
from ..engine.backend import move, to_cpu
from ..engine.communicator import current, whole_batch
from ..metrics import SCORES
from ..optim import ConstantSchedule
from ..train import evaluate, train_epoch, train_step
from .report import progress


class Interrupted(Exception):
    """Training was asked to stop, and did, between two batches."""


@contextlib.contextmanager
def stopping_on_signals():
    """Yield a function that says whether Ctrl-C, SIGTERM or SIGUSR1 has asked to stop; the second time they stop the process at once.

    SIGUSR1 is the one that launchers of MPI pass on to all processes, and leave it at that. Python hands signals to the main thread alone. In
    any other this answers No, and signals do what they did before.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    asked, first = [], current().rank == 0

    def ask(number, frame):
        asked.append(number)
        set_handlers(before)
        if first:
            os.write(2, b'\nstopping after this batch; once more to stop at once\n')     # print may not run twice at a time

    def set_handlers(handlers):
        return {number: signal.signal(number, handler) for number, handler in handlers.items()}

    before = set_handlers(dict.fromkeys([signal.SIGINT, signal.SIGTERM, getattr(signal, 'SIGUSR1', signal.SIGTERM)], ask))
    try:
        yield lambda: bool(asked)
    finally:
        set_handlers(before)


class PlateauSchedule(ConstantSchedule):
    """A constant rate, lowered to `factor` times itself each time that the loss of the inner subjects has not fallen for `patience` epochs.

    `history` are the rows of the epochs so far, of the run that it is a schedule of: the rate follows from them alone, so a run that goes on
    has the rate it would have had. Those of the first `begun` epochs had a schedule of their own.
    """

    def __init__(self, base, history, warmup_steps=0, factor=0.2, patience=5, begun=0):
        super().__init__(base, warmup_steps)
        self.history, self.factor, self.patience, self.begun = history, factor, patience, begun

    def __call__(self, step):
        least, waited, lowered = math.inf, 0, 0
        for row in self.history[self.begun:]:
            waited = 0 if row['inner_loss'] < least else waited + 1
            least = min(least, row['inner_loss'])
            if waited == self.patience:
                waited, lowered = 0, lowered + 1
        return super().__call__(step) * self.factor**lowered


class WeightAverage:
    """A second network whose weights are a weighted mean of those that `model` had on its way: a mean of many good guesses.

    The weights after step k count in proportion to k^(γ−1), γ = 1/share − 1: late ones more, if the share is below ½. So those behind the
    mean after n steps are on average share·n steps old, whatever n: early in training the mean forgets fast, later slowly. When m steps have
    been taken in,

        w̄ ← w̄ + (w − w̄)·(1 − (m/n)^γ)

    takes in those up to n, for parameters and for the running averages of batch norm. As neighbours are near copies, it need not be done
    after each step. Steps at a constant rate circle around a minimum, and their mean lies inside.

    Sources: Shamir & Zhang 2013 (arXiv:1212.1824; polynomial decay); Izmailov et al. 2018 (arXiv:1803.05407; why a mean generalises better).
    """

    def __init__(self, model, share):
        self.model, self.averaged, self.steps = model, copy.deepcopy(model).eval(), 0
        self.gamma = 1 / in_range('share', share, 1) - 1 if share else math.inf         # 0: the weights as they are

    def update(self, steps):
        """Take in the weights as they are after so many steps."""
        part = 1 - (self.steps / steps)**self.gamma
        for mean, now in zip(self.averaged.state_dict().values(), self.model.state_dict().values()):
            mean += (now - mean) * mean.dtype.type(part)
        self.steps = steps


class Watching:
    """A loss that also looks at what the network makes of a few images of a part, whose batches come in order.

    `masks` are those of the images `indices`, (K, H, W) bool, where the probability is above one half: where the logit is above 0. Of images
    that other processes have, they have the masks.
    """

    def __init__(self, loss, indices):
        self.loss, self.indices, self.seen, self.found = loss, [*indices], 0, {}

    def forward(self, logits, target):
        shape, rows = whole_batch(logits)
        first = self.seen + (rows.start or 0)
        self.found |= {index: to_cpu(logits[index - first, ..., 0]) > 0 for index in self.indices if first <= index < first + len(logits)}
        self.seen += shape[0]
        return self.loss.forward(logits, target)

    @property
    def masks(self):
        found = {index: mask for of_process in current().gather(self.found) for index, mask in of_process.items()}
        return [found[index] for index in self.indices]


def seconds_of(model, loss, optimizer, shape, steps, images):
    """Return about how many seconds an epoch of so many steps on x of `shape` (N, H, W, C), and of scoring so many images, takes here.

    `model` and `optimizer` are for this alone: three steps are done with them, on noise, of which the first, that makes room, does not count.
    """
    x = move(numpy.random.default_rng(0).random(shape).astype(model.dtype)[current().rows(shape[0])], model.device)
    for _ in range(3):
        start = time.perf_counter()
        float(to_cpu(train_step(model, loss, optimizer, x, (x > 0.9).astype(x.dtype))))              # a GPU is waited for
        seconds = time.perf_counter() - start
    return seconds * (steps + images / shape[0] / 3)         # backward is two thirds of a step


def fit(model, loss, optimizer, training, validation, epochs, run, schedule=None, max_norm=None, inner=None, patience=None,
        stop=lambda: False, watch=(), average=None):
    """Train until `epochs` epochs are done, scoring `validation`, if it is not None, after each; record everything in `run`, a RunFolder.

    `training` and `validation` are Loaders; the number of an epoch decides their order and randomness. Yields a row after each
    epoch: a dict of 'epoch', 'learning_rate', 'seconds', 'images_per_second', 'waited_seconds' (how long training waited for its
    batches), 'train_…' and 'validation_…' for the loss, each of the scores and the true share of foreground.

    inner     a Loader of subjects that neither other part holds: the best epoch is chosen on them instead of on `validation`,
              whose scores then are honest; rows get 'inner_…' scores
    patience  stop after so many epochs without a better one
    stop      asked after each batch; once it returns True, Interrupted is raised
    watch     numbers of a few validation images, in order: what the network makes of them after each epoch is recorded too
    average   a WeightAverage of `model`: then its network is what is scored and recorded; 'train_…' are scores of `model` while it changes

    Epochs that `run` has already are not repeated: `RunFolder.restore` puts model, optimizer and average behind the last of them, and
    since every draw follows from the seed, the epoch and the restored states, training goes on bit for bit as without a stop.

    Where several processes compute together, all of them call this, with Loaders that hand out their rows; all stop after the same batch.
    """
    processes = current()

    def watched(batches):
        for batch in batches:
            yield batch
            if processes.any(stop()):
                raise Interrupted

    def averaging(batches):
        for batch in batches:
            yield batch
            if average and optimizer.steps % 8 == 0:                    # the next batch is asked for once the step is done
                average.update(optimizer.steps)
        if average and average.steps != optimizer.steps:
            average.update(optimizer.steps)

    scored = average.averaged if average else model
    parts = {name: loader for name, loader in (('validation', validation), ('inner', inner)) if loader is not None}
    while len(run.history) < epochs and not (patience and run.epochs_since_best() >= patience):
        epoch = len(run.history) + 1
        start, part = time.perf_counter(), 'training'
        try:
            with numpy.errstate(over='ignore', invalid='ignore'):       # a diverged network gets one clear error, below
                batches = progress(watched(averaging(training.epoch(epoch))), len(training), f'epoch {epoch}/{epochs}')
                scores = {'train': train_epoch(model, loss, optimizer, batches, schedule, max_norm)}
                model.drop_gradients()                                      # evaluation needs their place
                speed, waited = len(training.samples) / (time.perf_counter() - start), training.waited_seconds
                watching = Watching(loss, watch)
                for part, loader in parts.items():
                    scores[part] = evaluate(scored, watching if part == 'validation' else loss, watched(loader.epoch(epoch)))
        except FloatingPointError as error:
            kept = f'. The last good epoch is in {run.last}' if run.history else ''
            raise FloatingPointError(f'epoch {epoch}, {part}: {error}{kept}') from error
        columns = 'loss', *SCORES, 'true_foreground_share'
        row = {'epoch': epoch, 'learning_rate': optimizer.learning_rate, 'seconds': round(time.perf_counter() - start, 2),
               'images_per_second': round(speed, 1), 'waited_seconds': round(waited, 3),
               **{f'{part}_{name}': values[name] for part, values in scores.items() for name in columns}}
        row = processes.from_first(lambda: row)             # whatever is decided by it, such as when to stop, is decided alike
        run.record(row, scored, optimizer, watching.masks, trained=model if average else None)
        yield row
