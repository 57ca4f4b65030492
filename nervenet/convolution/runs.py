"""Convolution on a device: every product is one of two matrices, and no window is copied nine times.

A GPU multiplies two large matrices at full speed, and everything else is limited by how often it walks over memory, or by how
many operations it is asked for. So a convolution with stride 1 is written as KH products of tall matrices. Take the padded images
(N, Hp, Wp, C) as one long list of pixels, row after row, image after image:

    pixels (N·Hp·Wp, C)

In this list the pixel j columns right of another is j places further, and the one i rows below is i·Wp places further. So the KW
pixels of one row of a window lie side by side, and put into one row of a matrix they are

    runs (N·Hp·Wp − KW + 1, KW·C)           run r = pixels r, r + 1, …, r + KW − 1    (dilated: r, r + dilation, …)

which is KW times the image, not KH·KW times. The window that begins at pixel r is the runs r, r + Wp, r + 2·Wp, …, and the
convolution at all places at once is a sum of KH products of `runs`, each from another row on, which costs no copy:

    sums[r] = Σ_i  runs[r + i·Wp] @ weight[i]           weight[i] (KW·C_in, C_out)

Places whose window runs over the end of a row into the next one, or of an image, get a sum too, which nobody asked for: it is left
behind when y is cut out of `sums`. That wastes a share of about (KW − 1)/Wp + (KH − 1)/Hp. The other two functions are the same
line, solved as in `plain`.

Where windows tile the image (1×1, and 2×2 with stride 2) one product does it all; other strides go to `plain`.

cuBLAS reads two-dimensional arrays without copying them if they are contiguous, or the transpose of such a one, and only for those
does CuPy offer TF32. With runs, a few images are treated at a time, which bounds the memory that all this takes.
"""

from ..engine.backend import get_array_module
from . import patches, plain
from .geometry import turn

SCRATCH_BYTES = 2**28                   # of all that the images treated at once need besides their result


