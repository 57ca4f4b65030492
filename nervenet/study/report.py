"""What a run says in words and numbers: the progress of a loop, the table of epochs, the summary at the end."""

import sys
import time

import numpy

from ..images.samples import natural_key, subject_warning
from ..metrics import HARD_SCORES

LEAKS = ('LEAKS: split by image, so frames of one subject are on both sides of the split, and they are near copies. '
         'These scores are too good to be true; never quote them.')


UNSCORED = ('All subjects were trained on, so nobody is left to score the network on. What it is worth is known from a cross-validation with the same '
            'settings; how probabilities become a mask is to be given as the line "settings:" of predict.py has it for that: threshold, minimal '
            'area, flip average, largest component, and the mean temperature.')
UNSCORED_BUT_CHOSEN = ('No subject is left to score the network on. The inner subjects chose the best epoch and how probabilities become a mask '
                       '(settings.json), so what it scores on them is flattered.')


def unscored(row):
    """Return what is to be said in place of scores after an epoch, a row of the history; '' if there is a validation part."""
    return '' if 'validation_loss' in row else UNSCORED_BUT_CHOSEN if 'inner_loss' in row else UNSCORED


def print_whatever_comes():
    """Let a terminal that lacks a character, of a file name or a ±, get an escape in its place, where it would end the process."""
    for stream in sys.stdout, sys.stderr:
        if hasattr(stream, 'reconfigure'):                  # that of a notebook has none, and takes all
            stream.reconfigure(errors='backslashreplace')


def caveat(samples, split_by_image, subject_pattern=None):
    """Return what is to be said, first of all, of scores of these samples; '' if nothing."""
    return LEAKS if split_by_image else subject_warning(samples, subject_pattern)


def without_foreground(part, samples):
    """Return the warning about a part of the data, 'validation' or 'inner', none of whose masks holds any foreground."""
    subjects = sorted({sample.subject for sample in samples}, key=natural_key)
    who = ', '.join(subjects if len(subjects) <= 6 else [*subjects[:5], f'… {len(subjects) - 5} more'])
    return (f'WARNING: none of the {len(samples)} {part} masks holds any foreground (subjects {who}): Dice there says only '
            'whether anything was predicted, so the lowest loss chooses the best epoch, and threshold and minimal area stay as they are. '
            f'Another --seed or a larger {"--validation-share" if part == "validation" else "--inner-share"} deals otherwise.')


def best_row(history):
    """Return the row with the highest pooled hard Dice: of the inner subjects, if there are any, else in validation; without either, the last.

    Of equals, the one with the lowest loss: while no probability is above one half yet, all hard scores are 0. Of those, the last.
    Where that part holds no foreground, its Dice says only whether anything at all was predicted, and the loss alone decides.
    """
    part = 'inner' if 'inner_dice_pooled' in history[0] else 'validation'

    def goodness(row):
        dice = row[f'{part}_dice_pooled'] if row.get(f'{part}_true_foreground_share') != 0 else 0
        return dice, -row[f'{part}_loss'], row['epoch']

    return max(history, key=goodness) if f'{part}_loss' in history[0] else history[-1]


def summaries(histories, baselines, chosen, note=''):
    """Return the text of summary.txt for one run or several folds: the last epoch, and what inner subjects, if any, chose.

    For each history `baselines` holds {name: scores}, and `chosen` what settings.json says of last.npz: the scores of the last
    network on the validation subjects, 'flip average' with each prediction averaged with that of the mirrored image, 'validation'
    with the settings that the inner subjects, if there are any, chose. `note` is what is to be said first.
    """
    text = note and note + '\n\n'
    if said := unscored(histories[0][-1]):
        return text + f'{said}\n'
    text += summary([history[-1] for history in histories], baselines)
    if 'inner_dice_pooled' in histories[0][-1]:
        rows = [best_row(history) for history in histories]
        text += '\n' + summary(rows, [], 'Scores on validation subjects after the epoch that was best on the inner subjects: '
                               + ', '.join(str(row['epoch']) for row in rows))
    for key, how in (('flip average', 'each prediction averaged with that of the mirrored image'),
                     ('validation', 'made into masks as chosen on the inner subjects, settings.json')):
        scores = [each[key] for each in chosen if key in each]
        if len(scores) == len(chosen):                      # a mean over some of the folds would look like one over all
            text += '\n' + summary([{f'validation_{name}': each[name] for name in HARD_SCORES} for each in scores], [],
                                   f'Scores on validation subjects after the last epoch, {how}')
    return text


