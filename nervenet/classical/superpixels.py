"""Superpixels: an image as a few hundred small regions of even grey, so that what is slow for pixels becomes quick.

SLIC, "simple linear iterative clustering", is k-means on points (grey level, row, column). With centres C_k, one per cell of a grid with
cells S pixels wide, each pixel p joins the centre with the least

    D² = (I_p − I_k)² + (m / S)² · ((y_p − y_k)² + (x_p − x_k)²)

and each centre moves to the mean of its pixels; and so on. Both steps lower the sum of all D², or leave it. The compactness m is the
exchange rate: m grey levels are worth a whole step S of way. Large m gives squares, small m follows edges.

Lay a net over the image and let go: each mesh creeps up to the edges near it, and no further, for going far costs.

Source: Achanta, Shaji, Smith, Lucchi, Fua and Süsstrunk 2012, "SLIC superpixels compared to state-of-the-art superpixel methods". Grey levels
are in percent, as the lightness of CIELAB that they compare, so that their m, from 1 to 40, means the same. They let each centre search
2S × 2S pixels. Here each *pixel* looks at nine centres, those of the grid cell it lies in and of the eight around it, which never change:
nine operations on whole images, and the objective provably never rises. What becomes of stray pixels (`joined`) is our choice.
"""

import math

import numpy

from ..checks import positive
from .graph_cut import regions


def slic(image, step=12, compactness=10.0, iterations=10):
    """Return labels (H, W) int64, 0 … K − 1: superpixels about `step` pixels wide, each 4-connected, none below step² / 4 pixels.

    `image` (H, W) holds intensities in [0, 1], best without speckle (`median_filter`). Raises ValueError.
    """
    return joined(clusters(image, step, compactness, iterations)[0], step**2 / 4)


def clusters(image, step, compactness, iterations):
    """Return (labels, objectives): labels (H, W), not connected yet, numbers of grid cells in reading order; and ΣD² of each iteration."""
    image, step, iterations = numpy.asarray(image), positive(step, 'step', 2), positive(iterations, 'iterations')
    if image.ndim != 2 or image.dtype.kind != 'f' or image.size == 0:
        raise ValueError(f'image has shape {image.shape} and dtype {image.dtype}; expected (H, W) of floats: divide grey levels by 255')
    if not (image.min() >= 0 and image.max() <= 1):                      # also for NaN
        raise ValueError(f'image holds values from {image.min()} to {image.max()}; expected 0 to 1: divide grey levels by 255')
    if not 0 < compactness < math.inf:
        raise ValueError(f'compactness is {compactness}; expected a number above 0, 10 as a rule')
    grey, (H, W) = 100 * image.astype(numpy.float64), image.shape
    rows, columns = max(1, round(H / step)), max(1, round(W / step))
    y, x = numpy.arange(H)[:, None], numpy.arange(W)[None, :]
    row, column = y * rows // H, x * columns // W                        # (H, 1) and (1, W): the cell of a pixel
    exchange = compactness**2 * rows * columns / (H * W)                 # (m / S)²
    features = numpy.stack(numpy.broadcast_arrays(grey, y, x))           # (3, H, W)

    # At the image's edge, where cells are missing, one that is there is looked at twice.
    nine = [(numpy.clip(row + down, 0, rows - 1), numpy.clip(column + right, 0, columns - 1))
            for down, right in ((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1), (-1, -1), (-1, 1), (1, -1), (1, 1))]
    centres, objectives = _beginning(grey, row, column), []
    for _ in range(iterations):
        best, labels = numpy.full((H, W), math.inf), numpy.zeros((H, W), numpy.int64)
        for cell in nine:
            level, down, right = (centre[cell] for centre in centres)                             # (H, W) each
            squared = (grey - level)**2 + exchange * ((y - down)**2 + (x - right)**2)
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
    middles = [numpy.array([numpy.flatnonzero(cell.ravel() == k).mean() for k in range(cell.max() + 1)]) for cell in (row, column)]
    y, x = numpy.meshgrid(*middles, indexing='ij')                       # (rows, columns)
    framed = numpy.pad(grey, 1, mode='edge')
    gradient = (framed[2:, 1:-1] - framed[:-2, 1:-1])**2 + (framed[1:-1, 2:] - framed[1:-1, :-2])**2                # (H, W)
    (H, W), top, left = grey.shape, y.astype(int), x.astype(int)
    least = gradient[top, left]
    for down, right in numpy.ndindex(3, 3):
        near_y, near_x = numpy.clip(top + down - 1, 0, H - 1), numpy.clip(left + right - 1, 0, W - 1)
        slope = gradient[near_y, near_x]
        flatter = slope < least
        y[flatter], x[flatter], least = near_y[flatter], near_x[flatter], numpy.minimum(least, slope)
    return numpy.stack([grey[y.astype(int), x.astype(int)], y, x])


def joined(labels, smallest):
    """Return the 4-connected regions of `labels` (H, W), numbered 0 … K − 1 in reading order, without any below `smallest` pixels.

    A smaller one goes to the neighbour with which it shares the longest border; the smallest goes first.
    """
    region = regions(labels)
    areas, into = numpy.bincount(region.ravel()).tolist(), numpy.arange(region.max() + 1)
    borders = [{} for _ in areas]                                        # region → its neighbours → length of the border
    for (a, b), length in zip(*(array.tolist() for array in adjacency(region))):
        borders[a][b] = borders[b][a] = length
    for a in sorted(range(len(areas)), key=areas.__getitem__):
        if areas[a] < smallest and borders[a]:                           # it may have grown meanwhile
            b = max(borders[a], key=lambda other: (borders[a][other], -other))
            into[a] = b
            areas[b] += areas[a]
            for other, length in borders[a].items():
                del borders[other][a]
                if other != b:
                    borders[b][other] = borders[other][b] = borders[b].get(other, 0) + length
    while (into != into[into]).any():
        into = into[into]
    return regions(into[region])


def adjacency(labels):
    """Return (edges, lengths): the pairs (edges, 2), a < b, of `labels` (H, W) that touch, and how many pairs of pixels each border parts."""
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
