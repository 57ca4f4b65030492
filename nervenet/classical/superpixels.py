"""Superpixels: an image as a few hundred small regions of even grey, so that what is slow for pixels becomes quick.

SLIC, "simple linear iterative clustering", is k-means on points (grey level, row, column). With centres C_k, one per cell of a grid with
cells S pixels wide, each pixel p joins the centre with the least

    D² = (I_p − I_k)² + (m / S)² · ((y_p − y_k)² + (x_p − x_k)²)

and each centre moves to the mean of its pixels; and so on. Both steps lower the sum of all D², or leave it. The compactness m is the
exchange rate: m grey levels are worth a whole step S of way. Large m gives squares, small m follows edges.

Lay a net over the image and let go: each mesh creeps up to the edges near it, and no further, for going far costs.

Source: Achanta, Shaji, Smith, Lucchi, Fua and Süsstrunk 2012, "SLIC superpixels compared to state-of-the-art superpixel methods". Grey
levels are in percent, as the lightness of CIELAB that they compare, so that their m, from 1 to 40, means the same. They let each centre
search 2S × 2S pixels. Here each *pixel* looks at nine centres, those of the grid cell it lies in and of the eight around it, which never
change: nine operations on whole images, and the objective provably never rises. What becomes of stray pixels (`joined`) is our choice.
"""

import math

import numpy

from ..checks import finite, positive
from ..images.components import regions

NINE = (0, 0), (-1, 0), (1, 0), (0, -1), (0, 1), (-1, -1), (-1, 1), (1, -1), (1, 1)                # (down, right): a place and those around


def slic(image, step=12, compactness=10.0, iterations=10):
    """Return labels (H, W) int64, 0 … K − 1: superpixels about `step` pixels wide, each 4-connected, none below step² / 4 pixels.

    `image` (H, W) holds intensities in [0, 1], best without speckle (`median_filter`). Raises ValueError.
    """
    return joined(clusters(image, step, compactness, iterations)[0], step**2 / 4)


def clusters(image, step, compactness, iterations):
    """Return (labels, objectives): labels (H, W), not connected yet, numbers of grid cells in reading order; and ΣD² of each iteration."""
    image, step, iterations = finite(image, 'image', '(H, W)'), positive(step, 'step', 2), positive(iterations, 'iterations')
    if not 0 <= image.min() <= image.max() <= 1:
        raise ValueError(f'image holds values from {image.min():g} to {image.max():g}; expected 0 to 1: divide grey levels by 255')
    if not 0 < compactness < math.inf:
        raise ValueError(f'compactness is {compactness}; expected a number above 0, 10 as a rule')
    grey, (H, W) = 100 * image.astype(numpy.float64), image.shape
    rows, columns = max(1, round(H / step)), max(1, round(W / step))
    y, x = numpy.arange(H)[:, None], numpy.arange(W)[None, :]
    row, column = y * rows // H, x * columns // W                        # (H, 1) and (1, W): the cell of a pixel
    exchange = compactness**2 * rows * columns / (H * W)                 # (m / S)²
    features = numpy.stack(numpy.broadcast_arrays(grey, y, x))           # (3, H, W)
    centres, objectives = _beginning(grey, row, column), []
    for _ in range(iterations):
        best, labels = numpy.full((H, W), math.inf), numpy.zeros((H, W), numpy.int64)
        for down, right in NINE:
            cell = (row + down).clip(0, rows - 1), (column + right).clip(0, columns - 1)          # at the edge one is looked at twice
            level, middle_y, middle_x = (centre[cell] for centre in centres)                      # (H, W) each
            squared = (grey - level)**2 + exchange * ((y - middle_y)**2 + (x - middle_x)**2)
            labels = numpy.where(squared < best, cell[0] * columns + cell[1], labels)
            best = numpy.minimum(best, squared)
        objectives.append(best.sum())
        pixels = numpy.bincount(labels.ravel(), minlength=rows * columns).reshape(rows, columns)
        for centre, feature in zip(centres, features):                   # a centre that nobody chose stays where it is
            total = numpy.bincount(labels.ravel(), feature.ravel(), rows * columns).reshape(rows, columns)
            numpy.divide(total, pixels, out=centre, where=pixels > 0)
    return labels, objectives


