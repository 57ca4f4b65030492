import numpy
import pytest

from nervenet.engine import backend, parallel, paths, pixelwise
from nervenet.engine.pixelwise import channel_moments, channel_sums, in_blocks

SHAPES = [(1, 1, 1, 1), (2, 3, 5, 1), (1, 7, 9, 3), (3, 64, 64, 16), (2, 65, 67, 24), (1, 1, 1, 300), (2, 8, 8, 512)]


def shifted_product(x, y, factor, out=None):
    get = backend.get_array_module(x)
    return get.add(get.multiply(x, y, out=out), factor, out=out)


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('dtype, tolerance', [('float32', 1e-5), ('float64', 1e-12)])
def test_blocks_give_what_the_whole_gives(shape, dtype, tolerance, rng, xp, monkeypatch):
    monkeypatch.setattr(pixelwise, 'BLOCK_VALUES', 4096)                     # several blocks, the last one short
    x, y = (3 + rng.standard_normal(shape).astype(dtype) for _ in range(2))
    factor = rng.standard_normal(shape[3]).astype(dtype)
    device = 'cpu' if xp is numpy else 'gpu'
    given = [backend.move(array, device) for array in (x, y, factor)]
    before = [array.copy() for array in (x, y, factor)]

    z = in_blocks(shifted_product, *given[:2], channels=given[2:])
    assert z.dtype == dtype
    numpy.testing.assert_array_equal(backend.to_cpu(z), x * y + factor)
    with paths.plain():
        numpy.testing.assert_array_equal(backend.to_cpu(in_blocks(shifted_product, *given[:2], channels=given[2:])), x * y + factor)

    first, product = channel_sums(*given[:2])
    assert first.dtype == product.dtype == numpy.float64
    numpy.testing.assert_allclose(backend.to_cpu(first), x.sum(axis=(0, 1, 2), dtype=float), rtol=tolerance)
    numpy.testing.assert_allclose(backend.to_cpu(product), (x * y).sum(axis=(0, 1, 2), dtype=float), rtol=tolerance)

    mean, variance = map(backend.to_cpu, channel_moments(given[0]))
    numpy.testing.assert_allclose(mean, x.mean(axis=(0, 1, 2), dtype=float), rtol=tolerance)
    numpy.testing.assert_allclose(variance, x.astype(float).var(axis=(0, 1, 2)), rtol=10 * tolerance, atol=tolerance)
    assert all(numpy.array_equal(old, backend.to_cpu(array)) for old, array in zip(before, given))


def test_arrays_that_do_not_lie_in_one_piece_are_taken_as_they_are(rng):
    x = rng.standard_normal((3, 20, 30, 8))
    for view in (x[:, 1:18, 2:29], x[..., 3:7], x[:, ::-1], x.transpose(0, 2, 1, 3)):
        assert numpy.array_equal(in_blocks(numpy.negative, view), -view)
        numpy.testing.assert_allclose(channel_sums(view)[0], view.sum(axis=(0, 1, 2)), atol=1e-10)
        numpy.testing.assert_allclose(channel_moments(view)[1], view.var(axis=(0, 1, 2)), rtol=1e-12)


def test_number_of_threads_changes_no_bit(rng):
    x = rng.standard_normal((4, 90, 100, 12)).astype('float32')
    results = []
    for threads in (1, 2, 5):
        with parallel.set_threads(threads):
            results.append([*channel_moments(x), *channel_sums(x, x), in_blocks(numpy.exp, x)])
    for other in results[1:]:
        assert all(numpy.array_equal(a, b) for a, b in zip(results[0], other))


def test_sums_and_moments_of_large_values_keep_their_digits(rng):
    """A plain float32 sum over four million values near 1000 would lose the variance altogether."""
    x = (1000 + rng.standard_normal((4, 1000, 1000, 1))).astype('float32')
    mean, variance = channel_moments(x)
    assert abs(mean[0] / x.mean(dtype=float) - 1) < 1e-7 and abs(variance[0] / x.var(dtype=float) - 1) < 1e-5
    assert abs(channel_sums(x)[0][0] / x.sum(dtype=float) - 1) < 1e-7


