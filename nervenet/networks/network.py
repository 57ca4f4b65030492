"""What all networks share: images of any size in, logits of the same size out; and what can be said of them."""

import math

import numpy

from ..checks import check_channels, positive
from ..engine.backend import get_array_module
from ..engine.memory import placed
from ..layers import Layer
from . import summary

SLIGHTLY = 0.01                         # outside [0, 1] is rounding, or a gradient check; more is another scale


class Network(Layer):
    """Images (N, H, W, in_channels) of intensities in [0, 1] to logits (N, H, W, out_channels), for any H and W from 1 up.

    A subclass gives `config`, the arguments that build the same architecture again, to this constructor: among them in_channels,
    out_channels, input_mean and input_std. `multiple` is what its steps down need height and width to be a multiple of, and `least` how
    much of either they need. Its forward begins with `prepare`; its backward begins with `pad` and ends with `input_gradient_of`.

    Raises ValueError for numbers out of their range.
    """

    def __init__(self, config, multiple, dtype, least=1):
        super().__init__()
        if not 0 < config['input_std'] < math.inf:
            raise ValueError(f'input_std is {config["input_std"]}; expected a positive number')
        if not math.isfinite(config['input_mean']):
            raise ValueError(f'input_mean is {config["input_mean"]}; expected a number')
        self.config = {**config, 'input_mean': float(config['input_mean']), 'input_std': float(config['input_std'])}
        for name in 'in_channels', 'out_channels':
            self.config[name] = positive(config[name], name)
        self.multiple, self.least, self.in_channels, self.dtype = multiple, least, self.config['in_channels'], numpy.dtype(dtype)

    def prepare(self, x):
        """Return the images x standardised, with zeros at the bottom and right (`pad`): (N, H', W', C).

        0 is what standardising makes of the mean grey, so padding shows the network an even grey. Padded pixels do enter the
        statistics of batch norm. Raises ValueError for images of another dtype or number of channels, and, where the network
        standardises and the images lie in the host's memory, for intensities that are not in [0, 1].
        """
        check_channels(x.shape, self.in_channels)
        if x.dtype != self.dtype:
            raise ValueError(f'images are {x.dtype}, this model computes in {self.dtype}: give intensities in [0, 1], '
                             f'images.astype({str(self.dtype)!r})')
        mean, std = self.config['input_mean'], self.config['input_std']
        if (mean, std) != (0, 1) and isinstance(x, numpy.ndarray) and x.size:
            low, high = x.real.min(), x.real.max()
            if low < -SLIGHTLY or high > 1 + SLIGHTLY:                          # NaN is for training to find and name
                raise ValueError(f'images hold values from {low:g} to {high:g}; this model standardises intensities in [0, 1] itself, by '
                                 f'mean {mean:g} and deviation {std:g}: divide images of 0 to 255 by 255, and do not standardise them')
        return self.pad((x - mean) / std)

    def padded_size(self, size):
        """Return the (H', W') at which the network computes for images of `size` (H, W)."""
        return padded_size(size, self.multiple, self.least)

    def pad(self, x):
        """Return x (N, H, W, C) with zeros at the bottom and right, as large as the network computes; in a step, `placed`."""
        return placed(padded(x, self.padded_size(x.shape[1:3])))

    def input_gradient_of(self, dx, size):
        """Return ∂L/∂(the images) of this size (H, W) from that of what `prepare` made of them; None of None."""
        H, W = size
        return None if dx is None else dx[:, :H, :W] / self.config['input_std']     # the gradient of the padding ends here

    def summary(self, size, batch_size=8):
        """Return a table, as text, of what each layer does with one image of `size` (H, W): see `summary.table`."""
        return summary.table(self, size, batch_size)

    def training_memory(self, shape):
        """Return about how many bytes training on batches of this shape takes: see `summary.training_memory`."""
        return summary.training_memory(self, shape)

    def multiply_adds(self, shape):
        """Return how many multiply-adds the products of one forward take for images of this shape."""
        made, _, _ = summary.trace(self, shape)
        return sum(y.layer.multiply_adds(y.inputs[0].shape) for y in made)

    def receptive_field(self, stage, position, axis=0, size=(1, 1)):
        """Return (first, last) input row or column that a stage's output at `position` depends on: see `summary.receptive_field`."""
        return summary.receptive_field(self, stage, position, axis, size)

    def widest_field(self, stage, size=(1, 1)):
        """Return the side, in pixels, of the largest receptive field among a stage's units: see `summary.widest_field`."""
        return summary.widest_field(self, stage, size)

    def joins(self):
        """Return {stage: the layer in which it joins a map of fine detail with one from below}: where *where* meets *what*."""
        return {}


def padded_size(size, multiple, least=1):
    """Return `size` (H, W) rounded up to the next multiple, and to no less than `least`."""
    return tuple(-(-max(length, least) // multiple) * multiple for length in size)


def padded(x, size):
    """Return x (N, H, W, C) with zeros at the bottom and right up to this size; x itself if there is nothing to add."""
    N, H, W, C = x.shape
    if (H, W) == size:
        return x
    larger = get_array_module(x).zeros((N, *size, C), x.dtype)
    larger[:, :H, :W] = x
    return larger
