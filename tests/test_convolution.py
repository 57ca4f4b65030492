"""Every fast path against the plain mathematics, in float64 and float32, on shapes chosen to be awkward."""

import contextlib
import functools
import threading

import numpy
import pytest

from nervenet import convolution
from nervenet.convolution import Geometry, im2col, patches, plain, runs, strips, winograd_1d, winograd_2d
from nervenet.engine import backend, memory, parallel, paths

TOLERANCE = {'float64': 1e-10, 'float32': 1e-4}


def problem(rng, N, H, W, C_in, C_out, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), dilation=1, dtype='float64'):
    """Return random x, weight, dy and the geometry of one convolution."""
    geometry = Geometry(kernel_size, stride, padding, dilation)
    size = geometry.output_size((H, W))
    arrays = [rng.standard_normal(shape).astype(dtype)
              for shape in ((N, H, W, C_in), (*kernel_size, C_in, C_out), (N, *size, C_out))]
    return *arrays, geometry


def three(path, x, weight, dy, geometry):
    """Return the three results of one path, by name."""
    return {'forward': path.forward(x, weight, geometry),
            'input_gradient': path.input_gradient(dy, weight, x.shape[1:3], geometry),
            'weight_gradient': path.weight_gradient(x, dy, geometry)}


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
    dict(N=2, H=40, W=1, C_in=64, C_out=64, padding=(2, 2)),
    dict(N=2, H=1, W=40, C_in=64, C_out=64, padding=(2, 2)),
    dict(N=2, H=10, W=12, C_in=6, C_out=5, padding=(4, 3)),                   # more padding than kernel
    dict(N=2, H=10, W=12, C_in=6, C_out=5, padding=(1, 3)),
    dict(N=2, H=10, W=12, C_in=6, C_out=5, padding=(3, 1)),
    dict(N=2, H=11, W=14, C_in=6, C_out=5, stride=(2, 2)),
    dict(N=2, H=11, W=14, C_in=3, C_out=5, kernel_size=(5, 3), stride=(1, 2), padding=(2, 1)),
    dict(N=2, H=11, W=14, C_in=6, C_out=7, kernel_size=(1, 3), padding=(0, 1)),
    dict(N=3, H=11, W=14, C_in=6, C_out=7, kernel_size=(7, 7), padding=(3, 3)),
    dict(N=2, H=11, W=14, C_in=6, C_out=1, kernel_size=(1, 1), padding=(0, 0)),
    dict(N=2, H=11, W=14, C_in=6, C_out=7, kernel_size=(1, 1), padding=(1, 0)),
    dict(N=2, H=10, W=14, C_in=6, C_out=7, kernel_size=(2, 2), stride=(2, 2), padding=(0, 0)),
    dict(N=2, H=11, W=13, C_in=6, C_out=7, kernel_size=(2, 2), stride=(2, 2), padding=(0, 0)),   # some left over
    dict(N=1, H=9, W=8, C_in=2, C_out=3, kernel_size=(3, 2), stride=(3, 2), padding=(0, 0)),
    dict(N=2, H=9, W=9, C_in=2, C_out=3, kernel_size=(2, 2), stride=(3, 3), padding=(0, 0)),     # some never met
    dict(N=2, H=13, W=17, C_in=6, C_out=7, padding=(2, 3), dilation=(2, 3)),
    dict(N=2, H=13, W=17, C_in=3, C_out=40, padding=(0, 4), dilation=(1, 5)),                    # few channels: tap by tap
    dict(N=1, H=15, W=16, C_in=32, C_out=32, padding='same', dilation=(4, 1)),
    dict(N=2, H=16, W=17, C_in=6, C_out=5, kernel_size=(2, 4), stride=(2, 1), padding=(1, 2), dilation=(3, 2)),
    dict(N=2, H=9, W=7, C_in=5, C_out=4, kernel_size=(2, 2), stride=(2, 2), padding=(0, 0), dilation=(2, 2)),   # holes: no tiles
    dict(N=2, H=8, W=6, C_in=5, C_out=4, kernel_size=(1, 1), padding=(0, 0), dilation=(3, 3)),   # one tap is never dilated
    dict(N=2, H=12, W=26, C_in=6, C_out=1, kernel_size=(1, 1), padding=(0, 0)),                  # pixels of a single value
    dict(N=2, H=12, W=22, C_in=3, C_out=1, kernel_size=(3, 2), stride=(3, 2), padding=(0, 0)),
    dict(N=2, H=6, W=52, C_in=6, C_out=1, kernel_size=(1, 1), padding=(0, 0)),
    dict(N=2, H=6, W=88, C_in=5, C_out=1, kernel_size=(3, 2), stride=(3, 2), padding=(0, 0)),
    dict(N=1, H=6, W=8, C_in=70, C_out=66, kernel_size=(2, 2), stride=(2, 2), padding=(0, 0)),   # too many for rows by themselves
]


