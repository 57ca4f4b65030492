"""Layers one after the other, where several of them can be done at once.

Memory is slow, so what a layer does to each value by itself is best done while another one has just computed that value, and it is still
in the cache. And what does not change from one prediction to the next need not be computed anew. This is the one place that knows
such shortcuts; the mathematics is that of the layers. It asks the layers what they are, and whatever it does not know, a new activation
or another norm, it leaves to the layers themselves.

    forward    convolution → ReLU              in the block that the convolution has just computed
               norm → ReLU, sum → ReLU         in one walk
    backward   ReLU ← convolution              ReLU's mask is laid over each block of the input gradient
               norm ← ReLU                     the sums that the norm needs are taken in the walk of ReLU
    both       join → convolution              the convolution takes the two as they are: see `convolution.forward`
    inference  convolution → norm              one convolution, for small maps prepared once: see `folded`

All of them keep what the layers would keep, so that either way of backward can follow either way of forward.
"""

import math
from functools import partial

import numpy

from ..convolution import parts_of
from ..convolution.kept import drop_kept, empty_to_keep, kept_for
from ..engine import kernels
from ..engine.backend import get_array_module
from ..engine.memory import empty
from ..engine.paths import note, only_plain
from ..engine.pixelwise import are_real_numpy, copy_into, in_blocks, in_blocks_with_sums
from ..layers import Add, BatchNorm2D, Concat, Conv2D, ReLU, relu, relu_gradient, scaled_and_shifted, zeros

FEW_PIXELS = 512                # of all images together: for more, preparing a weight anew is a small part of the convolution, and takes no memory


def in_sequence(x, *layers):
    """Return what the layers make of x one after the other; None stands for no layer. Before a Concat or an Add, x is a pair."""
    layers = [layer for layer in layers if layer is not None]
    while layers:
        kinds = [*map(type, layers)]
        length = kinds.index(Conv2D) + 1 if Conv2D in kinds[:2] and kinds[0] in (Concat, Conv2D) else 0
        length += kinds[length:length + 1] == [BatchNorm2D] if length else 0
        length += kinds[length:length + 1] == [ReLU] if length else 0
        group = layers[:length]
        if length > 1 and _may_be_fused(x, group):
            of = {type(layer): layer for layer in group}
            x = convolution_norm_relu(x, of[Conv2D], of.get(BatchNorm2D), of.get(ReLU))
            del layers[:length]
        elif kinds[:2] == [Concat, Conv2D] and not only_plain() and not _watched(layers[:2]):
            x = layers[1].forward(x)                                            # on a device, or complex numbers
            del layers[:2]
        elif kinds[:2] == [Conv2D, BatchNorm2D] and not only_plain() and not _learning(layers[:2]) and not _watched(layers[:2]):
            x = layers[0].apply(x, *folded(*layers[:2]))                        # there too
            del layers[:2]
        elif kinds[:2] == [BatchNorm2D, ReLU] and not only_plain() and (kernels.can_compute(x) or _may_be_fused(x, layers[:2])):
            x = norm_and_relu(x, *layers[:2])
            del layers[:2]
        elif kinds[:2] == [Add, ReLU] and x[0].shape == x[1].shape and _may_be_fused(x, layers[:2]):
            x = sum_and_relu(x, *layers[:2])
            del layers[:2]
        else:
            layer = layers.pop(0)
            x = layer.forward(*x) if isinstance(x, tuple) else layer.forward(x)
    return x


def back_in_sequence(dy, *layers, input_gradient=True):
    """Return ∂L/∂(what `in_sequence` was given), a pair where the layers begin with a Concat or an Add.

    Without `input_gradient` return None: nothing beyond the parameters of the first convolution is asked for.
    """
    layers, sums = [layer for layer in layers if layer is not None], None
    first = next((layer for layer in layers if type(layer) is Conv2D), None)
    while layers:
        layer = layers.pop()
        kinds = [type(layer), *map(type, layers[-1:])]                          # this one, and the one before it
        if type(layer) is BatchNorm2D:
            dy, sums = layer.backward(dy) if sums is None else layer.backward(dy, sums=sums), None
        elif layer is first and not input_gradient:
            layer.backward(dy, input_gradient=False)
            return None
        elif kinds == [Conv2D, ReLU] and _may_be_fused(dy, [layer, layers[-1]], 'backward'):
            note('ReLU in the gradient')
            y, = layers.pop().take()
            dy = layer.backward(dy, then=(_relu_gradient_in_place, y))
        elif kinds == [ReLU, BatchNorm2D] and _may_be_fused(dy, [layer, layers[-1]], 'backward'):
            y, = layer.take()
            dy, sums = in_blocks_with_sums(relu_gradient, dy, y, layers[-1].cache[0])
        elif type(layer) is Concat and isinstance(dy, tuple):
            note('join left out')                                               # the convolution took the two as they are
        else:
            dy = layer.backward(dy)
    return dy


