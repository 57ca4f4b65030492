"""Layers: the pieces a network is made of, each with its derivative written out by hand.

A layer is a function y = f(x; params) and, beside it, the chain rule for that function. Write L for the loss, a single
number, and dname for ∂L/∂name, which has the shape of `name`:

    y  = layer.forward(x)       computes y and keeps in `layer.cache` exactly what backward will need
    dx = layer.backward(dy)     takes ∂L/∂y, returns ∂L/∂x, puts ∂L/∂params into `layer.grads`, frees the cache

`backward` is never more than this: what did a small change of x, or of a parameter, do to y, and so to L?

Shapes: N images, H rows, W columns, C channels, in this order: x is (N, H, W, C). The channels of a pixel lie side by side in
memory, so a layer that mixes channels is a matrix product over the last axis.

Where every value is treated by itself, the formula is a plain function such as `relu` below, and `in_blocks(relu, x)` is relu(x),
computed in pieces that stay in the cache, on all cores. Within `nervenet.plain()` it is relu(x) itself, and convolution and batch norm
are computed by their plain formulas too. Layers come in order, from the simplest up.
"""

import contextlib
import contextvars
import functools
import math

import numpy

from . import convolution
from .checks import check_channels, check_match, in_range, positive
from .convolution import Geometry
from .engine import pooling
from .engine.backend import device_of, generator_like, get_array_module, move
from .engine.communicator import total, whole_batch
from .engine.paths import only_plain
from .engine.pixelwise import add, apart, channel_moments, channel_sums, in_blocks, pixels_of_batch, side_by_side

_inferring = contextvars.ContextVar('inference', default=False)


@contextlib.contextmanager
def inference():
    """Within this context, and in this thread alone, every layer is in inference mode and keeps nothing. No layer is changed by it.

    So any number of threads may predict with one model, whatever mode it is in.
    """
    token = _inferring.set(True)
    try:
        yield
    finally:
        _inferring.reset(token)


class Layer:
    """The protocol, and what all layers share: parameters by name, training or inference mode, moving to a device.

    `params` and `grads` are dicts with equal keys. `buffers` holds arrays that are saved with the parameters and not
    trained. `children` names the layers inside a layer, in definition order; a dotted name, `downs.0.conv1.weight`, is the
    way from the outermost layer to an array.

    `training` decides how a layer behaves (batch norm, dropout); `keep_cache` decides whether forward keeps what backward needs. A new layer
    is in training mode. `keeps` says which arrays as large as input or output it keeps: accounting of memory asks for it.
    """

    keeps = ('output',)

    def __init__(self):
        self.params, self.grads, self.buffers, self.children = {}, {}, {}, {}
        self.training = self.keep_cache = True
        self.cache = None

    def forward(self, *inputs):
        raise NotImplementedError(f'{type(self).__name__} has no forward')

    def backward(self, dy):
        raise NotImplementedError(f'{type(self).__name__} has no backward')

    @property
    def training(self):
        """The mode of the layer, but for a thread that is within `inference`."""
        return self._training and not _inferring.get()

    @training.setter
    def training(self, value):
        self._training = value

    @property
    def keep_cache(self):
        """Whether forward keeps what backward needs; never within `inference`."""
        return self._keep_cache and not _inferring.get()

    @keep_cache.setter
    def keep_cache(self, value):
        self._keep_cache = value

    def keep(self, *values):
        """Keep what backward needs, unless nobody will ask for it."""
        if not _inferring.get():                                # else the layer stays as it is, in another thread's use perhaps
            self.cache = values if self.keep_cache else None

    def take(self):
        """Return what forward kept, and forget it, so that its memory is free as soon as backward is done with it."""
        if self.cache is None:
            raise RuntimeError(f'{type(self).__name__}.backward has nothing to work on: call forward first, in training '
                               'mode or after eval(keep_cache=True); each forward serves one backward')
        values, self.cache = self.cache, None
        return values

    def forget(self):
        """Drop what forward kept."""
        if not _inferring.get():
            self.cache = None

    def output_shape(self, *shapes):
        """Return the shape that forward gives for inputs of these shapes."""
        return shapes[0]

    def fitted(self, *shapes, **options):
        """Return the layer that acts on all inputs as this one does on inputs of these shapes: itself, unless its sizes depend on them."""
        return self

    def multiply_adds(self, x):
        """Return how many multiply-adds the products of one forward take for an input of shape x."""
        return 0

    def input_range(self, first, last, axis):
        """Return (first, last): the input rows (axis 0) or columns (axis 1) that the output's from `first` to `last` depend on."""
        return first, last

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
        """Return parameters and buffers by dotted name: all that a trained model is.

        The arrays are the live ones, which the next step changes: to keep this state, copy them (or the model, `copy.deepcopy`).
        """
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

    def add_children(self, *names):
        """Register the layers that are attributes of these names, in this order; None stands for no layer."""
        self.children.update((name, getattr(self, name)) for name in names if getattr(self, name) is not None)

    def add_parameter(self, name, array):
        """Register a parameter; its gradient starts at zero."""
        self.params[name], self.grads[name] = array, numpy.zeros_like(array)


