"""All cores at work, inside one operation at a time.

NumPy computes on one core, except in matrix products. But it lets go of Python's lock while it multiplies, copies and
adds, so ordinary threads do run at the same time. An operation cuts its work into blocks (some images, some rows) and
calls

    results = parallel_for(blocks, work)        # [work(block) for block in blocks], on all cores

(What a network does in every step is listed first, and dealt in equal shares: `calls.py`.)

Three rules keep this invisible to everything above it.

- **The blocks never depend on the number of threads.** A floating-point sum depends on its order. With the same blocks
  everywhere, and partial results that come back in block order, one thread and sixteen give the same bits.
- **A matrix product uses one thread.** In a block, more would be as many again as there are cores, and OpenBLAS makes
  concurrent callers wait for each other. So while blocks run, BLAS is set to one thread; then it is put back. That holds
  for the whole process, so a product outside blocks would run on one thread or several as it happens, and its last bits
  differ with their number: if a result depends on it, it belongs into `with one_thread_per_product():`.
- **The caller works too, and waits for the others.** Helpers take blocks from the same list until it is empty. So a
  helper that starts late costs speed, never correctness, and a call made inside a block simply runs where it is.

Helpers start on demand, wait `LINGER` seconds for more work, and end. No thread outlives its use; a program that ends
waits at most that long.

A forked child has only the thread that forked. A lock that another one held at that moment, of this library or inside
BLAS, would stay locked in the child for good; so a fork waits until no other thread is within `parallel_for` or
`one_thread_per_product`. A thread that multiplies outside of both has to take care of that itself.
"""

import contextlib
import contextvars
import ctypes
import os
import queue
import threading
from pathlib import Path

import numpy

from . import memory, plan
from .subnormals import environment, take_over

LINGER = 0.25                                       # seconds: far longer than the gaps between two layers of a network
PATIENCE = 10                                       # seconds that a fork waits; longer only if blocks wait for who forks

_inside = contextvars.ContextVar('inside a block', default=False)


def parallel_for(blocks, work):
    """Return `[work(block) for block in blocks]`, computed on several threads.

    Blocks start in order. `work` must write only what belongs to its block. It sees the caller's context variables,
    such as `numpy.errstate`. If a block raises, no further block starts, and once those that run have ended the error
    of the first block that failed is raised, as itself.
    """
    blocks = list(blocks)
    with one_thread_per_product():
        job = _Job(blocks, work)
        inside = _inside.get()
        token = _inside.set(True)
        try:
            if not inside:
                _helpers.call(job, min(number_of_threads(), len(blocks)) - 1)
            job.run()
        finally:
            _inside.reset(token)
            outcomes = job.wait()                   # helpers write into the caller's arrays: never leave before them
    return outcomes


