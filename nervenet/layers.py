"""Layers: the pieces a network is made of, each with its derivative written out by hand.

A layer is a function y = f(x; params) and, beside it, the chain rule for that function. Write L for the loss, a single
number, and dname for ∂L/∂name, which has the shape of `name`:

    y  = layer.forward(x)       computes y and keeps in `layer.cache` exactly what backward will need
    dx = layer.backward(dy)     takes ∂L/∂y, returns ∂L/∂x, puts ∂L/∂params into `layer.grads`, frees the cache

`backward` is never more than this: what did a small change of x, or of a parameter, do to y, and so to L?

Shapes: N images, H rows, W columns, C channels, in this order: x is (N, H, W, C). The channels of a pixel lie side by side in
memory, so a layer that mixes channels is a matrix product over the last axis.

The order is from the simplest layer up: ReLU, Sigmoid, Concat, MaxPool2D, Conv2D, ConvTranspose2D, BatchNorm2D, Dropout.
"""

import math

import numpy

from . import convolution
from .engine import kernels
from .engine.backend import device_of, generator_like, get_array_module, move
from .engine.memory import empty
from .engine.pixelwise import channel_moments, channel_sums, for_rows, in_blocks


class Layer:
    """The protocol, and what all layers share: parameters by name, training or inference mode, moving to a device.

    `params` and `grads` are dicts with equal keys. `buffers` holds arrays that are saved with the parameters and not
    trained. `children` names the layers inside a layer, in definition order; a dotted name, `downs.0.conv1.weight`, is the
    way from the outermost layer to an array.

    `training` decides how a layer behaves (batch norm, dropout); `keep_cache` decides whether forward keeps what backward
    needs. A new layer is in training mode. `keeps_output` says whether that includes an array of the output's size.
    """

    keeps_output = True

    def __init__(self):
        self.params, self.grads, self.buffers, self.children = {}, {}, {}, {}
        self.training = self.keep_cache = True
        self.cache = None

    def forward(self, *inputs):
        raise NotImplementedError(f'{type(self).__name__} has no forward')

    def backward(self, dy):
        raise NotImplementedError(f'{type(self).__name__} has no backward')

    def keep(self, *values):
        """Keep what backward needs, unless nobody will ask for it."""
        self.cache = values if self.keep_cache else None

    def take(self):
        """Return what forward kept, and forget it, so that its memory is free as soon as backward is done with it.

        A cache may also be a function that makes those values again.
        """
        if self.cache is None:
            raise RuntimeError(f'{type(self).__name__}.backward has nothing to work on: call forward first, in training '
                               'mode or after eval(keep_cache=True); each forward serves one backward')
        values, self.cache = self.cache, None
        return values() if callable(values) else values

    def output_shape(self, *shapes):
        """Return the shape that forward gives for inputs of these shapes."""
        return shapes[0]

    def multiply_adds(self, x):
        """Return how many multiply-adds the products of one forward take for an input of shape x."""
        return 0

    def layers(self, prefix=''):
        """Yield (dotted prefix, layer) for this layer and all inside it, in definition order."""
        yield prefix, self
        for name, child in self.children.items():
            yield from child.layers(f'{prefix}{name}.')

    def parameters(self):
        """Return the live parameter arrays by dotted name."""
        return {prefix + name: array for prefix, layer in self.layers() for name, array in layer.params.items()}

    def gradients(self):
        """Return the gradients that the last backward assigned, under the names of `parameters()`."""
        return {prefix + name: array for prefix, layer in self.layers() for name, array in layer.grads.items()}

    @property
    def device(self):
        """'cpu' or 'gpu': where the parameters live."""
        return device_of(next(iter(self.parameters().values())))

    def drop_gradients(self):
        """Forget the gradients: they are as large as the parameters, and of no use once the next ones are to be computed."""
        for _, layer in self.layers():
            layer.grads = dict.fromkeys(layer.grads)

    def state_dict(self):
        """Return parameters and buffers by dotted name: all that a trained model is."""
        return {prefix + name: array for prefix, layer in self.layers()
                for name, array in (layer.params | layer.buffers).items()}

    def load_state_dict(self, state):
        """Copy `state` into the arrays of this layer. Raises ValueError, and changes nothing, unless all names and shapes match."""
        own = self.state_dict()
        check_match(own, state, 'the state', 'this model')
        for name, array in own.items():
            array[...] = move(state[name], device_of(array))

    def train(self):
        """Switch to training mode: batch statistics, active dropout, caches kept. Returns the layer."""
        for _, layer in self.layers():
            layer.training = layer.keep_cache = True
        return self

    def eval(self, keep_cache=False):
        """Switch to inference: running statistics, no dropout. Returns the layer.

        Nothing is kept for backward unless `keep_cache` says so, for asking what a trained network's output depends on.
        """
        for _, layer in self.layers():
            layer.training, layer.keep_cache, layer.cache = False, keep_cache, None
        return self

    def to(self, device):
        """Move all arrays to 'cpu' or 'gpu' and return the layer. Replaces the arrays: call it before building an optimizer."""
        for _, layer in self.layers():
            for arrays in (layer.params, layer.grads, layer.buffers):
                arrays.update({name: move(array, device) for name, array in arrays.items()})
            layer.cache = None
        return self

    def add_parameter(self, name, array):
        """Register a parameter; its gradient starts at zero."""
        self.params[name], self.grads[name] = array, numpy.zeros_like(array)


