import math
import re

import numpy
import pytest

from nervenet.classical import gaussian_process
from nervenet.classical.gaussian_process import (GaussianProcess, LogisticRegression, climb, evidence, laplace, maximise,
                                                 mean_probability, odds_shift, sigmoid, squared_exponential)
from nervenet.engine.parallel import set_threads

HALF_ALIKE = numpy.array([[0.0], [math.sqrt(2 * math.log(2))]])         # two points whose covariance is ½, at σ² = ℓ = 1


def examples(rng, n=40, D=3, noise=1.0):
    """Return (x, target): two classes that overlap, in D features."""
    x = rng.standard_normal((n, D))
    return x, (numpy.sin(2 * x[:, 0]) + x[:, -1] + noise * rng.standard_normal(n) > 0).astype(float)


def log_likelihood(f, target):
    return numpy.log(sigmoid((2 * target - 1) * f)).sum(axis=-1)


# --- Known numbers ----------------------------------------------------------------------------------------------------

def test_laplace_for_one_example():
    gradient, found = evidence(numpy.zeros((1, 1)), numpy.ones(1), numpy.zeros(1), numpy.zeros(1))
    assert found.f == pytest.approx([0.401058], abs=1e-6) and found.log_evidence == pytest.approx(-0.700655, abs=1e-6)
    assert gradient['log_variance'] == pytest.approx([-0.0102217], abs=1e-7)
    assert gradient['log_length_scales'] == pytest.approx([0], abs=1e-12)
    there = GaussianProcess().condition([[0.0]], [1]).predict([[0.0]])
    assert there.mean == pytest.approx([0.401058], abs=1e-6) and there.variance == pytest.approx([0.806315], abs=1e-6)


@pytest.mark.parametrize('target, mode, log_evidence, exact, by_variance', (
    ([1, 1], [0.549107, 0.549107], -1.316887, -1.304057, 0.0396800), ([1, 0], [0.222323, -0.222323], -1.490921, -1.475905, -0.0870736)))
def test_laplace_for_two_examples(target, mode, log_evidence, exact, by_variance):
    target = numpy.array(target, dtype=float)
    gradient, found = evidence(HALF_ALIKE, target, numpy.zeros(1), numpy.zeros(1))
    assert found.f == pytest.approx(mode, abs=1e-6) and found.log_evidence == pytest.approx(log_evidence, abs=1e-6)
    assert gradient['log_variance'] == pytest.approx([by_variance], abs=1e-7)
    # What it approximates: the integral of s(±f₁) s(±f₂) N(f | 0, K), on a grid.
    f = numpy.moveaxis(numpy.mgrid[-8:8.01:0.05, -8:8.01:0.05], 0, -1)
    prior = numpy.exp(-0.5 * numpy.einsum('...i,ij,...j', f, numpy.linalg.inv([[1, 0.5], [0.5, 1]]), f)) / (2 * math.pi * 0.75**0.5)
    whole = (prior * numpy.exp(log_likelihood(f, target))).sum() * 0.05**2
    assert math.log(whole) == pytest.approx(exact, abs=1e-6) and found.log_evidence == pytest.approx(exact, abs=0.02)


def test_laplace_comes_near_the_exact_answer_for_one_example():
    f = numpy.arange(-30, 30, 0.001)
    for variance, tolerance in (0.01, 1e-5), (0.1, 1e-3), (1, 0.03):
        weight = numpy.exp(-0.5 * f**2 / variance) * sigmoid(f)
        mean = (weight * f).sum() / weight.sum()
        spread = (weight * (f - mean)**2).sum() / weight.sum()
        there = GaussianProcess(variance).condition([[0.0]], [1])
        assert there.log_evidence == pytest.approx(math.log(0.5), abs=tolerance)       # by symmetry
        found = there.predict([[0.0]])
        assert found.mean == pytest.approx([mean], rel=2 * tolerance) and found.variance == pytest.approx([spread], rel=2 * tolerance)


