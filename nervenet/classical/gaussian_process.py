"""A Gaussian process classifier: how likely is a point of class 1, given examples whose class is known? And logistic regression beside it.

Logistic regression puts one plane over the space of features: p = s(w·x + b), with s(f) = 1 / (1 + exp(−f)). A Gaussian process puts a
landscape f there, of which is believed only that near points have similar heights:

    cov(f(x), f(x′)) = k(x, x′) = σ² exp(−½ Σ_d (x_d − x′_d)² / ℓ_d²)              p = s(f(x))

Picture a rubber sheet: each example of class 1 pulls it up where it lies, each of class 0 down. σ says how far it can be pulled, the length
scale ℓ_d how far along feature d a pull is felt. Far from all examples the sheet lies at height 0, p = ½: it knows what it does not know.

What is known of f after n examples is no Gaussian. Laplace's approximation puts one on its peak f̂, as wide as the curvature there says:

    f | examples  ≈  N(f̂, (K⁻¹ + W)⁻¹),     W = diag(π(1 − π)),  π = s(f̂)

and the volume under it approximates the evidence q(classes | σ², ℓ): high for a sheet that explains the examples without being able to
explain anything. So q chooses σ² and ℓ, and no validation set is needed.

Source: Rasmussen & Williams 2006, "Gaussian Processes for Machine Learning": Algorithms 3.1 (`laplace`), 3.2 (`predict`), 5.1 (`evidence`).
Only B = I + W^½ K W^½ is ever inverted, whose eigenvalues are 1 and more, so K needs no jitter. They keep B's Cholesky factor; NumPy solves
no triangular systems, so R = W^½ B⁻¹ W^½ is kept here. Work grows as n³, memory as n²: take a thousand examples. Our choice: Newton's
step is halved until it does not go down; the mean probability is a Gauss-Hermite sum of 32 points; how σ² and ℓ are searched.

All is computed in float64. Shapes: x (n, D), n points of D features; target (n,), their classes, 0 or 1.
"""

import math
from collections import namedtuple

import numpy

from ..checks import finite, in_range, positive
from ..engine.parallel import one_thread_per_product, parallel_for
from ..optim import Adam, CosineSchedule

NODES, WEIGHTS = numpy.polynomial.hermite.hermgauss(32)             # ∫ g(z) exp(−z²) dz ≈ Σ WEIGHTS·g(NODES)
TOLERANCE = 1e-9                                                    # of the logarithm of a probability, where Newton ends
LENGTH_SCALES, VARIANCES = (0.3, 100.0), (1e-2, 1e3)                # between which `fit` searches

# What is known of f at n examples, N(f, (K⁻¹ + W)⁻¹): a (n,), K⁻¹f, which is target − π at the mode f (n,); R (n, n), W^½ B⁻¹ W^½; log q.
Posterior = namedtuple('Posterior', 'a f R log_evidence')
# For each point, (n,): the mean and the variance of f there, and the probability of class 1, averaged over both.
Prediction = namedtuple('Prediction', 'mean variance probability')


def sigmoid(f):
    """Return s(f) = 1 / (1 + exp(−f)), for f of any size."""
    return numpy.exp(-numpy.logaddexp(0, -f))


def squared_exponential(a, b, variance=1.0):
    """Return k (A, B) for points a (A, D) and b (B, D), whose features are divided by their length scales already."""
    distance = (a * a).sum(1)[:, None] + (b * b).sum(1) - 2 * (a @ b.T)
    return variance * numpy.exp(-0.5 * numpy.maximum(distance, 0))


def maximise(objective, newton_step, place):
    """Return where a concave function is largest, by Newton's method: a step that would overshoot is halved until it does not go down."""
    value = objective(place)
    for _ in range(100):
        step, share = newton_step(place), 1.0
        while (found := objective(place + share * step)) < value - TOLERANCE:
            share /= 2
        place, gain, value = place + share * step, found - value, found
        if share == 1 and gain < TOLERANCE:
            return place
    raise RuntimeError(f"Newton's method has not come to rest after 100 steps, at a value of {value}; are there values of very different "
                       'size?')


