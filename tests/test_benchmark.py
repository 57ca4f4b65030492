import functools
import importlib.util
import itertools
import re
import statistics
import sys
import types
from pathlib import Path

import pytest
from conftest import stand_in
from test_kernels import library, xp_with_kernels        # fixtures

from nervenet.engine import backend, kernels
from nervenet.engine.parallel import set_threads

ROOT = Path(__file__).parents[1]


@pytest.fixture
def main(monkeypatch, capsys):
    """The main function of examples/benchmark.py, called here and now; it returns what was printed."""
    specification = importlib.util.spec_from_file_location('benchmark', ROOT / 'examples' / 'benchmark.py')
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    monkeypatch.setenv('PYTHONPATH', str(ROOT))             # for the process in which memory is measured
    monkeypatch.setattr(stand_in, '__version__', '14', raising=False)
    monkeypatch.setattr(module, 'PRODUCT_SIDE', 512)
    monkeypatch.setattr(module, 'COPY_BYTES', 3 * 2**22)

    def call(*arguments):
        module.main(list(map(str, arguments)))
        return capsys.readouterr().out
    call.module = module
    yield call
    set_threads(None)


def line_of(printed, start):
    line, = [line for line in printed.splitlines() if line.strip().startswith(start)]
    return line.strip()


def test_a_case_on_the_cpu_prints_its_table_and_every_layer(main):
    printed = main('--case', '2:16x16:2', '--rounds', 1, '--layers', '--threads', 1)
    assert re.search(r'^1 threads, float32, norm None; matrix products reach \d+ GF/s$', printed, re.M)
    assert 'U-Net base 2, 16×16, batch 2: 0.00 GF per image and forward' in printed
    assert line_of(printed, 'ms per image').split() == 'ms per image forward train step predict GF/s (of peak): train, predict'.split()
    assert re.fullmatch(r'nervenet( +\d+\.\d\d){3}   \d+ \(\d+%\), \d+ \(\d+%\)', line_of(printed, 'nervenet  '))
    assert re.fullmatch(r'peak memory of three training steps: nervenet (\d+ MiB|not measured \(this needs /proc, so Linux\))',
                        line_of(printed, 'peak memory'))
    assert re.fullmatch(r'stem\.conv1 +\d+\.\d\d +\d+\.\d\d +\d+\.\d% +\d+ +\d+', line_of(printed, 'stem.conv1'))
    assert re.fullmatch(r'ups\.3\.concat +\d+\.\d\d +\d+\.\d\d +\d+\.\d%', line_of(printed, 'ups.3.concat'))
    assert 'device: ' not in printed and 'median' not in printed and 'host' not in printed


def test_a_case_on_a_gpu_is_timed_by_events_and_set_against_the_ceilings_of_the_device(main, pool, gpu, monkeypatch):
    """Whatever lies between two events takes 1.5 ms on the stand-in."""
    devices, real = set(), main.module.train_step

    def train_step(model, loss, optimizer, x, target):
        devices.update({model.device, *map(backend.device_of, (*optimizer.parameters.values(), x, target))})
        pool.take(2 * 2**20)
        value = real(model, loss, optimizer, x, target)
        pool.take(-2 * 2**20)
        return value

    monkeypatch.setattr(main.module, 'train_step', train_step)
    pool.used = 5 * 2**20
    printed = main('--device', 'gpu', '--case', '2:16x16:2', '--rounds', 1, '--layers')
    assert gpu.compute_type == gpu.TF32 and 'CuPy 14' in printed
    product, copying = 2 * 512**3 / 1.5e-3, 2 * 3 * 2**22 / 1.5e-3
    assert line_of(printed, 'device: gpu') == (f'device: gpu (stand-in, tf32), float32, norm None; matrix products reach '
                                               f'{product / 1e12:.1f} TF/s, copies {copying / 1e9:.0f} GB/s')
    assert line_of(printed, 'ms per image, median').endswith('host ms per step  peak MiB   TF/s (of peak): train, predict')
    cells = re.fullmatch(r'nervenet( +0\.7500){3} +(\d+\.\d\d) \((\d+)%\) +7   0\.0 \(\d+%\), 0\.0 \(\d+%\)',
                         line_of(printed, 'nervenet  '))
    assert float(cells[3]) == pytest.approx(float(cells[2]) / 1.5 * 100, abs=1)         # of the 1.5 ms of a step
    assert pool.frees == 1 and devices == {'gpu'}
    assert re.fullmatch(r'stem\.conv2 +1\.5000 +1\.5000 +\d\.\d%( +0\.0 TF/s \(0%\)){2}', line_of(printed, 'stem.conv2'))
    assert re.fullmatch(r'stem\.relu2 +1\.5000 +1\.5000 +\d\.\d%( +0 GB/s \(0%\)){2}', line_of(printed, 'stem.relu2'))
    assert re.fullmatch(r'dropout +1\.5000 +1\.5000 +\d\.\d%', line_of(printed, 'dropout'))         # of probability 0: no work


