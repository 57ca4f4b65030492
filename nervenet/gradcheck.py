"""Gradient checks: is what `backward` returns the derivative of `forward`? Run `python -m nervenet.gradcheck`.

A gradient written by hand can be wrong and a network still trains with it, only worse. But a derivative can be
measured: move one number θ a little and see how far the loss L moves. Two ways, both in float64:

    finite differences   ∂L/∂θ ≈ (L(θ + h) − L(θ − h)) / 2h   for any forward; off by about h², and by rounding / h
    complex step         ∂L/∂θ ≈ Im L(θ + ih) / h             nothing is subtracted, so h can be 1e-30 and the result
                                                              exact; for a forward that allows complex numbers

L is Σ dy·y with a random dy, so that no error hides behind a symmetry: with a dy of ones, a concat that swaps its two
gradients passes. For the same reason weights are random, images are not square, and numbers of channels differ.

In a small layer, every element of every input and parameter is moved by itself. In a wide one a few are, and all of them together
along a random direction d, by which L must change by Σ gradient·d; in a network, where even that would take too long, each array is
moved as a whole.

There are many ways to compute the same, fast paths for one shape or another. The suite reaches each of them that a network of the
examples takes, and its table says by which ones backward, and the forward before it, were computed. Finite differences are measured
by the same ones; complex numbers take the plain mathematics, so the complex step also holds the two together.

To check a layer of your own, build it with dtype float64:

    rng = numpy.random.default_rng(0)
    print(table(check_layer(MyLayer(), rng.standard_normal((2, 5, 7, 3)), rng=rng)))

Source of the complex step: Squire & Trapp 1998, "Using complex variables to estimate derivatives of real functions".
"""

import argparse
import copy
import inspect
import sys
import time
import warnings
from typing import NamedTuple

import numpy

from .engine.paths import paths_taken, plain
from .layers import Add, BatchNorm2D, Concat, Conv2D, ConvTranspose2D, Dropout, LeakyReLU, MaxPool2D, ReLU, Sigmoid, inference
from .losses import BCEWithLogitsLoss, DiceLoss, WeightedSum
from .networks import NETWORKS
from .networks.optimised_resunet import DenseAtrousConvolution, ResidualMultiKernelPooling, Stack
from .resampling import Upsample2D

# The step h, and the largest relative error that passes. The inputs of a layer can be kept away from its kinks. In a
# network, some ReLU may cross 0 within the step: a tiny step makes that rare, but costs digits.
LAYER = {'finite differences': (1e-5, 1e-7), 'complex step': (1e-30, 1e-11)}
WIDE = {'finite differences': (1e-3, 1e-7), 'complex step': (1e-30, 1e-11)}      # sums of many numbers: rounding asks for a larger step
NETWORK = {'finite differences': (1e-8, 1e-4), 'complex step': (1e-30, 1e-9)}


class Result(NamedTuple):
    """One gradient compared with one measurement of it; or a broken protocol, with an infinite error."""

    layer: str
    quantity: str               # 'dx', 'dweight', …
    method: str                 # 'finite differences', 'complex step', 'rule', or '' for the protocol
    error: float                # largest absolute difference / largest absolute value
    tolerance: float
    detail: str                 # which elements differ, and by how much
    paths: frozenset = frozenset()      # names of the paths by which forward and backward were computed

    @property
    def ok(self):
        return bool(self.error <= self.tolerance)       # false for NaN


def check_layer(layer, *inputs, rng, name=None, methods=LAYER, directions=None):
    """Measure every element of every gradient of `layer` at `inputs`, float64 arrays; return a list of `Result`.

    For a layer with more elements than one can wait for, `directions` says which to measure: `some_elements`, `one_random_direction`.

    The layer stays as it is. What is checked is a copy, with noise added to its parameters, because biases of exactly 0
    can put a ReLU on its kink. Each measurement starts from the same state, so a layer that draws random numbers draws
    the same ones. Keep the inputs away from kinks by more than the step of 1e-5, and leave 'complex step' out of
    `methods` for a forward that does not allow complex numbers.

    The protocol is checked too: forward and backward may not write into an array that they were given or have returned;
    there must be a gradient of the right shape and dtype for every input and parameter; parameter gradients are
    assigned, not added to what was there; the cache is freed; and where backward can leave out the gradient of the input
    (`input_gradient=False`), that changes no other gradient. Raises ValueError if an array is not float64.
    """
    return check(layer, inputs, rng, name, methods, directions or every_element)


