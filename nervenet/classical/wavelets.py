"""Wavelets: an image as a coarse version of itself and what it lacks, in three directions and at several scales; and features from it.

Take the image in squares of 2×2 pixels,  a b / c d.  Four numbers say the same as these four, one of them what the square is as a whole:

    horizontal  h = (a − b + c − d) / 2            what changes from left to right
    vertical    v = (a + b − c − d) / 2            what changes from top to bottom
    diagonal    g = (a − b − c + d) / 2            what changes like a chessboard
    coarse      s = (a + b + c + d) / 2            Haar:                linear and orthonormal
                s = min(a, b, c, d)                morphological Haar:  the darkest pixel is kept, and kept sharp

The coarse image, half as high and wide, is decomposed in its turn: a level for each scale. Fine grain is in the maps of the first levels,
what is larger in the next ones, shade in the last coarse image: their strength around a place describes its texture. The median
decomposition keeps the size: with the median M_r along rows and M_c along columns, of 3, 5, 9, … pixels,

    s = M_c M_r x,    v = M_r x − M_c M_r x,    h = M_c(x − M_r x),    g = (x − M_r x) − M_c(x − M_r x),       x = s + v + h + g

A median passes straight edges as they are and no lone bright grain, where a mean smears both: the grain falls wholly into the details.

Sources: Haar 1910; Heijmans & Goutsias 2000, "Nonlinear multiresolution signal decomposition schemes, part II: morphological wavelets";
Asghar & Barner 2001 (IEEE TVCG 7:76–93) as a handbook describes it, in the form that halves nothing, the only one that can be undone.
Our choice: the windows of 2ʲ + 1 pixels, that beyond the edge its pixels are repeated, and what a region is described by.
"""

from typing import NamedTuple

import numpy

from ..checks import positive
from ..images.augment import median_by_forgetting

SUBBANDS = 'horizontal', 'vertical', 'diagonal'