class ReLU(Layer):
    """y = max(x, 0), element by element, for x of any shape.

    Where x > 0, y moves with x; elsewhere y stays 0. So dx = dy where x > 0, else 0. At the kink, x = 0, the derivative is
    taken as 0. y > 0 exactly where x > 0, and y is kept by the next layer anyway: remembering y instead of x costs nothing.
    """

    def forward(self, x):
        xp = get_array_module(x)
        y = in_blocks(lambda y, x: xp.maximum(x, 0, out=y), x)
        self.keep(y)
        return y

    def backward(self, dy):
        y, = self.take()
        xp = get_array_module(dy)
        return in_blocks(lambda dx, dy, y: xp.multiply(dy, y > 0, out=dx), dy, y)


class Sigmoid(Layer):
    """y = 1 / (1 + exp(−x)), element by element: squeezes any number into (0, 1), a probability.

    Its derivative needs only its output: dy/dx = y·(1 − y).
    """

    def forward(self, x):
        y = sigmoid(x)
        self.keep(y)
        return y

    def backward(self, dy):
        y, = self.take()
        return dy * (y * (1 - y))


def sigmoid(x):
    """Return 1 / (1 + exp(−x)) for x of any shape. Written as ½·(1 + tanh(x/2)), it overflows for no x."""
    return 0.5 * (get_array_module(x).tanh(0.5 * x) + 1)


class Concat(Layer):
    """y = [a, b] side by side along the channels: (N, H, W, A) and (N, H, W, B) give (N, H, W, A + B).

    Every output channel is a copy of one input channel, so each input receives its own part of dy back: a copy too, since a view
    would keep all of dy in memory for as long as one part of it is needed.
    """

    def forward(self, a, b):
        y = empty(self.output_shape(a.shape, b.shape), a)    # (N, H, W, A + B)
        self.keep(A := a.shape[3])

        def join(block):
            y[block][..., :A] = a[block]
            y[block][..., A:] = b[block]

        for_rows(y, join)
        return y

    def backward(self, dy):
        A, = self.take()
        da, db = empty((*dy.shape[:3], A), dy), empty((*dy.shape[:3], dy.shape[3] - A), dy)

        def part(block):
            da[block] = dy[block][..., :A]
            db[block] = dy[block][..., A:]

        for_rows(dy, part)
        return da, db                                                          # (N, H, W, A), (N, H, W, B)

    def output_shape(self, a, b):
        if a[:3] != b[:3]:
            raise ValueError(f'cannot join {a} and {b}: they differ before the channels; pad or crop one of them')
        return (*a[:3], a[3] + b[3])


