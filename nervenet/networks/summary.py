"""What can be said of any network without computing anything: sizes, multiply-adds, memory, receptive fields.

A network is straight code, so the way to learn what it does is to run it: on an array that has a shape and no values. Each layer then
says what shape comes out (`output_shape`), keeps what it would keep for backward, and notes what it was given. That is enough.
"""

import copy
import itertools
import math

from ..engine.memory import SLACK
from ..engine.parallel import number_of_threads
from ..layers import Concat, Dropout, Layer, forwards_replaced

SCRATCH_BYTES = 2**24             # about what the convolutions of one thread need to work in


_numbers = itertools.count()      # in the order in which arrays are made


class Part(Layer):
    """What takes x[index] out of x."""

    def __init__(self, index):
        super().__init__()
        self.index = index


class Traced:
    """An array without values: its shape, and which layer made it of which others (none, if it came in from outside)."""

    def __init__(self, shape, dtype, name='', layer=None, inputs=()):
        self.shape, self.dtype, self.name, self.layer, self.inputs = tuple(shape), dtype, name, layer, inputs
        self.size, self.number = math.prod(shape), next(_numbers)

    def standardised(self, number):
        return self

    __sub__ = __truediv__ = standardised

    def __getitem__(self, index):
        """Return what is left when rows and columns are cut off at the end, or some images taken. Raises NotImplementedError for anything else."""
        index = index if isinstance(index, tuple) else (index,)
        if not (all(isinstance(part, slice) and part.step in (None, 1) for part in index) and all(part.start in (None, 0) for part in index[1:])):
            raise NotImplementedError(f'a trace follows x[some, :H, :W], which cuts off the end, and no other index, found {index}')
        shape = tuple(len(range(length)[part]) for length, part in zip(self.shape, index)) + self.shape[len(index):]
        return self if shape == self.shape else Traced(shape, self.dtype, self.name, Part(index), (self,))

    def input_range(self, first, last, axis):
        """Return the first and last position in what came in from outside that this array's from `first` to `last` depend on.

        Arrays are visited from the youngest to the oldest, so each of them once, when all is known that depends on it.
        """
        needed = {self: (first, last)}
        while True:
            value = max(needed, key=lambda value: value.number)
            first, last = needed.pop(value)
            if value.layer is None:
                return first, last
            there = value.layer.input_range(first, last, axis)
            for source in value.inputs:
                before = needed.get(source, there)
                needed[source] = min(before[0], there[0]), max(before[1], there[1])


def trace(model, shape):
    """Return (made, stages, kept) of one training forward on images of `shape` (N, H, W, C), enlarged as the network pads them.

    made    list of Traced, what each layer made, in order
    stages  {name: Traced} as the network's `observe` sees them
    kept    set of those Traced that some layer keeps until backward, what came in included
    """
    made, stages, (N, H, W, C) = [], {}, shape
    # A copy of the layers without the arrays, so that the model itself stays as it is, and may be in use elsewhere.
    shared = {id(array): array for _, layer in model.layers() for arrays in (layer.params, layer.grads, layer.buffers)
              for array in arrays.values()}
    model = copy.deepcopy(model, shared | {id(layer.cache): None for _, layer in model.layers()})

    def traced(name, layer, forward):
        def function(*inputs, **options):
            if isinstance(layer, Dropout) and layer.p == 0:
                return inputs[0]
            shapes = [x.shape for x in inputs]
            y = Traced(layer.output_shape(*shapes, **options), model.dtype, name, layer.fitted(*shapes, **options), inputs)
            layer.keep(*(inputs if 'input' in layer.keeps else ()), *([y] if 'output' in layer.keeps else []))
            made.append(y)
            return y
        return function

    with forwards_replaced(model.train(), traced):
        model.forward(Traced((N, *model.padded_size((H, W)), C), model.dtype), observe=stages.__setitem__)
    kept = {value for _, layer in model.layers() for value in layer.cache or ()}
    # A convolution of a join keeps what is joined: see `fusing`.
    return made, stages, {part for value in kept for part in (value.inputs if isinstance(value.layer, Concat) else (value,))}


