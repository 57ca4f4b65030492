"""Residual blocks: y = x + F(x), so that a block learns only what is missing (He et al. 2015, arXiv:1512.03385).

Where F is nothing yet, as at the start of training, y = x: a deep network begins as a shallow one. And the gradient has a way round
each block that nothing weakens: dx = dy + what comes back through F. Where a block changes size or channels, x cannot be added as it is,
and a 1×1 convolution, the shortcut, brings it to the same shape.

    x ──┬───────── shortcut ────────┐
        └── main: convolutions … ── + ── ReLU, if any ── y
"""

import numpy

from ..engine.pixelwise import add
from ..layers import Add, Conv2D, Layer, ReLU
from .blocks import normalisation
from .fusing import back_in_sequence, in_sequence


class Residual(Layer):
    """y = shortcut(x) + main(x), then `last`, if any. The three are the names of attributes, layers or None for no layer, in order."""

    main, shortcut, last = (), (), ()

    def register(self):
        """Put the layers of this block among its children, and the sum with them."""
        self.add = Add()
        self.add_children(*self.main, *self.shortcut, 'add', *self.last)

    def forward(self, x):
        y = in_sequence(x, *self._layers(self.main))
        return in_sequence((in_sequence(x, *self._layers(self.shortcut)), y), self.add, *self._layers(self.last))

    def backward(self, dy, input_gradient=True):
        """Return dx; None without `input_gradient`, for a block that begins with a convolution."""
        dshortcut, dmain = back_in_sequence(dy, self.add, *self._layers(self.last))
        dx = back_in_sequence(dmain, *self._layers(self.main), input_gradient=input_gradient)
        dx_around = back_in_sequence(dshortcut, *self._layers(self.shortcut), input_gradient=input_gradient)
        return add(dx_around, dx) if input_gradient else None

    def _layers(self, names):
        return [getattr(self, name) for name in names]


class PreActivationBlock(Residual):
    """The residual unit of the ResU-Net: norm and ReLU come before each convolution (He et al. 2016, arXiv:1603.05027).

        y = norm(P x) + K₂ ρ(norm K₁ ρ(norm x))         K 3×3 convolutions, P 1×1, ρ = ReLU

    K₁ and P have the stride: (N, H, W, C_in) gives (N, H/stride, W/stride, C_out). As the `first` of a network it begins with K₁, because
    an image needs no norm, and ReLU would cut it off. The shortcut is there always, whatever the channels (Zhang et al. 2018).
    """

    main = 'norm1', 'relu1', 'conv1', 'norm2', 'relu2', 'conv2'
    shortcut = 'conv_shortcut', 'norm_shortcut'

    def __init__(self, in_channels, out_channels, stride=1, norm='batch', first=False, *, rng=None, dtype=numpy.float32):
        super().__init__()
        options = dict(bias=norm is None, rng=numpy.random.default_rng(rng), dtype=dtype)
        self.norm1, self.relu1 = (None, None) if first else (normalisation(norm, in_channels, dtype), ReLU())
        self.conv1 = Conv2D(in_channels, out_channels, stride=stride, **options)
        self.norm2, self.relu2 = normalisation(norm, out_channels, dtype), ReLU()
        self.conv2 = Conv2D(out_channels, out_channels, **options)              # all that reads the sum begins with a norm, or has a bias
        self.conv_shortcut = Conv2D(in_channels, out_channels, 1, stride, **options)
        self.norm_shortcut = normalisation(norm, out_channels, dtype)
        self.register()


class BasicBlock(Residual):
    """The block of ResNet-18 and -34: norm and ReLU come after (He et al. 2015).

        y = ρ(S x + norm K₂ ρ(norm K₁ x))               S x = x, or norm(P x) where stride or channels change

    It starts as y = ρ(S x): the weight of the last norm is 0 at first, so that gradients reach all blocks from the first step on (Goyal et
    al. 2017, arXiv:1706.02677); without norms K₂ begins at 0 instead.
    """

    main = 'conv1', 'norm1', 'relu1', 'conv2', 'norm2'
    shortcut = 'conv_shortcut', 'norm_shortcut'
    last = 'relu2',

    def __init__(self, in_channels, out_channels, stride=1, norm='batch', *, rng=None, dtype=numpy.float32):
        super().__init__()
        options = dict(bias=norm is None, rng=numpy.random.default_rng(rng), dtype=dtype)
        self.conv1, self.norm1 = Conv2D(in_channels, out_channels, stride=stride, **options), normalisation(norm, out_channels, dtype)
        self.conv2, self.norm2 = Conv2D(out_channels, out_channels, **options), normalisation(norm, out_channels, dtype)
        self.relu1, self.relu2 = ReLU(), ReLU()
        changes = stride != 1 or in_channels != out_channels
        self.conv_shortcut = Conv2D(in_channels, out_channels, 1, stride, **options) if changes else None
        self.norm_shortcut = normalisation(norm, out_channels, dtype) if changes else None
        (self.norm2 or self.conv2).params['weight'][...] = 0
        self.register()


class Stage(Layer):
    """What a ResNet does at one size: after a 3×3 convolution, norm and ReLU, if it is the first, some basic blocks. The first of them
    has the stride; the convolution of a first stage has it instead.
    """

    def __init__(self, in_channels, out_channels, stride=1, norm='batch', blocks=2, first=False, *, rng=None, dtype=numpy.float32):
        super().__init__()
        options = dict(rng=numpy.random.default_rng(rng), dtype=dtype)
        self.conv = self.norm = self.relu = None
        if first:
            self.conv = Conv2D(in_channels, out_channels, stride=stride, bias=norm is None, **options)
            self.norm, self.relu = normalisation(norm, out_channels, dtype), ReLU()
            in_channels, stride = out_channels, 1
        self.blocks = [BasicBlock(in_channels if i == 0 else out_channels, out_channels, stride if i == 0 else 1, norm, **options)
                       for i in range(blocks)]
        self.add_children('conv', 'norm', 'relu')
        self.children |= {f'blocks.{i}': block for i, block in enumerate(self.blocks)}

    def forward(self, x):
        x = in_sequence(x, self.conv, self.norm, self.relu)
        for block in self.blocks:
            x = block.forward(x)
        return x

    def backward(self, dy, input_gradient=True):
        for block in reversed(self.blocks):
            dy = block.backward(dy)
        return back_in_sequence(dy, self.conv, self.norm, self.relu, input_gradient=input_gradient)
