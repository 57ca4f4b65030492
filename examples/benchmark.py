"""Measure how fast the U-Net trains and predicts on this machine.

    python examples/benchmark.py                                        seven cases, about three minutes
    python examples/benchmark.py --case 32:96x128:16:batch --layers     one network, each layer by itself
    python examples/benchmark.py --growth                               time against image size and batch
    python examples/benchmark.py --against torch compile onnx openvino  beside other engines, those that are installed
    python examples/benchmark.py --device gpu --against torch           on an NVIDIA GPU

A case is base channels, height×width, batch and norm: 16:96x128:16:batch. `--norm` is for cases that name none.

What is measured is what users do, in the plain loop in which they do it: training (`train_step`: forward, Dice loss, backward,
Adam) and inference (`predict`). Every contender does one of the two in a process of its own, which does nothing else. A
benchmark that runs anything beforehand, be it the forward pass alone, measures something else: the memory that this leaves
behind is there for all that follows, which a user's loop would have to ask the system for in every step.

Once every process has built its network and warmed up, they take turns, round after round, each with a burst of consecutive
steps of about half a second, while the others wait. Between two bursts there is a pause, since the threads of some engines
go on spinning for a while. So a change of the machine's load meets all alike. For each contender, medians over the rounds:

    ms per image          of a training step or of inference
    ratio                 its time over ours of the same round: above 1, nervenet is faster. The best rival counts
    faults per step       pages of memory that the system had to provide or find
    system ms per step    what the system spent on that and on all else, summed over the threads
    peak MiB              not a median: the most resident memory since the first step, less what was there with the network
                          built. For torch.compile that includes compiling
    GF/s                  two operations per multiply-add of the convolutions as the formula says them (three times as many in
                          training), whatever way they are computed. So a fast algorithm may exceed the machine's peak, which
                          is measured as the speed of large matrix products on the same threads

`--against` names the rivals: `torch` is PyTorch, in both memory formats; `compile` is its compiler, in channels_last; `onnx` is ONNX
Runtime and `openvino` is OpenVINO, both for inference only. All have the same network with the same weights, float32 and
as many threads as nervenet. Before anything is timed, outputs and gradients of PyTorch have to agree with ours in float64, and
each rival's probabilities with ours to a thousandth. Who is missing, fails or disagrees is named and left out.

On a GPU the host only orders work, and the device does it later. So times are between two events on the device, from an idle
start, the median of the rounds, all in this process, and of forward alone too. `host ms per step` is how long the host takes to
order a training step, with its share of the step: near 100 % the device waits for the host, and faster kernels would not help.
The peak is a large matrix product in the chosen precision. Layers without products are held to the copy of a large array instead, by the bytes of what they are given
and return. Contenders run one after the other, since each may need all of the memory, and what does not fit is left out; peak
MiB are all that a contender's arrays take in a training step, parameters included. PyTorch runs in float32 and in TF32, with
cuDNN trying its algorithms first, and Adam in one kernel; that the networks agree is checked on the host, on small images.
"""

import argparse
import contextlib
import functools
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import typing

import numpy

import nervenet
import rivals
from nervenet.engine import kernels
from nervenet.engine.backend import free_memory, get_array_module, mark, move, peak_memory, seconds_between, select_device
from nervenet.losses import DiceLoss
from nervenet.optim import Adam
from nervenet.engine.parallel import describe_blas, number_of_threads, parallel_for, set_threads
from nervenet.train import predict, train_step

try:
    import resource
except ImportError:             # not a Unix: page faults and system time stay unknown
    resource = None

GROWTH_BYTES = 4 * 2**30         # cases of the growth table that need more are left out
PRODUCT_SIDE, COPY_BYTES = 8192, 2**30          # what the ceilings of a GPU are measured with
DISCARDED = 2                    # rounds of a GPU before those that count: it compiles, reserves memory and tries algorithms
BURST, PAUSE = 0.5, 0.3          # seconds on the CPU: about how long one contender runs at a time, and how long none does
LEAST_STEPS = 3                  # of a warm-up and of a burst
TOLERANCE = 1e-3                 # of a rival's probabilities, relative to ours
KINDS = {'training': 3, 'inference': 1}         # forwards' worth of operations: backward does each product twice


class Case(typing.NamedTuple):
    """A network and a batch to time it on."""
    base: int
    size: tuple                     # (H, W)
    batch: int
    norm: str = None                # or 'batch'; 'default' if it is for --norm to say

    def __str__(self):
        return f'{self.base}:{self.size[0]}x{self.size[1]}:{self.batch}:{self.norm or "none"}'


