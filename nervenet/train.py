"""Training and using a network: one step, one epoch, one evaluation, one prediction.

Everything this library computes comes together in the few lines of `train_step`; the rest of this file repeats them and keeps score.
"""

import numpy

from .engine.backend import get_array_module, move, to_cpu
from .engine.communicator import add_up, sharing, whole_batch
from .engine.plan import planned
from .layers import forwards_replaced, inference, sigmoid
from .metrics import SegmentationScores
from .optim import clip_gradients


def train_step(model, loss, optimizer, x, target, max_norm=None, observe=None):
    """Make one step on the batch x (N, H, W, C_in), target (N, H, W, C_out); return the loss before it, 0-d.

    `max_norm` bounds the norm of the whole gradient; `observe` is passed on to the model's forward.
    """
    model.drop_gradients()                                              # those of the last step: room for what backward will need
    with planned(model, 'training', x.shape), sharing(len(x)):          # memory as in the last step; the batch with other processes
        value = loss.forward(model.forward(x, observe), target)
        model.backward(loss.backward(), input_gradient=False)
        add_up(model.gradients())                                       # over all processes, if there are several
        if max_norm is not None:
            clip_gradients(model.gradients(), max_norm)
        optimizer.step(model.gradients())
    return value


def predict(model, x, temperature=1.0):
    """Return the foreground probabilities σ(logits / temperature), (N, H, W, C_out), of images x (N, H, W, C_in) in inference mode."""
    with inference(), planned(model, 'inference', x.shape):
        return sigmoid(model.forward(x) / temperature)


def train_epoch(model, loss, optimizer, batches, schedule=None, max_norm=None):
    """Train on every batch once; return the scores over the epoch, a dict of name → float, 'loss' among them.

    The scores are those of the changing network on the batches as it met them, in training mode: a running account at no
    extra cost, not the score of the network at the end.

    Raises FloatingPointError, naming the batch, when logits or loss are no finite numbers. On the CPU that is at once, for logits
    before the step that would spoil the parameters, and the first layer at fault is named too. On a GPU, where looking at each
    step would make the host wait, only the losses are looked at, at the end of the epoch.
    """
    model.train()
    device, scores, losses, images = model.device, SegmentationScores(), [], []
    for number, (x, target) in enumerate(batches, 1):
        x, target = move(x, device), move(target, device)
        before = generator_states(model)

        def count(stage, y):
            if stage == 'head':
                if device == 'cpu' and not numpy.isfinite(y).all():
                    set_generator_states(model, before)
                    raise FloatingPointError(f'the logits are not finite at batch {number}; the first values that are not are '
                                             f'in {first_not_finite(model, x)}: lower --learning-rate, or look at that batch')
                scores.update(sigmoid(y), target)
                images.append(whole_batch(y)[0][0])

        if schedule is not None:
            optimizer.learning_rate = schedule(optimizer.steps)
        losses.append(train_step(model, loss, optimizer, x, target, max_norm, observe=count))
        if device == 'cpu' and not numpy.isfinite(losses[-1]):
            break
    return account(scores, losses, images)


def first_not_finite(model, x):
    """Return, in words, where the first NaN or infinite value appears on the way of x (N, H, W, C) through the model."""
    if not numpy.isfinite(x).all():
        return 'the images'
    found = []

    def watched(name, layer, forward):
        def function(*inputs):
            y = forward(*inputs)
            if not found and not numpy.isfinite(y).all():
                spoilt = [f'its {key} is not' for key, array in layer.params.items() if not numpy.isfinite(array).all()]
                found.append(f'the output of {name} ({", ".join(spoilt) or "its parameters are finite"})')
            return y
        return function

    with forwards_replaced(model, watched):
        model.forward(x)
    return found[0] if found else 'no layer'


def generator_states(model):
    """Return {name of a layer: state of its random generator}, of the layers that draw."""
    return {name: layer.rng.bit_generator.state for name, layer in model.layers() if hasattr(layer, 'rng')}


def set_generator_states(model, states):
    """Bring the random generators of the model's layers into the states that `generator_states` returned."""
    for name, layer in model.layers():
        if hasattr(layer, 'rng'):
            layer.rng.bit_generator.state = states[name]


def evaluate(model, loss, batches):
    """Return the scores of the model on every batch, in inference mode: a dict of name → float, 'loss' among them."""
    device, scores, losses, images = model.device, SegmentationScores(), [], []
    with inference():
        for x, target in batches:
            x, target = move(x, device), move(target, device)
            with planned(model, 'evaluation', x.shape), sharing(len(x)):
                logits = model.forward(x)
                losses.append(loss.forward(logits, target))
                scores.update(sigmoid(logits), target)
                images.append(whole_batch(x)[0][0])
    return account(scores, losses, images)


def account(scores, losses, images):
    """Return all scores and the mean loss, each batch weighted by its number of images. Raises FloatingPointError."""
    scores.pool()
    losses = to_cpu(get_array_module(*losses).stack(losses)).tolist()               # fetched once, not one by one
    for number, value in enumerate(losses, 1):
        if not numpy.isfinite(value):
            raise FloatingPointError(f'the loss is {value} at batch {number}: lower --learning-rate, or look at that batch')
    return {'loss': float(numpy.average(losses, weights=images)), **scores.compute()}