def name_of(shape):
    return '-'.join(str(value).replace(' ', '') for value in shape.values())


@pytest.mark.parametrize('dtype', TOLERANCE)
@pytest.mark.parametrize('shape', SHAPES, ids=name_of)
def test_the_fast_paths_agree_with_the_plain_path(rng, shape, dtype):
    arguments = problem(rng, **shape, dtype=dtype)
    in_float64 = *(array.astype('float64') for array in arguments[:3]), arguments[3]
    assert_close(three(convolution, *arguments), three(plain, *in_float64), dtype, shape)


def test_the_fast_paths_agree_with_the_plain_path_at_random_shapes(rng):
    for _ in range(40):
        N, H, W = rng.integers(1, [6, 30, 30])
        C_in, C_out = rng.integers(1, 60, 2)
        shape = dict(N=N, H=H, W=W, C_in=C_in, C_out=C_out)
        arguments = problem(rng, **shape)
        assert_close(three(convolution, *arguments), three(plain, *arguments), 'float64', shape)


@pytest.mark.parametrize('shape', SHAPES, ids=name_of)
def test_im2col_serves_every_shape(rng, shape):
    arguments = problem(rng, **shape)
    assert_close(three(im2col, *arguments), three(plain, *arguments), 'float64', shape)


THREE_BY_THREE = [shape for shape in SHAPES
                  if not shape.keys() & {'kernel_size', 'stride', 'dilation'} and max(shape.get('padding', (1, 1))) <= 2]


@pytest.mark.parametrize('path', [winograd_1d, winograd_2d])
@pytest.mark.parametrize('dtype', TOLERANCE)
@pytest.mark.parametrize('shape', THREE_BY_THREE, ids=name_of)
def test_winograd_serves_every_shape_with_a_3_by_3_kernel(rng, shape, dtype, path):
    arguments = problem(rng, **shape, dtype=dtype)
    in_float64 = *(array.astype('float64') for array in arguments[:3]), arguments[3]
    assert_close(three(path, *arguments), three(plain, *in_float64), dtype, shape)


@pytest.mark.parametrize('M, K, N, pieces', [(1, 5, 3, 1), (59, 5, 3, 1), (60, 5, 3, 1), (120, 5, 3, 2), (121, 5, 3, 3), (997, 5, 3, 17),
                                             (500, 3, 2, 5), (300, 9, 3, 13), (300, 9, 40, 1), (300, 70, 3, 1)])