def test_what_does_not_fit_is_skipped_in_a_line_and_the_next_case_goes_on(main, pool, monkeypatch):
    real, faults = main.module.train_step, {}

    def train_step(model, loss, optimizer, x, target):
        if len(x) == 3:
            raise faults['now']
        return real(model, loss, optimizer, x, target)

    monkeypatch.setattr(main.module, 'train_step', train_step)
    arguments = '--device', 'gpu', '--rounds', 1, '--layers', '--case', '2:16x16:3', '2:16x16:1'
    for faults['now'] in MemoryError('CuPy'), type('OutOfMemoryError', (RuntimeError,), {})('PyTorch'):
        pool.frees = 0
        large, small = main(*arguments).split('U-Net base ')[1:]
        assert large.strip().splitlines()[1:] == ['  nervenet: skipped, does not fit into memory']
        assert '1.5000' in small.split('layer')[0] and 'all layers' in small and pool.frees == 2
    faults['now'] = RuntimeError('an illegal address')
    with pytest.raises(RuntimeError, match='illegal address'):
        main(*arguments)


def test_the_best_counts_on_the_cpu_and_on_a_gpu_the_median_of_the_rounds_after_the_first_ones(main):
    for device, rounds, expected in ('cpu', [4, 1, 3], 1), ('gpu', [90, 80, 5, 4, 7, 1, 2], 4):
        args = types.SimpleNamespace(rounds=3 if device == 'cpu' else 5, convention=main.module.CONVENTIONS[device])
        taken = iter(rounds)
        clock = (lambda: 'a mark'), lambda start, end: next(taken) if ready() else None
        ready = itertools.cycle([False, True]).__next__         # `timed` first waits until the device is idle
        (seconds, issued), = main.module.time_jobs({'one': ([lambda: None], clock)}, args)['one']
        assert seconds == expected and issued >= 0 and not list(taken)
    assert main.module.CONVENTIONS['gpu'].statistic is statistics.median


def test_an_event_pair_is_around_the_work_and_the_device_idle_before_it(main, gpu, monkeypatch):
    orders = []

    class Event(gpu.cuda.Event):
        def record(self, stream=None):
            orders.append('mark')

        def synchronize(self):
            orders.append('wait')

    monkeypatch.setattr(gpu.cuda, 'Event', Event)
    monkeypatch.setattr(gpu.cuda, 'get_elapsed_time', lambda start, end: 250.0 if start is not end else 0.0)
    seconds, issued = main.module.timed(lambda: orders.append('work'), main.module.our_clock('gpu'))
    assert orders == ['mark', 'mark', 'wait', 'mark', 'work', 'mark', 'wait'] and seconds == 0.25 and issued >= 0