# --- The formulas, against the same ones written down without regard to rounding ---------------------------------------

def test_the_mode_is_where_the_gradient_vanishes_and_the_evidence_is_the_volume_there(rng):
    x, target = examples(rng)
    K = squared_exponential(x, x, 3.0)
    found = laplace(K, target)
    p = sigmoid(found.f)
    assert numpy.linalg.solve(K, found.f) == pytest.approx(target - p, abs=1e-6)
    W = numpy.diag(p * (1 - p))
    volume = -0.5 * numpy.linalg.slogdet(numpy.eye(40) + K @ W)[1]
    assert found.log_evidence == pytest.approx(-0.5 * found.f @ numpy.linalg.solve(K, found.f) + log_likelihood(found.f, target) + volume)


def test_predictions_are_those_of_the_dense_formulas(rng):
    x, target = examples(rng)
    new, scales = rng.standard_normal((7, 3)), numpy.array([0.5, 1.0, 2.0])
    gp = GaussianProcess(2.0, scales).condition(x, target)

    def k(a, b):
        return 2.0 * numpy.exp(-0.5 * (((a[:, None] - b) / scales)**2).sum(-1))
    K, p = k(x, x), sigmoid(gp.posterior.f)
    found = gp.predict(new)
    assert found.mean == pytest.approx(k(new, x) @ numpy.linalg.solve(K, gp.posterior.f), abs=1e-7)
    told = numpy.linalg.inv(K + numpy.diag(1 / (p * (1 - p))))
    assert found.variance == pytest.approx(2.0 - numpy.einsum('ij,jk,ik->i', k(new, x), told, k(new, x)), rel=1e-9)
    f = numpy.arange(-40, 40, 0.01)
    density = numpy.exp(-0.5 * (f - found.mean[:, None])**2 / found.variance[:, None])
    assert found.probability == pytest.approx((density * sigmoid(f)).sum(1) / density.sum(1), abs=1e-7)


@pytest.mark.parametrize('log_variance', (-2.0, 0.5, 4.0))
def test_gradient_of_the_evidence_is_that_of_finite_differences(rng, log_variance):
    x, target = examples(rng, 25)
    place = numpy.array([log_variance, -0.5, 0.2, 1.0])
    gradient, _ = evidence(x, target, place[:1], place[1:])
    found = [*gradient['log_variance'], *gradient['log_length_scales']]
    for d in range(4):
        step = numpy.eye(4)[d] * 1e-4
        above, below = (evidence(x, target, at[:1], at[1:])[1].log_evidence for at in (place + step, place - step))
        assert found[d] == pytest.approx((above - below) / 2e-4, rel=1e-6, abs=1e-8)


def test_the_kernel_is_a_covariance(rng):
    a, b = rng.standard_normal((30, 4)), rng.standard_normal((20, 4))
    expected = 1.7 * numpy.exp(-0.5 * ((a[:, None] - b)**2).sum(-1))
    assert squared_exponential(a, b, 1.7) == pytest.approx(expected, rel=1e-12)
    K = squared_exponential(a, a)
    assert numpy.linalg.eigvalsh(K).min() > -1e-12 and K.diagonal() == pytest.approx(1, abs=1e-14) and K.max() <= 1


def test_mean_probability_is_that_of_an_integral():
    mean, variance = map(numpy.ravel, numpy.meshgrid(numpy.linspace(-9, 9, 37), [0, 0.01, 1, 4, 25, 400, 1e4]))
    z = numpy.arange(-9, 9, 0.005)
    density = numpy.exp(-0.5 * z**2)
    exact = (sigmoid(mean[:, None] + variance[:, None]**0.5 * z) * density).sum(1) / density.sum()
    error = abs(mean_probability(mean, variance) - exact)
    for most, tolerance in (1, 1e-12), (4, 2e-7), (25, 1e-3), (1e4, 0.05):
        assert error[variance <= most].max() < tolerance


# --- Newton -----------------------------------------------------------------------------------------------------------

