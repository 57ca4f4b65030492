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

import math

import numpy

from .. import convolution
from ..engine import kernels
from ..engine.backend import get_array_module
from ..layers import BatchNorm2D, Concat, Conv2D, ConvTranspose2D, Dropout, Layer, MaxPool2D, ReLU, check_channels, positive
from ..engine.memory import SLACK
from ..engine.parallel import number_of_threads
from ..engine.pixelwise import add

SCRATCH_BYTES = 2**24             # about what the convolutions of one thread need to work in


class DoubleConv(Layer):
    """Twice: 3×3 convolution, norm (if any), ReLU. (N, H, W, C_in) gives (N, H, W, C_out).

    A convolution that a norm follows has no bias: the norm would subtract it again.
    """

    def __init__(self, in_channels, out_channels, norm='batch', *, rng=None, dtype=numpy.float32):
        super().__init__()
        if norm not in ('batch', None):
            raise ValueError(f"norm is {norm!r}; expected 'batch' or None")
        self.steps = {}
        for number, channels in (('1', in_channels), ('2', out_channels)):
            self.steps['conv' + number] = Conv2D(channels, out_channels, bias=norm is None, rng=rng, dtype=dtype)
            if norm == 'batch':
                self.steps['norm' + number] = BatchNorm2D(out_channels, dtype=dtype)
            self.steps['relu' + number] = ReLU()
        self.children = dict(self.steps)

    def forward(self, x):
        return self.half('2', self.half('1', x))

    def half(self, number, x):
        """Return convolution `number`, norm and ReLU of x. In inference, where nothing is kept, the norm is done by the convolution."""
        conv, norm, relu = (self.steps.get(name + number) for name in ('conv', 'norm', 'relu'))
        if norm is None:
            return relu.forward(conv.forward(x))
        if norm.training or norm.keep_cache or convolution.only_plain():
            x = conv.forward(x)
            if not kernels.serve(x):
                return relu.forward(norm.forward(x))
            y = kernels.normalize_relu(x, *norm.slope_and_shift(x))
            relu.keep(y)
            return y
        weight, bias = norm.folded_into(conv.params['weight'])
        return relu.forward(convolution.forward(x, weight, conv.stride, conv.padding, bias))

    def backward(self, dy, **options):
        """Return dx; `options` are for the backward of the first convolution."""
        first, *others = self.steps.values()
        for step in reversed(others):
            dy = step.backward(dy)
        return first.backward(dy, **options)


class Down(DoubleConv):
    """2×2 max-pooling, then two convolutions: (N, H, W, C) gives (N, H/2, W/2, C_out)."""

    def __init__(self, in_channels, out_channels, norm='batch', *, rng=None, dtype=numpy.float32):
        super().__init__(in_channels, out_channels, norm, rng=rng, dtype=dtype)
        self.pool = MaxPool2D(2)
        self.children = {'pool': self.pool, **self.steps}

    def forward(self, x):
        return super().forward(self.pool.forward(x))

    def backward(self, dy):
        return self.pool.backward(super().backward(dy))


class Up(DoubleConv):
    """Upsample x (N, H, W, 2C) to (N, 2H, 2W, C), join it with the skip (N, 2H, 2W, C), then two convolutions.

    The join doubles the channels, which is why the first convolution maps 2C to C.
    """

    def __init__(self, in_channels, out_channels, norm='batch', *, rng=None, dtype=numpy.float32):
        super().__init__(2 * out_channels, out_channels, norm, rng=rng, dtype=dtype)
        self.upconv = ConvTranspose2D(in_channels, out_channels, rng=rng, dtype=dtype)
        self.concat = Concat()
        self.children = {'upconv': self.upconv, 'concat': self.concat, **self.steps}

    def forward(self, x, skip):
        up = self.upconv.forward(x)
        y = self.half('1', self.concat.forward(skip, up))
        if self.keep_cache:
            # The join is the largest array of all, and half of it is the skip, which is kept anyway. To make it again when
            # backward gets there takes one copy.
            self.steps['conv1'].cache = lambda: (self.concat.forward(skip, up),)
        return self.half('2', y)

    def backward(self, dy):
        dskip, dup = self.concat.backward(super().backward(dy))
        return self.upconv.backward(dup), dskip


