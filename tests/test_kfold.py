import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy
import pytest

from nervenet import DataError
from nervenet.images.samples import Sample, find_samples
from nervenet.study.kfold import (BY_IMAGE, BY_SUBJECT, CrossValidation, each_image_alone, folds_by_subject,
                                  read_split, sides, write_split)

ROOT = Path(__file__).parents[1]
REAL = ROOT.parent / 'shared' / 'data'


def make(counts):
    """Return (samples, positive) for {subject: (images, positive images)}."""
    samples = [Sample(f'{subject}_{image}', subject, None, None) for subject, (images, _) in counts.items()
               for image in range(images)]
    positive = [image < positives for images, positives in counts.values() for image in range(images)]
    return samples, numpy.array(positive, bool)


def made(rng, subjects=47):
    """Subjects as in the competition: about 120 images each, of which 2 % to 89 % hold a nerve."""
    images = rng.integers(100, 121, subjects)
    return make({str(number): (int(n), int(n * share)) for number, (n, share) in
                 enumerate(zip(images, rng.uniform(0.02, 0.89, subjects)), 1)})


def balance(samples, positive, folds):
    """Return (images, positive images) of each fold, as shares of a perfectly even deal."""
    where = {subject: number for number, fold in enumerate(folds) for subject in fold}
    at = numpy.array([where[sample.subject] for sample in samples])
    return [numpy.bincount(at, weights, len(folds)) * len(folds) / weights.sum() for weights in (numpy.ones(len(at)), positive)]


def test_every_subject_is_in_one_fold_and_every_image_is_validated_once(rng):
    samples, positive = made(rng)
    folds = folds_by_subject(samples, positive, 5, seed=0)
    assert sorted(subject for fold in folds for subject in fold) == sorted({sample.subject for sample in samples})
    validated = []
    for number in range(1, 6):
        training, validation = sides(samples, folds, number)
        assert {sample.subject for sample in training}.isdisjoint(sample.subject for sample in validation)
        assert {sample.subject for sample in validation} == set(folds[number - 1])
        assert len(training) + len(validation) == len(samples)
        validated += validation
    assert sorted(sample.name for sample in validated) == sorted(sample.name for sample in samples)


def test_folds_are_balanced_in_images_and_in_positives(rng):
    for seed in range(20):
        samples, positive = made(rng)
        images, positives = balance(samples, positive, folds_by_subject(samples, positive, 5, seed))
        assert abs(images - 1).max() < 0.1 and abs(positives - 1).max() < 0.1, (seed, images, positives)


def test_one_large_subject_gets_the_small_ones_kept_away():
    samples, positive = make({'large': (30, 30), **{f'small {n}': (10, 10) for n in range(6)}})
    folds = folds_by_subject(samples, positive, 3, seed=4)
    assert ['large'] in folds and sorted(map(len, folds)) == [1, 3, 3]


def test_positives_are_dealt_evenly_among_subjects_of_equally_many_images():
    samples, positive = make({str(n): (10, 10 * (n < 4)) for n in range(8)})
    for seed in range(10):
        assert balance(samples, positive, folds_by_subject(samples, positive, 4, seed))[1].tolist() == [1, 1, 1, 1]


def test_the_deal_follows_from_the_seed(rng):
    samples, positive = make({str(n): (10, 5) for n in range(20)})
    deals = [folds_by_subject(samples, positive, 5, seed) for seed in (0, 0, 1)]
    assert deals[0] == deals[1] != deals[2]
    order = rng.permutation(len(samples))
    assert folds_by_subject([samples[i] for i in order], positive[order], 5, 0) == deals[0], 'the order of files makes no difference'


def test_no_foreground_anywhere_and_as_many_folds_as_subjects_work():
    samples, positive = make({str(n): (n + 1, 0) for n in range(4)})
    assert sorted(folds_by_subject(samples, positive, 4, 0)) == [['0'], ['1'], ['2'], ['3']]