def test_a_step_is_halved_where_newton_would_go_to_and_fro():
    K, target, start = numpy.full((2, 2), 1000.0), numpy.array([1.0, 0.0]), numpy.full(2, 1.5e-3)
    f = 3.0
    for _ in range(100):                            # plain Newton, of −f²/2k + log s(f) + log s(−f) with k = 1000, from the same start
        p = sigmoid(f)
        f += (1 - 2 * p - f / 1000) / (2 * p * (1 - p) + 1 / 1000)
    assert abs(f) > 500
    assert laplace(K, target, start).f == pytest.approx([0, 0], abs=1e-6)


def test_the_mode_does_not_depend_on_where_it_is_searched_from(rng):
    x, target = examples(rng)
    K = squared_exponential(x, x, 50.0)
    from_zero = laplace(K, target)
    for _ in range(5):
        other = laplace(K, target, 3 * rng.standard_normal(40))
        assert other.f == pytest.approx(from_zero.f, abs=1e-6) and other.log_evidence == pytest.approx(from_zero.log_evidence, abs=1e-8)


def test_newton_that_does_not_come_to_rest_says_so():
    with pytest.raises(RuntimeError, match='has not come to rest after 100 steps, at a value of 100.0; are there values of very different'):
        maximise(lambda x: x, lambda x: 1.0, 0.0)


# --- What a Gaussian process knows, and what not ----------------------------------------------------------------------

def test_far_from_all_examples_it_is_as_uncertain_as_before(rng):
    gp = GaussianProcess(4.0, 0.7).condition(*examples(rng))
    far = gp.predict(numpy.full((1, 3), 50.0))
    assert [float(each[0]) for each in far] == pytest.approx([0, 4, 0.5], abs=1e-12)
    assert gp.predict(rng.standard_normal((50, 3))).variance.max() < 4


def test_uncertainty_pulls_the_probability_towards_a_half(rng):
    found = GaussianProcess(20.0).condition(*examples(rng, noise=0.1)).predict(2 * rng.standard_normal((50, 3)))
    assert (abs(found.probability - 0.5) < abs(sigmoid(found.mean) - 0.5)).all()


def test_classes_swapped_and_examples_shuffled_mean_the_same(rng):
    x, target = examples(rng)
    new, order = rng.standard_normal((9, 3)), rng.permutation(40)
    found = GaussianProcess(5.0).condition(x, target).predict(new)
    swapped = GaussianProcess(5.0).condition(x, 1 - target).predict(new)
    assert swapped.probability == pytest.approx(1 - found.probability, abs=1e-9)
    assert swapped.variance == pytest.approx(found.variance, abs=1e-8)
    assert GaussianProcess(5.0).condition(x[order], target[order]).predict(new).probability == pytest.approx(found.probability, abs=1e-9)


def test_points_are_predicted_alike_alone_and_among_many(rng):
    gp, new = GaussianProcess(5.0).condition(*examples(rng)), rng.standard_normal((23, 3))
    for together, apart in zip(gp.predict(new), zip(*[gp.predict(point) for point in new[:, None]])):
        assert numpy.concatenate(apart) == pytest.approx(together, abs=1e-13)


def test_the_same_point_in_both_classes_is_a_half():
    gp = GaussianProcess(100.0).condition([[0.0], [0.0], [3.0]], [1, 0, 1])
    assert gp.predict([[0.0]]).probability == pytest.approx([0.5], abs=0.01)


# --- Finding the hyperparameters --------------------------------------------------------------------------------------

def sheet(rng, n=200):
    """Return (x, target) of classes drawn from a sheet with σ² = 25 and ℓ = 0.6 along the first of two features, none along the second."""
    x = rng.uniform(-3, 3, (n, 2))
    K = squared_exponential(x[:, :1] / 0.6, x[:, :1] / 0.6, 25.0) + 1e-8 * numpy.eye(n)
    return x, (rng.random(n) < sigmoid(numpy.linalg.cholesky(K) @ rng.standard_normal(n))).astype(float)


