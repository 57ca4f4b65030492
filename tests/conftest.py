"""One suite for every backend: a test that takes `xp` runs on NumPy, on a strict stand-in for CuPy, and on CuPy where a GPU works.

The stand-in computes on the host, and refuses what CuPy refuses: an operation between a host array and a device array, and, where
CuPy is installed (it need not work), a function, method or keyword that CuPy does not have. It also refuses what CuPy does silently
and slowly: turning a device array into a Python number or truth value, a hidden round trip. It fills fresh memory with NaN, so that
a value nobody wrote shows; a copy on a stream of its own happens as late as the events allow; products may run in emulated TF32;
and a ledger counts what was copied in, copied out and multiplied.
"""

import inspect
import operator
import re
import signal
import types

import numpy
import pytest

pytest.register_assert_rewrite('helpers')

from helpers import example, write_pairs
from nervenet.engine import backend
from nervenet.images.data import Loader, Reader
from nervenet.images.samples import find_samples

real_cupy = backend.cupy


class Ledger:
    """What the stand-in was asked for: shapes of arrays copied in and out, and of the factors of each product their layout."""

    def __init__(self):
        self.copies_in, self.copies_out, self.products = [], [], []


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
        value = on_device(getattr(self.host, name))
        if real_cupy is None:
            return value
        real = getattr(real_cupy.ndarray, name)     # AttributeError if CuPy's arrays have none
        if not callable(value):
            return value
        known = re.findall(r'\w+', real.__doc__.splitlines()[0])       # "….sum(self, axis=None, …)": a compiled method only says it there

        def method(*args, **kwargs):
            assert kwargs.keys() <= set(known), f'CuPy: {name} does not take {kwargs.keys()}'
            return value(*args, **kwargs)
        return method

    def __getitem__(self, index):
        return on_device(self.host[on_host(index)])

    def __setitem__(self, index, value):
        self.host[on_host(index)] = on_host(value)

    def set(self, host, stream=None):
        """Copy the host array in: at once, or on a stream, as late as possible."""
        assert host.shape == self.shape and host.dtype == self.dtype
        stand_in.ledger.copies_in.append(host.shape)
        (stream or Stream()).enqueue(lambda: numpy.copyto(self.host, host), late=stream is not None)


def product(a, b, **options):
    """Return a @ b of host arrays, in emulated TF32 if that is on, where CuPy would: for two float32 matrices."""
    stand_in.ledger.products.append([(array.ndim, array.flags.c_contiguous or array.T.flags.c_contiguous) for array in (a, b)])
    if stand_in.compute_type == stand_in.TF32 and a.ndim == b.ndim == 2 and a.dtype == b.dtype == numpy.float32:
        a, b = in_tf32(a), in_tf32(b)
    return numpy.matmul(a, b, **options)


def in_tf32(x):
    """Return x float32 rounded to the 10 bits behind the point that a tensor core reads: half of the last one is added, then cut."""
    return ((x.view(numpy.uint32) + numpy.uint32(0x1000)) & numpy.uint32(0xffffe000)).view(numpy.float32)


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
        function = product if name == 'matmul' else getattr(operator, name + '_' if name in ('and', 'or') else name)
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


class Philox4x3210:
    def __init__(self, seed):
        assert type(seed) is int
        self.seed = seed


class DeviceGenerator:
    """The methods of `numpy.random.Generator`, drawing device arrays."""

    def __init__(self, bit_generator):
        self.generator = numpy.random.Generator(numpy.random.Philox(bit_generator.seed))

    def __getattr__(self, name):
        if real_cupy is not None and not hasattr(real_cupy.random.Generator, name):
            raise AttributeError(f'generators of CuPy have no {name}')
        return on_device(getattr(self.generator, name))


class Event:
    """A point in the work of a stream; waiting for it is what gets late work done."""

    def __init__(self, work=(), **options):
        self.work = list(work)

    def record(self, stream=None):
        self.work = list(stream.work if stream else [])

    def finish(self):
        for job in self.work:
            job()
        self.work = []

    def synchronize(self):                          # the host waits
        self.finish()


class Stream:
    """Work in order. What is enqueued as late waits until somebody waits for an event after it."""

    def __init__(self, null=False, non_blocking=False):
        self.work = []

    def enqueue(self, job, late):
        done = []

        def once():
            if not done:
                done.append(True)
                job()
        if not late:
            once()
        self.work.append(once)

    def record(self, event=None):
        event = event or Event()
        event.record(self)
        return event

    def wait_event(self, event):
        event.finish()

    def synchronize(self):
        self.record().finish()