class Coefficients(NamedTuple):
    """A decomposed image of `size` (H, W): the `coarse` image of the last level, and `details` (3, H_j, W_j) of all levels, finest first."""

    coarse: numpy.ndarray
    details: list
    size: tuple

    def maps(self):
        """Yield (name, map (H, W)) of all details and of the coarse image: for every pixel the coefficient of the square it lies in."""
        maps = [(f'{subband} {level}', level, map) for level, details in enumerate(self.details, 1)
                for subband, map in zip(SUBBANDS, details)]
        for name, level, map in [*maps, ('coarse', len(self.details), self.coarse)]:
            side = 1 if map.shape == self.size else 2**level
            rows, columns = (numpy.arange(length) // side for length in self.size)
            yield name, map[rows[:, None], columns]


class Transform:
    """Levels: `split` says how an image becomes (coarse, details), and `join` how it comes back."""

    def decompose(self, image, levels=3):
        """Return the Coefficients of an image (H, W), of any size: of integers in float64, of floats in their dtype. Raises ValueError."""
        coarse, details = checked_image(image), []
        for level in range(1, positive(levels, 'levels') + 1):
            coarse, detail = self.split(coarse, level)
            details.append(detail)
        return Coefficients(coarse, details, numpy.shape(image))

    def reconstruct(self, coefficients):
        """Return the image (H, W): that of an image of integers to the last bit, of floats to rounding."""
        image, levels = coefficients.coarse, len(coefficients.details)
        for level in range(levels, 0, -1):
            H, W = coefficients.size if level == 1 else coefficients.details[level - 2].shape[1:]
            image = self.join(image, coefficients.details[level - 1])[:H, :W]
        return image


class Haar(Transform):
    """The linear control: s² + h² + v² + g² = a² + b² + c² + d². An odd row or column at the end is doubled, and cut off again by `join`."""

    def split(self, image, level):
        x = numpy.pad(image, [(0, length % 2) for length in image.shape], 'edge')
        a, b, c, d = (x[i::2, j::2] for i in (0, 1) for j in (0, 1))                       # each (H/2, W/2)
        return self.coarse(a, b, c, d), numpy.stack([a - b + c - d, a + b - c - d, a - b - c + d]) / 2

    def join(self, coarse, details):
        h, v, g = details / 2                                                              # parts: how far each pixel is from the mean
        parts = h + v + g, v - h - g, h - v - g, g - h - v
        mean = self.mean(coarse, *parts)
        image = numpy.empty((2 * coarse.shape[0], 2 * coarse.shape[1]), coarse.dtype)
        for number, part in enumerate(parts):
            image[number // 2::2, number % 2::2] = mean + part
        return image

    def coarse(self, a, b, c, d):
        return (a + b + c + d) / 2

    def mean(self, coarse, *parts):
        return coarse / 2


class MorphologicalHaar(Haar):
    """As Haar, with the minimum for the sum. The details say how far each pixel is from the mean, the smallest of these where the minimum was."""

    def coarse(self, a, b, c, d):
        return numpy.minimum(numpy.minimum(a, b), numpy.minimum(c, d))

    def mean(self, coarse, *parts):
        return coarse - self.coarse(*parts)


class MedianDecomposition(Transform):
    """Nothing is halved: level j takes medians of 2ʲ + 1 pixels."""

    def split(self, image, level):
        window = 2**level + 1
        along_rows = median(image, window, 1)
        rest, coarse = image - along_rows, median(along_rows, window, 0)
        horizontal = median(rest, window, 0)
        return coarse, numpy.stack([horizontal, along_rows - coarse, rest - horizontal])

    def join(self, coarse, details):
        return coarse + details.sum(axis=0)


TRANSFORMS = {'haar': Haar(), 'morphological-haar': MorphologicalHaar(), 'median': MedianDecomposition()}


def median(image, window, axis):
    """Return the median of the `window` pixels around each, along one axis, (H, W)."""
    length = image.shape[axis]
    x = numpy.pad(image, [(window // 2 * (axis == a),) * 2 for a in (0, 1)], 'edge')
    return median_by_forgetting([x[i:i + length] if axis == 0 else x[:, i:i + length] for i in range(window)])


def checked_image(image):
    """Return the image as an array (H, W) of finite floats, or raise ValueError."""
    image = numpy.asarray(image)
    if image.ndim != 2 or image.size == 0 or image.dtype.kind not in 'biuf':
        raise ValueError(f'the image has shape {image.shape} and dtype {image.dtype}; expected (H, W) of real numbers')
    if not numpy.isfinite(image).all():
        raise ValueError('the image holds values that are NaN or infinite; expected finite numbers')
    return image if image.dtype.kind == 'f' else image.astype(numpy.float64)


def feature_names(levels=3):
    """Return the names of the 6·levels + 6 features, in order: the last two are the place."""
    names = [f'{subband} {level}' for level in range(1, levels + 1) for subband in SUBBANDS] + ['coarse', 'image']
    return [f'{what} of {name}' for name in names for what in ('mean', 'deviation')] + ['row', 'column']


def region_features(coefficients, image, labels):
    """Return (regions, 6·levels + 6): a row for each region, which are the pixels of `labels` (H, W) with one number, 0, 1, 2, …

    For each level and subband the mean of |coefficient| and the deviation of the coefficients; then mean and deviation of the coarse image
    and of the image; then the mean row and column, from 0 at one edge to 1 at the other. Raises ValueError for labels that do not fit.
    """
    labels = numpy.asarray(labels)
    if labels.shape != coefficients.size or labels.dtype.kind not in 'iu' or labels.min() < 0:
        raise ValueError(f'labels have shape {labels.shape} and dtype {labels.dtype}; expected {coefficients.size} of whole numbers from 0')
    number = numpy.bincount(labels.ravel())
    if not number.all():
        raise ValueError(f'label {number.argmin()} has no pixel, label {len(number) - 1} has; expected all numbers in between')

    def mean(map):
        return numpy.bincount(labels.ravel(), map.ravel()) / number

    return _features(coefficients, image, mean, [mean(along) for along in numpy.indices(labels.shape)])


def box_features(coefficients, image, points, side=17):
    """Return (number, 6·levels + 6): as `region_features`, for what of the side×side box around each of `points` (number, 2) is in the image.

    With S(y, x), the sum of all pixels above row y and left of column x, the sum over any box is S at its four corners,
    S(bottom, right) − S(top, right) − S(bottom, left) + S(top, left): what it costs does not depend on the side (Crow 1984).
    """
    points, size = numpy.asarray(points), numpy.array(coefficients.size)
    if positive(side, 'side') % 2 == 0:
        raise ValueError(f'side is {side}; expected an odd number, so that a pixel is in the middle')
    if points.ndim != 2 or points.shape[1] != 2 or points.dtype.kind not in 'iu' or (points < 0).any() or (points >= size).any():
        raise ValueError(f'points have shape {points.shape} and dtype {points.dtype}; expected (number, 2) of whole numbers, each a pixel '
                         f'of an image of {coefficients.size}')
    top, left = numpy.maximum(points - side // 2, 0).T
    bottom, right = numpy.minimum(points + side // 2 + 1, size).T

    def mean(map):
        sums = numpy.zeros(size + 1)                                                       # S, (H + 1, W + 1)
        map.cumsum(axis=0, dtype=numpy.float64).cumsum(axis=1, out=sums[1:, 1:])
        total = sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left]
        return total / ((bottom - top) * (right - left))

    return _features(coefficients, image, mean, list(points.T))


def _features(coefficients, image, mean, place):
    """Return the features, given what takes the mean of a map over each region, and their rows and columns."""
    image, columns = checked_image(image), []
    if image.shape != coefficients.size:
        raise ValueError(f'the image has shape {image.shape} and the coefficients are of one of {coefficients.size}')
    for name, map in [*coefficients.maps(), ('image', image)]:
        centred = map - map.mean(dtype=numpy.float64)              # else the variance were a small difference of large numbers
        variance = mean(centred**2) - mean(centred)**2
        columns += [mean(map if name in ('coarse', 'image') else abs(map)), numpy.sqrt(numpy.maximum(variance, 0))]
    columns += [along / max(1, length - 1) for along, length in zip(place, image.shape)]
    return numpy.stack(columns, axis=1)