def receptive_field(model, stage, position, axis=0, size=(1, 1)):
    """Return (first, last): the input pixels, along an axis, that the unit at `position` of a stage's output depends on.

    `stage` is a name as given to `observe`; axis 0 are rows, 1 columns. Positions outside the image are included. The numbers are the
    ends of what each layer says of itself (`input_range`), one after the other; the field of a unit depends on where it lies in the
    pooling grid, and in a network that draws maps as large as others also on the `size` (H, W) of the image. Raises ValueError for an
    unknown stage.
    """
    _, stages, _ = trace(model, (1, *size, model.in_channels))
    if stage not in stages:
        raise ValueError(f'there is no stage {stage!r}; expected one of {", ".join(stages)}')
    return stages[stage].input_range(position, position, axis)


def widest_field(model, stage, size=(1, 1)):
    """Return the side, in pixels, of the largest receptive field among a stage's units, for images of `size`."""
    _, stages, _ = trace(model, (1, *size, model.in_channels))
    return _widest(stages[stage], model)


def _widest(value, model):
    # The fields of neighbours differ, and repeat after a multiple, unless something is enlarged to the size of the map.
    positions = [range(model.multiple if model.least == 1 else value.shape[1 + axis]) for axis in (0, 1)]
    fields = (value.input_range(position, position, axis) for axis in (0, 1) for position in positions[axis])
    return max(last - first + 1 for first, last in fields)


def training_memory(model, shape):
    """Return about how many bytes training on batches of this shape (N, H, W, in_channels) takes, beside the model itself.

    That is what all layers keep until backward, and two arrays as large as the widest of it, since there backward begins
    with the gradient of an output and that of an input; later, in their place, the gradients of the parameters; what
    `memory` holds beyond it; the two averages of Adam; and scratch memory.
    """
    _, _, kept = trace(model, shape)
    parameters = sum(array.size for array in model.parameters().values())
    needed = sum(value.size for value in kept) + 2 * max(value.size for value in kept)
    arrays = SLACK * max(needed, parameters) + 2 * parameters
    return round(arrays) * model.dtype.itemsize + SCRATCH_BYTES * number_of_threads()


def table(model, size, batch_size=8):
    """Return a table, as text, of what each layer does with one image of `size` (H, W).

    Columns: output as height×width×channels, padding included; parameters; multiply-adds of forward; memory that training
    keeps of it until backward; receptive field of the stage's units, the widest side in pixels. The last line says what
    training takes with batches of `batch_size` images.
    """
    made, stages, kept = trace(model, (1, *size, model.in_channels))
    rows, totals = [('layer', 'output', 'parameters', 'multiply-adds', 'kept MiB', 'field')], [0, 0, 0.0]
    for y in made:
        numbers = (sum(array.size for array in y.layer.params.values()), y.layer.multiply_adds(y.inputs[0].shape),
                   (y in kept) * y.size * model.dtype.itemsize / 2**20)
        field = _widest(y, model) if y in stages.values() else ''
        rows.append((y.name, '×'.join(map(str, y.shape[1:])), f'{numbers[0]:,}', f'{numbers[1]:,}', f'{numbers[2]:.2f}', str(field)))
        totals = [total + number for total, number in zip(totals, numbers)]
    rows.append(('total', '', f'{totals[0]:,}', f'{totals[1]:,}', f'{totals[2]:.2f}', ''))
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ['  '.join([row[0].ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:])]).rstrip()
             for row in rows]
    needed = training_memory(model, (batch_size, *size, model.in_channels)) / 2**20
    return '\n'.join([*lines, f'training on {batch_size} images at a time takes about {needed:.0f} MiB'])