def cut(length, size):
    """Return slices that cover range(length) in nearly equal parts of at most `size`, at least one each."""
    return cut_into(-(-length // max(1, size)), length)


def cut_into(parts, length):
    """Return so many slices that cover range(length) in nearly equal parts."""
    edges = [length * part // parts for part in range(parts)] + [length]
    return [slice(start, stop) for start, stop in zip(edges, edges[1:])]


def cut_images(images, rows, rows_per_block):
    """Return pairs of slices (images, rows) of about `rows_per_block` rows, of several small images or of one.

    Of an odd number of images, each is cut into an even number of strips, unless they are single rows: so two cores end together.
    """
    if rows_per_block < rows:
        parts = -(-rows // max(1, rows_per_block))
        parts += images * parts % 2 if parts < rows else 0
        return [(image, strip) for image in cut(images, 1) for strip in cut_into(parts, rows)]
    return [(several, slice(0, rows)) for several in cut(images, rows_per_block // rows)]


def block_size(total, most, half):
    """Return how much of `total` a block should hold: at most `most`, in an even number of blocks, so that two cores end together.

    What is less than twice `half` stays one block. Threads that compute only briefly before they need Python's lock again get into each
    other's way: below some tenths of a millisecond, a block is not worth a core's while.
    """
    number = max(1, -(-total // most))
    return -(-total // (number + number % 2 if total >= 2 * half else number))


# --- How many threads -------------------------------------------------------------------------------------------------

_number_of_threads = None


def number_of_threads():
    """Return how many threads share the blocks: what `set_threads` said, else NERVENET_THREADS in the environment, else as many as `cores`."""
    return _number_of_threads or _threads_of_environment() or len(cores())


def set_threads(number):
    """Use `number` threads from now on; None returns to what `number_of_threads` says by itself. No result depends on it.

    Use it in a `with` to change it for a while:  `with set_threads(1): ...`. Raises ValueError below 1.
    """
    global _number_of_threads
    if number is not None and not (number >= 1 and number == int(number)):
        raise ValueError(f'number of threads is {number}; expected a whole number of 1 or more, or None for all cores')
    before, _number_of_threads = _number_of_threads, number and int(number)
    return _restore_threads(before)


class _restore_threads(contextlib.AbstractContextManager):
    def __init__(self, before):
        self.before = before

    def __exit__(self, *error):
        set_threads(self.before)


def _threads_of_environment():
    text = os.environ.get('NERVENET_THREADS') or '0'
    if not text.isdigit():
        raise ValueError(f'NERVENET_THREADS is {text!r}; expected a whole number of threads')
    return int(text)


def cores():
    """Return the numbers of the cores that this process may use, a set."""
    if hasattr(os, 'sched_getaffinity'):            # Linux: a container, a launcher or `taskset` may grant fewer than there are
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


# --- The helpers ------------------------------------------------------------------------------------------------------

class _Job:
    """Blocks that are being computed: who takes which, who is still at it, and what came out."""

    def __init__(self, blocks, work):
        self.blocks, self.work = blocks, work
        self.outcomes = [None] * len(blocks)
        self.errors = {}                            # block number: exception
        self.next, self.running = 0, 0
        self.changed = threading.Condition()

    def run(self):
        """Take blocks and compute them until none is left."""
        with self.changed:
            self.running += 1
        try:
            while (number := self._take()) is not None:
                try:
                    self.outcomes[number] = self.work(self.blocks[number])
                except BaseException as error:      # also KeyboardInterrupt: it belongs to the caller
                    with self.changed:
                        self.errors[number] = error
                        self.next = len(self.blocks)
        finally:
            with self.changed:
                self.running -= 1
                self.changed.notify_all()

    def _take(self):
        with self.changed:
            number = self.next
            if number >= len(self.blocks):
                return None
            self.next += 1
            return number

    def wait(self):
        """Return the outcomes once nobody computes any more, or raise the first error."""
        while True:
            try:
                with self.changed:
                    self.next = len(self.blocks)    # a helper that arrives from now on finds nothing to do
                    self.changed.wait_for(lambda: self.running == 0)
                break
            except KeyboardInterrupt as error:      # the helpers still write: raise it once they have stopped
                self.errors.setdefault(len(self.blocks), error)
        outcomes, errors = self.outcomes, self.errors
        # A helper may still find this job in its queue: it must not keep the caller's arrays alive.
        self.blocks, self.work, self.outcomes, self.errors = [], None, None, {}
        if errors:
            # Blocks are taken in order, so every block before a failed one has run: the first is always the same.
            raise errors[min(errors)]
        return outcomes


class _Helpers:
    """Threads that wait for jobs and leave when none comes; one less than `number_of_threads()`, for all callers."""

    def __init__(self):
        self.lock = threading.Lock()
        self.jobs = queue.SimpleQueue()
        self.alive = 0
        self.idle = 0                               # helpers alive, less the jobs that are queued or being helped with

    def call(self, job, number):
        """Ask `number` helpers to join `job`."""
        arithmetic = environment() if number > 0 else None
        for _ in range(number):
            with self.lock:
                start = self.idle <= 0 and self.alive < number_of_threads() - 1
                self.alive += start
                self.idle -= not start
            # Each helper gets its own copy of the caller's context: one context cannot be entered twice at a time.
            context = contextvars.copy_context()
            context.run(_inside.set, True)
            self.jobs.put((context, arithmetic, job))
            if start:
                try:
                    threading.Thread(target=self._help, name='nervenet helper').start()
                except RuntimeError:                # the system grants no more threads, or the interpreter is about to end
                    with self.lock:
                        self.alive -= 1
                        self.idle -= 1              # the job waits for a helper like any other

    def _help(self):
        while True:
            try:
                context, arithmetic, job = self.jobs.get(timeout=LINGER)
            except queue.Empty:
                with self.lock:
                    if self.idle > 0:               # else a job was queued in this very moment, counting on this thread
                        self.idle -= 1
                        self.alive -= 1
                        return
                continue
            take_over(arithmetic)
            context.run(job.run)
            del context, job                        # keep no arrays alive while waiting
            with self.lock:
                self.idle += 1


_helpers = _Helpers()


# --- BLAS -------------------------------------------------------------------------------------------------------------

class _Blas:
    """The thread count of the BLAS behind NumPy, if it is one that can be asked and told at run time."""

    def __init__(self):
        self.get = self.set = None
        affixes = [(prefix, suffix) for prefix in ('scipy_openblas_', 'openblas_') for suffix in ('64_', '')]
        for library in self._libraries():
            for prefix, suffix in affixes:
                get = getattr(library, f'{prefix}get_num_threads{suffix}', None)
                set_ = getattr(library, f'{prefix}set_num_threads{suffix}', None)
                if get and set_:
                    self.get, self.set, self.library, self.affixes = get, set_, library, (prefix, suffix)
                    return

    @staticmethod
    def _libraries():
        """Yield what may hold BLAS: the compiled part of NumPy with all it is linked to, then the wheel's libraries."""
        package = Path(numpy.__file__).parent
        files = [numpy._core._multiarray_umath.__file__] if hasattr(numpy, '_core') else []
        for folder in (package.parent / 'numpy.libs', package / '.dylibs'):
            files += sorted(folder.glob('*openblas*'))
        for file in files:
            try:
                yield ctypes.CDLL(str(file))
            except OSError:                         # not a library for this system: the next one may be
                continue

    def description(self):
        """Return one line: which BLAS, with which kernels."""
        if self.get is None:
            return 'BLAS: not OpenBLAS, its threads cannot be set'
        prefix, suffix = self.affixes
        lines = []
        for what in ('config', 'corename'):
            function = getattr(self.library, f'{prefix}get_{what}{suffix}', None)
            if function:
                function.restype = ctypes.c_char_p
                lines.append(function().decode())
        return f'BLAS: {lines[0].split(" USE")[0].strip()}, core type {lines[-1]}' if lines else 'BLAS: OpenBLAS'


_blas = _Blas()
_blas_changed = threading.Condition()               # guards the three below
_blas_users, _blas_threads_before = [], None        # the threads within the context
_blas_depth = threading.local()                     # how often this thread entered it
_forks = 0                                          # threads that are about to fork


class one_thread_per_product(contextlib.ContextDecorator):
    """Within this context, or a function decorated with it, a matrix product uses one thread: its bits are always the same.

    The number belongs to the process: the last of several concurrent users puts back the one that the first found.
    """

    def __enter__(self):
        global _blas_threads_before
        if (depth := getattr(_blas_depth, 'of_thread', 0)) == 0:
            with _blas_changed:
                if not _inside.get():                       # else a fork waits for what this thread is at
                    _blas_changed.wait_for(lambda: _forks == 0)
                if not _blas_users and _blas.set is not None:
                    _blas_threads_before = _blas.get()
                    _blas.set(1)
                _blas_users.append(threading.get_ident())
        _blas_depth.of_thread = depth + 1

    def __exit__(self, *error):
        _blas_depth.of_thread -= 1
        if _blas_depth.of_thread == 0:
            with _blas_changed:
                _blas_users.remove(threading.get_ident())
                _blas_changed.notify_all()
                if not _blas_users and _blas.set is not None:
                    _blas.set(_blas_threads_before)


def describe_blas():
    """Return one line about the BLAS behind NumPy: name, version and the kernels it chose for this processor."""
    return _blas.description()


# --- Forks ------------------------------------------------------------------------------------------------------------

def _before_fork():
    """Wait until no other thread multiplies, and keep it so over the fork. In a block, where others wait for it, do not wait."""
    global _forks
    _blas_changed.acquire()
    _forks += 1
    try:
        if not _inside.get():
            _blas_changed.wait_for(lambda: set(_blas_users) <= {threading.get_ident()}, timeout=PATIENCE)
    finally:                                        # the fork goes on after Ctrl-C too, and both sides undo all of this
        memory.pool().before_fork()                 # last, for those who multiply need it


def _after_fork_in_parent():
    global _forks
    memory.pool().after_fork(in_child=False)
    _forks -= 1
    _blas_changed.notify_all()
    _blas_changed.release()


def _after_fork_in_child():
    """Start anew, but for what the thread that forked is in itself: it is the only one there is now."""
    global _forks, _blas_changed, _blas_users, _helpers
    memory.pool().after_fork(in_child=True)
    plan.forget_region()
    users, _blas_users = _blas_users, [user for user in _blas_users if user == threading.get_ident()]
    if users and not _blas_users and _blas.set is not None:
        _blas.set(_blas_threads_before)
    _forks, _blas_changed, _helpers = 0, threading.Condition(), _Helpers()


if hasattr(os, 'register_at_fork'):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