def check_loss(loss, logits, target, *, rng, name=None, methods=LAYER):
    """Measure every element of ∂loss/∂logits, for float64 logits and target (N, H, W, C); return a list of `Result`."""
    return check(loss, (logits, target), rng, name, methods, every_element)


def check_network(model, *inputs, rng, name=None, methods=NETWORK):
    """Measure every gradient of `model` along one random direction; return a list of `Result`. Else as `check_layer`.

    Give batch norm at least 8 values per channel at the deepest level; with fewer it is too curved for finite
    differences.
    """
    return check(model, inputs, rng, name, methods, one_random_direction)


def every_element(gradient, rng):
    """Yield (what is moved, direction) for each element of an array by itself."""
    for index in numpy.ndindex(gradient.shape):
        direction = numpy.zeros(gradient.shape)
        direction[index] = 1
        yield f'element {index}', direction


def some_elements(gradient, rng):
    """Yield (what is moved, direction) for a random direction of all elements, and for two elements by themselves."""
    yield from one_random_direction(gradient, rng)
    for place in rng.integers(gradient.size, size=2):
        direction = numpy.zeros(gradient.shape)
        index = numpy.unravel_index(place, gradient.shape)
        direction[index] = 1
        yield f'element {tuple(map(int, index))}', direction


def one_random_direction(gradient, rng):
    """Yield (what is moved, direction) once: a random direction of length 1, leaning towards the gradient.

    A random direction alone can be almost at right angles to the gradient, and then rounding is all there is to
    compare.
    """
    direction = rng.standard_normal(gradient.shape)
    direction /= numpy.linalg.norm(direction)
    length = numpy.linalg.norm(gradient)
    if length > 0:
        along = gradient / length
        direction += along * numpy.copysign(gradient.size**-0.5, (direction * along).sum())
    yield 'a random direction', direction


def check(layer, inputs, rng, name, methods, directions):
    """Compare every gradient of `layer` with measurements along `directions`; return a list of `Result`."""
    layer, name = copy.deepcopy(layer), name or type(layer).__name__
    for parameter in layer.parameters().values():
        parameter += 0.1 * rng.standard_normal(parameter.shape)
    input_names = list(inspect.signature(layer.forward).parameters)[:len(inputs)]
    if len(input_names) < len(inputs):                                  # forward(*inputs)
        input_names = [f'input{number}' for number in range(len(inputs))]
    values = dict(zip(input_names, inputs)) | layer.parameters()        # all that L depends on, under one set of names
    for key, value in values.items():
        if value.dtype != numpy.float64:
            raise ValueError(f'{name}: {key} is {value.dtype}; gradients are checked in float64, because float32 '
                             'cannot tell a wrong gradient from rounding')

    def output(values):
        """Return y for other inputs and parameters, starting from the same state of everything else."""
        trial = copy.deepcopy(layer)
        for prefix, part in trial.layers():
            part.params = {key: values[prefix + key].copy() for key in part.params}
            part.dtype = values[input_names[0]].dtype                   # a U-Net insists on its own
        return trial.forward(*(values[key].copy() for key in input_names))

    def measure(key, direction, method, h):
        """Return the derivative of Σ dy·y as values[key] moves along `direction`."""
        if method == 'complex step':
            moved = {other: value.astype(complex) for other, value in values.items()}
            moved[key] = values[key] + 1j * h * direction
            with warnings.catch_warnings():                     # a cast to real loses the derivative: the check fails
                warnings.filterwarnings('ignore', message='Casting complex values')
                return (dy * output(moved).imag).sum() / h
        ahead, behind = (output(values | {key: values[key] + step * direction}) for step in (h, -h))
        return (dy * (ahead - behind)).sum() / (2 * h)

    y = output(values)
    dy = rng.standard_normal(y.shape) if y.ndim else numpy.ones(())     # a loss is L itself
    with paths_taken() as paths:
        gradients, faults = claimed_gradients(layer, input_names, values, dy)
    results = [Result(name, 'protocol', '', numpy.inf, 0, fault) for fault in faults]
    moves = {key: list(directions(gradient, rng)) for key, gradient in gradients.items()}
    claims = {key: [(gradients[key] * direction).sum() for _, direction in moves[key]] for key in moves}
    # A gradient of exactly 0, as of a bias in front of a batch norm, is measured as rounding: the others set its scale.
    floor = 0.01 * max((abs(claim) for claimed in claims.values() for claim in claimed), default=0)
    for key, claimed in claims.items():
        for method, (h, tolerance) in methods.items():
            measured = [measure(key, direction, method, h) for _, direction in moves[key]]
            labels = [what for what, _ in moves[key]]
            result = compare(name, gradient_name(key), method, claimed, measured, tolerance, labels, floor)
            results.append(result._replace(paths=frozenset(paths)))
    return results


