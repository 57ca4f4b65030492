"""Loss functions: one number that says how wrong the logits are, and its gradient with respect to every logit.

A loss is a layer whose output is that number:

    value = loss.forward(logits, target)     # 0-d, float64, on the device of the logits
    dlogits = loss.backward()                # ∂value/∂logits, in the shape and dtype of the logits

`logits` (N, H, W, C) are the network's raw outputs, any real numbers; `target` (N, H, W, C) is 0 for background and 1
for foreground, in any dtype. The losses apply the sigmoid p = σ(logits) themselves, because the two together can be
computed for logits of any size, where the logarithm of a sigmoid that has rounded to 0 is −∞.

Sums run over many pixels, so they accumulate in float64 whatever the dtype of the logits. Nothing here fetches the
value from the device: the caller decides when to wait for it.
"""

from .engine.backend import get_array_module
from .layers import Layer, sigmoid


class DiceLoss(Layer):
    """Minus the soft Dice coefficient: −1 is perfect, 0 the worst.

        L = −(2·Σpy + s) / (Σp + Σy + s)        p = σ(logits), s = smooth

    The sums run over all pixels of the batch, or, if `per_image` is true, over each image by itself, and L is the mean
    over the images. With several output channels each channel has sums of its own, and L is the mean over the channels
    too. `smooth` is positive: it gives −1 where target and prediction are both empty, instead of 0/0.

    Dice counts foreground only, so it does not drown in background as a mean over all pixels does: where 3 % of the
    pixels are nerve, an empty mask has an accuracy of 97 % and a Dice of 0.

    Source: Milletari, Navab & Ahmadi 2016 (arXiv:1606.04797), §3, with plain sums in place of squared ones, and with s.
    """

    def __init__(self, smooth=1.0, per_image=False):
        super().__init__()
        if not smooth > 0:
            raise ValueError(f'smooth is {smooth}; it must be positive, or two empty masks would divide 0 by 0')
        self.smooth, self.per_image = smooth, per_image

    def forward(self, logits, target):
        """Return L. Raises ValueError if logits and target, both (N, H, W, C), differ in shape."""
        check_shapes(logits, target)
        p, y = sigmoid(logits), target.astype(logits.dtype, copy=False)
        overlap = 2 * self.sums(p * y) + self.smooth                     # (1, 1, 1, C), or (N, 1, 1, C) per image
        extent = self.sums(p) + self.sums(y) + self.smooth               # the same
        self.keep(p, y, overlap, extent)
        return -(overlap / extent).mean()

    def backward(self):
        """Return ∂L/∂logits, (N, H, W, C).

        One p enters the overlap with 2y and the extent with 1. By the quotient rule, and then the chain rule through σ,

            ∂L/∂p = overlap / extent² − 2y / extent        ∂p/∂logits = p·(1 − p)
        """
        p, y, overlap, extent = self.take()
        fractions = overlap.size                                         # L is their mean
        background = (overlap / extent**2 / fractions).astype(p.dtype)   # what every pixel receives
        foreground = (2 / extent / fractions).astype(p.dtype)            # what pixels with y = 1 receive on top
        return (background - foreground * y) * (p * (1 - p))

    def sums(self, x):
        """Return the sums over x (N, H, W, C) that a Dice fraction is made of, in float64 or complex128."""
        axes = (1, 2) if self.per_image else (0, 1, 2)
        return x.sum(axis=axes, keepdims=True, dtype=get_array_module(x).result_type(x.dtype, 'float64'))


class BCEWithLogitsLoss(Layer):
    """Binary cross-entropy, the mean over all pixels of −y·ln p − (1 − y)·ln(1 − p): 0 is perfect, ln 2 is a coin toss.

    With p = σ(x) written out, a pixel costs ln(1 + eˣ) − x·y. In this form eˣ overflows for a large x; forward computes
    ln(1 + eˣ) as max(x, 0) + ln(1 + e^−|x|), which is the same and has no positive exponent.
    """

    def forward(self, logits, target):
        """Return L. Raises ValueError if logits and target, both (N, H, W, C), differ in shape."""
        check_shapes(logits, target)
        xp, y = get_array_module(logits), target.astype(logits.dtype, copy=False)
        positive = xp.maximum(logits, 0)
        softplus = positive + xp.log1p(xp.exp(logits - 2 * positive))    # x − 2·max(x, 0) is −|x|
        self.keep(logits, y)
        return (softplus - logits * y).mean(dtype=xp.result_type(logits.dtype, 'float64'))

    def backward(self):
        """Return ∂L/∂logits, (N, H, W, C): as ln(1 + eˣ) has the derivative σ(x), a pixel receives (p − y) / number."""
        logits, y = self.take()
        return (sigmoid(logits) - y) / logits.size


class WeightedSum(Layer):
    """A weighted sum of losses: `WeightedSum([(1.0, DiceLoss()), (0.5, BCEWithLogitsLoss())])`."""

    def __init__(self, weighted_losses):
        super().__init__()
        self.weights = [weight for weight, _ in weighted_losses]
        self.children = {str(i): loss for i, (_, loss) in enumerate(weighted_losses)}
        if not self.children:
            raise ValueError('a weighted sum of losses needs at least one pair (weight, loss)')

    def forward(self, logits, target):
        """Return Σ weight · loss from logits and target, both (N, H, W, C)."""
        return sum(weight * loss.forward(logits, target) for weight, loss in zip(self.weights, self.children.values()))

    def backward(self):
        """Return ∂L/∂logits, (N, H, W, C): the gradient of a weighted sum is the weighted sum of the gradients."""
        return sum(weight * loss.backward() for weight, loss in zip(self.weights, self.children.values()))


def check_shapes(logits, target):
    """Raise ValueError unless the shapes are equal: broadcasting would compare the wrong pixels in silence."""
    if logits.shape != target.shape:
        raise ValueError(f'logits {logits.shape} and target {target.shape} differ in shape; both must be (N, H, W, C)')
