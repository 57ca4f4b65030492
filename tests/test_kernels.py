"""The kernels of kernels.cu without a GPU: compiled for two generations of it, and run on the host.

Where a C++ compiler is installed, `kernels.cu` is compiled as C++: a few lines before it say what `__global__` and the numbers of block
and thread are, and a loop over all blocks and threads stands for the GPU. So the tests below run the very code, index by index, in
the stand-in for CuPy.
"""

import contextlib
import ctypes
import re
import shutil
import subprocess

import numpy
import pytest

from nervenet import MaxPool2D, UNet
from nervenet.engine import backend, kernels
from nervenet.losses import BCEWithLogitsLoss, DiceLoss, WeightedSum
from nervenet.optim import Adam, AdamW
from nervenet.train import train_step

NAMES = 'normalize_relu', 'max_pool', 'max_pool_backward', 'adam'
BEFORE = '''
#include <cmath>
#define __global__
struct Three { unsigned x, y, z; };
static Three blockIdx, threadIdx, blockDim;
'''
LAUNCHER = '''
extern "C" void launch_{name}(unsigned blocks, unsigned threads, {parameters})
{{
    blockDim.x = threads;
    for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++)
        for (threadIdx.x = 0; threadIdx.x < threads; threadIdx.x++)
            {name}({arguments});
}}
'''


TYPES = {'float': numpy.float32, 'int': numpy.int32, 'long long': numpy.int64, 'unsigned char': numpy.uint8}
C_TYPES = {'int32': ctypes.c_int, 'int64': ctypes.c_longlong, 'float32': ctypes.c_float}


def signatures():
    """Return {kernel: text of its parameters}."""
    return dict(re.findall(r'__global__ void (\w+)\((.*?)\)\n', kernels.SOURCE.read_text(), re.DOTALL))


def test_the_kernels_are_these():
    assert list(signatures()) == list(NAMES)


