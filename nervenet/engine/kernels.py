"""The kernels of `kernels.cu`: off until somebody switches them on.

    with nervenet.kernels.use_kernels():            # float32 arrays on a GPU only; everything else is computed as always
        train_step(…)

They do in one operation what CuPy does in three to some twenty-seven, which matters where starting an operation takes longer than
the operation. They compile, and a C++ compiler's version of them gives the right numbers; but as long as they have not been measured
on a GPU, plain CuPy operations are the default.
"""

import contextlib
import contextvars
from functools import lru_cache
from pathlib import Path

import numpy

from . import backend
from .memory import empty
from .paths import only_plain

SOURCE = Path(__file__).with_name('kernels.cu')
THREADS = 256                           # of a block: a whole number of the groups of 32 in which a GPU runs threads

_on = contextvars.ContextVar('kernels of our own', default=False)


@contextlib.contextmanager
def use_kernels():
    """Within this context the kernels compute whatever they can."""
    token = _on.set(True)
    try:
        yield
    finally:
        _on.reset(token)


def can_compute(*arrays):
    """Say whether the kernels are on, within reach, and these arrays are for them: float32, on a GPU, not empty."""
    return _on.get() and not only_plain() and backend.get_array_module(*arrays) is not numpy and all(
        array.dtype == numpy.float32 and array.size for array in arrays)


def normalize_relu(x, slope, shift):
    """Return max(x·slope + shift, 0) for x (N, H, W, C), slope and shift (C,)."""
    y = empty(x.shape, like=x)
    _launch('normalize_relu', y.size, x, slope, shift, y, numpy.int32(x.shape[3]))
    return y


def max_pool(x, k):
    """Return (y, argmax), (N, H // k, W // k, C) each, of x (N, H, W, C): the largest of each k×k window, and which pixel it was."""
    N, H, W, C = x.shape
    shape = N, H // k, W // k, C
    y, argmax = empty(shape, like=x), backend.get_array_module(x).empty(shape, numpy.uint8)
    _launch('max_pool', y.size, x, y, argmax, *map(numpy.int32, (H, W, C, k)))
    return y, argmax


def max_pool_backward(dy, argmax, k, shape):
    """Return dx of the given shape (N, H, W, C) from dy and argmax (N, H // k, W // k, C)."""
    dx = empty(shape, like=dy)
    _launch('max_pool_backward', dx.size, dy, argmax, dx, *map(numpy.int32, (*shape[1:], k)))
    return dx


def adam(w, g, m, v, betas, eta, epsilon):
    """Move w, m and v in place by one step of Adam; g is the gradient. All have one shape.

    Raises ValueError unless w, m and v are contiguous.
    """
    if not all(array.flags.c_contiguous for array in (w, m, v)):
        raise ValueError('w, m and v are not all contiguous: copies of them would be moved')
    beta1, beta2 = betas
    _launch('adam', w.size, w, g, m, v, *map(numpy.float32, (beta1, beta2, 1 - beta1, 1 - beta2, eta, epsilon)))


def _launch(name, size, *arguments):
    """Run a kernel in one thread for each of `size` values of its result.

    A kernel is given addresses: it knows nothing of strides. So what it reads is made contiguous; what it writes has to be.
    """
    xp = backend.get_array_module(*arguments)
    arguments = [xp.ascontiguousarray(value) if backend.get_array_module(value) is xp else value for value in arguments]
    _kernel(name)((-(-size // THREADS),), (THREADS,), (*arguments, numpy.int64(size)))


@lru_cache
def _module(cupy):
    return cupy.RawModule(code=SOURCE.read_text(), options=('-std=c++17',))


def _kernel(name):
    return _module(backend.cupy).get_function(name)