def _beginning(grey, row, column):
    """Return the first centres (3, rows, columns): middles of cells, moved to the smallest gradient of the 3×3 around, off edges."""
    y, x = numpy.meshgrid(*[means(numpy.arange(cell.size)[:, None], cell.reshape(-1, 1)) for cell in (row, column)], indexing='ij')
    framed, (H, W) = numpy.pad(grey, 1, mode='edge'), grey.shape
    gradient = (framed[2:, 1:-1] - framed[:-2, 1:-1])**2 + (framed[1:-1, 2:] - framed[1:-1, :-2])**2                # (H, W)
    near = numpy.array([[(y.astype(int) + down).clip(0, H - 1), (x.astype(int) + right).clip(0, W - 1)] for down, right in NINE])
    flattest = gradient[near[:, 0], near[:, 1]].argmin(axis=0)           # (rows, columns), numbers in NINE
    moved = numpy.take_along_axis(near, flattest[None, None], axis=0)[0]                          # (2, rows, columns)
    y, x = numpy.where(flattest > 0, moved, (y, x))
    return numpy.stack([grey[y.astype(int), x.astype(int)], y, x])


def joined(labels, smallest):
    """Return the 4-connected regions of `labels` (H, W), numbered 0 … K − 1 in reading order, without any below `smallest` pixels.

    A smaller one goes to the neighbour with which it shares the longest border, if that is the larger of the two; and so on, all at once.
    """
    region = regions(labels)
    while len(area := numpy.bincount(region.ravel())) > 1 and (is_small := area < smallest).any():
        edges, lengths = adjacency(region)
        a, b = numpy.concatenate([edges, edges[:, ::-1]]).T
        order, number, other = numpy.lexsort([-b, numpy.tile(lengths, 2)]), numpy.arange(len(area)), numpy.empty(len(area), int)
        other[a[order]] = b[order]                                       # that with the longest border comes last, and stays
        is_larger = (area[other] > area) | (area[other] == area) & (other > number)
        into = numpy.where(is_small & is_larger, other, number)
        while (into != into[into]).any():
            into = into[into]
        region = regions(into[region])
    return region


def adjacency(labels):
    """Return (edges, lengths): the pairs (edges, 2), a < b, of `labels` (H, W) that touch, and how many pairs of pixels do at each."""
    labels = _labels(labels)
    sides = numpy.concatenate([numpy.stack([labels[:, :-1].ravel(), labels[:, 1:].ravel()], -1),
                               numpy.stack([labels[:-1].ravel(), labels[1:].ravel()], -1)])       # (pairs, 2)
    return numpy.unique(numpy.sort(sides[sides[:, 0] != sides[:, 1]], axis=1), axis=0, return_counts=True)


def means(values, labels):
    """Return the mean of `values` (H, W, …) in each superpixel, (K, …); NaN for a label that no pixel has. Raises ValueError."""
    labels, values = _labels(labels), numpy.asarray(values)
    if values.shape[:2] != labels.shape:
        raise ValueError(f'values {values.shape} and labels {labels.shape} differ in height or width')
    sums = [numpy.bincount(labels.ravel(), channel) for channel in values.reshape(labels.size, -1).T]
    pixels = numpy.bincount(labels.ravel()).astype(float)
    pixels[pixels == 0] = numpy.nan
    return (numpy.stack(sums, -1) / pixels[:, None]).reshape(-1, *values.shape[2:])


def _labels(labels):
    labels = numpy.asarray(labels)
    if labels.ndim != 2 or labels.dtype.kind not in 'iu' or labels.size == 0 or labels.min() < 0:
        raise ValueError(f'labels have shape {labels.shape} and dtype {labels.dtype}; expected (H, W) of whole numbers from 0 up')
    return labels.astype(numpy.int64)