class Convention(typing.NamedTuple):
    """How the results of a device are written."""
    cases: list
    rounds: int
    decimals: int                   # of milliseconds
    unit: str                       # of rates: `scale` operations per second
    scale: float
    rate_decimals: int

    def rate(self, operations_per_second):
        return f'{operations_per_second / self.scale:.{self.rate_decimals}f}'


CONVENTIONS = {
    'cpu': Convention(['16:96x128:16:none', '16:96x128:16:batch', '32:96x128:16:none', '32:96x128:16:batch', '64:128x128:4:none',
                       '32:416x576:1:none', '16:96x128:1:batch'], 5, 2, 'GF/s', 1e9, 0),
    'gpu': Convention([f'{base}:{size}:{batch}' for size in ('96x128', '416x576') for base in (16, 32, 64) for batch in (16, 64)],
                      10, 4, 'TF/s', 1e12, 1)}


def main(arguments=None):
    args = parse(arguments)
    if args.worker:
        be_worker(json.loads(args.worker))
        return
    if args.threads:
        set_threads(args.threads)
    try:
        device, _, where = select_device(args.device, args.precision)
    except RuntimeError as error:
        raise SystemExit(f'benchmark.py: {error}') from None
    if device == 'gpu':
        benchmark_gpu(where, args)
    else:
        benchmark_cpu(args)


def print_growth(time_kind, args):
    """Print how the time of training and inference grows with image and batch, for the first case's base and norm.

    `time_kind(kind, case)` returns the seconds of one step, or None if that failed.
    """
    first, sides, batches = args.case[0], (32, 64, 128, 256, 512), (1, 4, 16, 64)
    model = make_model(first.base, first.norm, args.dtype)
    for kind in KINDS:
        print(f'\n  {kind}, base {first.base}: ms per image (ns per pixel)\n  {"":9}' + ''.join(f'{f"batch {N}":>18}' for N in batches))
        for side in sides:
            print(f'  {f"{side}×{side}":9}', end='')
            for N in batches:
                cell = 'too large'
                if model.training_memory((N, side, side, 1)) <= GROWTH_BYTES:
                    seconds = time_kind(kind, first._replace(size=(side, side), batch=N))
                    cell = f'{seconds / N * 1e3:.2f} ({seconds / N / side**2 * 1e9:.0f})' if seconds else 'failed'
                print(f'{cell:>18}', end='', flush=True)
            print()


def make_batch(case, dtype):
    """Return random images (N, H, W, 1) in [0, 1] and masks of 0 and 1."""
    shape = case.batch, *case.size, 1
    rng = numpy.random.default_rng(0)
    return rng.random(shape).astype(dtype), (rng.random(shape) > 0.7).astype(dtype)


def make_model(base, norm, dtype, device='cpu'):
    return nervenet.UNet(base_channels=base, norm=norm, rng=numpy.random.default_rng(1), dtype=dtype).to(device)


def our_jobs(model, x, target):
    """Return what is timed: forward, training step, inference."""
    x, target = move(x, model.device), move(target, model.device)
    loss, optimizer = DiceLoss(), Adam(model.parameters(), 1e-4)
    return (lambda: model.forward(x),
            lambda: train_step(model, loss, optimizer, x, target),
            lambda: predict(model, x))


# --- On the CPU: the process that asks --------------------------------------------------------------------------------

def benchmark_cpu(args):
    against = [option for option in args.against if is_installed(option)]
    peak = measure_peak(args.dtype)
    print(', '.join([f'nervenet {nervenet.__version__}', f'Python {platform.python_version()}', f'NumPy {numpy.__version__}',
                     *rivals.versions(against)]))
    print(describe_blas())
    if 'OPENBLAS_CORETYPE' in os.environ:
        print(f'OPENBLAS_CORETYPE is {os.environ["OPENBLAS_CORETYPE"]}: that can halve the speed; unset it to measure what users get')
    print(f'{number_of_threads()} threads, {args.dtype}; matrix products reach {args.convention.rate(peak)} GF/s', flush=True)
    if args.growth:
        print_growth(functools.partial(time_alone, args=args), args)
        return
    summary = {case: run_case_on_cpu(case, against, args, peak) for case in args.case}
    print_summary(summary, args.kinds)


def is_installed(option):
    """Return whether a choice of --against can run, and say so if not."""
    absent = rivals.missing(option)
    if absent:
        print(f'--against {option}: left out, for {" and ".join(absent)} cannot be imported', flush=True)
    return not absent


