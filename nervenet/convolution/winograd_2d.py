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

The products come in pieces of about half a million multiplications: such small matrices BLAS multiplies where they lie,
without rearranging them first. So U is made as panels of a few output channels.

Gradients as in one dimension: Z = A dy Aᵀ, dU = Vᵀ Z, dweight = Gᵀ dU G; the gradient to the input is a convolution of
dy with the turned kernel, which here means G with its columns reversed.

In float32 the error, as the root of the sum of its squares over that of the result, is 2e-6 to 3e-6; the largest error over the
largest value is 5e-6 to 2e-5. Both are up to a hundred times as large where values are near 1e-39, which float32 holds with fewer
digits.

It wins where channels are many (`FEW_CHANNELS` in `__init__.py`). With only a few tiles, the transform of the weight costs as much as
it saves; and an image much smaller than a tile wastes most of it.
"""

import numpy

from ..engine.memory import empty, scratch
from ..engine.parallel import block_size, cut, cut_images, parallel_for
from ..engine.paths import note
from .strips import followed, overlapping, parts_of, pieces, sum_in_parts
from .winograd_1d import AT, BT, G, transform_rows, write_rows

TILE_VALUES = 16 * 1024                 # tiles times channels of one block, which has 36 times as many values in V
LEAST_TILES = 32                        # of one block, because it reads all of U
HALF_TILES = 96                         # of each of two blocks, where there are no more
FEW_TILES = 128                         # up to so many in all, blocks share the channels, not the tiles
SUMMED_TILES = 256                      # tiles that one term of a weight gradient sums over, if there are no more
SHARES = 8                              # blocks that share the channels
PIECE = 512 * 1024                      # multiplications of one product


def transform_tiles(matrix, parts, images, tiles, padding, columns, name):
    """Return matrix d matrixᵀ (36, n·tiles·columns, C) for every tile d of the images, in scratch memory.

    `parts` are arrays whose channels, side by side, are those of the image. `matrix` (6, q) is applied to q × q pixels. Tile (t, s)
    starts at pixel (4t, 4s) − padding.
    """
    q, C = matrix.shape[1], sum(part.shape[3] for part in parts)
    width = 4 * columns + q - 4
    shape = 6, 6, images.stop - images.start, tiles.stop - tiles.start, columns, C
    values = scratch(name, shape, parts[0].dtype)
    for part, channels in pieces(parts, slice(0, C)):
        rows = transform_rows(matrix, part, images, tiles, padding, width, 'rows')                # (6, n, tiles, width, C)
        a, b, c, d, e = rows.strides
        windows = overlapping(rows, (*rows.shape[:3], columns, q, part.shape[3]), (a, b, c, 4 * d, d, e))
        numpy.matmul(matrix.astype(part.dtype), windows, out=values[..., channels].transpose(0, 2, 3, 4, 1, 5))
    return values.reshape(36, -1, C)


def transform_weight(matrix, weight, U):
    """Return U (36, C_in, C_out), filled with matrix weight matrixᵀ for `matrix` (6, 3)."""
    _, _, C_in, C_out = weight.shape
    matrix, taps = matrix.astype(weight.dtype), numpy.ascontiguousarray(weight).reshape(3, 3, -1)
    rows = scratch('rows', (3, 6, C_in * C_out), weight.dtype)
    numpy.matmul(matrix, taps.swapaxes(0, 1), out=rows)                      # the columns first
    numpy.matmul(matrix, rows.swapaxes(0, 1), out=U.reshape(6, 6, -1))
    return U


def convolve(x, weight, geometry, turned=False, bias=None, then=None, kept=None, split=None):
    """Return y (N, H_out, W_out, C_out): x convolved with weight or, C_in and C_out exchanged, the turned weight.

    With `split` a pair: its first `split` channels, and the others.
    """
    parts, matrix = [numpy.ascontiguousarray(part) for part in parts_of(x)], G
    if turned:
        matrix, weight = G[:, ::-1], weight.swapaxes(2, 3)                   # the reversed columns turn the kernel
    (N, H, W, _), (C_in, C_out), dtype = parts[0].shape, weight.shape[2:], parts[0].dtype
    (H_out, W_out), padding = geometry.output_size((H, W)), geometry.padding
    R, columns = -(-H_out // 4), -(-W_out // 4)
    few = N * R * columns <= FEW_TILES
    tiles_per_block = FEW_TILES if few else block_size(N * R * columns, max(LEAST_TILES, TILE_VALUES // max(C_in, C_out)), HALF_TILES)
    outs = [slice(0, C_out)] if split is None else [slice(0, split), slice(split, C_out)]
    y = [empty((N, H_out, W_out, out.stop - out.start), parts[0]) for out in outs]
    most = max(16, min(64, PIECE // (min(tiles_per_block, N * R * columns) * C_in)))
    widths = [next((n for n in range(most, 15, -1) if result.shape[3] % n == 0), result.shape[3]) for result in y]
    at = AT.astype(dtype)

    def panel(i, k, U):
        """Fill U (36, C_in, width) with the k-th panel of result i, and return it."""
        start = outs[i].start + k * widths[i]
        return transform_weight(matrix, weight[..., start:start + widths[i]], U)

    def all_panels():
        """Return U of each result, (panels, 36, C_in, width)."""
        shapes = [(result.shape[3] // width, 36, C_in, width) for result, width in zip(y, widths)]
        U = [numpy.empty(shape, dtype) if kept else empty(shape, result) for shape, result in zip(shapes, y)]
        parallel_for([(i, k) for i, panels in enumerate(U) for k in range(len(panels))], lambda block: panel(*block, U[block[0]][block[1]]))
        return U

    # With few tiles, U would be larger than all else: unless it is kept, each block then makes its panels as it uses them.
    note('few tiles' if few else 'many tiles')
    U = kept(('winograd_2d', *widths), all_panels) if kept else None if few else all_panels()

    def work(block):
        (images, tiles), shares = block
        n, number = images.stop - images.start, tiles.stop - tiles.start
        V = transform_tiles(BT, parts, images, tiles, padding, columns, 'V')                      # (36, tiles, C_in)
        for i, share in shares:
            width, some = widths[i], share.stop - share.start
            channels = slice(share.start * width, share.stop * width)
            M = scratch('M', (36, V.shape[1], some * width), dtype)
            of_panels = M.reshape(36, V.shape[1], some, width).transpose(2, 0, 1, 3)
            if U is not None:
                numpy.matmul(V, U[i][share], out=of_panels)                  # (36, tiles, C_in) @ (panels, 36, C_in, width)
            else:
                for k in range(some):
                    numpy.matmul(V, panel(i, share.start + k, scratch('U', (36, C_in, width), dtype)), out=of_panels[k])
            M = M.reshape(6, 6, n, number, columns, -1)
            if bias is not None:
                M[1, 1] += bias[channels]                                    # Aᵀ's column of ones adds it to 16 outputs
            rows = scratch('rows', (6, n, number, columns, 4, some * width), dtype)
            numpy.matmul(at, M.transpose(0, 2, 3, 4, 1, 5), out=rows)        # M A
            write_rows(rows.reshape(6, n, number, 4 * columns, -1), y[i], images, tiles, channels)
        if then and not few:
            rows = slice(4 * tiles.start, min(4 * tiles.stop, H_out))
            then((images, rows), y[0][images, rows])

    shares = [(i, share) for i, (result, width) in enumerate(zip(y, widths)) for panels in [result.shape[3] // width]
              for share in cut(panels, -(-panels // SHARES) if few else panels)]
    strips = cut_images(N, R, tiles_per_block // columns)
    parallel_for([(strip, [share]) for strip in strips for share in shares] if few else [(strip, shares) for strip in strips], work)
    followed(y[0], then if few else None)
    return y[0] if split is None else tuple(y)


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
    gt = G.T.astype(dy.dtype)
    R = -(-H_out // 4)
    few = N * R * columns <= SUMMED_TILES
    strips = cut_images(N, R, (SUMMED_TILES if few else TILE_VALUES // max(C_in, C_out)) // columns)
    # With few tiles, blocks also share the input channels; each then transforms dy again.
    channels = cut(C_in, C_in if len(strips) > 4 else max(32, C_in // SHARES))

    def term(block, within):
        images, tiles = block
        some = [part for part, _ in pieces(parts, within)]
        V = transform_tiles(BT, some, images, tiles, geometry.padding, columns, 'V').swapaxes(1, 2)
        Z = transform_tiles(AT.T, [dy], images, tiles, (0, 0), columns, 'Z')
        dweight = numpy.empty((3, 3, V.shape[1], C_out), dy.dtype)
        for piece in cut(V.shape[1], max(32, PIECE // (V.shape[2] * C_out))):
            dU = scratch('M', (36, piece.stop - piece.start, C_out), dy.dtype)
            numpy.matmul(V[:, piece], Z, out=dU)
            rows = gt @ dU.reshape(6, 6, -1).swapaxes(0, 1)                  # (6, 3, …)
            dweight[:, :, piece] = (gt @ rows.swapaxes(0, 1)).reshape(3, 3, -1, C_out)
        return dweight

    return sum_in_parts((3, 3, C_in, C_out), dy, strips, channels, term)
