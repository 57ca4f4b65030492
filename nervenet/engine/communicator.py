"""Several processes at one training, on one machine or many: each computes its share of every batch, and sums run over all of them.

    mpiexec -n 4 python examples/train_unet.py --data DIR --batch-size 16

A batch is cut into contiguous shares, one for each process. **What comes out is what one process makes of the whole batch**, to rounding,
since every sum over the batch is a sum over all processes: those of batch norm, forward and backward, those of the losses, the counts of the
scores, and the gradients of the parameters. A share may be empty, where a batch has fewer images than there are processes: arrays of no
images go through the network, and add nothing to any sum.

    with together() as processes:               of all that MPI has started; of this one alone if MPI has started none
        with sharing(len(x)):                   `train_step` and `evaluate` do this
            s, = total(s)                       a sum over this process's images becomes that over the whole batch
            shape, rows = whole_batch(x)        the shape of the whole batch, and which rows of it are x
        add_up(gradients)                       the same for all gradients, as one vector
        processes.any(stop)                     all decide alike

A layer asks for `total` and knows of no processes. Outside of `sharing`, and where there is one process, a total is the sum that was given,
bit for bit. All processes must come to the same sums in the same order, or they wait for each other for ever; so what is not the same for
all is done by the first alone, `from_first`, and an error that one of them meets by itself ends them all (`together`). How messages travel
is the business of MPI, through mpi4py. On GPUs the vectors go through NCCL, by `cupyx.distributed`, where each process of a machine has a
GPU of its own, else through the memory of the hosts. **It has never met several GPUs**: the tests run this path on a stand-in for CuPy.

**What it costs.** A step sends the gradients, 4 bytes for each parameter P, and for each batch norm four numbers a channel, which are few
(47 kB for a U-Net of base 16), in three messages. An Allreduce among p processes sends 2·(p − 1)/p times the vector through the line of
each, so with S seconds for the vector and one core's t seconds for an image, a step on a batch of B images takes about

    B·t/p + 2·S·(p − 1)/p        which falls as long as B·t > 2·S, and never below 2·S: the most that is gained is B·t / 2·S

Twice the channels are four times the parameters, and nearly as many times t: it is the batch that decides, less the network. For images
of 96×128 on one core, in batches of 16:

    base    parameters   bytes     t        an Allreduce among many, 2·S, at 1, 10, 100 Gbit/s    most that is gained at 1, 10, 100 Gbit/s
    16      1.94 M       7.8 MB    43 ms    124 ms, 12 ms, 1.2 ms                                 6, 55, 550 times
    32      7.76 M       31 MB     120 ms   497 ms, 50 ms, 5.0 ms                                 4, 39, 390 times
    64      31.0 M       124 MB    400 ms   2.0 s, 199 ms, 20 ms                                  3, 32, 320 times

It stops paying where the batch has fewer than 2·S/t images: at 1 Gbit/s 3, 4 and 5 of them. Machines of 8 cores, each a process of 8 threads,
have an eighth of t, and gain an eighth, or need 8 times the images: at base 16 and 1 Gbit/s two of them are slower than one (105 ms a step
against 86), at 10 Gbit/s 1.75 times as fast. The messages of batch norm, and a handful of others, wait for the line 60 times in a step, say
50 µs each: 3 ms on any network. Within one machine nothing is to be gained over threads.
"""

import contextlib
import contextvars
import functools
import itertools
import math
import os
import pickle
import socket
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy

from .backend import communicator_of_gpus, get_array_module, has_nccl, move, to_cpu, use_gpu
from .memory import empty, scratch
from .parallel import cores, set_threads

# What launchers tell each process of how many there are, and which it is: Open MPI; MPICH, Intel MPI and Slurm; MVAPICH.
LAUNCHERS = (('OMPI_COMM_WORLD_SIZE', 'OMPI_COMM_WORLD_RANK'), ('PMI_SIZE', 'PMI_RANK'), ('MV2_COMM_WORLD_SIZE', 'MV2_COMM_WORLD_RANK'))
PATIENCE = 3                                    # seconds that a process with an error waits whether the others have it too