def test_products_in_pieces_are_those_of_the_whole(rng, M, K, N, pieces, monkeypatch):
    monkeypatch.setattr(strips, 'PIECE', 960)
    monkeypatch.setattr(strips, 'PIECE_VALUES', 336)
    a, b, c = rng.standard_normal((3, 2, M, K)), rng.standard_normal((2, K, N)), rng.standard_normal((3, 2, M, N))
    wide = numpy.full((3, 2, M, N + 2), numpy.nan)
    out, of_one, sums, sum_of_one = wide[..., 1:-1], numpy.empty((M, N)), numpy.empty((2, K, N)), numpy.empty((K * N,))
    listed = [[*strips.multiply(a, b, out)], [*strips.multiply(a[0, 0], b[0], of_one)], [*strips.sum_products(a, c, sums)],
              [*strips.sum_products(a[:1, 0], c[:1, 0], sum_of_one)]]
    for call in (call for calls in listed for call in calls):
        call()
    numpy.testing.assert_allclose(out, a @ b, atol=1e-12)
    numpy.testing.assert_allclose(of_one, a[0, 0] @ b[0], atol=1e-12)
    numpy.testing.assert_allclose(sums, (a.swapaxes(2, 3) @ c).sum(axis=0), atol=1e-11)
    numpy.testing.assert_allclose(sum_of_one.reshape(K, N), a[0, 0].T @ c[0, 0], atol=1e-11)
    assert numpy.isnan(wide[..., [0, -1]]).all()
    assert sum(call.args[0].shape[-3] for call in listed[0]) == pieces


def test_winograd_matrices_compute_a_filter(rng):
    d, g = rng.standard_normal(6), rng.standard_normal(3)
    expected = [d[i:i + 3] @ g for i in range(4)]
    assert numpy.allclose(winograd_1d.AT @ ((winograd_1d.G @ g) * (winograd_1d.BT @ d)), expected, atol=1e-13)


PATHS = {                                           # a shape that the face gives to each path
    patches: dict(N=3, H=32, W=48, C_in=24, C_out=12, kernel_size=(2, 2), stride=(2, 2), padding=(0, 0)),
    im2col: dict(N=3, H=30, W=40, C_in=10, C_out=12, kernel_size=(5, 5), padding=(2, 2)),
    winograd_1d: dict(N=3, H=45, W=90, C_in=16, C_out=20),
    winograd_2d: dict(N=5, H=21, W=26, C_in=40, C_out=44),
}


@pytest.fixture(params=PATHS, ids=lambda path: path.__name__.rpartition('.')[2])
def path(request):
    return request.param


def test_the_face_picks_each_path(path):
    x, weight, dy, geometry = problem(numpy.random.default_rng(0), **PATHS[path])
    for pair in (x, weight), (dy, weight), (x, dy):
        assert convolution._path(pair, geometry, x.shape[1:3], *weight.shape[2:]) is path


@pytest.mark.parametrize('dtype', TOLERANCE)
def test_the_number_of_threads_changes_no_bit(rng, path, dtype):
    arguments = problem(rng, **PATHS[path], dtype=dtype)
    with parallel.set_threads(1):
        expected = three(convolution, *arguments)
    for threads in (2, 3, 16):
        with parallel.set_threads(threads):
            for name, result in three(convolution, *arguments).items():
                assert numpy.array_equal(result, expected[name]), (name, threads)


def test_inputs_stay_unchanged_and_may_be_any_view(rng, path):
    x, weight, dy, geometry = problem(rng, **PATHS[path])
    expected = three(plain, x, weight, dy, geometry)

    def views(array):
        """Return the same values with channels cut out of a wider array, with axes in another order, and reversed."""
        wide = numpy.full((*array.shape[:3], array.shape[3] + 3), numpy.nan)
        wide[..., 2:-1] = array
        yield wide[..., 2:-1]
        yield numpy.ascontiguousarray(array.transpose(3, 1, 0, 2)).transpose(2, 1, 3, 0)
        yield array[::-1, ::-1, ::-1, ::-1].copy()[::-1, ::-1, ::-1, ::-1]

    for arrays in zip(views(x), views(weight), views(dy)):
        for array in arrays:
            array.flags.writeable = False
        assert_close(three(convolution, *arrays, geometry), expected, 'float64', path.__name__)


