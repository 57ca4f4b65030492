"""The parts that networks are built of: two convolutions, alone (DoubleConv), after a step down (Down), after a step up (Up)."""

import numpy

from ..layers import BatchNorm2D, Concat, Conv2D, ConvTranspose2D, Layer, MaxPool2D, ReLU
from .fusing import back_in_sequence, in_sequence


def normalisation(norm, channels, dtype):
    """Return the layer that `norm` stands for: 'batch', or None for no layer. Raises ValueError for anything else."""
    if norm not in ('batch', None):
        raise ValueError(f"norm is {norm!r}; expected 'batch' or None")
    return BatchNorm2D(channels, dtype=dtype) if norm else None


class DoubleConv(Layer):
    """Twice: 3×3 convolution, norm (if any), ReLU. (N, H, W, C_in) gives (N, H, W, C_out).

    A convolution that a norm follows has no bias: the norm would subtract it again. Raises ValueError for an unknown norm.
    """

    def __init__(self, in_channels, out_channels, norm='batch', *, rng=None, dtype=numpy.float32):
        super().__init__()
        rng = numpy.random.default_rng(rng)

        def convolution(channels):
            return Conv2D(channels, out_channels, bias=norm is None, rng=rng, dtype=dtype)

        self.conv1, self.conv2 = convolution(in_channels), convolution(out_channels)
        self.norm1, self.norm2 = (normalisation(norm, out_channels, dtype) for _ in range(2))
        self.relu1, self.relu2 = ReLU(), ReLU()
        self.add_children('conv1', 'norm1', 'relu1', 'conv2', 'norm2', 'relu2')

    @property
    def sequence(self):
        return self.conv1, self.norm1, self.relu1, self.conv2, self.norm2, self.relu2

    def forward(self, x):
        return in_sequence(x, *self.sequence)

    def backward(self, dy, **options):
        """Return dx; `options` are for the backward of the first convolution."""
        return back_in_sequence(dy, *self.sequence, **options)


class Down(DoubleConv):
    """2×2 max-pooling, then two convolutions: (N, H, W, C) gives (N, H/2, W/2, C_out)."""

    def __init__(self, in_channels, out_channels, norm='batch', *, rng=None, dtype=numpy.float32):
        super().__init__(in_channels, out_channels, norm, rng=rng, dtype=dtype)
        self.pool = MaxPool2D(2)
        self.children = {'pool': self.pool, **self.children}

    def forward(self, x):
        return super().forward(self.pool.forward(x))

    def backward(self, dy):
        return self.pool.backward(super().backward(dy))


class Up(DoubleConv):
    """Upsample x (N, H, W, 2C) to (N, 2H, 2W, C), join it with the skip (N, 2H, 2W, C), then two convolutions.

    The join doubles the channels, which is why the first convolution maps 2C to C. It would be the largest array of all, and half of it
    is the skip, which is kept anyway; but for `nervenet.plain()` it is never made: see `fusing`.
    """

    def __init__(self, in_channels, out_channels, norm='batch', *, rng=None, dtype=numpy.float32):
        rng = numpy.random.default_rng(rng)
        super().__init__(2 * out_channels, out_channels, norm, rng=rng, dtype=dtype)
        self.upconv = ConvTranspose2D(in_channels, out_channels, rng=rng, dtype=dtype)
        self.concat = Concat()
        self.children = {'upconv': self.upconv, 'concat': self.concat, **self.children}

    def forward(self, x, skip):
        up = self.upconv.forward(x)                                             # (N, 2H, 2W, C)
        return in_sequence((skip, up), self.concat, *self.sequence)

    def backward(self, dy):
        dskip, dup = back_in_sequence(dy, self.concat, *self.sequence)
        return self.upconv.backward(dup), dskip
