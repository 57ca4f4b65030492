"""The calls of NumPy that an operation is made of, listed once and made again.

A block of an operation is a dozen calls of NumPy, and before each of them Python works out what it is given: a slice of an image,
a view of its windows, scratch memory for the result. That takes as long as a call on some thousand values does, and Python has one
lock: while one core works such things out, the other one waits for its turn. But in a step that is like the one before, all arrays lie
where they lay (`plan.py`), so every view is that of the last step. So an operation does not make its calls. It lists them:

    def _calls(block, x, y, factor):
        rows = scratch('rows', x[block].shape, x.dtype)
        yield partial(numpy.multiply, x[block], factor, out=rows)
        yield partial(numpy.add, rows, 1, out=y[block])

    run(_calls, blocks, x, y, factor)

`run` makes the calls of all blocks, on all cores. Within a planned step it remembers what the operation was given. If that is the same
in the next step, it keeps the list, and from then on it makes the calls of the list and works out nothing.

What several operations do alike is a function of the same kind, that lists calls and returns where their result will be:

    def _halved(x, name):
        half = scratch(name, x.shape, x.dtype)
        yield partial(numpy.multiply, x, 0.5, out=half)
        return half                                             # for `half = yield from _halved(x, 'half')`

What is listed may depend on nothing but the arguments: on address, shape and strides of arrays, and on the value of anything else. The
numbers in an array are read when a call is made, never when it is listed. So such a function has four rules: it belongs to a module
and closes over nothing; every write is a listed call, and so is every copy, such as a `reshape` of what does not lie side by side; what an
array holds decides nothing; and scratch memory is asked for while listing, never in a call.

Blocks are dealt to as many lanes as there are threads. Each lane has scratch memory of its own, to which its list refers, and whichever
thread comes first takes the next lane. That memory belongs to the thread that computes: as many sets of it as there are cores.
"""

import numpy

from . import memory
from .parallel import cut_into, number_of_threads, parallel_for


def run(calls, blocks, *arguments):
    """Make the calls that `calls(block, *arguments)` yields, in order within a block; blocks are computed on several threads.

    Arguments are arrays, functions of modules, what compares by value, and tuples of these. A block must write only what belongs to it.
    """
    step = memory.this_thread.step
    if step is None:
        run_once(calls, blocks, *arguments)
        return
    number = max(1, min(number_of_threads(), len(blocks)))
    operation = step.operation((calls, number, blocks, _described(arguments))) if step.region is not None else None
    if operation is not None and operation.lanes is not None:
        parallel_for(operation.lanes, make)
        return
    if operation is not None:
        try:
            arguments = step.without_leases(arguments)
        except LookupError:                             # a list would keep what belongs to the pool
            operation = None
    shares = [blocks[share] for share in cut_into(number, len(blocks))]
    lanes = parallel_for(zip(shares, memory.scratch_of_lanes(number)), lambda lane: _listed(calls, *lane, arguments))
    if operation is not None:
        operation.lanes = lanes


def run_once(calls, blocks, *arguments):
    """Make the calls as `run` does, and remember nothing: for what is not done in every step."""
    parallel_for(blocks, lambda block: make(calls(block, *arguments)))


def make(listed):
    """Make the listed calls, in order."""
    for call in listed:
        call()


def _listed(calls, blocks, scratch, arguments):
    """Make the calls of some blocks, with scratch memory for this list alone, and return the list."""
    listed = []
    with memory.other_scratch(scratch):
        for block in blocks:
            for call in calls(block, *arguments):
                call()
                listed.append(call)
    return listed


def _described(argument):
    """Return what decides the calls: where an array lies and in what form, not what it holds. Other kinds of arrays are never alike."""
    if type(argument) is numpy.ndarray:
        return argument.__array_interface__['data'][0], argument.shape, argument.strides, argument.dtype
    if isinstance(argument, numpy.ndarray):
        return object()
    return tuple(map(_described, argument)) if isinstance(argument, (tuple, list)) else argument
