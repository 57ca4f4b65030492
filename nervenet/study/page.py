"""report.html: one file that shows a run, or a cross-validation, to somebody who has only a browser.

It is made of what lies in the folder (config.json, history.csv, settings.json, validation.csv and the pictures), holds it all inside, and
asks no network and runs no script. Whatever comes from files or from the command line is escaped, names of files among it.
"""

import base64
import csv
import html
import json
import re
from collections import defaultdict
from pathlib import Path

import numpy

from ..files import atomic_write
from ..images.samples import natural_key
from ..metrics import ratio
from .kfold import read_fold
from .options import build_parser
from .report import unscored
from .run_folder import read_config

STYLE = '''
:root { color-scheme: light dark; --ink: #222; --faint: #666; --line: #ddd; --paper: #fff; --warn: #d55e00 }
@media (prefers-color-scheme: dark) { :root { --ink: #ddd; --faint: #999; --line: #444; --paper: #181818 } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 62rem; margin: 0 auto; padding: 1rem }
h1 { font-size: 1.5rem; line-height: 1.25 } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; border-bottom: 1px solid var(--line) }
img { max-width: 100%; height: auto; background: #fff } p { margin: .5rem 0 } .faint { color: var(--faint) } .wide { overflow: auto; max-height: 32rem }
.note { border-left: 4px solid var(--warn); padding: .25rem .75rem; overflow-wrap: anywhere }
table { border-collapse: collapse; font-variant-numeric: tabular-nums } th, td { text-align: right; padding: .2rem .7rem; white-space: nowrap }
th:first-child, td:first-child { text-align: left; padding-left: 0; white-space: normal; min-width: 6rem; overflow-wrap: break-word } th { font-weight: 600 }
tr + tr { border-top: 1px solid var(--line) } summary { cursor: pointer }
@media (max-width: 32rem) { table { font-size: .85rem } th, td { padding: .2rem .35rem } }
@media print { body { max-width: none; padding: 0; font-size: 11px } h2 { break-after: avoid } img, tr { break-inside: avoid } .wide { max-height: none; overflow: visible }
  details::details-content { content-visibility: visible; height: auto } }
'''
SCORES = (('dice_pooled', 'Dice, pooled'), ('dice_per_image', 'Dice, per image'), ('iou_pooled', 'IoU, pooled'), ('accuracy', 'accuracy'))


def write_page(folder, note='', folds=()):
    """Write report.html into the folder of a run that came to its end; `note` is said first. For a cross-validation, `folds` are the folders of
    those that did. One process at a time may write into a folder.

    Raises ValueError, naming the file, if one of those it is made of is missing or damaged.
    """
    folder = Path(folder)
    folds = [*folds] or [folder]
    config = json.loads((folder / 'config.json').read_text())
    title = f'{config.get("model", "network")} on {Path(config["data"]).name if config.get("data") else "synthetic ultrasound"}'
    parts = [f'<h1>{e(title)}</h1>', notes(note), scores(folds), pictures(folder, folds), subjects(folds), *data(folds), chosen(folds), settings(config)]
    text = ('<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
            '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; style-src \'unsafe-inline\'">'
            f'<title>{e(title)}</title><style>{STYLE}</style></head>\n<body>\n' + '\n'.join(filter(None, parts)) + '\n</body></html>\n')
    with atomic_write(folder / 'report.html') as file:
        file.write(text.encode(errors='backslashreplace'))         # names need not be Unicode


def e(value):
    """Return `value` as text that means nothing in HTML."""
    return html.escape(str(value), quote=True)


def table(head, rows):
    """Return a table; the first cell of each row says what the others are of."""
    lines = [f'<tr>{"".join(f"<th>{e(cell)}</th>" for cell in head)}</tr>'] if head else []
    lines += [f'<tr>{"".join(f"<td>{e(cell)}</td>" for cell in row)}</tr>' for row in rows]
    return '<div class="wide"><table>' + '\n'.join(lines) + '</table></div>'


def notes(text):
    """Return what is to be said first, warnings marked."""
    return ''.join(f'<p{" class=note" if re.match("WARNING|LEAKS", line) else ""}>{e(line)}</p>' for line in text.splitlines() if line.strip())


def scores(folds):
    """Return the scores after the last epoch beside the baselines: of one run, or mean ± deviation of folds, and each of them."""
    read = [read_fold(fold) for fold in folds]
    if said := unscored(read[0][0][-1]):
        return f'<h2>Scores</h2><p>{e(said)}</p>'
    last = [{name: history[-1][f'validation_{name}'] for name, _ in SCORES} for history, _, _ in read]
    kinds = {'network': last}
    if all('flip average' in chosen for _, _, chosen in read):
        kinds['averaged over flips'] = [chosen['flip average'] for _, _, chosen in read]
    for name in read[0][1]:
        kinds[name] = [baselines[name] for _, baselines, _ in read]

    def shown(values):
        return f'{numpy.mean(values):.3f}' + f' ± {numpy.std(values):.3f}' * (len(values) > 1)

    head = ['after the last epoch', *(title for _, title in SCORES)]
    rows = [[kind, *(shown([values[name] for values in each]) for name, _ in SCORES)] for kind, each in kinds.items()]
    text = '<h2>Scores in validation</h2>' + table(head, rows)
    if len(folds) > 1:
        text += ('<p class="faint">Mean ± population standard deviation of the folds.</p>'
                 + table(head, [[fold.name, *(f'{values[name]:.3f}' for name, _ in SCORES)] for fold, values in zip(folds, last)]))
    return text + '<p class="faint">Pooled counts all pixels at once; per image is the mean over images, where empty against empty counts 1.</p>'


