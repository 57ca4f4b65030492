"""Find nerves as before deep networks: a graph cut, wavelets and a Gaussian process, with superpixels or without.

    python examples/classical.py                                    on synthetic ultrasound, made as it goes
    python examples/classical.py --data DIR --chain superpixels     on scans of your own, `graph-cut` is the other chain
    python examples/classical.py --data DIR --folds 5 --fold 1      the folds of train_unet.py, or those of --split FILE
    python examples/predict.py --model RUN/chain.npz --input FOLDER-or-FILES --output FOLDER

What the chains are is said in nervenet/classical/chains.py. DIR is read as train_unet.py reads it, and whole subjects are set aside. The
run folder holds config.json, chain.npz (the fitted chain, for predict.py), summary.txt, validation.csv (Dice of each image), and cases.png:
of the best, the median and the worst image each step. A cross-validation has such a folder for each fold.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import numpy

import nervenet
import nervenet.files
from nervenet.classical.chains import CLASSIFIERS, KINDS, Chain, inner_split
from nervenet.classical.gaussian_process import evidence
from nervenet.classical.superpixels import means, slic
from nervenet.classical.wavelets import TRANSFORMS, feature_names
from nervenet.engine.communicator import refuse_company
from nervenet.images.augment import median_filter
from nervenet.images.data import FITS, data_warning, holds_foreground, intensity_statistics
from nervenet.images.phantom import Phantom
from nervenet.images.samples import split_by_subject
from nervenet.metrics import Baselines, SegmentationScores
from nervenet.study import figures
from nervenet.study.kfold import CrossValidation, folds_by_subject, read_split, sides, write_split
from nervenet.study.options import HelpFormatter, add_reading_options, check_data, natural, options_to_store, share, size, whole
from nervenet.study.pictures import write_cases
from nervenet.study.report import caveat, print_whatever_comes, progress, without_foreground
from nervenet.study.run_folder import RunFolder, room_for_results
from nervenet.study.scans import found, noted, open_reader, subjects_by
from nervenet.study.segment import reading_of

try:
    import resource
except ImportError:                                         # on Windows there is none
    resource = None

CONFIG = Chain().config                                     # as it is by default
STEPS = 'region', 'parts', 'probability', 'mask'
SHOWN = {'mean of horizontal 1': 'fine detail across', 'mean of vertical 2': 'coarser, down', 'mean of coarse': 'shade'}        # of the features


def main(arguments=None):
    refuse_company()
    args = parse(arguments)
    if args.data is None:
        reader = Phantom(subjects=40, frames=4, seed=args.seed, size=args.size)
        samples = reader.samples
        print('data:        synthetic ultrasound; give --data DIR for scans')
    else:
        reader, samples = open_reader(args), found(args, args.data, args.masks, 'found')
    note = caveat(samples, False, subjects_by(args))
    given = read_split(args.split, samples, args.folds) if args.split else None
    if args.folds and not given:                            # refuse too few subjects before anything is read
        folds_by_subject(samples, numpy.zeros(len(samples)), args.folds, args.seed)
    elif not args.folds:
        split_by_subject(samples, args.validation_share, args.seed)
    if args.out and not args.fold:
        fresh(args.out)
    with room_for_results(args.out, joins=bool(args.folds)) as args.out:
        print('reading:     all images once', flush=True)
        positive = holds_foreground(samples, reader)
        if note:
            print(note)
        note = noted(args, samples, reader, note)
        if not args.folds:
            run(args, args.out, reader, *split_by_subject(samples, args.validation_share, args.seed, positive), note)
            return

        def deal(path):
            write_split(path, samples, positive, given or folds_by_subject(samples, positive, args.folds, args.seed))
        whole = CrossValidation(args.out, options_to_store(args), deal, join=bool(args.fold),
                                read=lambda path: read_split(path, samples, args.folds))
        for number in [args.fold] if args.fold else range(1, args.folds + 1):
            print(f'\nFold {number} of {args.folds}')
            run(args, whole.fold(number), reader, *sides(samples, whole.folds, number), note)
        summarise(whole, args.folds)


def fresh(path):
    """Raise FileExistsError if something lies in the folder `path`. A chain is fitted in one go: there is no run to take up again."""
    nervenet.files.refuse_content(path, '--out', or_else=', or remove what is there')


def run(args, path, reader, training, validation, note):
    """Fit a chain on the training samples, score it on the validation samples, and write all into the folder `path`."""
    fresh(path)
    learnt = some_of_each_subject(training, args.images_per_subject)
    images, masks = map(numpy.stack, zip(*(read(reader, sample) for sample in learnt)))
    subjects = numpy.array([sample.subject for sample in learnt])
    inner_split(masks, subjects, args.seed)                 # refuses what nothing can be chosen on, before there is a folder
    folder = RunFolder(path, {**options_to_store(args), 'nervenet': nervenet.__version__, 'numpy': numpy.__version__, **{
        f'{part}_subjects': sorted({sample.subject for sample in chosen}) for part, chosen in (('training', training), ('validation', validation))}})
    counted = Baselines()
    for sample in training:
        counted.update(read(reader, sample)[1][None, ..., None])
    statistics = intensity_statistics(training, reader)
    warnings = [data_warning(training + validation, reader, *statistics)]
    warnings += [without_foreground('validation', validation)] if not holds_foreground(validation, reader).any() else []
    note = '\n'.join(filter(None, [note, *warnings]))
    for warning in filter(None, warnings):
        print(warning)
    lines = [f'{args.chain} chain, {len(training)} training images, of which {len(learnt)} are learnt from, {len(validation)} validation images']
    print(lines[0])

    def tell(line):
        lines.append(line)
        print(line, flush=True)
    chain = Chain(kind=args.chain, size=args.size, fit=args.fit, wavelet=args.wavelet, position=args.position, classifier=args.classifier,
                  step=args.step, examples=args.examples)
    began = time.process_time()
    chain.fit_region(images, masks, subjects, args.seed, tell)
    tell(f'             {time.process_time() - began:.0f} s of computing')
    tell(ceilings(chain, reader, some_of_each_subject(validation, args.images_per_subject)))
    began = time.process_time()
    chain.fit_classifier(images, masks, subjects, args.seed, tell)
    tell(f'             {time.process_time() - began:.0f} s of computing{memory()}')
    if args.classifier == 'gp':
        tell(growth(chain.classifier))
    del images, masks
    known = {} if args.data is None else {name: folder.config[name] for name in ('training_subjects', 'validation_subjects')}
    nervenet.save(path / 'chain.npz', chain, reading=reading_of(vars(args)), what=args.what, intensity=statistics,
                  mean_training_mask=counted.mean_mask()[:, :, 0].astype('uint8'), **known)

    scores, seconds = SegmentationScores(), dict.fromkeys(STEPS, 0.0)
    for sample in progress(validation, len(validation), 'scoring', unit='images'):
        image, truth = read(reader, sample)
        scores.update(steps(chain, image, seconds)[-1][None, ..., None], truth[None, ..., None])
    tell('seconds:     ' + ', '.join(f'{name} {total / len(validation):.3f}' for name, total in seconds.items()) + ' of computing per image')
    results = {args.chain: table_row(scores)}
    for name, mask in ('empty mask', numpy.zeros(args.size)), ('mean training mask', counted.mean_mask()[..., 0]):
        baseline = SegmentationScores()
        for sample in validation:
            baseline.update(mask[None, ..., None] > 0, read(reader, sample)[1][None, ..., None])
        results[name] = table_row(baseline)
    text = table('Scores on validation subjects', [results])
    print('\n' + text)
    draw(chain, reader, validation, scores, path / 'cases.png')
    write_cases(folder, validation, scores)
    folder.write('scores.json', json.dumps(results, indent=2) + '\n')
    folder.write('summary.txt', '\n\n'.join(filter(None, [note, '\n'.join(lines), text])))         # the sign that the run is complete


def read(reader, sample):
    """Return (image float32 in [0, 1], mask bool), (H, W) each."""
    image, mask = reader.read(sample)
    return image.astype(numpy.float32) / 65535, mask > 0


def some_of_each_subject(samples, most):
    """Return at most so many samples of each subject, from all over its frames."""
    by_subject = {}
    for sample in samples:
        by_subject.setdefault(sample.subject, []).append(sample)
    return [those[n] for those in by_subject.values() for n in sorted({*numpy.linspace(0, len(those) - 1, min(most, len(those))).astype(int)})]


def memory():
    """Return in words the most memory that the process has taken so far; '' where the system does not tell."""
    if resource is None:
        return ''
    unit = 2**30 if sys.platform == 'darwin' else 2**20                         # bytes there, KiB elsewhere
    return f', {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit:.1f} GiB at most'


def growth(gp):
    """Return in words how long one step of `GaussianProcess.fit` takes with a quarter of the examples, with half and with all of them."""
    said = []
    for every in 4, 2, 1:
        x, target, seconds = gp.known[::every], gp.target[::every], []
        for _ in range(3):
            began = time.process_time()
            evidence(x, target, numpy.array([math.log(gp.variance)]), numpy.zeros(x.shape[1]))
            seconds.append(time.process_time() - began)
        said.append(f'{len(x)} examples {min(seconds):.3f} s')
    return f'             one step of the fit of the Gaussian process: {", ".join(said)}'


def ceilings(chain, reader, validation):
    """Return in words what can be had at best: foreground within the region, and Dice of superpixels that all have the right class."""
    counts = []
    for sample in progress(validation, len(validation), 'region', unit='images'):
        image, truth = read(reader, sample)
        region, labels = chain.region(image), slic(median_filter(image, 3), chain.config['step'])
        perfect = (means(truth, labels) >= 0.5)[labels]
        found = perfect & (means(region, labels) >= 0.5)[labels]
        counts.append([region.mean(), (region & truth).sum(), truth.sum(), (perfect & truth).sum(), perfect.sum(), (found & truth).sum(), found.sum()])
    area, inside, true, overlap, all_of_them, overlap_found, in_region = numpy.sum(counts, axis=0)
    return (f'ceiling:     on {len(counts)} images of unseen subjects the region holds {inside / max(1, true):.1%} of the foreground, and is '
            f'{area / len(counts):.1%} of an image;\n             perfect labels of superpixels: Dice {2 * overlap / max(1, all_of_them + true):.3f}, '
            f'of those in the region {2 * overlap_found / max(1, in_region + true):.3f}')


def steps(chain, image, seconds=None):
    """Return (region, parts, probability, mask) of an image; add to {step: seconds} how long each was computed."""
    seconds, found = {} if seconds is None else seconds, []
    for name, work in zip(STEPS, (lambda: chain.region(image), lambda: chain.parts(image, found[0]), lambda: chain.probability(found[1], found[0]),
                                  lambda: chain.mask(image, found[1], found[2]))):
        began = time.process_time()
        found.append(work())
        seconds[name] = seconds.get(name, 0) + time.process_time() - began
    return found


def table_row(scores):
    """Return the scores that are shown, a dict; the geometric mean is that of sensitivity and specificity, of all pixels together."""
    row, (_, _, overlap, predicted, true, pixels) = scores.compute(), scores.per_image_counts().sum(axis=(1, 2))
    negative = pixels - true
    geometric = (overlap / max(1, true) * (negative - predicted + overlap) / max(1, negative))**0.5
    return {'dice_pooled': row['dice_pooled'], 'dice_per_image': row['dice_per_image'], 'accuracy': row['accuracy'], 'geometric_mean': float(geometric)}


def table(title, results):
    """Return a table of the means of `results`, {name: row} for each fold."""
    lines = [f'{title:30} {"Dice pooled":>11} {"per image":>10} {"accuracy":>9} {"√(sens·spec)":>13}']
    for name in results[0]:
        values = [numpy.mean([each[name][score] for each in results]) for score in results[0][name]]
        lines.append(f'{name:30} {values[0]:11.3f} {values[1]:10.3f} {values[2]:9.4f} {values[3]:13.3f}')
    return '\n'.join(lines) + '\n'


def summarise(whole, folds):
    """Write and print the mean scores of all folds that are complete."""
    complete = whole.complete(folds)
    text = table(f'{len(complete)} of {folds} folds, mean', [json.loads((whole.fold(number) / 'scores.json').read_text()) for number in complete])
    with nervenet.files.atomic_write(whole.path / 'summary.txt') as file:
        file.write(text.encode())
    print('\n' + text)


def draw(chain, reader, validation, scores, path):
    """Draw every step on the best, the median and the worst image with foreground, or with none if none has any."""
    truths = [read(reader, sample)[1].any() for sample in validation]
    chosen = numpy.flatnonzero(truths) if any(truths) else numpy.arange(len(truths))
    rows, titles, dice = [], [], scores.dice_of_images()
    for label, place in figures.best_median_worst(dice[chosen]):
        sample = validation[chosen[place]]
        image, truth = read(reader, sample)
        region, parts, p, mask = steps(chain, image)
        size, edge = figures.display_size(image.shape, 256), numpy.zeros(image.shape, bool)
        for axis in 0, 1:
            edge |= numpy.diff(parts.labels, axis=axis, append=parts.labels.take([-1], axis)) != 0
        row = [figures.overlay(image, numpy.zeros_like(mask), truth, size), figures.overlay(image, region, truth, size),
               figures.picture(numpy.where(edge, 1, image), size)]
        for name in SHOWN:
            values = parts.features[:, feature_names().index(name) + (chain.config['kind'] == 'superpixels')]     # after the area
            low, high = numpy.quantile(values, (0.02, 0.95)) if len(values) else (0, 1)
            row.append(figures.picture(numpy.append(((values - low) / (high - low or 1)).clip(0.1, 1), 0)[parts.labels], size))
        # A heat map shows the square root.
        rows.append([*row, figures.heat(image, p**2, size, largest=1), figures.overlay(image, mask, truth, size)])
        titles.append(f'{label} · {sample.name} · Dice {dice[chosen[place]]:.3f}')
    columns = ['image and truth', 'region to look in', 'superpixels' if chain.config['kind'] == 'superpixels' else 'points, 4 pixels apart',
               *SHOWN.values(), 'probability', 'mask and truth']
    figures.save(figures.grid(rows, row_titles=titles, column_titles=columns, title=f'{chain.config["kind"]} chain'), path)


def parse(arguments):
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__.split('\n')[0], formatter_class=HelpFormatter)
    data, folds, chain = (parser.add_argument_group(name) for name in ('data', 'cross-validation', 'chain'))
    data.add_argument('--data', '--images', type=Path, metavar='DIR', help='folder of images and masks, as for train_unet.py; default: synthetic ultrasound')
    data.add_argument('--size', type=size, default='192x256', metavar='HxW', help='rows x columns at which images are looked at, even numbers')
    data.add_argument('--fit', choices=FITS, help='how an image of another shape comes to that size; default: squeeze')
    add_reading_options(data)
    data.add_argument('--what', metavar='WORD', help='what the masks show; default: foreground, of synthetic ultrasound nerve')
    data.add_argument('--validation-share', type=share, default=0.2, metavar='SHARE', help='share of the images set aside, by whole subjects')
    data.add_argument('--images-per-subject', type=whole, default=12, metavar='N', help='how many training images of each subject are learnt from, at most, and '
                      'how many validation images the ceilings are measured on; all of them are scored')
    folds.add_argument('--folds', type=whole, metavar='N', help='deal the subjects into so many folds, and validate on each in turn')
    folds.add_argument('--fold', type=whole, metavar='K', help='this fold only')
    folds.add_argument('--split', type=Path, metavar='FILE', help='split.json of another cross-validation, such as that of a network')
    chain.add_argument('--chain', choices=KINDS, default='superpixels', help='which of the two')
    chain.add_argument('--wavelet', choices=TRANSFORMS, default=CONFIG['wavelet'], help='what texture is described by; haar is the linear one')
    chain.add_argument('--position', action=argparse.BooleanOptionalAction, default=True, help='whether row and column are among the features')
    chain.add_argument('--classifier', choices=CLASSIFIERS, default='gp', help='Gaussian process, or logistic regression as a control')
    chain.add_argument('--step', type=whole, default=CONFIG['step'], metavar='N', help='width of a superpixel in pixels')
    chain.add_argument('--examples', type=whole, metavar='N', help='parts that the classifier learns from; the time grows as their third power; '
                       f'default: {CONFIG["examples"]}, on synthetic ultrasound 400')
    parser.add_argument('--seed', type=natural, default=0, metavar='N', help='of the split and of the choice of examples')
    parser.add_argument('--out', type=Path, metavar='RUN', help='run folder, new or empty; default: runs/ and the date and time')
    parser.set_defaults(resume=None, test=None, test_masks=None, leaky_split_by_image=False, preview_augmentation=None)
    args = parser.parse_args(arguments)
    check_data(args, {}, parser)
    args.fit, args.what = args.fit or 'squeeze', args.what or ('nerve' if args.data is None else 'foreground')
    args.examples = args.examples or (400 if args.data is None else CONFIG['examples'])
    for name in 'data', 'masks', 'subjects', 'split':
        path = getattr(args, name)
        setattr(args, name, path and path.resolve())
    if args.fold and not args.fold <= (args.folds or 0):
        parser.error(f'--fold is {args.fold} and --folds {args.folds or "not given"}; expected --fold from 1 to --folds')
    if args.folds and args.validation_share != parser.get_default('validation_share'):
        parser.error('--validation-share has no meaning with --folds: each fold is the validation part once')
    if args.folds == 1 or args.split and not args.folds:
        parser.error('--folds is 1; expected 2 or more' if args.folds else '--split needs --folds, the number of folds in it')
    Chain(size=args.size, step=args.step, examples=args.examples)           # raises ValueError for what cannot be
    return args


if __name__ == '__main__':
    print_whatever_comes()
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, RuntimeError, OSError, MemoryError, ArithmeticError) as error:
        sys.exit(f'classical.py: {error}')