def test_results_are_fresh_arrays(rng, path):
    """Scratch memory is handed out again: nothing that a function returns may lie in it."""
    arguments = problem(rng, **PATHS[path])
    first = three(convolution, *arguments)
    copies = {name: result.copy() for name, result in first.items()}
    three(convolution, *(-array for array in arguments[:3]), arguments[3])
    assert all(numpy.array_equal(first[name], copies[name]) for name in first)


@pytest.mark.parametrize('dtype', TOLERANCE)
def test_bias_is_added_to_every_pixel(rng, path, dtype):
    x, weight, dy, geometry = problem(rng, **PATHS[path], dtype=dtype)
    bias, dbias = rng.standard_normal(weight.shape[3]).astype(dtype), rng.standard_normal(weight.shape[2]).astype(dtype)
    for context in (contextlib.nullcontext(), paths.plain()):
        with context:
            results = {'forward': convolution.forward(x, weight, geometry, bias=bias),
                       'input_gradient': convolution.input_gradient(dy, weight, x.shape[1:3], geometry, bias=dbias)}
        expected = {'forward': plain.forward(x, weight, geometry) + bias,
                    'input_gradient': plain.input_gradient(dy, weight, x.shape[1:3], geometry) + dbias}
        assert_close(results, expected, dtype, path)


def test_kernels_that_tile_the_image_may_have_many_channels(rng):
    """More than a row of pixels multiplies by itself, in several blocks, with a bias, on any number of threads."""
    x, weight, dy, geometry = problem(rng, N=3, H=64, W=96, C_in=70, C_out=66, kernel_size=(2, 2), stride=(2, 2), padding=(0, 0))
    bias = rng.standard_normal(70)
    expected = plain.input_gradient(dy, weight, (64, 96), geometry) + bias
    for threads in (1, 2, 5):
        with parallel.set_threads(threads):
            found = convolution.input_gradient(dy, weight, (64, 96), geometry, bias)
        assert_close({'input_gradient': found}, {'input_gradient': expected}, 'float64', threads)


def test_large_images_are_cut_into_strips_without_a_seam(rng):
    for shape in (dict(N=1, H=203, W=201, C_in=7, C_out=9), dict(N=1, H=103, W=101, C_in=40, C_out=48)):
        arguments = problem(rng, **shape)
        assert_close(three(convolution, *arguments), three(plain, *arguments), 'float64', shape)


@pytest.mark.parametrize('channels', [4, 40])
def test_input_gradient_is_the_adjoint_of_forward(rng, channels):
    x, weight, dy, geometry = problem(rng, N=4, H=19, W=27, C_in=channels, C_out=channels + 8)
    y, dx = convolution.forward(x, weight, geometry), convolution.input_gradient(dy, weight, (19, 27), geometry)
    dweight = convolution.weight_gradient(x, dy, geometry)
    assert (y * dy).sum() == pytest.approx((x * dx).sum(), rel=1e-10) == (weight * dweight).sum()


def test_within_plain_only_the_plain_path_runs(rng, path, monkeypatch):
    arguments = problem(rng, **PATHS[path])
    for name in ('forward', 'input_gradient', 'weight_gradient'):
        monkeypatch.setattr(path, name, lambda *arguments, **options: pytest.fail('a fast path ran'))
    with parallel.one_thread_per_product():
        expected = three(plain, *arguments)
    with paths.plain():
        results = three(convolution, *arguments)
        with paths.plain():
            pass
        convolution.forward(arguments[0], arguments[1], arguments[3])        # still plain after the inner one
    assert all(numpy.array_equal(results[name], expected[name]) for name in results)
    with pytest.raises(pytest.fail.Exception):
        convolution.forward(arguments[0], arguments[1], arguments[3])


