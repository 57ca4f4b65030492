import operator

import numpy
import pytest
from conftest import stand_in

from nervenet.engine import backend


def test_the_array_decides_the_module(xp):
    assert backend.get_array_module(xp.zeros(2)) is xp
    assert backend.get_array_module(numpy.zeros(2)) is numpy
    assert backend.get_array_module(numpy.zeros(2), xp.zeros(2)) is xp


def test_move_there_and_back_keeps_values_and_dtype(xp):
    device = 'cpu' if xp is numpy else 'gpu'
    host = numpy.arange(6, dtype='float32').reshape(2, 3)
    there = backend.move(host, device)
    assert backend.device_of(there) == device
    assert backend.move(there, device) is there
    back = backend.move(there, 'cpu')
    assert back.dtype == numpy.float32 and numpy.array_equal(back, host)


def test_move_refuses_an_unknown_device():
    with pytest.raises(ValueError, match="'tpu'; expected 'cpu' or 'gpu'"):
        backend.move(numpy.zeros(2), 'tpu')


def test_stand_in_refuses_every_implicit_mix_of_host_and_device():
    device, host = stand_in.ones((2, 2)), numpy.ones((2, 2))
    for mix in (lambda: device + host, lambda: host + device, lambda: device @ host, lambda: host @ device,
                lambda: numpy.add(device, host), lambda: numpy.maximum(device, 0), lambda: stand_in.maximum(device, host),
                lambda: stand_in.concatenate([device, host]), lambda: device.__setitem__(0, host[0]), lambda: numpy.asarray(device),
                lambda: operator.iadd(device, host), lambda: operator.iadd(host, device), lambda: device[numpy.array([0, 1])],
                lambda: float(device.sum()), lambda: bool(device[0, 0] > 0), lambda: numpy.exp(device)):
        with pytest.raises(TypeError):
            mix()


def test_generator_like_draws_where_the_array_lives_and_follows_the_seed(xp):
    draws = [backend.to_cpu(backend.generator_like(xp.zeros(1), numpy.random.default_rng(seed)).random(5)) for seed in (1, 1, 2)]
    assert numpy.array_equal(draws[0], draws[1]) and not numpy.array_equal(draws[0], draws[2])
    assert backend.device_of(backend.generator_like(xp.zeros(1), numpy.random.default_rng(1)).random(5)) == \
        backend.device_of(xp.zeros(1))


def test_cpu_is_always_available():
    assert backend.select_device('cpu') == ('cpu', 'fp32', 'device: cpu')


def test_select_device_refuses_an_unknown_request():
    with pytest.raises(ValueError, match="expected 'auto', 'gpu' or 'cpu'"):
        backend.select_device('cuda')


def test_a_working_gpu_is_taken_and_computes_in_tf32_where_it_can(gpu, monkeypatch):
    assert backend.select_device('auto') == ('gpu', 'tf32', 'device: gpu (stand-in, tf32)') and gpu.compute_type == gpu.TF32
    assert backend.select_device('gpu', 'fp32') == ('gpu', 'fp32', 'device: gpu (stand-in, fp32)') and gpu.compute_type != gpu.TF32
    monkeypatch.setattr(gpu, 'capability', '75')
    assert backend.select_device('gpu') == ('gpu', 'fp32', 'device: gpu (stand-in, fp32)') and gpu.compute_type != gpu.TF32
    with pytest.raises(RuntimeError, match='--precision tf32: this GPU has compute capability 7.5; expected a GPU of 8.0'):
        backend.select_device('gpu', 'tf32')


def test_precision_on_the_cpu_is_fp32():
    assert backend.select_device('cpu', 'fp32') == ('cpu', 'fp32', 'device: cpu')
    with pytest.raises(RuntimeError, match='--precision tf32: the CPU has no tensor cores; .* use --precision fp32'):
        backend.select_device('cpu', 'tf32')
    with pytest.raises(ValueError, match="precision is 'fp16'; expected 'fp32' or 'tf32'"):
        backend.select_device('cpu', 'fp16')


def batches_of(rng, sizes):
    return [(rng.random((n, 4, 5, 1), dtype='float32'), rng.integers(0, 9, (n, 3), dtype='uint8'), n) for n in sizes]


def test_batches_copied_ahead_arrive_as_they_were_and_in_order(xp, rng):
    expected = batches_of(rng, [3, 3, 4, 2, 1])
    memory = [numpy.empty((4, 4, 5, 1), 'float32'), numpy.empty((4, 3), 'uint8')]

    def written_over():
        """As a reader might: each batch in the memory of the one before."""
        for images, numbers, n in expected:
            memory[0][:n], memory[1][:n] = images, numbers
            yield memory[0][:n], memory[1][:n], n

    device = 'cpu' if xp is numpy else 'gpu'
    for (images, numbers, n), (arrived, too, m) in zip(expected, backend.copied_ahead(written_over(), device), strict=True):
        assert n == m and backend.device_of(arrived) == backend.device_of(too) == device
        for sent, got in (images, arrived), (numbers, too):
            got = backend.to_cpu(got)
            assert got.dtype == sent.dtype and numpy.array_equal(got, sent)


def test_a_batch_is_copied_while_the_caller_works_on_the_one_before_and_only_copied_once(gpu, rng):
    asked = []

    def reader():
        for number, batch in enumerate(batches_of(rng, [2, 2, 2, 2])):
            asked.append(number)
            yield batch

    batches = backend.copied_ahead(reader(), 'gpu')
    next(batches)
    assert asked == [0, 1] and len(gpu.ledger.copies_in) == 4           # two arrays of two batches
    next(batches)
    assert asked == [0, 1, 2]
    assert len(list(batches)) == 2 and len(gpu.ledger.copies_in) == 8 and gpu.ledger.copies_out == []