@one_thread_per_product()
def laplace(K, target, start=None):
    """Return the Posterior for the covariance K (n, n) before the classes were known. `start` (n,) is the `a` to search from.

    log p(target, f) = −½ fᵀK⁻¹f + Σ log s(±f), with + for class 1, is concave: its only top is f̂. With f = Ka it needs no K⁻¹.
    """
    sign = 2.0 * target - 1

    def objective(a):
        f = K @ a
        return -0.5 * (a @ f) - numpy.logaddexp(0, -sign * f).sum()

    def curvature(f):
        """Return (π, W^½, B)."""
        p = sigmoid(f)
        root = numpy.sqrt(p * (1 - p))
        return p, root, numpy.eye(len(f)) + root[:, None] * K * root

    def newton_step(a):
        f = K @ a
        p, root, B = curvature(f)
        b = root**2 * f + target - p
        return b - root * numpy.linalg.solve(B, root * (K @ b)) - a

    a = maximise(objective, newton_step, numpy.zeros(len(K)) if start is None else start)
    _, root, B = curvature(K @ a)
    # log q = log p(target, f̂) − ½ log |B|
    return Posterior(a, K @ a, root[:, None] * numpy.linalg.inv(B) * root, objective(a) - 0.5 * numpy.linalg.slogdet(B)[1])


@one_thread_per_product()
def evidence(x, target, log_variance, log_length_scales, start=None):
    """Return (gradient, posterior): of log q, the posterior's `log_evidence`, by log σ² (1,) and by log ℓ (D,), under these names.

    log q depends on a hyperparameter θ through K, and through f̂, which moves with K. Both together are Σ_ij M_ij ∂K_ij/∂θ, with one M:

        M = ½ uuᵀ − ½ R + ½(quᵀ + uqᵀ),    u = target − π,  q = (I − RK) g
        g_i = ∂log q/∂f̂_i = −½ Σ_ii π_i (1 − π_i)(1 − 2π_i),    Σ = K − KRK, the covariance of f

    And ∂K_ij/∂log σ² = K_ij, ∂K_ij/∂log ℓ_d = K_ij (x_id − x_jd)² / ℓ_d².
    """
    z = x / numpy.exp(log_length_scales)
    K = squared_exponential(z, z, math.exp(log_variance[0]))
    posterior = laplace(K, target, start)
    p, R = sigmoid(posterior.f), posterior.R
    g = -0.5 * (K.diagonal() - (K * (R @ K)).sum(0)) * p * (1 - p) * (1 - 2 * p)
    u, q = target - p, g - R @ (K @ g)
    qu = numpy.outer(q, u)
    G = 0.5 * (numpy.outer(u, u) - R + qu + qu.T) * K                                      # M ⊙ K, (n, n)
    # Σ_ij G_ij (z_i − z_j)², with the square multiplied out: G is symmetric.
    by_length = 2 * ((z * z).T @ G.sum(1) - (z * (G @ z)).sum(0))
    return {'log_variance': G.sum(keepdims=True)[0], 'log_length_scales': by_length}, posterior