def test_sums_of_pixels_in_a_prime_number_keep_their_digits(rng):
    """Such pixels are joined to no rows, so that tens of thousands of values are added in a row."""
    x = (3.5 + rng.random((1, 1, 65537, 3))).astype('float32')
    expected = [x.sum(axis=(0, 1, 2), dtype=float), numpy.square(x, dtype=float).sum(axis=(0, 1, 2))]
    numpy.testing.assert_allclose(channel_sums(x, x), expected, rtol=1e-9)


@pytest.mark.parametrize('largest', [2**18, 2**13])
@pytest.mark.parametrize('offsets, walks', [((0, 1, -2, 3.5), 1), ((3.9, 0, 0, 0), 1), ((0, 4.1, 0, 0), 2), ((30, 0, -1000, 1), 2), ((0, 1e6, 3, 1), 2)])
def test_moments_are_as_exact_near_0_as_far_from_it(offsets, walks, largest, rng, monkeypatch):
    """Where the square of a mean is more than sixteen variances, a second walk over the values is needed."""
    seen, run_once = [], pixelwise.run_once
    monkeypatch.setattr(pixelwise, 'run_once', lambda *arguments: seen.append(arguments) or run_once(*arguments))
    monkeypatch.setattr(pixelwise, 'BLOCK_VALUES', largest)
    x = (numpy.array(offsets) + rng.standard_normal((2, 128, 256, 4))).astype('float32')
    mean, variance = channel_moments(x)
    numpy.testing.assert_allclose(mean, x.mean(axis=(0, 1, 2), dtype=float), rtol=1e-9, atol=1e-6)
    numpy.testing.assert_allclose(variance, x.astype(float).var(axis=(0, 1, 2)), rtol=5e-6)
    assert len(seen) == walks - 1


def test_blocks_of_a_single_value_need_no_second_walk(rng, monkeypatch):
    monkeypatch.setattr(pixelwise, 'BLOCK_VALUES', 2**13)
    monkeypatch.setattr(pixelwise, 'run_once', None)
    x = rng.standard_normal((2, 128, 256, 4)).astype('float32')
    x[1, ..., 3] = 7
    numpy.testing.assert_allclose(channel_moments(x)[1], x.astype(float).var(axis=(0, 1, 2)), rtol=5e-6)


@pytest.mark.parametrize('value', [0, 0.1, -3e19])
def test_the_variance_of_a_single_value_is_0(value):
    mean, variance = channel_moments(numpy.full((2, 64, 64, 3), value, 'float32'))
    assert numpy.array_equal(mean.astype('float32'), numpy.full(3, value, 'float32')) and numpy.all(variance <= 1e-12 * mean**2)


@pytest.mark.parametrize('shape', SHAPES)
def test_sums_taken_in_the_same_walk_are_those_of_the_result(shape, rng, monkeypatch):
    monkeypatch.setattr(pixelwise, 'BLOCK_VALUES', 4096)
    a, b, x = (rng.standard_normal(shape) for _ in range(3))
    y, (total, product) = pixelwise.in_blocks_with_sums(numpy.subtract, a, b, x)
    assert numpy.array_equal(y, a - b)
    numpy.testing.assert_allclose(total, (a - b).sum(axis=(0, 1, 2)), rtol=1e-9, atol=1e-9)
    numpy.testing.assert_allclose(product, ((a - b) * x).sum(axis=(0, 1, 2)), rtol=1e-9, atol=1e-9)


def test_arrays_are_joined_side_by_side_and_taken_apart(rng, xp):
    a, b, c = (xp.asarray(rng.standard_normal((2, 70, 90, C))) for C in (3, 16, 5))
    y = pixelwise.side_by_side(a, b, c)
    assert numpy.array_equal(backend.to_cpu(y), numpy.concatenate([backend.to_cpu(array) for array in (a, b, c)], axis=3))
    first, rest = pixelwise.apart(y, 3, 21)
    assert numpy.array_equal(backend.to_cpu(first), backend.to_cpu(a)) and numpy.array_equal(backend.to_cpu(rest[..., :16]), backend.to_cpu(b))
    assert first.flags.c_contiguous and rest.flags.c_contiguous                  # no views of all of y
    assert pixelwise.side_by_side(a) is a
