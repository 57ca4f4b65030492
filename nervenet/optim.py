"""Optimizers: how a gradient becomes a step. In order: SGD, Adam, AdamW, then schedules of the learning rate.

The gradient g = ∂L/∂w says in which direction the loss L rises. An optimizer moves w the other way, and decides how
far:

    optimizer = Adam(model.parameters())
    …
    optimizer.learning_rate = schedule(optimizer.steps)
    clip_gradients(model.gradients(), max_norm=1.0)
    optimizer.step(model.gradients())

`parameters` and `gradients` are dicts of name → array under the same names. The parameters are the model's own arrays,
updated in place, so build the optimizer after `model.to(device)`, which replaces them. An optimizer only reads the
gradients.

A copy of an optimizer (`copy.deepcopy`, `pickle`) has parameters of its own, and steps those. To get a model and the
optimizer of its parameters, copy both at once: `model, optimizer = copy.deepcopy((model, optimizer))`.

In the equations, η is the learning rate, λ the weight decay, ← an update in place; all of it is element by element.
"""

import math

import numpy

from .checks import check_match, in_range
from .engine import kernels
from .engine.backend import device_of, get_array_module, move
from .engine.memory import empty, scratch
from .engine.parallel import cut, parallel_for

BLOCK_VALUES = 2**16                    # of a parameter, updated at once: they stay in the cache, with gradient and averages


class Optimizer:
    """What all optimizers share: parameters, running averages by name, the number of steps, weight decay.

    `learning_rate` is a plain attribute, to be set by hand or by a schedule. Weight decay holds every parameter near 0
    by adding λ·w, the gradient of λ/2·Σw², to g (AdamW does it in another way). Raises ValueError if a hyperparameter is out of
    its range.
    """

    averages = ()                                     # the names of the arrays kept for each parameter

    def __init__(self, parameters, learning_rate, weight_decay):
        if not parameters:
            raise ValueError('there are no parameters to optimize')
        self.parameters, self.steps = parameters, 0
        self.learning_rate = in_range('learning_rate', learning_rate, math.inf)
        self.weight_decay = in_range('weight_decay', weight_decay, math.inf)
        self.state = {average: self.zeros() for average in self.averages}

    @property
    def xp(self):
        """The array module of the parameters."""
        return get_array_module(*self.parameters.values())

    def step(self, gradients):
        """Update every parameter from the gradient of its name.

        Raises ValueError, and changes nothing, unless names, shapes and dtypes match and the learning rate is a finite number.

        To start an operation on a GPU takes longer than the operation itself takes on most parameters, and the rules are element
        by element. So there all parameters are one vector for the time of the step, and its running averages always are one.
        """
        check_match(self.parameters, gradients, 'gradient', 'the parameters')
        for name, w in self.parameters.items():
            if gradients[name].dtype != w.dtype:
                raise ValueError(f'the gradient of {name} is {gradients[name].dtype} and the parameter {w.dtype}; was a loss, or '
                                 'the input of the model, of another dtype than the model?')
        self.learning_rate = in_range('learning_rate', self.learning_rate, math.inf)
        self.steps += 1
        if self.xp is numpy:
            parallel_for(self.blocks(gradients), lambda block: self.advance(*block))
            return
        joined = self.join(self.parameters.values())
        self.advance(joined, self.join(gradients[name] for name in self.parameters), *self.state.values())
        for name, w in self.parted(joined).items():
            self.parameters[name][...] = w

    def blocks(self, gradients):
        """Yield [w, gradient, *averages] of all parameters, each in pieces: the rules are element by element."""
        for name, w in self.parameters.items():
            arrays = [w, gradients[name], *(self.state[average][name] for average in self.averages)]
            if all(array.flags.c_contiguous for array in arrays):
                for some in cut(w.size, BLOCK_VALUES):
                    yield [array.reshape(-1)[some] for array in arrays]
            else:
                yield arrays

    def advance(self, w, g, *averages):
        """Move `w`, a parameter or a piece of one, in place, given its gradient and its running averages, all of one shape."""
        on_host = get_array_module(w) is numpy
        decayed, free = (scratch(name, w.shape, w.dtype) if on_host else empty(w.shape, w) for name in ('decayed', 'update'))
        self.update(w, self.decayed(w, g, decayed), *averages, scratch=free)

    def zeros(self):
        """Return what one running average starts as: {name: zeros}, or, on a GPU, one vector for all parameters."""
        zeros = {name: self.xp.zeros_like(w) for name, w in self.parameters.items()}
        return zeros if self.xp is numpy else self.join(zeros.values())

    def join(self, arrays):
        """Return one vector of all values of `arrays`, which are in the order of the parameters."""
        return self.xp.concatenate([array.ravel() for array in arrays])

    def parted(self, vector):
        """Return {name: its part of the vector, a view in the shape of the parameter}."""
        parts, start = {}, 0
        for name, w in self.parameters.items():
            parts[name] = vector[start:start + w.size].reshape(w.shape)
            start += w.size
        return parts

    def decayed(self, w, g, scratch):
        """Return g + λ·w, computed in `scratch`; without weight decay that is g itself."""
        if self.weight_decay == 0:
            return g
        xp = get_array_module(w)
        xp.multiply(w, self.weight_decay, out=scratch)
        return xp.add(g, scratch, out=scratch)

    def update(self, w, g, *averages, scratch):
        """Move `w`, a parameter or a piece of one, in place, given g, its running averages, and `scratch`, free to be overwritten."""
        raise NotImplementedError(f'{type(self).__name__} has no update rule')

    def state_dict(self):
        """Return {'steps': int, 'velocity.stem.conv1.weight': array, …}: with the parameters, all that resuming needs.

        The arrays are the live ones; copy them to keep them. The learning rate is not part of it: a schedule computes
        it from the number of steps.
        """
        return {'steps': self.steps} | self.arrays()

    def arrays(self):
        """Return the running averages under flat names, as views."""
        parted = self.state if self.xp is numpy else {average: self.parted(vector) for average, vector in self.state.items()}
        return {f'{average}.{name}': array for average, arrays in parted.items() for name, array in arrays.items()}

    def load_state_dict(self, state):
        """Copy `state`, as `state_dict` returns it, into this optimizer.

        Raises ValueError, and changes nothing, unless all names and shapes match.
        """
        if 'steps' not in state:
            raise ValueError("the optimizer state has no entry 'steps'; was it written by state_dict()?")
        own, loaded = self.arrays(), {name: array for name, array in state.items() if name != 'steps'}
        check_match(own, loaded, 'optimizer state', 'the parameters')
        for name, array in own.items():
            array[...] = move(loaded[name], device_of(array))
        self.steps = int(state['steps'])