@pytest.mark.parametrize('folds, kind, message', [(5, DataError, '4 subjects cannot be dealt into 5 folds; lower --folds'),
                                                  (1, ValueError, '1 folds; expected 2 or more')])
def test_folds_that_cannot_be_are_refused(folds, kind, message):
    with pytest.raises(kind, match=message):
        folds_by_subject(*make({str(n): (3, 1) for n in range(4)}), folds, 0)


def test_split_by_image_is_reached_only_by_making_each_image_a_subject():
    samples, positive = make({'a': (6, 3), 'b': (6, 3)})
    alone = each_image_alone(samples)
    folds = folds_by_subject(alone, positive, 3, 0)
    assert sorted(map(len, folds)) == [4, 4, 4]
    assert [sample.name for sample in alone] == [sample.name for sample in samples]
    training, validation = sides(alone, folds, 1)
    assert Counter(sample.name[0] for sample in validation).keys() & {sample.name[0] for sample in training}, 'it leaks'


# --- The split on disk ------------------------------------------------------------------------------------------------

@pytest.fixture
def split(tmp_path):
    """Return (path, samples) of a split of four subjects into two folds."""
    samples, positive = make({'1': (4, 2), '2': (4, 1), '3': (3, 0), '10': (3, 3)})
    write_split(tmp_path / 'split.json', samples, positive, [['1', '3'], ['2', '10']])
    return tmp_path / 'split.json', samples


def test_a_split_comes_back_and_says_what_is_in_its_folds(split):
    path, samples = split
    assert read_split(path, samples, 2) == [['1', '3'], ['2', '10']]
    assert json.loads(path.read_text())['folds'][1] == {'images': 7, 'positive images': 4, 'subjects': ['2', '10']}


@pytest.mark.parametrize('change, message', [
    (lambda split: split['folds'][0]['subjects'].append('10'), r'subject 10 is in fold 1 and in fold 2; it must be in one'),
    (lambda split: split['folds'][0]['subjects'].remove('1'), r'no fold has subject 1 of the data \(1 such\); make a new split'),
    (lambda split: split['folds'][1]['subjects'].append('77'), r'fold 2 has subject 77, whom the data lack \(1 such\)'),
    (lambda split: split['folds'][0].update(images=8), r'fold 1 has 8 images, its subjects have 7 in the data'),
    (lambda split: split.update(by=BY_IMAGE), f'is a split by {BY_IMAGE}; expected one by {BY_SUBJECT}'),
    (lambda split: split.update(folds=split['folds'][:1]), 'holds 1 folds; expected 2, as --folds says'),
    (lambda split: split.pop('folds'), 'is not a split as train_unet.py --folds writes it')])
def test_a_split_that_mixes_sides_or_does_not_fit_the_data_is_refused_naming_both(split, change, message):
    path, samples = split
    changed = json.loads(path.read_text())
    change(changed)
    path.write_text(json.dumps(changed))
    with pytest.raises(DataError, match=message) as error:
        read_split(path, samples, 2)
    assert str(error.value).startswith(f'{path}: ') and '\n' not in str(error.value)


def test_a_split_needs_no_more_than_folds_of_subjects(tmp_path):
    samples, _ = make({'1': (2, 1), '2': (3, 1), '10': (1, 1)})
    (tmp_path / 'official.json').write_text('{"folds": [{"subjects": [1, "10"]}, {"subjects": ["2"]}]}')
    assert read_split(tmp_path / 'official.json', samples, 2) == [['1', '10'], ['2']]
    for text in '[]', '{"folds": [1]}', '{"folds": [{"subject": []}]}', '{"by": "subject"}', '{"folds": [{"subjects": "12"}]}', '{"folds": [{"subjects": []}]}':
        (tmp_path / 'official.json').write_text(text)
        with pytest.raises(DataError, match='expected at least {"folds"'):
            read_split(tmp_path / 'official.json', samples, 2)


