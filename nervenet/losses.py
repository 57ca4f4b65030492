"""Loss functions: one number that says how wrong the logits are, and its gradient with respect to every logit.

A loss is a layer whose output is that number:

    value = loss.forward(logits, target)     # 0-d, float64, on the device of the logits
    dlogits = loss.backward()                # ∂value/∂logits, in the shape and dtype of the logits

`logits` (N, H, W, C) are the network's raw outputs, any real numbers; `target` (N, H, W, C) is 0 for background and 1 for foreground, or
between them where that is uncertain, in any dtype. The losses apply the sigmoid p = σ(logits) themselves, because the two together can be
computed for logits of any size, where the logarithm of a sigmoid that has rounded to 0 is −∞.

A target outside [0, 1], such as a mask of 0 and 255, would make nonsense of every loss. On the CPU it raises ValueError. On a GPU, where
to look would be to wait, the loss is NaN.

Sums run over many pixels, so they accumulate in float64 whatever the dtype of the logits, and over the whole batch, of which several
processes may each have a share (`total`). Nothing here fetches the value from the device: the caller decides when to wait for it.
"""

import math

from .checks import checked_target
from .engine.backend import get_array_module
from .engine.communicator import total, whole_batch
from .layers import Layer, sigmoid


class DiceLoss(Layer):
    """Minus the soft Dice coefficient: −1 is perfect, 0 the worst.

        L = −(2·Σpy + s) / (Σp + Σy + s)        p = σ(logits), s = smooth

    The sums run over all pixels of the batch, or, if `per_image` is true, over each image by itself, and L is the mean over the images. With
    several output channels each channel has sums of its own, and L is the mean over the channels too. `smooth` is positive: it gives −1
    where target and prediction are both empty, instead of 0/0.

    Dice counts foreground only, so it does not drown in background as a mean over all pixels does: where 3 % of the pixels are nerve, an
    empty mask has an accuracy of 97 % and a Dice of 0.

    Source: Milletari, Navab & Ahmadi 2016 (arXiv:1606.04797), §3, with plain sums in place of squared ones, and with s.
    """

    def __init__(self, smooth=1.0, per_image=False):
        super().__init__()
        if not 0 < smooth < math.inf:
            raise ValueError(f'smooth is {smooth}; expected a positive number, or two empty masks would divide 0 by 0')
        self.smooth, self.per_image = float(smooth), per_image

    def forward(self, logits, target):
        """Return L. Raises ValueError unless logits and target, both (N, H, W, C), fit; see `checked_target`."""
        y, doubt = checked_target(logits, target)
        p = sigmoid(logits)
        common, predicted, true = self.sums(p * y, p, y)                 # (1, 1, 1, C), or (N, 1, 1, C) per image
        overlap, extent = 2 * common + self.smooth, predicted + true + self.smooth
        value, fractions = (overlap / extent).sum(), overlap.size
        if self.per_image:
            (value,), fractions = total(value), math.prod(whole_batch(overlap)[0])
        self.keep(logits, y, overlap, extent, fractions)
        return doubt - value / fractions

    def backward(self):
        """Return ∂L/∂logits, (N, H, W, C).

        One p enters the overlap with 2y and the extent with 1. By the quotient rule, and then the chain rule through σ,

            ∂L/∂p = overlap / extent² − 2y / extent        ∂p/∂logits = p·(1 − p) = σ(x)·σ(−x)

        In the last form no digits are lost where p is near 1: in float32, 1 − p is 0 from x = 17 on, and a false alarm that the network is
        sure of would never be unlearned.
        """
        logits, y, overlap, extent, fractions = self.take()              # L is the mean of so many
        background = (overlap / extent**2 / fractions).astype(y.dtype)   # what every pixel receives
        foreground = (2 / extent / fractions).astype(y.dtype)            # what pixels with y = 1 receive on top
        return (background - foreground * y) * (sigmoid(logits) * sigmoid(-logits))

    def sums(self, *arrays):
        """Return the sums over the arrays (N, H, W, C) that a Dice fraction is made of, in float64 or complex128."""
        axes, dtype = (1, 2) if self.per_image else (0, 1, 2), get_array_module(arrays[0]).result_type(arrays[0].dtype, 'float64')
        sums = [x.sum(axis=axes, keepdims=True, dtype=dtype) for x in arrays]
        return sums if self.per_image else total(*sums)


class BCEWithLogitsLoss(Layer):
    """Binary cross-entropy, the mean over all pixels of −y·ln p − (1 − y)·ln(1 − p): 0 is perfect, ln 2 is a coin toss.

    With p = σ(x) written out, a pixel costs ln(1 + eˣ) − x·y. In this form eˣ overflows for a large x; forward computes
    ln(1 + eˣ) as max(x, 0) + ln(1 + e^−|x|), which is the same and has no positive exponent. |x| is written as 2·max(x, 0) − x, because
    the absolute value of a complex number is real, and the complex step of `gradcheck` would end there.
    """

    def forward(self, logits, target):
        """Return L. Raises ValueError unless logits and target, both (N, H, W, C), fit; see `checked_target`."""
        y, doubt = checked_target(logits, target)
        xp = get_array_module(logits)
        positive = xp.maximum(logits, 0)
        softplus = positive + xp.log1p(xp.exp(logits - 2 * positive))    # x − 2·max(x, 0) is −|x|
        number = math.prod(whole_batch(logits)[0])
        self.keep(logits, y, number)
        return doubt + total((softplus - logits * y).sum(dtype=xp.result_type(logits.dtype, 'float64')))[0] / number

    def backward(self):
        """Return ∂L/∂logits, (N, H, W, C): as ln(1 + eˣ) has the derivative σ(x), a pixel receives (p − y) / number."""
        logits, y, number = self.take()
        return (sigmoid(logits) - y) / number


class WeightedSum(Layer):
    """A weighted sum of losses: `WeightedSum([(1.0, DiceLoss()), (0.5, BCEWithLogitsLoss())])`. The weights are finite numbers."""

    def __init__(self, weighted_losses):
        super().__init__()
        # As Python's floats: a number of NumPy's would turn float32 gradients, and so all of backward, into float64.
        self.weights = [float(weight) for weight, _ in weighted_losses]
        self.children = {str(i): loss for i, (_, loss) in enumerate(weighted_losses)}
        if not self.children:
            raise ValueError('a weighted sum of losses needs at least one pair (weight, loss)')
        if not all(map(math.isfinite, self.weights)):
            raise ValueError(f'the weights of the losses are {self.weights}; expected finite numbers')

    def forward(self, logits, target):
        """Return Σ weight · loss from logits and target, both (N, H, W, C)."""
        return sum(weight * loss.forward(logits, target) for weight, loss in zip(self.weights, self.children.values()))

    def backward(self):
        """Return ∂L/∂logits, (N, H, W, C): the gradient of a weighted sum is the weighted sum of the gradients."""
        return sum(weight * loss.backward() for weight, loss in zip(self.weights, self.children.values()))
