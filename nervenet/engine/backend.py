"""Which array module an array belongs to, and how arrays move between host and device.

Nearly every function of this library is written once, against `xp`, the module its input belongs to:

    xp = get_array_module(x)        # numpy on the CPU, cupy on the GPU
    y = xp.maximum(x, 0)

There is no global switch: the array decides. This is the only file that imports CuPy.
"""

import gc
import time

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

    Raises RuntimeError if 'gpu' is asked for and CuPy is not installed, ValueError for another device.
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


def copied_ahead(batches, device):
    """Yield the batches on `device`, each copied there while the caller works on the one before.

    A batch is a tuple; its NumPy arrays arrive as arrays of `device`, anything else as it is. On the CPU nothing is copied.

    A GPU works through a list of orders, a *stream*, while the host goes on writing orders. Copies get a stream of their own, so
    that they run beside the computation, and three rules keep the two apart. Each rests on an event, a mark in a stream that
    something else can wait for:

    - A copy that runs beside the host must read memory that the system cannot move, *pinned* memory. There are two sets of it, in
      turn; before the host writes into one again, it waits for the copy of two batches ago. So it never runs further ahead.
    - The computation waits for the copy of its batch before it touches it.
    - The copy waits for the computation ordered so far, because the memory it fills may have been handed out before, and an
      order that is still to come may read from it what was there.
    """
    if device == 'cpu':
        yield from batches
        return
    copies, waiting = cupy.cuda.Stream(non_blocking=True), None
    slots = [{'memory': {}, 'copied': None}, {'memory': {}, 'copied': None}]

    def start(batch, slot):
        """Order the copies of a batch; return it as it will be."""
        if slot['copied'] is not None:
            slot['copied'].synchronize()
        arrays = [cupy.empty(value.shape, value.dtype) if isinstance(value, numpy.ndarray) else None for value in batch]
        copies.wait_event(cupy.cuda.get_current_stream().record())
        for place, (value, array) in enumerate(zip(batch, arrays)):
            if array is not None:
                pinned = pinned_array(slot['memory'], place, value)
                pinned[...] = value
                array.set(pinned, stream=copies)
        slot['copied'] = copies.record()
        return tuple(value if array is None else array for value, array in zip(batch, arrays)), slot['copied']

    def arrived(batch, copied):
        cupy.cuda.get_current_stream().wait_event(copied)
        return batch

    try:
        for number, batch in enumerate(batches):
            ordered = start(batch, slots[number % 2])
            if waiting is not None:
                yield arrived(*waiting)
            waiting = ordered
        if waiting is not None:
            yield arrived(*waiting)
    finally:
        copies.synchronize()                                # pinned memory is given back with this generator


def pinned_array(memory, place, like):
    """Return an array of the shape and dtype of `like` on pinned memory, from the dict `memory` if it holds enough at `place`."""
    if place not in memory or memory[place].nbytes < like.nbytes:
        size = max(like.nbytes, 1)                          # a batch may be empty, memory may not
        memory[place] = numpy.frombuffer(cupy.cuda.alloc_pinned_memory(size), numpy.uint8, size)
    return memory[place][:like.nbytes].view(like.dtype).reshape(like.shape)


def generator_like(array, rng):
    """Return a random generator that draws where `array` lives.

    On the CPU that is `rng` itself, a `numpy.random.Generator`. On the GPU it is a device generator seeded from one draw
    of `rng`, so that the noise of a step is made on the device and still follows from the one seed of the run. It counts
    (Philox, Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), so it costs little to seed.
    """
    xp = get_array_module(array)
    return rng if xp is numpy else xp.random.Generator(xp.random.Philox4x3210(int(rng.integers(2**63))))


def mark(device):
    """Return a mark of this moment in the work of `device`, for `seconds_between`.

    On the CPU that is the time. A GPU lags behind the host, which orders work and goes on; so there it is an event, which the GPU
    stamps with the time when all that was ordered before it is done.
    """
    return time.perf_counter() if device == 'cpu' else cupy.cuda.get_current_stream().record(cupy.cuda.Event())


def seconds_between(start, end):
    """Return the seconds from one `mark` to a later one of the same device; wait until a GPU has come to it."""
    if isinstance(end, float):
        return end - start
    end.synchronize()
    return cupy.cuda.get_elapsed_time(start, end) / 1000                # CuPy gives milliseconds