def claimed_gradients(layer, input_names, values, dy):
    """Return (gradients by name, faults) of one forward and backward; faults say how they break the protocol."""
    trial = copy.deepcopy(layer)
    for _, part in trial.layers():
        part.grads = {key: numpy.full_like(value, numpy.nan) for key, value in part.params.items()}     # to be assigned
    arrays = {key: values[key].copy() for key in input_names} | trial.parameters() | {'dy': dy}
    before = copy.deepcopy(arrays)
    y = trial.forward(*(arrays[key] for key in input_names))
    arrays['y'], before['y'] = y, copy.deepcopy(y)
    if y.ndim:
        dinputs = trial.backward(dy)
    else:
        dinputs, input_names = trial.backward(), input_names[:1]        # the target of a loss has no gradient
    dinputs = dinputs if isinstance(dinputs, tuple) else (dinputs,)
    gradients = dict(zip(input_names, dinputs)) | trial.gradients()

    faults = unlike_without_input_gradient(layer, [arrays[key] for key in input_names], dy, trial) if y.ndim else []
    faults += [f'{key} was written into' for key in arrays if not numpy.array_equal(arrays[key], before[key])]
    faults += ['the cache stays after backward' for _, part in trial.layers() if part.cache is not None][:1]
    if len(dinputs) != len(input_names):
        faults.append(f'backward returned {len(dinputs)} gradients for {len(input_names)} inputs')
    for key in [*input_names, *trial.parameters()]:
        found, expected = (describe(arrays.get(key)) for arrays in (gradients, values))
        if found != expected:
            faults.append(f'{gradient_name(key)} is {found}, expected {expected}')
            gradients.pop(key, None)
        elif numpy.isnan(gradients[key]).all():
            faults.append(f'{gradient_name(key)} was not assigned')
            del gradients[key]
    return gradients, faults


def unlike_without_input_gradient(layer, inputs, dy, done):
    """Return what goes wrong where the gradient of the input is left out, as training does; `done` is the layer after a full backward."""
    if 'input_gradient' not in inspect.signature(layer.backward).parameters:
        return []
    trial = copy.deepcopy(layer)
    trial.forward(*inputs)
    dx, gradients = trial.backward(dy, input_gradient=False), trial.gradients()
    faults = [f'd{key} differs without the gradient of the input' for key, gradient in done.gradients().items()
              if gradient is None or not numpy.array_equal(gradient, gradients[key])]
    return faults + ['backward(input_gradient=False) returned a gradient'] * (dx is not None)


def describe(array):
    """Return shape and dtype of an array as text."""
    return 'missing' if array is None else f'{array.shape} {array.dtype}'


def gradient_name(key):
    """Return 'dx' for 'x', and 'stem.conv1.dweight' for 'stem.conv1.weight'."""
    owner, dot, name = key.rpartition('.')
    return f'{owner}{dot}d{name}'


