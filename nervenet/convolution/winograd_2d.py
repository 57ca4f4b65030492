"""Winograd convolution along both axes: 3×3 kernels with a quarter of the multiplications.

Read `winograd_1d.py` first. Doing the same along the columns and along the rows, a tile d of 6×6 pixels gives 4×4 outputs:

    y = Aᵀ [(G g Gᵀ) ⊙ (Bᵀ d B)] A              36 multiplications instead of 144

With channels, each of the 36 is a matrix product that all tiles share (Lavin & Gray 2015, arXiv:1509.09308):

    V = Bᵀ d B         (36, tiles, C_in)
    U = G weight Gᵀ    (36, C_in, C_out)
    M = V U            (36, tiles, C_out)        36 products, nearly all of the arithmetic
    y = Aᵀ M A

Bᵀ is applied to whole rows of the image at once, then B to six neighbouring pixels at a time: (6×6) @ (6×C), written where the 36
products want it. Nothing is gathered; neighbouring tiles overlap by being views of the same memory.

The products come in pieces of about half a million multiplications: such small matrices BLAS multiplies where they lie, without
rearranging them first. U is cut into panels for that.

Gradients as in one dimension: Z = A dy Aᵀ, dU = Vᵀ Z, dweight = Gᵀ dU G; the gradient to the input is a convolution of dy with
the turned kernel, which here means G with its columns reversed.

In float32 the relative error is about 2e-6. It wins from about 48 channels up, as long as there are tens of tiles to share U.
"""

import numpy
from numpy.lib.stride_tricks import as_strided

from ..parallel import parallel_for, scratch
from .plain import output_size
from .strips import cut, cut_images, sum_in_parts
from .winograd_1d import AT, BT, G, transform_rows, write_rows

TILE_VALUES = 8 * 1024                  # tiles times channels of one block, which has 36 times as many values in V
LEAST_TILES = 32                        # of one block: they share one reading of U
SUMMED_TILES = 128                      # tiles that one term of a weight gradient sums over
PIECE = 512 * 1024                      # multiplications of one product


def transform_tiles(matrix, x, images, tiles, padding, columns, name):
    """Return matrix d matrixᵀ (36, n·tiles·columns, C) for every tile d of x[images], in scratch memory.

    `matrix` (6, q) is applied to q × q pixels. Tile (t, s) starts at pixel (4t, 4s) − padding.
    """
    q, C = matrix.shape[1], x.shape[3]
    width = 4 * columns + q - 4
    rows = transform_rows(matrix, x, images, tiles, padding, width, 'rows')  # (6, n, tiles, width, C)
    a, b, c, d, e = rows.strides
    windows = as_strided(rows, (*rows.shape[:3], columns, q, C), (a, b, c, 4 * d, d, e))
    values = scratch(name, (6, 6, *rows.shape[1:3], columns, C), x.dtype)
    numpy.matmul(matrix.astype(x.dtype), windows, out=values.transpose(0, 2, 3, 4, 1, 5))
    return values.reshape(36, -1, C)


