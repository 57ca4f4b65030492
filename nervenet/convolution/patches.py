"""Kernels that tile the image: no two windows share a pixel.

Where the stride equals the kernel and nothing is padded, as in the 1×1 head and in the 2×2 steps between two levels of
a U-Net, nothing is copied twice, so the convolution is a matrix product and a rearrangement:

    y (pixels, C_out)                 = patches (pixels, KH·KW·C_in) @ weight (KH·KW·C_in, C_out)
    dpatches (pixels, KH·KW·C_in)     = dy (pixels, C_out) @ weightᵀ
    dweight (KH·KW·C_in, C_out)       = patchesᵀ @ dy

For 1×1 even the rearrangement vanishes: the pixels are the patches. The functions are exact rewritings of `plain`.
"""

import math
from functools import partial

import numpy

from ..engine.calls import run
from ..engine.memory import empty, scratch
from ..engine.parallel import cut
from ..engine.pixelwise import repeated
from .strips import multiply, sum_in_parts, sum_products

BLOCK_BYTES = 512 * 1024                # of patches: so that a block is still in the cache when it is rearranged
LEAST_PIXELS = 128                      # a product reads the whole weight for them
FEW_VALUES = 64 * 64                    # of one row of a kernel: up to so many, a product for each row of an image is as fast, and saves the copy


def fits(geometry, input_size):
    """Say whether windows tile the image: stride equals extent, no holes, no padding, nothing left over."""
    return (geometry.kernel_size == geometry.stride == geometry.extent and geometry.padding == (0, 0)
            and all(length % k == 0 for length, k in zip(input_size, geometry.kernel_size)))


