"""Cross-validation: every subject is validated once, by a network that has never seen it.

The subjects are dealt into k folds. Fold i is validated by a network trained on the other k − 1 folds, so k networks
give k scores, whose mean says how good the method is and whose deviation says how much that depends on who was in which
fold.

    folds = folds_by_subject(samples, holds_foreground(samples, reader), 5, seed=0)     five lists of subjects
    training, validation = sides(samples, folds, 2)                                     of fold 2, counted from 1

The deal is written down (`write_split`, `read_split`), because all folds must agree on it, whenever and wherever they
run. A `CrossValidation` is the folder of them all: each fold is a run folder inside, trained by any number of processes
side by side, and the summary is made from whatever folds are complete.
"""

import csv
import json
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy

from ..files import atomic_write, make_folder, refuse_content
from ..images.samples import DataError, natural_key
from ..metrics import HARD_SCORES, SCORES
from . import figures
from .claims import claimed, whose
from .report import summaries
from .run_folder import begun_in, check_config, move_config, or_go_on, read_config, wants_more_epochs, write_config

BY_SUBJECT = 'subject'
BY_IMAGE = 'image: leaks, frames of one subject are on both sides'


# --- Who is in which fold ---------------------------------------------------------------------------------------------

def folds_by_subject(samples, positive, folds, seed):
    """Return `folds` lists of subjects, balanced in images and in positive images; `positive` is (N,) bool.

    Let n and p be a subject's images and positive images as shares of all, and N and P those of a fold so far. A fold's
    imbalance is N² + P²: over all folds the sum is least when all are equal. A subject adds

        (N + n)² + (P + p)² − N² − P²  =  2·(N·n + P·p) + n² + p²

    to it, so each goes to the fold with the least N·n + P·p, where it hurts the balance least. They are dealt one by
    one, those with the largest n² + p² first, so that the small ones even out what the large ones left uneven; equals
    come in random order, drawn from `default_rng(seed)`.

    Raises DataError for fewer subjects than folds, ValueError for fewer than two folds.
    """
    if folds < 2:
        raise ValueError(f'{folds} folds; expected 2 or more: one to validate on and the others to train on')
    images = Counter(sample.subject for sample in samples)
    positives = Counter(sample.subject for sample, is_positive in zip(samples, positive) if is_positive)
    if len(images) < folds:
        raise DataError(f'{len(images)} subjects cannot be dealt into {folds} folds; lower --folds, or give '
                        '--subject-pattern if the names hold more subjects')
    subjects = sorted(images, key=natural_key)
    numpy.random.default_rng(seed).shuffle(subjects)
    shares = {subject: numpy.array([images[subject] / len(samples), positives[subject] / max(positives.total(), 1)])
              for subject in subjects}                                          # (n, p)
    subjects.sort(key=lambda subject: -numpy.square(shares[subject]).sum())     # equals stay shuffled
    dealt, totals = [[] for _ in range(folds)], numpy.zeros((folds, 2))         # (N, P) of each fold
    for subject in subjects:
        fold = numpy.lexsort((totals[:, 0], totals @ shares[subject]))[0]       # of equals, the one with fewest images
        dealt[fold].append(subject)
        totals[fold] += shares[subject]
    return [sorted(fold, key=natural_key) for fold in dealt]


def each_image_alone(samples):
    """Return the samples, each a subject of its own: whatever then splits by subject splits by image, and leaks."""
    return [replace(sample, subject=sample.name) for sample in samples]


def sides(samples, folds, fold):
    """Return (training, validation) of fold number `fold`, from 1 on: two lists of samples that share no subject."""
    validated = set(folds[fold - 1])
    return ([sample for sample in samples if sample.subject not in validated],
            [sample for sample in samples if sample.subject in validated])


# --- The split on disk ------------------------------------------------------------------------------------------------

def write_split(path, samples, positive, folds, by=BY_SUBJECT):
    """Write folds to a JSON file: what they are split by, and the subjects, images and positive images of each."""
    where = {subject: number for number, fold in enumerate(folds) for subject in fold}
    images = Counter(where[sample.subject] for sample in samples)
    positives = Counter(where[sample.subject] for sample, is_positive in zip(samples, positive) if is_positive)
    split = {'by': by, 'folds': [{'images': images[number], 'positive images': positives[number], 'subjects': fold}
                                 for number, fold in enumerate(folds)]}
    with atomic_write(path) as file:
        file.write((json.dumps(split, indent=2) + '\n').encode())           # ASCII: names need not be Unicode