def run_case_on_cpu(case, against, args, peak):
    """Time one case and print its table; return kind → as in `compare`, of the kinds that were timed."""
    model = make_model(case.base, case.norm, args.dtype)
    operations = 2 * model.multiply_adds((case.batch, *case.size, 1))            # of one forward
    H, W = case.size
    print(f'\n{case}: U-Net base {case.base}, {H}×{W}, batch {case.batch}, norm {case.norm or "none"}: '
          f'{operations / case.batch / 1e9:.2f} GF per image and forward', flush=True)
    if against:
        try:
            print(f'  {run_apart(specify("agreement", case, args)).strip()}', flush=True)
        except WorkerDied as reason:
            print(f'  rivals left out, for agreement with PyTorch could not be shown: {reason}', flush=True)
            against = []
    print(f'  {"contender":22}{"kind":11}{"ms per image":>13}{"ratio":>8}{"faults per step":>17}{"system ms per step":>20}'
          f'{"peak MiB":>10}{"GF/s (of peak)":>18}', flush=True)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in args.kinds:
            names = ['nervenet', *(name for name, rival in rivals.RIVALS.items() if rival.option in against and kind in rival.kinds)]
            expected = os.path.join(folder, 'probabilities.npy')
            samples = measure_in_turns({name: specify(kind, case, args, contender=name, expected=expected) for name in names}, args)
            ratios = compare(samples)
            for name, bursts in samples.items():
                seconds, faults, system = (median_of(bursts, what) for what in ('seconds', 'faults', 'system'))
                rate = KINDS[kind] * operations / seconds
                cells = [f'{seconds / case.batch * 1e3:.2f}', known(ratios.get(name), '.2f'), known(faults, '.0f'),
                         known(system and system * 1e3, '.1f'), known(bursts[-1]['peak'], '.0f'),
                         f'{args.convention.rate(rate)} ({rate / peak:.0%})']
                print(f'  {name:22}{kind:11}' + ''.join(f'{cell:>{width}}' for cell, width in zip(cells, (13, 8, 17, 20, 10, 18))),
                      flush=True)
            if 'nervenet' in samples:
                results[kind] = median_of(samples['nervenet'], 'seconds') / case.batch, ratios
    if args.layers:
        try:
            print(run_apart(specify('layers', case, args)), end='', flush=True)
        except WorkerDied as reason:
            print(f'  layers: {reason}', flush=True)
    return results


def median_of(bursts, what):
    """Return the median over the bursts, None where it is unknown."""
    return None if bursts[0][what] is None else statistics.median(burst[what] for burst in bursts)


def known(value, form):
    return '–' if value is None else format(value, form)


def compare(samples):
    """Return name → ratio of each rival: the median over the rounds of its time over that of nervenet in the same round."""
    ours = samples.get('nervenet', [])
    return {name: statistics.median(their['seconds'] / our['seconds'] for their, our in zip(bursts, ours))
            for name, bursts in samples.items() if ours and name != 'nervenet'}


def print_summary(summary, kinds):
    """Print a line for each case: our time and the ratio to the best rival, of each kind of work."""
    print(f'\n{"case":22}' + ''.join(f'{f"{kind}: ms per image":>26}  {"ratio to the best rival":28}' for kind in kinds).rstrip())
    for case, results in summary.items():
        cells = []
        for kind in kinds:
            seconds, ratios = results.get(kind, (None, {}))
            best = min(ratios, key=ratios.get, default=None)
            cells.append(f'{known(seconds and seconds * 1e3, ".2f"):>26}  {f"{ratios[best]:.2f} ({best})" if best else "–":28}')
        print(f'{case!s:22}{"".join(cells).rstrip()}')


def time_alone(kind, case, args):
    """Return the seconds of a step of ours, None if it failed."""
    samples = measure_in_turns({'nervenet': specify(kind, case, args, contender='nervenet')}, args)
    return median_of(samples['nervenet'], 'seconds') if samples else None


def measure_in_turns(specifications, args):
    """Return name → what `burst` returned in each round, of those that came through; say why the others did not."""
    with contextlib.ExitStack() as stack:
        workers, steps, samples = {}, {}, {}

        def ask(name, question):
            try:
                return question()
            except WorkerDied as reason:
                print(f'  {name}, {specifications[name]["kind"]}: left out ({reason})', flush=True)
                for known_of in workers, steps, samples:
                    known_of.pop(name, None)

        for name, specification in specifications.items():              # one after the other: a warm-up disturbs nobody
            workers[name] = stack.enter_context(Worker(specification))
            ready = ask(name, workers[name].answer)
            if ready:
                steps[name], samples[name] = max(LEAST_STEPS, round(BURST / ready['seconds'])), []
        for _ in range(args.rounds):
            for name in list(workers):
                if len(workers) > 1:
                    time.sleep(PAUSE)
                measured = ask(name, functools.partial(workers[name].burst, steps[name]))
                if measured:
                    samples[name].append(measured)
        return samples


