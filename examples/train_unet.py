"""Train a U-Net, or another network, to find nerves in ultrasound images.

    python examples/train_unet.py                           on synthetic ultrasound, made as it goes
    python examples/train_unet.py --data DIR                on scans of your own
    python examples/train_unet.py --data DIR --folds 5      every subject is validated once, by one of five networks
    python examples/train_unet.py --resume RUN              goes on with what was stopped or killed, bit for bit
    python examples/train_unet.py --resume RUN --epochs N   trains on what has come to its end, up to epoch N
    python examples/train_unet.py --data DIR --init MODEL   starts from the network in a file
    python examples/train_unet.py --model NAME              another network: resunet, resnet, refinenet, optimised-resunet

DIR holds pairs {subject}_{image}.tif and {subject}_{image}_mask.tif, or a folder train/ that does, or folders images/ and masks/
with equal file names. Whole subjects are set aside for validation, because neighbouring frames of one subject are near copies. All
that comes out lies in the run folder:

    config.json    every setting, the split and the versions: what it takes to repeat the run
    history.csv    one row per epoch
    last.npz       the network after the last epoch: what is reported
    best.npz       the network of the best epoch on the inner subjects (--inner-share), else on the validation subjects
    settings.json  how probabilities become a mask, where that was chosen, and what it scores
    summary.txt    the scores of the last epoch beside the baselines
    curves.png, predictions.png    the same to look at
    learning.gif   what the network made of a few validation images after each epoch
    validation.csv what the last network scores on each validation image
    report.html    all of it in one file, for any browser

A cross-validation has such a folder for each fold, fold_1, fold_2, …, beside split.json, summary.txt and curves.png of all.
`--fold 2` trains one fold only, so several processes with the same --out can train side by side, and goes on where one was killed. And

    mpiexec -n 4 python examples/train_unet.py ...

trains one network with four processes, on one machine or several that see the same folders: see nervenet/engine/communicator.py.
"""

import sys

import numpy

import nervenet
from nervenet.engine.backend import select_device
from nervenet.engine.communicator import current, together
from nervenet.engine.parallel import number_of_threads
from nervenet.images.augment import median_filter
from nervenet.images.data import Filtered, Loader, data_warning, holds_foreground, intensity_statistics
from nervenet.images.samples import DataError, on_both_sides, own_subjects, refuse_common_files, split_by_subject
from nervenet.images.phantom import Phantom
from nervenet.metrics import Baselines
from nervenet.networks import NETWORKS
from nervenet.optim import ConstantSchedule, CosineSchedule
from nervenet.study.claims import claimed
from nervenet.study.fit import Interrupted, PlateauSchedule, WeightAverage, fit, seconds_of, stopping_on_signals
from nervenet.study.kfold import (BY_IMAGE, BY_SUBJECT, CrossValidation, each_image_alone, folds_by_subject, read_split, sides, write_split)
from nervenet.study.options import (LOSSES, OPTIMIZERS, architecture, augmentation, check_memory, default_epochs, describe_need,
                                    options_to_store, parse, share_of)
from nervenet.study.page import write_page
from nervenet.study.pictures import draw_learning, draw_run, one_of_each_subject, preview_augmentation
from nervenet.study.report import caveat, in_words, print_epoch, print_header, print_scores, print_whatever_comes, without_foreground
from nervenet.study.run_folder import RunFolder, read_config, room_for_results, seen_before
from nervenet.study.scans import found, noted, open_reader, subjects_by


def main(arguments=None):
    processes = current()
    if len({*processes.gather(tuple(arguments or sys.argv[1:]))}) > 1:
        raise ValueError('the processes were started together, and with different options; to train folds side by side, start each by itself')
    args = processes.from_first(lambda: parse(arguments))
    args.device, args.precision, reason = select_device(args.device, args.precision)
    processes.use_device(args.device)
    print(f'nervenet {nervenet.__version__}, {reason}')
    if processes.size > 1:
        print(f'processes:   {processes.size}, which train one network; this one uses {number_of_threads()} threads')
    stored = processes.from_first(lambda: read_config(args.resume) if args.resume else {})
    before = stored.get('device', args.device), stored.get('precision') or args.precision
    if before != (args.device, args.precision):
        print(f'So far the run was computed on the {before[0]} in {before[1]}, now it is on the {args.device} in '
              f'{args.precision}, which rounds otherwise: not bit for bit.')
    check_memory(args, processes)

    if args.data is None:
        reader = Phantom(subjects=200, frames=5, seed=args.seed, size=args.size)
        samples = reader.samples
        print('data:        synthetic ultrasound; give --data DIR for scans')
    else:
        reader = open_reader(args)
        if args.resume and not args.data.exists():
            raise DataError(f'{args.data}: no such folder; if the images lie elsewhere now: --resume {args.resume} --data DIR')
        samples = found(args, args.data, args.masks, 'found')
    args.epochs = args.epochs or default_epochs(args, len(samples))
    if args.median_filter:
        reader = Filtered(reader, lambda image: median_filter(image, args.median_filter))
    test = found(args, args.test, args.test_masks, 'test part') if args.test else []
    if test:
        refuse_common_files(samples, test)
    note = '\n'.join(filter(None, [caveat(samples, args.leaky_split_by_image, subjects_by(args)), on_both_sides(samples, test)]))
    if note:
        print(note)
    if args.leaky_split_by_image:
        samples = each_image_alone(samples)

    if args.preview_augmentation:
        processes.from_first(lambda: preview_augmentation(args.preview_augmentation, augmentation(args), samples, reader, args.seed))
        return
    # Whatever can be refused is refused before the images are read: options, folders and names are known by now.
    with room_for_results(args.out, joins=bool(args.resume or args.folds)) as args.out:
        if args.folds:
            cross_validate(args, samples, reader, note)
        elif test:
            print('reading:     all images once', flush=True)
            test = own_subjects(test)
            holds_foreground(samples + test, reader)
            train(args, args.out, reader, samples, test, noted(args, samples + test, reader, note))
        elif not args.validation_share:
            print('reading:     all images once', flush=True)
            holds_foreground(samples, reader)
            train(args, args.out, reader, samples, [], noted(args, samples, reader, note))
        else:
            split_by_subject(samples, args.validation_share, args.seed)         # refuses too few subjects
            print('reading:     all images once', flush=True)
            positive = holds_foreground(samples, reader)
            two_sides = split_by_subject(samples, args.validation_share, args.seed, positive, 2 if args.inner_share else 1)
            train(args, args.out, reader, *two_sides, noted(args, samples, reader, note))


