import functools
import itertools
import math
import os
import re
import sys
import time
import types

import numpy
import pytest
from conftest import stand_in
from helpers import ROOT, example
from test_kernels import library, xp_with_kernels        # fixtures

from nervenet.engine import backend, kernels
from nervenet.engine.parallel import set_threads
from nervenet.layers import LeakyReLU
from nervenet.networks import NETWORKS, fusing
from nervenet.networks.summary import trace

REPLACED = f"""
import sys
sys.path.insert(0, {str(ROOT / 'examples')!r})
import rivals
"""             # begins the code with which workers see other rivals


@pytest.fixture
def main(monkeypatch, capsys):
    """The main function of examples/benchmark.py, called here and now, with short bursts; it returns what was printed."""
    monkeypatch.syspath_prepend(ROOT / 'examples')
    module = example('benchmark')
    monkeypatch.setenv('PYTHONPATH', str(ROOT))             # for the workers
    monkeypatch.delenv('OPENBLAS_CORETYPE', raising=False)
    monkeypatch.setattr(stand_in, '__version__', '14', raising=False)
    for name, value in dict(PRODUCT_SIDE={'cpu': 64, 'gpu': 512}, COPY_BYTES=3 * 2**22, BURST_SECONDS=0.0, PAUSE=0.0).items():
        monkeypatch.setattr(module, name, value)

    def call(*arguments):
        module.main(list(map(str, arguments)))
        return capsys.readouterr().out
    call.module = module
    yield call
    set_threads(None)


@pytest.fixture
def workers(main, monkeypatch):
    """All workers that were started."""
    started, real = [], main.module.Worker

    def start(*arguments, **task):
        started.append(real(*arguments, **task))
        return started[-1]

    monkeypatch.setattr(main.module, 'Worker', start)
    yield started
    assert all(worker.process.poll() is not None for worker in started)         # none outlives its use


@pytest.fixture
def in_workers(tmp_path, monkeypatch):
    """A function that has this code run at the start of each worker."""
    def run(code):
        (tmp_path / 'sitecustomize.py').write_text(code)
        monkeypatch.setenv('PYTHONPATH', f'{tmp_path}{os.pathsep}{ROOT}')
    return run


def line_of(printed, start):
    line, = [line for line in printed.splitlines() if line.strip().startswith(start)]
    return line.strip()


# --- On the CPU

def test_a_case_on_the_cpu_prints_its_table_every_layer_and_a_summary(main, monkeypatch):
    monkeypatch.setenv('OPENBLAS_CORETYPE', 'Haswell')
    printed = main('--case', '2:16x16:1', '--rounds', 1, '--layers', '--threads', 1)
    assert re.search(r'^OPENBLAS_CORETYPE is Haswell: .* can halve the speed', printed, re.M)
    assert re.search(r'^1 threads, float32; matrix products reach \d+ GF/s$', printed, re.M)
    assert 'UNet base 2, 16×16, batch 1, norm none: 0.00 GF per image and forward (ms per image are ms per call)' in printed
    number = r' +(\d+|-)' if main.module.resident_memory('VmRSS') is None else r' +\d+'
    for kind in 'training', 'inference':
        assert re.fullmatch(rf'nervenet +{kind} +\d+\.\d\d +\d+ +\d+\.\d{number} +\d+ \(\d+%\)',
                            line_of(printed, f'nervenet             {kind}'))
    assert re.fullmatch(r'stem\.conv1 +\d+\.\d\d +\d+\.\d\d +\d+\.\d% +\d+ +\d+', line_of(printed, 'stem.conv1'))
    assert re.fullmatch(r'ups\.3\.concat +\d+\.\d\d +\d+\.\d\d +\d+\.\d%', line_of(printed, 'ups.3.concat'))
    assert re.fullmatch(r'2:16x16:1:none +\d+\.\d\d +- +\d+\.\d\d +-', line_of(printed, '2:16x16:1:none'))
    assert 'device: ' not in printed and 'host' not in printed and 'left out' not in printed


