"""Pooling with any window and stride, and upsampling: known answers, definitions, adjoints."""

import contextlib

import numpy
import pytest

from nervenet import MaxPool2D, Upsample2D, plain
from nervenet.resampling import MODES, shares


def windows(kernel_size, stride, padding, shape):
    """Yield (output index, slices of the image) of each window, by the definition."""
    (_, H, W, _), out = shape, MaxPool2D(kernel_size, stride, padding).output_shape(shape)
    k, s, p = (value if isinstance(value, tuple) else (value, value) for value in (kernel_size, stride, padding))
    for r in range(out[1]):
        for c in range(out[2]):
            top, left = r * s[0] - p[0], c * s[1] - p[1]
            yield (r, c), (slice(max(0, top), min(H, top + k[0])), slice(max(0, left), min(W, left + k[1])))


@pytest.mark.parametrize('way', [plain, contextlib.nullcontext])
@pytest.mark.parametrize('kernel_size, stride, padding', [(2, 2, 0), (3, 3, 0), (5, 1, 2), (3, 2, 1), ((2, 3), (1, 2), (0, 1)), (2, 3, 0), (1, 2, 0)])
def test_max_pooling_against_the_definition(kernel_size, stride, padding, way, rng):
    pool, x = MaxPool2D(kernel_size, stride, padding), rng.integers(0, 5, (2, 8, 11, 3)).astype(float)          # with equal maxima
    expected, dx = numpy.empty(pool.output_shape(x.shape)), numpy.zeros(x.shape)
    dy = rng.standard_normal(expected.shape)
    for (r, c), (rows, columns) in windows(kernel_size, stride, padding, x.shape):
        window = x[:, rows, columns]
        expected[:, r, c] = window.max(axis=(1, 2))
        for n in range(2):
            for channel in range(3):
                i, j = numpy.argwhere(window[n, :, :, channel] == expected[n, r, c, channel])[0]                # the first in reading order
                dx[n, rows.start + i, columns.start + j, channel] += dy[n, r, c, channel]
    with way():
        assert numpy.array_equal(pool.forward(x), expected)
        numpy.testing.assert_allclose(pool.backward(dy), dx, atol=1e-12)


def test_known_answers_of_max_pooling(rng):
    x = rng.standard_normal((2, 7, 9, 3))
    assert numpy.array_equal(MaxPool2D(1).forward(x), x)
    pool = MaxPool2D(3, stride=1, padding=1)
    dy = rng.standard_normal(pool.forward(x).shape)
    numpy.testing.assert_allclose(pool.backward(dy).sum(axis=(1, 2)), dy.sum(axis=(1, 2)), atol=1e-12)         # what came in goes somewhere
    ramp = numpy.arange(9.0)[None, None, :, None] * numpy.ones((1, 5, 1, 1))
    assert MaxPool2D(3, stride=1, padding=1).forward(ramp)[0, 2, :, 0].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 8]
    assert MaxPool2D(3, stride=2).forward(ramp)[0, 0, :, 0].tolist() == [2, 4, 6, 8]
    below = numpy.full((1, 4, 5, 1), -7.0)
    for way in plain, contextlib.nullcontext:
        with way():
            assert (MaxPool2D(3, 1, 1).forward(below) == -7).all(), 'padding is no zero'


@pytest.mark.parametrize('arguments, message', [((0,), 'kernel_size is 0'), ((2, 0), 'stride is 0'), ((2, 1, 2), 'padding is 2; expected less than the kernel of 2'),
                                                ((2, 1, -1), 'padding is -1')])
def test_a_pooling_that_cannot_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        MaxPool2D(*arguments)


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('h, H', [(1, 1), (1, 5), (2, 12), (3, 7), (4, 4), (5, 6), (6, 96)])
def test_the_shares_of_a_row_sum_to_one(h, H, mode):
    R = shares(h, H, mode)
    assert R.shape == (H, h) and (R >= 0).all()
    numpy.testing.assert_allclose(R.sum(axis=1), 1, atol=1e-15)
    assert (numpy.diff(R @ numpy.arange(h)) >= 0).all(), 'the order stays'


def test_known_shares():
    assert shares(2, 4, 'bilinear').tolist() == [[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]]
    assert shares(2, 4, 'nearest').tolist() == [[1, 0], [1, 0], [0, 1], [0, 1]]
    assert shares(2, 3, 'nearest').argmax(axis=1).tolist() == [0, 1, 1]
    numpy.testing.assert_allclose(shares(2, 3, 'bilinear'), [[1, 0], [0.5, 0.5], [0, 1]], atol=1e-15)


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('size', [(4, 5), (8, 10), (12, 5), (7, 13)])
def test_upsampling_keeps_an_even_map_even_and_goes_back_by_the_adjoint(size, mode, rng):
    layer = Upsample2D(2, mode)
    assert numpy.allclose(layer.forward(numpy.full((1, 4, 5, 2), 3.5), size), 3.5, atol=1e-14)
    x, dy = rng.standard_normal((2, 4, 5, 3)), rng.standard_normal((2, *size, 3))
    y = layer.forward(x, size)
    assert y.shape == dy.shape and abs((y * dy).sum() - (x * layer.backward(dy)).sum()) < 1e-12
    with plain():
        numpy.testing.assert_allclose(layer.forward(x, size), y, atol=1e-14)


def test_a_ramp_stays_a_ramp_inside(rng):
    x = (numpy.arange(6.0)[:, None] * 3 + numpy.arange(5.0) * 2)[None, :, :, None]
    y = Upsample2D(2, 'bilinear').forward(x)[0, :, :, 0]
    numpy.testing.assert_allclose(numpy.diff(y[1:-1], axis=0), 1.5, atol=1e-12)
    numpy.testing.assert_allclose(numpy.diff(y[:, 1:-1], axis=1), 1, atol=1e-12)
    assert numpy.array_equal(Upsample2D((2, 3)).forward(x), x.repeat(2, axis=1).repeat(3, axis=2))


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('h, H', [(4, 8), (4, 12), (2, 12), (3, 7), (5, 5)])
def test_what_depends_on_what_is_exact_inside(h, H, mode):
    layer, R = Upsample2D(2, mode).fitted((1, h, h, 1), size=(H, H)), shares(h, H, mode)
    for i, row in enumerate(R):
        first, last = layer.input_range(i, i, 0)
        seen = numpy.flatnonzero(row)
        assert (max(first, 0), min(last, h - 1)) == (seen[0], seen[-1]), (i, first, last)


@pytest.mark.parametrize('make, message', [(lambda: Upsample2D(0), 'scale_factor is 0'), (lambda: Upsample2D(1.5), 'scale_factor is 1.5'),
                                           (lambda: Upsample2D(2, 'cubic'), "mode is 'cubic'; expected one of nearest, bilinear"),
                                           (lambda: Upsample2D().forward(numpy.zeros((1, 4, 5, 1)), (8, 4)), '4×5 cannot be enlarged to 8×4')])
def test_an_upsampling_that_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
