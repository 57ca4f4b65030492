"""The folder of one training run, and how it survives a kill.

Whatever happens to the process, the folder holds a whole epoch: a run that was stopped, or killed, goes on as if nothing had
happened.
"""

import contextlib
import csv
import datetime
import io
import itertools
import json
import math
import weakref
from dataclasses import asdict, replace
from pathlib import Path

import numpy

from ..engine.communicator import current
from ..files import atomic_write, make_folder, refuse_content
from ..train import generator_states, set_generator_states
from .checkpoint import load_checkpoint, save
from .claims import claim, claims_in
from .report import best_row, summaries
from .segment import PARTS, Settings, choose_from, choose_temperature, count_masks, reading_of, score
from .uncertainty import TEMPERATURES

WHERE = 'data', 'masks', 'subjects', 'test', 'test_masks', 'split', 'device', 'precision'     # of a config: where the data lie and what computes; a run may go on elsewhere


@contextlib.contextmanager
def room_for_results(path, joins=False):
    """Yield the folder for what comes out, or refuse it here, before any work: if nothing can be written there, or others use it.

    `path` is made, and taken away again if the work fails before it has written anything; for None that is a `dated_folder`. With
    `joins` something may lie there already, which whoever uses it will look at. Raises OSError.
    """
    def make():
        folder = path or dated_folder()
        make_folder(folder, '--out')
        if not joins:
            refuse_content(folder, '--out', but=begun_in(folder), or_else=or_go_on(folder, 'run'))
        return folder

    is_new = path is None or not path.exists()
    path = current().from_first(make)
    try:
        yield path
    except BaseException:
        if is_new:
            with contextlib.suppress(OSError):              # something lies in it, so it stays
                path.rmdir()
        raise


def begun_in(folder):
    """Return the names of what a run leaves in its folder that was killed before anything of it was there."""
    return ['config.json.partial', *(claims_in(folder) if folder.is_dir() else [])]


def dated_folder():
    """Make and return a folder in runs/, named by date and time, and by a number where runs start in the same second."""
    make_folder('runs', '--out')
    now = f'{datetime.datetime.now():%Y-%m-%d_%H-%M-%S}'
    for number in itertools.count(1):
        path = Path('runs', now if number == 1 else f'{now}_{number}')
        with contextlib.suppress(FileExistsError):
            path.mkdir()                                    # in one step: of several processes one makes it
            return path


def check_resumable(folder):
    """Raise, before any work, if the run or cross-validation in `folder` cannot go on: BlockingIOError, CheckpointError."""
    claim(folder, wait=(folder / 'split.json').exists())()      # that of a cross-validation is only in use for moments, by other folds
    for last in [folder / 'last.npz', *folder.glob('fold_*/last.npz')]:
        if last.exists() and not (last.parent / 'summary.txt').exists():
            load_checkpoint(last)