class SGD(Optimizer):
    """Stochastic gradient descent: a small step against the gradient, optionally with momentum μ.

        v ← μ·v + g,    w ← w − η·v               v remembers earlier gradients, old ones ever less; μ = 0 forgets them
        v ← μ·v + g,    w ← w − η·(g + μ·v)       with Nesterov: the v that the next step would have if g stayed

    Along a valley the remembered gradients add up, to 1/(1 − μ) times one gradient; across it they cancel. v starts at
    0. Source: Sutskever et al. 2013, "On the importance of initialization and momentum in deep learning", with η
    outside of v, so that a new η acts at once.
    """

    averages = ('velocity',)

    def __init__(self, parameters, learning_rate, momentum=0.0, nesterov=False, weight_decay=0.0):
        super().__init__(parameters, learning_rate, weight_decay)
        self.momentum, self.nesterov = in_range('momentum', momentum, 1), nesterov
        if nesterov and momentum == 0:
            raise ValueError('nesterov needs a momentum above 0')

    def update(self, w, g, v, scratch):
        xp = get_array_module(w)
        v *= self.momentum
        v += g
        if self.nesterov:
            xp.multiply(v, self.momentum, out=scratch)
            scratch += g
        step = scratch if self.nesterov else v
        w -= xp.multiply(step, self.learning_rate, out=scratch)