class Communicator:
    """One process by itself: it has all sums and makes all decisions. `MPI` is the same among several."""

    rank, size, neighbours = 0, 1, 1            # neighbours: how many of them are on this machine

    def sum(self, vector):
        """Return the vector summed over all processes; it may be the same one, changed."""
        return vector

    def gather(self, value):
        """Return a list of the values of all processes, by rank."""
        return [value]

    def rows(self, images):
        """Return which of so many images of a batch are this process's: a slice, of no images where there are fewer than processes."""
        return slice(images * self.rank // self.size, images * (self.rank + 1) // self.size)

    def any(self, flag):
        """Return whether the flag is true in any process."""
        return any(self.gather(bool(flag)))

    def from_first(self, work):
        """Return work() in all processes; the first calls it, alone: nothing in it is shared. What it raises is raised in all."""
        return work()

    def use_device(self, device):
        """Let each process of a machine compute on a GPU of its own, if `device` is 'gpu'. Raises RuntimeError unless it is the same for all."""


class MPI(Communicator):
    """All processes that MPI has started."""

    def __init__(self, mpi):
        self.mpi, self.world = mpi, mpi.COMM_WORLD
        self.rank, self.size = self.world.rank, self.world.size
        self.ends = self.world.Dup()            # for the end: what is said there mixes with nothing else
        self.local = self.world.Split_type(mpi.COMM_TYPE_SHARED)               # those of this machine
        self.neighbours = self.local.size
        self.gpus = None

    def sum(self, vector):
        if get_array_module(vector) is numpy:
            self.world.Allreduce(self.mpi.IN_PLACE, vector)
        elif self.gpus is not None:
            self.gpus.all_reduce(vector, vector)
        else:
            vector = move(self.sum(to_cpu(vector)), 'gpu')
        return vector

    def gather(self, value):
        return self.world.allgather(value)

    def from_first(self, work):
        result = error = None
        if self.rank == 0:
            token = _processes.set(ALONE)
            try:
                result = work()
            except BaseException as raised:     # Ctrl-C too
                error = raised
            finally:
                _processes.reset(token)
        received, said = self.world.bcast((result, error and as_sent(error)))
        if said is not None:
            raise said if error is None else error
        return result if self.rank == 0 else received

    def threads(self):
        """Return how many threads this process should use: its part of the cores of its machine, which others may use too."""
        everyone = self.local.allgather(cores())
        return max(1, math.floor(sum(1 / sum(core in other for other in everyone) for core in cores()) + 1e-9))

    def use_device(self, device):
        devices = self.gather(device)
        if len({*devices}) > 1:
            raise RuntimeError(f'the processes found different devices: {", ".join(devices)}; choose one with --device')
        if device == 'gpu' and self.gpus is None:
            chosen = self.local.allgather(use_gpu(self.local.rank))
            if not self.any(len({*chosen}) < len(chosen) or not has_nccl()):
                self.gpus = communicator_of_gpus(self.size, self.rank)          # from now on sums go from GPU to GPU

    def end(self, error=None):
        """Wait until all processes have come here, with an error or without one; the first raises that of another that it lacks itself.

        If they do not, because they wait elsewhere for this one, which will not come: say why, and end them all.
        """
        arrived, start = self.ends.Ibarrier(), time.monotonic()
        while not arrived.Test():
            if error is not None and time.monotonic() - start > PATIENCE:
                os.write(2, f'{Path(sys.argv[0]).name}: {self.said(error)}\n'.encode(errors='backslashreplace'))
                self.world.Abort(1)
            time.sleep(0.01)
        errors = [text for text in self.ends.allgather(error and self.said(error)) if text]
        if errors and error is None and self.rank == 0:
            raise RuntimeError(errors[0])

    def said(self, error):
        """Return one line about an error of this process."""
        text = ' '.join(str(error).split())
        return f'process {self.rank + 1} of {self.size}, on {socket.gethostname()}: {type(error).__name__}' + f': {text}' * bool(text)


ALONE = Communicator()
_processes = contextvars.ContextVar('the processes that compute together', default=ALONE)


class _Batch(NamedTuple):
    """The batch that is being computed: how many images it has, and which of them this process has."""

    images: int
    rows: slice


_batch = contextvars.ContextVar('the batch that is shared', default=None)


def current():
    """Return the Communicator of the processes that compute together here: those of `together`, else of this one alone."""
    return _processes.get()


@contextlib.contextmanager
def sharing(images):
    """Within this context totals run over all processes; `images` says how many of the batch are this process's."""
    if current().size == 1:
        yield
        return
    edges = [0, *itertools.accumulate(current().gather(images))]
    token = _batch.set(_Batch(edges[-1], slice(*edges[current().rank:][:2])))
    try:
        yield
    finally:
        _batch.reset(token)


def whole_batch(x):
    """Return (shape, rows) of the whole batch that the array x (N, …) is this process's share of: x is batch[rows]."""
    images, rows = _batch.get() or (len(x), slice(None))
    return (images, *x.shape[1:]), rows


def total(*sums):
    """Return the sums over the whole batch, given those over this process's share: arrays of one dtype, any shapes, on one device."""
    # Copies, since layers keep them, and the next sum is computed in the same memory.
    return sums if _batch.get() is None else [whole.copy() for whole in _summed(sums)]


def add_up(gradients):
    """Turn the gradients, {name: array}, into their sums over all processes, in place, by one Allreduce of one vector."""
    if _batch.get() is not None:
        for gradient, whole in zip(gradients.values(), _summed(gradients.values())):
            gradient[...] = whole


def _summed(arrays):
    """Return the sums of these arrays over all processes, views of one vector, which lasts until this thread asks for the next one."""
    arrays = [*arrays]
    edges = [0, *itertools.accumulate(array.size for array in arrays)]
    on_host, shape = get_array_module(*arrays) is numpy, (edges[-1],)
    vector = scratch('sums', shape, arrays[0].dtype) if on_host else empty(shape, arrays[0])
    for array, start, stop in zip(arrays, edges, edges[1:]):
        vector[start:stop] = array.reshape(-1)
    vector = current().sum(vector)
    return [vector[start:stop].reshape(array.shape) for array, start, stop in zip(arrays, edges, edges[1:])]


@contextlib.contextmanager
def together():
    """Within this context all processes that MPI has started compute together; yields their Communicator.

    The others than the first say nothing from here on, on neither stream: what is said is said once. Unless the environment says it
    (NERVENET_THREADS), the processes of a machine divide its cores.

    Where the context ends, each waits for all. An error that only some of them have, a file that one machine cannot read, ends all of
    them, with one line that names the process; one that all have is raised in all. Raises RuntimeError if MPI has started several
    processes that cannot talk to each other: they would all train the same, and write over each other.
    """
    size, rank = started()
    if size == 1:
        yield ALONE
        return
    if rank:
        sys.stdout = sys.stderr = open(os.devnull, 'w')
    try:
        processes = world(size)
    except RuntimeError:
        time.sleep(rank and 1)                  # a launcher ends all processes when one fails: let the first say why
        raise
    token = _processes.set(processes)
    try:
        with contextlib.nullcontext() if os.environ.get('NERVENET_THREADS') else set_threads(processes.threads()):
            yield processes
    except BaseException as error:
        processes.end(error)
        raise
    else:
        processes.end()
    finally:
        _processes.reset(token)


def started():
    """Return (size, rank): how many processes a launcher of MPI has started with this one, and which of them it is, by the environment."""
    found = [(int(os.environ[size]), int(os.environ.get(rank, 0))) for size, rank in LAUNCHERS if os.environ.get(size, '').isdigit()]
    if 'PMIX_RANK' in os.environ:               # Slurm with PMIx says there which one, and here of how many
        found.append((int(os.environ.get('SLURM_STEP_NUM_TASKS', 1)), int(os.environ['PMIX_RANK'])))
    return max(found, default=(1, 0))


def refuse_company():
    """Raise RuntimeError if a launcher of MPI has started several processes, for a program that does nothing together with others."""
    if started()[0] > 1:
        raise RuntimeError(f'{started()[0]} processes of this program were started together; only train_unet.py computes with several: start one')


@functools.cache
def world(size):
    """Return the Communicator of the `size` processes that were started. Raises RuntimeError if they cannot talk to each other."""
    try:
        from mpi4py import MPI as mpi
    except (ImportError, RuntimeError) as error:                # not installed; or it finds no MPI to load
        raise RuntimeError(f"{size} processes were started together, and mpi4py, by which they talk to each other, cannot be used "
                           f"({' '.join(str(error).split())}): pip install mpi4py, or start one process") from None
    if mpi.COMM_WORLD.size != size:
        raise RuntimeError(f'{size} processes were started together, and mpi4py sees {mpi.COMM_WORLD.size}: it uses another MPI '
                           f'({mpi.Get_library_version().splitlines()[0][:60]}) than the launcher; start them with the mpiexec of that one')
    return MPI(mpi)


def as_sent(error):
    """Return an exception as another process can receive it: itself, or what it says."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:                           # its class may want other arguments than it says
        return RuntimeError(f'{type(error).__name__}: {error}')
