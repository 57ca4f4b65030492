"""Convolution: forward, gradient to the input and gradient to the weight, as stateless functions.

Read `plain.py` first: it is the mathematics, complete. The files beside it compute the same three functions faster, each by
one trick, for NumPy arrays; this file picks by shape. `with use_plain():` picks the plain mathematics alone.

| file | serves | trick |
|---|---|---|
| `patches.py` | kernel = stride: 1×1 head, 2×2 transposed convolution | windows that do not overlap need no copies |
| `im2col.py` | everything else | windows as rows of a matrix, in strips that fit the cache |
"""

import contextlib
import contextvars

import numpy

from . import im2col, patches
from . import plain as mathematics
from .plain import output_size

_plain_only = contextvars.ContextVar('plain convolutions only', default=False)


@contextlib.contextmanager
def use_plain():
    """Within this context every convolution of this thread is computed by `plain.py`, for reading, debugging and tests."""
    token = _plain_only.set(True)
    try:
        yield
    finally:
        _plain_only.reset(token)


def _plain_serves(*arrays):
    """Say whether only the plain path takes these arrays: on another device, of mixed types, complex, or empty."""
    return _plain_only.get() or not all(type(array) is numpy.ndarray and array.size and array.dtype == arrays[0].dtype
                                        and array.dtype in (numpy.float32, numpy.float64) for array in arrays)


def forward(x, weight, stride, padding):
    """Return y (N, H_out, W_out, C_out), the convolution of x (N, H, W, C_in) with weight (KH, KW, C_in, C_out)."""
    if _plain_serves(x, weight):
        return mathematics.forward(x, weight, stride, padding)
    if patches.fits(weight.shape[:2], stride, padding, x.shape[1:3]):
        return patches.forward(x, weight)
    return im2col.forward(x, weight, stride, padding)


def input_gradient(dy, weight, input_size, stride, padding):
    """Return dx (N, H, W, C_in) from dy (N, H_out, W_out, C_out); `input_size` is (H, W) of x."""
    if _plain_serves(dy, weight):
        return mathematics.input_gradient(dy, weight, input_size, stride, padding)
    if patches.fits(weight.shape[:2], stride, padding, input_size):
        return patches.input_gradient(dy, weight, input_size)
    return im2col.input_gradient(dy, weight, input_size, stride, padding)


def weight_gradient(x, dy, kernel_size, stride, padding):
    """Return dweight (KH, KW, C_in, C_out) from x (N, H, W, C_in) and dy (N, H_out, W_out, C_out)."""
    if _plain_serves(x, dy):
        return mathematics.weight_gradient(x, dy, kernel_size, stride, padding)
    if patches.fits(kernel_size, stride, padding, x.shape[1:3]):
        return patches.weight_gradient(x, dy, kernel_size)
    return im2col.weight_gradient(x, dy, kernel_size, stride, padding)
