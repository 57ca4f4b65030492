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
    """Return pairs of slices (images, rows) of about `rows_per_block` rows, of several small images or of one."""
    if rows_per_block < rows:
        return [(image, strip) for image in cut(images, 1) for strip in cut(rows, rows_per_block)]
    return [(several, slice(0, rows)) for several in cut(images, rows_per_block // rows)]


def padded_strip(x, images, top, left, height, width, name='strip'):
    """Return x[images] (n, height, width, C) from row `top` and column `left` on, zeros where that lies outside the
    image.

    The result is scratch memory: it lasts until this thread asks for its next strip.
    """
    x = x[images]
    n, H, W, C = x.shape
    strip = scratch(name, (n, height, width, C), x.dtype)
    # The rows a to b and the columns c to d of the strip lie inside the image.
    (a, b), (c, d) = ((min(max(0, -start), size), max(0, min(length - start, size)))
                      for start, size, length in ((top, height, H), (left, width, W)))
    strip[:, :a] = 0
    strip[:, b:] = 0
    strip[:, a:b, :c] = 0
    strip[:, a:b, d:] = 0
    strip[:, a:b, c:d] = x[:, top + a:top + b, left + c:left + d]
    return strip


def sum_in_parts(strips, channels, term, finish=lambda total: total):
    """Return the weight gradient: Σ finish(Σ term(strip, within)) for each slice `within` of `channels`, side by side.

    The inner sum runs over neighbouring strips, in one block; the outer one over at most PARTIAL_SUMS such blocks.
    `finish` is linear and returns a part (KH, KW, channels, C_out) of the gradient. A term must be a fresh array.
    """
    groups = cut(len(strips), -(-len(strips) * len(channels) // PARTIAL_SUMS))

    def work(block):
        within, group = block
        total = term(strips[group.start], within)
        for strip in strips[group][1:]:
            total += term(strip, within)
        return finish(total)

    partial = parallel_for([(within, group) for within in channels for group in groups], work)
    sums = [sum(partial[start:start + len(groups)]) for start in range(0, len(partial), len(groups))]
    return sums[0] if len(sums) == 1 else numpy.concatenate(sums, axis=2)
