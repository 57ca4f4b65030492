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

import numpy

from .backend import get_array_module
from .memory import empty, scratch
from .parallel import cut_images, parallel_for
from .paths import note, only_plain

BLOCK_VALUES = 2**18            # 1 MiB of float32
ROW_VALUES = 2**12              # values in a row, at most, where pixels are joined
CHAIN = 128                     # values added in a row before their sum goes on in float64


def in_blocks(formula, *arrays, channels=()):
    """Return `formula(*arrays, *channels)`, a new array: arrays and result (N, H, W, C) of one dtype, channels (C,).

    The formula treats every value by itself, and writes its result into the array `out` if it is given one. It is called with
    blocks of the arrays, and with `channels` repeated to fit.
    """
    if only_plain():
        return formula(*arrays, *channels)
    y = empty(arrays[0].shape, arrays[0])
    if not _are_real_numpy(arrays):
        formula(*arrays, *channels, out=y)
        return y
    flat, repeated, blocks = _cut([*arrays, y], channels)
    parallel_for(blocks, lambda block: formula(*(array[block] for array in flat[:-1]), *repeated, out=flat[-1][block]))
    return y


def add(a, b):
    """Return a + b, both (N, H, W, C)."""
    return in_blocks(get_array_module(a).add, a, b)


def for_rows(x, work):
    """Call `work((images, rows))` with slices that together cover the images and rows of x (N, H, W, C)."""
    N, H, W, C = x.shape
    on_host = get_array_module(x) is numpy
    parallel_for(cut_images(N, H, BLOCK_VALUES // (W * C)) if on_host else [(slice(None), slice(None))], work)


def channel_sums(a, *others):
    """Return a list of sums over all pixels, (C,) each in float64: Σa, and Σa·b for each b of `others`; all (N, H, W, C)."""
    if not _are_real_numpy([a, *others]):
        return [values.sum(axis=(0, 1, 2), dtype=_accurate(values)) for values in (a, *(a * b for b in others))]
    C = a.shape[3]
    flat, _, blocks = _cut([a, *others])

    def work(block):
        values, *factors = (array[block] for array in flat)
        return [_sum(values, C), *(_sum_of_products(values, factor, C) for factor in factors)]

    return [numpy.sum(parts, axis=0) for parts in zip(*parallel_for(blocks, work))]


def channel_moments(x):
    """Return (mean, variance) of x (N, H, W, C) over all pixels, (C,) each, in float64. The variance divides by N·H·W.

    One walk over x: each block has a mean m and a sum of squares about it. The squares about the common mean are those about m,
    plus n times the square of m's distance from it: Σ(x − mean)² = Σ(x − m)² + n·(m − mean)². Nothing large is subtracted from
    something large, as it would be in Σx² − n·mean² (Chan, Golub & LeVeque 1979).
    """
    C, M = x.shape[3], x.size // x.shape[3]
    if not _are_real_numpy([x]):
        mean = x.mean(axis=(0, 1, 2), dtype=_accurate(x))
        return mean, get_array_module(x).square(x - mean.astype(x.dtype)).mean(axis=(0, 1, 2), dtype=_accurate(x))
    (flat,), _, blocks = _cut([x])

    def work(block):
        values = flat[block]
        pixels = values.size // C
        m = (_sum(values, C) / pixels).astype(x.dtype)
        centred = numpy.subtract(values, numpy.tile(m, values.shape[1] // C), scratch('pixelwise', values.shape, x.dtype))
        rest = _sum(centred, C)
        return pixels, m, rest, _sum_of_products(centred, centred, C)

    n, m, rest, squares = (numpy.array(part, 'float64') for part in zip(*parallel_for(blocks, work)))
    n = n[:, None]                                                          # (blocks, 1); the others (blocks, C)
    m += rest / n                                                           # what rounding m to the dtype of x left over
    squares -= rest * rest / n
    mean = (n * m).sum(axis=0) / M
    return mean, (squares + n * (m - mean)**2).sum(axis=0) / M


def _are_real_numpy(arrays):
    return all(type(array) is numpy.ndarray and array.ndim == 4 and array.size and array.dtype.kind == 'f' for array in arrays)


def _accurate(values):
    return get_array_module(values).result_type(values.dtype, 'float64')


def _cut(arrays, channels=()):
    """Return the arrays as rows of some pixels each, the channels repeated to fit, and slices of rows."""
    C = arrays[0].shape[3]
    pixels = arrays[0].size // C
    joined = 1
    if all(array.flags.c_contiguous for array in arrays):
        joined = next(number for number in range(max(1, ROW_VALUES // C), 0, -1) if pixels % number == 0)
    flat = [array.reshape(pixels // joined, joined * C) for array in arrays]
    rows = max(1, BLOCK_VALUES // (joined * C))
    if len(flat[0]) > rows:
        note('blocks of pixels')
    return (flat, [numpy.tile(vector, joined) for vector in channels],
            [slice(start, min(start + rows, len(flat[0]))) for start in range(0, len(flat[0]), rows)])


def _sum(values, C):
    """Return the sum over the pixels of values (rows, pixels·C), (C,), in float64."""
    return _finish(numpy.ones(len(values), _dtype_of_chain(values)) @ values, C)


def _sum_of_products(a, b, C):
    """Return the sum over the pixels of a·b, both (rows, pixels·C), (C,), in float64."""
    return _finish(numpy.einsum('rc,rc->c', a, b, dtype=_dtype_of_chain(a)), C)


def _dtype_of_chain(values):
    return values.dtype if len(values) <= CHAIN else 'float64'


def _finish(sums, C):
    return sums.reshape(-1, C).sum(axis=0, dtype='float64')