class MaxPool2D(Layer):
    """y = the maximum of each kernel_size × kernel_size window: (N, H, W, C) gives (N, H // k, W // k, C).

    Windows do not overlap; rows and columns left over at the bottom and right are ignored. Only the maximum moved the output,
    so only it receives gradient; of equal maxima, the first in reading order does.
    """

    def __init__(self, kernel_size=2):
        super().__init__()
        self.kernel_size = positive(kernel_size, 'kernel_size')

    def windows(self, x, block):
        """Yield k² views of x, (n, rows, W // k, C) each: the first pixel of every window, the second, …

        `block` is a pair of slices: of images, and of rows of windows.
        """
        k, (_, H_out, W_out, _), (images, rows) = self.kernel_size, self.output_shape(x.shape), block
        for i in range(k):
            for j in range(k):
                yield x[images, i:k * H_out:k, j:k * W_out:k][:, rows]

    def forward(self, x):
        xp, shape = get_array_module(x), self.output_shape(x.shape)
        if kernels.serve(x) and self.kernel_size**2 <= 256:                     # argmax has 8 bits
            y, argmax = kernels.max_pool(x, self.kernel_size)
            self.keep(x.shape, argmax)
            return y
        y = empty(shape, x)                                           # (N, H // k, W // k, C)

        def largest(block):
            pixels = self.windows(x, block)
            y[block] = next(pixels)
            for pixel in pixels:
                xp.maximum(y[block], pixel, out=y[block])

        for_rows(y, largest)
        self.keep(x, y)
        return y

    def backward(self, dy):
        x, y = self.take()
        if isinstance(x, tuple):                                               # what the kernel kept
            shape, argmax = x, y
            return kernels.max_pool_backward(dy, argmax, self.kernel_size, shape)
        xp = get_array_module(x)
        dx = empty(x.shape, dy)
        H_used, W_used = self.kernel_size * y.shape[1], self.kernel_size * y.shape[2]
        dx[:, H_used:] = 0                                                     # what no window covers moved nothing
        dx[:, :, W_used:] = 0

        def give_to_the_first(block):
            unclaimed = xp.ones(y[block].shape, bool)                          # windows whose maximum is still to be met
            for pixel, dpixel in zip(self.windows(x, block), self.windows(dx, block)):
                first = (pixel == y[block]) & unclaimed
                dpixel[...] = dy[block] * first
                unclaimed &= ~first

        for_rows(y, give_to_the_first)
        return dx

    def output_shape(self, x):
        N, H, W, C = x
        if min(H, W) < self.kernel_size:
            raise ValueError(f'an image of {H}×{W} is smaller than the {self.kernel_size}×{self.kernel_size} pooling window')
        return N, H // self.kernel_size, W // self.kernel_size, C