@contextlib.contextmanager
def forwards_replaced(model, replacement):
    """Within this context the forward of each innermost layer is `replacement(name, layer, forward)`: to look on, or not to compute."""
    innermost = [(prefix[:-1], layer) for prefix, layer in model.layers() if not layer.children]
    try:
        for name, layer in innermost:
            layer.forward = replacement(name, layer, layer.forward)     # hides the method of the class
        yield
    finally:
        for _, layer in innermost:
            vars(layer).pop('forward', None)


def relu(x, zero=0, out=None):
    """Return max(x, 0), element by element.

    Complex numbers are compared by their real parts, so that the complex step of `gradcheck` passes through with its imaginary part.
    """
    return get_array_module(x).maximum(x, zero, out=out)


def relu_gradient(dy, y, out=None):
    """Return dy · (y > 0): where y moved with x, dy passes."""
    return get_array_module(dy).multiply(dy, y > 0, out=out)


def zeros(x):
    """Return zeros (C,) for `relu` of x (…, C): the maximum of an array and a number takes NumPy three times as long as that of two arrays."""
    return get_array_module(x).zeros(x.shape[-1:], x.dtype)


class ReLU(Layer):
    """y = max(x, 0), element by element, for x of any shape.

    Where x > 0, y moves with x; elsewhere y stays 0. So dx = dy where x > 0, else 0. At the kink, x = 0, the derivative is
    taken as 0. y > 0 exactly where x > 0, and y is kept by the next layer anyway: remembering y instead of x costs nothing.
    """

    def forward(self, x):
        y = in_blocks(relu, x, channels=[zeros(x)])
        self.keep(y)
        return y

    def backward(self, dy):
        y, = self.take()
        return in_blocks(relu_gradient, dy, y)


def leaky_relu(x, negative_slope, out=None):
    """Return x where x > 0, else negative_slope·x: for a slope from 0 to below 1 that is the larger of the two."""
    return get_array_module(x).maximum(x, negative_slope * x, out=out)


def leaky_relu_gradient(dy, y, negative_slope, out=None):
    """Return dy where y > 0, else negative_slope·dy."""
    xp, number = get_array_module(dy), dy.dtype.type
    return xp.multiply(dy, xp.where(y > 0, number(1), number(negative_slope)), out=out)


