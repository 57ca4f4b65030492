"""Formulas that treat every value by itself, and sums over pixels: in pieces that stay in the cache, on all cores.

NumPy computes `(x - mean) * scale + bias` in three passes over memory, on one core, and makes two arrays as large as x on the way.
Memory is slow: an operation on a number in the cache costs a tenth of fetching it, and memory fresh from the system costs even
more. So cut the values into blocks small enough to stay in the cache from one operation to the next, and let the
formula work in the block of the result:

    def normalize(x, mean, scale, out=None):
        return numpy.multiply(numpy.subtract(x, mean, out=out), scale, out=out)

    normalize(x, mean, scale)                               the plain formula
    in_blocks(normalize, x, channels=(mean, scale))         the same, bit for bit, in blocks

The operations are the same; only the walk over memory changes, and `parallel_for` shares the blocks among the cores.

`channels` are vectors (C,), one constant per channel. NumPy adds a vector of 16 to rows of 16 in steps of 16, which takes longer to
set up than to do. So a block has rows of many pixels, and vectors are repeated to the same length.

Two threads that run Python take turns, and each turn costs as much as a pass over a few thousand values. So a block is as large
as the cache allows, and is treated in few, long operations: a sum over its rows is one product with a vector of ones, a sum of
products is one einsum.

Sums over pixels are made of block sums: inside a block in the dtype of the data, at most CHAIN values in a row, between blocks
in float64. That is nearly as exact as float64 throughout, at the speed of the data's own dtype.

What is no real NumPy array (a device array, or complex numbers) is computed in one piece by the same formulas.
"""

import itertools
import math
from functools import lru_cache, partial

import numpy

from .backend import get_array_module
from .calls import make, run, run_once
from .communicator import total, whole_batch
from .memory import empty, scratch
from .parallel import block_size, cut, cut_images
from .paths import note, only_plain

BLOCK_VALUES = 2**18            # 1 MiB of float32
HALF_VALUES = 2**17             # of each of two blocks, where there are no more
ROW_VALUES = 2**12              # values in a row, at most, where pixels are joined
CHAIN = 128                     # values added in a row before their sum goes on in float64
FAR = 16                        # mean² / variance beyond which Σx² − n·m² has lost too many digits: it costs four bits
_LIKE = numpy.empty(0)          # its dtype is float64


def in_blocks(formula, *arrays, channels=()):
    """Return `formula(*arrays, *channels)`, a new array: arrays and result (N, H, W, C) of one dtype, channels (C,).

    The formula treats every value by itself, and writes its result into the array `out` if it is given one. It is called with
    blocks of the arrays, and with `channels` repeated to fit. If it is a function of a module, its calls are listed once (`calls.py`); one
    that is made anew in each step, such as a lambda, costs some time.
    """
    if only_plain():
        return formula(*arrays, *channels)
    y = empty(arrays[0].shape, arrays[0])
    if not are_real_numpy(*arrays):
        formula(*arrays, *channels, out=y)
        return y
    (*flat, out), vectors, blocks = _cut([*arrays, y], channels)
    run(_formula, blocks, formula, tuple(flat), vectors, out)
    return y


def _formula(block, formula, arrays, vectors, out):
    yield partial(formula, *(array[block] for array in arrays), *vectors, out=out[block])


def repeated(vector, times):
    """Return the vector (C,) so many times in a row, (times·C,): NumPy adds long rows faster than short ones."""
    y = empty((times, len(vector)), vector)
    y[...] = vector
    return y.reshape(-1)


def add(a, b):
    """Return a + b, both (N, H, W, C)."""
    return in_blocks(get_array_module(a).add, a, b)


