"""Work on many items side by side, in order: by threads of this process, or by copies of this process.

Threads share Python's lock, and all that is in memory. That is right for files: reading, unpacking and packing them lets go of the
lock. A network on a small image is hundreds of calls of some 10 µs each, and between them the lock changes hands: two threads do little
more of that than one. Processes have a lock each. What they are given and what they return is copied, so it should be small.
"""

import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections import deque
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from .parallel import number_of_threads, set_threads

CAN_FORK = 'fork' in multiprocessing.get_all_start_methods() and sys.platform != 'darwin'        # there, libraries of the system break in a fork

_function = None                                    # of a process that `in_processes` made: what it computes


def in_background(function, items, ahead=2, threads=1):
    """Yield `function(item)` for each of `items`, in order; background threads work up to `ahead` items in advance.

    The caller's own thread iterates over `items`. So it reads ahead where items are files, and writes behind where they are
    results. An error in the background is raised here, as itself and in its place. A caller that leaves its loop half-way
    leaves no thread behind.
    """
    background = ThreadPoolExecutor(threads, thread_name_prefix='background')
    try:
        yield from _in_order(background, function, items, ahead)
    finally:
        background.shutdown(cancel_futures=True)


def in_processes(function, items, number):
    """Yield `function(item)` for each of `items`, in order, computed by `number` processes, which divide the threads of this one.

    They are copies of this process as it is when the first item is asked for, made by a fork: so `function` may be, and know, anything, such
    as a network. Items and results are sent, as are errors, so all of them must be what `pickle` takes; one item more than there are processes
    is under way. One process, or a system that cannot fork, is this process by itself. An error of the function is raised here, as itself and in
    its place; RuntimeError if something ends one of the processes. Ctrl-C is left to the caller, and none of them outlives it, even if it is killed.
    """
    if number < 2 or not CAN_FORK:
        yield from map(function, items)
        return
    processes = ProcessPoolExecutor(number, multiprocessing.get_context('fork'), _begin, (function, max(1, number_of_threads() // number)))
    try:
        with warnings.catch_warnings():             # Python warns of a fork beside threads; those of `parallel` are made to bear it
            warnings.simplefilter('ignore', DeprecationWarning)
            processes.submit(int).result()          # all are made now, before other threads hold locks that would stay locked in a copy
        yield from _in_order(processes, _call, items, number)
    except BrokenProcessPool as error:
        raise RuntimeError('a process that computed beside this one was ended from outside, for lack of memory perhaps; take less at once, or '
                           'NERVENET_THREADS=1') from error
    finally:
        processes.shutdown(cancel_futures=True)


def _in_order(executor, function, items, ahead):
    pending = deque()
    for item in items:
        pending.append(executor.submit(function, item))
        if len(pending) > ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _begin(function, threads):
    global _function
    _function = function
    set_threads(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)    # the terminal sends it to all; the caller says what comes of it
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


def _call(item):
    return _function(item)