def compare(layer, quantity, method, claimed, measured, tolerance, labels, floor=0.0):
    """Return the `Result` of comparing two lists of numbers; `labels` says what each pair is about.

    Their difference is judged relative to the largest number, or to `floor` if that is larger.
    """
    claimed, measured = numpy.array(claimed), numpy.array(measured)
    difference = numpy.abs(claimed - measured)
    scale = max(numpy.abs(claimed).max(), numpy.abs(measured).max(), floor)
    error = difference.max() / scale if scale != 0 else 0.0
    worst = difference.argmax()
    detail = (f'{(~(difference <= tolerance * scale)).sum()} of {difference.size} differ; worst for {labels[worst]}: '
              f'backward says {claimed[worst]:.10g}, measured {measured[worst]:.10g}')
    return Result(layer, quantity, method, float(error), tolerance, detail)


def check_relu_at_zero(layer, rng):
    """At its kink ReLU has no derivative to measure, but a rule: nothing passes. Return one `Result`."""
    dy = rng.standard_normal((2, 3, 4, 2))
    layer.forward(numpy.zeros(dy.shape))
    return check_rule('ReLU at 0', layer.backward(dy), numpy.zeros(dy.shape))


def check_pooling_of_equal_values(layer, rng):
    """Where maxima tie there is no derivative to measure, but a rule: the first gets it all. Return one `Result`."""
    (k, _), dy = layer.geometry.kernel_size, rng.standard_normal((2, 3, 4, 2))
    expected = numpy.zeros((2, 3 * k, 4 * k, 2))
    expected[:, ::k, ::k] = dy
    layer.forward(numpy.ones(expected.shape))
    return check_rule('MaxPool2D of equal values', layer.backward(dy), expected)


def check_inference(model, x):
    """In inference a network may take shortcuts that have no backward. Return one `Result`: what it makes of x, against the plain way."""
    model, x = copy.deepcopy(model), x.copy()
    model.forward(x)                                                    # running statistics of its own
    with inference(), paths_taken() as paths:
        y = model.forward(x)
    with inference(), plain():
        expected = model.forward(x)
    return check_rule(f'{type(model).__name__}, inference', y, expected, 'y', 1e-10)._replace(paths=frozenset(paths))


def check_rule(name, result, expected, quantity='dx', tolerance=0.0):
    """Return the `Result` of comparing an array with what a rule demands."""
    labels = [f'element {index}' for index in numpy.ndindex(result.shape)]
    return compare(name, quantity, 'rule', result.ravel(), expected.ravel(), tolerance, labels)