def read_split(path, samples, number, by=BY_SUBJECT):
    """Return the `number` folds in a file of `write_split`, lists of subjects.

    A file that another program writes, such as the official split of a data set, needs no more than
    {"folds": [{"subjects": ["1", "2"]}, {"subjects": ["3"]}]}; `--fold 2` then validates on subject 3.

    Raises DataError, one line that names both, for a subject that is in two folds, and for a file that does not fit the
    data: another kind of split, another number of folds, other subjects, another number of images.
    """
    try:
        split = json.loads(Path(path).read_bytes())
        found, folds = split.get('by', by), [list(map(str, fold['subjects'])) for fold in split['folds']]
        counts = [fold.get('images') for fold in split['folds']]
        if not all(isinstance(fold['subjects'], list) and fold['subjects'] for fold in split['folds']):
            raise ValueError('a fold without a list of subjects')
    except FileNotFoundError:
        raise DataError(f'{path}: no such file') from None
    except OSError as error:
        raise DataError(f'{path}: cannot be read ({error.strerror}); give the file split.json of a cross-validation') from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f'{path}: is not a split as train_unet.py --folds writes it ({type(error).__name__}: {error}); expected at least '
                        '{"folds": [{"subjects": [...]}, ...]}') from None
    if found != by:
        raise DataError(f'{path}: is a split by {found}; expected one by {by}')
    if len(folds) != number:
        raise DataError(f'{path}: holds {len(folds)} folds; expected {number}, as --folds says')
    where = {}
    for i, fold in enumerate(folds, 1):
        for subject in fold:
            if subject in where:
                raise DataError(f'{path}: subject {subject} is in fold {where[subject]} and in fold {i}; it must be in one')
            where[subject] = i
    images = Counter(where.get(sample.subject) for sample in samples)
    in_data = {sample.subject for sample in samples}
    lost, unknown = (sorted(subjects, key=natural_key) for subjects in (in_data - where.keys(), where.keys() - in_data))
    if lost:
        raise DataError(f'{path}: no fold has subject {lost[0]} of the data ({len(lost)} such); make a new split')
    if unknown:
        raise DataError(f'{path}: fold {where[unknown[0]]} has subject {unknown[0]}, whom the data lack '
                        f'({len(unknown)} such); make a new split')
    for i, count in enumerate(counts, 1):
        if count is not None and images[i] != count:
            raise DataError(f'{path}: fold {i} has {count} images, its subjects have {images[i]} in the data; make a new '
                            'split')
    return folds


# --- All folds together -----------------------------------------------------------------------------------------------

