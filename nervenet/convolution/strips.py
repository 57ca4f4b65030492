"""Strips of padded images, sums over them, and products of tall matrices, for the fast paths beside this file."""

from functools import partial

import numpy

from ..engine.calls import run
from ..engine.memory import empty, scratch
from ..engine.parallel import cut, cut_into
from ..engine.paths import note
from ..engine.pixelwise import for_rows

SUMMED_VALUES = 2**17                   # of one block, where partial sums are added
PARTIAL_SUMS = 8                        # at most; a fixed number, because a sum's last bits depend on its order
# A product (rows, K) @ (K, N) is made some rows at a time. OpenBLAS multiplies small matrices as they lie, on processors with AVX-512; those
# of more than a million multiplications it rearranges first, which takes as long again where K or N is small. It takes rows by twelves.
PIECE = 768 * 1024                      # multiplications of a piece, at most
PIECE_VALUES = 12 * 1024                # rows times K of a piece, at most: 48 KiB of float32 stay in a core's first cache
LEAST_ROWS = 48                         # of a piece: for fewer it does not pay to read the other matrix again
NARROW = 32                             # columns that the other matrix may have to be read again for as few as twelve rows


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


def _pieces_of_rows(number, K, N, least):
    """Return slices, and how many equal pieces to cut each into, that cover the rows of a product (number, K) @ (K, N); of at least so many."""
    most = min(PIECE_VALUES // K, PIECE // (K * N)) // 12 * 12
    if number <= most or most < least:
        return _whole(number)
    rows = next((rows for rows in range(most, max(most // 2, LEAST_ROWS - 1), -1) if number % rows == 0), most)
    whole = number // rows * rows
    return [(slice(0, whole), whole // rows)] + ([(slice(whole, number), 1)] if whole < number else [])


def _whole(number):
    return [(slice(0, number), 1)]


def _cut_rows(x, rows, count):
    """Return these rows of x (…, M, K) as a view (…, count, rows, K)."""
    x = x[..., rows, :]
    return x.reshape(*x.shape[:-2], count, -1, x.shape[-1])


def multiply(a, b, out):
    """List the calls that write a @ b, (…, M, K) @ (…, K, N) or (K, N), into `out` (…, M, N), some rows at a time."""
    (M, K), N = a.shape[-2:], b.shape[-1]
    for rows, count in _pieces_of_rows(M, K, N, 12 if N <= NARROW else LEAST_ROWS) if M * K * N > PIECE else _whole(M):
        yield partial(numpy.matmul, _cut_rows(a, rows, count), b if b.ndim == 2 else b[..., None, :, :], out=_cut_rows(out, rows, count))


def sum_products(a, b, out):
    """List the calls that write Σ aᵀ @ b into `out`: the sum over the first axis of a (S, …, M, K) and b (S, …, M, N).

    `out` has the values of (…, K, N) in any shape; for a sum of one term they must lie side by side. Some rows at a time make a term each,
    in scratch memory, and the terms are added in the end.
    """
    (S, *others, M, K), N = a.shape, b.shape[-1]
    pieces = _pieces_of_rows(M, K, N, LEAST_ROWS)
    number, start = S * sum(count for _, count in pieces), 0
    terms = scratch('terms', (number, *others, K, N), out.dtype) if number > 1 else out.reshape(1, *others, K, N)
    for rows, count in pieces:
        some = terms[start:start + S * count].reshape(S, count, *others, K, N)
        yield partial(numpy.matmul, numpy.moveaxis(_cut_rows(a, rows, count), -3, 1).swapaxes(-2, -1),
                      numpy.moveaxis(_cut_rows(b, rows, count), -3, 1), out=some)
        start += S * count
    if number > 1:
        yield partial(numpy.add.reduce, terms.reshape(number, *out.shape), axis=0, out=out)


def _as_it_is(total, out):
    yield partial(numpy.copyto, out, total.reshape(out.shape))


def sum_in_parts(shape, x, strips, channels, term, *arguments, finish=_as_it_is):
    """Return the weight gradient, of this shape (KH, KW, C_in, C_out) and the dtype of x.

    Its input channels `within`, for each slice of `channels`, are Σ finish(Σ term(strip, within)). The inner sum runs
    over neighbouring strips, in one block; the outer one over at most PARTIAL_SUMS such blocks.

    term     `term(strip, within, name, *arguments)` lists the calls that compute a term, and returns it, in scratch memory of this name
    finish   `finish(total, out)` lists the calls that write a linear function of the sum of terms into `out`; by default, the sum itself
    """
    groups = cut_into(min(len(strips), max(1, PARTIAL_SUMS // len(channels))), len(strips))
    total, others = empty(shape, x), empty((len(groups) - 1, *shape), x)
    if any(len(strips[group]) > 1 for group in groups):
        note('strips summed in groups')
    if len(groups) > 1:
        note('partial sums')
    blocks = [(within, strips[group], number) for within in channels for number, group in enumerate(groups)]
    run(_part, blocks, total, others, term, finish, *arguments)
    if len(others):
        flat = total.reshape(-1, shape[3])
        run(_sum_of_parts, cut(len(flat), max(1, SUMMED_VALUES // shape[3])), flat, others.reshape(len(others), -1, shape[3]))
    return total


def _part(block, first, others, term, finish, *arguments):
    within, strips, number = block
    total = yield from term(strips[0], within, 'total', *arguments)
    for strip in strips[1:]:
        another = yield from term(strip, within, 'term', *arguments)
        yield partial(numpy.add, total, another, out=total)
    yield from finish(total, (others[number - 1] if number else first)[:, :, within])


def _sum_of_parts(rows, total, others):
    for other in others:
        yield partial(numpy.add, total[rows], other[rows], out=total[rows])
