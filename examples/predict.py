"""Find nerves in images of any size with a trained network, or with several.

    python examples/predict.py --model RUN/best.npz --input FOLDER-or-FILES --output FOLDER
    python examples/predict.py --model CROSS-VALIDATION --input FOLDER-or-FILES --output FOLDER       the mean of its networks

Writes into the output folder, for each image, {name}_mask.png (0 and 255, at the image's own size) and, with --overlays,
{name}_overlay.png (the prediction in orange; in blue the mask, where one is there to compare with), and for all of them
results.csv: area, centroid, confidence, and Dice where there is a mask.

A loop, which is a multi-page TIFF, a GIF, an APNG or an animated WebP, is predicted frame by frame, each frame by itself unless
--smooth-frames says otherwise, and never held as a whole. Its masks are {name}_mask.tif, a page for each frame; its overlays
{name}_overlay.gif; its frames have a row each in results.csv, with their number, from 1; and {name}_over_time.png draws area, place and
confidence. A frame that cannot be read has an empty page and no row. A mask loop of equal length is compared with frame by frame.

With --uncertainty also {name}_uncertainty.png, but not of loops: where the prediction is not sure at all (entropy), and where the networks, and
the image and its mirror image, disagree (mutual information); results.csv says how much their masks agree, and where masks are there to compare
with, it is told whether that is worth anything: calibration, and Dice when the least sure go to a human.
"""

import argparse
import csv
import io
import sys
from collections import defaultdict, deque
from contextlib import closing
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path

import numpy

from nervenet.study import figures
from nervenet.engine.communicator import refuse_company
from nervenet.engine.parallel import number_of_threads
from nervenet.engine.workers import in_background, in_processes
from nervenet.files import atomic_write, make_folder, refuse_content
from nervenet.images.data import mask_oddity, oddity_warning, resize_mask, unfitted
from nervenet.images.layout import name_of
from nervenet.images.loops import DrawnOverLost, with_frames
from nervenet.images.reading import MaskRule, read_image, read_mask_of
from nervenet.images.samples import DataError, Sample, find_samples, natural_key, some_of
from nervenet.metrics import SegmentationScores
from nervenet.study.loops import Drawn, LoopWriter, drawn, smoothed
from nervenet.study.segment import PARTS, READING, describe, intensity_warning, open_segmenter
from nervenet.study.uncertainty import Assessment, decompose, near_truth, sureness
from nervenet.study.submission import TEST_HEADER, encode, write_submission
from nervenet.study.options import HelpFormatter, add_prediction_options, add_reading_options, natural
from nervenet.study.report import print_whatever_comes, progress

CLEAR_LINE = '\r\x1b[K'               # a progress bar may stand there
COLUMNS = 'image', 'area', 'share', 'row', 'column', 'confidence', 'dice'
PROCESSES = 8                         # at most: each prepares the weights for itself
MARGIN = 10                           # pixels around mask and truth in which calibration is measured
COVERAGES = 1, 0.9, 0.8, 0.5          # shares of the images that stay when the least sure go to a human


