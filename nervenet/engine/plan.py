"""A plan of memory: where in one region the arrays of a step lie.

A network asks for the same arrays, in the same order, in every step. So the first step is only watched: how large is each array, at which
request is it born, at which request is it gone? Drawn as bars, requests to the right and addresses upwards, the arrays of a step
may lie anywhere as long as no two bars overlap:

    address
       │          ┌────────────────┐
       │   ┌──────┤       c        ├──────┐
       │   │  a   └────────────────┤  e   │
       │   ├────────────┬──────────┴──────┤
       │   │     b      │        d        │
       └───┴────────────┴─────────────────┴──▶ request

That is how compilers of networks lay out memory. The largest array is placed first, and each next one at the lowest address that
is free during its whole life (greedy by size: Pisarchyk & Lee 2020, arXiv:2001.03288). From the next step on, every request gets its
place: the system is asked for nothing, and what was touched once stays there.

    with planned(model, 'training', x.shape):
        ...                                         every `memory.empty` of this thread is a request of this step

A plan is a guess that this step will be like the last one, and nothing but speed depends on it. The region knows which of its
pages hold a living array; where a place is still taken, because somebody kept an array or a view of it from an earlier step, and
where the size is not the one expected, the request is served by the pool of `memory`, as outside of plans. A step that asked
for other sizes than planned is the one that the next plan is made from. What outlived a step and was still there when the next one
began, such as a prediction that its caller keeps, comes from the pool ever after: it would hold on to all of the region.

Since arrays lie where they lay in the last step, what is worked out from their places holds too: `calls.py` lists the calls of an operation
once, and here is where a plan remembers those lists.

All plans of a process share one region, as large as the largest of them, since only one step at a time makes full use of it. It
is given back when the last of the models is gone.
"""

import contextlib
import threading
import weakref
from collections import deque

import numpy

from . import memory
from .subnormals import no_subnormals

PAGE = 4096                             # bytes: what begins in a region begins at a multiple of it
MOST_PLANS = 16                         # kinds of steps of one model that are remembered


@contextlib.contextmanager
def planned(model, *kind):
    """Within this context, this thread's arrays are laid out as they were in the model's last step of this kind.

    `kind` is what decides which arrays a step needs, such as training or inference and the shape of the images. A context
    within another one is a part of that step. In a step, subnormal numbers are 0 (`subnormals.py`).
    """
    if memory.this_thread.step is not None:
        yield
        return
    with _lock:
        plans = _plans_of(model)
        plan = plans[kind] = plans.pop(kind, None) or _Plan()           # the one used last goes to the end
        while len(plans) > MOST_PLANS:
            del plans[next(iter(plans))]
        step = _Step(plan)
    memory.this_thread.step = step
    try:
        with no_subnormals():
            yield
        plan.seen(step)                                                 # but not if it was broken off
    finally:
        memory.this_thread.step = None


class _Step:
    """The requests of a step under way, their sizes, and between which requests each array lives; and its operations."""

    def __init__(self, plan):
        self.plan, self.places = plan, plan.places_now()
        self.region = _region_for(plan) if self.places else None
        self.operations = plan.operations.setdefault(threading.current_thread(), [])            # of this thread's last step of this kind
        self.number = 0                         # of operations in this one
        self.sizes, self.gone = [], []          # bytes of each request; the request before which its array was gone, or None
        self.ended = deque()                    # requests whose arrays are gone: they may end at any moment, in any thread

    def take(self, size):
        """Return the lease of a piece of `size` bytes, from the region if the plan has a free place for it, else from the pool."""
        self.note_ends()
        number = len(self.sizes)
        self.sizes.append(size)
        self.gone.append(None)
        expected, place = self.places[number] if number < len(self.places) else (None, None)
        lease = self.region.lease(place, size) if self.region and place is not None and size == expected else None
        lease = lease or memory.lease(size, slack=1)                    # what waits is of no use to the steps that follow
        lease.tell(self.ended, number)
        return lease

    def operation(self, key):
        """Return the `_Operation` that came at this place of the last step, if it was given just this; else remember it, and return None."""
        place, self.number = self.number, self.number + 1
        if place < len(self.operations) and self.operations[place].key == key:
            return self.operations[place]
        self.operations[place:place + 1] = [_Operation(key)]
        return None

    def without_leases(self, argument):
        """Return the arrays of the region, in tuples or by themselves, as arrays that hold no lease: others may take their places.

        Raises LookupError for an array of the pool, which is to go back there.
        """
        if isinstance(argument, (tuple, list)):
            return tuple(map(self.without_leases, argument))
        if type(argument) is not numpy.ndarray:
            return argument
        offset = argument.__array_interface__['data'][0] - self.region.memory.__array_interface__['data'][0]
        if not 0 <= offset < self.region.memory.nbytes:
            if memory.is_lent(argument):
                raise LookupError('an array of the pool')
            return argument
        return numpy.ndarray(argument.shape, argument.dtype, self.region.memory, offset, argument.strides)

    def note_ends(self):
        while self.ended:
            self.gone[self.ended.popleft()] = len(self.sizes)


