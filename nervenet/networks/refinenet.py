"""RefineNet (Lin, Milan, Shen & Reid 2017, "Multi-path refinement networks for high-resolution semantic segmentation", arXiv:1611.06612).

The way down is a ResNet, as in `resnet.py`, here with a stride from the first convolution on. On the way up a coarse map is not joined with a
finer one but added to it, and what came out is refined by residual blocks and by chained pooling, which looks far around at little cost.
With base_channels = 16, depth = 4, for an image of 96×128:

    stages.0   48×64   24 ──────────────────────────────▶ refines.3   48×64  32 ─▶ head   48×64  1 ─▶ ×2   96×128  1
    stages.1   24×32   48 ───────────────────▶ refines.2   24×32  32 ──▲
    stages.2   12×16   96 ────────▶ refines.1   12×16  32 ──▲
    stages.3     6×8  192 ─▶ refines.0   6×8  64 ──▲

The widths are ours: the original is ten times as wide, on a network trained before on photographs. All that is added begins small, so that
training from scratch begins as with a shallower network.
"""

import numpy

from ..checks import positive
from ..engine.pixelwise import add
from ..layers import Add, Conv2D, Dropout, Layer, MaxPool2D, ReLU
from ..resampling import Upsample2D
from .network import Network
from .residual import Residual, Stage

SMALL = 0.1                             # of He's deviation: weights of what is added to something begin with it
LINKS = 2                               # of chained pooling