class Conv2D(Layer):
    """y = x ∗ weight + bias: (N, H, W, C_in) gives (N, H_out, W_out, C_out). See `convolution/plain.py` for the mathematics.

    weight (KH, KW, C_in, C_out), bias (C_out,). `padding` is 'same' (k // 2 zeros on each side, odd kernels only; with stride
    1 the size stays), or a number of pixels, or one for rows and one for columns; so are `kernel_size` and `stride`.

    Weights start as He et al. 2015 (arXiv:1502.01852) derive for layers followed by ReLU: normal with variance 2 / fan_in,
    fan_in = KH·KW·C_in being the number of terms in each output, so that the variance of the signal stays the same from layer
    to layer. Biases start at 0. Raises ValueError for 'same' with an even kernel.
    """

    keeps_output = False

    def __init__(self, in_channels, out_channels, kernel_size=3, stride=1, padding='same', bias=True, *,
                 rng=None, dtype=numpy.float32):
        super().__init__()
        self.kernel_size = KH, KW = pair(kernel_size, 'kernel_size')
        self.stride = pair(stride, 'stride')
        if padding == 'same':
            if KH % 2 == 0 or KW % 2 == 0:
                raise ValueError(f"padding='same' needs an odd kernel, got {KH}×{KW}; give the padding in pixels instead")
            padding = KH // 2, KW // 2
        self.padding = pair(padding, 'padding', least=0)
        C_in, C_out = positive(in_channels, 'in_channels'), positive(out_channels, 'out_channels')
        self.add_parameter('weight', he_normal((KH, KW, C_in, C_out), KH * KW * C_in, rng, dtype))
        if bias:
            self.add_parameter('bias', numpy.zeros(C_out, dtype))

    def forward(self, x):
        self.output_shape(x.shape)
        self.keep(x)
        return convolution.forward(x, self.params['weight'], self.stride, self.padding, self.params.get('bias'))

    def backward(self, dy, input_gradient=True):
        """Return dx; without `input_gradient` None, because nobody learns from the gradient of the images."""
        x, = self.take()
        self.grads['weight'] = convolution.weight_gradient(x, dy, self.kernel_size, self.stride, self.padding)
        if 'bias' in self.params:
            self.grads['bias'] = bias_gradient(dy)
        if not input_gradient:
            return None
        input_size = x.shape[1:3]
        del x                                                   # its memory may be free before that of dx is needed
        return convolution.input_gradient(dy, self.params['weight'], input_size, self.stride, self.padding)

    def output_shape(self, x):
        C_in, C_out = self.params['weight'].shape[2:]
        check_channels(x, C_in)
        return (x[0], *convolution.output_size(x[1:3], self.kernel_size, self.stride, self.padding), C_out)

    def multiply_adds(self, x):
        return self.params['weight'].size * math.prod(self.output_shape(x)[:3])                # each weight meets each output


class ConvTranspose2D(Layer):
    """The convolution's way back: (N, H, W, C_in) gives (N, H·stride, W·stride, C_out), each pixel painting a patch.

    A convolution with stride 2 gathers 2×2 pixels into one. Its input gradient spreads one pixel over 2×2: an upsampling with
    weights that can be learned. That is all a transposed convolution is: the *input gradient* of the convolution that maps
    C_out to C_in channels, used as a forward. So it needs no mathematics of its own, only the three functions of
    `convolution` with the roles of input and output gradient exchanged: where Conv2D calls forward, input_gradient and
    weight_gradient(x, dy), this layer calls input_gradient, forward and weight_gradient(dy, x).

    weight (KH, KW, C_out, C_in), bias (C_out,); He initialisation with fan_in = C_in, because windows do not overlap and every
    output pixel is a sum over the channels of one input pixel. Raises ValueError if the stride is not the kernel size.
    """

    keeps_output = False

    def __init__(self, in_channels, out_channels, kernel_size=2, stride=2, bias=True, *, rng=None, dtype=numpy.float32):
        super().__init__()
        self.kernel_size = KH, KW = pair(kernel_size, 'kernel_size')
        self.stride = pair(stride, 'stride')
        if self.stride != self.kernel_size:
            raise ValueError(f'a transposed convolution takes a stride equal to its kernel, got stride {self.stride} and '
                             f'kernel {self.kernel_size}: its patches may neither overlap nor leave gaps')
        self.padding = 0, 0
        C_in, C_out = positive(in_channels, 'in_channels'), positive(out_channels, 'out_channels')
        self.add_parameter('weight', he_normal((KH, KW, C_out, C_in), C_in, rng, dtype))
        if bias:
            self.add_parameter('bias', numpy.zeros(C_out, dtype))

    def forward(self, x):
        _, H_out, W_out, _ = self.output_shape(x.shape)
        self.keep(x)
        return convolution.input_gradient(x, self.params['weight'], (H_out, W_out), self.stride, self.padding,
                                          self.params.get('bias'))

    def backward(self, dy):
        x, = self.take()
        weight = self.params['weight']
        self.grads['weight'] = convolution.weight_gradient(dy, x, self.kernel_size, self.stride, self.padding)
        if 'bias' in self.params:
            self.grads['bias'] = bias_gradient(dy)
        return convolution.forward(dy, weight, self.stride, self.padding)                     # (N, H, W, C_in)

    def output_shape(self, x):
        C_out, C_in = self.params['weight'].shape[2:]
        check_channels(x, C_in)
        return x[0], x[1] * self.stride[0], x[2] * self.stride[1], C_out

    def multiply_adds(self, x):
        return self.params['weight'].size * math.prod(x[:3])                                  # each weight meets each input


