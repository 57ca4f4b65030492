"""The pieces that a mask falls into, the largest of them, and masks that grow."""

import numpy

from ..checks import positive


def regions(labels):
    """Return (H, W) int64: the number, from 0 up in reading order, of the 4-connected region of equal values that a pixel is in.

    Each row falls into runs of equal values. Runs that touch are of one region, and take the smallest number among them; a run whose number
    is another run's takes that one's number, again and again, so that numbers travel far in few rounds (pointer jumping).
    """
    labels = numpy.asarray(labels)
    if labels.ndim != 2:
        raise ValueError(f'labels or mask has shape {labels.shape}; expected (H, W)')
    begins = numpy.diff(labels, axis=1, prepend=labels[:, :1]) != 0
    begins[:, 0] = True
    run = (numpy.cumsum(begins) - 1).reshape(labels.shape)
    touching = labels[1:] == labels[:-1]
    upper, lower = run[:-1][touching], run[1:][touching]
    first = (numpy.diff(upper, prepend=-1) != 0) | (numpy.diff(lower, prepend=-1) != 0)         # two runs touch in many pixels
    upper, lower = upper[first], lower[first]
    number = numpy.arange(begins.sum())
    while (number[upper] != number[lower]).any():
        smaller = numpy.minimum(number[upper], number[lower])
        for ends in upper, lower:
            numpy.minimum.at(number, number[ends], smaller)              # told to the run whose number it has, for all that have it
        number = number[number]
    return numpy.unique(number, return_inverse=True)[1][run]


def largest_component(mask):
    """Return the largest 4-connected component of `mask` (H, W), bool; of equals the first in reading order, and none of an empty mask."""
    piece = regions(mask)
    return piece == numpy.bincount(piece[mask]).argmax() if mask.any() else mask


def dilate(mask, radius):
    """Return all pixels (H, W) that are at most `radius`, a whole number, from one of `mask`, centre to centre: it grows by a disc."""
    radius, mask = positive(radius, 'radius', 0), numpy.asarray(mask, bool)
    (H, W), framed, grown = mask.shape, numpy.pad(mask, radius), numpy.zeros_like(mask)
    for down, right in numpy.ndindex(2 * radius + 1, 2 * radius + 1):
        if (down - radius)**2 + (right - radius)**2 <= radius**2:
            grown |= framed[down:down + H, right:right + W]
    return grown