class LeakyReLU(Layer):
    """y = x where x > 0, else negative_slope·x, element by element: a unit that is off still learns a little.

    So dx = dy where x > 0, else negative_slope·dy; at the kink, x = 0, the latter. As for ReLU, y > 0 exactly where x > 0. Source: Maas,
    Hannun & Ng 2013, "Rectifier nonlinearities improve neural network acoustic models". Raises ValueError for a slope outside [0, 1).
    """

    def __init__(self, negative_slope=0.01):
        super().__init__()
        self.negative_slope = in_range('negative_slope', negative_slope, 1)

    def forward(self, x):
        y = in_blocks(functools.partial(leaky_relu, negative_slope=self.negative_slope), x)
        self.keep(y)
        return y

    def backward(self, dy):
        y, = self.take()
        return in_blocks(functools.partial(leaky_relu_gradient, negative_slope=self.negative_slope), dy, y)


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
    """Return 1 / (1 + exp(−x)) for x of any shape, to the last digits of its dtype on both sides of 0.

    No exponent is positive: exp(x) / (exp(x) + 1) below 0 and 1 / (1 + exp(−x)) above are one formula, which overflows for no x.
    """
    xp = get_array_module(x)
    rising, falling = xp.exp(xp.minimum(x, 0)), xp.exp(-xp.maximum(x, 0))
    return rising / (rising + falling)


class Add(Layer):
    """y = a + b + …, arrays of one shape (N, H, W, C): where a block is to learn what is missing, not the whole (He et al. 2015, arXiv:1512.03385).

    Each input moved y by as much as it moved itself, so each receives all of dy: the same array, which nobody writes into.
    """

    keeps = ()

    def forward(self, a, b, *others):
        self.output_shape(a.shape, b.shape, *(other.shape for other in others))       # raises for inputs that do not fit
        self.keep(2 + len(others))
        return functools.reduce(add, others, add(a, b))

    def backward(self, dy):
        number, = self.take()
        return (dy,) * number

    def output_shape(self, a, *others):
        for other in others:
            if other != a:
                raise ValueError(f'cannot add {a} and {other}: the shapes differ')
        return a


class Concat(Layer):
    """y = [a, b, …] side by side along the channels: (N, H, W, A) and (N, H, W, B) give (N, H, W, A + B).

    Every output channel is a copy of one input channel, so each input receives its own part of dy back: a copy too, since a view
    would keep all of dy in memory for as long as one part of it is needed.
    """

    keeps = ()

    def forward(self, a, b, *others):
        inputs = a, b, *others
        self.output_shape(*(x.shape for x in inputs))           # raises for inputs that do not fit
        self.keep([x.shape[3] for x in inputs])
        return side_by_side(*inputs)                                           # (N, H, W, A + B)

    def backward(self, dy):
        channels, = self.take()
        return apart(dy, *channels)                                            # (N, H, W, A), (N, H, W, B)

    def output_shape(self, a, *others):
        for b in others:
            if a[:3] != b[:3]:
                raise ValueError(f'cannot join {a} and {b}: they differ before the channels; pad or crop one of them')
        return (*a[:3], a[3] + sum(b[3] for b in others))


def largest(x, geometry):
    """Return the largest value of each window of x (N, H, W, C), tap by tap: (N, H_out, W_out, C)."""
    padded, size = surrounded(x, geometry.padding), geometry.output_size(x.shape[1:3])
    return functools.reduce(get_array_module(x).maximum, (padded[:, rows, columns] for _, _, rows, columns in geometry.taps(size)))


def to_the_first(dy, x, y, geometry):
    """Return ∂L/∂x from dy: in each window the first tap that is as large as y, in reading order, receives all, the others nothing."""
    (PH, PW), (_, H, W, _) = geometry.padding, x.shape
    padded, rest = surrounded(x, geometry.padding), dy.copy()                  # what no pixel has claimed yet
    dpadded = get_array_module(x).zeros(padded.shape, dy.dtype)
    for _, _, rows, columns in geometry.taps(dy.shape[1:3]):
        share = rest * (padded[:, rows, columns] == y)                         # all or nothing
        dpadded[:, rows, columns] += share                                     # windows may overlap
        rest -= share
    return dpadded[:, PH:PH + H, PW:PW + W]


def surrounded(x, padding):
    """Return x (N, H, W, C) with rows and columns around it that are lower than anything."""
    xp, (PH, PW), (N, H, W, C) = get_array_module(x), padding, x.shape
    padded = xp.full((N, H + 2 * PH, W + 2 * PW, C), -math.inf, x.dtype)
    padded[:, PH:PH + H, PW:PW + W] = x
    return padded