def test_a_split_that_is_none_is_refused(tmp_path):
    with pytest.raises(DataError, match='no such file'):
        read_split(tmp_path / 'split.json', [], 2)
    (tmp_path / 'split.json').write_bytes(b'\xff[')
    with pytest.raises(DataError, match='is not a split'):
        read_split(tmp_path / 'split.json', [], 2)


# --- The folder of a cross-validation ---------------------------------------------------------------------------------

def complete(whole, number, loss):
    """Make a fold look complete."""
    folder = whole.fold(number)
    folder.mkdir()
    names = ('loss', 'accuracy', 'iou_pooled', 'iou_per_image', 'soft_dice_pooled', 'soft_dice_per_image', 'dice_pooled', 'dice_per_image',
             'foreground_share')
    columns = ['epoch', *(f'{part}_{name}' for part in ('train', 'validation') for name in names)]
    rows = [[epoch, *[loss] * 18] for epoch in (1, 2)]
    (folder / 'history.csv').write_text('\n'.join(','.join(map(str, row)) for row in [columns, *rows]) + '\n')
    scores = dict.fromkeys(names[1:], loss / 2)
    (folder / 'config.json').write_text(json.dumps({'baselines': {'empty mask': scores}}))
    (folder / 'settings.json').write_text(json.dumps({'last.npz': {'flip average': dict.fromkeys(names[1:], loss / 2)}}))
    (folder / 'summary.txt').write_text('done')


def test_summary_is_made_of_the_folds_that_are_complete_and_says_which_are_missing(tmp_path):
    whole = CrossValidation(tmp_path / 'cv', {'folds': 3}, lambda path: path.write_text('{}'))
    assert whole.summarize(3) is None and not whole.is_complete(1)
    complete(whole, 3, 0.25)
    whole.fold(2).mkdir()
    text = whole.summarize(3, 'LEAKS: never quote')
    assert text.startswith('LEAKS: never quote\n1 of 3 folds; not complete yet: 1, 2\nfold 1: not begun\nfold 2: 0 of None epochs, stopped\n\n')
    complete(whole, 1, 0.75)
    text = whole.summarize(3)
    assert text.startswith('2 of 3 folds; not complete yet: 2\n') and (whole.path / 'summary.txt').read_text() == text
    assert text.count('average hard dice:') == 2
    (whole.fold(3) / 'settings.json').write_text('{"last.npz": {}}')       # a mean over some of the folds would look like one over all
    assert whole.summarize(3).count('average hard dice:') == 1
    before = (whole.path / 'summary.txt').read_bytes()
    for name, content in (('settings.json', '{}'), ('settings.json', '{'), ('settings.json', '{"last.npz": {"flip average": {}}}'),
                          ('history.csv', ''), ('history.csv', 'epoch,train_loss\n1,2\n'), ('history.csv', 'epoch\n1,2\n'),
                          ('config.json', '{}'), ('config.json', '{"baselines": 3}'), ('config.json', '{"baselines": {"empty mask": {}}}')):
        path = whole.fold(3) / name
        kept = path.read_text()
        path.write_text(content)
        with pytest.raises(ValueError, match=f'fold_3/{name}: is missing or damaged .*; delete .*fold_3, and go on'):
            whole.summarize(3)
        path.write_text(kept)
    assert (whole.path / 'summary.txt').read_bytes() == before
    for line in ('hard dice: [0.7500, 0.2500]', 'average hard dice: 0.5000 ± 0.2500', 'average hard dice: 0.2500 ± 0.1250', 'empty mask: hard dice 0.2500 ± 0.1250'):
        assert line in text
    assert sorted(os.listdir(whole.path)) == ['config.json', 'curves.png', 'fold_1', 'fold_2', 'fold_3', 'split.json', 'summary.txt']