class Classifier:
    """What both share: features of mean 0 and deviation 1 over the examples of `fit`, and errors for what does not fit."""

    centre, scale, features = 0.0, 1.0, None

    def examples(self, x, target, standardise=True):
        """Return (x, target), float64, scaled, or raise ValueError."""
        x, target = finite(x, 'x', '(points, features)').astype(numpy.float64), numpy.asarray(target)
        if target.shape != x.shape[:1] or target.dtype.kind not in 'biuf' or not ((target == 0) | (target == 1)).all():
            raise ValueError(f'target has shape {target.shape} and dtype {target.dtype}; expected {x.shape[:1]}, of 0 and 1 alone')
        if standardise:
            if target.min() == target.max():
                raise ValueError(f'all {len(target)} examples are of class {target[0]:g}; expected some of each class')
            deviation = x.std(0)
            varies = deviation > 1e-12 * abs(x).max(0)                                     # else all of it is rounding: leave it
            self.centre, self.scale = x.mean(0), numpy.where(varies, deviation, 1)
        return (x - self.centre) / self.scale, target.astype(numpy.float64)

    def points(self, x):
        """Return x, scaled as the examples were. Raises RuntimeError before there were any, and ValueError if x does not fit them."""
        if self.features is None:
            raise RuntimeError(f'{type(self).__name__} has seen no examples: call fit first')
        x = finite(x, 'x', '(points, features)').astype(numpy.float64)
        if x.shape[1] != self.features:
            raise ValueError(f'the points have {x.shape[1]} features, the examples had {self.features}')
        return (x - self.centre) / self.scale


class GaussianProcess(Classifier):
    """`fit` finds σ², `variance`, and ℓ, `length_scales`, of scaled features, (D,) or one for all; `condition` takes what is there."""

    learnt = 'centre', 'scale', 'x', 'target', 'variance', 'length_scales'         # all else follows from these

    def __init__(self, variance=1.0, length_scales=1.0):
        self.variance, self.length_scales = variance, length_scales

    def fit(self, x, target, steps=80, starts=2, seed=0):
        """Find scaling and hyperparameters, and learn from the examples. Returns the classifier.

        Maximises log q plus the logarithm of a prior by Adam, with a rate of 0.1 that falls to 0 over half a cosine, and takes the best of
        all steps of all `starts`. Our choice, for features of deviation 1: log ℓ_d ~ N(½ log D, 1), since distances in D dimensions grow as
        √D; no prior for σ²; ℓ within LENGTH_SCALES, σ² within VARIANCES. The first start is σ² = 1 and the mean of the prior, the others
        are drawn: log ℓ from the prior, log σ² from N(0, 1). The result does not depend on the number of cores.
        """
        steps, starts, rng = positive(steps, 'steps'), positive(starts, 'starts'), numpy.random.default_rng(seed)
        scaled, classes = self.examples(x, target)
        noise = [rng.standard_normal(scaled.shape[1] + 1) * (number > 0) for number in range(starts)]
        found = parallel_for(noise, lambda start: climb(scaled, classes, steps, start))
        _, (self.variance,), self.length_scales = max(found, key=lambda each: each[0])
        return self.condition(x, target)

    @one_thread_per_product()
    def condition(self, x, target):
        """Learn from the examples x (n, D) and target (n,), hyperparameters and scaling as they are. Returns the classifier."""
        self.x, self.variance, scales = x, in_range('variance', self.variance, math.inf), numpy.asarray(self.length_scales, numpy.float64)
        scaled, self.target = self.examples(x, target, standardise=False)
        if scales.shape not in ((), scaled.shape[1:]) or not (numpy.isfinite(scales) & (scales > 0)).all():
            raise ValueError(f'length_scales is {scales}; expected a positive number, or one for each of {scaled.shape[1]} features')
        self.length_scales = numpy.broadcast_to(scales, scaled.shape[1:])
        self.known = scaled / self.length_scales
        self.posterior = laplace(squared_exponential(self.known, self.known, self.variance), self.target)
        self.features = scaled.shape[1]
        return self

    log_evidence = property(lambda self: self.posterior.log_evidence, doc='log q of the examples')

    @one_thread_per_product()
    def predict(self, x, shift=0.0):
        """Return the Prediction for points x (n, D), `shift` added to f (`odds_shift`).

        With k the covariance of a point with the examples, the mean is kᵀ(target − π), all pulls, and the variance σ² − kᵀRk.
        """
        points = self.points(x) / self.length_scales
        k = squared_exponential(self.known, points, self.variance)                         # (examples, points)
        mean, variance = self.posterior.a @ k + shift, numpy.maximum(self.variance - (k * (self.posterior.R @ k)).sum(0), 0)
        return Prediction(mean, variance, mean_probability(mean, variance))