class MaxPool2D(Layer):
    """y = the maximum of each kernel_size × kernel_size window: (N, H, W, C) gives (N, H_out, W_out, C).

    Unless `stride` says otherwise, windows lie side by side, and rows and columns left over at the bottom and right are ignored:
    (N, H // k, W // k, C). `padding` rows and columns around the image never are a maximum. Only the maximum moved the output, so only
    it receives gradient; of equal maxima, the first in reading order does. Where windows overlap, a pixel collects from all of them.

    Raises ValueError for what is no number of pixels or pair of them, and for a padding that would leave windows empty.
    """

    keeps = 'input', 'output'

    def __init__(self, kernel_size=2, stride=None, padding=0):
        super().__init__()
        self.geometry = Geometry(kernel_size, kernel_size if stride is None else stride, padding)
        if any(p >= k for p, k in zip(self.geometry.padding, self.geometry.kernel_size)):
            raise ValueError(f'padding is {padding}; expected less than the kernel of {kernel_size}: a window outside the image has no maximum')

    def forward(self, x):
        self.output_shape(x.shape)                              # raises for an image that is too small
        y, places = (largest(x, self.geometry), None) if only_plain() else pooling.largest(x, self.geometry)
        self.keep(x, y, places)
        return y

    def backward(self, dy):
        x, y, places = self.take()                                             # x and y are kept by their neighbours anyway
        return to_the_first(dy, x, y, self.geometry) if only_plain() else pooling.to_the_first(dy, x, y, places, self.geometry)

    def output_shape(self, x):
        return x[0], *self.geometry.output_size(x[1:3]), x[3]

    def input_range(self, first, last, axis):
        return self.geometry.input_range(first, last, axis)


