"""Convolution: forward, gradient to the input and gradient to the weight, as stateless functions.

Read `plain.py` first: it is the mathematics, complete; `geometry.py` says where its taps fall. The files beside it compute the same
three functions faster, each by one trick; this file picks by shape and by where the arrays live. Within `nervenet.plain()` it picks
the plain mathematics alone.

| file | serves | trick |
|---|---|---|
| `patches.py` | kernel = stride: 1×1 head, 2×2 transposed convolution | windows that do not overlap need no copies |
| `winograd_1d.py` | 3×3, few channels | half the multiplications: filters as products of polynomials |
| `winograd_2d.py` | 3×3, many channels | a quarter of them: down the columns and along the rows |
| `im2col.py` | the first layer, dilated kernels, and everything else | windows as rows of a matrix, in strips that fit the cache |
| `kept.py` | both Winograds, in inference | what was made of a weight is used again |
| `runs.py` | float32 arrays on a GPU | few products of tall matrices, windows copied three times instead of nine |
"""

import numpy

from ..engine.backend import get_array_module
from ..engine.parallel import one_thread_per_product
from ..engine.paths import note, only_plain
from ..engine.pixelwise import apart, side_by_side
from . import im2col, patches, plain, runs, winograd_1d, winograd_2d
from .geometry import Geometry
from .strips import followed, parts_of

WINOGRAD = winograd_1d, winograd_2d             # take the parts of a join as they are, and keep what they make of a weight

FEW_CHANNELS = 32 * 32          # C_in·C_out, up to which `winograd_1d` wins: there `winograd_2d` spends its gain on transforms


def _path(arrays, geometry, input_size, C_in, C_out):
    """Return the module that serves two arrays (images first) of this geometry fastest where they live; on the host, by measurement.

    The plain mathematics serves arrays of mixed types, complex or empty ones, and float64 on a device: there float64 serves checks,
    so it takes what everything else is held to.
    """
    on_host = get_array_module(*arrays) is numpy
    dtypes = ['float32', 'float64'] if on_host else ['float32']
    if only_plain() or not all(array.size and array.dtype == arrays[0].dtype and array.dtype in dtypes
                               and (type(array) is numpy.ndarray or not on_host) for array in arrays):
        return plain
    if not on_host:
        return runs
    if patches.fits(geometry, input_size):
        return patches
    if (geometry.extent != (3, 3) or geometry.kernel_size != (3, 3) or geometry.stride != (1, 1) or max(geometry.padding) > 2
            or C_in < im2col.FEW_CHANNELS):
        return im2col
    H_out, W_out = geometry.output_size(input_size)
    batch = len(arrays[0])
    pixels, tiles = batch * H_out * W_out, batch * -(-H_out // 4) * -(-W_out // 4)
    if pixels < 8 * tiles:                          # most of each tile would lie outside the image
        return im2col
    if C_in * C_out <= FEW_CHANNELS:
        return winograd_1d
    return winograd_2d if tiles >= 8 else im2col    # few tiles do not repay the transform of the weight


def _noted(path):
    note(path.__name__.rpartition('.')[2])
    return path


@one_thread_per_product()
def forward(x, weight, geometry, bias=None, *, then=None, kept=None):
    """Return y (N, H_out, W_out, C_out): x (N, H, W, C_in) ∗ weight (KH, KW, C_in, C_out) + bias (C_out,).

    x may be a pair of arrays whose channels, side by side, are the input: the convolution of a join is the sum of the convolutions of
    what is joined, each with its part of the weight, so where a path allows it nothing is joined.

    then   if given, a function and what it is given: then[0](block, y[block], *then[1:]) lists calls (`engine/calls.py`) that may change
           y[block], for blocks, pairs of slices (images, rows), that together cover y; they are made as soon as the block is computed and
           still in the cache. Blocks are the same whatever the number of threads.
    kept   if given, kept(name, make) returns what make() returned when it was last called for this weight: see `Kept`.
    """
    parts = parts_of(x)
    path = _noted(_path((*parts, weight), geometry, parts[0].shape[1:3], *weight.shape[2:]))
    if path in WINOGRAD:
        return path.forward(x, weight, geometry, bias, then, kept)
    x = side_by_side(*parts)
    if path is im2col:
        return path.forward(x, weight, geometry, bias, then)
    return followed(path.forward(x, weight, geometry, bias), then)


@one_thread_per_product()
def input_gradient(dy, weight, input_size, geometry, bias=None, *, then=None, split=None):
    """Return dx (N, H, W, C_in) from dy (N, H_out, W_out, C_out); `input_size` is (H, W) of x.

    `bias` (C_in,) is added to every pixel: this is also the forward of a transposed convolution. `then` is as in `forward`. With `split`,
    return a pair: the gradients of the first `split` channels of x and of the others.
    """
    path = _noted(_path((dy, weight), geometry, input_size, *weight.shape[2:]))
    if path in WINOGRAD:
        return path.input_gradient(dy, weight, input_size, geometry, bias, then, split)
    dx = followed(path.input_gradient(dy, weight, input_size, geometry, bias), then)
    return dx if split is None else apart(dx, split, dx.shape[3] - split)


@one_thread_per_product()
def weight_gradient(x, dy, geometry):
    """Return dweight (KH, KW, C_in, C_out) from x (N, H, W, C_in), or a pair as in `forward`, and dy (N, H_out, W_out, C_out)."""
    parts = parts_of(x)
    path = _noted(_path((*parts, dy), geometry, parts[0].shape[1:3], sum(part.shape[3] for part in parts), dy.shape[3]))
    return path.weight_gradient(x if path in WINOGRAD else side_by_side(*parts), dy, geometry)