@pytest.mark.parametrize('device', ['cpu', 'gpu'])
def test_layers_are_counted_by_the_operations_of_their_products_and_the_bytes_they_touch(main, request, device):
    if device == 'gpu':
        request.getfixturevalue('pool')
    model = main.module.make_model(2, None, 'float32', device)
    step = main.module.our_jobs(model, *main.module.make_batch((2, (16, 32), 3), 'float32'))[1]
    rows = main.module.time_layers(model, step, main.module.our_clock(device))
    pixels = 3 * 16 * 32
    stem, head = 2 * 9 * 1 * 2 * pixels, 2 * 2 * 1 * pixels
    assert [rows['stem.conv1', method][1] for method in ('forward', 'backward')] == [stem, stem]         # no gradient of the images
    assert [rows['head', method][1] for method in ('forward', 'backward')] == [head, 2 * head]
    assert [rows['stem.relu1', method][2] for method in ('forward', 'backward')] == [4 * 2 * 2 * pixels] * 2
    assert rows['downs.0.pool', 'forward'][2] == 4 * (2 * pixels + 2 * pixels / 4)
    assert rows['ups.3.concat', 'backward'][2] == 2 * 4 * 4 * pixels and rows['dropout', 'forward'][2] == 0
    assert sum(row[1] for (_, method), row in rows.items() if method == 'forward') == \
        2 * model.multiply_adds((3, 16, 32, 1))
    if device == 'gpu':
        times = {key: row[0] for key, row in rows.items()}
        twice = {key for key in times if key[0].endswith('concat') and key[1] == 'forward'}             # joined again by backward
        assert all(seconds == pytest.approx(3e-3 if key in twice else 1.5e-3) for key, seconds in times.items())
    assert not any('forward' in vars(layer) or 'backward' in vars(layer) for _, layer in model.layers())


def test_the_kernel_of_norm_and_relu_counts_as_the_norm(main, xp_with_kernels):
    model = main.module.make_model(2, 'batch', 'float32', 'gpu')
    step = main.module.our_jobs(model, *main.module.make_batch((2, (16, 32), 3), 'float32'))[1]
    launch = kernels.normalize_relu
    rows = main.module.time_layers(model, step, main.module.our_clock('gpu'))
    values = 3 * 16 * 32 * 2
    for part in 'stem', 'ups.3':
        for number in '1', '2':
            (seconds, operations, touched), relu = rows[f'{part}.norm{number}', 'forward'], rows[f'{part}.relu{number}', 'forward']
            assert seconds > 0 and (operations, touched) == (0, 2 * 4 * values) and not relu.any()
            assert rows[f'{part}.relu{number}', 'backward'][2] == 2 * 4 * values
    assert kernels.normalize_relu is launch


def test_growth_on_a_gpu(main, pool, monkeypatch):
    monkeypatch.setattr(main.module, 'GROWTH_BYTES', 2**24 + 2**19)
    printed = main('--device', 'gpu', '--case', '1:16x16:1', '--rounds', 1, '--growth', '--threads', 1)
    assert 'train step, base 1: ms per image, median (ns per pixel)' in printed
    assert line_of(printed.partition('predict, base 1')[2], '32×32').split()[1:3] == ['1.50', '(1465)']


def test_kernels_are_used_where_asked_for(main, pool, monkeypatch):
    for arguments, expected in ([], False), (['--kernels'], True):
        used = []
        monkeypatch.setattr(main.module, 'run_case', lambda *rest: used.append(kernels._on.get()))
        monkeypatch.setattr(main.module, 'print_growth', lambda *rest: used.append(kernels._on.get()))
        for instead in [], ['--growth']:
            main('--device', 'gpu', '--case', '2:16x16:1', '--rounds', 1, *arguments, *instead)
        assert used == [expected, expected]


