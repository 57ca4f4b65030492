"""Which array module an array belongs to, and how arrays move between host and device.

Every function of this library is written once, against `xp`, the module its input belongs to:

    xp = get_array_module(x)        # numpy on the CPU, cupy on the GPU
    y = xp.maximum(x, 0)

There is no global switch: the array decides. This is the only file that imports CuPy.
"""

import numpy

try:
    import cupy
except Exception as error:          # a broken CUDA installation raises more than ImportError
    cupy = None
    _why_no_cupy = f'CuPy cannot be imported ({type(error).__name__}: {error})'
else:
    _why_no_cupy = None


def get_array_module(*arrays):
    """Return `cupy` if any of `arrays` lives on the GPU, else `numpy`."""
    if cupy is not None and any(isinstance(array, cupy.ndarray) for array in arrays):
        return cupy
    return numpy


def device_of(array):
    """Return 'gpu' or 'cpu': where `array` lives."""
    return 'cpu' if get_array_module(array) is numpy else 'gpu'


def to_cpu(array):
    """Return `array` as a NumPy array; one that already is one comes back itself."""
    return array if get_array_module(array) is numpy else cupy.asnumpy(array)


def move(array, device):
    """Return `array` on `device`, 'cpu' or 'gpu'; one that is already there comes back itself.

    Raises RuntimeError if 'gpu' is asked for and CuPy is not installed.
    """
    if device not in ('cpu', 'gpu'):
        raise ValueError(f"device is {device!r}; expected 'cpu' or 'gpu'")
    if device_of(array) == device:
        return array
    if device == 'cpu':
        return cupy.asnumpy(array)
    if cupy is None:
        raise RuntimeError(_why_no_cupy)
    return cupy.asarray(array)


def generator_like(array, rng):
    """Return a random generator that draws where `array` lives.

    On the CPU that is `rng` itself, a `numpy.random.Generator`. On the GPU it is a device generator seeded from one draw
    of `rng`, so that the noise of a step is made on the device and still follows from the one seed of the run.
    """
    xp = get_array_module(array)
    return rng if xp is numpy else xp.random.default_rng(int(rng.integers(2**63)))


def probe_gpu():
    """Return None if the GPU works, else one line that says why it does not.

    `import cupy` succeeds without a driver and even without cuBLAS; only use fails. So the probe uses the device: it counts
    devices, runs one elementwise kernel and one matrix product, copies the result back and looks at it.
    """
    if cupy is None:
        return _why_no_cupy
    try:
        if cupy.cuda.runtime.getDeviceCount() == 0:
            return 'CuPy finds no CUDA device'
        square = cupy.arange(4, dtype='float32').reshape(2, 2) + 1     # one elementwise kernel: [[1, 2], [3, 4]]
        product = cupy.asnumpy(square @ square)                        # one product, one copy back
    except Exception as error:                                         # driver, compiler and library faults differ in type
        reason = (str(error).splitlines() or ['no message'])[0]
        return f'the GPU does not work ({type(error).__name__}: {reason})'
    if product.tolist() != [[7, 10], [15, 22]]:
        return f'the GPU computes wrongly (a 2×2 product gave {product.tolist()})'
    return None


def select_device(request='auto'):
    """Turn 'auto', 'gpu' or 'cpu' into `(device, reason)`.

    `device` is 'cpu' or 'gpu'; `reason` is one line for the terminal. 'auto' falls back to the CPU and says why.
    Raises RuntimeError if 'gpu' is asked for and does not work, saying why and what to install.
    """
    if request == 'cpu':
        return 'cpu', 'device: cpu'
    if request not in ('auto', 'gpu'):
        raise ValueError(f"device is {request!r}; expected 'auto', 'gpu' or 'cpu'")
    problem = probe_gpu()
    if problem is None:
        return 'gpu', 'device: gpu'
    if request == 'gpu':
        raise RuntimeError(f"--device gpu: {problem}. Install the extra that fits your driver, "
                           "pip install 'nervenet[cuda12]' or 'nervenet[cuda13]', or use --device cpu")
    return 'cpu', f'device: cpu, because {problem}'