def summary(rows, baselines, title='Scores on validation subjects after the last epoch'):
    """Return a list for each score, one value per row (a run, or one per fold), and of folds mean ± deviation; baselines likewise.

    The deviation is that of the population, √(Σ(x − mean)² / folds): it describes these folds, and is no error of their mean.
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
        lines += ['', 'mean ± population standard deviation of the folds']
        for name, column, _ in columns:
            lines.append(f'average {name}: {average(of_rows(column))}')
    if baselines:
        lines += ['', 'The same subjects without looking at the image', '']
        for name in baselines[0]:
            shown = {'hard dice': 'dice_pooled', 'per image': 'dice_per_image', 'iou': 'iou_pooled', 'accuracy': 'accuracy'}
            lines.append(f'{name}: ' + ', '.join(f'{title} {average([scores[name][column] for scores in baselines])}'
                                                 for title, column in shown.items()))
    return '\n'.join(lines) + '\n'


def in_words(seconds):
    """Return about how long so many seconds are."""
    return ('less than a minute' if seconds < 55 else 'about a minute' if seconds < 90 else f'about {seconds / 60:.0f} minutes' if seconds < 5400
            else f'about {seconds / 3600:.1f} hours')


def print_header():
    """Print the two lines above the table of epochs."""
    print(f'{"":7} {"":19} {"":>8} {"soft Dice":^15} {"hard Dice":^15} {"IoU":^15}')
    print(f'{"epoch":7} {"part":19} {"loss":>8}' + f' {"pooled":>7} {"image":>7}' * 3 + f' {"accuracy":>8} {"foreground":>10}')


def print_scores(epoch, part, row, prefix, remark=''):
    """Print one row of the table; a score that the row does not hold is left blank."""
    cells = [f'{row[f"{prefix}_{name}"]:{width}.{digits}f}' if f'{prefix}_{name}' in row else ' ' * width
             for name, width, digits in (
        ('loss', 8, 4), ('soft_dice_pooled', 7, 3), ('soft_dice_per_image', 7, 3), ('dice_pooled', 7, 3), ('dice_per_image', 7, 3),
        ('iou_pooled', 7, 3), ('iou_per_image', 7, 3), ('accuracy', 8, 4))]
    print(f'{epoch:7} {part:19} {" ".join(cells)} {row[f"{prefix}_foreground_share"]:10.2%}  {remark}'.rstrip(), flush=True)


def print_epoch(history, epochs):
    """Print the rows of the table for the last epoch of `history`."""
    row = history[-1]
    parts = [part for part in ('train', 'inner', 'validation') if f'{part}_loss' in row]
    for part in parts:
        print_scores(f'{row["epoch"]}/{epochs}' if part == 'train' else '', 'training' if part == 'train' else part, row, part,
                     f'{row["seconds"]:.0f} s, {row["images_per_second"]:.0f} images/s' if part == parts[-1] else '')
    empty = len(history) >= 3 and all(row[f'{parts[-1]}_foreground_share'] == 0 for row in history[-3:])
    if empty and row['train_loss'] >= history[0]['train_loss']:
        print('             The network predicts no foreground, and the loss is no lower than at first: it has collapsed. Stop, '
              'and try\n             another --learning-rate, or --loss dice+bce.')


def progress(items, total, label, stream=None, seconds=30, unit='batches'):
    """Yield `items`, showing the share done, the speed and the time left.

    On a terminal that is a bar, wiped at the end; elsewhere a plain line every so many `seconds`. `total` is how
    many items there will be, `unit` what they are.
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
            state = f'{done}/{total}  {speed:.1f} {unit}/s  {left // 60}:{left % 60:02d} left'
            stream.write(f'\r{label} [{"█" * filled}{"·" * (30 - filled)}] {state} \x1b[K' if terminal else f'{label}  {state}\n')
            stream.flush()
    finally:                                            # also when the loop is left half-way
        if terminal:
            stream.write('\r\x1b[K')
            stream.flush()
