"""A U-Net with a ResNet as its way down (He et al. 2015, "Deep residual learning for image recognition", arXiv:1512.03385).

The way down is a ResNet-18: stages of two `BasicBlock`s, each stage but the first beginning with a stride of 2. The original stem, a 7×7
convolution with stride 2 and then a pooling, would leave 3×4 cells of an image of 96×128: here it is one 3×3 convolution. The way up
needs less: a transposed convolution, the join, one convolution. With base_channels = 16 and depth = 3:

    stem     96×128   16 ───────────── skip ────────────▶ ups.2   96×128   16 ─▶ head   96×128   1
    downs.0   48×64   32 ──────── skip ───────▶ ups.1   48×64   32
    downs.1   24×32   64 ─── skip ──▶ ups.0   24×32   64
    downs.2   12×16  128 ─────────────▲

The walk down and up, and back, is that of the U-Net.
"""

import numpy

from ..layers import Concat, Conv2D, ConvTranspose2D, Layer, ReLU
from .blocks import normalisation
from .fusing import back_in_sequence, in_sequence
from .residual import Stage
from .unet import UNet


class ResNetUNet(UNet):
    """Images (N, H, W, in_channels) to logits, as `UNet`, with the same arguments; `depth` is the number of stages with a stride."""

    def __init__(self, in_channels=1, out_channels=1, base_channels=32, depth=3, **options):
        super().__init__(in_channels, out_channels, base_channels, depth, **options)

    def parts(self, in_channels, channels, **options):
        stem = Stage(in_channels, channels[0], first=True, **options)
        downs = [Stage(few, many, stride=2, **options) for few, many in zip(channels, channels[1:])]
        ups = [PlainUp(many, few, **options) for few, many in reversed([*zip(channels, channels[1:])])]
        return stem, downs, ups


class PlainUp(Layer):
    """As `Up`, with one convolution: x (N, H, W, 2C) and the skip (N, 2H, 2W, C) give (N, 2H, 2W, C)."""

    def __init__(self, in_channels, out_channels, norm='batch', *, rng=None, dtype=numpy.float32):
        super().__init__()
        options = dict(rng=numpy.random.default_rng(rng), dtype=dtype)
        self.upconv, self.concat = ConvTranspose2D(in_channels, out_channels, **options), Concat()
        self.conv = Conv2D(2 * out_channels, out_channels, bias=norm is None, **options)
        self.norm, self.relu = normalisation(norm, out_channels, dtype), ReLU()
        self.add_children('upconv', 'concat', 'conv', 'norm', 'relu')

    def forward(self, x, skip):
        up = self.upconv.forward(x)                                             # (N, 2H, 2W, C)
        return in_sequence((skip, up), self.concat, self.conv, self.norm, self.relu)

    def backward(self, dy):
        dskip, dup = back_in_sequence(dy, self.concat, self.conv, self.norm, self.relu)
        return self.upconv.backward(dup), dskip