class BatchNorm2D(Layer):
    """Centre and scale each channel to mean 0 and variance 1 over the batch, then let the network choose both anew.

    Ioffe & Szegedy 2015 (arXiv:1502.03167), for x (N, H, W, C) and M = N·H·W values per channel:

        x̂ = (x − mean) / √(variance + eps)        y = weight·x̂ + bias            weight, bias (C,)

    In training, mean and variance are those of the batch, and running averages of them are kept for inference:
    running ← (1 − momentum)·running + momentum·batch. The running variance is the unbiased one, Σ(x − mean)² / (M − 1); with
    one value per channel there is none, and it keeps its old value.

    Backward: moving one x moves its own x̂, and also the mean and the variance that all M values share. The second and third
    term below are these two side effects: they take out of dy what would only move the mean or the length of x̂, which x̂
    cannot do:

        dx = (dy − mean(dy) − x̂·mean(dy·x̂)) · weight / √(variance + eps)

    In inference mean and variance are constants and the side effects vanish.
    """

    def __init__(self, channels, momentum=0.1, eps=1e-5, *, dtype=numpy.float32):
        super().__init__()
        C = positive(channels, 'channels')
        self.momentum, self.eps = momentum, eps
        self.add_parameter('weight', numpy.ones(C, dtype))
        self.add_parameter('bias', numpy.zeros(C, dtype))
        self.buffers.update(running_mean=numpy.zeros(C, dtype), running_var=numpy.ones(C, dtype))

    def forward(self, x):
        def normalize(y, x, slope, shift):
            get_array_module(x).multiply(x, slope, out=y)
            y += shift

        return in_blocks(normalize, x, channels=self.slope_and_shift(x))

    def backward(self, dy):
        x, mean, scale = self.take()                                           # x̂ = (x − mean)·scale
        xp = get_array_module(dy)
        dbias, dweight = channel_sums(dy, x)                                   # Σdy, Σdy·x
        dweight = (dweight - mean * dbias) * scale                             # Σdy·x̂
        self.grads['weight'], self.grads['bias'] = dweight.astype(dy.dtype), dbias.astype(dy.dtype)

        slope = self.params['weight'] * scale                                  # (C,): dy/dx at a fixed mean and variance
        if not self.training:
            return in_blocks(lambda dx, dy, slope: xp.multiply(dy, slope, out=dx), dy, channels=(slope,))

        # The three terms in the bracket, sorted by what changes from pixel to pixel: dy + x·factor + rest.
        M = dy.size // dy.shape[3]
        factor = -scale * dweight / M
        rest = -dbias / M - mean * factor

        def through_normalization(dx, dy, x, factor, rest, slope):
            xp.multiply(x, factor, out=dx)
            dx += dy
            dx += rest
            dx *= slope

        return in_blocks(through_normalization, dy, x, channels=(factor.astype(dy.dtype), rest.astype(dy.dtype), slope))

    def slope_and_shift(self, x):
        """Return slope and shift, (C,) each, with which y = x·slope + shift, and keep what backward needs."""
        check_channels(x.shape, len(self.params['weight']))
        if self.training:
            mean, variance = channel_moments(x)                                # (C,), as all statistics in float64
            self.update_running(mean, variance, x.size // x.shape[3])
        else:
            mean, variance = self.buffers['running_mean'], self.buffers['running_var']
        mean, scale, slope, shift = self.at(mean, variance, x.dtype)
        self.keep(x, mean, scale)
        return slope, shift

    def at(self, mean, variance, dtype):
        """Return mean, scale = 1 / √(variance + eps), slope and shift, (C,) each: y = (x − mean)·scale·weight + bias = x·slope + shift."""
        mean, scale = mean.astype(dtype), (1 / get_array_module(mean).sqrt(variance + self.eps)).astype(dtype)
        slope = self.params['weight'] * scale
        return mean, scale, slope, self.params['bias'] - mean * slope

    def folded_into(self, weight):
        """Return (weight, bias) of the one convolution that does, in inference, what this norm does after one with `weight`.

        There the norm is a fixed scale and shift of each channel. A convolution is linear and its output channels are the last axis
        of the weight (KH, KW, C_in, C), so the scale can be done to the weight beforehand, and the norm costs nothing:

            slope·(x ∗ weight) + shift  =  x ∗ (weight·slope) + shift
        """
        _, _, slope, shift = self.at(self.buffers['running_mean'], self.buffers['running_var'], weight.dtype)
        return weight * slope, shift

    def update_running(self, mean, variance, M):
        """Move the running statistics towards those of this batch, in place: the optimizer and checkpoints hold these arrays."""
        statistics = {'running_mean': mean}
        if M > 1:
            statistics['running_var'] = variance * (M / (M - 1))
        for name, value in statistics.items():
            running = self.buffers[name]
            running += self.momentum * (value.real.astype(running.dtype) - running)


class Dropout(Layer):
    """In training, set each value to 0 with probability p and divide the others by 1 − p; in inference, do nothing.

    The network may not rely on any single feature, and the expected value stays the same (Srivastava et al. 2014). Backward
    multiplies by the same mask: what was dropped moved nothing. `rng` is the `numpy.random.Generator` the masks are drawn from.
    """

    def __init__(self, p, *, rng=None):
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f'dropout probability is {p}; expected a number from 0 up to, not including, 1')
        self.p = p
        self.rng = numpy.random.default_rng() if rng is None else rng

    def forward(self, x):
        if not self.training or self.p == 0:
            self.keep(None)
            return x
        kept = generator_like(x, self.rng).random(x.shape, dtype='float32') >= self.p
        mask = kept / x.dtype.type(1 - self.p)                                 # 0 or 1 / (1 − p), the dtype of x
        self.keep(mask)
        return x * mask

    def backward(self, dy):
        mask, = self.take()
        return dy if mask is None else dy * mask


