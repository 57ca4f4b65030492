"""Formulas that treat every value by itself, and sums over pixels: in pieces that stay in the cache, on all cores.

NumPy computes `(x - mean) * scale + bias` in three passes over memory, on one core, and makes two arrays as large as x on the way.
Memory is slow: an operation on a number in the cache costs a tenth of fetching it, and memory fresh from the system costs even
more. So cut the values into blocks small enough to stay in the cache from one operation to the next, and let the
formula work in the block of the result:

    def normalize(out, x, mean, scale, bias):
        numpy.subtract(x, mean, out)
        out *= scale
        out += bias

    y = in_blocks(normalize, x, channels=(mean, scale, bias))

The operations are the same; only the walk over memory changes, and `parallel_for` shares the blocks among the cores.

`channels` are vectors (C,), one constant per channel. NumPy adds a vector of 16 to rows of 16 in steps of 16, which takes longer to
set up than to do. So a block has rows of several pixels, and vectors are repeated to the same length.

Sums over pixels are made of block sums: inside a block in the dtype of the data, at most CHAIN values in a row, between blocks
in float64. That is nearly as exact as float64 throughout, at the speed of the data's own dtype.

What is no real NumPy array (a device array, or complex numbers) is computed in one piece by the same formulas.
"""

import math

import numpy

from .backend import get_array_module
from .parallel import parallel_for, scratch

BLOCK_VALUES = 2**17            # 512 KiB of float32: fewer are more overhead, more no longer stay in the cache
ROW_VALUES = 2**10              # values in a row, at most, where pixels are joined
CHAIN = 128                     # values added in a row before their sum goes on in float64


def in_blocks(formula, *arrays, channels=()):
    """Return the array that `formula(out, *arrays, *channels)` writes: arrays and result (N, H, W, C), channels (C,).

    The formula treats every value by itself. It is called with blocks of the arrays, and with `channels` repeated to fit.
    """
    y = get_array_module(*arrays).empty(arrays[0].shape, arrays[0].dtype)
    if not _are_real_numpy(arrays):
        formula(y, *arrays, *channels)
        return y
    flat, repeated, blocks = _cut([y, *arrays], channels)
    parallel_for(blocks, lambda block: formula(*(array[block] for array in flat), *repeated))
    return y


def channel_sums(formulas, *arrays, channels=()):
    """Return the sums over all pixels of what each formula writes, as for `in_blocks`: a list of (C,) in float64.

    A formula of None stands for the first array as it is.
    """
    if not _are_real_numpy(arrays):
        xp, sums = get_array_module(*arrays), []
        for formula in formulas:
            values = xp.empty_like(arrays[0]) if formula else arrays[0]
            if formula:
                formula(values, *arrays, *channels)
            sums.append(values.sum(axis=(0, 1, 2), dtype=xp.result_type(values.dtype, 'float64')))
        return sums
    C = arrays[0].shape[3]
    flat, repeated, blocks = _cut(arrays, channels)

    def work(block):
        parts, sums = [array[block] for array in flat], []
        for formula in formulas:
            values = scratch('pixelwise', parts[0].shape, parts[0].dtype) if formula else parts[0]
            if formula:
                formula(values, *parts, *repeated)
            sums.append(_sum(values, C))
        return sums

    return [numpy.sum(parts, axis=0) for parts in zip(*parallel_for(blocks, work))]


def channel_moments(x):
    """Return (mean, variance) of x (N, H, W, C) over all pixels, (C,) each, in float64. The variance divides by N·H·W.

    One walk over x: each block has a mean m and a sum of squares about it. The squares about the common mean are those about m,
    plus n times the square of m's distance from it: Σ(x − mean)² = Σ(x − m)² + n·(m − mean)². Nothing large is subtracted from
    something large, as it would be in Σx² − n·mean² (Chan, Golub & LeVeque 1979).
    """
    C, M = x.shape[3], x.size // x.shape[3]
    if not _are_real_numpy([x]):
        xp = get_array_module(x)
        accurate = xp.result_type(x.dtype, 'float64')
        mean = x.mean(axis=(0, 1, 2), dtype=accurate)
        return mean, xp.square(x - mean.astype(x.dtype)).mean(axis=(0, 1, 2), dtype=accurate)
    (flat,), _, blocks = _cut([x])

    def work(block):
        values = flat[block]
        pixels = values.size // C
        m = (_sum(values, C) / pixels).astype(x.dtype)
        centred = numpy.subtract(values, numpy.tile(m, values.shape[1] // C), scratch('pixelwise', values.shape, x.dtype))
        rest = _sum(centred, C)
        return pixels, m, rest, _sum(numpy.square(centred, centred), C)

    n, m, rest, squares = (numpy.array(part, 'float64') for part in zip(*parallel_for(blocks, work)))
    n = n[:, None]                                                          # (blocks, 1); the others (blocks, C)
    m += rest / n                                                           # what rounding m to the dtype of x left over
    squares -= rest * rest / n
    mean = (n * m).sum(axis=0) / M
    return mean, (squares + n * (m - mean)**2).sum(axis=0) / M


def _are_real_numpy(arrays):
    return all(type(array) is numpy.ndarray and array.ndim == 4 and array.size and array.dtype.kind == 'f' for array in arrays)


def _cut(arrays, channels=()):
    """Return the arrays as rows of some pixels each, the channels repeated to fit, and slices of rows."""
    C = arrays[0].shape[3]
    pixels = arrays[0].size // C
    joined = 1
    if all(array.flags.c_contiguous for array in arrays):
        joined = math.gcd(pixels, 2**(max(1, ROW_VALUES // C).bit_length() - 1))        # a power of 2 that divides the pixels
    flat = [array.reshape(pixels // joined, joined * C) for array in arrays]
    rows = max(1, BLOCK_VALUES // (joined * C))
    return (flat, [numpy.tile(vector, joined) for vector in channels],
            [slice(start, min(start + rows, len(flat[0]))) for start in range(0, len(flat[0]), rows)])


def _sum(values, C):
    """Return the sum over the pixels of values (rows, pixels·C), (C,), in float64."""
    sums = values.sum(axis=0, dtype=values.dtype if len(values) <= CHAIN else 'float64')
    return sums.reshape(-1, C).sum(axis=0, dtype='float64')