def test_fit_finds_a_length_scale_that_is_known(rng):
    x, target = sheet(rng)
    gp = GaussianProcess().fit(x, target, steps=60, starts=1)
    first, second = gp.length_scales * x.std(0)                     # in units of x
    assert 0.4 < first < 0.9 and second > 6 * first and 2 < gp.variance < 125


def test_fit_takes_the_best_of_all_steps_and_starts(rng):
    x, target = examples(rng, 60)
    x = (x - x.mean(0)) / x.std(0)

    def objective(gp):
        return gp.log_evidence - 0.5 * ((numpy.log(gp.length_scales) - 0.5 * math.log(3))**2).sum()
    untouched = GaussianProcess(1.0, math.sqrt(3)).condition(x, target)
    one, many = (GaussianProcess().fit(x, target, 15, starts) for starts in (1, 4))
    assert objective(untouched) < objective(one) <= objective(many)
    assert objective(GaussianProcess().fit(x, target, 1, 1)) == pytest.approx(objective(untouched))
    best = climb(x, target, 15, numpy.zeros(4))
    assert best[0] == pytest.approx(objective(one)) and best[1][0] == pytest.approx(one.variance)


def test_a_start_gives_the_best_of_its_steps_though_it_overshoots(rng, monkeypatch):
    seen = []

    def watched(x, target, log_variance, log_length_scales, start):
        gradient, posterior = evidence(x, target, log_variance, log_length_scales, start)
        seen.append((posterior.log_evidence - 0.5 * ((log_length_scales - 0.5 * math.log(3))**2).sum(), math.exp(log_variance[0])))
        return gradient, posterior
    monkeypatch.setattr(gaussian_process, 'evidence', watched)
    monkeypatch.setattr(gaussian_process, 'CosineSchedule', lambda base, steps: lambda step: 2.0)
    value, variance, _ = climb(*examples(rng), 8, numpy.zeros(4))
    assert (value, variance[0]) == max(seen) and seen.index(max(seen)) < 7


def test_at_its_end_fit_is_where_the_gradient_vanishes(rng):
    x, target = examples(rng, 60)
    gp = GaussianProcess().fit(x, target, 150, 1)
    scaled = (x - x.mean(0)) / x.std(0)
    gradient, _ = evidence(scaled, target, numpy.log([gp.variance]), numpy.log(gp.length_scales))
    pull = numpy.log(gp.length_scales) - 0.5 * math.log(3)          # of the prior
    assert gradient['log_variance'] == pytest.approx([0], abs=0.02) and gradient['log_length_scales'] == pytest.approx(pull, abs=0.02)
    assert abs(pull).max() > 0.2


def test_fit_starts_from_the_prior_once_and_from_draws_of_the_seed_else(rng, monkeypatch):
    seen = []
    monkeypatch.setattr(gaussian_process, 'climb', lambda x, target, steps, noise: seen.append(noise) or (0, numpy.ones(1), numpy.ones(3)))
    with set_threads(1):
        for seed in 0, 0, 1:
            GaussianProcess().fit(*examples(rng), starts=3, seed=seed)
    first, again, other = numpy.array(seen).reshape(3, 3, 4)
    assert not first[0].any() and not other[0].any() and numpy.array_equal(first, again)
    assert abs(first[1:] - other[1:]).min() > 0 and abs(first[1] - first[2]).min() > 0


def test_fit_stays_within_bounds(rng):
    x, target = examples(rng, 30)
    for far in 30.0, -30.0:
        _, variance, scales = climb(x, target, 3, numpy.full(4, far))
        assert 0.01 <= variance[0] * (1 + 1e-12) and variance[0] <= 1e3 * (1 + 1e-12)
        assert (scales > 0.3 - 1e-12).all() and (scales < 100 + 1e-9).all()


