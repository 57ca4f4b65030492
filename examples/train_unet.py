"""Train a U-Net to find nerves in ultrasound images.

    python examples/train_unet.py                 on synthetic ultrasound, made as it goes
    python examples/train_unet.py --data DIR      on scans of your own

DIR holds pairs {subject}_{image}.tif and {subject}_{image}_mask.tif, or a folder train/ that does, or folders images/ and masks/ with
equal file names. Whole subjects are set aside for validation, because neighbouring frames of one subject are near copies. All
that comes out lies in the run folder:

    config.json    every setting, the split and the versions: what it takes to repeat the run
    history.csv    one row per epoch
    last.npz       the network after the last epoch: what is reported
    best.npz       the network of the best epoch on the validation subjects: for use, not for reporting
    summary.txt    the scores of the last epoch beside the baselines
    curves.png, predictions.png    the same to look at
"""

import argparse
import datetime
import math
import sys
from dataclasses import asdict
from pathlib import Path

import numpy

import nervenet
from nervenet import figures
from nervenet.backend import select_device
from nervenet.data import DataError, Loader, Reader, find_samples, intensity_statistics, is_split_by_image, split_by_subject
from nervenet.losses import BCEWithLogitsLoss, DiceLoss, WeightedSum
from nervenet.metrics import Baselines, SegmentationScores
from nervenet.optim import SGD, Adam, AdamW, ConstantSchedule, CosineSchedule
from nervenet.phantom import Phantom
from nervenet.segment import Segmenter, choose_settings
from nervenet.train import RunFolder, fit

LOSSES = {'dice': DiceLoss, 'dice-per-image': lambda: DiceLoss(per_image=True), 'bce': BCEWithLogitsLoss,
          'dice+bce': lambda: WeightedSum([(1.0, DiceLoss()), (1.0, BCEWithLogitsLoss())])}
OPTIMIZERS = {'sgd': lambda parameters, rate: SGD(parameters, rate, momentum=0.9, nesterov=True), 'adam': Adam, 'adamw': AdamW}


