"""Training and gradient checks that tests/test_communicator.py runs by itself, and again by several processes:

    mpiexec -n 3 python tests/shared_batches.py RESULTS.npz
"""

import contextlib
import sys

import numpy

import nervenet
from helpers import planted
from nervenet.engine import backend
from nervenet.engine.communicator import add_up, current, sharing, together, total
from nervenet.layers import BatchNorm2D
from nervenet.losses import BCEWithLogitsLoss, DiceLoss, WeightedSum
from nervenet.networks import NETWORKS
from nervenet.optim import SGD, Adam
from nervenet.train import evaluate, train_epoch

SIZES = 5, 2, 1, 4                              # of the batches, in turn: of three processes, one or two have no image of some
# Sums that a careless hand would leave to each process. Each must show.
BUGS = {
    'mean of batch norm': ('nervenet/engine/pixelwise.py', 'mean = total((n * m).sum(axis=0))[0] / M', 'mean = (n * m).sum(axis=0) / n.sum()'),
    'variance of batch norm': ('nervenet/engine/pixelwise.py', 'total((squares + n * (m - mean)**2).sum(axis=0))[0] / M',
                               '(squares + n * (m - mean)**2).sum(axis=0) / n.sum()'),
    'backward of batch norm': ('nervenet/layers.py', 'M = total(dbias, dweight), pixels', 'M = (dbias, dweight), pixels'),
    'pixels of batch norm': ('nervenet/layers.py', 'M = total(dbias, dweight), pixels_of_batch(x)', 'M = total(dbias, dweight), x[..., 0].size or 1'),
    'running variance': ('nervenet/layers.py', 'self.update_running(mean, variance, pixels_of_batch(x))',
                         'self.update_running(mean, variance, x[..., 0].size)'),
    'dropout': ('nervenet/layers.py', 'random(shape, dtype=\'float32\')[rows]', 'random(x.shape, dtype=\'float32\')'),
    'pooled Dice': ('nervenet/losses.py', 'return sums if self.per_image else total(*sums)', 'return sums'),
    'pixels of cross-entropy': ('nervenet/losses.py', 'number = math.prod(whole_batch(logits)[0])', 'number = logits.size or 1'),
    'gradients': ('nervenet/train.py', 'add_up(model.gradients())', 'model.gradients()'),
    'scores': ('nervenet/train.py', 'scores.pool()', 'scores'),
}


class Apart(Exception):
    """The processes do not have the same parameters or scores any more."""


def batches(number, sizes, device):
    """Yield this process's rows of so many batches (x, target), float64."""
    rng = numpy.random.default_rng(5)
    for step in range(number):
        images = sizes[step % len(sizes)]
        x = rng.random((images, 12, 20, 1))
        rows = current().rows(images)
        yield backend.move(x[rows], device), backend.move((x > 0.6).astype('float64')[rows], device)


def trained(network='unet', loss=None, optimizer=SGD, epochs=(1, 19), sizes=SIZES, device='cpu'):
    """Return {name: value} of all that training leaves, after epochs of so many steps: state, losses, scores; equal in all processes."""
    model = NETWORKS[network](base_channels=2, depth=2, dropout=0.3, rng=1, dtype='float64').to(device)
    loss = loss or WeightedSum([(1.0, DiceLoss()), (1.0, BCEWithLogitsLoss())])
    optimizer, found = optimizer(model.parameters(), 0.01), {}
    for steps in epochs:
        scores = {'train': train_epoch(model, loss, optimizer, batches(steps, sizes, device), max_norm=0.5),
                  'evaluation': evaluate(model.eval(), loss, batches(len(sizes), sizes, device))}
        state = {name: backend.to_cpu(array).copy() for name, array in model.state_dict().items()}
        found |= {f'{steps} steps, {name}': array for name, array in state.items()}
        found |= {f'{steps} steps, {part} {name}': value for part, values in scores.items() for name, value in values.items()}
    of_all = current().gather({name: numpy.asarray(value).tobytes() for name, value in found.items()})
    if any(of_one != of_all[0] for of_one in of_all):
        raise Apart
    return found


def all_cases():
    """Return {name: value} of trainings that between them take all ways: fast and plain, each loss, other layers."""
    cases = {'fast': dict(optimizer=Adam), 'per image': dict(loss=DiceLoss(per_image=True), epochs=(4,)),
             'residual': dict(network='resunet', epochs=(3,))}
    found = {f'{case}: {name}': value for case, options in cases.items() for name, value in trained(**options).items()}
    with nervenet.plain():
        return found | {f'plain: {name}': value for name, value in trained(epochs=(4,)).items()}


def largest_difference(found, other):
    """Return (difference, name) of where the two differ most."""
    assert found.keys() == other.keys()
    return max((float(numpy.abs(numpy.asarray(found[name]) - other[name]).max()), name) for name in found)