def test_complex_mixed_and_empty_arrays_take_the_plain_path(rng):
    x, weight, dy, geometry = problem(rng, N=2, H=12, W=16, C_in=8, C_out=8)
    step = x + 1e-30j * x                                                     # as in complex-step differentiation
    assert numpy.array_equal(convolution.forward(step, weight, geometry), plain.forward(step, weight, geometry))
    weight_too = weight + 1j * weight
    expected = plain.forward(step, weight_too, geometry)
    assert numpy.array_equal(convolution.forward(step, weight_too, geometry), expected)
    single = x.astype('float32')
    assert numpy.array_equal(convolution.forward(single, weight, geometry), plain.forward(single, weight, geometry))
    assert convolution.forward(x[:0], weight, geometry).shape == (0, 12, 16, 8)
    assert not convolution.weight_gradient(x[:0], dy[:0], geometry).any()


def on_device(xp, x, weight, dy, geometry):
    return xp.asarray(x), xp.asarray(weight), xp.asarray(dy), geometry


def to_cpu(results):
    return {name: backend.to_cpu(result) for name, result in results.items()}


@pytest.mark.parametrize('scratch_bytes', [2**28, 1])                         # all images at once, or one by one
@pytest.mark.parametrize('dtype', TOLERANCE)
@pytest.mark.parametrize('shape', SHAPES, ids=name_of)
def test_the_path_of_devices_serves_every_shape(rng, xp, shape, dtype, scratch_bytes, monkeypatch):
    monkeypatch.setattr(runs, 'SCRATCH_BYTES', scratch_bytes)
    arguments = problem(rng, **shape, dtype=dtype)
    in_float64 = *(array.astype('float64') for array in arguments[:3]), arguments[3]
    assert_close(to_cpu(three(runs, *on_device(xp, *arguments))), three(plain, *in_float64), dtype, shape)


@pytest.mark.parametrize('shape', [PATHS[patches], PATHS[im2col], PATHS[winograd_1d], dict(N=2, H=9, W=11, C_in=3, C_out=4, stride=(2, 2))],
                         ids=name_of)
def test_the_path_of_devices_adds_the_bias_to_every_pixel(rng, xp, shape):
    x, weight, dy, geometry = problem(rng, **shape, dtype='float32')
    bias, dbias = rng.standard_normal(weight.shape[3]).astype('float32'), rng.standard_normal(weight.shape[2]).astype('float32')
    dx, dw, ddy, _ = on_device(xp, x, weight, dy, geometry)
    results = {'forward': runs.forward(dx, dw, geometry, bias=xp.asarray(bias)),
               'input_gradient': runs.input_gradient(ddy, dw, x.shape[1:3], geometry, bias=xp.asarray(dbias))}
    expected = {'forward': plain.forward(x, weight, geometry) + bias,
                'input_gradient': plain.input_gradient(dy, weight, x.shape[1:3], geometry) + dbias}
    assert_close(to_cpu(results), expected, 'float32', shape)


def test_the_path_of_devices_multiplies_two_contiguous_matrices_only(rng, gpu):
    """Others CuPy copies first, and batches of matrices it multiplies without TF32."""
    for shape in (PATHS[winograd_1d], PATHS[im2col], PATHS[patches], dict(N=2, H=9, W=12, C_in=5, C_out=7, kernel_size=(1, 1), padding=(0, 0))):
        three(runs, *on_device(gpu, *problem(rng, **shape, dtype='float32')))
    products = gpu.ledger.products
    assert len(products) == 3 * (3 + 5 + 1 + 1) and all(product == [(2, True), (2, True)] for product in products)


