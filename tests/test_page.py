"""report.html and learning.gif: what they hold, and what they do not let in."""

import csv
import html.parser
import json
import re
import shutil
import subprocess

import numpy
import pytest
from PIL import Image

from helpers import TINY, assert_same_run, stopped_after, write_pairs
from nervenet import UNet, load_checkpoint
from nervenet.losses import DiceLoss
from nervenet.optim import Adam
from nervenet.study.fit import Watching, fit
from nervenet.study.page import write_page
from nervenet.study.pictures import thinned
from nervenet.study.run_folder import RunFolder
from nervenet.train import evaluate, predict

EVIL = '<script>document.title="owned"<!--'
VOID = {'meta', 'img', 'br'}


class Structure(html.parser.HTMLParser):
    """Checks that all that is opened is closed, and remembers tags, attributes and text."""

    def __init__(self, path):
        super().__init__()
        self.open, self.tags, self.text = [], [], ''
        self.feed(path.read_text(encoding='utf-8'))
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data * (self.open[-1:] != ['style'])

    def check(self):
        """Nothing runs, nothing is fetched."""
        for tag, attributes in self.tags:
            assert tag not in ('script', 'iframe', 'object', 'link', 'svg', 'form')
            assert not any(name.startswith('on') or name == 'href' for name in attributes)
            assert 'src' not in attributes or re.match(r'data:image/(png|gif);base64,[A-Za-z0-9+/=]+$', attributes['src'])
        assert any("default-src 'none'" in attributes.get('content', '') for tag, attributes in self.tags if tag == 'meta')
        return self


def test_a_run_is_shown_in_one_file(tmp_path, rng, main):
    write_pairs(tmp_path / 'data', rng, subjects=5)
    main('--data', tmp_path / 'data', *TINY, '--epochs', 2, '--inner-share', 0.4, '--what', 'disc', '--out', tmp_path / 'run')
    page = Structure(tmp_path / 'run' / 'report.html').check()
    history = list(csv.DictReader((tmp_path / 'run' / 'history.csv').read_text().splitlines()))
    for part in (f'{float(history[-1]["validation_dice_pooled"]):.3f}', f'{float(history[-1]["validation_dice_per_image"]):.3f}', 'empty mask',
                 'mean training mask', 'unet on data', 'disc', '16x24', 'inner subjects'):
        assert part in page.text
    assert [attributes['alt'] for tag, attributes in page.tags if tag == 'img'] == [
        'Scores over the epochs', 'Predictions after each epoch', 'Predictions: best, median and worst']
    usual = page.text.index('As they are by default')
    assert page.text.index('inner share') < usual < page.text.index('optimizer', usual) and 'base channels' in page.text[:usual]

    rows = list(csv.DictReader((tmp_path / 'run' / 'validation.csv').read_text().splitlines()))
    config = json.loads((tmp_path / 'run' / 'config.json').read_text())
    assert {row['subject'] for row in rows} == set(config['validation_subjects']) and len(rows) == config['validation_images']
    overlap, predicted, true = (sum(int(row[name]) for row in rows) for name in ('overlap', 'predicted', 'true'))
    assert 2 * overlap / (predicted + true) == pytest.approx(float(history[-1]['validation_dice_pooled']))
    assert numpy.mean([float(row['dice']) for row in rows]) == pytest.approx(float(history[-1]['validation_dice_per_image']), abs=1e-4)


def test_a_cross_validation_is_shown_with_all_its_subjects_the_worst_first(tmp_path, rng, main):
    write_pairs(tmp_path / 'data', rng, subjects=4)
    main('--data', tmp_path / 'data', *TINY, '--epochs', 1, '--folds', 2, '--leaky-split-by-image', '--out', tmp_path / 'leaky')
    assert Structure(tmp_path / 'leaky' / 'report.html').check().text.count('LEAKS: split by image') == 1
    main('--data', tmp_path / 'data', *TINY, '--epochs', 1, '--folds', 2, '--fold', 2, '--out', tmp_path / 'cv')
    assert '1 of 2 folds; not complete yet: 1' in Structure(tmp_path / 'cv' / 'report.html').check().text
    main('--resume', tmp_path / 'cv')
    page = Structure(tmp_path / 'cv' / 'report.html').check()
    scores = [[float(row['validation_dice_pooled']) for row in csv.DictReader((tmp_path / 'cv' / f'fold_{fold}' / 'history.csv').read_text().splitlines())][-1]
              for fold in (1, 2)]
    assert f'{numpy.mean(scores):.3f} ± {numpy.std(scores):.3f}' in page.text and '±' in page.text
    table = page.text[page.text.index('By subject'):page.text.index('The worst images')]
    shown = re.findall(r'(\d)(0\.\d{3})0\.\d{3}44', table)
    assert {subject for subject, _ in shown} == {'1', '2', '3', '4'} and [dice for _, dice in shown] == sorted(dice for _, dice in shown)