def test_fit_gives_the_same_bits_on_one_thread_and_two(rng):
    x, target = examples(rng, 70)
    new, found = rng.standard_normal((5, 3)), []
    for threads in 1, 2:
        with set_threads(threads):
            found.append(GaussianProcess().fit(x, target, 5, 3).predict(new))
    assert all(numpy.array_equal(a, b) for a, b in zip(*found))


@pytest.mark.parametrize('classifier', (GaussianProcess, LogisticRegression))
def test_units_of_the_features_do_not_matter_to_fit(rng, classifier):
    x, target = examples(rng)
    new, scale, offset = rng.standard_normal((9, 3)), numpy.array([1e-3, 10, 1e4]), numpy.array([1e4, -200, 1e5])
    options = dict(steps=10) if classifier is GaussianProcess else {}
    expected = classifier().fit(x, target, **options).predict(new).probability
    found = classifier().fit(x * scale + offset, target, **options).predict(new * scale + offset).probability
    assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize('classifier', (GaussianProcess, LogisticRegression))
def test_a_feature_that_is_constant_but_for_rounding_says_nothing(rng, classifier):
    x, target = examples(rng)
    x = numpy.hstack([x, numpy.full((40, 1), 0.1)])
    assert x.std(0)[3] > 0                                        # the mean of forty times 0.1 is not 0.1
    model = classifier().fit(x, target)
    a, b = (model.predict(numpy.hstack([x[:, :3], numpy.full((40, 1), value)])).probability for value in (0.1, 0.1 + 1e-9))
    assert b == pytest.approx(a, abs=1e-6)


# --- Odds, and the linear control -------------------------------------------------------------------------------------

def test_odds_are_multiplied_by_what_sampling_took_from_them(rng):
    assert odds_shift(0.1, 0.5) == pytest.approx(math.log(1 / 9)) and odds_shift(0.3, 0.3) == 0
    x, target = examples(rng)
    for classifier in LogisticRegression().fit(x, target), GaussianProcess().condition(x, target):
        plain, shifted = classifier.predict(x), classifier.predict(x, odds_shift(0.1, 0.5))
        assert shifted.mean == pytest.approx(plain.mean - math.log(9)) and numpy.array_equal(shifted.variance, plain.variance)
        assert (shifted.probability < plain.probability).all()
    plain, shifted = (LogisticRegression().fit(x, target).predict(x, shift).probability for shift in (0, odds_shift(0.1, 0.5)))
    assert shifted / (1 - shifted) == pytest.approx(plain / (1 - plain) / 9)


def test_logistic_regression_is_at_its_top_and_keeps_the_share(rng):
    x, target = examples(rng, 80)
    x[:, 1] += 3
    for ridge in 0.01, 1.0, 100.0:
        model = LogisticRegression(ridge).fit(x, target)
        found, scaled = model.predict(x), (x - x.mean(0)) / x.std(0)
        assert scaled.T @ (target - found.probability) == pytest.approx(ridge * model.weights[:3], abs=1e-4)
        assert found.probability.mean() == pytest.approx(target.mean(), abs=1e-6) and not found.variance.any()


def test_logistic_regression_finds_the_plane_that_drew_the_classes(rng):
    x = rng.standard_normal((20000, 2))
    target = rng.random(20000) < sigmoid(1.5 * x[:, 0] - 0.5 * x[:, 1] + 0.7)
    found = LogisticRegression(0.01).fit(x, target).predict([[0, 0], [1, 0], [0, 1]]).mean
    assert found == pytest.approx([0.7, 2.2, 0.2], abs=0.1)


def test_logistic_regression_stays_finite_where_a_plane_parts_the_classes():
    model = LogisticRegression(1e-3).fit([[-2.0], [-1.0], [1.0], [2.0]], [0, 0, 1, 1])
    assert numpy.isfinite(model.weights).all() and model.predict([[0.0], [5.0]]).probability == pytest.approx([0.5, 1], abs=1e-3)