def test_a_copy_waits_for_the_computation_that_may_read_its_memory_and_the_host_for_the_copy_that_does(gpu, rng, monkeypatch):
    orders, options_of_streams = [], []

    class Watched(gpu.cuda.Stream):
        def __init__(self, **options):
            super().__init__(**options)
            options_of_streams.append(options)

        def wait_event(self, event):
            orders.append('wait')
            super().wait_event(event)

        def enqueue(self, job, late):
            orders.append('copy')
            super().enqueue(job, late)

    monkeypatch.setattr(gpu.cuda, 'Stream', Watched)
    monkeypatch.setattr(gpu.cuda.Event, 'synchronize', lambda event: orders.append('host waits'))
    list(backend.copied_ahead(batches_of(rng, [1, 1, 1, 1]), 'gpu'))
    first, again = ['wait', 'copy', 'copy'], ['host waits', 'wait', 'copy', 'copy']      # the pinned memory is used again
    assert options_of_streams == [{'non_blocking': True}] and orders == 2 * first + 2 * again


def test_an_error_of_the_reader_comes_through_and_a_caller_may_leave(gpu, rng, monkeypatch):
    def reader():
        yield from batches_of(rng, [1, 1])
        raise OSError('a damaged file')

    batches = backend.copied_ahead(reader(), 'gpu')
    next(batches)
    with pytest.raises(OSError, match='a damaged file'):
        next(batches)
    batches, copies = backend.copied_ahead(batches_of(rng, [1, 1, 1]), 'gpu'), []
    monkeypatch.setattr(gpu.cuda.Stream, 'synchronize', lambda stream: copies.append('all done'))
    next(batches)
    assert copies == []
    batches.close()
    assert copies == ['all done']                                       # before the pinned memory they read is given back


def test_peak_memory_is_the_most_in_use_at_once(pool):
    pool.take(100)
    assert backend.peak_memory(lambda: [pool.take(size) for size in (40, 30, -70, 50)]) == 170
    assert backend.peak_memory(lambda: pool.take(-150)) == 150 and pool.used == 0
    pool.take(500)                                                      # nobody watches any more
    assert backend.peak_memory(lambda: None) == 500


def test_free_memory_collects_what_refers_to_itself_before_it_gives_memory_back(pool, monkeypatch):
    class Kept:
        def __init__(self):
            self.itself = self

        def __del__(self):
            orders.append('collected')

    orders = []
    monkeypatch.setattr(pool, 'free_all_blocks', lambda: orders.append('given back'))
    Kept()
    backend.free_memory()
    assert orders == ['collected', 'given back']


def test_marks_are_the_clock_on_the_cpu_and_events_in_the_current_stream_on_a_gpu(gpu, monkeypatch):
    start = backend.mark('cpu')
    assert backend.seconds_between(start, backend.mark('cpu')) >= 0
    orders, streams = [], []

    class Event(gpu.cuda.Event):
        def record(self, stream=None):
            streams.append(stream)

        def synchronize(self):
            orders.append(self)

    monkeypatch.setattr(gpu.cuda, 'Event', Event)
    monkeypatch.setattr(gpu.cuda, 'get_elapsed_time', lambda *events: orders.append(events) or 250.0)       # milliseconds
    start, end = backend.mark('gpu'), backend.mark('gpu')
    assert backend.seconds_between(start, end) == 0.25 and orders == [end, (start, end)]
    assert streams == [gpu.cuda.get_current_stream()] * 2


def broken(fault):
    """A stand-in that imports well and fails in use, as CuPy does without a driver, a compiler or cuBLAS."""
    class Broken(type(stand_in)):
        pass
    module = Broken('broken')
    if fault == 'no driver':
        def raises():
            raise OSError('libcuda.so.1: cannot open shared object file\nsecond line')
        module.cuda = type('cuda', (), {'runtime': type('runtime', (), {'getDeviceCount': staticmethod(raises)})})
    elif fault == 'no device':
        module.cuda = type('cuda', (), {'runtime': type('runtime', (), {'getDeviceCount': staticmethod(lambda: 0)})})
    elif fault == 'no compiler':
        def arange(*args, **kwargs):
            raise RuntimeError('cannot compile')
        module.arange = arange
    elif fault == 'wrong product':
        module.arange = lambda *args, **kwargs: stand_in.zeros(4)
    return module


@pytest.mark.parametrize('fault, reason', [
    ('no driver', 'OSError: libcuda.so.1: cannot open shared object file'), ('no device', 'finds no CUDA device'),
    ('no compiler', 'cannot compile'), ('wrong product', 'computes wrongly')])
def test_auto_falls_back_in_one_line_and_gpu_fails_with_it(monkeypatch, fault, reason):
    monkeypatch.setattr(backend, 'cupy', broken(fault))
    device, precision, line = backend.select_device('auto')
    assert (device, precision) == ('cpu', 'fp32') and reason in line and '\n' not in line
    with pytest.raises(RuntimeError) as error:
        backend.select_device('gpu')
    message = str(error.value)
    assert reason in message and 'nervenet[cuda12]' in message and '--device cpu' in message and '\n' not in message


def test_without_cupy_the_reason_is_told(monkeypatch):
    monkeypatch.setattr(backend, 'cupy', None)
    monkeypatch.setattr(backend, '_why_no_cupy', 'CuPy cannot be imported (ImportError: no module)')
    assert backend.select_device('auto') == ('cpu', 'fp32', 'device: cpu, because CuPy cannot be imported (ImportError: no module)')
    with pytest.raises(RuntimeError, match='cannot be imported'):
        backend.move(numpy.zeros(1), 'gpu')