def suite(rng):
    """Yield the lists of results for every layer, every loss and every network."""
    def normal(*shape):
        return rng.standard_normal(shape)

    def off_zero(*shape):
        """Return values that keep away from ReLU's kink."""
        return rng.choice([-1, 1], shape) * (0.1 + rng.random(shape))

    def distinct(*shape):
        """Return values of which no two are close, so that a small step does not change which one is the maximum."""
        return rng.permutation(numpy.prod(shape)).reshape(shape) / 100

    def mask(*shape):
        return (rng.random(shape) < 0.3).astype(float)

    options = dict(rng=rng, dtype=float)
    yield check_layer(ReLU(), off_zero(2, 5, 4, 3), rng=rng)
    yield [check_relu_at_zero(ReLU(), rng)]
    yield check_layer(LeakyReLU(0.2), off_zero(2, 5, 4, 3), rng=rng)
    yield check_layer(Sigmoid(), normal(2, 5, 4, 3), rng=rng)
    yield check_layer(Add(), normal(2, 5, 4, 3), normal(2, 5, 4, 3), rng=rng)
    yield check_layer(Concat(), normal(2, 5, 4, 3), normal(2, 5, 4, 2), rng=rng)
    yield check_layer(Concat(), *(normal(2, 5, 4, C) for C in (1, 3, 2, 4)), rng=rng, name='Concat of four')
    yield check_layer(Stack(), normal(2, 5, 4, 3), normal(1, 5, 4, 3), normal(3, 5, 4, 3), rng=rng)
    yield check_layer(MaxPool2D(2), distinct(2, 4, 6, 3), rng=rng)
    yield check_layer(MaxPool2D(2), distinct(2, 5, 7, 3), rng=rng, name='MaxPool2D, odd size')
    yield check_layer(MaxPool2D(3), distinct(2, 7, 6, 2), rng=rng, name='MaxPool2D 3×3')
    yield check_layer(MaxPool2D(5, 1, 2), distinct(2, 6, 7, 3), rng=rng, name='MaxPool2D 5×5, stride 1, padding 2')
    yield check_layer(MaxPool2D((3, 2), (2, 1), (1, 0)), distinct(2, 8, 5, 3), rng=rng, name='MaxPool2D 3×2, stride 2×1, padding 1×0')
    yield [check_pooling_of_equal_values(MaxPool2D(2), rng)]
    for mode in 'nearest', 'bilinear':
        yield check_layer(Upsample2D((3, 2), mode), normal(2, 4, 5, 3), rng=rng, name=f'Upsample2D 3×2, {mode}')
    yield check_layer(Conv2D(2, 3, **options), normal(2, 5, 4, 2), rng=rng, name='Conv2D 3×3')
    yield check_layer(Conv2D(3, 2, 1, **options), normal(2, 5, 4, 3), rng=rng, name='Conv2D 1×1')
    yield check_layer(Conv2D(2, 3, (5, 3), **options), normal(2, 4, 5, 2), rng=rng, name='Conv2D 5×3')
    yield check_layer(Conv2D(2, 3, bias=False, **options), normal(2, 5, 4, 2), rng=rng, name='Conv2D, no bias')
    yield check_layer(Conv2D(2, 3, stride=2, **options), normal(2, 5, 6, 2), rng=rng, name='Conv2D, stride 2')
    yield check_layer(Conv2D(2, 3, (2, 4), (1, 2), padding=0, **options), normal(2, 5, 7, 2), rng=rng,
                      name='Conv2D 2×4, stride 1×2, no padding')
    yield check_layer(Conv2D(2, 3, stride=(2, 3), padding=(0, 2), **options), normal(2, 6, 5, 2), rng=rng,
                      name='Conv2D, stride 2×3, padding 0×2')
    yield check_layer(Conv2D(2, 3, (3, 2), (1, 2), (2, 1), dilation=(2, 3), **options), normal(2, 6, 7, 2), rng=rng,
                      name='Conv2D 3×2, stride 1×2, padding 2×1, dilation 2×3')
    yield check_layer(Conv2D(5, 3, dilation=2, **options), normal(1, 5, 4, 5), rng=rng, name='Conv2D, dilation 2')
    yield check_layer(ConvTranspose2D(3, 2, **options), normal(2, 3, 4, 3), rng=rng, name='ConvTranspose2D 2×2')
    yield check_layer(ConvTranspose2D(2, 3, (3, 2), (3, 2), bias=False, **options), normal(2, 3, 4, 2), rng=rng,
                      name='ConvTranspose2D 3×2, no bias')
    yield check_layer(BatchNorm2D(3, dtype=float), normal(2, 5, 4, 3), rng=rng, name='BatchNorm2D, training')
    trained = BatchNorm2D(3, dtype=float)
    trained.forward(2 * normal(2, 5, 4, 3) + 1)
    yield check_layer(trained.eval(keep_cache=True), normal(2, 5, 4, 3), rng=rng, name='BatchNorm2D, inference')
    yield check_layer(Dropout(0.4, rng=rng), normal(2, 5, 4, 3), rng=rng)

    # The same layers at sizes for which other paths are the fast ones: work in several blocks, sums in several parts.
    wide = dict(rng=rng, methods=WIDE, directions=some_elements)
    yield check_layer(Conv2D(4, 5, **options), normal(2, 96, 90, 4), name='Conv2D 4→5 on 96×90', **wide)
    yield check_layer(Conv2D(9, 12, **options), normal(2, 22, 21, 9), name='Conv2D 9→12 on 22×21', **wide)
    yield check_layer(Conv2D(16, 20, **options), normal(8, 34, 45, 16), name='Conv2D 16→20 on 34×45', **wide)
    yield check_layer(Conv2D(34, 40, **options), normal(1, 10, 13, 34), name='Conv2D 34→40 on 10×13', **wide)
    yield check_layer(Conv2D(33, 70, **options), normal(4, 21, 26, 33), name='Conv2D 33→70 on 21×26', **wide)
    yield check_layer(Conv2D(140, 260, **options), normal(2, 3, 4, 140), name='Conv2D 140→260 on 3×4', **wide)
    yield check_layer(Conv2D(24, 1, 1, **options), normal(3, 100, 60, 24), name='Conv2D 1×1, 24→1 on 100×60', **wide)
    yield check_layer(ConvTranspose2D(36, 18, **options), normal(6, 24, 31, 36), name='ConvTranspose2D 36→18 on 24×31', **wide)
    yield check_layer(BatchNorm2D(16, dtype=float), normal(2, 96, 100, 16), name='BatchNorm2D on 96×100', **wide)

    shape = 3, 5, 4, 2
    yield check_loss(DiceLoss(), normal(*shape), mask(*shape), rng=rng)
    yield check_loss(DiceLoss(0.1, per_image=True), normal(*shape), mask(*shape), rng=rng, name='DiceLoss per image')
    yield check_loss(BCEWithLogitsLoss(), off_zero(*shape), mask(*shape), rng=rng)
    both = WeightedSum([(1.0, DiceLoss()), (0.5, BCEWithLogitsLoss())])
    yield check_loss(both, off_zero(*shape), mask(*shape), rng=rng)

    yield check_network(DenseAtrousConvolution(3, **options), normal(2, 9, 12, 3), rng=rng)
    yield check_network(ResidualMultiKernelPooling(3, **options), distinct(2, 7, 11, 3), rng=rng)
    for network in NETWORKS.values():
        name = network.__name__
        yield check_network(network(1, 1, base_channels=2, depth=2, input_mean=0.4, input_std=0.2, **options),
                            rng.random((2, 13, 19, 1)), rng=rng, name=f'{name}, 13×19')
        yield check_network(network(2, 3, base_channels=2, depth=3, norm=None, dropout=0.3, **options),
                            rng.random((2, 8, 17, 2)), rng=rng, name=f'{name}, no norm, dropout, 8×17')
        yield [check_inference(network(1, 1, base_channels=3, depth=2, **options), rng.random((2, 12, 17, 1)))]