class _Operation:
    """What a step does at one place: `key` is what it is given, `lanes` the calls that it makes, once they are listed (see `calls.py`)."""

    def __init__(self, key):
        self.key, self.lanes = key, None


class _Plan:
    """The places of one kind of step: [(size, place or None), …], one for each request; empty until a step has been seen."""

    def __init__(self):
        self.places, self.size = [], 0
        self.operations = weakref.WeakKeyDictionary()                   # thread: its operations of a step, a list
        self.uses_kept = False                  # lists may hold what `convolution.kept` keeps
        self.last = None                        # a step that went otherwise, to make the next plan of

    def seen(self, step):
        """Compare a finished step with the plan."""
        with _lock:
            del step.operations[step.number:]
            if step.sizes != [size for size, _ in self.places]:
                self.last, step.region, step.operations = step, None, None      # the region may go before the next step of this kind

    def places_now(self):
        """Return the places for a step that begins now, when it shows which arrays have outlived the last one."""
        if (step := self.last) is not None:
            self.last = None
            step.note_ends()
            requests = range(len(step.sizes))
            lives = {number: (number, step.gone[number]) for number in requests if step.gone[number] is not None}
            offsets = lay_out({number: step.sizes[number] for number in lives}, lives)
            self.size = max((offset + step.sizes[number] for number, offset in offsets.items()), default=0)
            self.places = [(step.sizes[number], offsets.get(number)) for number in requests]
            memory.pool().give_back()           # what the step that was watched left in the pool
        return self.places


def lay_out(sizes, lives):
    """Return {key: offset} in bytes, so that no two arrays that live at once overlap.

    `sizes` is {key: bytes}; `lives` is {key: (born, gone)}, the request that made the array and the one before which it was gone.
    """
    offsets = {}
    for key in sorted(sizes, key=lambda key: (-sizes[key], lives[key])):
        born, gone = lives[key]
        meanwhile = sorted((offsets[other], offsets[other] + sizes[other]) for other in offsets
                           if lives[other][0] < gone and born < lives[other][1])
        place = 0
        for start, stop in meanwhile:
            if place + sizes[key] <= start:
                break
            place = max(place, -(-stop // PAGE) * PAGE)
        offsets[key] = place
    return offsets


class _Region:
    """One stretch of memory. `taken` has a bit for each page, 1 while an array that lies on it lives."""

    def __init__(self, size):
        self.memory, self.taken = memory.pages(size), 0
        self.ended = deque()                    # bits of arrays that are gone
        self.lock = threading.Lock()

    def lease(self, place, size):
        """Return the lease of `size` bytes at `place`, or None where an array still lives, or beyond the end."""
        if place + size > self.memory.nbytes:
            return None                                                 # another thread has made the plan anew
        first, pages = place // PAGE, -(-size // PAGE)
        bits = (1 << pages) - 1 << first
        with self.lock:
            while self.ended:
                self.taken &= ~self.ended.popleft()
            if self.taken & bits:
                return None
            self.taken |= bits
        lease = memory.Lease(self.memory[place:place + size])
        lease.tell(self.ended, bits)
        return lease


_lock = threading.RLock()                       # no two threads begin or end a step at once
_models = {}                                    # id of a model that lives: its plans by kind
_region = None


def _plans_of(model):
    if id(model) not in _models:
        weakref.finalize(model, _forget, id(model)).atexit = False
        _models[id(model)] = {}
    return _models[id(model)]


def _all_plans():
    """Return the plans of all models, a list: a model may go at any moment, even while somebody walks over them."""
    return [plan for plans in [*_models.values()] for plan in [*plans.values()]]


def _forget(key):
    """Drop the plans of a model that is gone, and the region with the last of them. It may run at any moment, so it takes no lock."""
    global _region
    _models.pop(key, None)
    if not _models:
        _region = None


def _region_for(plan):
    """Return the region, of a size for the largest of all plans."""
    global _region
    size = max(one.size for one in [*_all_plans(), plan])
    region = _region
    if region is None or region.memory.nbytes != size:
        for one in _all_plans():
            one.operations.clear()                                      # they refer to the region of before
        region = _region = _Region(size) if size else None
    return region


def using_kept():
    """Note that this thread's step, if it is in one, uses what `convolution.kept` keeps."""
    if memory.this_thread.step is not None:
        memory.this_thread.step.plan.uses_kept = True


def forget_kept():
    """Drop all lists that may hold what was kept and is out of date now."""
    with _lock:
        for plan in _all_plans():
            if plan.uses_kept:
                plan.operations.clear()


def forget_region():
    """Make the next step use fresh memory: in a forked child, to write into what the parent touched would copy it page by page."""
    global _region, _lock
    _region, _lock = None, threading.RLock()        # of the parent's threads, one may have held it
    if memory.this_thread.step is not None:
        memory.this_thread.step.region = None