class WorkerDied(Exception):
    """A process ended before it answered; the text says why."""


class Worker:
    """A process that builds one contender, warms up, says so, and then does a burst of steps whenever it is asked."""

    def __init__(self, specification):
        self.errors = tempfile.TemporaryFile()          # not a pipe: nobody would empty it meanwhile
        self.process = subprocess.Popen(worker_command(specification), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=self.errors, text=True, env=worker_environment(specification))

    def answer(self):
        """Wait for a line of the worker and return what it holds. Raises WorkerDied."""
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.errors.seek(0)
            raise WorkerDied(why_it_ended(self.process.returncode, self.errors.read().decode(errors='replace')))
        return json.loads(line)

    def burst(self, steps):
        """Let the worker do `steps` steps and return what it says about them."""
        with contextlib.suppress(BrokenPipeError):      # it is dead, and `answer` says why
            print(steps, file=self.process.stdin, flush=True)
        return self.answer()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.wait()
        self.errors.close()
        self.process.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()


def specify(kind, case, args, **more):
    """Return what a worker has to know, ready for JSON."""
    return dict(kind=kind, case=case, dtype=args.dtype, threads=args.threads, rounds=args.rounds, burst=BURST, **more)


def worker_command(specification):
    return [sys.executable, __file__, '--worker', json.dumps(specification)]


def worker_environment(specification):
    threads = {'OMP_NUM_THREADS': str(specification['threads'])} if specification['threads'] else {}
    return {**os.environ, **threads, 'TORCHINDUCTOR_COMPILE_THREADS': '1'}      # else torch.compile starts processes, which stay


def run_apart(specification):
    """Return what a worker that answers no questions prints. Raises WorkerDied."""
    done = subprocess.run(worker_command(specification), capture_output=True, text=True, env=worker_environment(specification))
    if done.returncode:
        raise WorkerDied(why_it_ended(done.returncode, done.stderr))
    return done.stdout


def why_it_ended(code, errors):
    """Return in one line why a process ended: its last word, and the signal if one killed it."""
    said = [line.strip() for line in errors.splitlines() if line.strip()][-1:]
    killed = [f'killed by signal {-code} ({signal.Signals(-code).name})'] if code < 0 else []
    return '; '.join(killed + said) or f'it ended with exit code {code} and without a word'


# --- On the CPU: the processes that work ------------------------------------------------------------------------------

def be_worker(specification):
    """Do what a specification says, in this process. An error ends it with one line."""
    answers = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)                                           # what engines print must not be taken for an answer
    signal.signal(signal.SIGINT, signal.SIG_IGN)            # Ctrl-C is for the process that asks; it ends this one
    if specification['threads']:
        set_threads(specification['threads'])
    kind, case = specification['kind'], Case(*specification['case'])
    try:
        if kind == 'agreement':
            small = case._replace(size=(48, 64), batch=2)
            model = make_model(small.base, small.norm, 'float64')
            print(rivals.agreement(rivals.import_torch(), model, *make_batch(small, 'float64')), file=answers)
        elif kind == 'layers':
            model = make_model(case.base, case.norm, specification['dtype'])
            step = our_jobs(model, *make_batch(case, specification['dtype']))[1]
            with contextlib.redirect_stdout(answers):
                print_layers(model, step, 'cpu', specification['rounds'], None)
        else:
            take_turns(kind, case, specification, answers)
        answers.close()
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise SystemExit(': '.join([type(error).__name__, *lines[:1]])) from None


def take_turns(kind, case, specification, answers):
    """Build a contender, warm up, say how long a step takes, and answer each number of steps with what they took."""
    model, (x, target) = make_model(case.base, case.norm, specification['dtype']), make_batch(case, specification['dtype'])
    ours = specification['contender'] == 'nervenet'
    if ours:
        step = our_jobs(model, x, target)[1 if kind == 'training' else 2]
    else:
        step = rivals.RIVALS[specification['contender']].build(model, kind, x, target)
    del model
    built = forget_peak()
    result = step()
    if kind == 'inference' and 'expected' in specification:
        check_probabilities(result, specification['expected'], ours)
    del result
    seconds, end = [], time.perf_counter() + specification['burst']
    while len(seconds) < LEAST_STEPS or time.perf_counter() < end:
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)

    def answer(**values):
        print(json.dumps(values), file=answers, flush=True)

    answer(seconds=statistics.median(seconds))
    for line in sys.stdin:
        answer(**burst(step, json.loads(line)), peak=built and (resident_memory('VmHWM') - built) / 1024)


