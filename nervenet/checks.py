"""What may be given: the checks that more than one file makes, each an error that says what was found and what was expected."""

import numpy


def positive(value, name, least=1):
    """Return `value` as an int. Raises ValueError unless it is a whole number of at least `least`."""
    if not numpy.isreal(value) or value != value or value < least or int(value) != value:
        raise ValueError(f'{name} is {value}, expected a whole number of at least {least}')
    return int(value)


def pair(value, name, least=1):
    """Return `value` as (vertical, horizontal): a number stands for both."""
    values = (value, value) if numpy.isscalar(value) else tuple(value)
    if len(values) != 2:
        raise ValueError(f'{name} is {value}, expected a number or a pair (vertical, horizontal)')
    return positive(values[0], name, least), positive(values[1], name, least)


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