def cross_validate(args, samples, reader, note):
    """Train the folds that are not complete yet, or the one that --fold names, and summarise those that are, `note` first."""
    by, processes = BY_IMAGE if args.leaky_split_by_image else BY_SUBJECT, current()
    if args.split and not args.resume:
        given = read_split(args.split, samples, args.folds, by)
    elif not args.resume:                                   # when a run goes on, the split is in its folder
        folds_by_subject(samples, numpy.zeros(len(samples)), args.folds, args.seed)             # refuses too few subjects

    def deal(path):
        print('reading:     all images once', flush=True)
        positive = holds_foreground(samples, reader)
        folds = given if args.split else folds_by_subject(samples, positive, args.folds, args.seed)
        write_split(path, samples, positive, folds, by)

    whole = processes.from_first(lambda: CrossValidation(
        args.out, options_to_store(args), deal, join=bool(args.resume or args.fold),
        read=lambda path: read_split(path, samples, args.folds, by), more_epochs=bool(args.resume)))
    note = noted(args, samples, reader, note)
    for number in [args.fold] if args.fold else range(1, args.folds + 1):
        is_complete = processes.from_first(lambda: whole.is_complete(number))
        print(f'\nFold {number} of {args.folds}' + (' is complete' if is_complete else ''))
        if not is_complete:
            try:
                train(args, whole.fold(number), reader, *sides(samples, whole.folds, number), note, fold=number)
            except BlockingIOError as error:                # the other folds may be free
                if args.fold:
                    raise
                print(f'skipped: {error}')

    def finish():
        text = whole.summarize(args.folds, note)
        print('\n' + (text or 'No fold is complete yet.'))
        if text:
            with claimed(args.out):                         # other processes may have come to their end too
                write_page(args.out, text.partition('\n\n')[0], [whole.fold(number) for number in whole.complete(args.folds)])

    processes.from_first(finish)


