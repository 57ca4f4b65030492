"""The folder of one training run, and how it survives a kill.

Whatever happens to the process, the folder holds a whole epoch: a run that was stopped, or killed, goes on as if nothing had
happened.
"""

import csv
import io
import json
import os
import weakref
from dataclasses import asdict
from pathlib import Path

from ..files import atomic_write, make_folder, refuse_content
from ..train import generator_states, set_generator_states
from .checkpoint import load_checkpoint, save
from .report import best_row, summaries
from .segment import Settings, choose_settings, score

try:
    import fcntl
except ImportError:                     # Windows: there, nobody is kept from training in one folder twice at a time
    fcntl = None

WHERE = 'data', 'device', 'precision'     # of a config: where the data lie and what computes; a run may go on elsewhere


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

    def finish_model_file(self, path, **extra):
        """Add `extra` to last.npz or best.npz, `path`, and take away what only resuming needs: the file is for use from now on."""
        model, before = load_checkpoint(path)
        before.pop('state', None)
        save(path, model, **{**before, **extra})

    def choose_settings(self, device, validation, inner, mean_training_mask):
        """Choose, for the last network and the best one, how probabilities become a mask; return it, a dict by the file's name.

        It is chosen on the Loader `inner`, or on `validation` if that is None, stored in both files with the mask (H, W) of the
        baseline, and written to settings.json.
        """
        part, where = (validation, 'validation') if inner is None else (inner, 'inner')
        found, chosen = {}, {}
        print()
        for path in self.last, self.best:
            network, extra = load_checkpoint(path)
            epoch, network = extra['epoch'], network.to(device)
            if epoch not in found:                              # the last epoch may be the best
                found[epoch] = choose_settings(network, lambda: part.epoch(0))
            settings, there = found[epoch]
            self.finish_model_file(path, settings=asdict(settings), mean_training_mask=mean_training_mask)
            chosen[path.name] = {'epoch': extra['epoch'], 'settings': asdict(settings), 'chosen on': f'{where} subjects',
                                 'dice per image there': there}
            print(f'{path}: epoch {extra["epoch"]}, threshold {settings.threshold:g}, minimal area {settings.minimal_area:.2%}, '
                  f'flip average {"on" if settings.flip_average else "off"}: Dice per image {there:.4f} on the {where} subjects, '
                  'flattered, since chosen there')
            if inner is not None:
                honest = chosen[path.name]['validation'] = score(network, validation.epoch(0), settings)
                print(f'    on the validation subjects: hard Dice {honest["dice_pooled"]:.4f} pooled, '
                      f'{honest["dice_per_image"]:.4f} per image')
            if path == self.last:       # averaging over flips at the usual threshold is no choice: its score needs no inner subjects
                chosen[path.name]['flip average'] = score(network, validation.epoch(0), Settings(flip_average=True))
        self.write('settings.json', json.dumps(chosen, indent=2) + '\n')
        return chosen

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
