"""One suite for every backend: a test that takes `xp` runs on NumPy, on a strict stand-in for CuPy, and on CuPy where a GPU works.

The stand-in computes on the host, and refuses what CuPy refuses: an operation between a host array and a device array. It also
refuses what CuPy does silently and slowly: turning a device array into a Python number or truth value, a hidden round trip.
"""

import operator
import types

import numpy
import pytest

from nervenet import backend


class DeviceArray:
    """A NumPy array in disguise that only meets its own kind and numbers."""

    __array_ufunc__ = None              # numpy_array + device_array asks device_array, which refuses

    def __init__(self, host):
        self.host = host

    def __array__(self, *args, **kwargs):
        raise TypeError('implicit conversion of a device array to a host array')

    def hidden_round_trip(self, *args):
        raise TypeError('a device array was turned into a Python number or truth value')

    __bool__ = __float__ = __int__ = __index__ = __complex__ = item = tolist = hidden_round_trip

    def __iter__(self):
        return (DeviceArray(row) for row in self.host)

    def __len__(self):
        return len(self.host)

    def __getattr__(self, name):
        if name.startswith('__'):                   # __array_interface__ and its kin are back doors to the host
            raise AttributeError(name)
        return on_device(getattr(self.host, name))

    def __getitem__(self, index):
        return on_device(self.host[on_host(index)])

    def __setitem__(self, index, value):
        self.host[on_host(index)] = on_host(value)


def _add_operators():
    def method(function, reflected=False, in_place=False):
        def apply(self, other=None):
            if other is None:
                return DeviceArray(function(self.host))
            pair = (on_host(other), self.host) if reflected else (self.host, on_host(other))
            result = function(*pair)
            return self if in_place else on_device(result)
        return apply

    for name in ('add', 'sub', 'mul', 'truediv', 'floordiv', 'mod', 'pow', 'matmul', 'and', 'or', 'xor'):
        function = getattr(operator, name + '_' if name in ('and', 'or') else name)
        setattr(DeviceArray, f'__{name}__', method(function))
        setattr(DeviceArray, f'__r{name}__', method(function, reflected=True))
        setattr(DeviceArray, f'__i{name}__', method(getattr(operator, 'i' + name), in_place=True))
    for name in ('lt', 'le', 'gt', 'ge', 'eq', 'ne', 'neg', 'invert', 'abs'):
        setattr(DeviceArray, f'__{name}__', method(getattr(operator, name)))


_add_operators()


def on_host(value):
    """Unwrap device arrays, inside tuples and lists too; refuse host arrays."""
    if isinstance(value, DeviceArray):
        return value.host
    if isinstance(value, numpy.ndarray):
        raise TypeError('a host array was mixed with device arrays')
    if isinstance(value, (tuple, list)):
        return type(value)(map(on_host, value))
    return value


def on_device(value):
    """Wrap arrays and array scalars, and functions so that they unwrap and wrap."""
    if isinstance(value, (numpy.ndarray, numpy.generic)):
        return DeviceArray(numpy.asarray(value))
    if isinstance(value, (tuple, list)):
        return type(value)(map(on_device, value))
    if callable(value) and not isinstance(value, type):
        def function(*args, **kwargs):
            return on_device(value(*map(on_host, args), **{name: on_host(arg) for name, arg in kwargs.items()}))
        return function
    return value


class DeviceGenerator:
    """The methods of `numpy.random.Generator`, drawing device arrays."""

    def __init__(self, seed):
        self.generator = numpy.random.default_rng(seed)

    def __getattr__(self, name):
        return on_device(getattr(self.generator, name))


class StandIn(types.ModuleType):
    """The part of the `cupy` module that explicit code may use: NumPy's functions, on device arrays only."""

    ndarray = DeviceArray
    random = types.SimpleNamespace(default_rng=DeviceGenerator)
    cuda = types.SimpleNamespace(runtime=types.SimpleNamespace(getDeviceCount=lambda: 1))

    @staticmethod
    def asnumpy(array):
        return array.host.copy()

    @staticmethod
    def asarray(array, dtype=None):
        return DeviceArray(numpy.array(array.host if isinstance(array, DeviceArray) else array, dtype))

    array = asarray

    def __getattr__(self, name):
        return on_device(getattr(numpy, name))


stand_in = StandIn('stand_in')


@pytest.fixture(params=['numpy', 'stand-in', 'cupy'])
def xp(request, monkeypatch):
    """The array module under test; `backend` takes the stand-in for CuPy while it is the one."""
    if request.param == 'numpy':
        return numpy
    if request.param == 'stand-in':
        monkeypatch.setattr(backend, 'cupy', stand_in)
        return stand_in
    problem = backend.probe_gpu()
    if problem:
        pytest.skip(problem)
    return backend.cupy


@pytest.fixture
def rng():
    return numpy.random.default_rng(20150518)