def picture(path, what):
    """Return the picture at `path`, inside the page; '' if there is none."""
    if not path.exists():
        return ''
    kind = 'gif' if path.suffix == '.gif' else 'png'
    return f'<p><img alt="{e(what)}" src="data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"></p>'


def pictures(folder, folds):
    text = '<h2>Curves</h2>' + picture(folder / 'curves.png', 'Scores over the epochs')
    if any((fold / 'learning.gif').exists() for fold in folds):
        text += '<h2>How it learnt</h2>' + picture(folds[0] / 'learning.gif', 'Predictions after each epoch')
    if any((fold / 'predictions.png').exists() for fold in folds):
        text += '<h2>Best, median and worst</h2>'
    for fold in folds:
        text += (f'<p>{e(fold.name)}</p>' if len(folds) > 1 else '') + picture(fold / 'predictions.png', 'Predictions: best, median and worst')
    return text


def read_cases(fold):
    """Return the rows of validation.csv of a run, numbers as numbers. Raises ValueError, naming the file."""
    path = fold / 'validation.csv'
    try:
        with open(path, newline='', encoding='utf-8') as file:
            return [{**row, 'dice': float(row['dice']), **{name: float(row[name]) for name in ('overlap', 'predicted', 'true')}}
                    for row in csv.DictReader(file)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{path}: is missing or damaged ({type(error).__name__}: {" ".join(str(error).split())})') from error


def subjects(folds):
    """Return a table of subjects, the worst first, and the worst and best images; '' without validation."""
    if not read_config(folds[0]).get('validation_images'):
        return ''
    cases = [case for fold in folds for case in read_cases(fold)]
    of_subject = defaultdict(list)
    for case in cases:
        of_subject[case['subject']].append(case)
    rows = []
    for subject, own in of_subject.items():
        overlap, predicted, true = (sum(case[name] for case in own) for name in ('overlap', 'predicted', 'true'))
        rows.append((float(ratio(numpy.array(2 * overlap), numpy.array(predicted + true))), subject, len(own), sum(case['true'] > 0 for case in own),
                     numpy.mean([case['dice'] for case in own])))
    rows.sort(key=lambda row: (row[0], natural_key(row[1])))
    text = table(['subject', 'Dice, pooled', 'Dice, per image', 'images', 'with foreground'],
                 [[subject, f'{pooled:.3f}', f'{mean:.3f}', images, positive] for pooled, subject, images, positive, mean in rows])
    ranked = sorted((case for case in cases if case['true'] > 0), key=lambda case: case['dice']) or cases
    shown = [[case['image'], case['subject'], f'{case["dice"]:.3f}'] for case in ranked[:8] + ranked[max(8, len(ranked) - 3):]]
    return (f'<h2>By subject, the worst first</h2>{text}<h2>The worst images, and the best three</h2>'
            + table(['image', 'subject', 'Dice'], shown))


def data(folds):
    """Yield what was trained on and what was not."""
    yield '<h2>Data</h2>'
    rows, lists = [], []
    for fold in folds:
        config = json.loads((fold / 'config.json').read_text())
        for part in 'training', 'inner', 'validation':
            if f'{part}_images' in config:
                name = f'{fold.name}, {part}' if len(folds) > 1 else part
                rows.append([name, config[f'{part}_images'], len(config[f'{part}_subjects'])])
                lists.append([name, ', '.join(sorted(config[f'{part}_subjects'], key=natural_key))])
    yield table(['part', 'images', 'subjects'], rows)
    yield '<details><summary>Which subjects</summary>' + ''.join(f'<p><b>{e(name)}</b>: {e(named)}</p>' for name, named in lists) + '</details>'


def chosen(folds):
    """Return how probabilities become a mask, and where that was chosen."""
    rows = []
    for fold in folds:
        for name, found in json.loads((fold / 'settings.json').read_text()).items():
            rows.append([f'{fold.name}/{name}' if len(folds) > 1 else name, found['epoch'], found['settings']['threshold'],
                         f'{found["settings"]["minimal_area"]:.2%}', *('yes' if found['settings'][name] else 'no' for name in ('flip_average', 'largest_component')),
                         f'{found["settings"]["temperature"]:.2f}', found['chosen on']])
    return '<h2>From probabilities to a mask</h2>' + table(['file', 'epoch', 'threshold', 'minimal area', 'flips averaged', 'largest component',
                                                            'temperature', 'chosen on'], rows)


def settings(config):
    """Return all settings, those that are not the default first, and the versions."""
    parser, rows = build_parser(), []
    skipped = {'baselines', 'fold', 'begun', 'nervenet', 'numpy'}
    for name, value in config.items():
        if name not in skipped and not name.endswith(('_subjects', '_images')):
            default = parser.get_default(name)
            default = 'x'.join(map(str, default)) if isinstance(default, tuple) else default
            value = 'x'.join(map(str, value)) if isinstance(value, list) else value
            rows.append((value in (default, None), name.replace('_', ' '), 'none' if value is None else value))
    given = table([], [row[1:] for row in rows if not row[0]])
    usual = table([], [row[1:] for row in rows if row[0]])
    versions = ', '.join(f'{name} {config[name]}' for name in ('nervenet', 'numpy') if name in config)
    return f'<h2>Settings</h2>{given}<details><summary>As they are by default</summary>{usual}</details><p class="faint">{e(versions)}</p>'
