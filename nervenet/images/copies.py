"""Near copies: images that show the same, whatever their names say.

    print(copies_warning(samples, reader))

Public sets are full of them: a frame and the next one, a file that two folders hold, a person who was numbered twice, a mirrored image.
Where they lie on both sides of a split, a network is scored on what it was trained on.

Two images are compared by the correlation of small thumbnails. Ultrasound images are all alike in the large: bright above, dark below. So
what is smooth is taken off first, and only the detail that a thumbnail can show is compared. All pairs are products of matrices,
a block of rows at a time.
"""

import numpy

from ..engine.parallel import parallel_for
from .data import resize, resize_mask
from .samples import some_of

SIDE, SMOOTH = 16, 8            # thumbnails of 16×16 pixels, less what 8×8 pixels show of them
NEAR = 0.9                      # correlation from which two images are near copies: different thyroids, on one screen, reach 0.89
EQUAL = 0.999                   # and from which they are equal but for rounding
BLOCK = 2**22                   # pairs that are compared at once: 16 MiB


def copies_warning(samples, reader):
    """Return what is to be said of near copies among `samples`, a line for each kind; '' if nothing.

    Near copies of one subject are expected; those of different subjects leak. And of equal images, whoever they show, masks that
    contradict each other: at most one of the two is right.
    """
    details = thumbnails(samples, reader)
    return '\n'.join(filter(None, [_across(samples, details), _contradictions(samples, reader, details)]))


def thumbnails(samples, reader):
    """Return the detail of each image as a row (N, SIDE²) float32 of length 1, so that products of rows are correlations.

    The black around a padded image is left out, which would make all such images alike. An image without any detail is a row of zeros.
    """
    def detail(sample):
        image = reader.read(sample)[0][reader.place(sample)]
        small = resize(image.astype(numpy.float32), (SIDE, SIDE))
        return small - resize(resize(small, (SMOOTH, SMOOTH)), (SIDE, SIDE))

    rows = numpy.reshape(parallel_for(samples, detail), (len(samples), SIDE**2))
    rows -= rows.mean(axis=1, keepdims=True)
    length = numpy.sqrt(numpy.square(rows).sum(axis=1, keepdims=True))
    return rows / numpy.where(length > 1, length, numpy.inf)                # intensities are of 16 bits: below 1 is rounding


def nearest(details, groups):
    """Return for each image (correlation, index, is_mirrored), arrays (N,): the image of another group most like it, −1 if there is none.

    details  rows (N, SIDE²) of `thumbnails`
    groups   (N,) numbers: images are not compared within a group
    """
    correlation, index, is_mirrored = numpy.full(len(details), -1, numpy.float32), numpy.zeros(len(details), int), numpy.zeros(len(details), bool)
    for rows, straight, mirrored in _blocks(details):
        best = numpy.maximum(straight, mirrored)
        best[groups[rows, None] == groups] = -1
        index[rows] = best.argmax(axis=1)
        within = numpy.arange(len(best)), index[rows]
        correlation[rows], is_mirrored[rows] = best[within], mirrored[within] > straight[within]
    return correlation, index, is_mirrored


def first_equal(details):
    """Return for each image (index, is_mirrored), arrays (N,): the first image that equals it, or its mirror image; its own if none before it does."""
    index, is_mirrored = numpy.arange(len(details)), numpy.zeros(len(details), bool)
    for rows, straight, mirrored in _blocks(details):
        found = numpy.maximum(straight, mirrored) >= EQUAL
        first = numpy.where(found.any(axis=1), found.argmax(axis=1), index[rows])       # one without any detail equals none
        within = numpy.arange(len(first)), first
        index[rows], is_mirrored[rows] = first, mirrored[within] > straight[within]
    return index, is_mirrored


def _blocks(details):
    """Yield (rows, straight, mirrored): a slice of images, and their correlations (rows, N) with all images, and with these mirrored."""
    flipped = details.reshape(-1, SIDE, SIDE)[:, :, ::-1].reshape(details.shape)
    step = max(1, BLOCK // max(1, len(details)))
    for start in range(0, len(details), step):
        rows = slice(start, min(start + step, len(details)))
        yield rows, details[rows] @ details.T, details[rows] @ flipped.T


def _across(samples, details):
    """Return the warning of near copies that different subjects have; '' if there are none."""
    subjects = [sample.subject for sample in samples]
    correlation, index, is_mirrored = nearest(details, numpy.unique(subjects, return_inverse=True)[1])
    near = numpy.flatnonzero(correlation >= NEAR)
    pairs = {}                                              # of each two subjects the images, the nearest first
    for i in near[numpy.argsort(-correlation[near], kind='stable')]:
        pairs.setdefault(frozenset((subjects[i], subjects[index[i]])), []).append(i)

    def said(images):
        i, number = images[0], len({*images, *index[images]})
        j = index[i]
        subjects_said = f', subjects {subjects[i]} and {subjects[j]}: {number} images' * (number > 2)
        return f'{samples[i].name} and {samples[j].name} ({"mirrored, " if is_mirrored[i] else ""}{correlation[i]:.2f}{subjects_said})'

    return '' if not len(near) else (
        f'WARNING: {len(near)} of {len(samples)} images are near copies of an image of another subject: where these are on both sides of the '
        f'split they leak, and the scores are too good to be true. The nearest: {some_of([said(images) for images in pairs.values()], 5)}. '
        'Give those who are one person one subject, by --subject-pattern or --subjects, or leave the copies out.')


def _contradictions(samples, reader, details):
    """Return the warning of equal images whose masks contradict each other: their Dice is below 0.5; '' if there are none."""
    index, is_mirrored = first_equal(details)
    found = []

    def mask(i):
        return resize_mask(reader.read(samples[i])[1][reader.place(samples[i])], reader.size)

    for i in numpy.flatnonzero(index < numpy.arange(len(index))):
        if samples[i].frame and samples[i].image_path == samples[index[i]].image_path:
            continue                                        # in a loop, what is meant comes into view from one frame to the next
        one, other = mask(i), mask(index[i])
        overlap, total = (one & (other[:, ::-1] if is_mirrored[i] else other)).sum(), one.sum(dtype=int) + other.sum(dtype=int)
        if total and 2 * overlap / total < 0.5:
            found.append((2 * overlap / total, f'{samples[index[i]].name} and {samples[i].name} '
                          f'({"mirrored, " if is_mirrored[i] else ""}Dice {2 * overlap / total:.2f})'))
    return '' if not found else (f'WARNING: {len(found)} of {len(samples)} images equal another one, and their masks contradict each other: '
                                 f'{some_of([text for _, text in sorted(found)], 5)}. At most one mask of each pair is right.')