def _rows_of_windows(x, kernel_size):
    """Return x (N, H, W, C) as a view (N·H/KH, W/KW, KH, KW, C): one window's pixels on the last three axes."""
    (KH, KW), (N, H, W, C) = kernel_size, x.shape
    return x.reshape(N * H // KH, KH, W // KW, KW, C).swapaxes(1, 2)


def _blocks(windows):
    """Cut rows of windows into blocks of about BLOCK_BYTES, and at least LEAST_PIXELS windows."""
    return cut(len(windows), max(BLOCK_BYTES * len(windows) // windows.nbytes, -(-LEAST_PIXELS // windows.shape[1])))


def _matrix(windows, block):
    """List the calls that make rows `block` of the windows a matrix (pixels, KH·KW·C): none for 1×1, else a scratch copy. Return it."""
    windows = windows[block]
    if windows.shape[2:4] != (1, 1):
        patches = scratch('patches', windows.shape, windows.dtype)
        yield partial(numpy.copyto, patches, windows)
        windows = patches
    return windows.reshape(-1, math.prod(windows.shape[2:]))


def forward(x, weight, geometry, bias=None):
    """Return y (N, H/KH, W/KW, C_out); see `plain.forward`."""
    KH, KW, _, C_out = weight.shape
    windows = _rows_of_windows(numpy.ascontiguousarray(x), (KH, KW))         # (rows, W/KW, KH, KW, C_in)
    y = empty((len(x), x.shape[1] // KH, x.shape[2] // KW, C_out), x)
    run(_forward_calls, _blocks(windows), windows, weight.reshape(-1, C_out), y.reshape(len(windows), -1), bias)
    return y


def _forward_calls(block, windows, matrix, y, bias):
    pixels = y[block].reshape(-1, matrix.shape[1])
    yield from multiply((yield from _matrix(windows, block)), matrix, pixels)
    if bias is not None:
        yield partial(numpy.add, pixels, bias, out=pixels)


def input_gradient(dy, weight, input_size, geometry, bias=None):
    """Return dx (N, H, W, C_in); see `plain.input_gradient`."""
    KH, KW, C_in, C_out = weight.shape
    dx = empty((len(dy), *input_size, C_in), dy)
    dwindows = _rows_of_windows(dx, (KH, KW))                                # (rows, W/KW, KH, KW, C_in), a view of dx
    rows = numpy.ascontiguousarray(dy).reshape(len(dwindows), -1, C_out)
    row_of_biases = None if bias is None else repeated(bias, KH * KW * rows.shape[1])          # NumPy adds long rows faster
    if KW * C_in * C_out <= FEW_VALUES:
        matrices = _matrices_of_rows(weight, rows.shape[1])
        rows, drows = rows.reshape(len(rows), 1, -1, matrices.shape[1]), dx.reshape(len(rows), KH, -1, matrices.shape[2])
        run(_row_calls, _blocks(dwindows), rows, matrices, drows, row_of_biases)
    else:
        run(_input_gradient_calls, _blocks(dwindows), rows, weight.reshape(-1, C_out), dwindows, row_of_biases)
    return dx


def _matrices_of_rows(weight, W):
    """Return (KH, j·C_out, j·KW·C_in): what j neighbouring pixels of a row, as one, are multiplied by for each row of their windows.

    j is 1, but where a pixel is a single value. A product with so short an inner side takes the longer way to be the faster one: its matrix
    has the weights j times along its diagonal, and zeros elsewhere. (So a value that is not finite spoils its j − 1 neighbours too.)
    """
    KH, KW, C_in, C_out = weight.shape
    most = math.isqrt(FEW_VALUES // (KW * C_in)) if C_out == 1 else 1
    number = next(number for number in range(most, 0, -1) if W % number == 0)
    matrices = empty((KH, number, C_out, number, KW * C_in), weight)
    matrices[...] = 0
    for pixel in range(number):
        matrices[:, pixel, :, pixel] = weight.reshape(KH, -1, C_out).swapaxes(1, 2)
    return matrices.reshape(KH, number * C_out, -1)


def _row_calls(block, rows, matrices, drows, row_of_biases):
    """A row of pixels, (pixels/j, j·C_out), makes KH rows of dx, (pixels/j, j·KW·C_in) each, where they lie."""
    yield partial(numpy.matmul, rows[block], matrices, out=drows[block])     # (rows, 1, pixels/j, j·C_out) @ (KH, j·C_out, j·KW·C_in)
    if row_of_biases is not None:
        long = drows[block].reshape(-1, len(row_of_biases))
        yield partial(numpy.add, long, row_of_biases, out=long)


def _input_gradient_calls(block, dy, matrix, dwindows, row_of_biases):
    pixels, dwindows = dy[block].reshape(-1, matrix.shape[1]), dwindows[block]
    dpatches = scratch('patches', (len(pixels), len(matrix)), dy.dtype)
    yield from multiply(pixels, matrix.T, dpatches)                          # (pixels, C_out) @ (C_out, KH·KW·C_in)
    if row_of_biases is not None:
        long = dpatches.reshape(-1, len(row_of_biases))
        yield partial(numpy.add, long, row_of_biases, out=long)
    yield partial(numpy.copyto, dwindows, dpatches.reshape(dwindows.shape))


def weight_gradient(x, dy, geometry):
    """Return dweight (KH, KW, C_in, C_out); see `plain.weight_gradient`."""
    C_in, C_out = x.shape[3], dy.shape[3]
    windows, dy = _rows_of_windows(numpy.ascontiguousarray(x), geometry.kernel_size), numpy.ascontiguousarray(dy)
    strips = _blocks(windows)
    channels = cut(C_in, C_in if len(strips) > 4 else max(32, C_in // 8))
    shape = *geometry.kernel_size, C_in, C_out
    return sum_in_parts(shape, x, strips, channels, _term, windows, dy.reshape(len(windows), -1, C_out))


def _term(block, within, name, windows, dy):
    patches = yield from _matrix(windows[..., within], block)
    product = scratch(name, (patches.shape[1], dy.shape[2]), dy.dtype)
    yield from sum_products(patches[None], dy[block].reshape(1, -1, dy.shape[2]), product)
    return product
