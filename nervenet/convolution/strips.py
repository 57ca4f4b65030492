"""Cutting a convolution into blocks that fit the cache, for the fast paths beside this file."""

import numpy

from ..parallel import parallel_for, scratch

PARTIAL_SUMS = 8                        # at most; a fixed number, because a sum's last bits depend on its order


def cut(length, size):
    """Return slices that cover range(length) in nearly equal parts of at most `size`, at least one each."""
    parts = -(-length // max(1, size))
    edges = [length * part // parts for part in range(parts + 1)]
    return [slice(start, stop) for start, stop in zip(edges, edges[1:])]


def cut_images(images, rows, rows_per_block):
    """Return pairs of slices (images, rows): about `rows_per_block` rows each, of several images where images are small."""
    if rows_per_block < rows:
        return [(image, strip) for image in cut(images, 1) for strip in cut(rows, rows_per_block)]
    return [(several, slice(0, rows)) for several in cut(images, rows_per_block // rows)]


def padded_strip(x, images, top, left, height, width, name='strip'):
    """Return x[images] (n, height, width, C) from row `top` and column `left` on, zeros where that lies outside the image.

    The result is scratch memory: it lasts until this thread asks for its next strip.
    """
    x = x[images]
    n, H, W, C = x.shape
    strip = scratch(name, (n, height, width, C), x.dtype)
    first, last = sorted((0, -top, height))[1], sorted((0, H - top, height))[1]       # the rows of the strip inside the image
    left_end, right_end = sorted((0, -left, width))[1], sorted((0, W - left, width))[1]
    strip[:, :first] = 0
    strip[:, last:] = 0
    strip[:, first:last, :left_end] = 0
    strip[:, first:last, right_end:] = 0
    strip[:, first:last, left_end:right_end] = x[:, top + first:top + last, left + left_end:left + right_end]
    return strip


def sum_in_parts(strips, channels, term, finish=lambda total: total):
    """Return the weight gradient Σ finish(Σ term(strip, within)) for each slice `within` of `channels`, joined along axis 2.

    The inner sum runs over neighbouring strips, in one block; the outer one over at most PARTIAL_SUMS such blocks. `finish` is a
    linear map that makes a partial sum smaller.
    """
    groups = cut(len(strips), -(-len(strips) * len(channels) // PARTIAL_SUMS))

    def work(block):
        within, group = block
        total = numpy.array(term(strips[group.start], within))               # a copy: the term may be scratch memory
        for strip in strips[group][1:]:
            total += term(strip, within)
        return finish(total)

    partial = parallel_for([(within, group) for within in channels for group in groups], work)
    sums = [sum(partial[start:start + len(groups)]) for start in range(0, len(partial), len(groups))]
    return sums[0] if len(sums) == 1 else numpy.concatenate(sums, axis=2)