def table(results):
    """Return the results as an aligned table, one line per gradient; below a wrong one, where it differs."""
    methods = [method for method in dict.fromkeys(result.method for result in results) if method]
    rows, details = [('layer', 'quantity', *methods, 'verdict', 'computed by')], ['']
    for layer, quantity in dict.fromkeys((result.layer, result.quantity) for result in results):
        group = [result for result in results if (result.layer, result.quantity) == (layer, quantity)]
        errors = {result.method: f'{result.error:.1e}' for result in group}
        rows.append((layer, quantity, *(errors.get(method, '') for method in methods),
                     'ok' if all(result.ok for result in group) else 'WRONG',
                     ', '.join(sorted(set().union(*(result.paths for result in group))))))
        details.append(''.join(f'\n    {result.method or quantity}: {result.detail}'
                               for result in group if not result.ok))
    widths = [max(map(len, column)) for column in zip(*rows)]
    return '\n'.join('  '.join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() + detail
                     for row, detail in zip(rows, details))


def main(arguments=None):
    """Check everything, print the table, and return the exit status: 0 if all gradients are right, else 1."""
    parser = argparse.ArgumentParser(
        prog='python -m nervenet.gradcheck', usage=argparse.SUPPRESS,
        description='Check the gradient of every layer, every loss and every network against measurements of it.')
    parser.add_argument('--seed', type=int, default=0, help='of the random weights, inputs and directions (default: 0)')
    seed, start = parser.parse_args(arguments).seed, time.perf_counter()
    if seed < 0:
        parser.error(f'--seed is {seed}; expected 0 or more')
    results = [result for results in suite(numpy.random.default_rng(seed)) for result in results]
    wrong = [result for result in results if not result.ok]
    print('Relative error of each gradient against each measurement of it')
    print(table(results))
    print(f'{len(results) - len(wrong)} of {len(results)} comparisons passed in {time.perf_counter() - start:.1f} s')
    return 1 if wrong else 0


if __name__ == '__main__':
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