class UNet(Layer):
    """Images (N, H, W, in_channels) of intensities in [0, 1] to logits (N, H, W, out_channels), for any H and W from 1 up.

    base_channels  channels of the first level; level l has base_channels·2^l
    depth          how often the image is halved, 1 or more
    norm           'batch', or None for no normalisation
    dropout        probability of dropping a value after the deepest stage, as in the paper; 0 for none
    input_mean, input_std   of the training images' intensities: forward standardises with them, and they are saved with the
                   model, so that a loaded model cannot be fed wrongly scaled images
    rng            `numpy.random.Generator` of the initial weights and the dropout masks
    dtype          of the parameters; the images must have the same

    `config` holds these arguments, enough to build the same architecture again.
    """

    def __init__(self, in_channels=1, out_channels=1, base_channels=32, depth=4, norm='batch', dropout=0.0,
                 input_mean=0.0, input_std=1.0, *, rng=None, dtype=numpy.float32):
        super().__init__()
        if not 0 < input_std < math.inf:
            raise ValueError(f'input_std is {input_std}; expected a positive number')
        if not math.isfinite(input_mean):
            raise ValueError(f'input_mean is {input_mean}; expected a number')
        self.config = dict(in_channels=positive(in_channels, 'in_channels'),
                           out_channels=positive(out_channels, 'out_channels'),
                           base_channels=positive(base_channels, 'base_channels'), depth=positive(depth, 'depth'),
                           norm=norm, dropout=float(dropout), input_mean=float(input_mean), input_std=float(input_std))
        self.dtype = numpy.dtype(dtype)
        self.depth, self.in_channels = self.config['depth'], self.config['in_channels']
        rng = numpy.random.default_rng() if rng is None else rng
        options = dict(norm=norm, rng=rng, dtype=dtype)

        channels = [base_channels * 2**level for level in range(self.depth + 1)]
        self.stem = DoubleConv(in_channels, channels[0], **options)
        self.downs = [Down(channels[level], channels[level + 1], **options) for level in range(self.depth)]
        self.dropout = Dropout(dropout, rng=rng)
        self.ups = [Up(channels[level + 1], channels[level], **options) for level in reversed(range(self.depth))]
        self.head = Conv2D(channels[0], out_channels, kernel_size=1, rng=rng, dtype=dtype)

        self.children = {'stem': self.stem, **{f'downs.{i}': down for i, down in enumerate(self.downs)},
                         'dropout': self.dropout, **{f'ups.{i}': up for i, up in enumerate(self.ups)}, 'head': self.head}

    def forward(self, x, observe=None):
        """Return the logits of the images x. `observe(name, y)`, if given, is called with each stage's name and output."""
        check_channels(x.shape, self.in_channels)
        if x.dtype != self.dtype:
            raise ValueError(f'images are {x.dtype}, this model computes in {self.dtype}: give intensities in [0, 1], '
                             f'images.astype({str(self.dtype)!r})')
        observe = observe or (lambda name, y: None)
        N, H, W, C = x.shape
        if self.training:
            self.drop_gradients()                           # those of the last step: room for what backward will need

        x = (x - self.config['input_mean']) / self.config['input_std']
        x = pad_to_multiple(x, 2**self.depth)               # (N, H', W', C), H' and W' divisible by 2^depth
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
        N, H, W, _ = dlogits.shape
        dx = self.head.backward(pad_to_multiple(dlogits, 2**self.depth))
        dskips = []
        for up in reversed(self.ups):
            dx, dskip = up.backward(dx)
            dskips.append(dskip)
        dx = self.dropout.backward(dx)
        for down in reversed(self.downs):
            dx = add(down.backward(dx), dskips.pop())
        dx = self.stem.backward(dx, input_gradient=input_gradient)
        return None if dx is None else dx[:, :H, :W] / self.config['input_std']     # the gradient of the padding ends here

    def receptive_field(self, stage, position):
        """Return (first, last): the input pixels, along one axis, that the unit at `position` of a stage's output depends on.

        `stage` is a name as given to `observe`. Walks the network backwards, so the numbers are exact, positions outside the
        image included. The field of a unit depends on where it lies in the pooling grid.
        """
        def walk(stage, first, last):
            kind, _, index = stage.partition('.')
            if kind == 'head':
                return walk(f'ups.{self.depth - 1}', first, last)                       # 1×1
            first, last = first - 2, last + 2                                           # two 3×3 convolutions
            if kind == 'stem':
                return first, last
            level, previous = int(index), f'{kind}.{int(index) - 1}'
            if kind == 'downs':
                return walk(previous if level else 'stem', 2 * first, 2 * last + 1)     # a 2×2 window
            below = walk(previous if level else f'downs.{self.depth - 1}', first // 2, last // 2)
            beside = walk(f'downs.{self.depth - 2 - level}' if level < self.depth - 1 else 'stem', first, last)
            return min(below[0], beside[0]), max(below[1], beside[1])

        return walk(stage, position, position)

    def widest_field(self, stage):
        """Return the side, in pixels, of the largest receptive field among a stage's units."""
        fields = (self.receptive_field(stage, position) for position in range(2**self.depth))
        return max(last - first + 1 for first, last in fields)

    def walk(self, shape):
        """Yield (name, layer, input shape, output shape, number of kept values) for each layer, for images of this shape.

        Kept is what training keeps of a layer's output until backward: the next layer's input counts once, where it is made.
        """
        N, H, W, C = shape
        shape, skips = (N, *padded_size((H, W), 2**self.depth), C), []
        for prefix, layer in self.layers():
            if isinstance(layer, MaxPool2D):
                skips.append(shape)
            if layer.children or layer is self.dropout and layer.p == 0:
                continue
            before = shape
            shape = layer.output_shape(*([skips.pop(), shape] if isinstance(layer, Concat) else [shape]))
            # A join is made again from the skip, which is kept anyway, and what lies beside it, the input of this row.
            kept = math.prod(before) if isinstance(layer, Concat) else layer.keeps_output * math.prod(shape)
            yield prefix[:-1], layer, before, shape, kept

    def training_memory(self, shape):
        """Return about how many bytes training on batches of this shape (N, H, W, in_channels) takes, beside the model itself.

        That is what all layers keep until backward, and two arrays as large as the widest output, since there backward begins
        with the gradient of an output and that of an input; later, in their place, the gradients of the parameters; what
        `memory` holds beyond it; the two averages of Adam; and scratch memory.
        """
        rows = list(self.walk(shape))
        kept = sum(row[4] for row in rows)
        widest = max(row[4] for row in rows)
        parameters = sum(array.size for array in self.parameters().values())
        arrays = SLACK * max(kept + 2 * widest, parameters) + 2 * parameters
        return round(arrays) * self.dtype.itemsize + SCRATCH_BYTES * number_of_threads()

    def summary(self, size, batch_size=8):
        """Return a table, as text, of what each layer does with one image of `size` (H, W).

        Columns: output as height×width×channels, padding included; parameters; multiply-adds of forward; memory that training
        keeps of it until backward; receptive field of the stage's units, the widest side in pixels. The last line says what
        training takes with batches of `batch_size` images.
        """
        table, totals = [('layer', 'output', 'parameters', 'multiply-adds', 'kept MiB', 'field')], [0, 0, 0.0]
        for name, layer, before, shape, kept in self.walk((1, *size, self.in_channels)):
            numbers = (sum(array.size for array in layer.params.values()), layer.multiply_adds(before),
                       kept * self.dtype.itemsize / 2**20)
            stage, _, step = name.rpartition('.')
            field = self.widest_field(stage or step) if step in ('relu2', 'head') else ''
            table.append((name, '×'.join(map(str, shape[1:])), f'{numbers[0]:,}', f'{numbers[1]:,}', f'{numbers[2]:.2f}', str(field)))
            totals = [total + number for total, number in zip(totals, numbers)]
        table.append(('total', '', f'{totals[0]:,}', f'{totals[1]:,}', f'{totals[2]:.2f}', ''))
        widths = [max(map(len, column)) for column in zip(*table)]
        lines = ['  '.join([row[0].ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:])])
                 for row in table]
        needed = self.training_memory((batch_size, *size, self.in_channels)) / 2**20
        return '\n'.join([*lines, f'training on {batch_size} images at a time takes about {needed:.0f} MiB'])


def padded_size(size, multiple):
    """Return `size` (H, W) rounded up to the next multiple."""
    return tuple(-(-length // multiple) * multiple for length in size)


def pad_to_multiple(x, multiple):
    """Return x (N, H, W, C) with zeros at the bottom and right up to the next multiple; x itself if there is nothing to add."""
    N, H, W, C = x.shape
    H_padded, W_padded = padded_size((H, W), multiple)
    if (H_padded, W_padded) == (H, W):
        return x
    padded = get_array_module(x).zeros((N, H_padded, W_padded, C), x.dtype)
    padded[:, :H, :W] = x
    return padded
