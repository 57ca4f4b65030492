"""Numbers too small to matter, and too slow to keep.

Below 1.2e-38 a float32 has no leading one left: it is subnormal, has fewer and fewer digits, and processors compute with it in slow motion,
up to a hundred times as long. Gradients get there. Once a network is sure of a pixel, σ(x)·σ(−x) is next to nothing, and a
network that has collapsed to an empty mask is sure of all of them. Nothing is learned from such numbers: Adam's ε alone is 1e-8. So within

    with no_subnormals():
        ...

the processor takes them for 0, and writes 0 where one would come out. That is a switch of the processor, which each thread has for itself
(on x86 the bits FTZ and DAZ of the register MXCSR); C's <fenv.h> reads and writes it with the rest of the environment of floating-point
arithmetic. Helpers of `parallel` take over that of who calls them; any other thread that is started within the context inherits it for good, as
the system has it. Elsewhere than on Linux with an x86 processor, nothing is changed.
"""

import contextlib
import ctypes
import platform
import sys

FLUSH_TO_ZERO, DENORMALS_ARE_ZERO = 0x8000, 0x0040
SIZE, MXCSR = 32, 28                    # bytes of C's fenv_t for x86-64, and where that register begins

# PyDLL keeps Python's lock during a call; CDLL would let go of it, and who asks for it back may have to wait.
_library = ctypes.PyDLL(None) if sys.platform == 'linux' and platform.machine() == 'x86_64' else None
if not hasattr(_library, 'fesetenv'):
    _library = None


@contextlib.contextmanager
def no_subnormals():
    """Within this context, in this thread and in the blocks that it hands to others, subnormal numbers are 0."""
    before = environment()
    if before is not None:
        register = int.from_bytes(before[MXCSR:], sys.byteorder) | FLUSH_TO_ZERO | DENORMALS_ARE_ZERO
        take_over(before[:MXCSR] + register.to_bytes(SIZE - MXCSR, sys.byteorder))
    try:
        yield
    finally:
        take_over(before)


def environment():
    """Return this thread's environment of floating-point arithmetic, bytes; None where that is not known."""
    if _library is None:
        return None
    bytes_of_it = ctypes.create_string_buffer(SIZE)
    _library.fegetenv(bytes_of_it)
    return bytes_of_it.raw


def take_over(environment):
    """Make this environment, of another thread or of before, that of this thread; None changes nothing."""
    if environment is not None:
        _library.fesetenv(environment)
