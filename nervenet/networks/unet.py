"""The U-Net (Ronneberger, Fischer & Brox 2015, arXiv:1505.04597).

Going down, the image is halved level by level while channels double: the network learns *what* there is and forgets *where*.
Going up, it is doubled again, and at each level joined with the map of the same size from the way down, the skip, which still
knows *where*. Size and channels of a U-Net of depth 4 with base_channels = 32, for an image of 96×128:

    stem     96×128   32 ───────────────── skip ────────────────▶ ups.3   96×128   32 ─▶ head   96×128   1
    downs.0   48×64   64 ──────────── skip ───────────▶ ups.2   48×64   64
    downs.1   24×32  128 ─────── skip ──────▶ ups.1   24×32  128
    downs.2   12×16  256 ── skip ─▶ ups.0   12×16  256
    downs.3     6×8  512 ────────────▲

Every stage is two 3×3 convolutions; a Down pools before them, an Up upsamples and joins before them.
"""

import numpy

from ..checks import positive
from ..engine.pixelwise import add
from ..layers import Conv2D, Dropout
from .blocks import DoubleConv, Down, Up
from .network import Network


class UNet(Network):
    """Images (N, H, W, in_channels) of intensities in [0, 1] to logits (N, H, W, out_channels), for any H and W from 1 up.

    base_channels  channels of the first level; level l has base_channels·2^l
    depth          how often the image is halved, 1 or more
    norm           'batch', or None for no normalisation
    dropout        probability of dropping a value after the deepest stage, as in the paper; 0 for none
    input_mean, input_std   of the training images' intensities: forward standardises with them, and they are saved with the
                   model, so that a loaded model cannot be fed wrongly scaled images
    rng            `numpy.random.Generator` of the initial weights and the dropout masks, or a seed for one
    dtype          of the parameters; the images must have the same

    `config` holds these arguments, enough to build the same architecture again.
    """

    def __init__(self, in_channels=1, out_channels=1, base_channels=32, depth=4, norm='batch', dropout=0.0,
                 input_mean=0.0, input_std=1.0, *, rng=None, dtype=numpy.float32):
        self.depth, base_channels = positive(depth, 'depth'), positive(base_channels, 'base_channels')
        config = dict(in_channels=in_channels, out_channels=out_channels, base_channels=base_channels, depth=self.depth, norm=norm,
                      dropout=float(dropout), input_mean=input_mean, input_std=input_std)
        super().__init__(config, multiple=2**self.depth, dtype=dtype)
        rng = numpy.random.default_rng(rng)                 # one stream for all weights
        channels = [base_channels * 2**level for level in range(self.depth + 1)]
        self.stem, self.downs, self.ups = self.parts(in_channels, channels, norm=norm, rng=rng, dtype=dtype)
        self.dropout = Dropout(dropout, rng=rng)
        self.head = Conv2D(channels[0], out_channels, kernel_size=1, rng=rng, dtype=dtype)

        self.children = {'stem': self.stem, **{f'downs.{i}': down for i, down in enumerate(self.downs)},
                         'dropout': self.dropout, **{f'ups.{i}': up for i, up in enumerate(self.ups)}, 'head': self.head}

    def parts(self, in_channels, channels, **options):
        """Return stem, downs and ups for so many channels of each level. A U-Net of other parts gives others."""
        stem = DoubleConv(in_channels, channels[0], **options)
        downs = [Down(few, many, **options) for few, many in zip(channels, channels[1:])]
        ups = [Up(many, few, **options) for few, many in reversed([*zip(channels, channels[1:])])]
        return stem, downs, ups

    def forward(self, x, observe=None):
        """Return the logits of the images x. `observe(name, y)`, if given, is called with each stage's name and output."""
        observe = observe or (lambda name, y: None)
        H, W = x.shape[1:3]
        x = self.prepare(x)                                 # (N, H', W', C), H' and W' divisible by 2^depth
        x = self.stem.forward(x)                            # (N, H', W', base_channels)
        observe('stem', x)
        skips = []
        for i, down in enumerate(self.downs):
            skips.append(x)
            x = down.forward(x)                             # half the height and width, twice the channels
            observe(f'downs.{i}', x)
        x = self.dropout.forward(x)
        for i, up in enumerate(self.ups):
            x = up.forward(x, skips.pop())                  # twice the height and width, half the channels
            observe(f'ups.{i}', x)
        logits = self.head.forward(x)[:, :H, :W]            # (N, H, W, out_channels)
        observe('head', logits)
        return logits

    def backward(self, dlogits, input_gradient=True):
        """Return dx for the images: forward's walk reversed, each call answered by its backward.

        A skip has two readers, the Down below it and the Up beside it, so its gradient is the sum of two. Training has no use
        for dx, the last thing to be computed: without `input_gradient` it is not, and None is returned.
        """
        H, W = dlogits.shape[1:3]
        # The logits of the padding were cut off, so no loss depends on them: their gradient is 0.
        dx = self.head.backward(self.pad(dlogits))
        dskips = []
        for up in reversed(self.ups):
            dx, dskip = up.backward(dx)
            dskips.append(dskip)
        dx = self.dropout.backward(dx)
        for down in reversed(self.downs):
            dx = add(down.backward(dx), dskips.pop())
        dx = self.stem.backward(dx, input_gradient=input_gradient)
        return self.input_gradient_of(dx, (H, W))

    def joins(self):
        return {f'ups.{i}': up.concat for i, up in enumerate(self.ups)}