def for_rows(x, calls, *arguments):
    """Make the calls that `calls((images, rows), *arguments)` yields, for slices that together cover the images and rows of x (N, H, W, C)."""
    N, H, W, C = x.shape
    if get_array_module(x) is not numpy:
        make(calls((slice(None), slice(None)), *arguments))
        return
    rows = block_size(N * H, max(1, BLOCK_VALUES // (W * C)), HALF_VALUES // (W * C))
    run(calls, cut_images(N, H, rows), *arguments)


def side_by_side(a, *others):
    """Return the channels of all arrays (N, H, W, ·) side by side, (N, H, W, sum of them); a single one as it is."""
    if not others:
        return a
    edges = (0, *itertools.accumulate(part.shape[3] for part in (a, *others)))
    y = empty((*a.shape[:3], edges[-1]), a)
    for_rows(y, _join, (a, *others), y, edges)
    return y


def _join(block, parts, y, edges):
    for part, start, stop in zip(parts, edges, edges[1:]):
        yield partial(copy_into, y[block][..., start:stop], part[block])


def apart(y, *channels):
    """Return copies of the first so many channels of y, of the next so many, …: the way back of `side_by_side`."""
    parts = tuple(empty((*y.shape[:3], C), y) for C in channels)
    for_rows(y, _part, parts, y, (0, *itertools.accumulate(channels)))
    return parts


def _part(block, parts, y, edges):
    for part, start, stop in zip(parts, edges, edges[1:]):
        yield partial(copy_into, part[block], y[block][..., start:stop])


def copy_into(y, x):
    """Copy x into y, on whatever device they are."""
    y[...] = x


def channel_sums(a, *others):
    """Return a list of sums over all pixels, (C,) each in float64: Σa, and Σa·b for each b of `others`; all (N, H, W, C)."""
    if not are_real_numpy(a, *others):
        return [values.sum(axis=(0, 1, 2), dtype=_accurate(values)) for values in (a, *(a * b for b in others))]
    flat, _, blocks = _cut([a, *others])
    return list(_sums_of_blocks(tuple(flat), blocks, a.shape[3]).sum(axis=1))


def _sums_of_blocks(arrays, blocks, C):
    """Return Σy, and Σy·x for each other x, of each block of rows of the arrays (rows, pixels·C): (·, blocks, C), in float64."""
    sums = empty((len(arrays), len(blocks), C), _LIKE)
    run(_sum_calls, list(enumerate(blocks)), arrays, sums)
    return sums


def _sum_calls(block, arrays, sums):
    number, rows = block
    yield from _sums([array[rows] for array in arrays], sums[:, number])


def in_blocks_with_sums(formula, a, b, x):
    """Return (y, [Σy, Σy·x]): y = formula(a, b) as `in_blocks` computes it, and its `channel_sums`, taken while y is in the cache."""
    y = empty(a.shape, a)
    (*flat, out), _, blocks = _cut([a, b, x, y])
    sums = empty((2, len(blocks), a.shape[3]), _LIKE)
    run(_formula_and_sums, list(enumerate(blocks)), formula, tuple(flat), out, sums)
    return y, list(sums.sum(axis=1))


def _formula_and_sums(block, formula, arrays, out, sums):
    number, rows = block
    a, b, x = (array[rows] for array in arrays)
    yield partial(formula, a, b, out=out[rows])
    yield from _sums([out[rows], x], sums[:, number])


def pixels_of_batch(x):
    """Return how many pixels the whole batch has that x (N, H, W, C) is in, or of which it is this process's share."""
    return math.prod(whole_batch(x)[0][:3])


def channel_moments(x):
    """Return (mean, variance) of x (N, H, W, C) over all pixels, (C,) each, in float64. The variance divides by N·H·W.

    Where processes share a batch, these are the moments of the whole batch: the sums over blocks are sums over those of all processes.

    One walk over x: each block of n pixels has a mean m and a sum of squares about it, Σx² − n·m². The squares about the common mean are
    those about m, plus n times the square of m's distance from it: Σ(x − mean)² = Σ(x − m)² + n·(m − mean)² (Chan, Golub & LeVeque 1979).
    Where a mean is far from 0, as its spread goes, Σx² − n·m² is the small difference of large numbers; then x − m is squared instead, in
    a second walk.
    """
    M = pixels_of_batch(x)
    if not are_real_numpy(x):
        mean = total(x.sum(axis=(0, 1, 2), dtype=_accurate(x)))[0] / M
        squares = get_array_module(x).square(x - mean.astype(x.dtype)).sum(axis=(0, 1, 2), dtype=_accurate(x))
        return mean, total(squares)[0] / M
    (flat,), _, blocks = _cut([x])
    C = x.shape[3]
    n = numpy.array([[(block.stop - block.start) * flat.shape[1] // C] for block in blocks], 'float64')                  # (blocks, 1)
    sums = _sums_of_blocks((flat, flat), blocks, C)
    m, squares = sums[0] / n, sums[1] - sums[0] * sums[0] / n                # (blocks, C) each
    about = (squares + n * (m - (n * m).sum(axis=0) / n.sum())**2).sum(axis=0)              # the common mean of this process's blocks
    if ((n * m * m).sum(axis=0) > FAR * about).any() or not numpy.isfinite(about).all():
        centres, sums = m.astype(x.dtype), numpy.empty_like(sums)
        run_once(_centred_calls, list(enumerate(blocks)), flat, centres, sums)
        m, squares = centres + sums[0] / n, sums[1] - sums[0] * sums[0] / n
    mean = total((n * m).sum(axis=0))[0] / M
    return mean, total((squares + n * (m - mean)**2).sum(axis=0))[0] / M


def _centred_calls(block, flat, centres, sums):
    """Write Σ(x − centre) and Σ(x − centre)² of a block."""
    number, rows = block
    centred = scratch('pixelwise', flat[rows].shape, flat.dtype)
    repeated_centres = scratch('centres', (flat.shape[1] // centres.shape[1], centres.shape[1]), flat.dtype)
    yield partial(numpy.copyto, repeated_centres, centres[number])
    yield partial(numpy.subtract, flat[rows], repeated_centres.reshape(-1), out=centred)
    yield from _sums((centred, centred), sums[:, number])


def are_real_numpy(*arrays):
    """Say whether all of these are images (N, H, W, C) of real numbers in the memory of the host, with something in them."""
    return all(type(array) is numpy.ndarray and array.ndim == 4 and array.size and array.dtype.kind == 'f' for array in arrays)


def _sums(arrays, sums):
    """List the calls that write Σy, and Σy·x for each other x, over the pixels of arrays (rows, pixels·C), into `sums` (·, C)."""
    (y, *others), C = arrays, sums.shape[1]
    chains = scratch('chains', (1 + len(others), y.shape[1]), y.dtype if len(y) <= CHAIN else 'float64')
    yield partial(numpy.matmul, numpy.ones(len(y), chains.dtype), y, out=chains[0])
    for chain, other in zip(chains[1:], others):
        yield partial(numpy.einsum, 'rc,rc->c', y, other, out=chain, dtype=chains.dtype)
    yield partial(numpy.add.reduce, chains.reshape(len(chains), -1, C), axis=1, dtype='float64', out=sums)


@lru_cache(maxsize=1024)
def _pixels_in_a_row(pixels, C):
    """Return the largest divisor of `pixels` of which a row is no longer than ROW_VALUES, or 1."""
    return next(number for number in range(max(1, ROW_VALUES // C), 0, -1) if pixels % number == 0)


def _accurate(values):
    return get_array_module(values).result_type(values.dtype, 'float64')


def _cut(arrays, channels=()):
    """Return the arrays as rows of some pixels each, the channels repeated to fit, and slices of rows."""
    C = arrays[0].shape[3]
    pixels = arrays[0].size // C
    joined = _pixels_in_a_row(pixels, C) if all(array.flags.c_contiguous for array in arrays) else 1
    flat = [array.reshape(pixels // joined, joined * C) for array in arrays]
    blocks = cut(len(flat[0]), block_size(len(flat[0]), max(1, BLOCK_VALUES // (joined * C)), HALF_VALUES // (joined * C)))
    if len(blocks) > 1:
        note('blocks of pixels')
    return flat, tuple(repeated(vector, joined) for vector in channels), blocks