class RefineNet(Network):
    """Images (N, H, W, in_channels) of intensities in [0, 1] to logits (N, H, W, out_channels), for any H and W from 1 up.

    base_channels  the first stage has 1.5 times as many, each next one twice those of the one before; all that refines has 2 times as
                   many, at the deepest 4 times
    depth          how often the image is halved, 1 or more, and the number of stages
    dropout        probability of dropping a value of the deepest map; 0 for none

    The other arguments are those of `UNet`.
    """

    def __init__(self, in_channels=1, out_channels=1, base_channels=32, depth=4, norm='batch', dropout=0.0,
                 input_mean=0.0, input_std=1.0, *, rng=None, dtype=numpy.float32):
        self.depth, base_channels = positive(depth, 'depth'), positive(base_channels, 'base_channels')
        config = dict(in_channels=in_channels, out_channels=out_channels, base_channels=base_channels, depth=self.depth, norm=norm,
                      dropout=float(dropout), input_mean=input_mean, input_std=input_std)
        super().__init__(config, multiple=2**self.depth, dtype=dtype)
        options = dict(rng=numpy.random.default_rng(rng), dtype=dtype)

        channels = [3 * base_channels * 2**level // 2 for level in range(self.depth)]
        wide, narrow = 4 * base_channels, 2 * base_channels
        self.stages = [Stage(in_channels if i == 0 else channels[i - 1], channels[i], 2, norm, first=i == 0, **options)
                       for i in range(self.depth)]
        self.dropout = Dropout(dropout, rng=options['rng'])
        self.refines = [Refine(channels[-1], wide, **options)]
        self.refines += [Refine(few, narrow, below, **options) for few, below in zip(channels[-2::-1], [wide] + self.depth * [narrow])]
        self.head = Conv2D(wide if self.depth == 1 else narrow, out_channels, rng=options['rng'], dtype=dtype)
        self.upsample = Upsample2D(2, 'bilinear')
        self.children = {**{f'stages.{i}': stage for i, stage in enumerate(self.stages)}, 'dropout': self.dropout,
                         **{f'refines.{i}': refine for i, refine in enumerate(self.refines)}, 'head': self.head, 'upsample': self.upsample}

    def forward(self, x, observe=None):
        """Return the logits of the images x. `observe(name, y)`, if given, is called with each stage's name and output."""
        observe = observe or (lambda name, y: None)
        H, W = x.shape[1:3]
        x, maps = self.prepare(x), []
        for i, stage in enumerate(self.stages):
            x = stage.forward(x)                            # half the height and width
            maps.append(x)
            observe(f'stages.{i}', x)
        x = self.refines[0].forward(self.dropout.forward(maps.pop()))
        observe('refines.0', x)
        for i, refine in enumerate(self.refines[1:], 1):
            x = refine.forward(maps.pop(), x)               # twice the height and width
            observe(f'refines.{i}', x)
        logits = self.upsample.forward(self.head.forward(x))[:, :H, :W]
        observe('head', logits)
        return logits

    def backward(self, dlogits, input_gradient=True):
        """Return dx for the images, None without `input_gradient`: forward's walk reversed. Each map has two readers, so its gradient is a sum."""
        H, W = dlogits.shape[1:3]
        dx, dmaps = self.head.backward(self.upsample.backward(self.pad(dlogits))), []
        for refine in reversed(self.refines[1:]):
            dmap, dx = refine.backward(dx)
            dmaps.append(dmap)
        dx = self.dropout.backward(self.refines[0].backward(dx))
        for stage in reversed(self.stages[1:]):
            dx = add(stage.backward(dx), dmaps.pop())
        dx = self.stages[0].backward(dx, input_gradient=input_gradient)
        return self.input_gradient_of(dx, (H, W))

    def joins(self):
        return {f'refines.{i}': refine.fuse.add for i, refine in enumerate(self.refines) if refine.fuse}


class Refine(Layer):
    """A map of the way down (N, H, W, A), and what was refined below it (N, H/2, W/2, B), if anything was, give (N, H, W, C)."""

    def __init__(self, in_channels, channels, below_channels=None, *, rng=None, dtype=numpy.float32):
        super().__init__()
        options = dict(rng=numpy.random.default_rng(rng), dtype=dtype)
        self.reduce = Conv2D(in_channels, channels, bias=False, **options)
        self.unit_in = ConvolutionUnit(channels, **options)
        self.fuse = below_channels and Fusion(channels, below_channels, **options)
        self.pooling = ChainedPooling(channels, **options)
        self.unit_out = ConvolutionUnit(channels, **options)
        self.add_children('reduce', 'unit_in', 'fuse', 'pooling', 'unit_out')

    def forward(self, x, *below):
        x = self.unit_in.forward(self.reduce.forward(x))
        x = self.fuse.forward(x, *below) if self.fuse else x
        return self.unit_out.forward(self.pooling.forward(x))

    def backward(self, dy):
        """Return ∂L/∂x, and, where something was below, a pair: that and ∂L/∂(what was below)."""
        dx = self.pooling.backward(self.unit_out.backward(dy))
        dx, *dbelow = self.fuse.backward(dx) if self.fuse else (dx,)
        dx = self.reduce.backward(self.unit_in.backward(dx))
        return (dx, *dbelow) if dbelow else dx


class ConvolutionUnit(Residual):
    """RCU: y = x + W₂ρ(W₁ρ(x)), W 3×3 convolutions, ρ = ReLU, no norm."""

    main = 'relu1', 'conv1', 'relu2', 'conv2'

    def __init__(self, channels, *, rng=None, dtype=numpy.float32):
        super().__init__()
        rng = numpy.random.default_rng(rng)
        self.relu1, self.conv1 = ReLU(), Conv2D(channels, channels, rng=rng, dtype=dtype)
        self.relu2, self.conv2 = ReLU(), Conv2D(channels, channels, rng=rng, dtype=dtype)
        self.conv2.params['weight'] *= SMALL
        self.register()


class Fusion(Layer):
    """The sum of two maps, each after a 3×3 convolution, the coarse one enlarged: (N, H, W, C) and (N, H/2, W/2, B) give (N, H, W, C)."""

    def __init__(self, channels, below_channels, *, rng=None, dtype=numpy.float32):
        super().__init__()
        options = dict(rng=numpy.random.default_rng(rng), dtype=dtype)
        self.conv, self.conv_below = Conv2D(channels, channels, **options), Conv2D(below_channels, channels, **options)
        self.upsample, self.add = Upsample2D(2, 'bilinear'), Add()
        self.add_children('conv', 'conv_below', 'upsample', 'add')

    def forward(self, x, below):
        return self.add.forward(self.conv.forward(x), self.upsample.forward(self.conv_below.forward(below)))

    def backward(self, dy):
        dx, dup = self.add.backward(dy)
        return self.conv.backward(dx), self.conv_below.backward(self.upsample.backward(dup))


class ChainedPooling(Layer):
    """CRP: y = a + t₁ + t₂ with a = ρ(x), t₁ = V₁ pool(a), t₂ = V₂ pool(t₁): pool the maximum of 5×5 at stride 1, V 3×3 convolutions.

    Each link sees 6 pixels further, and has a way past it; the pictures of the paper have two links.
    """

    def __init__(self, channels, *, rng=None, dtype=numpy.float32):
        super().__init__()
        rng = numpy.random.default_rng(rng)
        self.relu, self.add = ReLU(), Add()
        self.pools = [MaxPool2D(5, stride=1, padding=2) for _ in range(LINKS)]
        self.convs = [Conv2D(channels, channels, bias=False, rng=rng, dtype=dtype) for _ in range(LINKS)]
        self.add_children('relu')
        for i, (pool, conv) in enumerate(zip(self.pools, self.convs)):
            conv.params['weight'] *= SMALL
            self.children |= {f'pools.{i}': pool, f'convs.{i}': conv}
        self.add_children('add')

    def forward(self, x):
        terms = [self.relu.forward(x)]
        for pool, conv in zip(self.pools, self.convs):
            terms.append(conv.forward(pool.forward(terms[-1])))
        return self.add.forward(*terms)

    def backward(self, dy):
        *dterms, dt = self.add.backward(dy)
        for pool, conv in zip(reversed(self.pools), reversed(self.convs)):
            dt = add(dterms.pop(), pool.backward(conv.backward(dt)))            # a term went into the sum and into the next one
        return self.relu.backward(dt)