def main(arguments=None):
    args = parse(arguments)
    device, reason = select_device(args.device)
    print(f'nervenet {nervenet.__version__}, {reason}')

    # The data: pairs found, whole subjects set aside, intensities measured on the training part only.
    if args.data is None:
        reader = Phantom(subjects=100, frames=8, seed=args.seed, size=args.size)
        samples = reader.samples
        print('data:        synthetic ultrasound; give --data DIR for scans')
    else:
        reader = Reader(args.size, args.mask_threshold)
        samples = find_samples(args.data, args.subject_pattern)
    if is_split_by_image(samples):
        print('WARNING: no subject is known, so every image counts as its own. If several images show one subject, some land on\n'
              '         both sides of the split and the scores are too good to be true: give --subject-pattern.')
    training_samples, validation_samples = split_by_subject(samples, args.validation_share, args.seed)
    for part, chosen in ('training', training_samples), ('validation', validation_samples):
        print(f'{part + ":":12} {len(chosen)} images of {len({sample.subject for sample in chosen})} subjects')
    input_mean, input_std = intensity_statistics(training_samples, reader)
    training = Loader(training_samples, reader, args.batch_size, seed=args.seed, shuffle=True)
    validation = Loader(validation_samples, reader, args.batch_size)

    counted = Baselines()
    for _, masks in training.epoch(0):
        counted.update(masks)
    if not counted.total.any():
        raise DataError('no training mask holds any foreground at this size: look at the masks, --mask-threshold and --size')
    baselines = counted.compute(masks for _, masks in validation.epoch(0))

    # The network, what it minimises, and how.
    rng = numpy.random.default_rng(args.seed)
    model = nervenet.UNet(base_channels=args.base_channels, depth=args.depth, norm=args.norm, dropout=args.dropout,
                          input_mean=input_mean, input_std=input_std, rng=rng).to(device)
    loss = LOSSES[args.loss]()
    optimizer = OPTIMIZERS[args.optimizer](model.parameters(), args.learning_rate)
    steps = args.epochs * len(training)
    warmup = min(steps // 10, len(training))
    schedule = (CosineSchedule(args.learning_rate, steps, warmup) if args.schedule == 'cosine'
                else ConstantSchedule(args.learning_rate, warmup))

    run = RunFolder(args.out, {**vars(args), 'data': args.data and str(args.data), 'out': str(args.out), 'device': device,
                               'nervenet': nervenet.__version__, 'numpy': numpy.__version__,
                               'training_subjects': sorted({sample.subject for sample in training_samples}),
                               'validation_subjects': sorted({sample.subject for sample in validation_samples})})
    print(f'network:     {sum(array.size for array in model.parameters().values()):,} parameters, images of '
          f'{args.size[0]}x{args.size[1]}\nrun folder:  {run.path}\n')

    print_header()
    for name, scores in baselines.items():
        print_scores('', name, {f'validation_{key}': value for key, value in scores.items()}, 'validation')
    for row in fit(model, loss, optimizer, training, validation, args.epochs, run, schedule, args.clip_norm):
        print_scores(f'{row["epoch"]}/{args.epochs}', 'training', row, 'train')
        print_scores('', 'validation', row, 'validation', f'{row["seconds"]:.0f} s, {row["images_per_second"]:.0f} images/s')
        if row['validation_foreground_share'] == 0:
            print('             The network predicts no foreground at all on the validation subjects. If this lasts, it has '
                  'collapsed:\n             try a lower --learning-rate or --loss dice+bce.')

    print('\n' + run.summarize(baselines))
    draw(run, model, validation, baselines)

    # For use: how probabilities become a mask is chosen on the validation subjects, for the last network and for the best one.
    for path in run.last, run.best:
        network, extra = nervenet.load_checkpoint(path)
        settings, score = choose_settings(network.to(device), lambda: validation.epoch(0))
        nervenet.save(path, network, **extra, settings=asdict(settings),
                      mean_training_mask=counted.mean_mask()[:, :, 0].astype('uint8'))
        print(f'{path}: epoch {extra["epoch"]}, threshold {settings.threshold:g}, minimal area {settings.minimal_area:.2%}, flip '
              f'average {"on" if settings.flip_average else "off"}: Dice per image {score:.4f}, flattered, since chosen there')


def draw(run, model, validation, baselines):
    """Draw the curves of the run, and the best, median and worst prediction of its last network on the validation part."""
    figures.save(figures.curves(run.history, baselines=baselines), run.path / 'curves.png')
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
    figures.save(figures.predictions(cases), run.path / 'predictions.png')


def print_header():
    print(f'{"":7} {"":19} {"":>8} {"soft Dice":^15} {"hard Dice":^15} {"IoU":^15}')
    print(f'{"epoch":7} {"part":19} {"loss":>8}' + f' {"pooled":>7} {"image":>7}' * 3 + f' {"accuracy":>8} {"foreground":>10}')


def print_scores(epoch, part, row, prefix, note=''):
    """Print one row of the table; a score that the row does not hold is left blank."""
    cells = [f'{row[f"{prefix}_{name}"]:{width}.{digits}f}' if f'{prefix}_{name}' in row else ' ' * width for name, width, digits in (
        ('loss', 8, 4), ('soft_dice_pooled', 7, 3), ('soft_dice_per_image', 7, 3), ('dice_pooled', 7, 3), ('dice_per_image', 7, 3),
        ('iou_pooled', 7, 3), ('iou_per_image', 7, 3), ('accuracy', 8, 4))]
    print(f'{epoch:7} {part:19} {" ".join(cells)} {row[f"{prefix}_foreground_share"]:10.2%}  {note}'.rstrip(), flush=True)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the default of each option that has one."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0], formatter_class=HelpFormatter)
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
    network = parser.add_argument_group('network')
    network.add_argument('--base-channels', type=whole, default=16, metavar='N', help='channels of the first level; they double at each')
    network.add_argument('--depth', type=whole, default=4, metavar='N', help='how often the image is halved')
    network.add_argument('--norm', choices=['batch', 'none'], default='batch', help='normalisation after each convolution')
    network.add_argument('--dropout', type=float, default=0.0, metavar='P', help='probability of dropping a value at the bottom')
    training = parser.add_argument_group('training')
    training.add_argument('--loss', choices=LOSSES, default='dice+bce', help='what is minimised')
    training.add_argument('--optimizer', choices=OPTIMIZERS, default='adam', help='how')
    training.add_argument('--learning-rate', type=positive, default=1e-3, metavar='RATE', help='highest learning rate')
    training.add_argument('--schedule', choices=['cosine', 'constant'], default='cosine', help='course of the learning rate, after a warm-up')
    training.add_argument('--clip-norm', type=positive, default=None, metavar='NORM', help='bound on the norm of the gradient')
    training.add_argument('--batch-size', type=whole, default=8, metavar='N', help='images per step')
    training.add_argument('--epochs', type=whole, default=8, metavar='N', help='how often every training image is seen')
    training.add_argument('--seed', type=seed, default=0, metavar='N', help='of the split, the weights and the order of the images')
    training.add_argument('--device', choices=['auto', 'gpu', 'cpu'], default='auto', help='where to compute')
    training.add_argument('--out', type=Path, metavar='RUN', default=None, help='run folder; default: runs/ and the date and time')
    args = parser.parse_args(arguments)

    args.norm = None if args.norm == 'none' else args.norm
    args.out = args.out or Path('runs', f'{datetime.datetime.now():%Y-%m-%d_%H-%M-%S}')
    if args.depth > 12:
        parser.error(f'--depth is {args.depth}; expected at most 12: each level halves the image')
    multiple = 2**args.depth
    rounded = tuple(math.ceil(length / multiple) * multiple for length in args.size)
    if rounded != args.size:
        print(f'size: {args.size[0]}x{args.size[1]} becomes {rounded[0]}x{rounded[1]}, a multiple of 2^depth = {multiple}')
        args.size = rounded
    return args


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
    except MemoryError as error:
        sys.exit(f'train_unet.py: not enough memory: lower --size, --base-channels or --batch-size ({error})')
    except (ValueError, RuntimeError, OSError, ArithmeticError) as error:
        sys.exit(f'train_unet.py: {error}')