class Adam(Optimizer):
    """Adaptive moments: every element gets a step size of its own, near η whatever the scale of its gradient.

        m ← β₁·m + (1 − β₁)·g           the mean of recent gradients
        v ← β₂·v + (1 − β₂)·g²          the mean of their squares
        w ← w − η·m̂ / (√v̂ + ε)          m̂ = m / (1 − β₁ᵗ),  v̂ = v / (1 − β₂ᵗ)

    m and v start at 0 and are too small at first; step t = 1, 2, … divides by just what is missing. `betas` is (β₁,
    β₂). Source: Kingma & Ba 2015 (arXiv:1412.6980), Algorithm 1, in the order of operations of its §2: the two
    corrections are numbers, so they are moved out of the arrays into η and ε.
    """

    averages = 'mean', 'mean_square'

    def __init__(self, parameters, learning_rate=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
        super().__init__(parameters, learning_rate, weight_decay)
        self.betas = in_range('betas[0]', betas[0], 1), in_range('betas[1]', betas[1], 1)
        self.eps = in_range('eps', eps, math.inf)
        if eps == 0:
            raise ValueError('eps is 0; it must be positive, or a gradient of 0 would divide 0 by 0')

    def update(self, w, g, m, v, scratch):
        xp = get_array_module(w)
        beta1, beta2 = self.betas
        correction1, correction2 = 1 - beta1**self.steps, math.sqrt(1 - beta2**self.steps)
        eta, eps = self.learning_rate * correction2 / correction1, self.eps * correction2
        if kernels.can_compute(w, g, m, v):
            kernels.adam(w, g, m, v, self.betas, eta, eps)
            return
        m *= beta1
        m += xp.multiply(g, 1 - beta1, out=scratch)
        v *= beta2
        xp.multiply(g, g, out=scratch)
        v += xp.multiply(scratch, 1 - beta2, out=scratch)
        xp.sqrt(v, out=scratch)                       # η·(m / c₁) / (√v / c₂ + ε)  =  (η·c₂/c₁) · m / (√v + ε·c₂)
        scratch += eps
        xp.divide(m, scratch, out=scratch)
        scratch *= eta
        w -= scratch


class AdamW(Adam):
    """Adam with decoupled weight decay: λ·w is taken off the parameter itself instead of being added to the gradient.

        w ← w − η·λ·w,    then the step of Adam with g alone

    In Adam, a decay added to g is divided by √v̂ with it, so parameters with large gradients hardly decay; here all
    shrink by the same share. The decay follows the learning rate through its schedule. Source: Loshchilov & Hutter 2019
    (arXiv:1711.05101), Algorithm 2, with η for its product of schedule and step size, and λ scaled so that the decay
    per step is η·λ.
    """

    def __init__(self, parameters, learning_rate=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01):
        super().__init__(parameters, learning_rate, betas, eps, weight_decay)

    def decayed(self, w, g, scratch):
        """Shrink w, and return g as it is."""
        w *= 1 - self.learning_rate * self.weight_decay
        return g


def clip_gradients(gradients, max_norm):
    """Scale all `gradients` in place by one factor, so that their norm is at most `max_norm`; return the norm before.

    The norm √Σg² runs over all elements of all arrays and accumulates in float64. One factor for all keeps the
    direction of the step (Pascanu, Mikolov & Bengio 2013, Algorithm 1). The norm is a 0-d value on the device of the
    gradients, and the factor stays there too: nothing waits. Raises ValueError unless `max_norm` is a positive number.

    A NaN among the gradients makes all of them NaN, and an infinite one is NaN afterwards and all others are 0: no factor would be
    right. The norm that is returned shows it, NaN or ∞, and so does the loss of the next batch.
    """
    if not 0 < max_norm < math.inf:
        raise ValueError(f'max_norm is {max_norm}; expected a positive number')
    max_norm = float(max_norm)
    xp = get_array_module(*gradients.values())
    norm = xp.sqrt(sum(xp.square(g, dtype='float64').sum() for g in gradients.values()))
    factor = max_norm / xp.maximum(norm, max_norm)    # 1 for a small norm, and no division by a norm of 0
    for g in gradients.values():
        g *= factor.astype(g.dtype)
    return norm


class ConstantSchedule:
    """The learning rate `base` at every step, after a linear rise over the first `warmup_steps`.

    A schedule is called with the number of steps done so far and returns the rate of the next one. The warm-up takes
    small steps while the running averages of the optimizer and of batch norm still rest on few batches; it ends at
    `base`, with base·(step + 1)/warmup_steps on the way.
    """

    def __init__(self, base, warmup_steps=0):
        self.base, self.warmup_steps = in_range('base', base, math.inf), in_range('warmup_steps', warmup_steps, math.inf)

    def __call__(self, step):
        if step < self.warmup_steps:
            return self.base * (step + 1) / self.warmup_steps
        return self.base


class CosineSchedule(ConstantSchedule):
    """After the warm-up, half a cosine from `base` down to `final` at step `total_steps`, and `final` from then on.

        final + (base − final)·½·(1 + cos(π·progress))          progress from 0 at the end of the warm-up to 1

    It stays high for long, falls fast, and ends in small steps that settle into the minimum.
    Source: Loshchilov & Hutter 2017 (arXiv:1608.03983), equation 5, without restarts.
    """

    def __init__(self, base, total_steps, warmup_steps=0, final=0.0):
        super().__init__(base, warmup_steps)
        self.final, self.total_steps = in_range('final', final, math.inf), in_range('total_steps', total_steps, math.inf)
        if not total_steps > warmup_steps:
            raise ValueError(f'total_steps is {total_steps}; it must be above warmup_steps, which is {warmup_steps}')

    def __call__(self, step):
        if step < self.warmup_steps:
            return super().__call__(step)
        progress = min(1.0, (step - self.warmup_steps) / (self.total_steps - self.warmup_steps))
        return self.final + (self.base - self.final) * 0.5 * (1 + math.cos(math.pi * progress))