class Conv2D(Layer):
    """y = x ∗ weight + bias: (N, H, W, C_in) gives (N, H_out, W_out, C_out). See `convolution/plain.py` for the mathematics.

    weight (KH, KW, C_in, C_out), bias (C_out,). `kernel_size`, `stride`, `padding` and `dilation` are those of
    `convolution.Geometry`: numbers of pixels, or pairs for rows and columns; padding may be 'same'.

    Weights start as He et al. 2015 (arXiv:1502.01852) derive for layers followed by ReLU: normal with variance 2 / fan_in,
    fan_in = KH·KW·C_in being the number of terms in each output, so that the variance of the signal stays the same from layer
    to layer. Biases start at 0. Raises ValueError for a geometry that cannot be.
    """

    keeps = ('input',)

    def __init__(self, in_channels, out_channels, kernel_size=3, stride=1, padding='same', bias=True, *, dilation=1,
                 rng=None, dtype=numpy.float32):
        super().__init__()
        self.geometry = Geometry(kernel_size, stride, padding, dilation)
        C_in, C_out = positive(in_channels, 'in_channels'), positive(out_channels, 'out_channels')
        shape = *self.geometry.kernel_size, C_in, C_out
        self.add_parameter('weight', he_normal(shape, math.prod(shape[:3]), rng, dtype))
        if bias:
            self.add_parameter('bias', numpy.zeros(C_out, dtype))

    def forward(self, x, **options):
        """Return y. x may be a pair that side by side is the input; for that and for `options` see `convolution.forward`."""
        self.keep(x)
        return self.apply(x, self.params['weight'], self.params.get('bias'), **options)

    def apply(self, x, weight, bias, **options):
        """Return forward's result for another weight and bias, and keep nothing."""
        parts = convolution.parts_of(x)
        self.output_shape((*parts[0].shape[:3], sum(part.shape[3] for part in parts)))      # raises for an input that does not fit
        return convolution.forward(x, weight, self.geometry, bias, **options)

    def backward(self, dy, input_gradient=True, then=None):
        """Return dx, of a pair both; without `input_gradient` None, because nobody learns from the gradient of the images."""
        x, = self.take()
        self.grads['weight'] = convolution.weight_gradient(x, dy, self.geometry)
        if 'bias' in self.params:
            self.grads['bias'] = bias_gradient(dy)
        if not input_gradient:
            return None
        first, split = (x[0], x[0].shape[3]) if isinstance(x, tuple) else (x, None)
        input_size = first.shape[1:3]
        del x, first                                            # their memory may be free before that of dx is needed
        return convolution.input_gradient(dy, self.params['weight'], input_size, self.geometry, then=then, split=split)

    def output_shape(self, x):
        C_in, C_out = self.params['weight'].shape[2:]
        check_channels(x, C_in)
        return (x[0], *self.geometry.output_size(x[1:3]), C_out)

    def multiply_adds(self, x):
        return self.params['weight'].size * math.prod(self.output_shape(x)[:3])                # each weight meets each output

    def input_range(self, first, last, axis):
        return self.geometry.input_range(first, last, axis)


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

    keeps = ('input',)

    def __init__(self, in_channels, out_channels, kernel_size=2, stride=2, *, bias=True, rng=None, dtype=numpy.float32):
        super().__init__()
        self.geometry = Geometry(kernel_size, stride)           # of the convolution whose way back this is
        if self.geometry.stride != self.geometry.kernel_size:
            raise ValueError(f'a transposed convolution takes a stride equal to its kernel, got stride {self.geometry.stride} and '
                             f'kernel {self.geometry.kernel_size}: its patches may neither overlap nor leave gaps')
        C_in, C_out = positive(in_channels, 'in_channels'), positive(out_channels, 'out_channels')
        self.add_parameter('weight', he_normal((*self.geometry.kernel_size, C_out, C_in), C_in, rng, dtype))
        if bias:
            self.add_parameter('bias', numpy.zeros(C_out, dtype))

    def forward(self, x):
        size = self.output_shape(x.shape)[1:3]
        self.keep(x)
        return convolution.input_gradient(x, self.params['weight'], size, self.geometry, self.params.get('bias'))

    def backward(self, dy):
        x, = self.take()
        self.grads['weight'] = convolution.weight_gradient(dy, x, self.geometry)
        if 'bias' in self.params:
            self.grads['bias'] = bias_gradient(dy)
        return convolution.forward(dy, self.params['weight'], self.geometry)                  # (N, H, W, C_in)

    def output_shape(self, x):
        C_out, C_in = self.params['weight'].shape[2:]
        check_channels(x, C_in)
        SH, SW = self.geometry.stride
        return x[0], x[1] * SH, x[2] * SW, C_out

    def multiply_adds(self, x):
        return self.params['weight'].size * math.prod(x[:3])                                  # each weight meets each input

    def input_range(self, first, last, axis):
        stride = self.geometry.stride[axis]
        return first // stride, last // stride


def normalized(x, mean, variance, eps):
    """Return x̂ = (x − mean) / √(variance + eps) for x (N, H, W, C), mean and variance (C,), in the dtype of x."""
    return (x - mean.astype(x.dtype)) / get_array_module(x).sqrt(variance + eps).astype(x.dtype)


def normalized_gradient(dx_hat, x, mean, variance, eps):
    """Return ∂L/∂x, (N, H, W, C), from ∂L/∂x̂, where mean and variance are those of x over all pixels.

    A value x reaches x̂ in three ways: by itself, through the mean, and through the variance, which all M values of its channel
    share. With σ = √(variance + eps), the derivatives of x̂ = (x − mean) / σ give, for each of the three,

        by itself      ∂x̂/∂x = 1/σ
        the mean       ∂x̂/∂mean = −1/σ                              ∂mean/∂x = 1/M
        the variance   ∂x̂/∂variance = −½·(x − mean) / σ³            ∂variance/∂x = 2·(x − mean) / M

    (That the mean also enters the variance adds nothing: Σ(x − mean) = 0.)
    """
    xp, M, axes = get_array_module(x), pixels_of_batch(x), (0, 1, 2)
    centred, std = x - mean.astype(x.dtype), xp.sqrt(variance + eps).astype(x.dtype)
    dmean, dvariance = total(-(dx_hat / std).sum(axis=axes), -(dx_hat * centred).sum(axis=axes) / (2 * std**3))        # (C,)
    return dx_hat / std + dmean / M + dvariance * 2 * centred / M


