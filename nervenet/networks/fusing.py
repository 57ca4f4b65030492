"""Layers one after the other, where two of them can be done at once.

This is the one place that knows such shortcuts. It asks the layers what they are, and whatever it does not know, a new activation or
another norm, it leaves to the layers themselves.
"""

from ..engine import kernels
from ..engine.paths import note, only_plain
from ..layers import BatchNorm2D, Conv2D, ReLU


def in_sequence(x, *layers):
    """Return what the layers make of x one after the other; None stands for no layer."""
    layers = [layer for layer in layers if layer is not None]
    while layers:
        kinds, fuse = tuple(map(type, layers[:2])), not only_plain()
        if fuse and kinds == (Conv2D, BatchNorm2D) and not any(layer.training or layer.keep_cache for layer in layers[:2]):
            x = norm_in_convolution(x, *layers[:2])
            del layers[:2]
        elif fuse and kinds == (BatchNorm2D, ReLU) and kernels.can_compute(x):
            x = norm_and_relu(x, *layers[:2])
            del layers[:2]
        else:
            x = layers.pop(0).forward(x)
    return x


def norm_in_convolution(x, conv, norm):
    """Return norm(conv(x)) by one convolution, in inference, where nothing is kept.

    There the norm is a fixed scale and shift of each channel. A convolution is linear and its output channels are the last axis of
    the weight (KH, KW, C_in, C), so both can be done to weight and bias beforehand, and the norm costs nothing:

        slope·(x ∗ weight + bias) + shift  =  x ∗ (weight·slope) + (bias·slope + shift)
    """
    note('norm folded into the convolution')
    slope, shift = norm.running_slope_and_shift()
    if 'bias' in conv.params:
        shift = conv.params['bias'] * slope + shift
    return conv.apply(x, conv.params['weight'] * slope, shift)


def norm_and_relu(x, norm, activation):
    """Return activation(norm(x)) by a kernel that walks over memory once."""
    note('norm and ReLU in one kernel')
    y = kernels.normalize_relu(x, *norm.slope_and_shift(x))
    activation.keep(y)
    return y