def check_probabilities(result, file, ours):
    """Leave our probabilities in a file, or hold those of a rival to it. Raises ValueError."""
    if ours:
        numpy.save(file, result)
    elif os.path.exists(file):                              # else nervenet was left out itself, and nothing is compared
        error = rivals.relative_error(result, numpy.load(file))
        if not error <= TOLERANCE:
            raise ValueError(f'its probabilities differ from those of nervenet by {error:.1e}, expected below {TOLERANCE:.0e}')


def burst(step, steps):
    """Do `steps` steps; return seconds, page faults and system seconds of one, the last two None where they are not known."""
    def now():
        used = resource and resource.getrusage(resource.RUSAGE_SELF)
        return time.perf_counter(), *((used.ru_minflt + used.ru_majflt, used.ru_stime) if used else ())

    before = now()
    for _ in range(steps):
        step()
    seconds, faults, system = [(b - a) / steps for a, b in zip(before, now())] if resource else (
        (time.perf_counter() - before[0]) / steps, None, None)
    return dict(seconds=seconds, faults=faults, system=system)


def forget_peak():
    """Let the peak of resident memory begin here; return the memory in KiB, None where it cannot be known."""
    try:
        with open('/proc/self/clear_refs', 'w') as file:
            file.write('5')
        return resident_memory('VmRSS')
    except OSError:                                         # no Linux, or a sandbox without it
        return None


def resident_memory(field):
    """Return a field of /proc/self/status in KiB: VmRSS is what the process holds now, VmHWM the most since the peak began."""
    with open('/proc/self/status') as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field))


def measure_peak(dtype):
    """Return operations per second of large matrix products, one per thread at a time: the most that any product here can reach."""
    size, rng = 1024, numpy.random.default_rng(0)
    a, threads = rng.random((size, size)).astype(dtype), number_of_threads()
    best = float('inf')
    for _ in range(5):
        start = time.perf_counter()
        parallel_for(range(4 * threads), lambda block: a @ a)
        best = min(best, time.perf_counter() - start)
    return 4 * threads * 2 * size**3 / best


# --- On a GPU ---------------------------------------------------------------------------------------------------------

class Contender(typing.NamedTuple):
    """A library in one way of using it."""
    build: typing.Callable          # returns what is timed: forward, training step, inference
    clock: tuple                    # two functions, as backend.mark (without argument) and backend.seconds_between
    peak_memory: typing.Callable    # as backend.peak_memory and backend.free_memory
    free_memory: typing.Callable


def benchmark_gpu(where, args):
    torch = rivals.import_torch('gpu') if args.against else None
    how, (peak, copying) = args.convention, measure_ceilings(args)
    versions = f'nervenet {nervenet.__version__}, Python {platform.python_version()}, NumPy {numpy.__version__}'
    print(versions + (f', PyTorch {torch.__version__}' if torch else ''))
    print(f'CuPy {get_array_module(move(numpy.zeros(1), "gpu")).__version__}')
    print(f'{where}, {args.dtype}; matrix products reach {how.rate(peak)} {how.unit}, copies {copying / 1e9:.0f} GB/s', flush=True)
    with kernels.use_kernels() if args.kernels else contextlib.nullcontext():
        if args.growth:
            print_growth(functools.partial(time_on_gpu, args=args), args)
            return
        for case in args.case:
            run_case_on_gpu(case, args, (peak, copying), torch)


def run_case_on_gpu(case, args, ceilings, torch):
    """Time one case and print its lines."""
    (base, (H, W), N, norm), (x, target) = case, make_batch(case, args.dtype)
    model = make_model(base, norm, args.dtype)
    operations = 2 * model.multiply_adds(x.shape)                # of one forward; backward does each product twice
    print(f'\nU-Net base {base}, {H}×{W}, batch {N}, norm {norm or "none"}: {operations / N / 1e9:.2f} GF per image and forward')

    def build():
        return our_jobs(make_model(base, norm, args.dtype, 'gpu'), x, target)

    contenders, ratios = {'nervenet': Contender(build, our_clock('gpu'), peak_memory, free_memory)}, {}
    if torch:
        small = case._replace(size=(48, 64), batch=2)
        print(f'  {rivals.agreement(torch, make_model(base, norm, "float64"), *make_batch(small, "float64"))}')
        theirs = torch_contenders(torch, model, x, target)
        contenders |= theirs
        ratios = {'ratio to tf32 channels_last': ['torch tf32 channels_last'], 'ratio to the best': theirs}
    times, memory = measure(contenders, args)
    print_times(times, memory, ratios, operations, N, args, ceilings)
    if args.layers and 'nervenet' in times:
        with skipping('layers'):
            model.to('gpu')
            print_layers(model, our_jobs(model, x, target)[1], 'gpu', args.rounds, ceilings)