def scaled_and_shifted(x, slope, shift, out=None):
    """Return x·slope + shift."""
    xp = get_array_module(x)
    return xp.add(xp.multiply(x, slope, out=out), shift, out=out)


def through_statistics(dy, x, factor, rest, slope, out=None):
    """Return (dy + x·factor + rest)·slope."""
    xp = get_array_module(x)
    dx = xp.add(xp.multiply(x, factor, out=out), dy, out=out)
    return xp.multiply(xp.add(dx, rest, out=out), slope, out=out)


class BatchNorm2D(Layer):
    """Centre and scale each channel to mean 0 and variance 1 over the batch, then let the network choose both anew.

    Ioffe & Szegedy 2015 (arXiv:1502.03167), for x (N, H, W, C) and M = N·H·W values per channel:

        x̂ = (x − mean) / √(variance + eps)        y = weight·x̂ + bias            weight, bias (C,)

    `normalized` and `normalized_gradient` above are that formula and its derivative, term by term, and within `nervenet.plain()`
    they are what is computed. The fast way needs two walks over memory each way. Forward, y = x·slope + shift, with one number of
    each for a channel. Backward, dx̂ is dy·weight, and with x̂ for (x − mean)/σ the term of the mean is −mean(dx̂)/σ, that of the
    variance −x̂·mean(dx̂·x̂)/σ. So

        dx = (dy − mean(dy) − x̂·mean(dy·x̂)) · weight / σ

    The last two take out of dy what would only move the mean or the length of x̂, which x̂ cannot do.

    In training, mean and variance are those of the batch, and running averages of them are kept for inference:
    running ← (1 − momentum)·running + momentum·batch. The running variance is the unbiased one, Σ(x − mean)² / (M − 1); with
    one value per channel there is none, and it keeps its old value; x̂ is 0 then, whatever x is. In inference mean and variance are
    constants, and nothing goes through them. Where processes share a batch, M and all sums are those of the whole batch, but for the
    gradients of weight and bias: these are summed with all others (`engine.communicator`).
    """

    keeps = ('input',)

    def __init__(self, channels, momentum=0.1, eps=1e-5, *, dtype=numpy.float32):
        super().__init__()
        C = positive(channels, 'channels')
        if not 0 <= momentum <= 1:
            raise ValueError(f'momentum is {momentum}; expected a number from 0 to 1, the weight of the newest batch')
        if not 0 < eps < math.inf:
            raise ValueError(f'eps is {eps}; it must be positive, or a channel of equal values would divide 0 by 0')
        self.momentum, self.eps = float(momentum), float(eps)
        self.add_parameter('weight', numpy.ones(C, dtype))
        self.add_parameter('bias', numpy.zeros(C, dtype))
        self.buffers.update(running_mean=numpy.zeros(C, dtype), running_var=numpy.ones(C, dtype))

    def forward(self, x):
        if only_plain():
            return self.params['weight'] * normalized(x, *self.statistics(x), self.eps) + self.params['bias']
        return in_blocks(scaled_and_shifted, x, channels=self.slope_and_shift(x))

    def backward(self, dy, sums=None):
        """Return dx; `sums` are `channel_sums(dy, x)`, if somebody has taken them already."""
        x, mean, variance = self.take()
        if only_plain():
            x_hat = normalized(x, mean, variance, self.eps)
            self.grads['weight'], self.grads['bias'] = bias_gradient(dy * x_hat), bias_gradient(dy)
            dx_hat = dy * self.params['weight']
            if not self.training:
                return dx_hat / get_array_module(x).sqrt(variance + self.eps).astype(x.dtype)
            return normalized_gradient(dx_hat, x, mean, variance, self.eps)

        mean, scale = self.mean_and_scale(mean, variance, dy)                  # x̂ = (x − mean)·scale
        dbias, dweight = sums or channel_sums(dy, x)                           # Σdy, Σdy·x
        dweight = (dweight - mean * dbias) * scale                             # Σdy·x̂
        self.grads['weight'], self.grads['bias'] = dweight.astype(dy.dtype), dbias.astype(dy.dtype)
        slope = self.params['weight'] * scale                                  # (C,): dy/dx at a fixed mean and variance
        if not self.training:
            return in_blocks(get_array_module(dy).multiply, dy, channels=(slope,))
        # The three terms in the bracket, sorted by what changes from pixel to pixel: dy + x·factor + rest.
        (dbias, dweight), M = total(dbias, dweight), pixels_of_batch(x)
        factor = -scale * dweight / M
        rest = -dbias / M - mean * factor
        return in_blocks(through_statistics, dy, x, channels=(factor.astype(dy.dtype), rest.astype(dy.dtype), slope))

    def statistics(self, x):
        """Return mean and variance (C,) that x is normalised with, and keep them: its own in training, which also move the running ones."""
        check_channels(x.shape, len(self.params['weight']))
        if self.training:
            mean, variance = channel_moments(x)                                # as all statistics in float64
            self.update_running(mean, variance, pixels_of_batch(x))
        else:
            mean, variance = self.buffers['running_mean'], self.buffers['running_var']
        self.keep(x, mean, variance)
        return mean, variance

    def mean_and_scale(self, mean, variance, x):
        """Return mean and 1 / √(variance + eps), (C,) each in the dtype of x; of one value per channel the scale is 0, as x̂ is."""
        scale = 1 / get_array_module(mean).sqrt(variance + self.eps)
        one_value = self.training and pixels_of_batch(x) == 1
        return mean.astype(x.dtype), (0 * scale if one_value else scale).astype(x.dtype)

    def slope_and_shift(self, x):
        """Return slope and shift, (C,) each, with which y = x·slope + shift, and keep what backward needs."""
        return self.as_slope_and_shift(*self.mean_and_scale(*self.statistics(x), x))

    def running_slope_and_shift(self):
        """Return slope and shift, (C,) each, of inference."""
        mean, variance = self.buffers['running_mean'], self.buffers['running_var']
        return self.as_slope_and_shift(*self.mean_and_scale(mean, variance, mean))

    def as_slope_and_shift(self, mean, scale):
        """Return slope and shift of y = weight·(x − mean)·scale + bias = x·slope + shift."""
        slope = self.params['weight'] * scale
        return slope, self.params['bias'] - mean * slope

    def update_running(self, mean, variance, M):
        """Move the running statistics towards those of this batch, in place: the optimizer and checkpoints hold these arrays."""
        statistics = {'running_mean': mean} | ({'running_var': variance * (M / (M - 1))} if M > 1 else {})
        for name, value in statistics.items():
            running = self.buffers[name]
            running[...] = ((1 - self.momentum) * running + self.momentum * value.real).astype(running.dtype)


class Dropout(Layer):
    """In training, set each value to 0 with probability p and divide the others by 1 − p; in inference, do nothing.

    The network may not rely on any single feature, and the expected value stays the same (Srivastava et al. 2014). Backward
    multiplies by the same mask: what was dropped moved nothing. `rng` is the `numpy.random.Generator` the masks are drawn from; where
    processes share a batch, each draws for all of it, and takes the masks of its own images: they are those that one process draws.
    """

    def __init__(self, p, *, rng=None):
        super().__init__()
        self.p = in_range('dropout probability', p, 1)
        self.rng = numpy.random.default_rng(rng)

    def forward(self, x):
        if not self.training or self.p == 0:
            self.keep(None)
            return x
        shape, rows = whole_batch(x)
        kept = generator_like(x, self.rng).random(shape, dtype='float32')[rows] >= self.p
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
    return (numpy.random.default_rng(rng).standard_normal(shape) * math.sqrt(2 / fan_in)).astype(dtype)
