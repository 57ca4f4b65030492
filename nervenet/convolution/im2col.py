"""Convolution as one matrix product: windows laid out as rows.

Write every window of the image as one row of a matrix, its KH·KW·C_in pixel values one after the other ("im2col"), and
the whole convolution becomes

    y (pixels, C_out) = columns (pixels, KH·KW·C_in) @ weight (KH·KW·C_in, C_out)

One product with a long inner side is what BLAS does best. The price is that a 3×3 kernel copies each pixel nine times:
done for the whole image, that is nine times the memory written, and read again. So the image is cut into strips of rows
whose columns stay in the cache between the copy and the product. (Strips, not the copy itself, are what makes it fast:
240 against 25 GF/s.)

An image of one or a few channels has windows of a few values, too short to be copied one by one. There the matrix is
laid the other way: a row for each tap, holding what that tap meets over the whole strip, which lies in memory as
the rows of the image do. BLAS multiplies by a transposed matrix as fast, and the first layer of a U-Net runs at twice
the speed.

The gradient to the weight is the same line solved for `weight`: columnsᵀ @ dy, summed over the strips. The gradient to
the input, at stride 1, is again a convolution, with the kernel turned by 180°: see `Geometry.turned`.

It serves every geometry, and rounds like the plain path.
"""

from functools import partial

import numpy

from ..engine.calls import run
from ..engine.memory import empty, scratch
from ..engine.parallel import cut, cut_images
from ..engine.paths import note
from . import plain
from .geometry import turn
from .strips import followed, following, multiply, overlapping, padded_strip, sum_in_parts, sum_products

COLUMN_BYTES = 512 * 1024               # of one strip; they must stay in a core's own cache (1 MiB) beside the weight
LEAST_PIXELS = 64                       # of one strip, because it reads the whole weight
FEW_CHANNELS = 5                        # of the input: fewer are copied tap by tap
CHANNELS = 128                          # wide enough for a product to run at full speed


def columns_of(x, images, rows, geometry, W_out):
    """List the calls that make the windows of output rows `rows` a matrix (n·rows·W_out, KH·KW·C) in scratch memory; return it."""
    (KH, KW), (SH, SW), (DH, DW) = geometry.kernel_size, geometry.stride, geometry.dilation
    (EH, EW), (PH, PW) = geometry.extent, geometry.padding
    height, width = rows.stop - rows.start, W_out
    strip = yield from padded_strip(x, images, rows.start * SH - PH, -PW, (height - 1) * SH + EH, (width - 1) * SW + EW)
    n, _, _, C = strip.shape
    a, b, c, d = strip.strides
    if C < FEW_CHANNELS:
        # Few values lie side by side in a window, many in a row of the image: copy what one tap meets along each row.
        taps = overlapping(strip, (KH, KW, C, n, height, width), (b * DH, c * DW, d, a, b * SH, c * SW))
        columns = scratch('columns', taps.shape, x.dtype)
        yield partial(numpy.copyto, columns, taps)
        return columns.reshape(KH * KW * C, n * height * width).T
    # Undilated, the KW pixels of a window's row lie side by side in memory, and NumPy copies them as one run of KW·C values.
    windows = overlapping(strip, (n, height, width, KH, KW, C), (a, b * SH, c * SW, b * DH, c * DW, d))
    columns = scratch('columns', windows.shape, x.dtype)
    yield partial(numpy.copyto, columns, windows)
    return columns.reshape(n * height * width, KH * KW * C)