@pytest.fixture
def evil(tmp_path, rng, main):
    """The folder of a run whose names of files, subjects and words are code."""
    write_pairs(tmp_path / 'data', rng)
    try:
        for path in list((tmp_path / 'data').glob('1_*')):
            path.rename(path.with_name(f'{EVIL} & "\'{path.name}'))
    except OSError:
        pytest.skip('this file system refuses such names')
    main('--data', tmp_path / 'data', *TINY, '--epochs', 1, '--folds', 3, '--subject-pattern', '(.+)_', '--what', EVIL, '--out', tmp_path / 'run')
    return tmp_path / 'run'


def test_names_cannot_run_as_code(evil):
    for path in evil, *(evil / f'fold_{number}' for number in (1, 2, 3)):
        page = Structure(path / 'report.html').check()
        assert EVIL in page.text, 'shown as it is'
    write_page(evil, f'WARNING: {EVIL} \udcff', [evil / 'fold_1'])             # a name that is no Unicode
    assert EVIL in Structure(evil / 'report.html').check().text


@pytest.mark.skipif(not shutil.which('chromium'), reason='no chromium to look at a page with')
def test_a_browser_runs_nothing_and_shows_the_pictures(evil, tmp_path):
    done = subprocess.run(['chromium', '--headless', '--no-sandbox', '--disable-gpu', f'--user-data-dir={tmp_path / "profile"}', '--dump-dom',
                           f'file://{evil / "report.html"}'], capture_output=True, text=True, timeout=120, check=True)
    assert '<title>unet on data</title>' in done.stdout and 'owned' not in done.stdout.partition('</head>')[0]
    assert '<script' not in done.stdout and done.stdout.count('<img') == 5


def test_a_file_that_is_missing_is_named(evil):
    (evil / 'fold_2' / 'validation.csv').write_text('image,subject\nx,y\n')
    with pytest.raises(ValueError, match='fold_2/validation.csv: is missing or damaged'):
        write_page(evil, folds=[evil / 'fold_1', evil / 'fold_2'])
    before = (evil / 'report.html').read_bytes()
    write_page(evil, folds=[evil / 'fold_1', evil / 'fold_3'])
    assert 'fold_2' not in (evil / 'report.html').read_text() and 'fold_2' in before.decode()


# --- How it learnt ----------------------------------------------------------------------------------------------------

def test_what_is_watched_is_what_the_network_predicts_of_those_images(loaders, tmp_path):
    training, validation = loaders
    validation.batch_size = 2                               # so that not all are in the first batch
    model, watch = UNet(base_channels=3, depth=2, rng=numpy.random.default_rng(1)), [0, 2, 3]
    optimizer, run = Adam(model.parameters(), 0.01), RunFolder(tmp_path / 'run', {'size': [16, 24], 'epochs': 2})
    images = validation.batch(watch, 0)[0]
    expected = [predict(model, images)[..., 0] > 0.5 for _ in fit(model, DiceLoss(), optimizer, training, validation, 2, run, watch=watch)]
    assert 0 < numpy.mean(expected) < 1 and not numpy.array_equal(*expected)
    numpy.testing.assert_array_equal(run.learnt((3, 16, 24)), expected)
    stored = load_checkpoint(tmp_path / 'run' / 'last.npz')[1]['learning']
    assert stored.dtype == numpy.uint8 and stored.nbytes == 2 * 3 * 16 * 24 / 8
    scores = evaluate(model, DiceLoss(), validation.epoch(0))
    assert evaluate(model, Watching(DiceLoss(), watch), validation.epoch(0)) == scores


def test_the_animation_has_a_frame_for_each_epoch_however_often_the_run_was_stopped(tmp_path, rng, main, monkeypatch):
    write_pairs(tmp_path / 'data', rng)
    options = '--data', tmp_path / 'data', *TINY, '--epochs', 3
    main(*options, '--out', tmp_path / 'whole')
    with stopped_after(2, main, monkeypatch):
        main(*options, '--out', tmp_path / 'stopped')
    main('--resume', tmp_path / 'stopped')
    assert_same_run(tmp_path / 'whole', tmp_path / 'stopped')
    assert (tmp_path / 'whole' / 'learning.gif').read_bytes() == (tmp_path / 'stopped' / 'learning.gif').read_bytes()
    main('--resume', tmp_path / 'whole', '--epochs', 5)
    with Image.open(tmp_path / 'whole' / 'learning.gif') as animation:
        durations = []
        for frame in range(animation.n_frames):
            animation.seek(frame)
            durations.append(animation.info['duration'])
    assert durations == [400] * 4 + [2000] and animation.info['loop'] == 0


def test_long_runs_show_some_of_their_epochs():
    assert thinned(5) == [0, 1, 2, 3, 4] and thinned(1) == [0]
    assert len(thinned(300)) == 60 and thinned(300)[0] == 0 and thinned(300)[-1] == 299