def gradient_faults():
    """Return how far gradients are from finite differences, relative to the largest gradient, by name: a change in one process's share
    moves the loss of all, through the sums of batch norm and of the losses."""
    rng, h, faults = numpy.random.default_rng(7), 1e-6, {}
    x, w = rng.standard_normal((2, 5, 3, 4, 2))                                 # the whole batch, and an upstream gradient
    y, rows = (rng.random(x.shape) < 0.3).astype('float64'), current().rows(len(x))
    norm = BatchNorm2D(2, dtype='float64')
    norm.params['weight'][:], norm.params['bias'][:] = rng.standard_normal((2, 2))

    def of_norm(x):
        return float(total(numpy.asarray((w[rows] * norm.forward(x[rows])).sum()))[0])

    def check(name, value, backward):
        """Compare backward(), this process's gradient, with differences of `value` at some places of all shares."""
        with sharing(rows.stop - rows.start):
            value(x)
            mine, worst = backward(), 0.0
            for place in [(n, n % 3, n % 4, n % 2) for n in range(len(x))]:
                up, down = x.copy(), x.copy()
                up[place] += h
                down[place] -= h
                measured = (value(up) - value(down)) / (2 * h)
                if rows.start <= place[0] < rows.stop:
                    worst = max(worst, abs(measured - mine[place[0] - rows.start, *place[1:]]))
            scale = max(current().gather(float(abs(mine).max(initial=0))))
            faults[name] = max(current().gather(worst)) / scale

    for way in contextlib.nullcontext, nervenet.plain:
        with way():
            kind = way.__name__
            check(f'batch norm, dx, {kind}', of_norm, lambda: norm.backward(w[rows]))
            with sharing(rows.stop - rows.start):
                norm.forward(x[rows])
                norm.backward(w[rows])
                add_up(norm.grads)
                for name, array in norm.params.items():
                    before, measured = array[1], []
                    for array[1] in before + h, before - h:
                        measured.append(of_norm(x))
                    array[1] = before
                    faults[f'batch norm, d{name}, {kind}'] = abs((measured[0] - measured[1]) / (2 * h) - norm.grads[name][1]) / 10
    for name, loss in ('Dice', DiceLoss()), ('Dice per image', DiceLoss(per_image=True)), ('cross-entropy', BCEWithLogitsLoss()):
        check(name, lambda x: float(loss.forward(x[rows], y[rows])), loss.backward)
    return faults


def harms():
    """Return how far each bug moves the result of a few steps, by name. No share is empty, or the processes would lose step."""
    sound, found = trained(epochs=(2,), sizes=(5, 3)), {}
    for name, bug in BUGS.items():
        with planted(*bug):
            try:
                found[f'bug: {name}'] = largest_difference(trained(epochs=(2,), sizes=(5, 3)), sound)[0]
            except Apart:
                found[f'bug: {name}'] = numpy.inf
    return found


def on_the_stand_in():
    """Train on the stand-in for CuPy: sums go through the host, then through what stands in for NCCL. Return both results."""
    from conftest import stand_in

    class NCCL:
        def all_reduce(self, vector, out):
            assert out is vector and isinstance(vector, stand_in.ndarray) and vector.flags.c_contiguous
            current().world.Allreduce(current().mpi.IN_PLACE, vector.host)
            self.calls = getattr(self, 'calls', 0) + 1

    before, backend.cupy = backend.cupy, stand_in
    current().use_device('gpu')
    assert current().gpus is None, 'this one has no NCCL'
    host = trained(epochs=(3,), device='gpu')
    current().gpus = NCCL()
    nccl = trained(epochs=(3,), device='gpu')
    assert current().gpus.calls > 3
    backend.cupy = before
    return host, nccl


def decisions():
    """What all processes decide alike, and what the first does alone."""
    processes, done = current(), []
    assert processes.any(processes.rank == processes.size - 1) and not processes.any(False)
    assert processes.gather(processes.rank) == [*range(processes.size)]
    assert processes.from_first(lambda: done.append(current().size) or 'said') == 'said' and done == [1] * (processes.rank == 0)
    try:
        processes.from_first(lambda: 1 // 0)
    except ZeroDivisionError as error:
        assert 'by zero' in str(error)
    else:
        raise AssertionError('an error of the first is an error of all')


def main(output):
    with together() as processes:
        found = all_cases() | {f'fault: {name}': value for name, value in gradient_faults().items()}
        decisions()
        if processes.size == 2:
            found |= harms()
            found |= {f'{way}: {name}': value for way, of_way in zip(('host', 'NCCL'), on_the_stand_in()) for name, value in of_way.items()}
        processes.from_first(lambda: numpy.savez(output, **found))


if __name__ == '__main__':
    main(sys.argv[1])