def peak_memory(work):
    """Return how many bytes of GPU memory CuPy's arrays take at most, all together, while work() runs.

    The pool that CuPy takes its memory from keeps no such record. So it is asked each time that it has handed out memory.
    """
    pool = cupy.get_default_memory_pool()

    class Watch(cupy.cuda.MemoryHook):
        name, most = 'peak_memory', pool.used_bytes()

        def malloc_postprocess(self, **what):
            self.most = max(self.most, pool.used_bytes())

    with Watch() as watch:
        work()
    return watch.most


def free_memory():
    """Give the memory that CuPy's arrays no longer use back to the GPU, for other libraries; CuPy itself would use it again."""
    gc.collect()                                            # what a layer keeps can refer to the layer, and then lingers
    cupy.get_default_memory_pool().free_all_blocks()


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


def use_gpu(number):
    """Let this process compute on the GPU of this number, counted round and round; return what tells that GPU from the others here."""
    device = cupy.cuda.Device(number % cupy.cuda.runtime.getDeviceCount())
    device.use()
    return device.pci_bus_id


def has_nccl():
    """Say whether CuPy can send arrays from one GPU to another."""
    return bool(getattr(getattr(cupy.cuda, 'nccl', None), 'available', False))


def communicator_of_gpus(size, rank):
    """Return NCCL's communicator of `size` processes, each with a GPU of its own, of which this is number `rank`; MPI introduces them."""
    from cupyx.distributed import init_process_group
    return init_process_group(size, rank, backend='nccl', use_mpi=True)


def select_device(request='auto', precision=None):
    """Turn 'auto', 'gpu' or 'cpu' into `(device, precision, reason)`.

    `device` is 'cpu' or 'gpu'; `precision` is what `set_precision` makes of the one asked for; `reason` is one line for the
    terminal. 'auto' falls back to the CPU and says why. Raises RuntimeError if 'gpu' is asked for and does not work, saying why and
    what to install, and for a precision that the device does not have.
    """
    if request not in ('auto', 'gpu', 'cpu'):
        raise ValueError(f"device is {request!r}; expected 'auto', 'gpu' or 'cpu'")
    problem = None if request == 'cpu' else probe_gpu()
    if problem and request == 'gpu':
        raise RuntimeError(f"--device gpu: {problem}. Install the extra that fits your driver, "
                           "pip install 'nervenet[cuda12]' or 'nervenet[cuda13]', or use --device cpu")
    device = 'cpu' if problem or request == 'cpu' else 'gpu'
    precision = set_precision(device, precision)
    if device == 'cpu':
        return 'cpu', precision, 'device: cpu' + (f', because {problem}' if problem else '')
    name = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)['name'].decode()
    return 'gpu', precision, f'device: gpu ({name}, {precision})'


def set_precision(device, precision=None):
    """Choose how products of float32 matrices are computed, and return it: 'fp32' or 'tf32'.

    The tensor cores of a GPU read float32 numbers as TF32: with 10 of the 23 bits behind the point, so that a factor is off by up
    to 2⁻¹¹, 5·10⁻⁴ of itself. They add up in float32. Training is used to worse noise than that, and tensor cores are made for it;
    so None takes it where the chip has it (compute capability 8.0 and up), on the GPU. On the CPU there is 'fp32' alone. float64
    is not affected. Raises RuntimeError for 'tf32' where there is none.
    """
    if precision not in (None, 'fp32', 'tf32'):
        raise ValueError(f"precision is {precision!r}; expected 'fp32' or 'tf32'")
    capability = cupy.cuda.Device().compute_capability if device == 'gpu' else None
    has_tf32 = capability is not None and int(capability) >= 80             # CuPy writes 8.0 as '80'
    if precision == 'tf32' and not has_tf32:
        where = 'the CPU has no tensor cores' if capability is None else f'this GPU has compute capability {int(capability) / 10}'
        raise RuntimeError(f'--precision tf32: {where}; expected a GPU of 8.0 or higher. Leave it out, or use --precision fp32')
    precision = precision or ('tf32' if has_tf32 else 'fp32')
    if device == 'gpu':
        kinds = cupy._core._routines_linalg                 # CuPy has no public way but an environment variable, read too early
        cupy._core.set_compute_type(numpy.float32, kinds.COMPUTE_TYPE_TF32 if precision == 'tf32' else kinds.COMPUTE_TYPE_DEFAULT)
    return precision
