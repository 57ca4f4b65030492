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

from collections.abc import Callable
from typing import NamedTuple

import numpy

from ..checks import finite, positive
from ..images.augment import median_by_forgetting
from .superpixels import means

SUBBANDS = 'horizontal', 'vertical', 'diagonal'


class Coefficients(NamedTuple):
    """A decomposed image of `size` (H, W): the `coarse` image of the last level, and `details` (3, H_j, W_j) of each, finest first."""

    coarse: numpy.ndarray
    details: list
    size: tuple

    def maps(self):
        """Return {name: map (H, W)} of all details and of the coarse image: for every pixel the coefficient of the square it lies in."""
        def spread(map, level):
            side = 1 if map.shape == self.size else 2**level
            return map.repeat(side, 0).repeat(side, 1)[:self.size[0], :self.size[1]]
        return {f'{subband} {level}': spread(map, level) for level, details in enumerate(self.details, 1)
                for subband, map in zip(SUBBANDS, details)} | {'coarse': spread(self.coarse, len(self.details))}


class Transform(NamedTuple):
    """Levels: `split(image, level)` is (coarse, details), and `join(coarse, details)` is the image again."""

    split: Callable
    join: Callable

    def decompose(self, image, levels=3):
        """Return the Coefficients of an image (H, W), of any size: of integers in float64, of floats in their dtype. Raises ValueError."""
        coarse, details = finite(image, 'the image', '(H, W)'), []
        for level in range(1, positive(levels, 'levels') + 1):
            coarse, detail = self.split(coarse, level)
            details.append(detail)
        return Coefficients(coarse, details, numpy.shape(image))

    def reconstruct(self, coefficients):
        """Return the image (H, W): that of an image of integers to the last bit, of floats to rounding."""
        image, sizes = coefficients.coarse, [coefficients.size, *(each.shape[1:] for each in coefficients.details)]
        for details, (H, W) in reversed([*zip(coefficients.details, sizes)]):
            image = self.join(image, details)[:H, :W]
        return image


def of_squares(coarse_of, mean_of):
    """Return the Transform whose coarse image is `coarse_of` the pixels of each square: a, b, c and d.

    How far a pixel is from the mean of its square follows from the details. `mean_of` the coarse pixel and these four is that mean. An odd
    row or column at the end is doubled, and cut off again.
    """
    def split(image, level):
        x = numpy.pad(image, [(0, length % 2) for length in image.shape], 'edge')
        a, b, c, d = pixels = [x[i::2, j::2] for i in (0, 1) for j in (0, 1)]              # each (H/2, W/2)
        return coarse_of(pixels), numpy.stack([a - b + c - d, a + b - c - d, a - b - c + d]) / 2

    def join(coarse, details):
        h, v, g = details / 2
        parts = h + v + g, v - h - g, h - v - g, g - h - v
        image = numpy.empty((2 * coarse.shape[0], 2 * coarse.shape[1]), coarse.dtype)
        for number, part in enumerate(parts):
            image[number // 2::2, number % 2::2] = mean_of(coarse, parts) + part
        return image

    return Transform(split, join)


def split_by_medians(image, level):
    """Return (coarse, details) of the median decomposition, in which level j takes medians of 2ʲ + 1 pixels."""
    along_rows = median(image, 2**level + 1, 1)
    rest, coarse = image - along_rows, median(along_rows, 2**level + 1, 0)
    horizontal = median(rest, 2**level + 1, 0)
    return coarse, numpy.stack([horizontal, along_rows - coarse, rest - horizontal])


TRANSFORMS = {'haar': of_squares(lambda pixels: sum(pixels) / 2, lambda coarse, parts: coarse / 2),
              'morphological-haar': of_squares(numpy.minimum.reduce, lambda coarse, parts: coarse - numpy.minimum.reduce(parts)),
              'median': Transform(split_by_medians, lambda coarse, details: coarse + details.sum(axis=0))}


def median(image, window, axis):
    """Return the median of the `window` pixels around each, along one axis, (H, W)."""
    x = numpy.pad(image, [(window // 2 * (axis == a),) * 2 for a in (0, 1)], 'edge')
    return median_by_forgetting([*numpy.moveaxis(numpy.lib.stride_tricks.sliding_window_view(x, window, axis), -1, 0)])


def feature_names(levels=3):
    """Return the names of the 6·levels + 6 features, in order: the last two are the place."""
    names = [f'{subband} {level}' for level in range(1, levels + 1) for subband in SUBBANDS] + ['coarse', 'image']
    return [f'{what} of {name}' for name in names for what in ('mean', 'deviation')] + ['row', 'column']


def region_features(coefficients, image, labels):
    """Return (regions, 6·levels + 6): a row for each region, which are the pixels of `labels` (H, W) with one number, 0, 1, 2, …

    For each level and subband the mean of |coefficient| and the deviation of the coefficients; then mean and deviation of the coarse image
    and of the image; then the mean row and column, from 0 at one edge to 1 at the other. NaN for a number that no pixel has.
    """
    place = means(numpy.moveaxis(numpy.indices(numpy.shape(labels)), 0, -1), labels)       # (regions, 2)
    return _features(coefficients, image, place, lambda maps: means(maps, labels))


def box_features(coefficients, image, points, side=17):
    """Return (number, 6·levels + 6): as `region_features`, for what the image has of the side×side box around each of `points` (number, 2).

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

    def box_means(maps):
        S = numpy.pad(maps.cumsum(axis=0, dtype=numpy.float64).cumsum(axis=1), [(1, 0), (1, 0), (0, 0)])          # (H + 1, W + 1, maps)
        total = S[bottom, right] - S[top, right] - S[bottom, left] + S[top, left]
        return total / ((bottom - top) * (right - left))[:, None]

    return _features(coefficients, image, points, box_means)


def _features(coefficients, image, place, means):
    """Return the features, given `place` (regions, 2), the mean rows and columns, and what takes `means` of maps (H, W, …) over regions."""
    image, columns = finite(image, 'the image', '(H, W)'), []
    if image.shape != coefficients.size:
        raise ValueError(f'the image has shape {image.shape} and the coefficients are of one of {coefficients.size}')
    for name, map in {**coefficients.maps(), 'image': image}.items():
        centred = map - map.mean(dtype=numpy.float64)              # else the variance were a small difference of large numbers
        strength, mean, square = means(numpy.stack([map if name in ('coarse', 'image') else abs(map), centred, centred**2], -1)).T
        columns += [strength, numpy.sqrt(numpy.maximum(square - mean**2, 0))]
    return numpy.column_stack([*columns, place / numpy.maximum(1, numpy.array(image.shape) - 1)])