def images_at_once(x, padding, values):
    """Return slices of the images x (N, H, W, C) that need about SCRATCH_BYTES, at so many values for each padded pixel."""
    N, H, W, _ = x.shape
    step = max(1, SCRATCH_BYTES // ((H + 2 * padding[0]) * (W + 2 * padding[1]) * values * x.itemsize))
    return [slice(start, min(start + step, N)) for start in range(0, N, step)]


def runs_of(padded, geometry):
    """Return (runs, starts, step): the runs (…, KW·C) of the padded images (n, Hp, Wp, C); at how many of them a window may begin;
    and how much further the run for the next row of taps lies."""
    (_, KW), (DH, DW), (EH, EW), (n, Hp, Wp, C) = geometry.kernel_size, geometry.dilation, geometry.extent, padded.shape
    pixels = padded.reshape(n * Hp * Wp, C)
    length = len(pixels) - EW + 1
    runs = get_array_module(padded).concatenate([pixels[j * DW:j * DW + length] for j in range(KW)], axis=1)
    return runs, length - (EH - 1) * Wp, DH * Wp


def forward(x, weight, geometry, bias=None):
    """Return y (N, H_out, W_out, C_out); see `plain.forward`."""
    KH, KW, C_in, C_out = weight.shape
    if patches.fits(geometry, x.shape[1:3]):
        return forward_of_tiles(x, weight, bias)
    if geometry.stride != (1, 1):
        return plain.forward(x, weight, geometry, bias)
    H_out, W_out = geometry.output_size(x.shape[1:3])
    xp = get_array_module(x)
    y = xp.empty((len(x), H_out, W_out, C_out), x.dtype)
    rows = weight.reshape(KH, KW * C_in, C_out)
    for images in images_at_once(x, geometry.padding, C_in + KW * C_in + 2 * C_out):  # padded image, runs, sums and what is added to them
        padded = plain.pad(x[images], geometry.padding)
        n, Hp, Wp, _ = padded.shape
        runs, starts, step = runs_of(padded, geometry)
        places = xp.empty((n, Hp, Wp, C_out), x.dtype)
        sums = places.reshape(n * Hp * Wp, C_out)[:starts]                   # a view; the few places after it stay unread
        xp.matmul(runs[:starts], rows[0], out=sums)                          # (starts, KW·C_in) @ (KW·C_in, C_out)
        for i in range(1, KH):
            sums += runs[i * step:i * step + starts] @ rows[i]
        wanted = places[:, :H_out, :W_out]
        if bias is None:
            y[images] = wanted
        else:
            xp.add(wanted, bias, out=y[images])
    return y


def input_gradient(dy, weight, input_size, geometry, bias=None):
    """Return dx (N, H, W, C_in); see `plain.input_gradient`. At stride 1 it is a convolution, as in `im2col`."""
    if patches.fits(geometry, input_size):
        return input_gradient_of_tiles(dy, weight, bias)
    if turned := geometry.turned():
        return forward(dy, turn(weight), turned, bias)
    return plain.input_gradient(dy, weight, input_size, geometry, bias)


def weight_gradient(x, dy, geometry):
    """Return dweight (KH, KW, C_in, C_out); see `plain.weight_gradient`.

    dy is laid out like the places of forward, with zeros at the places that were left behind: what nobody asked for moved nothing.
    """
    (KH, KW), C_in, (_, H_out, W_out, C_out) = geometry.kernel_size, x.shape[3], dy.shape
    if patches.fits(geometry, x.shape[1:3]):
        return weight_gradient_of_tiles(x, dy, geometry.kernel_size)
    if geometry.stride != (1, 1):
        return plain.weight_gradient(x, dy, geometry)
    xp = get_array_module(x)
    dweight = xp.zeros((KH, KW * C_in, C_out), x.dtype)
    for images in images_at_once(x, geometry.padding, C_in + KW * C_in + C_out):      # padded image, runs and dplaces
        padded = plain.pad(x[images], geometry.padding)
        n, Hp, Wp, _ = padded.shape
        runs, starts, step = runs_of(padded, geometry)
        dplaces = xp.zeros((n, Hp, Wp, C_out), x.dtype)
        dplaces[:, :H_out, :W_out] = dy[images]
        dsums = dplaces.reshape(n * Hp * Wp, C_out)[:starts]
        for i, drow in enumerate(dweight):
            drow += runs[i * step:i * step + starts].T @ dsums                   # (KW·C_in, starts) @ (starts, C_out)
    return dweight.reshape(KH, KW, C_in, C_out)


# --- Windows that tile the image: see `patches` for the mathematics -----------------------------------------------------

def tiles_of(x, kernel_size):
    """Return x (N, H, W, C) as a matrix (N·H/KH·W/KW, KH·KW·C), one window in each row: a view for 1×1, else a copy."""
    (KH, KW), (N, H, W, C) = kernel_size, x.shape
    windows = x.reshape(N, H // KH, KH, W // KW, KW, C).transpose(0, 1, 3, 2, 4, 5)      # (N, H/KH, W/KW, KH, KW, C)
    return windows.reshape(-1, KH * KW * C)


def forward_of_tiles(x, weight, bias):
    KH, KW, _, C_out = weight.shape
    y = tiles_of(x, (KH, KW)) @ weight.reshape(-1, C_out)                    # (pixels, KH·KW·C_in) @ (KH·KW·C_in, C_out)
    return plus(y, bias).reshape(len(x), x.shape[1] // KH, x.shape[2] // KW, C_out)


def input_gradient_of_tiles(dy, weight, bias):
    (KH, KW, C_in, C_out), (N, H_out, W_out, _) = weight.shape, dy.shape
    dtiles = dy.reshape(-1, C_out) @ weight.reshape(-1, C_out).T             # (pixels, C_out) @ (C_out, KH·KW·C_in)
    dtiles = plus(dtiles.reshape(N, H_out, W_out, KH, KW, C_in), bias)
    return dtiles.transpose(0, 1, 3, 2, 4, 5).reshape(N, H_out * KH, W_out * KW, C_in)


def weight_gradient_of_tiles(x, dy, kernel_size):
    C_in, C_out = x.shape[3], dy.shape[3]
    return (tiles_of(x, kernel_size).T @ dy.reshape(-1, C_out)).reshape(*kernel_size, C_in, C_out)


def plus(y, bias):
    """Return y + bias, or y itself without one."""
    return y if bias is None else y + bias
