"""The optimised ResU-Net (Wang, Shen & Zhou 2019, IEEE IST, doi 10.1109/ist48021.2019.9010317): what is seen around a place, at many scales.

A `ResUNet` of depth 3 whose deepest map, 12×16 for an image of 96×128, goes through two more blocks before the way up. Both are from CE-Net
(Gu et al. 2019, arXiv:1903.02740):

    downs.2   12×16  128    residual block ─▶ dense atrous convolution (DAC) ─▶ residual multi-kernel pooling (RMP)   12×16  132

The authors filter the images with a median against speckle first: that is the option --median-filter of training. Of their network only
the abstract was at hand; which ResU-Net, and the widths, are our choice.
"""

import functools

import numpy

from ..engine.backend import get_array_module
from ..engine.pixelwise import add
from ..layers import Add, Concat, Conv2D, Layer, MaxPool2D, ReLU
from ..resampling import Upsample2D
from .residual import PreActivationBlock
from .resunet import ResidualUp, ResUNet

POOLS = 2, 3, 5, 6                      # side of the windows of RMP


class OptimisedResUNet(ResUNet):
    """As `ResUNet`; without `dac` or `rmp` that block is left out. RMP needs 6 rows and columns of the deepest map: smaller images get padding."""

    def __init__(self, in_channels=1, out_channels=1, base_channels=32, depth=3, *, dac=True, rmp=True, **options):
        self.dac, self.rmp = bool(dac), bool(rmp)
        super().__init__(in_channels, out_channels, base_channels, depth, **options)
        self.config |= dict(dac=self.dac, rmp=self.rmp)
        self.least = max(POOLS) * self.multiple if self.rmp else 1

    def parts(self, in_channels, channels, **options):
        *_, above, deepest = channels
        stem, downs, ups = super().parts(in_channels, channels[:-1], **options)         # the bridge hangs below
        bridge = Bridge(above, deepest, self.dac, self.rmp, **options)
        up = ResidualUp(deepest + len(POOLS) * self.rmp, above, above, **options)
        return stem, [*downs, bridge], [up, *ups]


class Bridge(Layer):
    """A step down by a residual block, then DAC and RMP where they are wanted: (N, H, W, C) to (N, H/2, W/2, 2C), with RMP 2C + 4."""

    def __init__(self, in_channels, out_channels, dac=True, rmp=True, norm='batch', *, rng=None, dtype=numpy.float32):
        super().__init__()
        options = dict(rng=numpy.random.default_rng(rng), dtype=dtype)
        self.block = PreActivationBlock(in_channels, out_channels, 2, norm, **options)
        self.dac = DenseAtrousConvolution(out_channels, **options) if dac else None
        self.rmp = ResidualMultiKernelPooling(out_channels, **options) if rmp else None
        self.add_children('block', 'dac', 'rmp')

    def forward(self, x):
        for part in self.children.values():
            x = part.forward(x)
        return x

    def backward(self, dy):
        for part in reversed(self.children.values()):
            dy = part.backward(dy)
        return dy


class Stack(Layer):
    """All images of all inputs, one after the other: k times (N, H, W, C) give (kN, H, W, C), so that one layer, with one set of weights, sees
    them all. Backward gives each input the gradient of its images.
    """

    keeps = ()

    def forward(self, *inputs):
        self.output_shape(*(x.shape for x in inputs))
        self.keep([len(x) for x in inputs])
        return get_array_module(*inputs).concatenate(inputs)

    def backward(self, dy):
        lengths, = self.take()
        return tuple(get_array_module(dy).split(dy, numpy.cumsum(lengths)[:-1].tolist()))

    def output_shape(self, x, *others):
        for other in others:
            if other[1:] != x[1:]:
                raise ValueError(f'cannot stack images {x} and {other}: they differ after the number of images')
        return sum(shape[0] for shape in (x, *others)), *x[1:]