class RunFolder:
    """The folder of one training run: config.json, history.csv, best.npz, last.npz, summary.txt.

    `best.npz` is the epoch with the highest pooled hard Dice on the inner subjects, if there are any, else on the validation
    part. It was chosen by looking at that part, so its score there flatters it. `last.npz` is the network after the last epoch.

    Until the run is complete, `last.npz` also holds the history, the optimizer and the states of the random generators, and is
    the only truth: it is written first and whole, and what a kill kept from being written after it is made again from it.
    """

    def __init__(self, path, config, resume=False):
        """Make the folder and write `config`, a dict that JSON can hold, into it; or, with `resume`, take up what is there.

        A run that has come to its end can be given more epochs, 'epochs' in `config`: then `begun` is the number of those done,
        and the others are trained like a run of their own that starts from this network, with a schedule and an optimizer that begin
        anew. Else `begun` is 0.

        The folder belongs to this process until the RunFolder is gone. Raises BlockingIOError if another process has it,
        FileExistsError if it holds a run that is not to be resumed, ValueError if that run's config differs from this one.
        """
        self.path = Path(path)
        self.best, self.last, self.history, self.learning = self.path / 'best.npz', self.path / 'last.npz', [], []
        self.config = {**json.loads(json.dumps(config)), 'begun': 0}
        make_folder(self.path, '--out')
        self.claim = claim(self.path)
        self.release = weakref.finalize(self, self.claim)
        if resume and (self.path / 'config.json').exists():
            stored = read_config(self.path)
            more = wants_more_epochs(stored, self.config)
            check_config(self.path / 'config.json', self.config, more_epochs=more and is_finished(self.path))
            self.config['begun'] = load_checkpoint(self.last)[1]['epoch'] if more else stored.get('begun', 0)
            if more:
                (self.path / 'summary.txt').unlink(missing_ok=True)             # that of the run as it was
            move_config(self.path / 'config.json', self.config)
        else:
            refuse_content(self.path, '--out', but=begun_in(self.path), or_else=or_go_on(self.path, 'run'))
            write_config(self.path / 'config.json', self.config)
        self.begun = self.config['begun']

    def __reduce__(self):
        return Follower, (self.path, self.begun)                        # to another process goes what it may have of a run folder

    def write(self, name, text):
        with atomic_write(self.path / name) as file:
            file.write(text.encode(errors='backslashreplace'))         # it may name files whose names are no Unicode

    def restore(self, model, optimizer, average=None):
        """Bring model, optimizer and, if there is one, the WeightAverage to where they were after the last recorded epoch, and the records.

        Raises CheckpointError for a damaged file, ValueError for one of another network.
        """
        found = current().from_first(lambda: load_checkpoint(self.last) if self.last.exists() else None)
        if found is None:
            return
        stored, extra = found
        if stored.config != model.config:
            name = next(name for name in model.config if stored.config[name] != model.config[name])
            raise ValueError(f'{self.last}: its network has {name} {stored.config[name]}, this run gives '
                             f'{model.config[name]}; have the images changed?')
        for network in [model, average.averaged] if average else [model]:
            network.load_state_dict(stored.state_dict())
        self.history, self.learning = extra['history'], [*extra['learning']]
        if 'state' in extra:                                    # absent once the run is complete
            optimizer.load_state_dict(extra['state']['optimizer'])
            if average:
                average.steps = optimizer.steps
                model.load_state_dict(extra['state']['trained'])
            set_generator_states(model, extra['state']['generators'])
            self.write_records(stored)

    def learnt(self, shape):
        """Return for each epoch the masks of `record`, (K, H, W) bool as `shape` says."""
        return [numpy.unpackbits(bits, count=math.prod(shape)).reshape(shape).astype(bool) for bits in self.learning]

    def epochs_since_best(self):
        """Return how many epochs ago the best one was; more epochs, given to a run that had ended, count from there."""
        return self.history[-1]['epoch'] - max(best_row(self.history)['epoch'], self.begun) if self.history else 0

    def record(self, row, model, optimizer, masks=(), trained=None):
        """Add an epoch's row, and save the model as last.npz and, if it is the best so far, as best.npz.

        `masks`, (K, H, W) bool, are what the network makes of a few images; they are kept as bits. `trained` is the network that steps are
        made with, if `model` is the average of what it has been. Raises BlockingIOError if another process has gone on in this folder.
        """
        current().from_first(self.claim.check)              # all stop here, or none
        self.history.append(row)
        self.learning.append(numpy.packbits(numpy.array(masks, bool)))
        save(self.last, model, **self.extra(), history=self.history, learning=numpy.array(self.learning),
             state={'optimizer': optimizer.state_dict(), 'generators': generator_states(trained or model),
                    'trained': trained and trained.state_dict()})
        self.write_records(model)

    def write_records(self, model):
        """Write what follows from last.npz: history.csv, and best.npz if the last epoch is the best on some part."""
        if best_row(self.history) is self.history[-1] and self.is_scored:
            save(self.best, model, **self.extra())
        text = io.StringIO()
        writer = csv.DictWriter(text, self.history[-1].keys(), lineterminator='\n')
        writer.writeheader()
        writer.writerows(self.history)
        self.write('history.csv', text.getvalue())

    @property
    def is_scored(self):
        """Whether there is a part, inner or validation, by which epochs can be compared."""
        return not {'validation_loss', 'inner_loss'}.isdisjoint(self.history[-1])

    def extra(self):
        """Return what a file says of its network: how images must be prepared for it, its epoch and its scores."""
        row = self.history[-1]
        return {'epoch': row['epoch'], 'size': self.config['size'], 'fit': self.config.get('fit', 'squeeze'),
                'median_filter': self.config.get('median_filter'),
                'reading': reading_of(self.config), 'what': self.config.get('what'),
                'scores': {name: value for name, value in row.items() if name.startswith(('validation_', 'inner_'))}}

    def finish_model_file(self, path, **extra):
        """Add `extra` to last.npz or best.npz, `path`, and take away what only resuming needs: the file is for use from now on."""
        model, before = load_checkpoint(path)
        before.pop('state', None)
        save(path, model, **{**before, **extra})

    def choose_settings(self, device, validation, inner, mean_training_mask):
        """Choose, for the last network and the best one, how probabilities become a mask; return it, a dict by the file's name.

        It is chosen on the Loader `inner`, or on `validation` if that is None, stored in both files with the mask (H, W) of the
        baseline and the subjects of each part, and written to settings.json. last.npz, which nobody chose on the validation part, also
        gets what its network made of that part (`segment.count_masks`): an ensemble needs it. Without either part nothing is chosen.
        A network that may have seen anybody, since it started from another or was split by image, says why, and names no strangers.
        """
        part, where = (validation, 'validation') if inner is None else (inner, 'inner')
        found, chosen = {}, {}
        # What a network said of strangers is known only where subjects are, and where it did not start from one that may have seen them.
        by_image, init = self.config.get('leaky_split_by_image'), self.config.get('init')
        perhaps = 'it was split by image' if by_image else f'it started from another, {init}' if init else None
        strangers, known = not perhaps, {'perhaps_seen': perhaps} if perhaps else {}
        if self.config.get('data') and not by_image:            # subjects of synthetic images have names that others have too
            known |= {f'{part}_subjects': self.config.get(f'{part}_subjects') for part in PARTS if strangers or part != 'validation'}
        print()
        if part is None:
            usual = asdict(Settings())
            self.finish_model_file(self.last, settings=usual, mean_training_mask=mean_training_mask, **known)
            chosen[self.last.name] = {'epoch': self.history[-1]['epoch'], 'settings': usual, 'chosen on': 'nothing'}
            self.write('settings.json', json.dumps(chosen, indent=2) + '\n')
            return chosen
        least, most = TEMPERATURES
        there_is_foreground = any(masks.any() for _, masks in part.epoch(0))
        for path in self.last, self.best:
            network, extra = load_checkpoint(path)
            epoch, network = extra['epoch'], network.to(device)
            if epoch not in found:                              # the last epoch may be the best
                temperature = choose_temperature(network, part.epoch(0))
                counts = count_masks(network, lambda: part.epoch(0), temperature=temperature)
                settings, there = (choose_from([counts]) if there_is_foreground
                                   else (Settings(), score(network, part.epoch(0), Settings())['dice_per_image']))
                found[epoch] = counts, replace(settings, temperature=temperature), there
            counts, settings, there = found[epoch]
            seen = dict(known)
            if path == self.last and strangers and validation is not None:
                seen['held_out'] = counts if part is validation else count_masks(network, lambda: validation.epoch(0),
                                                                                temperature=settings.temperature)
            self.finish_model_file(path, settings=asdict(settings), mean_training_mask=mean_training_mask, **seen)
            chosen[path.name] = {'epoch': extra['epoch'], 'settings': asdict(settings),
                                 'chosen on': f'{where} subjects' if there_is_foreground else 'nothing',
                                 'dice per image there': there}
            print(f'{path}: epoch {extra["epoch"]}, threshold {settings.threshold:g}, minimal area {settings.minimal_area:.2%}, '
                  f'flip average {"on" if settings.flip_average else "off"}, largest component {"on" if settings.largest_component else "off"}, '
                  f'temperature {settings.temperature:.2f}: Dice per image {there:.4f} on the {where} subjects, '
                  + ('flattered, since chosen there' if there_is_foreground else 'who have no foreground to choose on'))
            if not 1.01 * least < settings.temperature < 0.99 * most:
                print(f'WARNING: {path}: the temperature is at an end of those tried, {least:g} to {most:g}: none makes the probabilities near '
                      'foreground fit; train longer, or on more images')
            if inner is not None and validation is not None:
                honest = chosen[path.name]['validation'] = score(network, validation.epoch(0), settings)
                print(f'    on the validation subjects: hard Dice {honest["dice_pooled"]:.4f} pooled, '
                      f'{honest["dice_per_image"]:.4f} per image')
            if path == self.last and validation is not None:    # averaging over flips at the usual threshold is no choice, and needs no inner subjects
                chosen[path.name]['flip average'] = score(network, validation.epoch(0), Settings(flip_average=True))
        self.write('settings.json', json.dumps(chosen, indent=2) + '\n')
        return chosen

    def summarize(self, baselines, chosen=None, note=''):
        """Write summary.txt, the sign that the run is complete, and return its text. For the arguments see `summaries`."""
        text = summaries([self.history], [baselines], [chosen or {}], note)
        self.write('summary.txt', text)
        return text