def test_a_ring_is_seen_by_the_process_and_not_by_the_plane(rng):
    x = rng.standard_normal((150, 2))
    target = ((x**2).sum(1) < 1.4).astype(int)
    right = [((classifier.predict(x).probability > 0.5) == target).mean()
             for classifier in (GaussianProcess().fit(x, target, 20, 1), LogisticRegression().fit(x, target))]
    assert right[0] > 0.95 and right[1] < 0.7


def test_the_sigmoid_is_exact_and_overflows_nowhere():
    with numpy.errstate(all='raise', under='ignore'):
        found = sigmoid(numpy.array([-1000.0, -30, 0, 30, 1000]))
    assert found == pytest.approx([0, 1 / (1 + math.exp(30)), 0.5, 1 / (1 + math.exp(-30)), 1], rel=1e-14)


# --- What may not be given --------------------------------------------------------------------------------------------

GOOD = numpy.array([[0.0, 1.0], [2.0, 3.0], [1.0, 5.0]])


@pytest.mark.parametrize('classifier', (GaussianProcess, LogisticRegression))
@pytest.mark.parametrize('x, target, said', (
    (GOOD[0], [0, 1], 'x has shape (2,) and dtype float64; expected (points, features), each a finite number'),
    (GOOD * numpy.nan, [0, 1, 1], 'each a finite number'), (GOOD[:0], [], 'x has shape (0, 2)'), (GOOD * 1j, [0, 1, 1], 'dtype complex128'),
    (GOOD, [0, 1], 'target has shape (2,) and dtype int64; expected (3,), of 0 and 1 alone'), (GOOD, [0, 1, -1], 'of 0 and 1 alone'),
    (GOOD, [[0], [1], [1]], 'target has shape (3, 1)'), (GOOD, [0, numpy.nan, 1], 'of 0 and 1 alone'), (GOOD, list('aba'), 'dtype <U1'),
    (GOOD, [1, 1, 1], 'all 3 examples are of class 1; expected some of each class')))
def test_what_are_no_examples_is_refused(classifier, x, target, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        classifier().fit(x, target)


@pytest.mark.parametrize('classifier', (GaussianProcess, LogisticRegression))
def test_points_that_do_not_fit_are_refused(classifier):
    with pytest.raises(RuntimeError, match=f'{classifier.__name__} has seen no examples: call fit first'):
        classifier().predict(GOOD)
    fitted = classifier().fit(GOOD, [0, 1, 1])
    with pytest.raises(ValueError, match='the points have 1 features, the examples had 2'):
        fitted.predict(GOOD[:, :1])
    with pytest.raises(ValueError, match='each a finite number'):
        fitted.predict(GOOD + numpy.inf)


@pytest.mark.parametrize('length_scales', (0.0, -1.0, [1.0], [1.0, numpy.inf], [1.0, 2.0, 3.0], numpy.nan))
def test_length_scales_that_are_none_are_refused(length_scales):
    gp = GaussianProcess(length_scales=length_scales)
    with pytest.raises(ValueError, match=r'length_scales is .*; expected a positive number, or one for each of 2 features'):
        gp.condition(GOOD, [0, 1, 1])
    with pytest.raises(RuntimeError, match='call fit first'):
        gp.predict(GOOD)


def test_other_numbers_that_are_none_are_refused():
    for work, said in ((lambda: GaussianProcess(-1.0).condition(GOOD, [0, 1, 1]), 'variance is -1.0'),
                       (lambda: GaussianProcess().fit(GOOD, [0, 1, 1], steps=0), 'steps is 0'),
                       (lambda: GaussianProcess().fit(GOOD, [0, 1, 1], starts=0), 'starts is 0'),
                       (lambda: LogisticRegression(0), 'ridge is 0; it must be positive'),
                       (lambda: LogisticRegression(-1), 'ridge is -1'),
                       (lambda: odds_shift(0, 0.5), 'share is 0 and sampled_share 0.5; expected numbers between 0 and 1'),
                       (lambda: odds_shift(0.5, 1), 'sampled_share 1; expected')):
        with pytest.raises(ValueError, match=said):
            work()
