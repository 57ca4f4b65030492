"""The options of `examples/train_unet.py`: what they are, what they default to, and which of them make a run what it is.

Those that all scripts share that predict are in `add_prediction_options`.

`parse` reads the command line. When a run goes on, `stored_options` reads what was stored of it, as if that had been typed.
"""

import argparse
import contextlib
import inspect
import math
from dataclasses import fields, replace
from pathlib import Path

from ..engine.communicator import ALONE
from ..images.augment import FILL_MODES, ULTRASOUND, Augmentation
from ..images.data import FITS
from ..losses import BCEWithLogitsLoss, DiceLoss, WeightedSum
from ..networks import NETWORKS
from ..networks.network import padded_size
from ..optim import SGD, Adam, AdamW
from .checkpoint import CheckpointError, load_checkpoint
from .run_folder import WHERE, check_resumable, read_config, unfinished
from .segment import LARGEST_FILTER, READING

# What the names on the command line stand for.
LOSSES = {'dice': DiceLoss, 'dice-per-image': lambda: DiceLoss(per_image=True), 'bce': BCEWithLogitsLoss,
          'dice+bce': lambda: WeightedSum([(1.0, DiceLoss()), (1.0, BCEWithLogitsLoss())]),
          'dice-per-image+bce': lambda: WeightedSum([(1.0, DiceLoss(per_image=True)), (1.0, BCEWithLogitsLoss())])}
OPTIMIZERS = {'sgd': lambda parameters, rate: SGD(parameters, rate, momentum=0.9, nesterov=True), 'adam': Adam, 'adamw': AdamW}
AUGMENTATIONS = {'none': Augmentation(), 'default': ULTRASOUND}
ARCHITECTURE = 'base_channels', 'depth', 'norm', 'dac', 'rmp'       # options that say what network is built, where it has them
FIT = 'squeeze'                                                      # the default of --fit, by measurement: see README
AVERAGE = 0.1                                                        # the default of --average-weights, near what README measures
STEPS = 3000                                                         # of training by default, on scans
NOT_STORED = 'out', 'resume', 'fold', 'preview_augmentation'          # options that say what to do now, not what the run is


