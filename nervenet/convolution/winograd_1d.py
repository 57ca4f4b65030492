"""Winograd convolution along one axis: 3×3 kernels with half the multiplications.

Four neighbouring outputs of a filter with three taps need 12 multiplications if they are computed one by one. But a
filter is a product of polynomials, and a product can be found from its values at a few points: 6 points, 6
multiplications, and additions (Winograd 1980; Lavin & Gray 2015, arXiv:1509.09308). For d six neighbouring pixels and g
the three taps,

    y = Aᵀ [(G g) ⊙ (Bᵀ d)]            y (4,), Aᵀ (4×6), G (6×3), Bᵀ (6×6)

Here this is done down the columns of the image, with whole rows for pixels: d is six rows, y four rows.

    V = Bᵀ d                 (6, pixels, C_in)       one product: (6×6) @ (6 × W·C_in), rows overlap by being views
    U = G weight             (6, 3·C_in, C_out)      the three taps along a row stay
    M_u = windows(V_u) U_u   (6, pixels, C_out)      six ordinary convolutions along the rows
    y = Aᵀ M                                         one product: (4×6) @ (6 × W·C_out)

The windows of three neighbouring pixels are 3·C_in values side by side in memory, so they need no copy either: windows
0, 3, 6, … are the rows of one matrix, windows 1, 4, 7, … of a second, and 2, 5, 8, … of a third (`thirds`). Every step is a matrix
product on memory as it lies, small enough for BLAS to skip its own rearranging.

The gradient to the weight is the chain rule through these lines, that is their transposes: Z = A dy, dU_u =
windows(V_u)ᵀ Z_u, dweight = Gᵀ dU. The gradient to the input is a convolution of dy with the kernel turned by 180°.

It wins where channels are few (`FEW_CHANNELS` in `__init__.py`): there the two-dimensional form spends its gain on transforms.

The numbers in Bᵀ and Aᵀ nearly cancel. In float32 the error, as the root of the sum of its squares over that of the result, is about
7e-7, some three times that of the plain sum; the largest error over the largest value is about 2e-6. Both are ten to twenty times as
large where values are near 1e-39, which float32 holds with fewer digits (within a step, they are 0).
"""

from functools import partial

import numpy
from numpy.lib.stride_tricks import as_strided

from ..engine.calls import run
from ..engine.memory import empty, scratch
from ..engine.parallel import block_size, cut_images
from ..engine.pixelwise import repeated
from .geometry import turn
from .kept import empty_to_keep
from .strips import following, multiply, overlapping, parts_of, pieces, sum_in_parts, sum_products

BT = numpy.array([[4, 0, -5, 0, 1, 0],
                  [0, -4, -4, 1, 1, 0],
                  [0, 4, -4, -1, 1, 0],
                  [0, -2, -1, 2, 1, 0],
                  [0, 2, -1, -2, 1, 0],
                  [0, 4, 0, -5, 0, 1]])
G = numpy.array([[6, 0, 0],
                 [-4, -4, -4],
                 [-4, 4, -4],
                 [1, 2, 4],
                 [1, -2, 4],
                 [0, 0, 24]]) / 24
AT = numpy.array([[1, 1, 1, 1, 1, 0],
                  [0, 1, -1, 2, -2, 0],
                  [0, 1, 1, 4, 4, 0],
                  [0, 1, -1, 8, -8, 1]])

BLOCK_VALUES = 64 * 1024                # pixels times channels of one block, which has 1.5 times as many in V and in M
HALF_VALUES = 48 * 1024                 # of each of two blocks, where there are no more


