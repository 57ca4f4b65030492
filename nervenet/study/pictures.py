"""The pictures of an experiment: how a run went and what it predicts, and what augmentation makes of its images."""

import csv
import io

import numpy

from ..files import make_folder
from ..images.augment import Augmentation
from ..images.data import Loader
from ..images.samples import DataError
from ..metrics import SegmentationScores
from . import figures
from .report import LEAKS
from .segment import Segmenter


def draw_run(run, model, validation, baselines):
    """Draw the curves of the run, and the best, median and worst prediction of its last network on the validation part, if that is not None.

    What it scores on each image is written to validation.csv.
    """
    title = LEAKS.partition(',')[0] if run.config['leaky_split_by_image'] else ''
    figures.save(figures.curves(run.history, baselines=baselines, title=title), run.path / 'curves.png')
    if validation is None:
        return
    segmenter, scores, with_foreground = Segmenter(model, run.config['size']), SegmentationScores(), []
    for images, masks in validation.epoch(0):
        probabilities = segmenter.probabilities(images[..., 0])
        scores.update(numpy.stack(probabilities)[..., None], masks)
        with_foreground.extend(masks.any(axis=(1, 2, 3)))
    write_cases(run, validation.samples, scores)
    # An empty mask shows nothing, so cases are chosen among the images that hold foreground, if there are any.
    chosen = numpy.flatnonzero(with_foreground) if any(with_foreground) else numpy.arange(len(with_foreground))
    cases = []
    for label, place in figures.best_median_worst(scores.dice_of_images()[chosen]):
        index = int(chosen[place])
        image, truth = (array[0, :, :, 0] for array in validation.batch([index], 0))
        prediction = segmenter.settings.mask(segmenter.probabilities([image])[0])
        cases.append(dict(label=label, name=validation.samples[index].name, image=image, truth=truth, prediction=prediction))
    what = run.config.get('what') or 'foreground'
    images = f'Validation images with {what}' if any(with_foreground) and not all(with_foreground) else 'Validation'
    epoch, threshold = run.history[-1]['epoch'], segmenter.settings.threshold
    title = f'{images}, after epoch {epoch}: {what} where the probability is above {threshold:g}'
    figures.save(figures.predictions(cases, title=title), run.path / 'predictions.png')


def write_cases(run, samples, scores):
    """Write validation.csv: of each image the subject, Dice, and the pixels of overlap, of the predicted and of the true mask."""
    _, _, overlap, predicted, true, _ = scores.per_image_counts()[..., 0]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator='\n')
    writer.writerow(['image', 'subject', 'dice', 'overlap', 'predicted', 'true'])
    for sample, dice, *pixels in zip(samples, scores.dice_of_images(), overlap, predicted, true):
        writer.writerow([sample.name, sample.subject, round(float(dice), 4), *map(int, pixels)])
    run.write('validation.csv', text.getvalue())


def one_of_each_subject(samples, reader, most=4):
    """Return the numbers of the first samples that hold foreground, of different subjects, at most so many."""
    shown = {}
    for index, sample in enumerate(samples):
        if len(shown) < most and sample.subject not in shown and reader.read(sample)[1].any():
            shown[sample.subject] = index
    return [*shown.values()]


def draw_learning(run, validation, watched):
    """Draw learning.gif: what the network made of the validation images with the numbers `watched` after each epoch of the run.

    Below stands the pooled hard Dice of all validation images.
    """
    if not watched:
        return
    images, masks = (array[..., 0] for array in validation.batch(watched, 0))
    names = [validation.samples[index].name for index in watched]
    frames = thinned(len(run.history))
    learnt, epochs = run.learnt(masks.shape), run.history[-1]['epoch']
    size = figures.display_size(masks.shape[1:], 256)
    pictures = []
    for frame in frames:
        row = run.history[frame]
        said = f'epoch {row["epoch"]} of {epochs}: Dice {row["validation_dice_pooled"]:.3f}'
        shown = [figures.overlay(*layers, size=size) for layers in zip(images, learnt[frame], masks)]
        pictures.append(figures.grid([shown, []], [names, []], ['prediction orange, truth blue', said]))
    figures.save_animation(pictures, run.path / 'learning.gif')


def thinned(number, most=60):
    """Return at most so many of `number` frames, evenly spread, the first and the last among them."""
    return sorted({round(place) for place in numpy.linspace(0, number - 1, min(number, most))})


def preview_augmentation(path, transform, samples, reader, seed):
    """Draw to the file `path` what `transform` makes of a few images that hold foreground: the image, four draws, the mask outlined.

    Raises DataError for a name that is taken or no picture's, if nothing is to be changed, and if no mask holds foreground.
    """
    if path.suffix.lower() != '.png':
        raise DataError(f'--preview-augmentation: {path} is to be a picture; expected a name that ends in .png')
    if path.exists():
        raise DataError(f'--preview-augmentation: {path} exists already; choose another name')
    if transform == Augmentation():
        raise DataError('--preview-augmentation: no augmentation is on; give --augment default, or single options')
    indices = one_of_each_subject(samples, reader)
    if not indices:
        raise DataError('--preview-augmentation: no mask holds any foreground at this size')
    draws = Loader(samples, reader, 1, seed=seed, transform=transform)
    columns = [Loader(samples, reader, 1).batch(indices, 0), *(draws.batch(indices, epoch) for epoch in (1, 2, 3, 4))]
    rows = [[figures.overlay(images[row], None, masks[row]) for images, masks in columns] for row in range(len(indices))]
    picture = figures.grid(rows, row_titles=[samples[index].name for index in indices],
                           column_titles=['as it is', 'draw 1', 'draw 2', 'draw 3', 'draw 4'])
    make_folder(path.absolute().parent, '--preview-augmentation')
    figures.save(picture, path)
    print(f'augmented pairs are in {path}')