@pytest.mark.parametrize('architecture', ['sm_80', 'sm_90'])
def test_every_kernel_compiles(architecture, tmp_path):
    if shutil.which('nvcc'):
        done = subprocess.run(['nvcc', '--cubin', f'-arch={architecture}', '-std=c++17', '-Werror', 'all-warnings', '-o', tmp_path / 'k.cubin',
                               kernels.SOURCE], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        compiled = (tmp_path / 'k.cubin').read_bytes()
    else:
        try:
            from cupy.cuda.compiler import CompileException, _NVRTCProgram
            from cupy_backends.cuda.libs.nvrtc import getVersion
            getVersion()
        except Exception as error:
            pytest.skip(f'no CUDA compiler: neither nvcc nor NVRTC ({type(error).__name__}: {error})')
        try:
            program = _NVRTCProgram(kernels.SOURCE.read_text(), 'kernels.cu', method='cubin')
            compiled = program.compile((f'--gpu-architecture={architecture}', '-std=c++17'))[0]
        except CompileException as error:
            pytest.fail(str(error))
    assert all(name.encode() in compiled for name in NAMES)


@pytest.fixture(scope='module')
def library(tmp_path_factory):
    """kernels.cu as a library of the host."""
    compiler = shutil.which('c++') or shutil.which('g++')
    if compiler is None:
        pytest.skip('no C++ compiler')
    source, folder = kernels.SOURCE.read_text(), tmp_path_factory.mktemp('kernels')
    for name, parameters in signatures().items():
        arguments = ', '.join(re.findall(r'(\w+)(?=,|$)', parameters))
        source += LAUNCHER.format(name=name, parameters=parameters, arguments=arguments)
    (folder / 'kernels.cpp').write_text(BEFORE + source)
    subprocess.run([compiler, '-O1', '-ffp-contract=off', '-Wall', '-Werror', '-shared', '-fPIC', '-o', folder / 'kernels.so',
                    folder / 'kernels.cpp'], check=True)
    return ctypes.CDLL(str(folder / 'kernels.so'))


@pytest.fixture(params=['stand-in', 'cupy'])
def xp_with_kernels(request, monkeypatch):
    """The array module of a device that can run the kernels; in the stand-in `launched` lists which ones ran."""
    if request.param == 'cupy':
        xp = request.getfixturevalue('gpu_that_works')
        with kernels.use_kernels():
            yield xp
        return
    library, gpu = request.getfixturevalue('library'), request.getfixturevalue('gpu')
    launched = []

    class RawModule:
        def __init__(self, code, options):
            assert code == kernels.SOURCE.read_text() and options == ('-std=c++17',)

        def get_function(self, name):
            def kernel(grid, block, arguments):
                launched.append(name)
                values, parameters = [], signatures()[name].split(',')
                for value, parameter in zip(arguments, parameters, strict=True):
                    kind, star, _ = re.fullmatch(r'\s*(?:const )?(.+?) (\*?)(\w+)', parameter).groups()
                    assert value.dtype == TYPES[kind] and isinstance(value, gpu.ndarray) == bool(star), (name, parameter)
                    if star:
                        assert value.host.flags.c_contiguous, 'a kernel knows nothing of strides'
                        values.append(ctypes.c_void_p(value.host.ctypes.data))
                    else:
                        values.append(C_TYPES[value.dtype.name](value))
                assert len(grid) == len(block) == 1 and grid[0] > 0
                getattr(library, 'launch_' + name)(ctypes.c_uint(grid[0]), ctypes.c_uint(block[0]), *values)
            return kernel

    monkeypatch.setattr(gpu, 'RawModule', RawModule, raising=False)
    monkeypatch.setattr(gpu, 'launched', launched, raising=False)
    kernels._module.cache_clear()
    with kernels.use_kernels():
        yield gpu
    kernels._module.cache_clear()


def values(rng, *shape):
    return rng.standard_normal(shape).astype('float32')


SHAPES = [(1, 2, 2, 1), (2, 7, 5, 3), (3, 4, 9, 17), (1, 33, 21, 16), (2, 31, 40, 5)]


@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_normalize_relu(xp_with_kernels, rng, shape):
    xp, (x, slope, shift) = xp_with_kernels, (values(rng, *shape), values(rng, shape[3]), values(rng, shape[3]))
    x[0, 0, 0, 0] = numpy.nan
    y = backend.to_cpu(kernels.normalize_relu(xp.asarray(x), xp.asarray(slope), xp.asarray(shift)))
    expected = numpy.maximum(x.astype('float64') * slope + shift, 0)
    assert y.dtype == 'float32' and numpy.isnan(y[0, 0, 0, 0])
    numpy.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('k', [1, 2, 3])
@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_max_pool(xp_with_kernels, rng, shape, k):
    if min(shape[1:3]) < k:
        pytest.skip('no window fits')
    x = rng.integers(0, 6, shape).astype('float32')                             # equals are frequent
    x[0, 0, 0, 0] = numpy.nan
    plain, layer = MaxPool2D(k), MaxPool2D(k)
    expected = plain.forward(x.astype('float64'))
    dy = values(rng, *expected.shape)
    there = xp_with_kernels.asarray(x[:, :, ::-1].copy())[:, :, ::-1]            # a view, not contiguous
    y = backend.to_cpu(layer.forward(there))
    numpy.testing.assert_array_equal(y, expected)
    dx, expected_dx = backend.to_cpu(layer.backward(xp_with_kernels.asarray(dy))), plain.backward(dy.astype('float64'))
    assert dx.dtype == 'float32' and not numpy.isnan(dx).any()
    expected_dx[0, :k, :k, 0] = dx[0, :k, :k, 0]                                # in a window with NaN anything may receive the gradient
    numpy.testing.assert_array_equal(dx, expected_dx)


def test_windows_too_large_for_argmax_take_the_usual_way(xp_with_kernels, rng):
    x, layer = values(rng, 1, 40, 20, 2), MaxPool2D(17)
    y = backend.to_cpu(layer.forward(xp_with_kernels.asarray(x)))
    numpy.testing.assert_array_equal(y[0, 0, 0], x[0, :17, :17].max(axis=(0, 1)))
    assert getattr(xp_with_kernels, 'launched', []) == []


@pytest.mark.parametrize('kind', [Adam, AdamW])
def test_adam(xp_with_kernels, rng, kind):
    host = {'a.weight': values(rng, 3, 3, 5, 7).astype('float64'), 'b': values(rng, 300).astype('float64'), 'c': values(rng, 1).astype('float64')}
    there = {name: xp_with_kernels.asarray(value.astype('float32')) for name, value in host.items()}
    optimizers = [kind(parameters, 1e-2, weight_decay=0.1) for parameters in (host, there)]
    for _ in range(5):
        gradients = {name: values(rng, *value.shape) for name, value in host.items()}
        optimizers[0].step({name: g.astype('float64') for name, g in gradients.items()})
        optimizers[1].step({name: xp_with_kernels.asarray(g) for name, g in gradients.items()})
    for name in host:
        numpy.testing.assert_allclose(backend.to_cpu(there[name]), host[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('norm', ['batch', None])
def test_twenty_training_steps_with_kernels_equal_those_of_the_host(xp_with_kernels, norm):
    losses = {}
    for device in 'cpu', 'gpu':
        model = UNet(base_channels=8, depth=3, norm=norm, rng=numpy.random.default_rng(1)).to(device)
        x = numpy.random.default_rng(2).random((3, 24, 40, 1), dtype='float32')
        x, target = backend.move(x, device), backend.move((x > 0.6).astype('float32'), device)
        loss, optimizer = WeightedSum([(1.0, DiceLoss()), (1.0, BCEWithLogitsLoss())]), Adam(model.parameters(), 2e-4)
        losses[device] = [float(backend.to_cpu(train_step(model, loss, optimizer, x, target))) for _ in range(20)]
    assert losses['gpu'][-1] < losses['gpu'][0] - 0.01
    numpy.testing.assert_allclose(losses['gpu'], losses['cpu'], rtol=0, atol=1e-3)
    assert set(getattr(xp_with_kernels, 'launched', NAMES)) == set(NAMES) - (set() if norm else {'normalize_relu'})


def test_kernels_are_off_by_default_and_compute_no_other_arrays(xp_with_kernels, rng):
    x = xp_with_kernels.asarray(values(rng, 1, 4, 4, 2))
    assert kernels.can_compute(x)
    assert not kernels.can_compute(backend.to_cpu(x)) and not kernels.can_compute(x.astype('float64')) and not kernels.can_compute(x[:0])
    token = kernels._on.set(False)
    with contextlib.ExitStack() as stack:
        stack.callback(kernels._on.reset, token)
        assert not kernels.can_compute(x)
        MaxPool2D(2).forward(x)
        assert getattr(xp_with_kernels, 'launched', []) == []


def test_adam_refuses_to_move_a_copy(xp_with_kernels, rng):
    w, g, m, v = (xp_with_kernels.asarray(values(rng, 6, 4)) for _ in range(4))
    with pytest.raises(ValueError, match='copies of them would be moved'):
        kernels.adam(w.T, g.T, m.T, v.T, (0.9, 0.999), 1e-3, 1e-8)