class DenseAtrousConvolution(Layer):
    """DAC: four branches that see 3, 7, 9 and 19 pixels around each, added to x (N, H, W, C).

        y = x + ρ(K₁x) + ρ(P K₃x) + ρ(P K₃K₁x) + ρ(P K₅K₃K₁x)           K_d 3×3 convolution with dilation d, P 1×1, ρ = ReLU

    As in the authors' code of CE-Net there is one K₁, K₃, K₅ and P for all branches. What one layer is asked to do for several inputs it does at
    once, for all of them stacked: so its gradient is the sum over them without more ado.
    """

    def __init__(self, channels, *, rng=None, dtype=numpy.float32):
        super().__init__()
        options = dict(rng=numpy.random.default_rng(rng), dtype=dtype)
        self.conv1, self.conv3, self.conv5 = (Conv2D(channels, channels, dilation=d, **options) for d in (1, 3, 5))
        self.conv_p, self.relu, self.add = Conv2D(channels, channels, 1, **options), ReLU(), Add()
        self.stack3, self.stack_p, self.stack_b = Stack(), Stack(), Stack()
        self.add_children('conv1', 'stack3', 'conv3', 'conv5', 'stack_p', 'conv_p', 'stack_b', 'relu', 'add')

    def forward(self, x):
        N = x.shape[0]
        h1 = self.conv1.forward(x)                                              # K₁x
        h3 = self.conv3.forward(self.stack3.forward(x, h1))                     # K₃x, K₃K₁x                    (2N, H, W, C)
        h5 = self.conv5.forward(h3[N:])                                         # K₅K₃K₁x
        p = self.conv_p.forward(self.stack_p.forward(h3, h5))                   # P of these three              (3N, H, W, C)
        b = self.relu.forward(self.stack_b.forward(h1, p))                      # the four branches             (4N, H, W, C)
        return self.add.forward(x, *(b[i * N:(i + 1) * N] for i in range(4)))

    def backward(self, dy):
        N, xp = len(dy), get_array_module(dy)
        dx, *db = self.add.backward(dy)
        dh1, dp = self.stack_b.backward(self.relu.backward(xp.concatenate(db)))
        dh3, dh5 = self.stack_p.backward(self.conv_p.backward(dp))
        dh3 = xp.concatenate([dh3[:N], add(dh3[N:], self.conv5.backward(dh5))])
        dx_of_3, dh1_of_3 = self.stack3.backward(self.conv3.backward(dh3))
        return functools.reduce(add, [dx, dx_of_3, self.conv1.backward(add(dh1, dh1_of_3))])


class ResidualMultiKernelPooling(Layer):
    """RMP: what is largest in windows of 2, 3, 5 and 6 pixels, a map of each, beside x: (N, H, W, C) gives (N, H, W, 4 + C).

        y = [P ↑pool₂x, P ↑pool₃x, P ↑pool₅x, P ↑pool₆x, x]             P one 1×1 convolution from C channels to 1, ↑ bilinear to H×W

    The authors apply P before ↑. Both are linear, one along the channels and one along the pixels, and the shares of ↑ sum to 1, as a bias needs
    it: so the order is free, and in this one P sees all four scales at once, stacked. Raises ValueError for H or W below 6.
    """

    def __init__(self, channels, *, rng=None, dtype=numpy.float32):
        super().__init__()
        self.pools = [MaxPool2D(k) for k in POOLS]
        self.upsamples = [Upsample2D(k, 'bilinear') for k in POOLS]
        self.stack, self.conv, self.concat = Stack(), Conv2D(channels, 1, 1, rng=rng, dtype=dtype), Concat()
        for k, pool, upsample in zip(POOLS, self.pools, self.upsamples):
            self.children |= {f'pool{k}': pool, f'upsample{k}': upsample}
        self.add_children('stack', 'conv', 'concat')

    def forward(self, x):
        N, size = x.shape[0], x.shape[1:3]
        pooled = [upsample.forward(pool.forward(x), size=size) for pool, upsample in zip(self.pools, self.upsamples)]
        maps = self.conv.forward(self.stack.forward(*pooled))                   # (4N, H, W, 1)
        return self.concat.forward(*(maps[i * N:(i + 1) * N] for i in range(len(POOLS))), x)

    def backward(self, dy):
        *dmaps, dx = self.concat.backward(dy)
        dpooled = self.stack.backward(self.conv.backward(get_array_module(dy).concatenate(dmaps)))
        for pool, upsample, dmap in zip(self.pools, self.upsamples, dpooled):
            dx = add(dx, pool.backward(upsample.backward(dmap)))
        return dx
