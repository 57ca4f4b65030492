"""Strips of padded images, and sums over them, for the fast paths beside this file."""

from functools import partial

import numpy

from ..engine.calls import run
from ..engine.memory import empty, scratch
from ..engine.parallel import cut
from ..engine.paths import note
from ..engine.pixelwise import for_rows

SUMMED_VALUES = 2**17                   # of one block, where partial sums are added
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
    """Return y, with the calls of `then` made for blocks that cover it, where `then` is given and could not be followed any earlier."""
    if then:
        for_rows(y, following, y, then)
    return y


def following(block, y, then):
    """List the calls of `then` for this block of y."""
    return then[0](block, y[block], *then[1:])


def padded_strip(x, images, top, left, height, width, name='strip'):
    """List the calls that make x[images] (n, height, width, C) from row `top` and column `left` on, zeros where that lies outside the
    image; return it.

    The result is scratch memory: it lasts until the next strip of this name.
    """
    x = x[images]
    n, H, W, C = x.shape
    strip = scratch(name, (n, height, width, C), x.dtype)
    # The rows a to b and the columns c to d of the strip lie inside the image.
    (a, b), (c, d) = ((min(max(0, -start), size), max(0, min(length - start, size)))
                      for start, size, length in ((top, height, H), (left, width, W)))
    for outside in strip[:, :a], strip[:, b:], strip[:, a:b, :c], strip[:, a:b, d:]:
        if outside.size:
            yield partial(numpy.copyto, outside, 0)
    yield partial(numpy.copyto, strip[:, a:b, c:d], x[:, top + a:top + b, left + c:left + d])
    return strip


def _as_it_is(total, out):
    yield partial(numpy.copyto, out, total.reshape(out.shape))


def sum_in_parts(shape, x, strips, channels, term, *arguments, finish=_as_it_is):
    """Return the weight gradient, of this shape (KH, KW, C_in, C_out) and the dtype of x.

    Its input channels `within`, for each slice of `channels`, are Σ finish(Σ term(strip, within)). The inner sum runs
    over neighbouring strips, in one block; the outer one over at most PARTIAL_SUMS such blocks.

    term     `term(strip, within, name, *arguments)` lists the calls that compute a term, and returns it, in scratch memory of this name
    finish   `finish(total, out)` lists the calls that write a linear function of the sum of terms into `out`; by default, the sum itself
    """
    groups = cut(len(strips), -(-len(strips) * len(channels) // PARTIAL_SUMS))
    parts = [empty(shape, x) for _ in groups]
    if any(len(strips[group]) > 1 for group in groups):
        note('strips summed in groups')
    if len(groups) > 1:
        note('partial sums')
    blocks = [(within, strips[group], number) for within in channels for number, group in enumerate(groups)]
    run(_part, blocks, tuple(parts), term, finish, *arguments)
    if len(parts) > 1:
        rows = tuple(part.reshape(-1, shape[3]) for part in parts)
        run(_sum_of_parts, cut(len(rows[0]), max(1, SUMMED_VALUES // shape[3])), rows)
    return parts[0]


def _part(block, parts, term, finish, *arguments):
    within, strips, number = block
    total = yield from term(strips[0], within, 'total', *arguments)
    for strip in strips[1:]:
        another = yield from term(strip, within, 'term', *arguments)
        yield partial(numpy.add, total, another, out=total)
    yield from finish(total, parts[number][:, :, within])


def _sum_of_parts(rows, parts):
    first, *others = (part[rows] for part in parts)
    for other in others:
        yield partial(numpy.add, first, other, out=first)