@pytest.mark.parametrize('device', ['cpu', 'gpu'])
@pytest.mark.parametrize('name, layers', [
    ('unet', ['downs.0.pool', 'ups.3.concat']),
    ('resunet', ['downs.3.conv_shortcut', 'ups.3.upsample']),
    ('resnet', ['stem.blocks.0.add', 'ups.2.upconv']),
    ('refinenet', ['refines.0.reduce', 'upsample']),
    ('optimised-resunet', ['downs.2.dac.stack3', 'downs.2.block.conv_shortcut'])])
def test_every_network_is_measured_with_its_layers(main, request, device, name, layers):
    if device == 'gpu':
        request.getfixturevalue('pool')
    printed = main('--model', name, '--case', '2:16x16:1:batch', '--rounds', 1, '--layers', '--threads', 1, '--device', device)
    network = NETWORKS[name].__name__
    assert f'\n{network} base 2, 16×16, batch 1, norm batch: ' in printed
    if device == 'cpu':
        assert line_of(printed, f'{network}, ms per image') and line_of(printed, '2:16x16:1:batch') and 'left out' not in printed
    table = printed.partition('  layer ')[2].partition('  all layers')[0].splitlines()[1:]
    assert {*layers} <= {line.split()[0] for line in table}
    assert len({line.index('%') for line in table}) == 1                       # the columns stand below each other


def test_the_title_of_the_summary_fits_its_column(main, capsys):
    case = main.module.Case(2, (16, 16), 1, 'none', 'optimised-resunet')
    main.module.print_summary({case: {'training': (1.0, None, None), 'inference': (1.0, None, None)}})
    title, line = capsys.readouterr().out.splitlines()[1:]
    assert title.index('training') + len('training') == line.index('1.00') + len('1.00')


@pytest.mark.parametrize('name', NETWORKS)
@pytest.mark.parametrize('norm', ['none', 'batch'])
def test_no_layer_of_a_model_is_hidden_by_zeros(main, name, norm):
    model = main.module.make_model(main.module.Case(2, (16, 16), 1, norm, name), 'float32')
    assert all(array.any() and array.dtype == 'float32' for array in model.parameters().values())
    assert model.config['norm'] == (None if norm == 'none' else norm) and type(model) is NETWORKS[name]


def test_each_kind_runs_in_a_process_of_its_own_that_does_nothing_else(main, workers, in_workers, tmp_path):
    """Three steps to get warm, one more before each burst and three in it; no forward but the one in each of them."""
    in_workers(f"""
import os, nervenet, nervenet.train

def counted(name, function):
    def call(*inputs, **options):
        with open({str(tmp_path / 'calls')!r}, 'a') as file:
            print(os.getpid(), name, file=file)
        return function(*inputs, **options)
    return call

nervenet.UNet.forward = counted('forward', nervenet.UNet.forward)
for name in 'train_step', 'predict':
    setattr(nervenet.train, name, counted(name, getattr(nervenet.train, name)))
""")
    main('--case', '2:16x16:1', '--rounds', 2)
    training, inference = (str(worker.process.pid) for worker in workers)
    assert (tmp_path / 'calls').read_text().split() == \
        [training, 'train_step', training, 'forward'] * 11 + [inference, 'predict', inference, 'forward'] * 11