def torch_contenders(torch, model, x, target):
    """Return name → Contender, with the weights of `model`: both memory formats, each of them in float32 and in TF32."""
    formats = {'NCHW': torch.contiguous_format, 'channels_last': torch.channels_last}

    def contender(memory_format, precision):
        def build():
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == 'tf32'
            other = rivals.torch_unet(torch, model).to(rivals.TORCH_DEVICE['gpu'], memory_format=memory_format)
            return rivals.torch_jobs(torch, other, memory_format, x, target)
        return Contender(build, rivals.torch_clock(torch), functools.partial(rivals.torch_peak_memory, torch), torch.cuda.empty_cache)

    return {f'torch {precision} {name}': contender(memory_format, precision)
            for precision in ('fp32', 'tf32') for name, memory_format in formats.items()}


def print_times(times, memory, ratios, operations, N, args, ceilings):
    """Print a line for each of `times`, which are of N images, and for each of `ratios`: label → names of rivals."""
    if not times:
        return
    how, width = args.convention, max(20, 1 + max(map(len, [*times, *ratios])))
    print(f'  {"ms per image":{width}}{"forward":>10}{"train step":>12}{"predict":>10}{"host ms per step":>20}{"peak MiB":>10}   '
          f'{how.unit} (of peak): train, predict')
    for name, ((forward, _), (step, issued), (inference, _)) in times.items():
        rates = ', '.join(f'{how.rate(rate)} ({rate / ceilings[0]:.0%})'
                          for rate in (3 * operations / step, operations / inference))
        cells = [f'{seconds / N * 1e3:.{how.decimals}f}' for seconds in (forward, step, inference)]
        print(f'  {name:{width}}{cells[0]:>10}{cells[1]:>12}{cells[2]:>10}{f"{issued * 1e3:.2f} ({issued / step:.0%})":>20}'
              f'{memory[name] / 2**20:10.0f}   {rates}')
    for label, names in ratios.items():
        found = [times[name] for name in names if name in times]
        if found and 'nervenet' in times:
            cells = [min(rival[job][0] for rival in found) / times['nervenet'][job][0] for job in range(3)]
            print(f'  {label:{width}}{cells[0]:10.2f}{cells[1]:12.2f}{cells[2]:10.2f}')


def measure(contenders, args):
    """Return (times, memory): name → as in `time_jobs`; name → bytes that a training step takes at most.

    Each contender is built, timed and dropped before the next: the large cases need all of the device's memory.
    """
    times, memory = {}, {}

    def measure_alone(name, contender):                     # a function, so that all it built goes when it returns
        jobs = contender.build()
        measured = time_jobs(jobs, contender.clock, args.rounds)
        memory[name] = contender.peak_memory(jobs[1])
        times[name] = measured

    for name, contender in contenders.items():
        with skipping(name):
            measure_alone(name, contender)
        contender.free_memory()
    return times, memory