class Follower(RunFolder):
    """The run folder as all processes have it that compute together, but the first: they know the history, and write nothing."""

    def __init__(self, path, begun):
        self.path, self.begun, self.history, self.learning = path, begun, [], []
        self.best, self.last = path / 'best.npz', path / 'last.npz'

    def record(self, row, model, optimizer, masks=(), trained=None):
        current().from_first(None)                          # whether the folder is still theirs
        self.history.append(row)

    def write_records(self, model):
        """Leave all files to the first process."""


def read_config(folder):
    """Return the config of the run in `folder`, a dict. Raises FileNotFoundError or ValueError, saying what was expected."""
    path = Path(folder) / 'config.json'
    if not path.is_file():
        raise FileNotFoundError(f'{path}: no such file, so there is no run to resume; start one with --out {folder}')
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        raise OSError(f'{path}: cannot be read ({error.strerror})') from error
    except ValueError as error:
        raise ValueError(f'{path}: cannot be read ({error})') from None
    if not isinstance(config, dict):
        raise ValueError(f'{path}: holds a {type(config).__name__}, expected the settings of a run')
    return config


def or_go_on(folder, what):
    """Return how an error about `folder` may end: the way to go on with what lies in it, '' if it holds nothing of ours."""
    return f', or go on with the {what} in it: --resume {folder}' if (folder / 'config.json').exists() else ''