def _may_be_fused(x, layers, method='forward'):
    """Say whether these layers may be done at once: not by the plain mathematics, nor where somebody watches a layer's method."""
    return not only_plain() and are_real_numpy(*parts_of(x)) and not _watched(layers, method)


def _watched(layers, method='forward'):
    return any(method in vars(layer) for layer in layers)


def _learning(layers):
    return any(layer.training or layer.keep_cache for layer in layers)


def convolution_norm_relu(x, conv, norm=None, activation=None):
    """Return activation(norm(conv(x))), without those that are None; x may be a pair to be joined."""
    group = [layer for layer in (conv, norm, activation) if layer]
    activate = activation and (_relu_in_place,)
    if not _learning(group):
        for layer in group:
            layer.forget()
        kept = None
        if math.prod(parts_of(x)[0].shape[:3]) <= FEW_PIXELS:
            note('prepared once')
            weights = [*conv.params.values(), *([*norm.params.values(), *norm.buffers.values(), numpy.array(norm.eps)] if norm else [])]
            kept = kept_for(conv, weights)
        if norm is None:
            weight, bias = conv.params['weight'], conv.params.get('bias')
        else:
            weight, bias = kept('folded', partial(folded, conv, norm, empty_to_keep)) if kept else folded(conv, norm)
        return conv.apply(x, weight, bias, then=activate, kept=kept)
    drop_kept(conv)
    if norm is None:
        y = conv.forward(x, then=activate)
    else:
        y = conv.forward(x)
        channels = norm.slope_and_shift(y)
        formula = _scaled_shifted_relu if activation else scaled_and_shifted
        y = in_blocks(formula, y, channels=(*channels, zeros(y)) if activation else channels)
    if activation:
        note('ReLU in the same walk')
        activation.keep(y)
    return y


def _scaled_shifted_relu(x, slope, shift, zero, out=None):
    return relu(scaled_and_shifted(x, slope, shift, out=out), zero, out=out)


def _relu_in_place(block, y):
    """Lay ReLU over y, the block that a convolution has just computed."""
    rows = y.reshape(-1, y.shape[2] * y.shape[3])
    yield partial(relu, rows, zeros(rows), out=rows)


def _relu_gradient_in_place(block, dx, y):
    yield partial(relu_gradient, dx, y[block], out=dx)


def folded(conv, norm, make=empty):
    """Return weight and bias of one convolution that computes norm(conv(x)) in inference.

    There the norm is a fixed scale and shift of each channel. A convolution is linear and its output channels are the last axis of
    the weight (KH, KW, C_in, C), so both can be done to weight and bias beforehand, and the norm costs nothing:

        slope·(x ∗ weight + bias) + shift  =  x ∗ (weight·slope) + (bias·slope + shift)
    """
    note('norm folded into the convolution')
    slope, shift = norm.running_slope_and_shift()
    if 'bias' in conv.params:
        shift = conv.params['bias'] * slope + shift
    weight, bias = make(conv.params['weight'].shape, slope), make(shift.shape, shift)
    get_array_module(weight).multiply(conv.params['weight'], slope, out=weight)
    copy_into(bias, shift)
    return weight, bias


def norm_and_relu(x, norm, activation):
    """Return activation(norm(x)), in one walk over memory."""
    channels = norm.slope_and_shift(x)
    if kernels.can_compute(x):
        note('norm and ReLU in one kernel')
        y = kernels.normalize_relu(x, *channels)
    else:
        note('norm and ReLU in one walk')
        y = in_blocks(_scaled_shifted_relu, x, channels=(*channels, zeros(x)))
    activation.keep(y)
    return y


def sum_and_relu(pair, add, activation):
    """Return activation(a + b), in one walk over memory."""
    note('sum and ReLU in one walk')
    y = in_blocks(_sum_relu, *pair, channels=[zeros(pair[0])])
    add.keep(len(pair))
    activation.keep(y)
    return y


def _sum_relu(a, b, zero, out=None):
    return relu(numpy.add(a, b, out=out), zero, out=out)