@contextlib.contextmanager
def skipping(what):
    """Go on, with a line that says so, if `what` does not fit into memory."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, MemoryError) and type(error).__name__ != 'OutOfMemoryError':       # PyTorch's is another kind
            raise
        print(f'  {what}: skipped, does not fit into memory')


def our_clock(device):
    return functools.partial(mark, device), seconds_between


def timed(job, clock):
    """Return the seconds one call of `job` takes, and those until it returns, which on a GPU is when the work is ordered."""
    now, between = clock
    between(now(), now())                               # waits until a GPU is idle
    start, called = now(), time.perf_counter()
    job()
    issued = time.perf_counter() - called
    return between(start, now()), issued


def time_jobs(jobs, clock, rounds):
    """Return the medians (seconds, seconds until it returned) of each job; in a round, each is called twice, the first time unmeasured."""
    samples = [[] for _ in jobs]
    for _ in range(DISCARDED + rounds):
        for job, pairs in zip(jobs, samples):
            job()
            pairs.append(timed(job, clock))
    return [tuple(map(statistics.median, zip(*pairs[DISCARDED:]))) for pairs in samples]


def time_on_gpu(kind, case, args):
    """Return the seconds of a step of ours."""
    job = our_jobs(make_model(case.base, case.norm, args.dtype, 'gpu'), *make_batch(case, args.dtype))[1 if kind == 'training' else 2]
    return time_jobs([job], our_clock('gpu'), args.rounds)[0][0]


def measure_ceilings(args):
    """Return (operations per second of large matrix products, bytes per second of a copy)."""
    a = move(numpy.random.default_rng(0).random((PRODUCT_SIDE, PRODUCT_SIDE)).astype(args.dtype), 'gpu')
    xp = get_array_module(a)
    source, copy = xp.zeros(COPY_BYTES, 'uint8'), xp.zeros(COPY_BYTES, 'uint8')
    jobs = (lambda: a @ a, lambda: xp.copyto(copy, source))
    (product, _), (copying, _) = time_jobs(jobs, our_clock('gpu'), args.rounds)
    return 2 * PRODUCT_SIDE**3 / product, 2 * COPY_BYTES / copying          # each byte is read and written


# --- Layers -----------------------------------------------------------------------------------------------------------

def leaves(model):
    """Yield (name, layer) for every layer that computes something itself."""
    for prefix, layer in model.layers():
        if prefix and not layer.children:
            yield prefix[:-1], layer


def time_layers(model, job, clock):
    """Run `job` with a clock in every layer; return (name, 'forward' or 'backward') → (seconds, operations, bytes).

    Bytes are those of the arrays that the layer is given and that it makes of them. The kernel that does norm and ReLU at once
    counts as the norm's forward; that ReLU then has none.
    """
    (now, between), calls, hidden = clock, [], []
    counted, normalize_relu = {}, kernels.normalize_relu

    def marked_kernel(x, *channels):
        start = now()
        y = normalize_relu(x, *channels)
        norm = calls[-1][0][0].replace('conv', 'norm')                          # it follows the convolution called last
        calls.append(((norm, 'forward'), start, now(), 0, x.nbytes + y.nbytes))
        return y

    for name, layer in leaves(model):
        for method in ('forward', 'backward'):
            def marked(*inputs, name=name, layer=layer, method=method, **options):
                start = now()
                result = getattr(type(layer), method)(layer, *inputs, **options)
                end = now()
                if method == 'forward':
                    counted[name] = layer.multiply_adds(inputs[0].shape)
                outputs = [array for array in (result if isinstance(result, tuple) else [result]) if array is not None]
                products = 1 if method == 'forward' else len(outputs) + 1           # backward: dweight, and dx if it is wanted
                touched = 0 if result is inputs[0] else sum(array.nbytes for array in (*inputs, *outputs))
                calls.append(((name, method), start, end, products * 2 * counted.get(name, 0), touched))
                return result
            setattr(layer, method, marked)          # an attribute of the object hides the method of its class
            hidden.append((layer, method))
    kernels.normalize_relu = marked_kernel
    try:
        job()
    finally:
        kernels.normalize_relu = normalize_relu
        for layer, method in hidden:
            delattr(layer, method)
    rows = {(name, method): numpy.zeros(3) for name, _ in leaves(model) for method in ('forward', 'backward')}
    for key, start, end, operations, touched in calls:
        rows[key] += between(start, end), operations, touched
    return rows


def print_layers(model, step, device, rounds, ceilings):
    """Print what each layer costs in a training step, the median of the rounds; `ceilings` only on a GPU."""
    how = CONVENTIONS[device]
    labels, width = (('forward (of ceiling)', 'backward'), 20) if ceilings else (('GF/s forward', 'backward'), 10)
    step()
    runs = [time_layers(model, step, our_clock(device)) for _ in range(rounds)]
    rows = {key: (statistics.median(run[key][0] for run in runs), *runs[0][key][1:]) for key in runs[0]}
    total = {method: sum(row[0] for key, row in rows.items() if key[1] == method) for method in ('forward', 'backward')}
    print(f'  {"layer":24}{"forward ms":>12}{"backward ms":>13}{"share":>8}{labels[0]:>{width + 4}}{labels[1]:>{width}}')
    for name, _ in leaves(model):
        forward, backward = rows[name, 'forward'], rows[name, 'backward']
        rates = f'{layer_rate(*forward, how, ceilings):>{width + 4}}{layer_rate(*backward, how, ceilings):>{width}}'.rstrip()
        print(f'  {name:24}{forward[0] * 1e3:12.{how.decimals}f}{backward[0] * 1e3:13.{how.decimals}f}'
              f'{(forward[0] + backward[0]) / sum(total.values()):8.1%}{rates}')
    print(f'  {"all layers":24}{total["forward"] * 1e3:12.{how.decimals}f}{total["backward"] * 1e3:13.{how.decimals}f}')


def layer_rate(seconds, operations, touched, how, ceilings):
    """Return, as text, the rate of a layer's products; on a GPU with its share of the ceiling, and without products that of bytes."""
    if operations:
        share = f' {how.unit} ({operations / seconds / ceilings[0]:.0%})' if ceilings else ''
        return how.rate(operations / seconds) + share
    return f'{touched / seconds / 1e9:.0f} GB/s ({touched / seconds / ceilings[1]:.0%})' if ceilings and touched else ''


