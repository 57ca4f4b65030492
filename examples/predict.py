"""Find nerves in images of any size with a trained network.

    python examples/predict.py --model RUN/best.npz --input FOLDER-or-FILES --output FOLDER

Writes into the output folder, for each image, {name}_mask.png (0 and 255, at the image's own size) and {name}_overlay.png (the
prediction in orange; in blue the mask, where one is there to compare with), and for all of them results.csv: area, centroid,
confidence, and Dice where there is a mask.
"""

import argparse
import csv
import io
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy
from PIL import Image

from nervenet.study import figures
from nervenet.engine.backend import select_device
from nervenet.files import atomic_write, make_folder, refuse_content
from nervenet.images.data import mask_oddity, oddity_warning, read_ahead, read_image, read_mask_of, resize_mask, white_of
from nervenet.images.samples import DataError, find_samples
from nervenet.metrics import SegmentationScores
from nervenet.study.segment import Segmenter, describe
from nervenet.study.submission import TEST_HEADER, encode, write_submission
from nervenet.study.options import positive
from nervenet.study.report import print_whatever_comes, progress

CLEAR_LINE = '\r\x1b[K'               # a progress bar may stand there
COLUMNS = 'image', 'area', 'share', 'row', 'column', 'confidence', 'dice'


def main(arguments=None):
    args = parse(arguments)
    device, _, reason = select_device(args.device, args.precision)
    segmenter, extra = Segmenter.from_file(args.model, **args.settings)
    segmenter.model.to(device)
    settings = segmenter.settings
    print(f'{reason}\nmodel:    {args.model}, epoch {extra.get("epoch", "?")}, {extra["size"][0]}x{extra["size"][1]}\nsettings: '
          + ', '.join(f'{name} {value}' for name, value in asdict(settings).items()))

    samples = find_samples(args.input, masks='optional', tell=print)
    names = [sample.name for sample in samples]
    twice = next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None
    if twice:
        raise DataError(f'{twice}: two images of this name would have one output; predict them into two folders')
    if args.submission and args.submission.resolve() == args.output.resolve():
        raise DataError(f'{args.submission}: is the folder of --output too; choose another --submission')
    if args.submission and args.submission.exists():
        raise DataError(f'{args.submission}: exists already; choose another --submission')
    refuse_content(args.output, '--output')               # its masks would mix with those of another model
    make_folder(args.output, '--output')
    if args.submission:
        make_folder(args.submission.absolute().parent, '--submission')

    results, judged, failed, runs, odd_images, odd_masks = [], [], [], [], [], []
    scores = {name: SegmentationScores() for name in ('network', 'empty mask', 'mean training mask')}
    batches = [samples[start:start + args.batch_size] for start in range(0, len(samples), args.batch_size)]
    read = partial(read_batch, mask_threshold=args.mask_threshold, white=args.white)
    for batch in progress(read_ahead(read, batches), len(batches), 'predicting'):
        for sample, image, _, error in batch:
            if error:
                failed.append(sample.name)
                what = 'skipped' if image is None else 'predicted, but not scored'
                print(f'{CLEAR_LINE if sys.stderr.isatty() else ""}{what}: {error}', file=sys.stderr)
        good = [(sample, image, truth) for sample, image, truth, _ in batch if image is not None]
        probabilities = segmenter.probabilities([image for _, image, _ in good]) if good else []
        for (sample, image, truth), probability in zip(good, probabilities):
            mask = settings.mask(probability)
            result = {'image': sample.name, **describe(mask, probability), 'dice': ''}
            odd_images.append((sample, segmenter.oddity(image)))
            if truth is not None:
                odd_masks.append((sample.mask_path.name, mask_oddity(sample, truth)))
                count(scores, mask, truth, extra)
                judged.append(result)
            results.append(result)
            runs.append((sample.name, encode(mask)))
            figures.save(Image.fromarray(255 * mask.astype('uint8')), args.output / f'{sample.name}_mask.png')
            if args.overlays:
                figures.save(figures.overlay(image, mask, truth, size=image.shape), args.output / f'{sample.name}_overlay.png')

    if judged:
        for result, dice in zip(judged, scores['network'].dice_of_images()):
            result['dice'] = round(float(dice), 4)
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator='\n')
    writer.writeheader()
    writer.writerows(results)
    with atomic_write(args.output / 'results.csv') as file:
        file.write(text.getvalue().encode())
    if args.submission:
        write_submission(args.submission, runs, TEST_HEADER)

    found = sum(result['area'] > 0 for result in results)
    print(f'{len(results)} images predicted, {found} with nerve; masks and results.csv are in {args.output}')
    print_scores(scores)
    if 0 < len(judged) < len(results):
        print(f'They are those of the {len(judged)} images with a mask; {len(results) - len(judged)} have none.')
    for said in intensity_warning(odd_images, args.white), odd_masks and oddity_warning('masks', *zip(*odd_masks)):
        if said:
            print(said)
    if failed:
        print(f'predict.py: {len(failed)} of {len(samples)} images skipped or not scored: {", ".join(failed[:5])}'
              + (', …' if len(failed) > 5 else ''), file=sys.stderr)
        return 1
    return 0