def rows_per_block(W_out, row_values, itemsize):
    """Return how many output rows have columns of about COLUMN_BYTES, if each output pixel needs `row_values` values.

    At least LEAST_PIXELS pixels: a product reads the whole weight for them.
    """
    return -(-max(LEAST_PIXELS, COLUMN_BYTES // (row_values * itemsize)) // W_out)


def forward(x, weight, geometry, bias=None, then=None):
    """Return y (N, H_out, W_out, C_out); see `plain.forward`, and for `then` the face of this package."""
    KH, KW, C_in, C_out = weight.shape
    H_out, W_out = geometry.output_size(x.shape[1:3])
    y = empty((len(x), H_out, W_out, C_out), x)
    matrix = weight.reshape(-1, C_out)                                       # (KH·KW·C_in, C_out)
    strips = cut_images(len(x), H_out, rows_per_block(W_out, KH * KW * C_in, x.itemsize))
    # Where the image is small and the channels are many, blocks also share the output channels.
    channels = cut(C_out, CHANNELS if len(strips) < 8 else C_out)
    if len(channels) > 1:
        note('shared output channels')

    blocks = [(strip, out) for strip in strips for out in channels]
    run(_forward_calls, blocks, x, matrix, y, bias, geometry, then if len(channels) == 1 else None)
    return followed(y, then if len(channels) > 1 else None)


def _forward_calls(block, x, matrix, y, bias, geometry, then):
    (images, rows), out = block
    W_out, shared = y.shape[2], out.stop - out.start < y.shape[3]
    columns = yield from columns_of(x, images, rows, geometry, W_out)
    if shared:
        product = scratch('product', (len(columns), out.stop - out.start), y.dtype)
    else:
        product = y[images, rows].reshape(len(columns), -1)                  # a view
    yield from multiply(columns, matrix[:, out], product)                    # (n·rows·W_out, channels)
    if bias is not None:
        yield partial(numpy.add, product, bias[out], out=product)
    if shared:
        yield partial(numpy.copyto, y[images, rows, :, out], product.reshape(-1, rows.stop - rows.start, W_out, product.shape[1]))
    elif then:
        yield from following((images, rows), y, then)


def input_gradient(dy, weight, input_size, geometry, bias=None):
    """Return dx (N, H, W, C_in); see `plain.input_gradient`."""
    (C_in, C_out), turned = weight.shape[2:], geometry.turned()
    pixels = dy.size // C_out
    if turned and pixels > C_in:
        return forward(dy, turn(weight), turned, bias)
    # Elsewhere turning the weight would cost more than it saves, or a stride leaves holes: the plain sum, in blocks.
    note('plain sums')
    dx = empty((len(dy), *input_size, C_in), dy)

    images = cut(len(dy), max(1, 256 * len(dy) // pixels))
    channels = cut(C_in, CHANNELS if len(images) < 8 else C_in)
    run(_plain_sums, [(some, within) for some in images for within in channels], dy, weight, dx, bias, geometry)
    return dx


def _plain_sums(block, dy, weight, dx, bias, geometry):
    images, channels = block
    yield partial(_plain_sum, dy[images], weight[:, :, channels], None if bias is None else bias[channels], geometry,
                  dx[images, :, :, channels])


def _plain_sum(dy, weight, bias, geometry, out):
    out[...] = plain.input_gradient(dy, weight, out.shape[1:3], geometry, bias)


def weight_gradient(x, dy, geometry):
    """Return dweight (KH, KW, C_in, C_out); see `plain.weight_gradient`."""
    (KH, KW), (N, _, _, C_in), (_, H_out, W_out, C_out) = geometry.kernel_size, x.shape, dy.shape
    dy = numpy.ascontiguousarray(dy)
    strips = cut_images(N, H_out, rows_per_block(W_out, KH * KW * min(C_in, CHANNELS), x.itemsize))

    return sum_in_parts((KH, KW, C_in, C_out), x, strips, cut(C_in, CHANNELS), _term, x, dy, geometry)


def _term(strip, within, name, x, dy, geometry):
    images, rows = strip
    columns = yield from columns_of(x[..., within], images, rows, geometry, dy.shape[2])
    product = scratch(name, (columns.shape[1], dy.shape[3]), dy.dtype)
    yield from sum_products(columns[None], dy[images, rows].reshape(1, -1, dy.shape[3]), product)            # columnsᵀ @ dy
    return product