def bias_gradient(dy):
    """Return Σdy over all pixels, (C,): a bias entered every pixel of its channel, with factor 1."""
    return channel_sums(dy)[0].astype(dy.dtype)


def he_normal(shape, fan_in, rng, dtype):
    """Return weights drawn from a normal distribution with variance 2 / fan_in, on the host, in double precision, then cast."""
    rng = numpy.random.default_rng() if rng is None else rng
    return (rng.standard_normal(shape) * math.sqrt(2 / fan_in)).astype(dtype)


def check_match(own, given, what, whose):
    """Raise ValueError unless the dicts `own` and `given` hold arrays of the same shapes under the same names."""
    problems = ([f'{name} is missing' for name in own.keys() - given.keys()]
                + [f'{name} is unknown' for name in given.keys() - own.keys()]
                + [f'{name} has shape {numpy.shape(given[name])}, expected {numpy.shape(own[name])}'
                   for name in own.keys() & given.keys() if numpy.shape(given[name]) != numpy.shape(own[name])])
    if problems:
        more = f'; and {len(problems) - 3} more' if len(problems) > 3 else ''
        raise ValueError(f'{what} does not fit {whose}: {"; ".join(sorted(problems)[:3])}{more}')


def check_channels(shape, channels):
    """Raise ValueError unless `shape` is (N, H, W, channels)."""
    if len(shape) != 4 or shape[3] != channels:
        raise ValueError(f'input has shape {shape}, expected (N, H, W, {channels}): the channels come last')


def positive(value, name, least=1):
    """Return `value` as an int. Raises ValueError unless it is a whole number of at least `least`."""
    if int(value) != value or value < least:
        raise ValueError(f'{name} is {value}, expected a whole number of at least {least}')
    return int(value)


def pair(value, name, least=1):
    """Return `value` as (vertical, horizontal): a number stands for both."""
    values = (value, value) if numpy.isscalar(value) else tuple(value)
    if len(values) != 2:
        raise ValueError(f'{name} is {value}, expected a number or a pair (vertical, horizontal)')
    return positive(values[0], name, least), positive(values[1], name, least)