def test_the_path_of_devices_needs_no_more_memory_than_it_may(rng, gpu, monkeypatch):
    """A product for each row of the kernel and each slice of images; 5 images at once, of which the last slice has 2."""
    shape = dict(N=12, H=9, W=14, C_in=3, C_out=8)
    arguments = on_device(gpu, *problem(rng, **shape, dtype='float32'))
    one_image = 11 * 16 * (3 + 3 * 3 + 2 * 8) * 4
    for scratch_bytes, slices in (one_image // 2, 12), (5 * one_image, 3), (6 * one_image - 1, 3), (12 * one_image, 1):
        monkeypatch.setattr(runs, 'SCRATCH_BYTES', scratch_bytes)
        gpu.ledger.__init__()
        runs.forward(*arguments[:2], arguments[3])
        assert len(gpu.ledger.products) == 3 * slices, scratch_bytes


def test_tf32_rounds_the_factors_of_a_convolution_and_nothing_else(rng, xp):
    if xp is numpy:
        pytest.skip('TF32 is for devices')
    errors = {}
    for precision in ('fp32', 'tf32'):
        backend.set_precision('gpu', precision)
        for channels in (16, 256):
            arguments = problem(rng, N=2, H=13, W=17, C_in=channels, C_out=channels, dtype='float32')
            expected = three(plain, *(array.astype('float64') for array in arguments[:3]), arguments[3])
            results = to_cpu(three(convolution, *on_device(xp, *arguments)))
            errors[precision, channels] = max(numpy.linalg.norm(results[name] - expected[name]) / numpy.linalg.norm(expected[name])
                                              for name in results)
    assert all(error < 1e-6 for (precision, _), error in errors.items() if precision == 'fp32')
    assert all(1e-5 < error < 1e-3 for (precision, _), error in errors.items() if precision == 'tf32')
    x, weight, dy, geometry = problem(rng, N=2, H=5, W=6, C_in=3, C_out=4)    # float64, still in TF32 mode
    assert_close(to_cpu(three(convolution, *on_device(xp, x, weight, dy, geometry))), three(plain, x, weight, dy, geometry), 'float64', '')


def test_device_arrays_take_their_own_path_in_float32_and_the_plain_one_in_float64(rng, xp, monkeypatch):
    if xp is numpy:
        pytest.skip('these are no device arrays')
    ran = []
    for module in (runs, plain):
        for name in ('forward', 'input_gradient', 'weight_gradient'):
            monkeypatch.setattr(module, name, lambda *arguments, module=module, name=name: ran.append((module, name)))
    for dtype, module in (('float32', runs), ('float64', plain)):
        arguments = problem(rng, N=2, H=12, W=16, C_in=8, C_out=8, dtype=dtype)
        three(convolution, *on_device(xp, *arguments))
        assert ran == [(module, name) for name in ('forward', 'input_gradient', 'weight_gradient')]
        ran.clear()
        with paths.plain():
            three(convolution, *on_device(xp, *arguments))
        assert {module for module, _ in ran} == {plain}
        ran.clear()


@pytest.mark.parametrize('path, channels, mean_error, largest', [(winograd_1d, 32, 1e-6, 4e-6), (winograd_2d, 256, 4e-6, 2e-5)],
                         ids=['winograd_1d', 'winograd_2d'])
def test_winograd_in_float32_is_off_by_what_its_docstring_says(rng, path, channels, mean_error, largest):
    for scale, factor in (1, 1), (1e-39, 100):
        x, weight, dy, geometry = problem(rng, N=2, H=24, W=32, C_in=channels, C_out=channels, dtype='float32')
        arrays = scale * x, weight / numpy.float32(3 * channels**0.5), dy
        expected = three(plain, *(array.astype('float64') for array in arrays), geometry)['forward']
        error = abs(path.forward(*arrays[:2], geometry) - expected)
        assert numpy.linalg.norm(error) / numpy.linalg.norm(expected) < factor * mean_error
        assert error.max() / abs(expected).max() < factor * largest


def test_a_dilated_kernel_is_a_larger_one_with_zeros_between_its_taps(rng):
    x, weight, dy, geometry = problem(rng, N=2, H=13, W=11, C_in=3, C_out=4, padding=(2, 3), dilation=(2, 3))
    spread = numpy.zeros((5, 7, 3, 4))
    spread[::2, ::3] = weight
    dense = Geometry((5, 7), 1, (2, 3))
    numpy.testing.assert_allclose(convolution.forward(x, weight, geometry), plain.forward(x, spread, dense), atol=1e-12)
    numpy.testing.assert_allclose(convolution.weight_gradient(x, dy, geometry), plain.weight_gradient(x, dy, dense)[::2, ::3], atol=1e-12)


@pytest.mark.parametrize('arguments, expected', [
    ((3,), ((3, 3), (1, 1), (0, 0), (1, 1))), (((5, 3), 2, 'same'), ((5, 3), (2, 2), (2, 1), (1, 1))),
    (((5, 3), 1, 'same', (2, 4)), ((5, 3), (1, 1), (4, 4), (2, 4))), ((1, (1, 2), (0, 3)), ((1, 1), (1, 2), (0, 3), (1, 1)))])
def test_a_geometry_takes_numbers_and_pairs(arguments, expected):
    geometry = Geometry(*arguments)
    assert (geometry.kernel_size, geometry.stride, geometry.padding, geometry.dilation) == expected


@pytest.mark.parametrize('arguments, said', [
    (dict(kernel_size=(2, 3), padding='same'), "padding='same' needs an odd kernel, got 2×3"),
    (dict(kernel_size=3, padding='valid'), "padding is 'valid'; expected 'same'"), (dict(kernel_size=0), 'kernel_size is 0'),
    (dict(kernel_size=3, stride=0.5), 'stride is 0.5'), (dict(kernel_size=3, dilation=0), 'dilation is 0'),
    (dict(kernel_size=3, padding=-1), 'padding is -1'), (dict(kernel_size=(3, 3, 3)), 'a number or a pair'),
    (dict(kernel_size=float('nan')), 'kernel_size is nan')])
def test_a_geometry_that_cannot_be_is_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        Geometry(**arguments)


@pytest.mark.parametrize('axis', [0, 1])
def test_an_output_depends_on_the_inputs_in_its_range_alone(rng, axis):
    x, weight, _, geometry = problem(rng, N=1, H=30, W=31, C_in=2, C_out=3, kernel_size=(3, 2), stride=(2, 3), padding=(3, 1), dilation=(2, 4))
    y = plain.forward(x, weight, geometry)
    for position in range(y.shape[1 + axis]):
        first, last = geometry.input_range(position, position, axis)
        moved = set()
        for place in range(x.shape[1 + axis]):
            other = x.copy()
            other[(slice(None),) * (1 + axis) + (place,)] += 1
            if (plain.forward(other, weight, geometry) != y).take(position, axis=1 + axis).any():
                moved.add(place)
        within = range(max(first, 0), min(last, x.shape[1 + axis] - 1) + 1)
        assert moved <= set(within) and (not moved or {min(moved), max(moved)} <= {within[0], within[-1]} or first < 0 or last >= len(x))


def test_an_image_smaller_than_the_kernel_is_refused(rng):
    x, weight, _, _ = problem(rng, N=1, H=3, W=3, C_in=2, C_out=2)
    with pytest.raises(ValueError, match='an input of 2×3 with padding'):
        convolution.forward(x[:, :2], weight, Geometry(3))


def test_no_path_needs_scratch_as_large_as_the_batch(rng, path):
    shape = PATHS[path] | dict(N=200)
    arguments = problem(rng, **shape, dtype='float32')

    def scratch_of(work):
        """Return the bytes of scratch memory that a fresh thread holds after `work`."""
        held = []

        def measure():
            with parallel.set_threads(1):
                work()
            held.append(sum(piece.nbytes for piece in memory.this_thread.scratch.values()))
        thread = threading.Thread(target=measure)
        thread.start()
        thread.join()
        return held[0]

    x, weight, dy, geometry = arguments
    few = scratch_of(lambda: three(convolution, x[:100], weight, dy[:100], geometry))
    assert scratch_of(lambda: three(convolution, x, weight, dy, geometry)) <= 1.25 * few


JOINS = [dict(N=2, H=9, W=11, C_in=5, C_out=4), dict(N=2, H=26, W=35, C_in=24, C_out=16), dict(N=3, H=41, W=30, C_in=20, C_out=90),
         dict(N=1, H=10, W=13, C_in=140, C_out=70), dict(N=2, H=13, W=17, C_in=6, C_out=7, padding=(2, 3), dilation=(2, 3)),
         dict(N=2, H=10, W=14, C_in=6, C_out=7, kernel_size=(2, 2), stride=(2, 2), padding=(0, 0))]


@pytest.mark.parametrize('shape', JOINS, ids=str)
@pytest.mark.parametrize('plainly', [False, True])
def test_a_join_may_be_given_as_its_parts(rng, xp, shape, plainly):
    x, weight, dy, geometry = problem(rng, **shape, dtype='float64')
    device, split = 'cpu' if xp is numpy else 'gpu', shape['C_in'] // 3
    expected = three(plain, x, weight, dy, geometry)
    x, weight, dy = (backend.move(array, device) for array in (x, weight, dy))
    parts = x[..., :split], x[..., split:].copy()                                               # one of them not in one piece
    with paths.plain() if plainly else contextlib.nullcontext():
        first, second = convolution.input_gradient(dy, weight, x.shape[1:3], geometry, split=split)
        results = {'forward': convolution.forward(parts, weight, geometry), 'weight_gradient': convolution.weight_gradient(parts, dy, geometry),
                   'input_gradient': xp.concatenate([first, second], axis=3)}
    assert first.shape[3] == split and first.flags.c_contiguous and second.flags.c_contiguous
    assert_close({name: backend.to_cpu(result) for name, result in results.items()}, expected, 'float64', shape)


@pytest.mark.parametrize('shape', [*JOINS, dict(N=3, H=90, W=100, C_in=16, C_out=16), dict(N=5, H=64, W=70, C_in=40, C_out=33),
                                   dict(N=2, H=5, W=3, C_in=64, C_out=300)], ids=str)
def test_what_follows_is_done_once_with_every_block(rng, xp, shape):
    x, weight, dy, geometry = problem(rng, **shape, dtype='float64')
    device, lock = 'cpu' if xp is numpy else 'gpu', threading.Lock()
    x, weight, dy = (backend.move(array, device) for array in (x, weight, dy))
    for work in (lambda **options: convolution.forward(x, weight, geometry, **options),
                 lambda **options: convolution.input_gradient(dy, weight, x.shape[1:3], geometry, **options)):
        expected, counted, met = work(), xp.zeros(work().shape), []

        def then(block, part):
            with lock:
                counted[block] += 1
                met.append((block, part.shape))
                part *= 2

        def calls(block, part):
            yield functools.partial(then, block, part)

        numpy.testing.assert_allclose(backend.to_cpu(work(then=(calls,))), backend.to_cpu(2 * expected), rtol=1e-12)
        assert (backend.to_cpu(counted) == 1).all() and all(counted[block].shape == part for block, part in met)
        blocks = sorted(str(block) for block, _ in met)
        with parallel.set_threads(1):
            met.clear()
            work(then=(calls,))
        assert sorted(str(block) for block, _ in met) == blocks


def test_what_is_kept_of_a_weight_serves_images_of_any_size(rng):
    made, results = [], {}

    def kept(name, make):
        if name not in results:
            made.append(name)
            results[name] = make()
        return results[name]

    for C_in, C_out in ((16, 20), (40, 70)):
        made.clear(), results.clear()
        weight = rng.standard_normal((3, 3, C_in, C_out))
        for size in ((8, 9), (40, 52), (8, 9), (90, 60), (3, 4)):
            x = rng.standard_normal((2, *size, C_in))
            numpy.testing.assert_allclose(convolution.forward(x, weight, Geometry(3, 1, 'same'), kept=kept),
                                          plain.forward(x, weight, Geometry(3, 1, 'same')), rtol=1e-9, atol=1e-9)
        assert 1 <= len(made) <= 3
