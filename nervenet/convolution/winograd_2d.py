"""Winograd convolution along both axes: 3×3 kernels with a quarter of the multiplications.

Read `winograd_1d.py` first. Doing the same along the columns and along the rows, a tile d of 6×6 pixels gives 4×4
outputs:

    y = Aᵀ [(G g Gᵀ) ⊙ (Bᵀ d B)] A              36 multiplications instead of 144

With channels, each of the 36 is a matrix product that all tiles share (Lavin & Gray 2015, arXiv:1509.09308):

    V = Bᵀ d B         (36, tiles, C_in)
    U = G weight Gᵀ    (36, C_in, C_out)
    M = V U            (36, tiles, C_out)        36 products, nearly all of the arithmetic
    y = Aᵀ M A

Bᵀ is applied to whole rows of the image at once, then B to six neighbouring pixels at a time: (6×6) @ (6×C), written
where the 36 products want it. Nothing is gathered; neighbouring tiles overlap by being views of the same memory.

The products come in pieces, small enough for BLAS to multiply them where they lie (`multiply` in `strips.py`). So U is made as panels of a
few output channels.

Gradients as in one dimension: Z = A dy Aᵀ, dU = Vᵀ Z, dweight = Gᵀ dU G; the gradient to the input is a convolution of
dy with the turned kernel, which here means G with its columns reversed.

In float32 the error, as the root of the sum of its squares over that of the result, is 2e-6 to 3e-6; the largest error over the
largest value is 5e-6 to 2e-5. Both are up to a hundred times as large where values are near 1e-39, which float32 holds with fewer
digits.

It wins where channels are many (`FEW_CHANNELS` in `__init__.py`). With only a few tiles, the transform of the weight costs as much as
it saves; and an image much smaller than a tile wastes most of it.
"""

from functools import partial

import numpy

from ..engine.calls import run, run_once
from ..engine.memory import empty, scratch
from ..engine.parallel import block_size, cut, cut_images
from ..engine.paths import note
from .kept import empty_to_keep
from .strips import LEAST_ROWS, NARROW, followed, following, multiply, overlapping, parts_of, pieces, sum_in_parts
from .winograd_1d import AT, BT, G, transform_rows, write_rows

TURNED_G = G[:, ::-1]                   # turns the kernel
TILE_VALUES = 16 * 1024                 # tiles times channels of one block, which has 36 times as many values in V
LEAST_TILES = 32                        # of one block, because it reads all of U
HALF_TILES = 96                         # of each of two blocks, where there are no more
FEW_TILES = 128                         # up to so many in all, blocks share the channels, not the tiles
SUMMED_TILES = 256                      # tiles that one term of a weight gradient sums over, if there are no more
SHARES = 8                              # blocks that share the channels
U_VALUES = 8 * 1024                     # of one panel at one point, unless it is narrow: it is read for every few tiles
DU_VALUES = 8 * 1024                    # at one point, of the part of a weight gradient that is transformed back while it is in the cache
DU_WIDTH = 128                          # output channels of one product of a weight gradient: by measurement


def transform_tiles(matrix, parts, images, tiles, padding, columns, name):
    """List the calls that make matrix d matrixᵀ (36, n·tiles·columns, C) for every tile d of the images, in scratch memory; return it.

    `parts` are arrays whose channels, side by side, are those of the image. `matrix` (6, q) is applied to q × q pixels. Tile (t, s)
    starts at pixel (4t, 4s) − padding.
    """
    q, C = matrix.shape[1], sum(part.shape[3] for part in parts)
    width = 4 * columns + q - 4
    shape = 6, 6, images.stop - images.start, tiles.stop - tiles.start, columns, C
    values = scratch(name, shape, parts[0].dtype)
    for part, channels in pieces(parts, slice(0, C)):
        rows = yield from transform_rows(matrix, part, images, tiles, padding, width, 'rows')     # (6, n, tiles, width, C)
        a, b, c, d, e = rows.strides
        windows = overlapping(rows, (*rows.shape[:3], columns, q, part.shape[3]), (a, b, c, 4 * d, d, e))
        yield partial(numpy.matmul, matrix.astype(part.dtype), windows, out=values[..., channels].transpose(0, 2, 3, 4, 1, 5))
    return values.reshape(36, -1, C)