def climb(x, target, steps, noise):
    """Return (objective, σ² (1,), ℓ (D,)), the best of `steps` steps of Adam from where `noise` (1 + D,), in deviations, says."""
    usual = 0.5 * math.log(x.shape[1])
    theta = {'log_variance': noise[:1].copy(), 'log_length_scales': usual + noise[1:]}
    adam, rate, start, best = Adam(theta, 0.1), CosineSchedule(0.1, steps), None, (-math.inf,)
    for step in range(steps):
        for name, ends in ('log_variance', VARIANCES), ('log_length_scales', LENGTH_SCALES):
            theta[name].clip(*numpy.log(ends), out=theta[name])
        gradient, posterior = evidence(x, target, **theta, start=start)
        away = theta['log_length_scales'] - usual
        if (value := posterior.log_evidence - 0.5 * (away**2).sum()) > best[0]:
            best = value, numpy.exp(theta['log_variance']), numpy.exp(theta['log_length_scales'])
        gradient['log_length_scales'] -= away
        adam.learning_rate, start = rate(step), posterior.a                                # the next mode is near this one
        adam.step({name: -each for name, each in gradient.items()})                        # Adam goes down
    return best


def mean_probability(mean, variance):
    """Return ∫ s(f) N(f | mean, variance) df, (n,), to 2e-7 for variances up to 4, 1e-3 up to 25, and 0.05 for any."""
    f = mean[:, None] + numpy.sqrt(2 * variance)[:, None] * NODES                          # (n, 32)
    return (sigmoid(f) * WEIGHTS).sum(1) / math.sqrt(math.pi)


def odds_shift(share, sampled_share):
    """Return what to add to f where class 1 is the `share` of all points and was `sampled_share` of the examples: a difference of log-odds.

    Source: King & Zeng 2001, for the b of a logistic regression; for a GP it is our choice.
    """
    if not (0 < share < 1 and 0 < sampled_share < 1):
        raise ValueError(f'share is {share} and sampled_share {sampled_share}; expected numbers between 0 and 1')
    return math.log(share / (1 - share)) - math.log(sampled_share / (1 - sampled_share))


class LogisticRegression(Classifier):
    """The linear control: maximises Σ log s(±f) − ½ ridge·|w|². The ridge keeps w finite where a plane parts the classes; no variances."""

    learnt = 'centre', 'scale', 'weights'

    def __init__(self, ridge=1.0):
        if not 0 < ridge < math.inf:
            raise ValueError(f'ridge is {ridge}; it must be positive, or no plane is best where one parts the classes')
        self.ridge = ridge

    @one_thread_per_product()
    def fit(self, x, target):
        """Learn from the examples x (n, D) and target (n,). Returns the classifier. `weights` (D + 1,), b last, are for scaled features."""
        x, target = self.examples(x, target)
        x, sign = numpy.hstack([x, numpy.ones((len(x), 1))]), 2 * target - 1
        ridge = numpy.append(numpy.full(x.shape[1] - 1, self.ridge), 0.0)

        def objective(w):
            return -numpy.logaddexp(0, -sign * (x @ w)).sum() - 0.5 * (ridge * w * w).sum()

        def newton_step(w):
            p = sigmoid(x @ w)
            return numpy.linalg.solve((x.T * (p * (1 - p))) @ x + numpy.diag(ridge), x.T @ (target - p) - ridge * w)

        self.weights, self.features = maximise(objective, newton_step, numpy.zeros(x.shape[1])), x.shape[1] - 1
        return self

    @one_thread_per_product()
    def predict(self, x, shift=0.0):
        """Return the Prediction for points x (n, D); see `GaussianProcess.predict`."""
        mean = self.points(x) @ self.weights[:-1] + self.weights[-1] + shift
        return Prediction(mean, numpy.zeros_like(mean), sigmoid(mean))
