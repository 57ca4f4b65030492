"""What may be given: the checks that more than one file makes, each an error that says what was found and what was expected."""

import math

import numpy

from .engine.backend import get_array_module
from .engine.communicator import whole_batch


def positive(value, name, least=1):
    """Return `value` as an int. Raises ValueError unless it is a whole number of at least `least`."""
    if not numpy.isreal(value) or not least <= value < math.inf or int(value) != value:
        raise ValueError(f'{name} is {value}, expected a whole number of at least {least}')
    return int(value)


def pair(value, name, least=1):
    """Return `value` as (vertical, horizontal): a number stands for both."""
    values = (value, value) if numpy.isscalar(value) else tuple(value)
    if len(values) != 2:
        raise ValueError(f'{name} is {value}, expected a number or a pair (vertical, horizontal)')
    return positive(values[0], name, least), positive(values[1], name, least)


def in_range(name, value, end):
    """Return the number as a Python float. Raises ValueError unless 0 ≤ value < end.

    A number of NumPy's, as a search over a grid gives it, would turn float32 arrays into float64 where it meets them.
    """
    if not 0 <= value < end:
        raise ValueError(f'{name} is {value}; expected a number from 0 up to, not including, {end}')
    return float(value)


def finite(values, name, axes):
    """Return a matrix as an array of floats, float64 unless it holds some. Raises ValueError unless all numbers in it are finite.

    `axes` is what it should be, such as '(H, W)'.
    """
    values = numpy.asarray(values)
    if values.ndim != 2 or values.size == 0 or values.dtype.kind not in 'biuf' or not numpy.isfinite(values).all():
        raise ValueError(f'{name} has shape {values.shape} and dtype {values.dtype}; expected {axes}, each a finite number')
    return values if values.dtype.kind == 'f' else values.astype(numpy.float64)


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


def checked_target(logits, target):
    """Return (y, doubt): the target in the dtype of the logits, and a number to add to the loss, 0, or NaN on a GPU for a bad target.

    Raises ValueError unless logits are floating-point and target numbers, of one shape (N, H, W, C) with at least one pixel in the whole
    batch (broadcasting would compare the wrong pixels in silence), and, on the CPU, unless the target lies in [0, 1]. Both may be complex,
    for the complex step.
    """
    if logits.shape != target.shape or logits.ndim != 4 or not math.prod(whole_batch(logits)[0]):
        raise ValueError(f'logits {logits.shape} and target {target.shape} differ in shape, or are no images; both must be '
                         '(N, H, W, C) with at least one pixel')
    if logits.dtype.kind not in 'fc' or target.dtype.kind not in 'buifc':
        raise ValueError(f'logits are {logits.dtype} and target is {target.dtype}; expected floating-point logits, and a target of '
                         'numbers')
    y, doubt = target.astype(logits.dtype, copy=False), 0.0
    if target.dtype.kind != 'b' and target.size:
        xp, low, high = get_array_module(target), target.real.min(), target.real.max()
        if xp is not numpy:
            doubt = xp.where((low >= 0) & (high <= 1), 0.0, math.nan)
        elif not (low >= 0 and high <= 1):                               # also for NaN
            raise ValueError(f'the target holds values from {low} to {high}; expected 0 for background to 1 for foreground: '
                             'divide a mask of 0 and 255 by 255')
    return y, doubt
