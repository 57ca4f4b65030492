"""What was computed from a weight, used again for as long as the weight stays as it is.

In inference weights do not change, and what Winograd convolution makes of them is as large a work, for a single image, as the
convolution itself. But a weight can change at any moment, by loading, by a step, by writing into the array or into a view of it, and
nothing tells. So a copy is kept too, and compared before each use: that takes a tenth of what it saves, and what is out of date is never
used. It costs memory: the copy, and of a wide 3×3 kernel four times its size. So it is done where it pays, for maps of few pixels.
"""

import weakref

import numpy

from ..engine.plan import forget_kept, using_kept


class Kept:
    """Results by name, made of arrays that held just these bytes."""

    def __init__(self, arrays):
        self.arrays, self.results = arrays, {}
        self.copies = [bytearray(_bytes(array)) for array in arrays]

    def holds(self, arrays):
        """Say whether the arrays hold, bit for bit, what they held when this was made."""
        return len(arrays) == len(self.copies) and all(copy == _bytes(array) for copy, array in zip(self.copies, arrays))

    def __call__(self, name, make):
        """Return the result of this name; make it if there is none yet, and keep it unless an array was written to meanwhile."""
        if name in self.results:
            return self.results[name]
        result = make()
        if self.holds(self.arrays):
            self.results[name] = result
        return result


def empty_to_keep(shape, like):
    """Return an uninitialised array of this shape and the dtype of the array `like`, in memory that no step uses again."""
    return numpy.empty(shape, like.dtype)


def _bytes(array):
    """Return the array's bytes, where they are: comparing those takes a quarter of comparing numbers."""
    return numpy.ascontiguousarray(array).view('uint8').data


_of = weakref.WeakKeyDictionary()               # a layer: what is kept for it. It goes with the layer


def kept_for(layer, arrays):
    """Return the `Kept` of this layer: the one of before if the arrays are still what it was made of, else a new one."""
    kept = _of.get(layer)
    if kept is None or not kept.holds(arrays):
        drop_kept(layer)
        kept = _of[layer] = Kept(arrays)
    using_kept()
    return kept


def drop_kept(layer):
    """Forget what is kept for this layer, and lists of calls that may hold it: its weight is about to change, or has."""
    if _of.pop(layer, None) is not None:
        forget_kept()
