"""Memory that is used again.

A network asks for the same arrays in every step: large, short-lived, of a few sizes. Memory fresh from the system comes
as pages that it clears one by one when they are first touched, which takes as long as a pass over the array; and a heap
from which large arrays of many sizes come and go gets holes. So what an array leaves behind is kept for the next
one of about its size. (On a GPU, CuPy does the same by itself.)

An array made by `empty` is an ordinary NumPy array on a piece of memory that knows when the last array on it, or view of
one, is gone: it then lies ready. If none of a fitting size lies ready, memory comes from the system, and if all pieces
together would then be much more than were ever in use at once, the ones that have been waiting longest are given back.
So a process holds little more than its arrays needed at their peak, however many sizes it meets. Within a step that is like the one
before, no guess is needed: `plan.py` knows what will be asked for next, and this pool serves what falls outside of plans.

The memory is private: a forked child gets a copy of it, made page by page as either side writes. Shared memory, which is
what `mmap` gives unless told otherwise, would let parent and child write into each other's arrays.
"""

import contextlib
import math
import mmap
import threading
from collections import deque

import numpy

from .backend import get_array_module

WASTE = 1.5                                     # a piece serves an array if it is at most so many times as large
SLACK = 1.125                                   # all pieces are at most so many times what was in use at once
LEAST_BYTES = 2**18                             # smaller arrays come from the heap, which keeps such memory itself; of a planned step, all have a place


def empty(shape, like):
    """Return an uninitialised array of this shape, with the dtype and on the device of the array `like`."""
    xp, dtype = get_array_module(like), like.dtype
    size, step = math.prod(shape) * dtype.itemsize, this_thread.step
    if xp is not numpy or not size or step is None and size < LEAST_BYTES:
        return xp.empty(shape, dtype)
    return numpy.asarray((step.take if step else lease)(size))[:size].view(dtype).reshape(shape)


def placed(x):
    """Return x; in a planned step, an array of the host as a copy in the memory of the step, where the next step will have it too."""
    if this_thread.step is None or type(x) is not numpy.ndarray:
        return x
    y = empty(x.shape, x)
    y[...] = x
    return y


def scratch(name, shape, dtype):
    """Return an uninitialised array that belongs to this thread, or to its lane (`calls.py`), and is handed out again for the same `name`.

    A block of work that ran before has left this memory warm, often in the cache. The contents last until the same name is asked for
    again. A thread's is freed when it ends, that of its lanes too.
    """
    size = math.prod(shape) * numpy.dtype(dtype).itemsize
    memory = this_thread.scratch.get(name)
    if memory is None or memory.nbytes < size:
        memory = numpy.empty(size + 64, numpy.uint8)
        memory = this_thread.scratch[name] = memory[-memory.ctypes.data % 64:][:size]               # aligned to a cache line
    return memory[:size].view(dtype).reshape(shape)


class _OfThread(threading.local):
    """What belongs to one thread: its scratch memory by name, that of the lanes of its `calls`, and the step that it is in, if any."""

    def __init__(self):
        self.scratch, self.lanes, self.step = {}, [], None


this_thread = _OfThread()


def scratch_of_lanes(number):
    """Return the scratch memory of so many lanes of work, dicts by name: this thread's and others that it owns, whichever thread uses them."""
    this_thread.lanes += [{} for _ in range(number - 1 - len(this_thread.lanes))]
    return [this_thread.scratch, *this_thread.lanes[:number - 1]]


@contextlib.contextmanager
def other_scratch(memory):
    """Within this context, this thread's scratch memory is this dict."""
    own, this_thread.scratch = this_thread.scratch, memory
    try:
        yield
    finally:
        this_thread.scratch = own


# Where processes fork, a mapping can be shared with the children or private. (Windows has neither forks nor these flags.)
_PRIVATE = {'flags': mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, 'MAP_PRIVATE') else {}


def pages(size):
    """Return `size` bytes in pages of their own: freed, they go back to the system at once. Raises MemoryError."""
    try:
        pages = mmap.mmap(-1, size, **_PRIVATE)
    except (OSError, OverflowError) as error:           # what NumPy would raise is what callers know how to explain
        raise MemoryError(f'Unable to allocate {size / 2**20:.0f} MiB') from error
    if hasattr(mmap, 'MADV_HUGEPAGE'):
        pages.madvise(mmap.MADV_HUGEPAGE)       # Linux: clear 2 MiB at a time, not 4 KiB, which takes a third of the time
    return numpy.frombuffer(pages, numpy.uint8)


class Lease:
    """What the arrays on a piece of memory hold on to; when the last one lets go, whoever wanted to know is told.

    That can be at any moment, even while this thread holds a lock: so what is told only queues up.
    """

    def __init__(self, memory):
        self.__array_interface__, self.memory = memory.__array_interface__, memory
        self.told = []

    def tell(self, queue, what):
        """Append `what` to `queue` in the end."""
        self.told.append((queue, what))

    def __del__(self):
        for queue, what in self.told:
            queue.append(what)


class _Pool:
    """Pieces of memory that wait for their next array."""

    def __init__(self):
        self.lock = threading.Lock()
        self.returned = deque()                 # pieces whose leases have ended
        self.waiting = []                       # pieces, the longest-waiting first
        self.total = self.used = self.peak = 0  # bytes of all pieces; of those in use; the most ever in use

    def take(self, size, slack=SLACK):
        """Return a piece of `size` bytes, its contents arbitrary; `slack` is as SLACK."""
        with self.lock:
            self.sort_in()
            # The smallest that is large enough; of equals the one used last, which is the most likely to be in the cache still.
            fitting = [place for place, piece in enumerate(self.waiting) if size <= piece.nbytes <= WASTE * size]
            if fitting:
                memory = self.waiting.pop(min(fitting, key=lambda place: (self.waiting[place].nbytes, -place)))
            else:
                memory = pages(size)                   # a promise: the system gives memory where it is first touched
                self.total += size
            self.used += memory.nbytes
            self.peak = max(self.peak, self.used)
            while self.waiting and self.total > slack * self.peak:
                self.total -= self.waiting.pop(0).nbytes
        return memory

    def sort_in(self):
        """Let the pieces that have been returned wait for their next array."""
        while self.returned:
            memory = self.returned.popleft()
            self.used -= memory.nbytes
            self.waiting.append(memory)

    def give_back(self):
        """Give the pieces that wait back to the system."""
        with self.lock:
            self.sort_in()
            self.waiting.clear()
            self.total = self.peak = self.used

    def before_fork(self):
        """Let no thread be half-way through `take` in a fork: the child has only the thread that forks."""
        self.lock.acquire()

    def after_fork(self, in_child):
        if in_child:
            # To write into what the parent left waiting would copy it, page by page. Fresh pages are clear and come faster.
            self.waiting.clear()
            self.total = self.peak = self.used
        self.lock.release()


_pool = _Pool()


def is_lent(array):
    """Say whether the array, or what it is a view of, holds a lease."""
    while isinstance(array, numpy.ndarray):
        array = array.base
    return isinstance(array, Lease)


def lease(size, slack=SLACK):
    """Return a `Lease` of `size` bytes, or somewhat more, of the pool, which then holds at most so many times what was in use at once.

    What is small is the heap's.
    """
    if size < LEAST_BYTES:
        return Lease(numpy.empty(size, 'uint8'))
    memory = _pool.take(size, slack)
    taken = Lease(memory)
    taken.tell(_pool.returned, memory)
    return taken


def pool():
    """Return the pool of this process, which `parallel` guards in a fork and `plan` empties."""
    return _pool
