"""Max-pooling, faster than `layers.largest` and `layers.to_the_first`, which are the mathematics.

Windows that lie side by side share no pixel, so a block of rows is done with all its windows, while it is in the cache. Where windows
overlap, the maximum of a k×k window is that of its k row maxima: 2·(k − 1) comparisons in place of k² − 1. The way back goes the same
two steps. Of equal values in a window, the first in reading order is the first column of the first row: so rows are searched for the
maximum first, and then the columns of that row.
"""

import math
from functools import partial

import numpy

from . import kernels
from .backend import get_array_module
from .memory import empty, scratch
from .parallel import block_size, cut, parallel_for
from .paths import note
from .pixelwise import BLOCK_VALUES, HALF_VALUES, copy_into, for_rows


def largest(x, geometry):
    """Return (y, places): y as `layers.largest`, and, from a kernel that knows them, the places of the maxima in their windows, else None."""
    (KH, KW), (H_out, W_out) = geometry.kernel_size, geometry.output_size(x.shape[1:3])
    if not _are_side_by_side(geometry):
        y = empty((len(x), H_out, W_out, x.shape[3]), x)
        _for_images(x, lambda images: _largest_along(_along_columns(x[images], geometry), 1, geometry, out=y[images]))
        return y, None
    if KH == KW and KH * KW <= 256 and kernels.can_compute(x):                  # the place of a maximum has 8 bits there
        return kernels.max_pool(x, KH)
    y = empty((len(x), H_out, W_out, x.shape[3]), x)

    for_rows(y, _maxima, x, y, (KH, KW))
    return y, None


def _maxima(block, x, y, kernel_size):
    (KH, KW), (_, H_out, W_out, _), (images, rows) = kernel_size, y.shape, block
    # First down the columns: there whole rows lie side by side in memory.
    of_rows = [x[images, i:KH * H_out:KH][:, rows] for i in range(KH)]
    columns = _temporary('columns', of_rows[0])
    yield partial(_largest_of, of_rows, columns)
    yield partial(_largest_of, [columns[:, :, j:KW * W_out:KW] for j in range(KW)], y[block])


def _largest_of(arrays, out):
    """Write the maximum of the arrays, value by value, into `out`."""
    out[...] = arrays[0] if len(arrays) == 1 else get_array_module(out).maximum(*arrays[:2])
    for array in arrays[2:]:
        get_array_module(out).maximum(out, array, out=out)


def _temporary(name, like):
    """Return an array of the shape of `like` that lasts until the next one of this name: scratch memory, on the host."""
    return scratch(name, like.shape, like.dtype) if type(like) is numpy.ndarray else get_array_module(like).empty(like.shape, like.dtype)


def to_the_first(dy, x, y, places, geometry):
    """Return dx as `layers.to_the_first`; y and `places` are what `largest` returned."""
    if places is not None:
        return kernels.max_pool_backward(dy, places, geometry.kernel_size[0], x.shape)
    if _are_side_by_side(geometry):
        return _to_the_first_side_by_side(dy, x, y, geometry)
    dx = empty(x.shape, dy)

    def of_images(images):
        of_rows = _along_columns(x[images], geometry)                           # (n, H, W_out, C)
        drows = _back(dy[images], of_rows, y[images], 1, geometry)
        dx[images] = _back(drows, x[images], of_rows, 2, geometry)

    _for_images(x, of_images)
    return dx


def _are_side_by_side(geometry):
    return geometry.stride == geometry.kernel_size and geometry.padding == (0, 0)


def _to_the_first_side_by_side(dy, x, y, geometry):
    (KH, KW), (_, H_out, W_out, _) = geometry.kernel_size, y.shape
    dx = empty(x.shape, dy)
    dx[:, KH * H_out:] = 0                                                      # what no window covers moved nothing
    dx[:, :, KW * W_out:] = 0
    for_rows(y, _claims, dy, x, y, dx, (KH, KW))
    return dx


def _claims(block, dy, x, y, dx, kernel_size):
    rest = _temporary('rest', dy[block])                                        # what no pixel has claimed yet
    yield partial(copy_into, rest, dy[block])
    *others, (_, last) = zip(_taps_of_windows(x, block, y, kernel_size), _taps_of_windows(dx, block, y, kernel_size))
    for pixel, dpixel in others:
        yield partial(_claim, rest, pixel, y[block], dpixel)
    yield partial(copy_into, last, rest)                                        # one of them was the maximum


def _claim(rest, x, y, dx):
    share = rest * (get_array_module(x).ascontiguousarray(x) == y)              # all or nothing
    dx[...] = share
    rest -= share


def _taps_of_windows(values, block, y, kernel_size):
    """Yield KH·KW views of values, (n, rows, W_out, C) each: the first pixel of every window, the second, …"""
    (KH, KW), (_, H_out, W_out, _), (images, rows) = kernel_size, y.shape, block
    for i in range(KH):
        for j in range(KW):
            yield values[images, i:KH * H_out:KH, j:KW * W_out:KW][:, rows]


# --- Windows that overlap ---------------------------------------------------------------------------------------------

def _for_images(x, work):
    """Call `work(images)` for slices that together cover the images of x."""
    note('rows, then columns')
    on_host, values = get_array_module(x) is numpy, max(1, math.prod(x.shape[1:]))
    blocks = cut(len(x), block_size(len(x), max(1, BLOCK_VALUES // values), HALF_VALUES // values))
    parallel_for(blocks if on_host else [slice(None)], work)


def _taps(axis, geometry, length, length_out):
    """Yield (outputs, inputs): slices along an axis, for each tap, of the windows in which it lies inside the image, and of what it meets."""
    k, s, p = (of_both[axis - 1] for of_both in (geometry.kernel_size, geometry.stride, geometry.padding))
    for tap in range(k):
        first = max(0, -((tap - p) // s))                                       # the least o with o·s + tap − p ≥ 0
        last = min(length_out - 1, (length - 1 + p - tap) // s)                 # the largest with o·s + tap − p < length
        if first <= last:
            start = first * s + tap - p
            ahead = (slice(None),) * axis
            yield (*ahead, slice(first, last + 1)), (*ahead, slice(start, start + (last - first) * s + 1, s))


def _largest_along(x, axis, geometry, out):
    """Write the maximum along one axis of each window into `out`, and return it."""
    xp = get_array_module(x)
    out[...] = -math.inf
    for outputs, inputs in _taps(axis, geometry, x.shape[axis], out.shape[axis]):
        xp.maximum(out[outputs], x[inputs], out=out[outputs])
    return out


def _along_columns(x, geometry):
    """Return the maximum of each row of each window, (n, H, W_out, C)."""
    n, H, _, C = x.shape
    W_out = geometry.output_size(x.shape[1:3])[1]
    return _largest_along(x, 2, geometry, get_array_module(x).empty((n, H, W_out, C), x.dtype))


def _back(dy, x, y, axis, geometry):
    """Return ∂L/∂x of y = the maxima of x along an axis: the first of equals receives all."""
    rest, dx = dy.copy(), get_array_module(x).zeros(x.shape, dy.dtype)
    for outputs, inputs in _taps(axis, geometry, x.shape[axis], y.shape[axis]):
        share = rest[outputs] * (x[inputs] == y[outputs])
        dx[inputs] += share                                                     # windows overlap
        rest[outputs] -= share
    return dx