def test_a_cross_validation_is_joined_only_under_the_same_config(tmp_path):
    dealt = []
    CrossValidation(tmp_path / 'cv', {'epochs': 3, 'size': (8, 8)}, dealt.append)
    CrossValidation(tmp_path / 'cv', {'epochs': 3, 'size': (8, 8)}, dealt.append, join=True)
    assert dealt == [tmp_path / 'cv' / 'split.json'], 'the split is dealt once'
    with pytest.raises(ValueError, match='epochs is 3 there and 4 now'):
        CrossValidation(tmp_path / 'cv', {'epochs': 4, 'size': (8, 8)}, dealt.append, join=True)
    with pytest.raises(FileExistsError, match='choose another --out, or go on with the cross-validation in it: --resume'):
        CrossValidation(tmp_path / 'cv', {'epochs': 3, 'size': (8, 8)}, dealt.append)
    (tmp_path / 'foreign').mkdir()
    (tmp_path / 'foreign' / 'mine.partial').write_text('mine')
    with pytest.raises(FileExistsError):
        CrossValidation(tmp_path / 'foreign', {}, dealt.append, join=True)
    assert os.listdir(tmp_path / 'foreign') == ['mine.partial']


def test_the_account_tells_of_each_fold_that_is_missing_where_it_is(tmp_path):
    whole = CrossValidation(tmp_path / 'cv', {'folds': 5, 'epochs': 9}, lambda path: path.write_text('{}'))
    complete(whole, 1, 0.5)
    (whole.fold(1) / 'config.json').write_text('{"epochs": 9}')
    for number, silent_for in (2, 30), (3, 9999), (4, None):
        whole.fold(number).mkdir()
        (whole.fold(number) / 'history.csv').write_text('epoch\n' + '1\n' * number)
        if silent_for is not None:
            claim = whole.fold(number) / f'claim_node{number}_77_1'
            claim.write_text(json.dumps({'host': f'node{number}', 'process': 77, 'job': '12_3', 'start': 0}))
            os.utime(claim, (time.time() - silent_for,) * 2)
    lines = whole.account(5).splitlines()
    assert [line.partition(', last sign of life')[0] for line in lines] == [
        'fold 2: 2 of 9 epochs, in training: process 77 on node2, Slurm job 12_3',
        'fold 3: 3 of 9 epochs, died: process 77 on node3, Slurm job 12_3',
        'fold 4: 4 of 9 epochs, stopped', 'fold 5: not begun']


STARTED_AT_ONCE = '''
import sys, time
from nervenet.study import claims
from nervenet.study.kfold import CrossValidation, folds_by_subject, read_split, write_split
sys.path.insert(0, sys.argv[2])
claims.fcntl = claims.fcntl if sys.argv[3] == 'flock' else None
from test_kfold import make
samples, positive = make({str(n): (n, 1) for n in range(1, 30)})

def deal(path):
    print('dealt', flush=True)
    time.sleep(0.2)
    write_split(path, samples, positive, folds_by_subject(samples, positive, 5, 0))

whole = CrossValidation(sys.argv[1], {'folds': 5}, deal, join=True)
assert len(read_split(whole.split, samples, 5)) == 5
'''


@pytest.mark.parametrize('lock', ['flock', 'no flock'])
def test_processes_that_start_at_once_deal_once(tmp_path, lock):
    command = [sys.executable, '-c', STARTED_AT_ONCE, str(tmp_path / 'cv'), str(Path(__file__).parent), lock]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(3)]
    results = [(*process.communicate(), process.returncode) for process in processes]
    assert all(code == 0 for _, _, code in results), results
    assert ''.join(out for out, _, _ in results) == 'dealt\n'
    assert sorted(os.listdir(tmp_path / 'cv')) == ['config.json', 'split.json']


@pytest.mark.skipif(not REAL.is_dir(), reason=f'the real images are not in {REAL}')
def test_real_subjects_are_dealt_evenly():
    samples = find_samples(REAL / 'nerve')
    positive = numpy.ones(len(samples), bool)
    images, _ = balance(samples, positive, folds_by_subject(samples, positive, 5, 0))
    assert abs(images - 1).max() < 0.02