def parse(arguments):
    """Return the options of train_unet.py, an argparse.Namespace: as typed, as stored in the run that is resumed, or by default.

    `arguments` are those of the command line, None for this process's own. What cannot be, or does not go together, ends the
    process with one line, or raises ValueError or FileNotFoundError.
    """
    parser = build_parser()
    defaults, unset = vars(parser.parse_args([])), object()
    given = vars(parser.parse_args(arguments, argparse.Namespace(**dict.fromkeys(defaults, unset))))
    given = {name: value for name, value in given.items() if value is not unset}
    stored = {}
    if 'resume' in given:
        if given.setdefault('out', given['resume']) != given['resume']:
            parser.error(f'--resume {given["resume"]} goes on in that folder, --out is {given["out"]}; leave out --out')
        stored = stored_options(given['resume'])
        check_resumable(given['resume'])
        if given.get('device') == 'auto':
            del given['device']                             # the one that was found at the start
        if given.get('device', stored['device']) != stored['device']:
            stored['precision'] = None                      # that of the other device
    args = argparse.Namespace(**{**defaults, **stored, **given})

    args.norm = None if args.norm == 'none' else args.norm
    for name in 'data', 'masks', 'subjects', 'test', 'test_masks', 'split', 'init':
        path = getattr(args, name)
        setattr(args, name, path and path.resolve())
    check_data(args, given, parser)
    args.what = args.what or ('nerve' if args.data is None else 'foreground')
    args.augment = args.augment or ('none' if args.data is None else 'default')
    args.loss = args.loss or ('dice+bce' if args.data is None else 'dice-per-image+bce')
    args.fit = args.fit or ('squeeze' if args.data is None else FIT)
    if args.init and not args.resume:
        take_architecture(args, given, parser)
    args.depth = args.depth or default_of(args.model, 'depth')
    for name in 'dac', 'rmp':
        if not getattr(args, name) and default_of(args.model, name) is None:
            parser.error(f'--no-{name} has no meaning with --model {args.model}, which has no such part')
    if args.depth > 12:
        parser.error(f'--depth is {args.depth}; expected at most 12: each level halves the image')
    if args.fold and not args.fold <= (args.folds or 0):
        parser.error(f'--fold is {args.fold} and --folds {args.folds or "not given"}; expected --fold from 1 to --folds')
    if args.folds == 1:
        parser.error('--folds is 1; expected 2 or more: one to validate on and the others to train on')
    if args.leaky_split_by_image and not args.validation_share:
        parser.error('--leaky-split-by-image has no meaning with --validation-share 0: nothing is split')
    if args.split and not args.folds:
        parser.error('--split needs --folds, the number of folds in it')
    if args.median_filter and not (3 <= args.median_filter <= LARGEST_FILTER and args.median_filter % 2):
        parser.error(f'--median-filter is {args.median_filter}; expected an odd size from 3 to {LARGEST_FILTER}')
    if args.folds and 'validation_share' in given:
        parser.error('--validation-share has no meaning with --folds: each fold is the validation part once')
    if args.schedule == 'plateau' and not args.inner_share:
        parser.error('--schedule plateau needs --inner-share: to slow down where validation is best would flatter its scores')
    if args.patience and not args.inner_share:
        parser.error('--patience needs --inner-share: to stop where validation is best would flatter its scores')
    augmentation(args)                                      # raises ValueError for what cannot be
    multiple = 2**args.depth
    rounded = padded_size(args.size, multiple)
    if rounded != args.size:
        print(f'size: {args.size[0]}x{args.size[1]} becomes {rounded[0]}x{rounded[1]}, a multiple of 2^depth = {multiple}')
        args.size = rounded
    more_epochs = bool(stored) and (args.epochs or 0) > stored['epochs']
    if more_epochs and (runs := unfinished(args.resume, args.folds)):
        parser.error(f'--epochs is {args.epochs}, but {args.resume / "config.json"} has {stored["epochs"]}, and {runs[0]} has not '
                     f'come to its end; first train it to there: --resume {args.resume}')
    for name in given.keys() & stored.keys() - set(WHERE) - ({'epochs'} if more_epochs else set()):
        if getattr(args, name) != stored[name]:
            parser.error(f'--{name.replace("_", "-")} is {getattr(args, name)}, but {args.resume / "config.json"} has '
                         f'{stored[name]}; leave it out to go on, or start a new run without --resume')
    return args


def check_data(args, given, parser):
    """End the process unless the options that say where the data are, and how they are read, go together."""
    for name in ('masks', 'test', *READING, 'subjects', 'no_mask_is_empty'):
        if args.data is None and getattr(args, name) != parser.get_default(name):
            parser.error(f'--{name.replace("_", "-")} has no meaning without --data: synthetic ultrasound comes with its masks')
    if args.data is None and args.fit not in (None, 'squeeze'):
        parser.error(f'--fit {args.fit} has no meaning without --data: synthetic ultrasound is made at --size')
    if args.test_masks and not args.test:
        parser.error('--test-masks has no meaning without --test')
    if args.test and (args.folds or args.leaky_split_by_image or 'validation_share' in given):
        option = '--folds' if args.folds else '--leaky-split-by-image' if args.leaky_split_by_image else '--validation-share'
        parser.error(f'{option} has no meaning with --test, which is what is validated on')
    if args.label is not None and args.mask_threshold is not None:
        parser.error('--label and --mask-threshold both say what is foreground; give one of them')


def default_epochs(args, images):
    """Return how many epochs to train if nobody says it, on `images` images in all: so many that there are about STEPS steps.

    Small sets need as many steps as others, and so more epochs; from 15 epochs on every image has been seen often enough, after 200
    it is not the number of steps that is lacking. Synthetic ultrasound, of which there is plenty, is learnt in 5.
    """
    if args.data is None:
        return 5
    share = 1 if args.test else 1 - 1 / args.folds if args.folds else 1 - args.validation_share
    steps = math.ceil(images * share * (1 - (args.inner_share or 0)) / args.batch_size)
    return min(max(15, round(STEPS / steps)), 200)


