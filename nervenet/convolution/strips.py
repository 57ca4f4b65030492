"""Strips of padded images, and sums over them, for the fast paths beside this file."""

import numpy

from ..engine.memory import empty, scratch
from ..engine.parallel import cut, parallel_for
from ..engine.paths import note
from ..engine.pixelwise import for_rows

PARTIAL_SUMS = 8                        # at most; a fixed number, because a sum's last bits depend on its order


def parts_of(x):
    """Return the arrays whose channels, side by side, are the input: x itself, or those of the tuple x. Raises ValueError if they do not fit."""
    parts = x if isinstance(x, tuple) else (x,)
    for part in parts[1:]:
        if part.shape[:3] != parts[0].shape[:3] or part.dtype != parts[0].dtype:
            raise ValueError(f'cannot join {parts[0].shape} of {parts[0].dtype} and {part.shape} of {part.dtype}: they differ before the '
                             'channels, or in their dtype; pad or crop one of them')
    return parts


def pieces(parts, within):
    """Yield (view, slice) for the channels `within` of arrays side by side: a part's share of them, and their place among them."""
    start = 0
    for part in parts:
        first, last = max(within.start, start), min(within.stop, start + part.shape[3])
        if first < last:
            yield part[..., first - start:last - start], slice(first - within.start, last - within.start)
        start += part.shape[3]


def overlapping(x, shape, strides, offset=0):
    """Return a view of the memory of x, which must be contiguous, from `offset` bytes on. (NumPy's `as_strided` takes five times as long.)"""
    return numpy.ndarray(shape, x.dtype, x, offset, strides)


def followed(y, then):
    """Return y, with then(block, y[block]) called for blocks that cover it, where `then` is given and could not be called any earlier."""
    if then:
        for_rows(y, lambda block: then(block, y[block]))
    return y


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


def sum_in_parts(shape, x, strips, channels, term, finish=lambda total: total):
    """Return the weight gradient, of this shape (KH, KW, C_in, C_out) and the dtype of x.

    Its input channels `within`, for each slice of `channels`, are Σ finish(Σ term(strip, within)). The inner sum runs
    over neighbouring strips, in one block; the outer one over at most PARTIAL_SUMS such blocks. `finish` is linear. A
    term must be a fresh array.
    """
    groups = cut(len(strips), -(-len(strips) * len(channels) // PARTIAL_SUMS))
    dweight = empty(shape, x)
    if any(len(strips[group]) > 1 for group in groups):
        note('strips summed in groups')
    if len(groups) > 1:
        note('partial sums')

    def work(block):
        within, group = block
        total = term(strips[group.start], within)
        for strip in strips[group][1:]:
            total += term(strip, within)
        part = finish(total).reshape(*shape[:2], -1, shape[3])
        if group.start > 0:
            return part
        dweight[:, :, within] = part                    # the first part is where the others will be added

    blocks = [(within, group) for within in channels for group in groups]
    for (within, group), part in zip(blocks, parallel_for(blocks, work)):
        if group.start > 0:
            dweight[:, :, within] += part
    return dweight