def main(arguments=None):
    refuse_company()
    args = parse(arguments)
    segmenter, extras = open_segmenter(args)
    if args.dropout_samples and not all(model.config.get('dropout') for model in segmenter.models):
        raise DataError(f'--dropout-samples: a model of {some_of([str(path) for path in args.model])} was trained without dropout, so there is none '
                        'to keep on; leave --dropout-samples out, or give a network trained with --dropout 0.2 or so')
    args.what = extras[0].get('what') or 'foreground'
    args.rule, finding = how_to_read(args, extras[0].get('reading', {}))
    find = partial(find_samples, args.input, masks='optional', masks_folder=args.masks, subjects=args.subjects,
                   no_mask_is_empty=args.no_mask_is_empty)
    samples = find(tell=print, **finding)
    if finding['mask_pattern'] and not hasattr(args, 'mask_pattern') and not any(sample.mask_paths for sample in samples):
        usual = find(**{**finding, 'mask_pattern': None})
        if any(sample.mask_paths for sample in usual):
            print(f'masks: none are called {finding["mask_pattern"]}, as in training; those with the usual names are taken')
            samples = usual
    by_table = extras[0].get('reading', {}).get('subject_from') == 'table' and not args.subjects
    if by_table and any(sample.mask_paths is not None for sample in samples):
        print('WARNING: a table said the subjects in training; give it as --subjects, or nobody can say whom the networks have seen.')
    samples = [recognised(sample, extras, args.held_out) for sample in samples]
    if args.held_out:
        samples = held_out(samples, extras, '--subjects with the table of training' if by_table else 'the images of the training run')
    samples = with_frames(samples, unequal := [])
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

    results, judged, failed, runs, odd_images, odd_masks, assessment = [], [], [], [], {}, [], Assessment()
    for sample, error in unequal:
        failed.append(sample.name)
        print(f'predicted, but not scored: {error}', file=sys.stderr)
    members = {sample.name: unseen_by(sample, extras) for sample in samples}
    scores = {name: SegmentationScores() for name in ('network', 'empty mask', 'mean training mask')}
    read, write = partial(read_frame, args, segmenter, members), partial(write_frame, args, segmenter, mean_mask_at(extras[0]))
    processes = 1 if segmenter.device == 'gpu' else min(number_of_threads(), PROCESSES, -(-len(samples) // args.batch_size))
    # Files are read and written on all cores while the network computes; of the images themselves few are held at a time.
    with (closing(in_background(read, samples, args.batch_size, number_of_threads())) as frames, LoopWriter(args.output) as loops,
          closing(predicted(args, segmenter, frames, processes)) as predictions,
          closing(in_background(write, smoothed(predictions, args.smooth_frames), args.batch_size, number_of_threads())) as written):
        for frame in progress(written, len(samples), 'predicting', unit='images'):
            if frame.error:
                failed.append(frame.sample.name)
                what = 'skipped' if frame.result is None else 'predicted, but not scored'
                if not isinstance(frame.error, DrawnOverLost):              # of what is lost with a frame, the frame is told
                    print(f'{CLEAR_LINE if sys.stderr.isatty() else ""}{what}: {frame.error}', file=sys.stderr)
            if frame.sample.frame:
                loops.append(frame.sample, frame.drawn)
                frame.drawn = None
            if frame.result is None:
                continue
            results.append(frame.result)
            runs.append((frame.sample.name, frame.run_lengths))
            odd_images[frame.sample.image_path] = odd_images.get(frame.sample.image_path) or frame.odd_image
            if frame.scores:
                judged.append(frame.result)
                mask_name = (frame.sample.mask_paths or [frame.sample.image_path])[0].name
                odd_masks.append((mask_name + f'#{frame.sample.frame}' * bool(frame.sample.frame), frame.odd_mask))
                for name, counted in frame.scores.items():
                    scores[name].counts += counted.counts
                if args.uncertainty:
                    dice, = frame.scores['network'].dice_of_images()
                    assessment.update(frame.sample.subject, frame.result['sureness'], dice, frame.near)

    if judged:
        for result, dice in zip(judged, scores['network'].dice_of_images()):
            result['dice'] = round(float(dice), 4)
    text = io.StringIO()
    of_loops = {sample.image_path for sample in samples if sample.frame}
    writer = csv.DictWriter(text, COLUMNS[:1] + ('frame',) * bool(of_loops) + COLUMNS[1:] + ('sureness',) * args.uncertainty, lineterminator='\n')
    writer.writeheader()
    writer.writerows(results)
    with atomic_write(args.output / 'results.csv') as file:
        file.write(text.getvalue().encode())
    if args.submission:
        write_submission(args.submission, runs, TEST_HEADER)

    found = sum(result['area'] > 0 for result in results)
    among = f'frames of {len(of_loops)} loops among them, ' if of_loops else ''
    print(f'{len(results)} images predicted, {among}{found} with {args.what}; masks and results.csv are in {args.output}')
    with_mask = [sample for sample in samples if sample.mask_paths is not None]
    if with_mask:
        print_scores(scores, tell_known(with_mask, members, extras))
    if assessment.images:
        print('', *assessment.lines(COVERAGES), sep='\n')
        if assessment.pixels:
            draw_calibration(args.output / 'calibration.png', assessment)
            print(f'Calibration and ROC are of the pixels within {MARGIN} of mask or truth; reliability diagrams are in '
                  f'{args.output / "calibration.png"}')
    if judged and len(judged) < len(samples):
        missing = {'have no mask': len(samples) - len(with_mask), 'have one and are not scored': len(with_mask) - len(judged)}
        print(f'These scores cover {len(judged)} of {len(samples)} images: '
              + ', '.join(f'{number} {what}' for what, number in missing.items() if number) + '.')
    for said in intensity_warning(odd_images, args.white), odd_masks and oddity_warning('masks', *zip(*odd_masks)):
        if said:
            print(said)
    if failed:
        print(f'predict.py: {len(failed)} of {len(samples)} images skipped or not scored: {", ".join(failed[:5])}'
              + (', …' if len(failed) > 5 else ''), file=sys.stderr)
        return 1
    return 0


@dataclass
class Frame:
    """What is known of one image on its way; None, or '', what is not, or no longer of use.

    prepared    (h, w), as the network is to see it; None if the image cannot be read
    picture     (H, W) uint8, to draw on
    truth       (H, W) uint8 0/1, to compare with
    result      the row of results.csv
    scores      {name: SegmentationScores of this image}, where there is a truth
    members     numbers of the networks that predict it
    samples     (T, h, w): what each of them makes of it, and of its mirror image, or with dropout kept on
    drawn       of a frame of a loop, what is to be written of it, in order
    near        what `near_truth` says of the pixels where uncertainty is judged
    """

    sample: Sample
    error: DataError | None = None
    size: tuple | None = None
    prepared: numpy.ndarray | None = None
    picture: numpy.ndarray | None = None
    truth: numpy.ndarray | None = None
    odd_image: str = ''
    odd_mask: str = ''
    probabilities: numpy.ndarray | None = None
    result: dict | None = None
    run_lengths: str = ''
    scores: dict | None = None
    members: tuple = ()
    samples: numpy.ndarray | None = None
    near: dict | None = None
    drawn: Drawn | None = None


def how_to_read(args, stored):
    """Return (MaskRule, options of `find_samples`): as in training, `stored` in the model file, but for what is given."""
    given = {name: getattr(args, name) for name in READING if hasattr(args, name)}
    for name, other in ('label', 'mask_threshold'), ('mask_threshold', 'label'), ('subject_from', 'subject_pattern'), ('subject_pattern', 'subject_from'):
        if name in given and other not in given:            # of two that exclude each other, the one given
            stored = {key: value for key, value in stored.items() if key != other}
    if args.subjects:
        stored = {key: value for key, value in stored.items() if not key.startswith('subject_')}
    reading = {'subject_from': 'name', **stored, **given}
    if reading['subject_from'] == 'table':
        reading['subject_from'] = 'name'
    rule = MaskRule(reading.get('mask_threshold'), reading.get('label'), reading.get('fill_outlines'))
    return rule, {name: reading.get(name) for name in ('mask_pattern', 'subject_pattern', 'subject_from')}


def recognised(sample, extras, is_held_out):
    """Return the sample with the subject that training knew it by, if it was found there from another folder.

    There its name began with more folders, or its subject was one of them; images of a test part of which no subject was known have names
    that begin with test/.
    """
    known = {subject for extra in extras for part in PARTS for subject in extra.get(f'{part}_subjects') or ()}
    if is_held_out and f'test/{sample.name}' in known:
        return replace(sample, subject=f'test/{sample.name}')
    if sample.subject in known or not known:
        return sample
    folders = [name_of(part) for part in sample.image_path.absolute().parent.parts]
    names = ['/'.join([*folders[start:], name_of(sample.image_path.stem)]) for start in range(1, len(folders))]
    by_folder = extras[0].get('reading', {}).get('subject_from') == 'folder'
    return replace(sample, subject=next((name for name in (folders if by_folder else names) if name in known), sample.subject))


def held_out(samples, extras, missing):
    """Return those of the samples whose subjects the networks were validated on, and not trained. Raises DataError, which asks for what is `missing`."""
    known = [set(extra.get('validation_subjects') or ()) for extra in extras]
    if perhaps := perhaps_seen(extras):
        raise DataError(f'--held-out: whom the network has seen is not known, since {perhaps}; leave --held-out out')
    if not all(known):
        raise DataError('--held-out: the model does not say which subjects its network was validated on; give the file of a run on scans, split by '
                        'subject, that came to its end')
    chosen = [sample for sample in samples if any(sample.subject in subjects for subjects in known)]
    if not chosen:
        raise DataError(f'--held-out: none of the {len(samples)} images shows a subject that was validated on, such as '
                        f'{some_of(sorted(set.union(*known), key=natural_key))}; give {missing}')
    print(f'held out: {len(chosen)} of {len(samples)} images, of {len({sample.subject for sample in chosen})} subjects that were validated on')
    return chosen


def perhaps_seen(extras):
    """Return in words why one of the networks may have seen anybody; None if none of them."""
    return next((extra['perhaps_seen'] for extra in extras if extra.get('perhaps_seen')), None)


def unseen_by(sample, extras):
    """Return the numbers of the networks that were neither trained nor, by inner subjects, chosen on the subject of the sample."""
    return tuple(number for number, extra in enumerate(extras)
                 if not any(sample.subject in (extra.get(f'{part}_subjects') or ()) for part in ('training', 'inner')))


def read_frame(args, segmenter, members, sample):
    """Return the Frame of a sample, read and prepared: one bad file does not stop the others.

    Where there is a mask to compare with, only networks that have not seen the subject predict. If there are none, all do; of several
    the result is not scored then.
    """
    everybody = tuple(range(len(segmenter.models)))
    has_mask = sample.mask_paths is not None
    frame = Frame(sample, members=has_mask and members[sample.name] or everybody)
    is_scored = has_mask and (len(everybody) == 1 or members[sample.name])
    try:
        image = read_image(sample.image_path, args.white, sample.frame)
        frame.size, frame.prepared = image.shape, segmenter.prepare(image)
        frame.odd_image = segmenter.oddity(frame.prepared, frame.size)
        if args.overlays or args.uncertainty and not sample.frame:
            frame.picture = numpy.round(image * 255).astype('uint8')
        if is_scored:
            frame.truth = read_mask_of(sample, image, args.rule, args.values)
            frame.odd_mask = mask_oddity(sample, frame.truth)
    except DataError as problem:
        frame.error = problem
    return frame


def predicted(args, segmenter, frames, processes):
    """Yield `frames` with their probabilities at the network's size, predicted by so many processes, each so many at once as `args` say."""
    waiting = deque()

    def batches():
        while batch := list(islice(frames, args.batch_size)):
            waiting.append(batch)
            yield [(frame.members, frame.prepared) for frame in batch if frame.prepared is not None]

    with closing(in_processes(partial(answers, args, segmenter), batches(), processes)) as answered:
        for found in answered:
            batch = waiting.popleft()
            for frame, (frame.probabilities, frame.samples) in zip([frame for frame in batch if frame.prepared is not None], found):
                frame.prepared = None
            yield from batch


def answers(args, segmenter, asked):
    """Return for each of `asked`, (members, prepared image), what they make of it: its probabilities, and its samples or None, as a Frame has them."""
    together, found = defaultdict(list), [None] * len(asked)                # those of the same networks
    for number, (members, _) in enumerate(asked):
        together[members].append(number)
    for members, numbers in together.items():
        prepared = [asked[number][1] for number in numbers]
        if args.uncertainty and not args.dropout_samples:
            samples = segmenter.samples(prepared, members)
            maps = map(segmenter.map_of, samples)                           # of the same passes
        else:
            samples = segmenter.dropout_samples(prepared, args.dropout_samples, members) if args.dropout_samples else [None] * len(prepared)
            maps = segmenter.maps(prepared, members)
        for number, *answer in zip(numbers, maps, samples):
            found[number] = answer
    return found


def write_frame(args, segmenter, mean_mask, frame):
    """Write the mask of a frame, and its overlay if asked for; return the frame with all that is to be said of it."""
    if frame.probabilities is None:
        return frame
    probability = segmenter.restore(frame.probabilities, frame.size)
    mask = segmenter.mask(probability)
    name = frame.sample.file_name
    if '/' in name:                                          # the image lies in a folder, and so do its results
        (args.output / name).parent.mkdir(parents=True, exist_ok=True)
    if frame.sample.frame:
        frame.drawn = drawn(frame.sample, mask, probability, frame.picture if args.overlays else None, frame.truth, args.probabilities)
        frame.result = frame.drawn.row
    else:
        figures.save_mask(mask, args.output / f'{name}_mask.png')
        if args.probabilities:
            figures.save_probabilities(probability, args.output / f'{name}_probability.png')
        if args.overlays:
            figures.save(figures.overlay(frame.picture, mask, frame.truth, size=frame.size), args.output / f'{name}_overlay.png',
                         durable=False, compress_level=1)
        frame.result = {'image': name, **describe(mask, probability), 'dice': ''}
    if args.uncertainty:
        frame.result['sureness'] = round(sureness(frame.samples, segmenter.settings.mask), 4)
        if frame.truth is not None or not frame.sample.frame:
            mean, total, _, disagreement = (segmenter.restore(values.astype('float32'), frame.size) for values in decompose(frame.samples))
        if not frame.sample.frame:
            pictures = [figures.overlay(frame.picture, mask, frame.truth), *(figures.heat(frame.picture, values.clip(0), largest=numpy.log(2))
                                                                             for values in (total, disagreement))]
            figures.save(figures.grid([pictures], column_titles=['prediction', 'not sure: entropy', 'disagreement: mutual information']),
                         args.output / f'{name}_uncertainty.png', durable=False, compress_level=1)
        if frame.truth is not None:
            frame.near = near_truth(mask, frame.truth, MARGIN, probability=probability, mean=mean, total=total, information=disagreement)
    if args.submission:
        frame.run_lengths = encode(mask)
    if frame.truth is not None:
        frame.scores = counts(mask, frame.truth, mean_mask)
    frame.probabilities = frame.picture = frame.truth = frame.samples = None
    return frame


def mean_mask_at(extra):
    """Return a function of a size (H, W) that gives the mean training mask of a model file at that size, or None if it has none."""
    if 'mean_training_mask' not in extra:
        return lambda size: None
    return lru_cache(8)(lambda size: unfitted(extra['mean_training_mask'], size, extra['fit'], by=resize_mask))


def counts(mask, truth, mean_mask):
    """Return {name: SegmentationScores} of one image, for the network and for the baselines."""
    scores = {}
    for name, candidate in (('network', mask), ('empty mask', numpy.zeros_like(mask)), ('mean training mask', mean_mask(truth.shape))):
        if candidate is not None:
            scores[name] = SegmentationScores()
            scores[name].update(candidate[None, :, :, None], truth[None, :, :, None])
    return scores


def tell_known(samples, members, extras):
    """Return what is to be said of the subjects of samples with masks: who among the networks was trained on them."""
    networks, perhaps = len(extras), perhaps_seen(extras)
    known = [members[sample.name] for sample in samples if len(members[sample.name]) < networks]
    lost = sum(not unseen for unseen in known)
    if networks == 1 and lost:
        return f'{lost} of {len(samples)} are of subjects, by their names, that the network was trained or chosen on: these scores are flattered.'
    if perhaps:
        return f'The network may have seen any of these subjects, since {perhaps}: these scores may be flattered.'
    said = ['These scores are flattered where subjects are among them that the settings were chosen on, or a network trained on, under other names.'
            ] if lost < len(samples) else []
    if len(known) > lost:
        said.append(f'{len(known) - lost} of {len(samples)} images with a mask are of subjects, by their names, that some of the {networks} networks '
                    'were trained or chosen on: each was predicted by the others.')
    if lost:
        said.append(f'{lost} are of subjects that all of them were trained or chosen on: predicted by all, and not scored.')
    return ' '.join(said)


def print_scores(scores, known):
    """Print the scores at the images' own sizes, the baselines beside the network, and what is `known` of the subjects."""
    if scores['network'].counts:
        print(f'\n{"hard scores at original size":30} {"Dice pooled":>11} {"per image":>10} {"IoU pooled":>11} {"accuracy":>9}')
        for name, counted in scores.items():
            if counted.counts:
                row = counted.compute()
                print(f'{name:30} {row["dice_pooled"]:11.3f} {row["dice_per_image"]:10.3f} {row["iou_pooled"]:11.3f} {row["accuracy"]:9.4f}')
    print(known)


def draw_calibration(path, assessment):
    """Draw how often pixels of each probability are foreground: of the prediction, and of the mean of the samples."""
    figures.save(figures.reliability({'prediction': assessment.prediction.compute(), 'mean of samples': assessment.mean.compute()}), path)


def parse(arguments):
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__.split('\n')[0], formatter_class=HelpFormatter)
    parser.add_argument('--input', type=Path, nargs='+', required=True, metavar='PATH', help='folders of images or loops, or their files')
    parser.add_argument('--output', type=Path, required=True, metavar='FOLDER', help='new folder for masks, overlays and results.csv')
    parser.add_argument('--submission', type=Path, metavar='FILE.csv',
                        help="also write the masks' run-length encoding, as the Kaggle competition takes it")
    parser.add_argument('--held-out', action='store_true', help='predict the subjects only that the networks were validated on in training')
    parser.add_argument('--overlays', action='store_true', help='also draw each mask on its image, which takes longer than all the rest')
    parser.add_argument('--probabilities', action='store_true', help='also write {name}_probability.png, grey, 16 bits: 65535 is certain')
    parser.add_argument('--uncertainty', action='store_true', help='also draw where the prediction is not sure, and say how sure it is of each image; '
                        'of frames, each by itself, whatever --smooth-frames says')
    parser.add_argument('--dropout-samples', type=natural, default=0, metavar='N',
                        help='with --uncertainty: ask each network N times with dropout kept on, instead of it and its view of the mirrored image')
    parser.add_argument('--smooth-frames', type=int, default=1, metavar='N',
                        help='of loops, average the probabilities over N frames around each, an odd number; fewer towards both ends')
    parser.add_argument('--batch-size', type=int, default=16, metavar='N', help='images that each process predicts at once')
    add_prediction_options(parser)
    add_reading_options(parser.add_argument_group('where masks are there to compare with', 'What in them is foreground, and whom an image shows, '
                                                  'was stored in the model file by training.'), is_stored=True)
    parser.set_defaults(values={})                          # that are foreground in the masks, so far
    args = parser.parse_args(arguments)
    if args.batch_size < 1:
        parser.error(f'--batch-size is {args.batch_size}; expected 1 or more')
    if args.dropout_samples and not args.uncertainty:
        parser.error('--dropout-samples has no meaning without --uncertainty')
    if args.dropout_samples == 1:
        parser.error('--dropout-samples is 1; expected 2 or more: one alone cannot disagree')
    if args.smooth_frames < 1 or args.smooth_frames % 2 == 0:
        parser.error(f'--smooth-frames is {args.smooth_frames}; expected an odd number of 1 or more: the window is centred')
    if hasattr(args, 'label') and hasattr(args, 'mask_threshold'):
        parser.error('--label and --mask-threshold both say what is foreground; give one of them')
    return args


if __name__ == '__main__':
    print_whatever_comes()
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print('predict.py: stopped; what was predicted so far is in --output, results.csv is not', file=sys.stderr)
        sys.exit(130)
    except (ValueError, RuntimeError, OSError, MemoryError, OverflowError) as error:
        sys.exit(f'predict.py: {error}')