def test_default_cases_of_a_gpu_are_small_and_large_images_in_small_and_large_batches(main):
    cases = main.module.parse(['--device', 'gpu']).case
    assert len(cases) == 12 and (16, (96, 128), 16) in cases and (64, (416, 576), 64) in cases
    assert main.module.parse(['--device', 'gpu', '--case', '8:32x48:4']).case == [(8, (32, 48), 4)]
    assert len(main.module.parse([]).case) == 4 and main.module.parse([]).rounds == 5


@pytest.mark.parametrize('arguments, problem', [
    (['--device', 'gpu'], '--device gpu: no CuPy here'),
    (['--kernels'], '--kernels needs --device gpu'),
    (['--precision', 'tf32'], '--precision tf32: the CPU has no tensor cores'),
    (['--device', 'tpu'], "argument --device: invalid choice: 'tpu'"),
    (['--case', '2:16:2'], "argument --case: '2:16:2' is no case"),
    (['--case', '2:16x0:2'], "argument --case: '2:16x0:2' is no case"),
    (['--growth', '--layers'], '--growth is a table of its own'),
    (['--rounds', '0'], "argument --rounds: '0' is not a whole number"),
    (['--against', 'torch'], '--against torch: PyTorch cannot be imported')])
def test_bad_requests_end_in_one_line(main, monkeypatch, capsys, arguments, problem):
    monkeypatch.setattr(backend, 'cupy', None)
    monkeypatch.setattr(backend, '_why_no_cupy', 'no CuPy here')
    monkeypatch.setitem(sys.modules, 'torch', None)
    with pytest.raises(SystemExit) as stop:
        main(*arguments)
    assert stop.value.code not in (0, None)
    said = capsys.readouterr().err.strip() or stop.value.code
    assert problem in said and '\n' not in said


def test_pytorch_without_a_gpu_is_refused_in_one_line(main, pool, monkeypatch):
    torch = types.SimpleNamespace(__version__='2.13.0+cpu', set_num_threads=lambda number: None,
                                  cuda=types.SimpleNamespace(is_available=lambda: False))
    monkeypatch.setitem(sys.modules, 'torch', torch)
    with pytest.raises(SystemExit, match=r'^--against torch: PyTorch 2.13.0\+cpu finds no GPU\. [^\n]*$'):
        main('--device', 'gpu', '--against', 'torch')


def test_beside_pytorch_on_a_gpu(main, pool, monkeypatch, request):
    """PyTorch computes on the host here, with a GPU's events and memory feigned."""
    torch = pytest.importorskip('torch')
    precisions = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            precisions.append((torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32))

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return 3.0

    for name, fake in dict(is_available=lambda: True, Event=Event, reset_peak_memory_stats=lambda: None, empty_cache=lambda: None,
                           max_memory_allocated=lambda: 7 * 2**20).items():
        monkeypatch.setattr(torch.cuda, name, fake)
    for flags, name in ((torch.backends.cuda.matmul, 'allow_tf32'), (torch.backends.cudnn, 'allow_tf32'),
                        (torch.backends.cudnn, 'benchmark')):           # not attributes that monkeypatch could put back
        request.addfinalizer(functools.partial(setattr, flags, name, getattr(flags, name)))
    monkeypatch.setitem(main.module.TORCH_DEVICE, 'gpu', 'cpu')
    printed = main('--device', 'gpu', '--case', '2:16x16:2', '--rounds', 1, '--against', 'torch', '--norm', 'batch')
    assert 'the two agree in float64' in printed and torch.backends.cudnn.benchmark
    assert precisions[0] == (False, False) and precisions[-1] == (True, True)
    for name in 'fp32 NCHW', 'fp32 channels_last', 'tf32 NCHW', 'tf32 channels_last':
        assert re.fullmatch(rf'torch {name}( +1\.5000){{3}} +\d+\.\d\d \(\d+%\) +7   .*', line_of(printed, f'torch {name} '))
    for label in 'ratio to tf32 channels_last', 'ratio to the best':
        assert line_of(printed, label).removeprefix(label).split() == ['2.00'] * 3