class StandIn(types.ModuleType):
    """The part of the `cupy` module that explicit code may use: NumPy's functions, on device arrays only."""

    ndarray = DeviceArray
    random = types.SimpleNamespace(Generator=DeviceGenerator, Philox4x3210=Philox4x3210)
    TF32 = 7

    def __init__(self, name, capability='90'):
        super().__init__(name)
        self.ledger, self.compute_type, self.stream, self.capability = Ledger(), 1, Stream(), capability
        self._core = types.SimpleNamespace(
            set_compute_type=self.set_compute_type, get_compute_type=lambda dtype: self.compute_type,
            _routines_linalg=types.SimpleNamespace(COMPUTE_TYPE_TF32=self.TF32, COMPUTE_TYPE_DEFAULT=1))
        self.cuda = types.SimpleNamespace(
            runtime=types.SimpleNamespace(getDeviceCount=lambda: 1, getDeviceProperties=lambda device: {'name': b'stand-in'}),
            Device=lambda number=0: types.SimpleNamespace(compute_capability=self.capability, id=number, pci_bus_id=f'0000:{number:02}',
                                                          use=lambda: None), Stream=Stream, Event=Event,
            get_current_stream=lambda: self.stream, get_elapsed_time=lambda start, end: 1.5,
            alloc_pinned_memory=lambda size: memoryview(bytearray(size)))

    def set_compute_type(self, dtype, compute_type):
        assert numpy.dtype(dtype) == numpy.float32
        self.compute_type = compute_type

    def asnumpy(self, array):
        self.ledger.copies_out.append(array.shape)
        return array.host.copy()

    def asarray(self, array, dtype=None):
        if not isinstance(array, DeviceArray):
            self.ledger.copies_in.append(numpy.shape(array))
        return DeviceArray(numpy.array(array.host if isinstance(array, DeviceArray) else array, dtype))

    array = asarray

    @staticmethod
    def empty(shape, dtype='float64'):
        """Return fresh memory, which holds anything."""
        array = numpy.empty(shape, dtype)
        array.fill(numpy.nan if array.dtype.kind in 'fc' else 1)
        return DeviceArray(array)

    @staticmethod
    def empty_like(array):
        return StandIn.empty(array.shape, array.dtype)

    matmul = staticmethod(on_device(product))

    def __getattr__(self, name):
        if name.startswith('__'):
            raise AttributeError(name)
        function = on_device(getattr(numpy, name))
        return function if real_cupy is None else as_cupy_takes_it(name, function)


def as_cupy_takes_it(name, function):
    """Return the function, made to refuse arguments that CuPy's function of this name would."""
    real = getattr(real_cupy, name)                 # AttributeError if CuPy has none
    if not callable(function) or isinstance(real, type):
        return function
    if isinstance(real, real_cupy.ufunc):
        def check(*args, **kwargs):
            assert kwargs.keys() <= {'out', 'dtype', 'casting'}, f'CuPy: {name} does not take {kwargs.keys()}'
    else:
        try:
            check = inspect.signature(real).bind
        except ValueError:                          # a compiled function that does not tell
            return function

    def checked(*args, **kwargs):
        check(*args, **kwargs)
        return function(*args, **kwargs)
    return checked


stand_in = StandIn('stand_in')


@pytest.fixture
def gpu(monkeypatch):
    """The stand-in, as if it were the CuPy of a machine with a GPU, with a fresh ledger."""
    monkeypatch.setattr(backend, 'cupy', stand_in)
    monkeypatch.setattr(stand_in, 'ledger', Ledger())
    monkeypatch.setattr(stand_in, 'compute_type', 1)
    return stand_in


class Pool:
    """CuPy's memory pool, as far as it is asked: bytes in use, giving back what is not, and the watchers, which hear of each taking."""

    def __init__(self):
        self.used, self.frees, self.hooks = 0, 0, {}

    def used_bytes(self):
        return self.used

    def free_all_blocks(self):
        self.frees += 1

    def take(self, size):
        """Take memory, or, if `size` is negative, let go of it."""
        self.used += size
        hooks = self.hooks if real_cupy is None else real_cupy.cuda.memory_hook.get_memory_hooks()
        for hook in list(hooks.values()) if size > 0 else []:
            hook.malloc_postprocess(device_id=0, size=size, mem_size=size, mem_ptr=1, pmem_id=1)


@pytest.fixture
def pool(gpu, monkeypatch):
    """The stand-in's memory pool. Where CuPy is installed, its own hooks watch it."""
    pool = Pool()

    class MemoryHook:
        name = 'MemoryHook'

        def __enter__(self):
            pool.hooks[self.name] = self
            return self

        def __exit__(self, *error):
            del pool.hooks[self.name]

    hook = MemoryHook if real_cupy is None else real_cupy.cuda.MemoryHook
    monkeypatch.setattr(gpu, 'get_default_memory_pool', lambda: pool, raising=False)
    monkeypatch.setattr(gpu.cuda, 'MemoryHook', hook, raising=False)
    assert real_cupy is None or all(hasattr(real_cupy.cuda.MemoryPool, name) for name in ('used_bytes', 'free_all_blocks'))
    return pool


@pytest.fixture(params=['numpy', 'stand-in', 'cupy'])
def xp(request):
    """The array module under test."""
    if request.param == 'numpy':
        return numpy
    return request.getfixturevalue('gpu' if request.param == 'stand-in' else 'gpu_that_works')


@pytest.fixture
def gpu_that_works():
    """CuPy, where there is a GPU."""
    problem = backend.probe_gpu()
    if problem:
        pytest.skip(problem)
    before = real_cupy._core.get_compute_type(numpy.float32)
    backend.set_precision('gpu', 'fp32')
    yield real_cupy
    real_cupy._core.set_compute_type(numpy.float32, before)


@pytest.fixture
def rng():
    return numpy.random.default_rng(20150518)


@pytest.fixture
def loaders(tmp_path, rng):
    """(training, validation): two subjects and one, of four small images each."""
    write_pairs(tmp_path / 'data', rng)
    samples, reader = find_samples(tmp_path / 'data'), Reader((16, 24))
    return Loader(samples[:8], reader, 3, seed=1, shuffle=True), Loader(samples[8:], reader, 3)


@pytest.fixture
def main():
    """The main function of examples/train_unet.py, called here and now."""
    module = example('train_unet')

    def call(*arguments):
        module.main(list(map(str, arguments)))
    call.module = module
    return call


@pytest.fixture
def usual_interrupt():
    """Ctrl-C raises KeyboardInterrupt, also where this process was started in the background and told to ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