def stored_options(folder):
    """Return the options of the run in `folder`, as `parse` gives them. Raises FileNotFoundError or ValueError."""
    config = read_config(folder)
    if 'chain' in config:
        raise ValueError(f'{folder} is the run of a chain, which is fitted at once: start another with classical.py --out')
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
    read = vars(parser.parse_args(typed))
    return {name: None if config[name] is None else read[name] for name in defaults}


def default_of(model, name):
    """Return the default of an argument of a network, which NETWORKS has under the name `model`; None if it has no such argument."""
    for kind in NETWORKS[model].__mro__:
        parameters = inspect.signature(kind).parameters
        if name in parameters:
            return parameters[name].default
        if '**' not in str(inspect.signature(kind)):
            return None


def architecture(args):
    """Return the arguments of the network that `args` ask for, but for what the images say: `NETWORKS[args.model](**architecture(args))`."""
    names = [name for name in ARCHITECTURE if default_of(args.model, name) is not None]
    return {name: getattr(args, name) for name in [*names, 'dropout']}


def take_architecture(args, given, parser):
    """Set the options that say what network is built to what the network in the file --init is; refuse others that were given."""
    model, _ = load_checkpoint(args.init)
    if (model.in_channels, model.config['out_channels']) != (1, 1):
        raise CheckpointError(f'{args.init}: holds a {type(model).__name__} of other channels; expected a network for grey images '
                              'and one kind of mask, as train_unet.py writes it')
    found = {name: model.config[name] for name in ARCHITECTURE if name in model.config}
    found['model'] = next(name for name, network in NETWORKS.items() if type(model) is network)
    for name, value in found.items():
        asked, option = getattr(args, name), f'--{name.replace("_", "-")}'
        if name in given and asked != value:
            if isinstance(value, bool):
                option = option if asked else f'--no-{name}'
                parser.error(f'{option} is given, but the network in {args.init} has {"that part" if value else "no such part"}; leave out '
                             f'{option}, or train without --init')
            parser.error(f'{option} is {asked or "none"}, but the network in {args.init} has {value or "none"}; leave out {option}, or '
                         'train without --init')
        setattr(args, name, value)


def check_memory(args, processes=ALONE):
    """Raise MemoryError if training as `args` say takes more memory than there is: else the system would end the process."""
    needed, there = training_bytes(args, share_of(args, processes)), available_bytes()
    if there is not None and needed * processes.neighbours > there:
        several = f' in each of {processes.neighbours} processes' if processes.neighbours > 1 else ''
        raise MemoryError(f'{describe_need(args, needed)}{several}, and {there / 2**30:.1f} GiB are free')


def share_of(args, processes):
    """Return how many images of a batch are one process's, at most."""
    return math.ceil(args.batch_size / processes.size)


def training_bytes(args, images):
    """Return about how many bytes of this computer's memory training on so many images at a time takes."""
    pixels = images * math.prod(args.size)
    batches = 4 * 2 * 4 * pixels                            # images and masks, float32: one in use, two ready, one in the making
    deepest = args.base_channels << args.depth
    parameters = 4 * 4 * 30 * deepest**2                    # about, of a U-Net: weights, gradients, Adam's two averages
    if args.device != 'cpu' or parameters > (available_bytes() or 2**36):       # no network of that size is built to ask it
        return batches + parameters * (args.device == 'cpu')
    model = NETWORKS[args.model](**architecture(args))
    return batches + model.training_memory((images, *args.size, 1))


def describe_need(args, needed):
    """Return in words what training as `args` say takes: `needed` bytes."""
    height, width = args.size
    return (f'a training step on {args.batch_size} images of {height}x{width} with --base-channels {args.base_channels} and '
            f'--depth {args.depth} needs about {needed / 2**30:.1f} GiB')


def available_bytes():
    """Return how many bytes this process can still take, swap included and within a container's limit; None if nobody says."""
    try:
        lines = dict(line.split(':') for line in Path('/proc/meminfo').read_text().splitlines())
        there = 1024 * sum(int(lines[name].split()[0]) for name in ('MemAvailable', 'SwapFree'))
    except (OSError, ValueError, LookupError):              # not Linux
        return None
    for limit in '/sys/fs/cgroup/memory.max', '/sys/fs/cgroup/memory/memory.limit_in_bytes':
        with contextlib.suppress(OSError, ValueError):      # no such file, or 'max'
            there = min(there, int(Path(limit).read_text()))
    return there


