"""Upsampling without weights: a small map drawn large, and the gradient drawn small again.

Along one axis, enlarging h values to H is linear, so it is a matrix R (H, h): row i says which of the h values the i-th of the H is made
of, and in what shares. Along both axes, for each channel by itself,

    Y = R_H X R_Wᵀ                      X (h, w), Y (H, W)

Pixels are squares, and their centres lie at ½, 1½, 2½, …, so the centre of row i of H lies at t = (i + ½)·h/H − ½ among the h. Then

    nearest     all of the value in whose square that centre lies
    bilinear    shares of the two values around t, in proportion to how close they are: λ = t − ⌊t⌋ of the lower, 1 − λ of the upper one;
                beyond the outermost centres there is only one

For instance 2 rows to 4, nearest and bilinear:

    1 0         1   0
    1 0         ¾  ¼
    0 1         ¼  ¾
    0 1         0   1

What a value gave, it gets back: the gradient is the adjoint, dX = R_Hᵀ dY R_W. The shares of a row sum to 1, so that an even map stays even.
"""

import math
from fractions import Fraction
from functools import lru_cache, partial, reduce

import numpy

from .checks import pair
from .engine.backend import device_of, get_array_module, move
from .engine.memory import empty
from .engine.parallel import one_thread_per_product
from .engine.paths import note, only_plain
from .engine.pixelwise import copy_into, for_rows
from .layers import Layer

MODES = 'nearest', 'bilinear'


def shares(length, enlarged, mode):
    """Return R (enlarged, length), float64: which values, in what shares, each of the enlarged row is made of."""
    R, place = numpy.zeros((enlarged, length)), numpy.arange(enlarged)
    if mode == 'nearest':
        R[place, ((2 * place + 1) * length) // (2 * enlarged)] = 1              # ⌊t + ½⌋, in whole numbers
        return R
    t = ((place + 0.5) * length / enlarged - 0.5).clip(0, length - 1)          # where the centres lie
    upper = numpy.floor(t).astype(int)
    R[place, upper] += 1 - (t - upper)
    R[place, numpy.minimum(upper + 1, length - 1)] += t - upper
    return R


@lru_cache(maxsize=256)
def _shares_on(device, dtype, length, enlarged, mode):
    return move(shares(length, enlarged, mode).astype(dtype), device)


@one_thread_per_product()
def resized(x, R_H, R_W):
    """Return R_H x R_Wᵀ for each channel of x (N, h, w, C): (N, H, W, C). R_H is (H, h), R_W is (W, w)."""
    (N, h, w, C), H, W = x.shape, len(R_H), len(R_W)
    rows, y = empty((N, H, w * C), x), empty((N * H, W, C), x)
    get_array_module(x).matmul(R_H, x.reshape(N, h, w * C), out=rows)           # (H, h) @ (N, h, w·C)
    get_array_module(x).matmul(R_W, rows.reshape(N * H, w, C), out=y)
    return y.reshape(N, H, W, C)


class Upsample2D(Layer):
    """(N, h, w, C) gives (N, H, W, C): `scale_factor` times the size, or the `size` (H, W) that forward is given.

    mode is 'nearest', every pixel repeated, or 'bilinear', with values in between: the equations are at the top of this file. Pixel
    centres are at ½, 1½, …, as in PyTorch with align_corners=False. Raises ValueError for a factor that is no whole number or pair of
    them, another mode, or a size below that of the input.
    """

    keeps = ()

    def __init__(self, scale_factor=2, mode='nearest'):
        super().__init__()
        if mode not in MODES:
            raise ValueError(f'mode is {mode!r}; expected one of {", ".join(MODES)}')
        self.scale_factor, self.mode = pair(scale_factor, 'scale_factor'), mode

    def forward(self, x, size=None):
        (_, h, w, _), (_, H, W, _) = x.shape, self.output_shape(x.shape, size)
        self.keep((h, w), (H, W))
        if self._repeats((h, w), (H, W)):
            return repeated(x, H // h, W // w)
        return resized(x, *self._shares(x, (h, w), (H, W)))

    def backward(self, dy):
        (h, w), (H, W) = self.take()
        if self._repeats((h, w), (H, W)):
            return sums_of_squares(dy, H // h, W // w)
        return resized(dy, *(R.T for R in self._shares(dy, (h, w), (H, W))))

    def output_shape(self, x, size=None):
        H, W = size or (x[1] * self.scale_factor[0], x[2] * self.scale_factor[1])
        if H < x[1] or W < x[2]:
            raise ValueError(f'a map of {x[1]}×{x[2]} cannot be enlarged to {H}×{W}')
        return x[0], H, W, x[3]

    def fitted(self, x, size=None):
        _, H, W, _ = self.output_shape(x, size)
        return Enlarging(self.mode, (Fraction(x[1], H), Fraction(x[2], W)))

    def _repeats(self, small, large):
        return self.mode == 'nearest' and not only_plain() and not any(long % short for short, long in zip(small, large))

    def _shares(self, x, small, large):
        return [_shares_on(device_of(x), x.dtype, *lengths, self.mode) for lengths in zip(small, large)]


class Enlarging(Layer):
    """An `Upsample2D` as it acts on one size of input: it knows h/H and w/W, and so what depends on what."""

    def __init__(self, mode, steps):
        super().__init__()
        self.mode, self.steps = mode, steps

    def input_range(self, first, last, axis):
        centres = [(place + Fraction(1, 2)) * self.steps[axis] - Fraction(1, 2) for place in (first, last)]
        if self.mode == 'nearest':
            return tuple(math.floor(t + Fraction(1, 2)) for t in centres)
        return math.floor(centres[0]), math.ceil(centres[1])


# --- Whole factors, nearest: no product is needed -----------------------------------------------------------------------

def squares_of(y, SH, SW):
    """Return y (N, H, W, C) as a view (N, H/SH, SH, W/SW, SW, C): the pixels that one pixel of the small map becomes."""
    N, H, W, C = y.shape
    return y.reshape(N, H // SH, SH, W // SW, SW, C)


def repeated(x, SH, SW):
    """Return x (N, h, w, C) with every pixel repeated SH times down and SW times across: (N, h·SH, w·SW, C)."""
    note('pixels repeated')
    N, h, w, C = x.shape
    y = empty((N, h * SH, w * SW, C), x)

    for_rows(x, _repeat, x, squares_of(y, SH, SW))
    return y


def _repeat(block, x, squares):
    yield partial(copy_into, squares[block], x[block][:, :, None, :, None])


def sums_of_squares(dy, SH, SW):
    """Return the sum of dy (N, H, W, C) over each square of SH × SW pixels, which all came from one: (N, H/SH, W/SW, C)."""
    note('pixels repeated')
    squares = squares_of(dy, SH, SW)
    dx = empty((squares.shape[0], squares.shape[1], squares.shape[3], squares.shape[5]), dy)

    for_rows(dx, _sum_of_square, squares, dx)
    return dx


def _sum_of_square(block, squares, dx):
    _, _, SH, _, SW, _ = squares.shape
    yield partial(_write_sum, [squares[block][:, :, i, :, j] for i in range(SH) for j in range(SW)], dx[block])


def _write_sum(arrays, out):
    out[...] = reduce(get_array_module(out).add, arrays)
