"""Train a U-Net to find nerves in ultrasound images.

    python examples/train_unet.py                           on synthetic ultrasound, made as it goes
    python examples/train_unet.py --data DIR                on scans of your own
    python examples/train_unet.py --data DIR --folds 5      every subject is validated once, by one of five networks
    python examples/train_unet.py --resume RUN              goes on with what was stopped or killed, bit for bit

DIR holds pairs {subject}_{image}.tif and {subject}_{image}_mask.tif, or a folder train/ that does, or folders images/ and masks/ with
equal file names. Whole subjects are set aside for validation, because neighbouring frames of one subject are near copies. All
that comes out lies in the run folder:

    config.json    every setting, the split and the versions: what it takes to repeat the run
    history.csv    one row per epoch
    last.npz       the network after the last epoch: what is reported
    best.npz       the network of the best epoch on the inner subjects (--inner-share), else on the validation subjects
    settings.json  how probabilities become a mask, where that was chosen, and what it scores
    summary.txt    the scores of the last epoch beside the baselines
    curves.png, predictions.png    the same to look at

A cross-validation has such a folder for each fold, fold_1, fold_2, …, beside split.json, summary.txt and curves.png of all.
`--fold 2` trains one fold only, so several processes with the same --out can train side by side.
"""

import argparse
import datetime
import json
import math
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy

import nervenet
from nervenet.study import figures
from nervenet.images.augment import FILL_MODES, ULTRASOUND, Augmentation, median_filter
from nervenet.engine.backend import select_device
from nervenet.files import make_folder
from nervenet.images.data import (DataError, Filtered, Loader, Reader, find_samples, holds_foreground,
                                  intensity_statistics, split_by_subject, subject_warning)
from nervenet.study.kfold import (BY_IMAGE, BY_SUBJECT, LEAKS, CrossValidation, each_image_alone, folds_by_subject,
                                  read_split, sides, write_split)
from nervenet.losses import BCEWithLogitsLoss, DiceLoss, WeightedSum
from nervenet.metrics import Baselines, SegmentationScores
from nervenet.optim import SGD, Adam, AdamW, ConstantSchedule, CosineSchedule
from nervenet.images.phantom import Phantom
from nervenet.study.segment import LARGEST_FILTER, Segmenter, Settings, choose_settings, score
from nervenet.study.fit import Interrupted, fit, stopping_on_signals
from nervenet.study.run_folder import WHERE, RunFolder, read_config
from nervenet.networks.unet import padded_size

LOSSES = {'dice': DiceLoss, 'dice-per-image': lambda: DiceLoss(per_image=True), 'bce': BCEWithLogitsLoss,
          'dice+bce': lambda: WeightedSum([(1.0, DiceLoss()), (1.0, BCEWithLogitsLoss())])}
OPTIMIZERS = {'sgd': lambda parameters, rate: SGD(parameters, rate, momentum=0.9, nesterov=True), 'adam': Adam, 'adamw': AdamW}
AUGMENTATIONS = {'none': Augmentation(), 'default': ULTRASOUND}
NOT_STORED = 'out', 'resume', 'fold', 'preview_augmentation'          # options that say what to do now, not what the run is


def main(arguments=None):
    args = parse(arguments)
    args.device, args.precision, reason = select_device(args.device, args.precision)
    print(f'nervenet {nervenet.__version__}, {reason}')
    stored = read_config(args.resume) if args.resume else {}
    before = stored.get('device', args.device), stored.get('precision') or args.precision
    if before != (args.device, args.precision):
        print(f'So far the run was computed on the {before[0]} in {before[1]}, now it is on the {args.device} in {args.precision}, which '
              'rounds otherwise: not bit for bit.')

    if args.data is None:
        reader = Phantom(subjects=200, frames=5, seed=args.seed, size=args.size)
        samples = reader.samples
        print('data:        synthetic ultrasound; give --data DIR for scans')
    else:
        reader = Reader(args.size, args.mask_threshold)
        if args.resume and not args.data.exists():
            raise DataError(f'{args.data}: no such folder; if the images lie elsewhere now: --resume {args.resume} --data DIR')
        samples = find_samples(args.data, args.subject_pattern)
    if args.median_filter:
        reader = Filtered(reader, lambda image: median_filter(image, args.median_filter))
    if said := note(args, samples):
        print(said)
    if args.leaky_split_by_image:
        samples = each_image_alone(samples)

    if args.preview_augmentation:
        preview(args, samples, reader)
    elif args.folds:
        cross_validate(args, samples, reader)
    else:
        train(args, args.out, reader, *split_by_subject(samples, args.validation_share, args.seed))