def transform_rows(matrix, x, images, tiles, padding, width, name):
    """List the calls that make values (p, n, tiles, width, C): `matrix` (p, q) times the q rows of x[images] under each row of tiles.
    Return the values.

    Tile t starts at row 4t − padding[0]. The image starts at column padding[1] of `width`; around it the values are
    zero. Rows above and below the image are zeros too: they are left out of the product, with their columns of the
    matrix.
    """
    (p, q), (top, left), x = matrix.shape, padding, x[images]
    (n, H, W, C), number = x.shape, tiles.stop - tiles.start
    size = p * n * number * width * C
    memory = scratch(name, (size + 2 * C,), x.dtype)
    yield partial(memory[size:].fill, 0)                                     # see `thirds`
    values = memory[:size].reshape(p, n, number, width, C)
    if left == 1 and width == W + 2:
        yield partial(numpy.copyto, values[:, :, :, ::W + 1], 0)             # the first and the last column at once
    else:
        for outside in values[:, :, :, :left], values[:, :, :, left + W:]:
            if outside.size:
                yield partial(numpy.copyto, outside, 0)
    if not x.flags.c_contiguous:                                             # some of its channels
        contiguous = scratch('channels', x.shape, x.dtype)
        yield partial(numpy.copyto, contiguous, x)
        x = contiguous
    inside = slice(left * C, (left + W) * C)
    out = values.reshape(p, n, number, width * C)[..., inside].transpose(1, 2, 0, 3)     # (n, tiles, p, W·C)
    matrix, x = matrix.astype(x.dtype), x.reshape(n, H, W * C)
    a, b, c = x.strides
    tile = tiles.start
    while tile < tiles.stop:
        first = 4 * tile - top
        above, below = max(0, -first), max(0, first + q - H)                 # rows of this tile outside the image
        last = tile + 1 if above or below else min(tiles.stop, (H + top - q) // 4 + 1)   # of tiles treated alike
        rows = overlapping(x, (n, last - tile, q - above - below, W * C), (a, 4 * b, b, c), (first + above) * b)
        yield partial(numpy.matmul, matrix[:, above:q - below], rows, out=out[:, tile - tiles.start:last - tiles.start])
        tile = last
    return values


def write_rows(values, y, images, tiles, channels=slice(None)):
    """List the calls that write y[images, …, channels] under `tiles`: Aᵀ times `values` (6, n, tiles, width ≥ W_out, channels).

    Rows below the image and columns right of it are left out.
    """
    (_, n, number, width, C), y = values.shape, y[images]
    (_, H_out, W_out, C_out), at = y.shape, AT.astype(y.dtype)
    values = values.reshape(6, n, number, width * C)[..., :W_out * C].transpose(1, 2, 0, 3)     # (n, tiles, 6, W_out·C)
    whole = min(tiles.stop, H_out // 4) - tiles.start
    for start, stop, rows in ((0, whole, 4), (whole, number, H_out % 4)):
        if start < stop:
            first, (a, b, _, d) = 4 * (tiles.start + start), y.strides
            if C == C_out:
                out = overlapping(y, (n, stop - start, rows, W_out * C), (a, 4 * b, b, d), first * b)
                yield partial(numpy.matmul, at[:rows], values[:, start:stop], out=out)
            else:
                part = scratch('part', (n, stop - start, rows, W_out * C), y.dtype)
                yield partial(numpy.matmul, at[:rows], values[:, start:stop], out=part)
                part = part.reshape(n, -1, W_out, C)
                yield partial(numpy.copyto, y[:, first:first + part.shape[1], :, channels], part)


def thirds(values, pixels, window):
    """Return a view (3, 6, rows, window·C) of values (6, …, C), `pixels` of them at each point: every third window of so many pixels.

    Windows 0, 3, 6, … make the first matrix of each point, 1, 4, 7, … the second, 2, 5, 8, … the third. The last ones may reach two pixels
    over the end, into what `transform_rows` leaves there; windows that run from a row of the image into the next one mean nothing.
    """
    C, size = values.shape[-1], values.itemsize
    return as_strided(values, (3, 6, -(-(pixels - 2) // 3), window * C), (C * size, pixels * C * size, 3 * C * size, size))


def blocks_of(N, H_out, width, channels):
    """Cut N images into blocks of (images, rows of tiles); a tile is 4 output rows high."""
    R, values = -(-H_out // 4), width * channels
    return cut_images(N, R, block_size(N * R, max(1, BLOCK_VALUES // values), HALF_VALUES // values))


def forward(x, weight, geometry, bias=None, then=None, kept=None, split=None):
    """Return y (N, H_out, W_out, C_out) for a 3×3 kernel at stride 1; see `plain.forward`, and the face of this package for the rest."""
    parts = [numpy.ascontiguousarray(part) for part in parts_of(x)]
    (N, H, W, _), (_, _, C_in, C_out) = parts[0].shape, weight.shape
    (H_out, W_out), padding = geometry.output_size((H, W)), geometry.padding
    within = [channels for _, channels in pieces(parts, slice(0, C_in))]
    outs = [slice(0, C_out)] if split is None else [slice(0, split), slice(split, C_out)]

    def transformed(make):
        """Return U of each output and each part of the input, (6, 3·C_in, C_out) each, in arrays that `make` makes."""
        U = [[make((6, 3 * (channels.stop - channels.start), out.stop - out.start), weight) for channels in within] for out in outs]
        for out, of_parts in zip(outs, U):
            for channels, of_part in zip(within, of_parts):
                numpy.matmul(G.astype(weight.dtype), weight[:, :, channels, out].reshape(3, -1), out=of_part.reshape(6, -1))
        return U

    U = kept(('winograd_1d', *(part.shape[3] for part in parts)), lambda: transformed(empty_to_keep)) if kept else transformed(empty)
    y = [empty((N, H_out, W_out, out.stop - out.start), parts[0]) for out in outs]
    row_of_biases = None if bias is None else repeated(bias, W_out)
    run(_forward_calls, blocks_of(N, H_out, W_out + 2, max(C_in, C_out)), tuple(parts), U, row_of_biases, tuple(y), padding, then)
    return y[0] if split is None else tuple(y)


def _forward_calls(block, parts, U, row_of_biases, y, padding, then):
    images, tiles = block
    _, H_out, W_out, _ = y[0].shape
    width, V = W_out + 2, []
    for i, part in enumerate(parts):
        V.append((yield from transform_rows(BT, part, images, tiles, padding, width, f'V{i}')))
    pixels = (images.stop - images.start) * (tiles.stop - tiles.start) * width
    for i, result in enumerate(y):
        C = result.shape[3]
        written = (pixels - 2) * C                                           # of each point: the last two windows of a row do not exist
        shape = 6, images.stop - images.start, tiles.stop - tiles.start, width, C
        for j, values in enumerate(V):
            product = scratch(f'M{min(j, 1)}', shape, result.dtype)
            yield from multiply(thirds(values, pixels, 3), U[i][j], thirds(product, pixels, 1))
            if j == 0:
                M = product
            else:                                                            # of the parts of a join, the windows that there are
                sums = M.reshape(6, -1)[:, :written]
                yield partial(numpy.add, sums, product.reshape(6, -1)[:, :written], out=sums)
        if row_of_biases is not None:
            # The second column of Aᵀ is all ones: what is added at this point is added to all four rows.
            point = M[1].reshape(-1, width * C)[:, :W_out * C]
            yield partial(numpy.add, point, row_of_biases, out=point)
        yield from write_rows(M, result, images, tiles)
    if then:
        rows = slice(4 * tiles.start, min(4 * tiles.stop, H_out))
        yield from following((images, rows), y[0], then)


def input_gradient(dy, weight, input_size, geometry, bias=None, then=None, split=None):
    """Return dx (N, H, W, C_in): dy convolved with the kernel turned by 180°; see `plain.input_gradient`."""
    return forward(dy, turn(weight), geometry.turned(), bias, then, split=split)


def weight_gradient(x, dy, geometry):
    """Return dweight (3, 3, C_in, C_out); see `plain.weight_gradient`."""
    parts, dy = [numpy.ascontiguousarray(part) for part in parts_of(x)], numpy.ascontiguousarray(dy)
    (N, H_out, W_out, C_out), C_in = dy.shape, sum(part.shape[3] for part in parts)
    strips = blocks_of(N, H_out, W_out + 2, max(C_in, C_out))
    return sum_in_parts((3, 3, C_in, C_out), dy, strips, [slice(0, C_in)], _term, tuple(parts), dy, geometry.padding, finish=_finish)


def _term(block, within, name, parts, dy, padding):
    """dU (6, 3, C_in, C_out)."""
    images, tiles = block
    width, C_in, C_out = dy.shape[2] + 2, within.stop - within.start, dy.shape[3]
    pixels = (images.stop - images.start) * (tiles.stop - tiles.start) * width
    # Zero in the last two columns of each row, so that the windows that do not exist count for nothing.
    Z = thirds((yield from transform_rows(AT.T, dy, images, tiles, (0, 0), width, 'Z')), pixels, 1)
    dU = scratch(name, (6, 3, C_in, C_out), dy.dtype)
    for part, channels in pieces(parts, within):
        V = thirds((yield from transform_rows(BT, part, images, tiles, padding, width, 'V0')), pixels, 3)
        yield from sum_products(V, Z, dU[:, :, channels])
    return dU


def _finish(dU, out):
    total = scratch('finished', out.shape, dU.dtype)
    yield partial(numpy.matmul, G.T.astype(dU.dtype), dU.reshape(6, -1), out=total.reshape(3, -1))
    yield partial(numpy.copyto, out, total)
