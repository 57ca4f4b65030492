"""Convolution: forward, gradient to the input and gradient to the weight, as stateless functions.

Read `plain.py` first: it is the mathematics, complete. The files beside it compute the same three functions faster,
each by one trick; this file picks by shape and by where the arrays live. `with use_plain():` picks the plain mathematics
alone.

| file | serves | trick |
|---|---|---|
| `patches.py` | kernel = stride: 1×1 head, 2×2 transposed convolution | windows that do not overlap need no copies |
| `winograd_1d.py` | 3×3, few channels | half the multiplications: filters as products of polynomials |
| `winograd_2d.py` | 3×3, many channels | a quarter of them: down the columns and along the rows |
| `im2col.py` | the first layer, and everything else | windows as rows of a matrix, in strips that fit the cache |
| `device.py` | float32 arrays on a GPU | few products of tall matrices, windows copied three times instead of nine |
"""

import contextlib
import contextvars

import numpy

from ..engine.backend import get_array_module
from . import device, im2col, patches, winograd_1d, winograd_2d
from . import plain as mathematics
from .plain import output_size

_plain_only = contextvars.ContextVar('plain convolutions only', default=False)


@contextlib.contextmanager
def use_plain():
    """Within this context every convolution is computed by `plain.py` and no norm is folded into one: for reading and tests."""
    token = _plain_only.set(True)
    try:
        yield
    finally:
        _plain_only.reset(token)


def only_plain():
    """Say whether the code runs within `use_plain`."""
    return _plain_only.get()


def _plain_serves(*arrays):
    """Say whether these arrays are for the plain path: of mixed types, complex, empty, or float64 on a device.

    On a device float64 serves checks, so it takes the mathematics that everything else is held to.
    """
    on_host = get_array_module(*arrays) is numpy
    return only_plain() or not all(array.size and array.dtype == arrays[0].dtype
                                        and array.dtype in (['float32', 'float64'] if on_host else ['float32'])
                                        and (type(array) is numpy.ndarray or not on_host) for array in arrays)


def _path(like, kernel_size, stride, padding, input_size, batch, C_in, C_out):
    """Return the module that serves this shape fastest where the array `like` lives; on the host, by measurement."""
    if get_array_module(like) is not numpy:
        return device
    if patches.fits(kernel_size, stride, padding, input_size):
        return patches
    if tuple(kernel_size) != (3, 3) or tuple(stride) != (1, 1) or max(padding) > 2 or C_in < im2col.FEW_CHANNELS:
        return im2col
    H_out, W_out = output_size(input_size, kernel_size, stride, padding)
    pixels, tiles = batch * H_out * W_out, batch * -(-H_out // 4) * -(-W_out // 4)
    if pixels < 8 * tiles:                          # most of each tile would lie outside the image
        return im2col
    if C_in * C_out <= 32 * 32:
        return winograd_1d
    return winograd_2d if tiles >= 8 else im2col   # few tiles do not repay the transform of the weight


def forward(x, weight, stride, padding, bias=None):
    """Return y (N, H_out, W_out, C_out): x (N, H, W, C_in) ∗ weight (KH, KW, C_in, C_out) + bias (C_out,)."""
    if _plain_serves(x, weight):
        y = mathematics.forward(x, weight, stride, padding)
        return y if bias is None else y + bias
    path = _path(x, weight.shape[:2], stride, padding, x.shape[1:3], len(x), *weight.shape[2:])
    return path.forward(x, weight, stride, padding, bias)


def input_gradient(dy, weight, input_size, stride, padding, bias=None):
    """Return dx (N, H, W, C_in) from dy (N, H_out, W_out, C_out); `input_size` is (H, W) of x.

    `bias` (C_in,) is added to every pixel: this is also the forward of a transposed convolution.
    """
    if _plain_serves(dy, weight):
        dx = mathematics.input_gradient(dy, weight, input_size, stride, padding)
        return dx if bias is None else dx + bias
    path = _path(dy, weight.shape[:2], stride, padding, input_size, len(dy), *weight.shape[2:])
    return path.input_gradient(dy, weight, input_size, stride, padding, bias)


def weight_gradient(x, dy, kernel_size, stride, padding):
    """Return dweight (KH, KW, C_in, C_out) from x (N, H, W, C_in) and dy (N, H_out, W_out, C_out)."""
    if _plain_serves(x, dy):
        return mathematics.weight_gradient(x, dy, kernel_size, stride, padding)
    path = _path(x, kernel_size, stride, padding, x.shape[1:3], len(x), x.shape[3], dy.shape[3])
    return path.weight_gradient(x, dy, kernel_size, stride, padding)