# --- Arguments --------------------------------------------------------------------------------------------------------

def parse_case(text):
    """Turn '32:96x128:16:batch' into a Case; without a norm, its norm is 'default'."""
    try:
        base, size, batch, *norm = text.split(':')
        H, W = map(int, size.split('x'))
        norm, = norm or ['default']
        case = Case(int(base), (H, W), int(batch), {'none': None, 'batch': 'batch', 'default': 'default'}[norm])
    except (ValueError, KeyError):
        case = Case(0, (0, 0), 0)
    if min(case.base, *case.size, case.batch) < 1:
        raise argparse.ArgumentTypeError(f'{text!r} is no case; expected base:HEIGHTxWIDTH:batch and :none or :batch, '
                                         'as in 32:96x128:16:batch')
    return case


def whole(text):
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'{text!r} is not a whole number of at least 1')
    return int(text)


def parse(arguments):
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--case', type=parse_case, nargs='+', help='base:HEIGHTxWIDTH:batch:norm, one or several')
    parser.add_argument('--norm', choices=['none', 'batch'], help='of cases that name none, default: none; '
                        'without --case, only the default cases with that norm')
    parser.add_argument('--kinds', choices=list(KINDS), nargs='+', help='of work, on the CPU; default: both')
    parser.add_argument('--device', choices=['cpu', 'gpu'], default='cpu', help='default: cpu')
    parser.add_argument('--precision', choices=['fp32', 'tf32'], help='of our products of float32 matrices on a GPU; default: tf32 '
                        'where the GPU has it')
    parser.add_argument('--kernels', action='store_true', help='on a GPU, use the kernels of nervenet/kernels.cu, which are off otherwise')
    parser.add_argument('--dtype', choices=['float32', 'float64'], default='float32')
    parser.add_argument('--threads', type=whole, help='of every contender; default: the cores this process may use')
    parser.add_argument('--rounds', type=whole, help='of which the median counts; default: 5, on a GPU 10')
    parser.add_argument('--growth', action='store_true', help='instead: time against image size and batch, for the first case\'s network')
    parser.add_argument('--layers', action='store_true', help='also time each layer of a training step')
    parser.add_argument('--against', choices=list(dict.fromkeys(rival.option for rival in rivals.RIVALS.values())), nargs='+', default=[],
                        help='also run the same network in PyTorch, compiled by PyTorch, in ONNX Runtime, in OpenVINO')
    parser.add_argument('--worker', help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.kernels and args.device == 'cpu':
        parser.error('--kernels needs --device gpu: they are for a GPU')
    if args.kinds and args.device == 'gpu':
        parser.error('--kinds is for the CPU: on a GPU all kinds of work are timed')
    if args.device == 'gpu' and set(args.against) - {'torch'}:
        parser.error('--device gpu knows one rival: --against torch')
    if args.dtype != 'float32' and {'onnx', 'openvino'} & set(args.against):
        parser.error(f'--dtype {args.dtype}: onnx and openvino run in float32 here; leave them out')
    if args.growth and (args.layers or args.against or args.kinds):
        parser.error('--growth is a table of its own: leave out --layers, --against and --kinds')
    args.convention = CONVENTIONS[args.device]
    args.rounds = args.rounds or args.convention.rounds
    args.kinds = list(dict.fromkeys(args.kinds or KINDS))
    norm = None if args.norm == 'none' else args.norm
    defaults = [case for case in map(parse_case, args.convention.cases) if not args.norm or case.norm in (norm, 'default')]
    args.case = [case._replace(norm=norm) if case.norm == 'default' else case for case in args.case or defaults]
    return args


if __name__ == '__main__':
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except MemoryError as error:
        sys.exit(f'benchmark.py: not enough memory: choose a smaller --case ({error})')