def train(args, path, reader, training_samples, validation_samples, note, fold=None):
    """Train one network in the run folder `path`, or go on with it, and write down what came out, `note` first."""
    parts, processes = {'training': training_samples} | ({'validation': validation_samples} if validation_samples else {}), current()
    if args.inner_share:
        positive = holds_foreground(training_samples, reader)
        parts['training'], parts['inner'] = split_by_subject(training_samples, args.inner_share, args.seed, positive)
    for part, chosen in parts.items():
        number = len({sample.subject for sample in chosen})
        subjects = '' if args.leaky_split_by_image else f' of {number} subject{"s" if number > 1 else ""}'
        print(f'{part + ":":12} {len(chosen)} images{subjects}')
    warnings = [without_foreground(part, chosen) for part, chosen in parts.items()
                if part != 'training' and not holds_foreground(chosen, reader).any()]
    if args.init:
        warnings += seen_before(args, parts)

    # Intensities and baselines are measured on the training part only, as it is: in order, and not augmented.
    input_mean, input_std = intensity_statistics(parts['training'], reader)
    warnings += filter(None, [data_warning(training_samples + validation_samples, reader, input_mean, input_std)])
    share = holds_foreground(parts['training'], reader).mean()
    if share < 0.5 and args.loss == 'dice-per-image+bce':
        warnings.append(f'Only {share:.0%} of the training images hold foreground: --loss dice+bce may give fewer false alarms.')
    for warning in warnings:
        print(warning)
    in_order = {part: Loader(chosen, reader, args.batch_size) for part, chosen in parts.items()}
    validation, inner = in_order.get('validation'), in_order.get('inner')
    training = Loader(parts['training'], reader, args.batch_size, seed=args.seed, shuffle=True,
                      positive_share=args.foreground_share, transform=augmentation(args), device=args.device, rows=processes.rows)
    # What the network is scored on after each epoch goes where it computes; baselines, choices and pictures are made here.
    scored = {part: Loader(chosen, reader, args.batch_size, device=args.device, rows=processes.rows) for part, chosen in parts.items()
              if part != 'training'}
    counted = Baselines()
    for _, masks in in_order['training'].epoch(0):
        counted.update(masks)
    if not counted.total.any():
        raise DataError('no training mask holds any foreground at this size: look at the masks, --mask-threshold, --label and --size')
    baselines = counted.compute(masks for _, masks in validation.epoch(0)) if validation else {}

    # The network, what it minimises, and how.
    rng = numpy.random.default_rng(args.seed)
    network = NETWORKS[args.model]
    model = network(**architecture(args), input_mean=input_mean, input_std=input_std, rng=rng).to(args.device)
    loss = LOSSES[args.loss]()
    optimizer = OPTIMIZERS[args.optimizer](model.parameters(), args.learning_rate)
    average = WeightAverage(model, args.average_weights) if args.average_weights else None

    config = {**options_to_store(args), 'fold': fold, 'nervenet': nervenet.__version__, 'numpy': numpy.__version__}
    for part, chosen in parts.items():
        config |= {f'{part}_subjects': sorted({sample.subject for sample in chosen}), f'{part}_images': len(chosen)}
    goes_on = args.resume is not None or args.fold is not None          # a job that is started again goes on
    run = processes.from_first(lambda: RunFolder(path, config | {'baselines': baselines}, resume=goes_on))
    run.restore(model, optimizer, average)
    if args.init and not run.history:
        model.load_state_dict(processes.from_first(lambda: nervenet.load(args.init).state_dict()))
    steps = (args.epochs - run.begun) * len(training)
    warmup = min(steps // 10, len(training))
    schedule = {'cosine': lambda: CosineSchedule(args.learning_rate, steps, warmup),
                'constant': lambda: ConstantSchedule(args.learning_rate, warmup),
                'plateau': lambda: PlateauSchedule(args.learning_rate, run.history, warmup, begun=run.begun)}[args.schedule]()
    print(f'network:     {network.__name__} of {sum(array.size for array in model.parameters().values()):,} parameters, images of '
          f'{args.size[0]}x{args.size[1]}\nrun folder:  {run.path}'
          + (f', going on after epoch {len(run.history)}' if run.history else ''))
    step = min(args.batch_size, len(parts['training']))
    probe = network(**architecture(args), rng=numpy.random.default_rng(0)).to(args.device)
    seconds = seconds_of(probe, LOSSES[args.loss](), OPTIMIZERS[args.optimizer](probe.parameters(), args.learning_rate),
                         (step, *args.size, 1), len(training), sum(len(part.samples) for part in scored.values()))
    del probe                                               # and the memory it takes
    left = args.epochs - len(run.history)
    print(f'plan:        {left} epochs of {len(training)} steps of {step} images, {in_words(left * seconds)} here'
          + ' for each fold' * bool(args.folds) + '\n')
    if run.begun:
        print(f'Epochs {run.begun + 1} to {args.epochs} were added to a run of {run.begun}: they have a schedule of their own and '
              f'an optimizer that began anew, so this is not bit for bit a run of {args.epochs} epochs.\n')

    watched = one_of_each_subject(validation_samples, reader)
    print_header()
    for name, scores in baselines.items():
        print_scores('', name, {f'validation_{key}': value for key, value in scores.items()}, 'validation')
    try:
        with stopping_on_signals() as stop:
            for _ in fit(model, loss, optimizer, training, scored.get('validation'), args.epochs, run, schedule, args.clip_norm,
                         scored.get('inner'), args.patience, stop, watched, average):
                print_epoch(run.history, args.epochs)
    except Interrupted:
        done = len(run.history)
        fold = f' --fold {args.fold}' if args.fold else ''
        raise Interrupted(f'stopped in epoch {done + 1}, which starts anew when you go on; {done} epochs are saved. Go on with:'
                          f'\n    python examples/train_unet.py --resume {args.out}{fold}') from None
    except MemoryError as error:
        needed = describe_need(args, model.training_memory((share_of(args, current()), *args.size, 1)))
        raise MemoryError(f'{needed}, lower --batch-size first ({error})') from error
    if len(run.history) < args.epochs:
        print(f'stopped early: no better epoch on the inner subjects for {args.patience} epochs')

    def finish():
        draw_run(run, average.averaged if average else model, validation, baselines)
        draw_learning(run, validation, watched)
        chosen = run.choose_settings(args.device, validation, inner, counted.mean_mask()[:, :, 0].astype('uint8'))
        said = '\n'.join(filter(None, [note, *warnings]))
        write_page(run.path, said)
        print('\n' + run.summarize(baselines, chosen['last.npz'], said))           # the sign that the run is complete

    processes.from_first(finish)


if __name__ == '__main__':
    print_whatever_comes()
    try:
        with together():
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
