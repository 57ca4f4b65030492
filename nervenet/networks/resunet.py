"""The ResU-Net (Zhang, Liu & Wang 2018, "Road extraction by deep residual U-Net", arXiv:1711.10684).

A U-Net whose parts are residual blocks. It steps down by convolutions with stride 2, which choose what to keep, in place of pooling; and
it steps up by repeating pixels, in place of a transposed convolution. Size and channels at depth 4 with base_channels = 16, for an image of 96×128:

    stem     96×128   16 ───────────────── skip ────────────────▶ ups.3   96×128   16 ─▶ head   96×128   1
    downs.0   48×64   32 ──────────── skip ───────────▶ ups.2   48×64   32
    downs.1   24×32   64 ─────── skip ──────▶ ups.1   24×32   64
    downs.2   12×16  128 ── skip ─▶ ups.0   12×16  128
    downs.3     6×8  256 ────────────▲

Every stage is one `PreActivationBlock`. The walk down and up, and back, is that of the U-Net.
"""

import numpy

from ..layers import Concat, Layer
from ..resampling import Upsample2D
from .residual import PreActivationBlock
from .unet import UNet


class ResUNet(UNet):
    """Images (N, H, W, in_channels) to logits, as `UNet`, with the same arguments; `depth` is how often a stride halves the image."""

    def parts(self, in_channels, channels, **options):
        stem = PreActivationBlock(in_channels, channels[0], first=True, **options)
        downs = [PreActivationBlock(few, many, stride=2, **options) for few, many in zip(channels, channels[1:])]
        ups = [ResidualUp(many, few, few, **options) for few, many in reversed([*zip(channels, channels[1:])])]
        return stem, downs, ups


class ResidualUp(Layer):
    """Repeat the pixels of x (N, H, W, A) to (N, 2H, 2W, A), join them with the skip (N, 2H, 2W, B), then a residual block: (N, 2H, 2W, C)."""

    def __init__(self, below_channels, skip_channels, out_channels, norm='batch', *, rng=None, dtype=numpy.float32):
        super().__init__()
        self.upsample, self.concat = Upsample2D(2, 'nearest'), Concat()
        self.block = PreActivationBlock(skip_channels + below_channels, out_channels, norm=norm, rng=rng, dtype=dtype)
        self.add_children('upsample', 'concat', 'block')

    def forward(self, x, skip):
        up = self.upsample.forward(x)                                           # (N, 2H, 2W, A)
        return self.block.forward(self.concat.forward(skip, up))

    def backward(self, dy):
        dskip, dup = self.concat.backward(self.block.backward(dy))
        return self.upsample.backward(dup), dskip