def intensity_warning(odd_images, white):
    """Return what is to be said of [(sample, words or '')] about intensities far from those of training; '' if nothing.

    `white` is the level that was given, or None.
    """
    samples, oddities = zip(*odd_images) if odd_images else ((), ())
    oddities = [oddity and f'{oddity} than those the network was trained on, so their masks may be wrong' for oddity in oddities]
    said = oddity_warning('images', [sample.name for sample in samples], oddities)
    first = next((sample for sample, oddity in odd_images if oddity), None)
    if first and white is None and (likely := white_of(first.image_path)):
        said += f'\n{first.name} uses few levels of its 16 bits: if it holds fewer bits, give --white {likely}'
    return said


def read_batch(samples, mask_threshold, white):
    """Return [(sample, image (H, W) or None, truth (H, W) or None, error or None)]: one bad file does not stop the others."""
    batch = []
    for sample in samples:
        image = truth = error = None
        try:
            image = read_image(sample.image_path, white)
            if sample.mask_path:
                truth = read_mask_of(sample, image, mask_threshold)
        except DataError as problem:
            error = problem
        batch.append((sample, image, truth, error))
    return batch


def count(scores, mask, truth, extra):
    """Count this image for the network and for the baselines."""
    target = truth[None, :, :, None]
    candidates = {'network': mask, 'empty mask': numpy.zeros_like(mask)}
    if 'mean_training_mask' in extra:
        candidates['mean training mask'] = resize_mask(extra['mean_training_mask'], truth.shape)
    for name, candidate in candidates.items():
        scores[name].update(candidate[None, :, :, None].astype('float64'), target)


def print_scores(scores):
    """Print the scores at the images' own sizes, the baselines beside the network."""
    if not scores['network'].counts:
        return
    print(f'\n{"hard scores at original size":30} {"Dice pooled":>11} {"per image":>10} {"IoU pooled":>11} {"accuracy":>9}')
    for name, counted in scores.items():
        if counted.counts:
            row = counted.compute()
            print(f'{name:30} {row["dice_pooled"]:11.3f} {row["dice_per_image"]:10.3f} {row["iou_pooled"]:11.3f} {row["accuracy"]:9.4f}')
    print('These scores are flattered where subjects are among them that the network was trained on, or its settings chosen on.')


def parse(arguments):
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__.split('\n')[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                                     argument_default=argparse.SUPPRESS)
    parser.add_argument('--model', type=Path, required=True, metavar='FILE', help='model file, such as RUN/best.npz')
    parser.add_argument('--input', type=Path, nargs='+', required=True, metavar='PATH', help='folders of images, or image files')
    parser.add_argument('--output', type=Path, required=True, metavar='FOLDER', help='new folder for masks, overlays and results.csv')
    parser.add_argument('--submission', type=Path, default=None, metavar='FILE.csv',
                        help="also write the masks' run-length encoding, as the Kaggle competition takes it")
    parser.add_argument('--mask-threshold', type=positive, default=None, metavar='N',
                        help='where masks are there to compare with: count their values from N up as foreground')
    parser.add_argument('--white', type=positive, default=None, metavar='LEVEL',
                        help='level that is white in the images, such as 4095 for 12 bits in a 16-bit file; by default the '
                             'highest of the file')
    parser.add_argument('--no-overlays', dest='overlays', action='store_false', default=True, help='write masks only')
    parser.add_argument('--batch-size', type=int, default=8, metavar='N', help='images predicted at once')
    parser.add_argument('--device', choices=['auto', 'gpu', 'cpu'], default='auto', help='where to compute')
    parser.add_argument('--precision', choices=['fp32', 'tf32'], default=None,
                        help='of matrix products on a GPU; by default tf32 where the GPU has it')
    stored = parser.add_argument_group('from probabilities to a mask', 'Each default was chosen on the validation or inner subjects of the '
                                       'training run and is stored in the model file.')
    stored.add_argument('--threshold', type=float, metavar='P', help='a pixel is nerve where its probability is above P')
    stored.add_argument('--minimal-area', type=float, metavar='SHARE',
                        help='a mask that covers less than this share of the image counts as empty')
    stored.add_argument('--flip-average', action=argparse.BooleanOptionalAction, help='average with the prediction of the mirrored image')
    args = parser.parse_args(arguments)
    if args.batch_size < 1:
        parser.error(f'--batch-size is {args.batch_size}; expected 1 or more')
    args.settings = {name: value for name, value in vars(args).items() if name in ('threshold', 'minimal_area', 'flip_average')}
    return args


if __name__ == '__main__':
    print_whatever_comes()
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print('predict.py: stopped; masks and overlays so far are in --output, results.csv is not', file=sys.stderr)
        sys.exit(130)
    except (ValueError, RuntimeError, OSError, MemoryError, OverflowError) as error:
        sys.exit(f'predict.py: {error}')