def transform_weight(matrix, weight, U):
    """List the calls that fill U (36, C_in, C_out) with matrix weight matrixᵀ for `matrix` (6, 3)."""
    _, _, C_in, C_out = weight.shape
    matrix, taps = matrix.astype(weight.dtype), scratch('taps', (3, 3, C_in * C_out), weight.dtype)
    rows = scratch('rows', (3, 6, C_in * C_out), weight.dtype)
    yield partial(numpy.copyto, taps.reshape(weight.shape), weight)
    yield partial(numpy.matmul, matrix, taps.swapaxes(0, 1), out=rows)       # the columns first
    yield partial(numpy.matmul, matrix, rows.swapaxes(0, 1), out=U.reshape(6, 6, -1))


def _width(channels, most):
    """Return the largest divisor of the number of channels from 16 to `most`, or all of them."""
    return next((width for width in range(most, 15, -1) if channels % width == 0), channels)


def _panel(block, matrix, weight, starts, U):
    """List the calls that fill the k-th panel of U[i], (panels, 36, C_in, width), from the output channels that begin at starts[i]."""
    i, k = block
    width = U[i].shape[3]
    start = starts[i] + k * width
    return transform_weight(matrix, weight[..., start:start + width], U[i][k])


def convolve(x, weight, geometry, turned=False, bias=None, then=None, kept=None, split=None):
    """Return y (N, H_out, W_out, C_out): x convolved with weight or, C_in and C_out exchanged, the turned weight.

    With `split` a pair: its first `split` channels, and the others.
    """
    parts, matrix = tuple(numpy.ascontiguousarray(part) for part in parts_of(x)), G
    if turned:
        matrix, weight = TURNED_G, weight.swapaxes(2, 3)
    (N, H, W, _), (C_in, C_out) = parts[0].shape, weight.shape[2:]
    (H_out, W_out), padding = geometry.output_size((H, W)), geometry.padding
    R, columns = -(-H_out // 4), -(-W_out // 4)
    few = N * R * columns <= FEW_TILES
    tiles_per_block = FEW_TILES if few else block_size(N * R * columns, max(LEAST_TILES, TILE_VALUES // max(C_in, C_out)), HALF_TILES)
    starts = (0,) if split is None else (0, split)
    y = tuple(empty((N, H_out, W_out, stop - start), parts[0]) for start, stop in zip(starts, (*starts[1:], C_out)))
    widths = tuple(_width(result.shape[3], max(NARROW, min(64, U_VALUES // C_in))) for result in y)
    numbers = [result.shape[3] // width for result, width in zip(y, widths)]         # of panels

    def all_panels(make, run):
        """Return U of each result, (panels, 36, C_in, width), in arrays that `make` makes."""
        U = tuple(make((number, 36, C_in, width), parts[0]) for number, width in zip(numbers, widths))
        run(_panel, [(i, k) for i, number in enumerate(numbers) for k in range(number)], matrix, weight, starts, U)
        return U

    # With few tiles, U would be larger than all else: unless it is kept, each block then makes its panels as it uses them.
    note('few tiles' if few else 'many tiles')
    U = kept(('winograd_2d', *widths), lambda: all_panels(empty_to_keep, run_once)) if kept else None if few else all_panels(empty, run)
    shares = [(i, share) for i, number in enumerate(numbers) for share in cut(number, -(-number // SHARES) if few else number)]
    strips = cut_images(N, R, max(tiles_per_block // columns, -(-LEAST_TILES // columns)))
    blocks = [(strip, (share,)) for strip in strips for share in shares] if few else [(strip, tuple(shares)) for strip in strips]
    run(_convolve_calls, blocks, parts, matrix, weight, starts, widths, U, bias, y, padding, None if few else then)
    followed(y[0], then if few else None)
    return y[0] if split is None else y


def _convolve_calls(block, parts, matrix, weight, starts, widths, U, bias, y, padding, then):
    (images, tiles), shares = block
    (_, H_out, W_out, _), dtype, C_in = y[0].shape, y[0].dtype, weight.shape[2]
    n, number, columns = images.stop - images.start, tiles.stop - tiles.start, -(-W_out // 4)
    V = yield from transform_tiles(BT, parts, images, tiles, padding, columns, 'V')               # (36, tiles, C_in)
    for i, share in shares:
        width, some = widths[i], share.stop - share.start
        channels = slice(share.start * width, share.stop * width)
        M = scratch('M', (36, V.shape[1], some * width), dtype)
        of_panels = M.reshape(36, V.shape[1], some, width).transpose(2, 0, 1, 3)
        if U is not None:
            yield from multiply(V, U[i][share], of_panels)                   # (36, tiles, C_in) @ (panels, 36, C_in, width)
        else:
            for k in range(some):
                start, panel = starts[i] + (share.start + k) * width, scratch('U', (36, C_in, width), dtype)
                yield from transform_weight(matrix, weight[..., start:start + width], panel)
                yield from multiply(V, panel, of_panels[k])
        M = M.reshape(6, 6, n, number, columns, -1)
        if bias is not None:
            yield partial(numpy.add, M[1, 1], bias[channels], out=M[1, 1])   # Aᵀ's column of ones adds it to 16 outputs
        rows = scratch('rows', (6, n, number, columns, 4, some * width), dtype)
        yield partial(numpy.matmul, AT.astype(dtype), M.transpose(0, 2, 3, 4, 1, 5), out=rows)    # M A
        yield from write_rows(rows.reshape(6, n, number, 4 * columns, -1), y[i], images, tiles, channels)
    if then:
        rows = slice(4 * tiles.start, min(4 * tiles.stop, H_out))
        yield from following((images, rows), y[0], then)


def forward(x, weight, geometry, bias=None, then=None, kept=None):
    """Return y (N, H_out, W_out, C_out) for a 3×3 kernel at stride 1; see `plain.forward`, and the face of this package for the rest."""
    return convolve(x, weight, geometry, bias=bias, then=then, kept=kept)


def input_gradient(dy, weight, input_size, geometry, bias=None, then=None, split=None):
    """Return dx (N, H, W, C_in): dy convolved with the kernel turned by 180°; see `plain.input_gradient`."""
    return convolve(dy, weight, geometry.turned(), turned=True, bias=bias, then=then, split=split)


def weight_gradient(x, dy, geometry):
    """Return dweight (3, 3, C_in, C_out); see `plain.weight_gradient`."""
    parts, dy = [numpy.ascontiguousarray(part) for part in parts_of(x)], numpy.ascontiguousarray(dy)
    (N, H_out, W_out, C_out), C_in = dy.shape, sum(part.shape[3] for part in parts)
    columns = -(-W_out // 4)
    R = -(-H_out // 4)
    few = N * R * columns <= SUMMED_TILES
    strips = cut_images(N, R, (SUMMED_TILES if few else TILE_VALUES // max(C_in, C_out)) // columns)
    # With few tiles, blocks also share the input channels; each then transforms dy again.
    channels = cut(C_in, C_in if len(strips) > 4 else max(32, C_in // SHARES))
    return sum_in_parts((3, 3, C_in, C_out), dy, strips, channels, _term, tuple(parts), dy, geometry.padding)


def _term(block, within, name, parts, dy, padding):
    """dweight (3, 3, C, C_out) of the channels `within`."""
    (images, tiles), columns, C_out = block, -(-dy.shape[2] // 4), dy.shape[3]
    some = [part for part, _ in pieces(parts, within)]
    V = (yield from transform_tiles(BT, some, images, tiles, padding, columns, 'V')).swapaxes(1, 2)
    Z = yield from transform_tiles(AT.T, [dy], images, tiles, (0, 0), columns, 'Z')
    dweight = scratch(name, (3, 3, V.shape[1], C_out), dy.dtype)
    gt, width = G.T.astype(dy.dtype), _width(C_out, DU_WIDTH)
    panels = Z.reshape(36, -1, C_out // width, width).swapaxes(1, 2)                              # (36, panels, tiles, width)
    for piece in cut(V.shape[1], max(LEAST_ROWS, DU_VALUES // C_out)):
        number = piece.stop - piece.start
        dU = scratch('M', (6, 6, number * C_out), dy.dtype)
        yield from multiply(V[:, None, piece], panels, dU.reshape(36, number, C_out // width, width).swapaxes(1, 2))
        rows, taps = scratch('rows', (6, 3, number * C_out), dy.dtype), scratch('taps', (3, 3, number * C_out), dy.dtype)
        yield partial(numpy.matmul, gt, dU.swapaxes(0, 1), out=rows)
        yield partial(numpy.matmul, gt, rows.swapaxes(0, 1), out=taps)
        yield partial(numpy.copyto, dweight[:, :, piece], taps.reshape(3, 3, number, C_out))
    return dweight