class CrossValidation:
    """The folder of a cross-validation: config.json, split.json, fold_1 … fold_k, summary.txt, curves.png.

    Any number of processes on any machines that see it may work in it, each on folds of its own: the split is written once, whole, a fold's
    folder belongs to the process that trains it (see `claims`), and whoever finishes last has all folds for the summary.
    """

    def __init__(self, path, config, deal, join=False, read=None, more_epochs=False):
        """Make the folder, or, with `join`, take up the one that is there if its config is the same.

        With `more_epochs` that one may have fewer: then its folds are not complete any more, and are to be trained on.

        `deal(path)` is called once, with the path of split.json, to write it; `read(path)`, if given, to read it, and what it
        returns is kept as `folds`. Raises FileExistsError for a folder that is in use for something else, ValueError for another
        config. A folder that is not taken up, because of that or because `read` raises, stays as it is.
        """
        self.path, self.split = Path(path), Path(path) / 'split.json'
        make_folder(self.path, '--out')
        path, self.config = self.path / 'config.json', json.loads(json.dumps(config))
        with claimed(self.path):
            joins = join and path.exists()
            if joins:
                check_config(path, self.config, more_epochs and wants_more_epochs(read_config(self.path), self.config))
            else:
                begun = 'split.json', 'split.json.partial', *begun_in(self.path)         # killed before the config was there
                refuse_content(self.path, '--out', but=begun, or_else=or_go_on(self.path, 'cross-validation'))
                deal(self.split)
            self.folds = read and read(self.split)
            (move_config if joins else write_config)(path, self.config)

    def fold(self, number):
        """Return the path of a fold's run folder."""
        return self.path / f'fold_{number}'

    def is_complete(self, number):
        """Return whether a fold's summary, the last file of a run, is there, and it has as many epochs as it was to have."""
        try:
            epochs = read_config(self.fold(number)).get('epochs')
        except (OSError, ValueError):
            epochs = self.config.get('epochs')              # `summarize` tells that this file is missing or damaged
        # Listed, not asked for by name: a network disk may remember for a while that another machine's file was not there.
        names = os.listdir(self.fold(number)) if self.fold(number).is_dir() else []
        return 'summary.txt' in names and epochs == self.config.get('epochs')

    def complete(self, folds):
        """Return the numbers of those of `folds` folds that are complete."""
        return [number for number in range(1, folds + 1) if self.is_complete(number)]

    def account(self, folds):
        """Return a line for each of `folds` folds that is not complete: whether it is being trained, by whom, or how far it had come."""
        lines = []
        for number in range(1, folds + 1):
            folder, history = self.fold(number), self.fold(number) / 'history.csv'
            epochs = len(history.read_text().splitlines()) - 1 if history.exists() else 0
            if not folder.is_dir():
                lines.append(f'fold {number}: not begun')
            elif not self.is_complete(number):
                lines.append(f'fold {number}: {epochs} of {self.config.get("epochs")} epochs, {whose(folder, self.path)}')
        return '\n'.join(lines)

    def summarize(self, folds, note=''):
        """Write summary.txt and curves.png from the folds that are complete; return the text, None if there are none.

        The text begins with `note`, if there is something to be said first, and with which folds are missing, and why.
        """
        with claimed(self.path):
            complete = self.complete(folds)
            if not complete:
                return None
            missing = ', '.join(str(number) for number in range(1, folds + 1) if number not in complete)
            count = f'{len(complete)} of {folds} folds' + (f'; not complete yet: {missing}' if missing else '')
            histories, baselines, chosen = zip(*(read_fold(self.fold(number)) for number in complete))
            empty = [str(number) for number, scores in zip(complete, baselines) if scores['empty mask']['dice_pooled'] == 1]
            count += f'; no foreground at all is validated in fold {", ".join(empty)}, where Dice says little' if empty else ''
            text = summaries(histories, baselines, chosen, '\n'.join(filter(None, [note, count, self.account(folds)])))
            mean = {name: {score: float(numpy.mean([each[name][score] for each in baselines])) for score in scores}
                    for name, scores in baselines[0].items()}
            title = f'{note.partition(",")[0]} · {count}' if note else count
            figures.save(figures.fold_curves(histories, baselines=mean, title=title), self.path / 'curves.png')
            with atomic_write(self.path / 'summary.txt') as file:
                file.write(text.encode(errors='backslashreplace'))
            return text


def read_fold(folder):
    """Return (history, baselines, chosen) of a complete fold, as `summaries` takes them.

    Raises ValueError, naming the file, if one is missing or lacks a score: a summary never leaves one out.
    """
    def check(scores, names):
        for name in names:
            float(scores[name])

    path = folder / 'history.csv'
    try:
        with open(path, newline='') as file:
            history = [{name: (int if name == 'epoch' else float)(value) for name, value in row.items()}
                       for row in csv.DictReader(file)]
        path = folder / 'config.json'
        config = json.loads(path.read_text())
        baselines, parts = config['baselines'], ('train', 'validation') if 'validation_images' in config else ('train',)
        path = folder / 'history.csv'
        check(history[-1], [f'{part}_{name}' for part in parts for name in ('loss', *SCORES)])
        path = folder / 'config.json'
        for scores in baselines.values():
            check(scores, HARD_SCORES)
        path = folder / 'settings.json'
        chosen = json.loads(path.read_text())['last.npz']
        for key in chosen.keys() & {'flip average', 'validation'}:
            check(chosen[key], HARD_SCORES)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f'{path}: is missing or damaged ({type(error).__name__}: {" ".join(str(error).split())}); delete '
                         f'{folder}, and go on to train that fold again') from error
    return history, baselines, chosen