def is_finished(folder):
    """Return whether the run in `folder` has come to the end of its training, so that it can be given more epochs."""
    last = Path(folder) / 'last.npz'
    return last.exists() and 'state' not in load_checkpoint(last)[1]


def unfinished(folder, folds):
    """Return the paths of the runs in `folder`, one or, with `folds`, so many, that have not come to their end."""
    runs = [folder / f'fold_{number}' for number in range(1, folds + 1)] if folds else [folder]
    return [path for path in runs if not is_finished(path)]


def seen_before(args, parts):
    """Return warnings, if any, that the network in the file `args.init` has seen subjects that it is to be scored on.

    `parts` is {name: samples}. What that network has seen is read from the config of its run folder, if the file lies in one.
    """
    config = {}
    with contextlib.suppress(FileNotFoundError, ValueError):
        config = read_config(args.init.parent)
    same_data = config.get('data') == (args.data and str(args.data)) and (args.data or config.get('seed') == args.seed)
    seen = set(config.get('training_subjects', [])) if same_data else set()
    common = seen & {sample.subject for part, samples in parts.items() if part != 'training' for sample in samples}
    return [f'WARNING: {args.init} comes from a run on the same data that was trained on {len(common)} of the subjects set aside here: '
            'their scores are too good to be true.'] if common else []


def wants_more_epochs(stored, config):
    """Return whether `config` has more epochs than the config `stored` in a folder."""
    return config.get('epochs', 0) > stored.get('epochs', 0)


def check_config(path, config, more_epochs=False):
    """Raise ValueError, naming both values, if the config in the file `path` says another thing than `config`.

    Where the folder lies, which versions are at work and what WHERE names makes no difference, nor, with `more_epochs`, how many
    epochs there are to be.
    """
    stored = read_config(path.parent)
    free = {'out', 'nervenet', 'numpy', 'begun', *WHERE} | ({'epochs'} if more_epochs else set())
    for name in sorted((stored.keys() | config.keys()) - free):
        if stored.get(name) != config.get(name):
            old, new = (str(values.get(name)) for values in (stored, config))
            old, new = (text if len(text) <= 60 else text[:60] + '…' for text in (old, new))
            of_data = name == 'baselines' or name.endswith(('_images', '_subjects'))
            raise ValueError(f'{path}: '
                             + ('the baselines are others now' if name == 'baselines' else f'{name} is {old} there and {new} now')
                             + ('; have images or masks changed? Bring them back' if of_data else '; change it back')
                             + ', or start a new run with another --out')


def move_config(path, config):
    """Write into the config in the file `path` where, by `config`, it goes on, and how long: what WHERE names, the epochs."""
    stored = read_config(path.parent)
    moved = {**stored, **{name: config[name] for name in (*WHERE, 'epochs', 'begun') if name in config}}
    if moved != stored:
        write_config(path, moved)


def write_config(path, config):
    with atomic_write(path) as file:
        file.write((json.dumps(config, indent=2) + '\n').encode())