def panels(matrix, weight, tiles, turned=False):
    """Return U = matrix weight matrixᵀ as a list of panels (36, C_in, some of C_out), for the weight or the turned weight.

    A panel is as wide as makes a product with `tiles` tiles one PIECE. Being contiguous, it stays in the cache as a whole.
    """
    if turned:
        matrix, weight = matrix[:, ::-1], weight.swapaxes(2, 3)              # the reversed columns turn the kernel
    C_in, C_out = weight.shape[2:]
    matrix = matrix.astype(weight.dtype)

    def work(columns):
        taps = numpy.ascontiguousarray(weight[..., columns]).reshape(3, 3, -1)
        rows = matrix @ taps.swapaxes(0, 1)                                  # (3, 6, …): the kernel's columns come first
        return (matrix @ rows.swapaxes(0, 1)).reshape(36, C_in, -1)

    return parallel_for(cut(C_out, max(16, min(64, PIECE // (tiles * C_in) // 16 * 16))), work)


def convolve(x, weight, padding, turned=False, bias=None):
    """Return y (N, H_out, W_out, C_out), x convolved with `weight`, or with its turned form, which exchanges C_in and C_out."""
    x = numpy.ascontiguousarray(x)
    (N, H, W, C_in), C_out = x.shape, weight.shape[2 if turned else 3]
    H_out, W_out = output_size((H, W), (3, 3), (1, 1), padding)
    columns = -(-W_out // 4)
    tiles_per_block = max(LEAST_TILES, TILE_VALUES // max(C_in, C_out))
    U = panels(G, weight, tiles_per_block, turned)
    y = numpy.empty((N, H_out, W_out, C_out), x.dtype)
    at = AT.astype(x.dtype)

    def work(block):
        images, tiles = block
        n, number = images.stop - images.start, tiles.stop - tiles.start
        V = transform_tiles(BT, x, images, tiles, padding, columns, 'V')     # (36, tiles, C_in)
        M = scratch('M', (36, V.shape[1], C_out), x.dtype)
        start = 0
        for panel in U:
            stop = start + panel.shape[2]
            numpy.matmul(V, panel, out=M[:, :, start:stop])
            start = stop
        M = M.reshape(6, 6, n, number, columns, C_out)
        if bias is not None:
            M[1, 1] += bias                                                  # the column of ones in Aᵀ adds it to all 16 outputs
        rows = scratch('rows', (6, n, number, columns, 4, C_out), x.dtype)
        numpy.matmul(at, M.transpose(0, 2, 3, 4, 1, 5), out=rows)            # M A
        write_rows(rows.reshape(6, n, number, 4 * columns, C_out), y, images, tiles)

    parallel_for(cut_images(N, -(-H_out // 4), tiles_per_block // columns), work)
    return y


def forward(x, weight, stride, padding, bias=None):
    """Return y (N, H_out, W_out, C_out) for a 3×3 kernel at stride 1; see `plain.forward`."""
    return convolve(x, weight, padding, bias=bias)


def input_gradient(dy, weight, input_size, stride, padding, bias=None):
    """Return dx (N, H, W, C_in): dy convolved with the kernel turned by 180°; see `plain.input_gradient`."""
    return convolve(dy, weight, (2 - padding[0], 2 - padding[1]), turned=True, bias=bias)


def weight_gradient(x, dy, kernel_size, stride, padding):
    """Return dweight (3, 3, C_in, C_out); see `plain.weight_gradient`."""
    x, dy = numpy.ascontiguousarray(x), numpy.ascontiguousarray(dy)
    (N, H_out, W_out, C_out), C_in = dy.shape, x.shape[3]
    columns = -(-W_out // 4)
    gt = G.T.astype(x.dtype)
    strips = cut_images(N, -(-H_out // 4), SUMMED_TILES // columns)
    # With few tiles, blocks also share the input channels; each then transforms dy again.
    channels = cut(C_in, C_in if len(strips) > 4 else max(64, C_in // 4))

    def term(block, within):
        images, tiles = block
        V = transform_tiles(BT, x[..., within], images, tiles, padding, columns, 'V').swapaxes(1, 2)
        Z = transform_tiles(AT.T, dy, images, tiles, (0, 0), columns, 'Z')
        dU = scratch('M', (36, V.shape[1], C_out), x.dtype)
        size = PIECE // (V.shape[2] * C_out)
        for piece in cut(V.shape[1], size if size >= 32 else V.shape[1]):
            numpy.matmul(V[:, piece], Z, out=dU[:, piece])
        return dU

    def finish(dU):
        rows = (gt @ dU.reshape(6, -1)).reshape(3, 6, -1)
        return (gt @ rows).reshape(3, 3, -1, C_out)

    return sum_in_parts(strips, channels, term, finish)