def options_to_store(args):
    """Return the options that make a run what it is, as config.json holds them."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()
            if name not in NOT_STORED}


def augmentation(args):
    """Return the Augmentation of --augment, with what single options replace in it."""
    single = {field.name: getattr(args, field.name) for field in fields(Augmentation)}
    return replace(AUGMENTATIONS[args.augment], **{name: value for name, value in single.items() if value is not None})


def build_parser():
    """Return the parser of the command line. What an option means is told there once, in its help."""
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description='Train a network to find nerves in ultrasound images.',
                                     formatter_class=HelpFormatter)
    data = parser.add_argument_group('data')
    data.add_argument('--data', '--images', type=Path, metavar='DIR',
                      help='folder of the images, with their masks beside them or in masks/ beside images/, at any depth; default: '
                      'synthetic ultrasound')
    data.add_argument('--size', type=size, default='96x128', metavar='HxW',
                      help='rows x columns the network works at, rounded up to a multiple of 2^depth')
    data.add_argument('--fit', choices=FITS,
                      help='how an image of another shape comes to that size. squeeze: it fills it, each axis scaled by itself; pad: one factor '
                      'scales it so that all of it fits in, with black around it; crop: one factor scales it so that it fills it, and what sticks '
                      f'out is cut off, and background in prediction. default: {FIT}, since on breast images of many shapes pad made no difference (Dice '
                      'per image +0.004 ± 0.011), and crop cut foreground away in 134 of 780 images (−0.012 ± 0.012)')
    add_reading_options(data)
    data.add_argument('--test', type=Path, metavar='DIR',
                      help='folder of images to validate on, where a data set has an official test part; else it is drawn')
    data.add_argument('--test-masks', type=Path, metavar='DIR', help='folder of the masks of --test, as --masks is for --images')
    data.add_argument('--what', metavar='WORD', help='what the masks show, for reports and pictures; default: foreground, of synthetic ultrasound '
                      'nerve')
    data.add_argument('--validation-share', type=share_or_none, default=0.2, metavar='SHARE',
                      help='share of the images set aside for validation, by whole subjects; 0: all are trained on, and nothing is scored, once '
                      'a cross-validation has said what such networks are worth')
    data.add_argument('--inner-share', type=share, metavar='SHARE',
                      help='share of the training images set aside, by whole subjects, to choose on: the best epoch, when to '
                      'stop, how probabilities become a mask; the validation subjects are then only scored')
    data.add_argument('--foreground-share', type=share, metavar='SHARE',
                      help='share of the images drawn in an epoch that hold foreground; some then come twice and others not, and '
                      'an epoch keeps its number of images; default: as they come')
    data.add_argument('--median-filter', type=whole, metavar='SIZE',
                      help='odd size of a median filter against speckle, 3 or more, applied in prediction too')
    folds = parser.add_argument_group('cross-validation')
    folds.add_argument('--folds', type=whole, metavar='N',
                       help='deal the subjects into so many folds, and validate on each in turn')
    folds.add_argument('--fold', type=whole, metavar='K', help='train this fold only')
    folds.add_argument('--split', type=Path, metavar='FILE',
                       help='split.json of another cross-validation, to use the same folds, or one of your own: '
                       '{"folds": [{"subjects": ["1", "2"]}, {"subjects": ["3"]}]}')
    folds.add_argument('--leaky-split-by-image', action='store_true',
                       help='split by image, which LEAKS, to see how much; with or without --folds')
    augmenting = parser.add_argument_group('augmentation', 'Random changes of the training images, named as in Keras; '
                                           'nervenet/images/augment.py says what each means. A single option replaces its value '
                                           'in --augment.')
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
    network.add_argument('--model', choices=NETWORKS, default='unet', help='which network')
    network.add_argument('--base-channels', type=whole, default=16, metavar='N',
                         help='channels of the first level; they double at each')
    network.add_argument('--depth', type=whole, metavar='N',
                         help='how often the image is halved; default: ' + ', '.join(f'{name} {default_of(name, "depth")}' for name in NETWORKS))
    for name, what in ('dac', 'dense atrous convolution'), ('rmp', 'residual multi-kernel pooling'):
        network.add_argument(f'--{name}', action=argparse.BooleanOptionalAction, default=True,
                             help=f'{what}, a part of optimised-resunet, which its authors train with a --median-filter')
    network.add_argument('--norm', choices=['batch', 'none'], default='batch', help='normalisation after each convolution')
    network.add_argument('--dropout', type=share_or_none, default=0.0, metavar='P',
                         help='probability of dropping a value at the bottom')
    network.add_argument('--init', type=Path, metavar='MODEL',
                         help='start from the network in this file, such as best.npz of another run: fine-tuning. It decides '
                         '--model, --base-channels, --depth and --norm; intensities are standardised by the new training images')
    training = parser.add_argument_group('training')
    training.add_argument('--loss', choices=LOSSES,
                          help='what is minimised; default: dice-per-image+bce on scans, dice+bce on synthetic ultrasound, most of which shows '
                          'nothing: Dice of such an image by itself hardly changes with how much is found in it')
    training.add_argument('--optimizer', choices=OPTIMIZERS, default='adam', help='how')
    training.add_argument('--learning-rate', type=positive, default=0.002, metavar='RATE', help='highest learning rate')
    training.add_argument('--schedule', choices=['cosine', 'constant', 'plateau'], default='constant',
                          help='course of the learning rate, after a warm-up; plateau: a fifth each time that the loss of the inner subjects has not '
                          'fallen for 5 epochs')
    training.add_argument('--average-weights', type=half_or_less, default=AVERAGE, metavar='SHARE',
                          help='what is scored and kept is a running mean of the weights, in which late steps count more: on average they are this '
                          'share of the run old; 0: the weights as they are')
    training.add_argument('--clip-norm', type=positive, default=None, metavar='NORM', help='bound on the norm of the gradient')
    training.add_argument('--batch-size', type=whole, default=8, metavar='N', help='images per step')
    training.add_argument('--epochs', type=whole, metavar='N',
                          help='how often as many images as there are for training are drawn; default: on scans as often as it takes for '
                          f'{STEPS} steps, 15 to 200 times; on synthetic ultrasound 5')
    training.add_argument('--patience', type=whole, metavar='N',
                          help='stop after so many epochs without a better one on the inner subjects')
    training.add_argument('--seed', type=natural, default=0, metavar='N',
                          help='of the split, the weights, the order of the images and their augmentation')
    training.add_argument('--device', choices=['auto', 'gpu', 'cpu'], default='auto',
                          help='where to compute; a run may go on elsewhere than it began')
    training.add_argument('--precision', choices=['fp32', 'tf32'],
                          help='of matrix products on a GPU: tf32 reads its factors rounded to 10 bits; default: tf32 where the GPU '
                          'has it')
    training.add_argument('--out', type=Path, metavar='RUN', default=None,
                          help='run folder, new or empty; default: runs/ and the date and time')
    training.add_argument('--resume', type=Path, metavar='RUN',
                          help='go on with the run or the cross-validation in this folder, bit for bit; with more --epochs than '
                          'it had, one that has come to its end is trained on, with a schedule of its own for the new epochs')
    return parser


def add_reading_options(parser, is_stored=False):
    """Add the options that say which files are masks, what in them is foreground, and whom an image shows: READING, and where they are.

    With `is_stored` those of READING have no default: what is not given is what the model file says.
    """
    unset = {'default': argparse.SUPPRESS} if is_stored else {}
    parser.add_argument('--masks', type=Path, metavar='DIR',
                        help='folder of the masks, if they are not beside the images: at the same place below it, called like the image '
                        'or {image}_mask')
    parser.add_argument('--mask-pattern', metavar='PATTERN', **unset,
                        help="what masks are called: '{image}_Annotation', or '{image}_seg*', of which several are joined, or "
                        "'../labels/{image}', or '{image}.png' beside JPEG images")
    parser.add_argument('--mask-threshold', type=positive, metavar='N', **unset,
                        help='count mask values from N up as foreground, for masks with in-between values')
    parser.add_argument('--label', type=label, metavar='N', **unset,
                        help='masks hold numbers of classes: this one is foreground; all: every one but 0 is')
    parser.add_argument('--fill-outlines', action=argparse.BooleanOptionalAction, **unset,
                        help='masks are closed lines: what they enclose is foreground; with --no- the lines are; default: such masks are refused')
    parser.add_argument('--no-mask-is-empty', action='store_true', help='an image without a mask shows no foreground')
    parser.add_argument('--subject-pattern', metavar='REGEX', **unset,
                        help='regular expression on the name of an image, with its folders, whose first group is the subject, such as '
                        '"(.+)_[0-9]+"; default: the first number of {subject}_{image}')
    parser.add_argument('--subject-from', choices=['name', 'folder'], **{'default': 'name', **unset},
                        help='folder: the first folder an image lies in is its subject')
    parser.add_argument('--subjects', type=Path, metavar='FILE.csv', help='table of the subjects, with two columns: image, subject')


def add_prediction_options(parser):
    """Add the options that `segment.open_segmenter` reads, and --white: which network predicts, where, and how masks are made."""
    parser.add_argument('--model', type=Path, nargs='+', required=True, metavar='MODEL', default=argparse.SUPPRESS,
                        help='model file, such as RUN/best.npz; or several, or the folder of a cross-validation: then the mean of all networks predicts')
    parser.add_argument('--white', type=positive, metavar='LEVEL',
                        help='level that is white in the images, such as 4095 for 12 bits in a 16-bit file; default: the highest of the file')
    parser.add_argument('--device', choices=['auto', 'gpu', 'cpu'], default='auto', help='where to compute')
    parser.add_argument('--precision', choices=['fp32', 'tf32'],
                        help='of matrix products on a GPU; default: tf32 where the GPU has it')
    stored = parser.add_argument_group('from probabilities to a mask', 'Each default was chosen on the validation or inner subjects of the '
                                       'training run and is stored in the model file; for several networks from what each made of its validation subjects.')
    stored.add_argument('--threshold', type=float, metavar='P', default=argparse.SUPPRESS,
                        help='a pixel is foreground where its probability is above P')
    stored.add_argument('--minimal-area', type=float, metavar='SHARE', default=argparse.SUPPRESS,
                        help='a mask that covers less than this share of the image, as the network sees it, counts as empty')
    stored.add_argument('--flip-average', action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS,
                        help='average with the prediction of the mirrored image')
    stored.add_argument('--largest-component', action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS,
                        help='keep only the largest connected piece of a mask')
    stored.add_argument('--temperature', type=positive, metavar='T', default=argparse.SUPPRESS,
                        help='what logits are divided by, so that probabilities are what they say: above 1 makes them less sure; the stored threshold is '
                        'one of probabilities at the stored temperature, so give --threshold too')


# --- Types of options

class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the default of each option that has one."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def size(text):
    """Return (H, W) of a text such as 96x128."""
    height, cross, width = text.lower().replace('×', 'x').partition('x')
    if not (cross and height.isdigit() and width.isdigit() and int(height) and int(width)):
        raise argparse.ArgumentTypeError(f'{text!r} is not of the form HxW, rows x columns, such as 96x128')
    return int(height), int(width)


def whole(text):
    """Return the number, from 1 on."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'{text!r} is not a whole number of at least 1')
    return int(text)


def label(text):
    """Return the number of a class, from 1 on, or 'all'."""
    if text != 'all' and not (text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f'{text!r} is not the number of a class, from 1 on, or all')
    return text if text == 'all' else int(text)


def natural(text):
    """Return the number, from 0 on."""
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f'{text!r} is not a whole number of at least 0')
    return int(text)


def positive(text):
    """Return the number, above 0 and finite."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f'{text!r} is not a positive number')
    return number


def share(text):
    """Return the number, between 0 and 1."""
    number = positive(text)
    if number >= 1:
        raise argparse.ArgumentTypeError(f'{text!r} is not a share between 0 and 1')
    return number


def share_or_none(text):
    """Return the number, from 0 up to, not including, 1."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < 1:
        raise argparse.ArgumentTypeError(f'{text!r} is not a number from 0 up to, not including, 1')
    return number


def half_or_less(text):
    """Return the number, from 0 to 0.5."""
    number = share_or_none(text)
    if number > 0.5:
        raise argparse.ArgumentTypeError(f'{text!r} is not a number from 0 to 0.5: beyond, early steps would count more than late ones')
    return number