def test_a_burst_fills_about_a_second_and_has_three_steps_at_least(main, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(main.module, 'time', types.SimpleNamespace(perf_counter=lambda: now[0]))
    for seconds, warm, steps in (0.125, 8, 8), (0.75, 3, 3), (5.0, 3, 3):
        calls = []

        def step():
            calls.append(1)
            now[0] += seconds

        assert main.module.warm_up(step, 1.0) == steps and len(calls) == warm
        calls.clear()
        assert main.module.burst(step, steps)['seconds'] == seconds and len(calls) == steps + 1


def test_a_burst_counts_page_faults_and_time_in_the_system_per_step(main, monkeypatch):
    module, used = main.module, [types.SimpleNamespace(ru_minflt=minor, ru_majflt=major, ru_stime=system)
                                 for minor, major, system in ((100, 2, 1.0), (400, 5, 1.5))]
    monkeypatch.setattr(module, 'resource', types.SimpleNamespace(RUSAGE_SELF=0, getrusage=lambda who: used.pop(0)))
    taken = module.burst(lambda: None, 3)
    assert (taken['faults'], taken['system']) == (101, 0.5 / 3)
    monkeypatch.setattr(module, 'resource', None)                               # Windows
    taken = module.burst(lambda: None, 3)
    assert (taken['faults'], taken['system']) == (None, None)
    assert module.row('nervenet', 'training', [{**taken, 'seconds': 0.5, 'peak': None}], None, 2, 1e9, 4e9).split() == \
        'nervenet training 250.00 - - - 2 (50%)'.split()


@pytest.mark.skipif(not os.access('/proc/self/clear_refs', os.W_OK), reason='the system does not let the peak begin anew')
def test_peak_memory_is_that_of_the_steps_and_not_of_what_was_before(main):
    numpy.ones(2**27, 'uint8')
    before = main.module.fresh_peak()
    numpy.ones(2**25, 'uint8')
    assert 0.9 * 2**15 < main.module.resident_memory('VmHWM') - before < 1.5 * 2**15         # KiB


def bursts(seconds):
    return {name: [{'seconds': value, 'faults': 7.0, 'system': 0.25e-3, 'peak': 2048} for value in values]
            for name, values in seconds.items()}


def test_a_ratio_is_the_median_over_the_rounds_of_the_rivals_time_by_ours_in_the_same_round(main):
    """The machine is slower in the second round; the quotient of the medians would be 1.5."""
    assert main.module.ratios(bursts({'nervenet': [1, 4, 2], 'rival': [2, 8, 3], 'other': [1, 1, 1]})) == {'rival': 2, 'other': 0.5}
    assert main.module.ratios(bursts({'rival': [2, 8, 3]})) == {} == main.module.ratios(bursts({'nervenet': [1]}))


def test_the_best_rival_of_each_kind_is_named_at_the_end(main, monkeypatch):
    asked, results = [], {'training': bursts({'nervenet': [2.0], 'torch NCHW': [4.0], 'torch channels_last': [3.0]}),
                          'inference': bursts({'nervenet': [1.0], 'torch NCHW': [1.5], 'OpenVINO': [0.5]})}

    def measure(case, kind, contenders, args, folder):
        asked.append(contenders)
        return results[kind]

    monkeypatch.setattr(main.module, 'measure', measure)
    monkeypatch.setattr(main.module, 'agreeing_libraries', lambda *rest: ['torch', 'openvino'])
    printed = main('--case', '2:16x16:2:batch')
    assert asked == [['nervenet', 'torch NCHW', 'torch channels_last'], ['nervenet', 'torch NCHW', 'torch channels_last', 'OpenVINO']]
    assert line_of(printed, 'nervenet             training').split()[2:6] == ['1000.00', '7', '0.2', '2']
    assert line_of(printed, 'torch channels_last  training').split()[3:5] == ['1500.00', '1.50']
    assert line_of(printed, 'OpenVINO             inference').split()[2:4] == ['250.00', '0.50']
    assert re.split(' {2,}', line_of(printed, '2:16x16:2:batch')) == \
        ['2:16x16:2:batch', '1000.00', '1.50', 'torch channels_last', '500.00', '0.50', 'OpenVINO']


def test_rivals_that_are_missing_are_named_in_a_line_and_left_out(main, tmp_path, monkeypatch):
    (tmp_path / 'torch.py').write_text('raise ImportError("no torch here\\nat all")')
    monkeypatch.setenv('PYTHONPATH', f'{tmp_path}{os.pathsep}{ROOT}')
    printed = main('--case', '2:16x16:1', '--rounds', 1, '--against', 'torch', 'compile', 'onnx', 'openvino')
    for name in 'torch', 'compile', 'onnx', 'openvino':
        assert line_of(printed, f'--against {name}:') == f'--against {name}: left out, ImportError: no torch here'
    assert re.fullmatch(r'2:16x16:1:none +\d+\.\d\d +- +\d+\.\d\d +-', line_of(printed, '2:16x16:1:none'))


def test_a_rival_that_computes_something_else_is_left_out_of_the_case(main, in_workers, tmp_path):
    in_workers(REPLACED + """
rivals.versions = lambda library: [library + ' 1']
def check(library, *rest):
    if library == 'onnx':
        raise SystemExit('the probabilities differ by 2.0e-02, expected below 1e-4')
    return 'agrees'
rivals.check, rivals.job = check, lambda *rest: list
""")
    printed = main('--case', '2:16x16:1', '--rounds', 1, '--against', 'onnx', 'compile')
    assert 'onnx 1, compile 1' in printed and line_of(printed, 'torch: agrees')
    assert line_of(printed, 'onnx, check') == 'onnx, check: left out, the probabilities differ by 2.0e-02, expected below 1e-4'
    assert line_of(printed, 'torch.compile        training') and 'ONNX Runtime' not in printed


def test_a_worker_that_dies_is_reported_and_the_others_go_on(main, workers, in_workers, monkeypatch, capsys):
    in_workers(REPLACED + """
def job(contender, *rest):
    if contender == 'hungry':
        print('a warning', file=sys.stderr)
        raise MemoryError('Unable to allocate 9 TiB\\nfor an array')
    return list
rivals.job = job
""")
    args, slept = main.module.parse(['--case', '2:16x16:1', '--rounds', '3']), []

    def sleep(seconds):
        slept.append(seconds)
        if len(slept) == 3:                                     # before the second round
            workers[2].process.kill()
            workers[2].process.wait()

    monkeypatch.setattr(main.module, 'time', types.SimpleNamespace(sleep=sleep, perf_counter=time.perf_counter))
    measured = main.module.measure(args.case[0], 'inference', ['nervenet', 'hungry', 'killed'], args)
    assert [*measured] == ['nervenet'] and len(measured['nervenet']) == 3 and len(slept) == 2 + 2 + 1
    assert capsys.readouterr().out.splitlines() == ['  hungry, inference: left out, MemoryError: Unable to allocate 9 TiB',
                                                    '  killed, inference: left out, ended by SIGKILL']


def test_ctrl_c_ends_the_workers(main, workers, monkeypatch):
    def sleep(seconds):
        assert [worker.process.poll() for worker in workers] == [None]
        raise KeyboardInterrupt

    monkeypatch.setattr(main.module, 'time', types.SimpleNamespace(sleep=sleep, perf_counter=time.perf_counter))
    with pytest.raises(KeyboardInterrupt):
        main('--case', '2:16x16:1')
    assert len(workers) == 1 and workers[0].process.poll() is not None


def test_a_worker_ends_with_whoever_asks_it_even_if_that_is_killed(main):
    args = main.module.parse(['--case', '2:16x16:1'])
    with main.module.Worker(args, kind='inference', contender='nervenet') as worker:
        assert worker.answer() == {} and worker.ask()['seconds'] > 0
        worker.process.stdin.close()                            # as the system does for a process that is gone
        assert worker.process.wait(timeout=10) == 0


def test_growth_on_the_cpu_asks_a_worker_for_each_size(main, monkeypatch):
    monkeypatch.setattr(main.module, 'GROWTH_BYTES', 64 * 64)
    monkeypatch.setattr(main.module, 'make_model', lambda case, dtype: types.SimpleNamespace(training_memory=math.prod))
    asked, real = [], main.module.measure

    def measure(case, kind, *rest):
        asked.append((str(case), kind))
        return real(case, kind, *rest) if len(asked) < 2 else {}

    monkeypatch.setattr(main.module, 'measure', measure)
    printed = main('--case', '1:16x16:1:batch', '--growth')
    assert asked == [(f'1:{size}:batch', kind) for kind in ('training', 'inference') for size in ('32x32:1', '32x32:4', '64x64:1')]
    training, inference = printed.split('  training, UNet base 1, norm batch: ms per image (ns per pixel)')[1].split('  inference, ')
    assert re.fullmatch(r'32×32 +\d+\.\d\d \(\d+\) +failed +too large +too large', line_of(training, '32×32'))
    assert line_of(inference, '128×128').split()[1:] == ['too', 'large'] * 4


def test_the_default_cases_of_the_cpu_name_their_norm(main):
    args = main.module.parse([])
    assert len(args.case) == 7 and args.rounds == 7 and [case.norm for case in args.case].count('batch') == 3
    args = main.module.parse(['--case', '2:16x32:3', '2:16x32:3:none', '--norm', 'batch'])
    assert args.case == [(2, (16, 32), 3, 'batch', 'unet'), (2, (16, 32), 3, 'none', 'unet')]
    assert [str(case) for case in args.case] == ['2:16x32:3:batch', '2:16x32:3:none']


# --- On a GPU

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
    assert line_of(printed, 'device: gpu') == (f'device: gpu (stand-in, tf32), float32; matrix products reach '
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
        large, small = main(*arguments).split('UNet base ')[1:]
        assert large.strip().splitlines()[1:] == ['  nervenet: skipped, does not fit into memory']
        assert '1.5000' in small.split('layer')[0] and 'all layers' in small and pool.frees == 2
    faults['now'] = RuntimeError('an illegal address')
    with pytest.raises(RuntimeError, match='illegal address'):
        main(*arguments)


def test_the_median_of_the_rounds_counts_after_the_first_ones(main):
    taken = iter([90, 80, 5, 4, 7, 1, 2])
    clock = (lambda: 'a mark'), lambda start, end: next(taken) if ready() else None
    ready = itertools.cycle([False, True]).__next__             # `timed` first waits until the device is idle
    (seconds, issued), = main.module.time_jobs([lambda: None], clock, types.SimpleNamespace(rounds=5))
    assert seconds == 4 and issued >= 0 and not list(taken)


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
    case = main.module.Case(2, (16, 32), 3, 'none')
    model = main.module.make_model(case, 'float32', device)
    step = main.module.our_jobs(model, *main.module.make_batch(case, 'float32'))[1]
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
        assert all(seconds == pytest.approx(1.5e-3) for seconds in times.values())
    assert not any('forward' in vars(layer) or 'backward' in vars(layer) for _, layer in model.layers())


@pytest.mark.parametrize('network, before_relu', [('unet', ['stem.norm1', 'stem.norm2', 'ups.3.norm1', 'ups.3.norm2']),
                                                  ('resunet', ['stem.norm2', 'downs.0.norm1', 'downs.0.norm2']),
                                                  ('resnet', ['stem.norm', 'stem.blocks.0.norm1', 'ups.2.norm'])])
def test_the_kernel_of_norm_and_relu_counts_as_the_norm(main, xp_with_kernels, network, before_relu):
    case = main.module.Case(2, (16, 32), 3, 'batch', network)
    model = main.module.make_model(case, 'float32', 'gpu')
    step = main.module.our_jobs(model, *main.module.make_batch(case, 'float32'))[1]
    replaced = fusing.norm_and_relu
    rows = main.module.time_layers(model, step, main.module.our_clock('gpu'))
    shapes = {y.name: y.shape for y in trace(model, (3, 16, 32, 1))[0]}
    for name in before_relu:
        (seconds, operations, touched), relu = rows[name, 'forward'], rows[name.replace('norm', 'relu'), 'forward']
        assert seconds > 0 and (operations, touched) == (0, 2 * 4 * math.prod(shapes[name])) and not relu.any()
        assert rows[name.replace('norm', 'relu'), 'backward'][2] == 2 * 4 * math.prod(shapes[name])
    assert fusing.norm_and_relu is replaced


def test_growth_on_a_gpu(main, pool, monkeypatch):
    monkeypatch.setattr(main.module, 'GROWTH_BYTES', 2**24 + 2**19)
    printed = main('--device', 'gpu', '--case', '1:16x16:1', '--rounds', 1, '--growth', '--threads', 1)
    assert 'training, UNet base 1, norm none: ms per image (ns per pixel)' in printed
    assert line_of(printed.partition('inference, UNet base 1')[2], '32×32').split()[1:3] == ['1.50', '(1465)']


def test_kernels_are_used_where_asked_for(main, pool, monkeypatch):
    for arguments, expected in ([], False), (['--kernels'], True):
        used = []
        monkeypatch.setattr(main.module, 'run_case_on_gpu', lambda *rest: used.append(kernels._on.get()))
        monkeypatch.setattr(main.module, 'print_growth', lambda *rest: used.append(kernels._on.get()))
        for instead in [], ['--growth']:
            main('--device', 'gpu', '--case', '2:16x16:1', '--rounds', 1, *arguments, *instead)
        assert used == [expected, expected]


def test_default_cases_of_a_gpu_are_small_and_large_images_in_small_and_large_batches(main):
    cases = main.module.parse(['--device', 'gpu']).case
    assert len(cases) == 12 and (16, (96, 128), 16, 'none', 'unet') in cases and (64, (416, 576), 64, 'none', 'unet') in cases
    assert main.module.parse(['--device', 'gpu', '--norm', 'batch']).case[0].norm == 'batch'
    assert main.module.parse(['--device', 'gpu', '--case', '8:32x48:4']).case == [(8, (32, 48), 4, 'none', 'unet')]


@pytest.mark.parametrize('arguments, problem', [
    (['--device', 'gpu'], '--device gpu: no CuPy here'),
    (['--model', 'vnet'], "argument --model: invalid choice: 'vnet'"),
    (['--kernels'], '--kernels needs --device gpu'),
    (['--precision', 'tf32'], '--precision tf32: the CPU has no tensor cores'),
    (['--device', 'tpu'], "argument --device: invalid choice: 'tpu'"),
    (['--case', '2:16:2'], "argument --case: '2:16:2' is no case"),
    (['--case', '2:16x0:2'], "argument --case: '2:16x0:2' is no case"),
    (['--case', '2:16x16:2:'], "argument --case: '2:16x16:2:' is no case"),
    (['--case', '2:16x16:2:layer'], "argument --case: '2:16x16:2:layer' is no case"),
    (['--norm', 'batch'], '--norm batch: every case names its own norm'),
    (['--growth', '--layers'], '--growth is a table of its own'),
    (['--rounds', '0'], "argument --rounds: '0' is not a whole number"),
    (['--against', 'tensorflow'], "argument --against: invalid choice: 'tensorflow'"),
    (['--device', 'gpu', '--against', 'torch', 'onnx'], '--against torch onnx: on a GPU the only rival is torch'),
    (['--dtype', 'float64', '--against', 'torch', 'onnx'], '--dtype float64: onnx and openvino are compared in float32')])
def test_bad_requests_end_in_one_line(main, monkeypatch, capsys, arguments, problem):
    monkeypatch.setattr(backend, 'cupy', None)
    monkeypatch.setattr(backend, '_why_no_cupy', 'no CuPy here')
    with pytest.raises(SystemExit) as stop:
        main(*arguments)
    assert stop.value.code not in (0, None)
    said = capsys.readouterr().err.strip() or stop.value.code
    assert problem in said and '\n' not in said


def test_no_pytorch_or_one_without_a_gpu_is_refused_in_one_line_on_a_gpu(main, pool, monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch', None)
    with pytest.raises(SystemExit, match=r'^--against torch: PyTorch cannot be imported [^\n]*$'):
        main('--device', 'gpu', '--against', 'torch')
    torch = types.SimpleNamespace(__version__='2.13.0+cpu', set_num_threads=lambda number: None,
                                  cuda=types.SimpleNamespace(is_available=lambda: False))
    monkeypatch.setitem(sys.modules, 'torch', torch)
    with pytest.raises(SystemExit, match=r'^--against torch: PyTorch 2.13.0\+cpu finds no GPU\. [^\n]*$'):
        main('--device', 'gpu', '--against', 'torch')


@pytest.mark.parametrize('name', ['unet', 'optimised-resunet'])
def test_beside_pytorch_on_a_gpu(main, pool, monkeypatch, request, name):
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

    for function, fake in dict(is_available=lambda: True, Event=Event, reset_peak_memory_stats=lambda: None, empty_cache=lambda: None,
                           max_memory_allocated=lambda: 7 * 2**20).items():
        monkeypatch.setattr(torch.cuda, function, fake)
    if hasattr(torch, 'accelerator'):                           # new in 2.6
        monkeypatch.setattr(torch.accelerator, 'current_accelerator', lambda check_available=False: None)
    for flags, flag in ((torch.backends.cuda.matmul, 'allow_tf32'), (torch.backends.cudnn, 'allow_tf32'),
                        (torch.backends.cudnn, 'benchmark')):           # not attributes that monkeypatch could put back
        request.addfinalizer(functools.partial(setattr, flags, flag, getattr(flags, flag)))
    monkeypatch.setitem(main.module.rivals.TORCH_DEVICE, 'gpu', 'cpu')
    printed = main('--device', 'gpu', '--case', '2:16x16:2', '--rounds', 1, '--against', 'torch', '--norm', 'batch', '--model', name)
    assert 'the two agree in float64' in printed and torch.backends.cudnn.benchmark
    assert precisions[0] == (False, False) and precisions[-1] == (True, True)
    for way in 'fp32 NCHW', 'fp32 channels_last', 'tf32 NCHW', 'tf32 channels_last':
        assert re.fullmatch(rf'torch {way}( +1\.5000){{3}} +\d+\.\d\d \(\d+%\) +7   .*', line_of(printed, f'torch {way} '))
    for label in 'ratio to tf32 channels_last', 'ratio to the best':
        assert line_of(printed, label).removeprefix(label).split() == ['2.00'] * 3


# --- The twin in PyTorch

@pytest.mark.parametrize('name', NETWORKS)
@pytest.mark.parametrize('norm', ['none', 'batch'])
def test_every_network_has_a_twin_in_pytorch(main, name, norm):
    """The images are 20×28: all networks pad them, and cut the logits off."""
    torch, case = pytest.importorskip('torch'), main.module.Case(2, (20, 28), 3, norm, name)
    assert 'the two agree in float64' in main.module.rivals.agreement(torch, main.module.make_model(case, 'float64'),
                                                                      *main.module.make_batch(case, 'float64'))


def test_a_gradient_of_0_is_compared_and_a_wrong_one_is_named(main, monkeypatch):
    """In a ResU-Net norms take away what the biases of shortcuts add, in all blocks but the last."""
    torch, case = pytest.importorskip('torch'), main.module.Case(2, (16, 16), 3, 'batch', 'resunet')
    model, batch = main.module.make_model(case, 'float64'), main.module.make_batch(case, 'float64')
    for name, factor in ('stem.norm_shortcut.bias', 1e9), ('downs.1.conv1.weight', 1 + 1e-5):
        def gradients(name=name, factor=factor):
            return {key: array * (factor if key == name else 1) for key, array in type(model).gradients(model).items()}
        monkeypatch.setattr(model, 'gradients', gradients)
        with pytest.raises(SystemExit, match=f'the two networks disagree: {name} differs by '):
            main.module.rivals.agreement(torch, model, *batch)


def test_a_layer_without_a_counterpart_is_named(main):
    torch, case = pytest.importorskip('torch'), main.module.Case(2, (16, 16), 1, 'none')
    model = main.module.make_model(case, 'float32')
    model.stem.relu2 = model.stem.children['relu2'] = LeakyReLU()
    with pytest.raises(NotImplementedError, match=r'^stem\.relu2 is a LeakyReLU, which has no counterpart in PyTorch yet[^\n]*$'):
        main.module.rivals.torch_twin(torch, model, (1, 16, 16, 1))


def test_the_twin_is_straight_code_that_writes_over_what_nobody_else_reads(main):
    """In a residual block of a RefineNet, x goes through ReLU and past it."""
    torch, case = pytest.importorskip('torch'), main.module.Case(2, (32, 32), 1, 'batch', 'refinenet')
    code = main.module.rivals.torch_twin(torch, main.module.make_model(case, 'float32'), (1, 32, 32, 1)).code
    assert re.search(r'relu\(stages_0_norm, inplace = True\);  stages_0_norm = None', code)
    assert re.search(r'relu\(refines_3_reduce, inplace = False\)$', code, re.M)
    assert re.search(r'refines_3_unit_in_conv2 \+= refines_3_reduce;', code)