def cross_validate(args, samples, reader):
    """Train the folds that are not complete yet, or the one that --fold names, and summarise those that are."""
    by = BY_IMAGE if args.leaky_split_by_image else BY_SUBJECT
    positive = holds_foreground(samples, reader)
    if args.resume:
        folds = None                                        # the split is in the folder
    elif args.split:
        folds = read_split(args.split, samples, args.folds, by)
    else:
        folds = folds_by_subject(samples, positive, args.folds, args.seed)
    whole = CrossValidation(args.out, options(args), lambda path: write_split(path, samples, positive, folds, by),
                            bool(args.resume or args.fold), lambda path: read_split(path, samples, args.folds, by))
    for number in [args.fold] if args.fold else range(1, args.folds + 1):
        print(f'\nFold {number} of {args.folds}' + (' is complete' if whole.is_complete(number) else ''))
        if not whole.is_complete(number):
            try:
                train(args, whole.fold(number), reader, *sides(samples, whole.folds, number), fold=number)
            except BlockingIOError as error:                # the other folds may be free
                if args.fold:
                    raise
                print(f'skipped: {error}')
    print('\n' + (whole.summarize(args.folds, note(args, samples)) or 'No fold is complete yet.'))


def train(args, path, reader, training_samples, validation_samples, fold=None):
    """Train one network in the run folder `path`, or go on with it, and write down what came out."""
    parts = {'training': training_samples, 'validation': validation_samples}
    if args.inner_share:
        parts['training'], parts['inner'] = split_by_subject(training_samples, args.inner_share, args.seed)
    for part, chosen in parts.items():
        number = len({sample.subject for sample in chosen})
        subjects = '' if args.leaky_split_by_image else f' of {number} subject{"s" if number > 1 else ""}'
        print(f'{part + ":":12} {len(chosen)} images{subjects}')

    print('reading:     all of them once', flush=True)
    # Intensities and baselines are measured on the training part only, as it is: in order, and not augmented.
    input_mean, input_std = intensity_statistics(parts['training'], reader)
    in_order = {part: Loader(chosen, reader, args.batch_size) for part, chosen in parts.items()}
    validation, inner = in_order['validation'], in_order.get('inner')
    training = Loader(parts['training'], reader, args.batch_size, seed=args.seed, shuffle=True,
                      positive_share=args.nerve_share, transform=augmentation(args), device=args.device)
    # What the network is scored on after each epoch goes where it computes; baselines, choices and pictures are made here.
    scored = {part: Loader(chosen, reader, args.batch_size, device=args.device) for part, chosen in parts.items()
              if part != 'training'}
    counted = Baselines()
    for _, masks in in_order['training'].epoch(0):
        counted.update(masks)
    if not counted.total.any():
        raise DataError('no training mask holds any foreground at this size: look at the masks, --mask-threshold and --size')
    baselines = counted.compute(masks for _, masks in validation.epoch(0))

    # The network, what it minimises, and how.
    rng = numpy.random.default_rng(args.seed)
    model = nervenet.UNet(base_channels=args.base_channels, depth=args.depth, norm=args.norm, dropout=args.dropout,
                          input_mean=input_mean, input_std=input_std, rng=rng).to(args.device)
    loss = LOSSES[args.loss]()
    optimizer = OPTIMIZERS[args.optimizer](model.parameters(), args.learning_rate)
    steps = args.epochs * len(training)
    warmup = min(steps // 10, len(training))
    schedule = (CosineSchedule(args.learning_rate, steps, warmup) if args.schedule == 'cosine'
                else ConstantSchedule(args.learning_rate, warmup))

    config = {**options(args), 'fold': fold, 'nervenet': nervenet.__version__, 'numpy': numpy.__version__}
    for part, chosen in parts.items():
        config |= {f'{part}_subjects': sorted({sample.subject for sample in chosen}), f'{part}_images': len(chosen)}
    run = RunFolder(path, config | {'baselines': baselines}, resume=args.resume is not None)
    run.restore(model, optimizer)
    print(f'network:     {sum(array.size for array in model.parameters().values()):,} parameters, images of '
          f'{args.size[0]}x{args.size[1]}\nrun folder:  {run.path}'
          + (f', going on after epoch {len(run.history)}' if run.history else '') + '\n')

    print_header()
    for name, scores in baselines.items():
        print_scores('', name, {f'validation_{key}': value for key, value in scores.items()}, 'validation')
    try:
        with stopping_on_signals() as stop:
            for _ in fit(model, loss, optimizer, training, scored['validation'], args.epochs, run, schedule, args.clip_norm,
                         scored.get('inner'), args.patience, stop):
                print_epoch(run.history, args.epochs)
    except Interrupted:
        done = len(run.history)
        fold = f' --fold {args.fold}' if args.fold else ''
        raise Interrupted(f'stopped in epoch {done + 1}, which starts anew when you go on; {done} epochs are saved. Go on with:'
                          f'\n    python examples/train_unet.py --resume {args.out}{fold}') from None
    except MemoryError as error:
        needed = model.training_memory((args.batch_size, *args.size, 1)) / 2**30
        raise MemoryError(f'a training step on {args.batch_size} images of {args.size[0]}x{args.size[1]} with --base-channels '
                          f'{args.base_channels} needs about {needed:.1f} GiB, lower --batch-size first ({error})') from error
    if len(run.history) < args.epochs:
        print(f'stopped early: no better epoch on the inner subjects for {args.patience} epochs')

    draw(run, model, validation, baselines)
    chosen = choose(run, args.device, validation, inner, counted.mean_mask()[:, :, 0].astype('uint8'))
    print('\n' + run.summarize(baselines, chosen['last.npz'], note(args, training_samples + validation_samples)))


def note(args, samples):
    """Return what is to be said, first of all, of scores of these samples; '' if nothing."""
    if args.leaky_split_by_image:
        return LEAKS
    return subject_warning(samples, args.subject_pattern)


def choose(run, device, validation, inner, mean_training_mask):
    """Choose, for the last network and the best one, how probabilities become a mask; add it to their files, and return it."""
    part, where = (validation, 'validation') if inner is None else (inner, 'inner')
    found, chosen = {}, {}
    print()
    for path in run.last, run.best:
        network, extra = nervenet.load_checkpoint(path)
        epoch, network = extra['epoch'], network.to(device)
        if epoch not in found:                              # the last epoch may be the best
            found[epoch] = choose_settings(network, lambda: part.epoch(0))
        settings, there = found[epoch]
        run.complete(path, settings=asdict(settings), mean_training_mask=mean_training_mask)
        chosen[path.name] = {'epoch': extra['epoch'], 'settings': asdict(settings), 'chosen on': f'{where} subjects',
                             'dice per image there': there}
        print(f'{path}: epoch {extra["epoch"]}, threshold {settings.threshold:g}, minimal area {settings.minimal_area:.2%}, flip '
              f'average {"on" if settings.flip_average else "off"}: Dice per image {there:.4f} on the {where} subjects, '
              'flattered, since chosen there')
        if inner is not None:
            honest = chosen[path.name]['validation'] = score(network, validation.epoch(0), settings)
            print(f'    on the validation subjects: hard Dice {honest["dice_pooled"]:.4f} pooled, '
                  f'{honest["dice_per_image"]:.4f} per image')
        if path == run.last:        # averaging over flips at the usual threshold is no choice, so its score needs no inner subjects
            chosen[path.name]['flip average'] = score(network, validation.epoch(0), Settings(flip_average=True))
    run.write('settings.json', json.dumps(chosen, indent=2) + '\n')
    return chosen


def draw(run, model, validation, baselines):
    """Draw the curves of the run, and the best, median and worst prediction of its last network on the validation part."""
    title = LEAKS.partition(',')[0] if run.config['leaky_split_by_image'] else ''
    figures.save(figures.curves(run.history, baselines=baselines, title=title), run.path / 'curves.png')
    segmenter, scores, with_nerve = Segmenter(model, run.config['size']), SegmentationScores(), []
    for images, masks in validation.epoch(0):
        probabilities = segmenter.probabilities(images[..., 0])
        scores.update(numpy.stack(probabilities)[..., None], masks)
        with_nerve.extend(masks.any(axis=(1, 2, 3)))
    # An empty mask shows nothing, so cases are chosen among the images that hold a nerve, if there are any.
    chosen = numpy.flatnonzero(with_nerve) if any(with_nerve) else numpy.arange(len(with_nerve))
    cases = []
    for label, place in figures.best_median_worst(scores.dice_of_images()[chosen]):
        index = int(chosen[place])
        image, truth = (array[0, :, :, 0] for array in validation.batch([index], 0))
        prediction = segmenter.settings.mask(segmenter.probabilities([image])[0])
        cases.append(dict(label=label, name=validation.samples[index].name, image=image, truth=truth, prediction=prediction))
    images = 'Validation images with nerve' if any(with_nerve) and not all(with_nerve) else 'Validation'
    what = f'{images}, after epoch {run.history[-1]["epoch"]}: nerve where the probability is above {segmenter.settings.threshold:g}'
    figures.save(figures.predictions(cases, title=what), run.path / 'predictions.png')


def preview(args, samples, reader):
    """Draw what augmentation makes of a few images that hold a nerve: the image, then four draws, the mask outlined."""
    transform, shown = augmentation(args), {}
    if args.preview_augmentation.suffix.lower() != '.png':
        raise DataError(f'--preview-augmentation: {args.preview_augmentation} is to be a picture; expected a name that ends in .png')
    if args.preview_augmentation.exists():
        raise DataError(f'--preview-augmentation: {args.preview_augmentation} exists already; choose another name')
    if transform == Augmentation():
        raise DataError('--preview-augmentation: no augmentation is on; give --augment default, or single options')
    for index, sample in enumerate(samples):
        if sample.subject not in shown and reader.read(sample)[1].any():
            shown[sample.subject] = index
        if len(shown) == 4:
            break
    indices = list(shown.values())
    if not indices:
        raise DataError('--preview-augmentation: no mask holds any foreground at this size')
    draws = Loader(samples, reader, 1, seed=args.seed, transform=transform)
    columns = [Loader(samples, reader, 1).batch(indices, 0), *(draws.batch(indices, epoch) for epoch in (1, 2, 3, 4))]
    rows = [[figures.overlay(images[row], None, masks[row]) for images, masks in columns] for row in range(len(indices))]
    picture = figures.grid(rows, row_titles=[samples[index].name for index in indices],
                           column_titles=['as it is', 'draw 1', 'draw 2', 'draw 3', 'draw 4'])
    make_folder(args.preview_augmentation.absolute().parent, '--preview-augmentation')
    figures.save(picture, args.preview_augmentation)
    print(f'augmented pairs are in {args.preview_augmentation}')


def augmentation(args):
    """Return the Augmentation of --augment, with what single options replace in it."""
    single = {field.name: getattr(args, field.name) for field in fields(Augmentation)}
    return replace(AUGMENTATIONS[args.augment], **{name: value for name, value in single.items() if value is not None})


def options(args):
    """Return the options that make a run what it is, as config.json holds them."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()
            if name not in NOT_STORED}


def print_header():
    print(f'{"":7} {"":19} {"":>8} {"soft Dice":^15} {"hard Dice":^15} {"IoU":^15}')
    print(f'{"epoch":7} {"part":19} {"loss":>8}' + f' {"pooled":>7} {"image":>7}' * 3 + f' {"accuracy":>8} {"foreground":>10}')


def print_scores(epoch, part, row, prefix, note=''):
    """Print one row of the table; a score that the row does not hold is left blank."""
    cells = [f'{row[f"{prefix}_{name}"]:{width}.{digits}f}' if f'{prefix}_{name}' in row else ' ' * width for name, width, digits in (
        ('loss', 8, 4), ('soft_dice_pooled', 7, 3), ('soft_dice_per_image', 7, 3), ('dice_pooled', 7, 3), ('dice_per_image', 7, 3),
        ('iou_pooled', 7, 3), ('iou_per_image', 7, 3), ('accuracy', 8, 4))]
    print(f'{epoch:7} {part:19} {" ".join(cells)} {row[f"{prefix}_foreground_share"]:10.2%}  {note}'.rstrip(), flush=True)


def print_epoch(history, epochs):
    """Print the rows of the table for the last epoch of `history`."""
    row = history[-1]
    print_scores(f'{row["epoch"]}/{epochs}', 'training', row, 'train')
    if 'inner_loss' in row:
        print_scores('', 'inner', row, 'inner')
    print_scores('', 'validation', row, 'validation', f'{row["seconds"]:.0f} s, {row["images_per_second"]:.0f} images/s')
    empty = len(history) >= 3 and all(row['validation_foreground_share'] == 0 for row in history[-3:])
    if empty and row['train_loss'] >= history[0]['train_loss']:
        print('             The network predicts no foreground, and the loss is no lower than at first: it has collapsed. Stop, and '
              'try\n             another --learning-rate, or --loss dice+bce.')


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the default of each option that has one."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def parse(arguments):
    parser = build_parser()
    defaults, unset = vars(parser.parse_args([])), object()
    given = vars(parser.parse_args(arguments, argparse.Namespace(**dict.fromkeys(defaults, unset))))
    given = {name: value for name, value in given.items() if value is not unset}
    stored = {}
    if 'resume' in given:
        if given.setdefault('out', given['resume']) != given['resume']:
            parser.error(f'--resume {given["resume"]} goes on in that folder, --out is {given["out"]}; leave out --out')
        stored = resumable(given['resume'])
        if given.get('device') == 'auto':
            del given['device']                             # the one that was found at the start
        if given.get('device', stored['device']) != stored['device']:
            stored['precision'] = None                      # that of the other device
    args = argparse.Namespace(**{**defaults, **stored, **given})

    args.norm = None if args.norm == 'none' else args.norm
    args.data = args.data and args.data.resolve()
    args.out = args.out or Path('runs', f'{datetime.datetime.now():%Y-%m-%d_%H-%M-%S}')
    args.split = args.split and args.split.resolve()
    args.epochs = args.epochs or (5 if args.data is None else 15)
    args.learning_rate = args.learning_rate or (2e-3 if args.data is None else 1e-3)
    args.augment = args.augment or ('none' if args.data is None else 'default')
    if args.depth > 12:
        parser.error(f'--depth is {args.depth}; expected at most 12: each level halves the image')
    if args.fold and not args.fold <= (args.folds or 0):
        parser.error(f'--fold is {args.fold} and --folds {args.folds or "not given"}; expected --fold from 1 to --folds')
    if args.split and not args.folds:
        parser.error('--split needs --folds, the number of folds in it')
    if args.median_filter and not (3 <= args.median_filter <= LARGEST_FILTER and args.median_filter % 2):
        parser.error(f'--median-filter is {args.median_filter}; expected an odd size from 3 to {LARGEST_FILTER}')
    if args.folds and 'validation_share' in given:
        parser.error('--validation-share has no meaning with --folds: each fold is the validation part once')
    if args.patience and not args.inner_share:
        parser.error('--patience needs --inner-share: to stop where validation is best would flatter its scores')
    augmentation(args)                                      # raises ValueError for what cannot be
    multiple = 2**args.depth
    rounded = padded_size(args.size, multiple)
    if rounded != args.size:
        print(f'size: {args.size[0]}x{args.size[1]} becomes {rounded[0]}x{rounded[1]}, a multiple of 2^depth = {multiple}')
        args.size = rounded
    for name in given.keys() & stored.keys() - set(WHERE):
        if getattr(args, name) != stored[name]:
            parser.error(f'--{name.replace("_", "-")} is {getattr(args, name)}, but {args.resume / "config.json"} has '
                         f'{stored[name]}; leave it out to go on, or start a new run without --resume')
    return args


def resumable(folder):
    """Return the options of the run in `folder`, as `parse` gives them. Raises FileNotFoundError or ValueError."""
    config = read_config(folder)
    if config.get('fold'):
        raise ValueError(f'{folder} is one fold of a cross-validation: give --resume {folder.parent} --fold {config["fold"]}')
    defaults = {name: value for name, value in vars(build_parser().parse_args([])).items() if name not in NOT_STORED}
    config = {**{name: defaults[name] for name in WHERE}, **config}
    if defaults.keys() - config.keys():
        raise ValueError(f'{folder / "config.json"}: lacks {", ".join(sorted(defaults.keys() - config.keys()))}; '
                         'it is not of this version')

    def refuse(message):
        raise ValueError(f'{folder / "config.json"}: {message}')

    parser, typed = build_parser(), []                      # what was stored is read as if it had been typed
    parser.error = refuse
    for name, default in defaults.items():
        value, option = config[name], '--' + name.replace('_', '-')
        if isinstance(value, bool):
            typed += [option] if value else [] if default is False else ['--no-' + option[2:]]
        elif value is not None:
            typed.append(f'{option}={"x".join(map(str, value)) if isinstance(value, list) else value}')
        elif default is not None and name != 'norm':        # which has none
            refuse(f'lacks a value of {name}')
    options = vars(parser.parse_args(typed))
    return {name: None if config[name] is None else options[name] for name in defaults}


def build_parser():
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__.split('\n')[0], formatter_class=HelpFormatter)
    data = parser.add_argument_group('data')
    data.add_argument('--data', type=Path, metavar='DIR', help='folder of the image and mask pairs; default: synthetic ultrasound')
    data.add_argument('--size', type=size, default='96x128', metavar='HxW',
                      help='rows x columns the network works at, rounded up to a multiple of 2^depth')
    data.add_argument('--subject-pattern', metavar='REGEX',
                      help='regular expression on the file name whose first group is the subject, such as "(.+)_[0-9]+"; default: '
                      'the first number of {subject}_{image}')
    data.add_argument('--mask-threshold', type=positive, metavar='N', help='count mask values from N up as foreground, for masks with '
                      'in-between values')
    data.add_argument('--validation-share', type=share, default=0.2, metavar='SHARE',
                      help='share of the images set aside for validation, by whole subjects')
    data.add_argument('--inner-share', type=share, metavar='SHARE',
                      help='share of the training images set aside, by whole subjects, to choose on: the best epoch, when to '
                      'stop, how probabilities become a mask; the validation subjects are then only scored')
    data.add_argument('--nerve-share', type=share, metavar='SHARE',
                      help='share of the images drawn in an epoch that hold a nerve; some then come twice and others not, and '
                      'an epoch keeps its number of images; default: as they come')
    data.add_argument('--median-filter', type=whole, metavar='SIZE',
                      help='odd size of a median filter against speckle, 3 or more, applied in prediction too')
    folds = parser.add_argument_group('cross-validation')
    folds.add_argument('--folds', type=whole, metavar='N',
                       help='deal the subjects into so many folds, and validate on each in turn')
    folds.add_argument('--fold', type=whole, metavar='K', help='train this fold only')
    folds.add_argument('--split', type=Path, metavar='FILE',
                       help='split.json of another cross-validation, to use the same folds')
    folds.add_argument('--leaky-split-by-image', action='store_true',
                       help='split by image, which LEAKS, to see how much; with or without --folds')
    augmenting = parser.add_argument_group('augmentation', 'Random changes of the training images, named as in Keras; '
                                           'nervenet/augment.py says what each means. A single option replaces its value in '
                                           '--augment.')
    augmenting.add_argument('--augment', choices=AUGMENTATIONS,
                            help='what is on; default: default on scans, none on synthetic ultrasound, of which there is plenty')
    for field in fields(Augmentation):
        usual = getattr(ULTRASOUND, field.name)
        kind = (dict(action=argparse.BooleanOptionalAction) if field.type is bool else
                dict(choices=FILL_MODES) if field.type is str else
                dict(type=int if field.type is int else float, metavar='N'))
        augmenting.add_argument('--' + field.name.replace('_', '-'), **kind, help=f'{usual} in --augment default')
    augmenting.add_argument('--preview-augmentation', type=Path, metavar='PICTURE.png',
                            help='draw a few augmented images with their masks, and stop')
    network = parser.add_argument_group('network')
    network.add_argument('--base-channels', type=whole, default=16, metavar='N', help='channels of the first level; they double at each')
    network.add_argument('--depth', type=whole, default=4, metavar='N', help='how often the image is halved')
    network.add_argument('--norm', choices=['batch', 'none'], default='batch', help='normalisation after each convolution')
    network.add_argument('--dropout', type=float, default=0.0, metavar='P', help='probability of dropping a value at the bottom')
    training = parser.add_argument_group('training')
    training.add_argument('--loss', choices=LOSSES, default='dice+bce', help='what is minimised')
    training.add_argument('--optimizer', choices=OPTIMIZERS, default='adam', help='how')
    training.add_argument('--learning-rate', type=positive, metavar='RATE',
                          help='highest learning rate; default: 0.001 on scans, 0.002 on synthetic ultrasound')
    training.add_argument('--schedule', choices=['cosine', 'constant'], default='cosine', help='course of the learning rate, after a warm-up')
    training.add_argument('--clip-norm', type=positive, default=None, metavar='NORM', help='bound on the norm of the gradient')
    training.add_argument('--batch-size', type=whole, default=8, metavar='N', help='images per step')
    training.add_argument('--epochs', type=whole, metavar='N',
                          help='how often as many images as there are for training are drawn; default: 15 on scans, 5 on synthetic ultrasound')
    training.add_argument('--patience', type=whole, metavar='N',
                          help='stop after so many epochs without a better one on the inner subjects')
    training.add_argument('--seed', type=seed, default=0, metavar='N',
                          help='of the split, the weights, the order of the images and their augmentation')
    training.add_argument('--device', choices=['auto', 'gpu', 'cpu'], default='auto',
                          help='where to compute; a run may go on elsewhere than it began')
    training.add_argument('--precision', choices=['fp32', 'tf32'], help='of matrix products on a GPU: tf32 reads its factors rounded to 10 '
                          'bits; default: tf32 where the GPU has it')
    training.add_argument('--out', type=Path, metavar='RUN', default=None, help='run folder; default: runs/ and the date and time')
    training.add_argument('--resume', type=Path, metavar='RUN',
                          help='go on with the run or the cross-validation in this folder, bit for bit')
    return parser


def size(text):
    height, cross, width = text.lower().partition('x')
    if not (cross and height.isdigit() and width.isdigit() and int(height) and int(width)):
        raise argparse.ArgumentTypeError(f'{text!r} is not of the form HxW, rows x columns, such as 96x128')
    return int(height), int(width)


def whole(text):
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'{text!r} is not a whole number of at least 1')
    return int(text)


def seed(text):
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f'{text!r} is not a whole number of at least 0')
    return int(text)


def positive(text):
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f'{text!r} is not a positive number')
    return number


def share(text):
    number = positive(text)
    if number >= 1:
        raise argparse.ArgumentTypeError(f'{text!r} is not a share between 0 and 1')
    return number


if __name__ == '__main__':
    try:
        main()
    except Interrupted as error:
        print(f'train_unet.py: {error}', file=sys.stderr)
        sys.exit(130)
    except KeyboardInterrupt:
        sys.exit(130)
    except MemoryError as error:
        sys.exit(f'train_unet.py: not enough memory: lower --batch-size, --size, --base-channels or --depth ({error})')
    except (ValueError, RuntimeError, OSError, ArithmeticError) as error:
        sys.exit(f'train_unet.py: {error}')
