"""Every fast path against the plain mathematics, in float64 and float32, on shapes chosen to be awkward."""

import numpy
import pytest

from nervenet import convolution, parallel
from nervenet.convolution import im2col, patches, plain

TOLERANCE = {'float64': 1e-10, 'float32': 1e-4}


def problem(rng, N, H, W, C_in, C_out, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), dtype='float64'):
    """Return random x, weight, dy and the arguments (stride, padding) of one convolution."""
    size = plain.output_size((H, W), kernel_size, stride, padding)
    arrays = [rng.standard_normal(shape).astype(dtype)
              for shape in ((N, H, W, C_in), (*kernel_size, C_in, C_out), (N, *size, C_out))]
    return *arrays, (stride, padding)


def three(path, x, weight, dy, geometry):
    """Return the three results of one path, by name."""
    return {'forward': path.forward(x, weight, *geometry),
            'input_gradient': path.input_gradient(dy, weight, x.shape[1:3], *geometry),
            'weight_gradient': path.weight_gradient(x, dy, weight.shape[:2], *geometry)}


def assert_close(results, expected, dtype, context):
    for name, result in results.items():
        reference = expected[name]
        assert result.shape == reference.shape and result.dtype == dtype, (name, context)
        error = abs(result - reference).max() / abs(reference).max()
        assert error < TOLERANCE[dtype], f'{name}: relative error {error:.1e} at {context}'


SHAPES = [
    dict(N=1, H=1, W=1, C_in=1, C_out=1),                                     # one pixel, one channel, one image
    dict(N=3, H=1, W=1, C_in=5, C_out=2),
    dict(N=1, H=7, W=13, C_in=1, C_out=16),
    dict(N=2, H=13, W=7, C_in=16, C_out=1),
    dict(N=1, H=1, W=37, C_in=3, C_out=4),
    dict(N=2, H=41, W=2, C_in=4, C_out=3),
    dict(N=2, H=18, W=23, C_in=16, C_out=16),
    dict(N=2, H=21, W=35, C_in=32, C_out=16),
    dict(N=5, H=9, W=11, C_in=32, C_out=48),
    dict(N=1, H=34, W=45, C_in=33, C_out=64),
    dict(N=3, H=6, W=8, C_in=130, C_out=67),
    dict(N=2, H=5, W=3, C_in=64, C_out=300),
    dict(N=4, H=12, W=16, C_in=64, C_out=128),
    dict(N=1, H=150, W=170, C_in=8, C_out=8),                                 # several strips
    dict(N=2, H=10, W=12, C_in=6, C_out=5, padding=(0, 0)),
    dict(N=2, H=10, W=12, C_in=6, C_out=5, padding=(2, 1)),
    dict(N=2, H=10, W=12, C_in=20, C_out=24, padding=(0, 2)),
    dict(N=2, H=10, W=12, C_in=6, C_out=5, padding=(4, 3)),                   # more padding than kernel
    dict(N=2, H=11, W=14, C_in=6, C_out=5, stride=(2, 2)),
    dict(N=2, H=11, W=14, C_in=3, C_out=5, kernel_size=(5, 3), stride=(1, 2), padding=(2, 1)),
    dict(N=2, H=11, W=14, C_in=6, C_out=7, kernel_size=(1, 3), padding=(0, 1)),
    dict(N=3, H=11, W=14, C_in=6, C_out=7, kernel_size=(7, 7), padding=(3, 3)),
    dict(N=2, H=11, W=14, C_in=6, C_out=1, kernel_size=(1, 1), padding=(0, 0)),
    dict(N=2, H=11, W=14, C_in=6, C_out=7, kernel_size=(1, 1), padding=(1, 0)),
    dict(N=2, H=10, W=14, C_in=6, C_out=7, kernel_size=(2, 2), stride=(2, 2), padding=(0, 0)),
    dict(N=2, H=11, W=13, C_in=6, C_out=7, kernel_size=(2, 2), stride=(2, 2), padding=(0, 0)),   # a row and a column left over
    dict(N=1, H=9, W=8, C_in=2, C_out=3, kernel_size=(3, 2), stride=(3, 2), padding=(0, 0)),
    dict(N=2, H=9, W=9, C_in=2, C_out=3, kernel_size=(2, 2), stride=(3, 3), padding=(0, 0)),     # pixels that no window meets
]


@pytest.mark.parametrize('dtype', TOLERANCE)
@pytest.mark.parametrize('shape', SHAPES, ids=lambda shape: '-'.join(str(value).replace(' ', '') for value in shape.values()))
def test_the_fast_paths_agree_with_the_plain_path(rng, shape, dtype):
    arguments = problem(rng, **shape, dtype=dtype)
    in_float64 = *(array.astype('float64') for array in arguments[:3]), arguments[3]
    assert_close(three(convolution, *arguments), three(plain, *in_float64), dtype, shape)


def test_the_fast_paths_agree_with_the_plain_path_at_random_shapes(rng):
    for _ in range(60):
        N, H, W = rng.integers(1, [6, 40, 40])
        C_in, C_out = rng.integers(1, 70, 2)
        shape = dict(N=N, H=H, W=W, C_in=C_in, C_out=C_out)
        arguments = problem(rng, **shape)
        assert_close(three(convolution, *arguments), three(plain, *arguments), 'float64', shape)


@pytest.mark.parametrize('shape', SHAPES, ids=lambda shape: '-'.join(str(value).replace(' ', '') for value in shape.values()))
def test_im2col_serves_every_shape(rng, shape):
    arguments = problem(rng, **shape)
    assert_close(three(im2col, *arguments), three(plain, *arguments), 'float64', shape)
