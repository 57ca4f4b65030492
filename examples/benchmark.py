"""Measure how fast a network trains and predicts on this machine.

    python examples/benchmark.py                                       the U-Net in seven cases, about three minutes
    python examples/benchmark.py --model resunet                       another network
    python examples/benchmark.py --case 32:96x128:16:batch --layers    one case, each layer by itself
    python examples/benchmark.py --growth                              time against image size and batch
    python examples/benchmark.py --against torch compile onnx openvino     beside other engines, those that are installed
    python examples/benchmark.py --device gpu --against torch          on an NVIDIA GPU

A case is base channels, height×width, batch and norm; whatever else a network has keeps its default. Two kinds of work are timed, each
in a plain loop as users have it: training (`train_step`: forward, Dice loss, backward, Adam) and inference (`predict`: the
probabilities).

**A benchmark that runs anything else beforehand measures something else.** A process remembers what it has done: memory that one
kind of work left behind spares the next the system's fresh pages, and threads of one engine still spin while the next one computes.
So every contender gets a fresh process for each kind of work, and that process does nothing else. It builds the model and the batch,
warms up, and waits. Then all contenders have their turn, round after round, with a burst of consecutive steps, as many as fill about a
second. Who waits, sleeps; a pause before each burst lets threads that spin go to sleep too. So a burst begins with one step that is not
counted.

Milliseconds per image are the median of the rounds. The ratio is the rival's time over ours in the same round, so that a change of
the machine's load meets both alike, and of those the median: above 1, nervenet is faster. In the table at the end the best rival
counts. Beside the times stand, per step, the page faults (memory that the system had to hand out and clear) and the time spent in the
system, and the peak memory: the most the process held from the first step on, over what it held with the model built; that of
torch.compile includes compiling. GF/s are effective: two operations per multiply-add of the convolutions as the formula says them,
whatever way they are computed; so a fast algorithm may exceed the machine's peak, which is measured here as the speed of large
matrix products on the same threads.

`--against` names rivals: PyTorch in both of its memory formats, torch.compile, and, for inference alone, ONNX Runtime and OpenVINO. All
run the same network with the same weights in the same precision, on as many threads. Before they are timed, outputs and gradients of
PyTorch are compared with ours in float64, and the probabilities of the other two in float32. What is not installed, or fails, is
named and left out. `rivals.py` has them.

On a GPU the host only orders work, and the device does it later. So times are between two events on the device, from an idle
start, the median of the rounds. `host ms per step` is how long the host takes to order a training step, with its share of the
step: near 100 % the device waits for the host, and faster kernels would not help. The peak is a large matrix product in the
chosen precision. Layers without products are held to the copy of a large array instead, by the bytes of what they are given
and return. Contenders run one after the other in this process, since each may need all of the memory, and what does not fit is left
out; peak MiB are all that a contender's arrays take in a training step, parameters included. PyTorch runs in float32 and in TF32, with
cuDNN trying its algorithms first; that the networks agree is checked on the host, on small images.
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
from nervenet.engine.parallel import describe_blas, number_of_threads, parallel_for, set_threads
from nervenet.images.phantom import make_frame
from nervenet.losses import DiceLoss
from nervenet.networks import NETWORKS, fusing
from nervenet.optim import Adam
from nervenet.study.report import print_whatever_comes
from nervenet.train import predict, train_step

try:
    import resource
except ImportError:                     # Windows: faults and time in the system are not known there
    resource = None

KINDS = 'training', 'inference'
BURST_SECONDS, LEAST_STEPS, PAUSE = 1.0, 3, 0.3         # a burst, and the seconds before it in which other engines' threads fall asleep
GROWTH_BYTES = 4 * 2**30                                # cases of the growth table that need more are left out
DISCARDED = 2                                           # rounds of a GPU: at first it compiles, reserves memory and tries algorithms
PRODUCT_SIDE, COPY_BYTES = {'cpu': 1024, 'gpu': 8192}, 2**30            # what ceilings are measured with, and that of a GPU's copies


class Case(typing.NamedTuple):
    base: int
    size: tuple                     # (H, W)
    batch: int
    norm: str                       # 'none' or 'batch'
    model: str = 'unet'             # one of NETWORKS

    def __str__(self):
        return f'{self.base}:{self.size[0]}x{self.size[1]}:{self.batch}:{self.norm}'

    @property
    def network(self):
        return NETWORKS[self.model].__name__

    def describe(self, operations):
        """Return the title of this case, of which one forward of the batch takes so many operations."""
        return (f'\n{self.network} base {self.base}, {self.size[0]}×{self.size[1]}, batch {self.batch}, norm {self.norm}: '
                f'{operations / self.batch / 1e9:.2f} GF per image and forward')


class Convention(typing.NamedTuple):
    """What is measured on a device by default, and how the results are written."""
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
                       '32:416x576:1:none', '16:96x128:1:batch'], 7, 2, 'GF/s', 1e9, 0),
    'gpu': Convention([f'{base}:{size}:{batch}' for size in ('96x128', '416x576') for base in (16, 32, 64) for batch in (16, 64)],
                      10, 4, 'TF/s', 1e12, 1)}


class Contender(typing.NamedTuple):
    """A library in one way of using it, on a GPU."""
    build: typing.Callable          # returns what is timed: forward, training step, inference
    clock: tuple                    # two functions, as backend.mark (without argument) and backend.seconds_between
    peak_memory: typing.Callable    # as backend.peak_memory and backend.free_memory
    free_memory: typing.Callable


def main(arguments=None):
    args = parse(arguments)
    if args.worker:
        be_worker(args.worker)
        return
    if args.threads:
        set_threads(args.threads)
    try:
        device, _, where = select_device(args.device, args.precision)
    except RuntimeError as error:
        raise SystemExit(f'benchmark.py: {error}') from None
    versions = [f'nervenet {nervenet.__version__}', f'Python {platform.python_version()}', f'NumPy {numpy.__version__}']
    if device == 'cpu':
        run_on_cpu(args, versions)
    else:
        run_on_gpu(args, versions, where)


# --- On the CPU -------------------------------------------------------------------------------------------------------

def run_on_cpu(args, versions):
    """Print the tables of all cases, or that of growth."""
    libraries = {}
    with contextlib.ExitStack() as stack:
        probes = {library: stack.enter_context(Worker(args, kind='versions', library=library)) for library in args.against}
        for library, probe in probes.items():
            with left_out(f'--against {library}'):
                libraries[library] = probe.answer()['versions']
    print(', '.join(dict.fromkeys([*versions, *(version for several in libraries.values() for version in several)])))
    print(describe_blas())
    if 'OPENBLAS_CORETYPE' in os.environ:
        print(f'OPENBLAS_CORETYPE is {os.environ["OPENBLAS_CORETYPE"]}: a choice that does not fit the processor can halve the speed; '
              'unset it to measure')
    peak = measure_peak(args.dtype)
    print(f'{number_of_threads()} threads, {args.dtype}; matrix products reach {args.convention.rate(peak)} GF/s')
    if args.growth:
        print_growth(args)
        return
    results = {case: run_case(case, args, peak, libraries) for case in args.case}
    print_summary(results)


def run_case(case, args, peak, libraries):
    """Time one case and print its table; return kind → (milliseconds per image, ratio and name of the best rival; None if unknown)."""
    operations, best = 2 * make_model(case, args.dtype).multiply_adds((case.batch, *case.size, 1)), {}      # of one forward
    print(case.describe(operations) + (' (ms per image are ms per call)' if case.batch == 1 else ''))
    with tempfile.TemporaryDirectory() as folder:
        agreeing = agreeing_libraries(libraries, case, args, folder)
        print(f'  {"contender":21}{"kind":11}{"ms per image":>12}{"ratio":>8}{"faults per step":>17}{"system ms per step":>20}'
              f'{"peak MiB":>10}{"GF/s (of peak)":>16}')
        for kind in KINDS:
            contenders = ['nervenet'] + [name for library in agreeing if kind == 'inference' or library in rivals.TRAINABLE
                                         for name in rivals.CONTENDERS[library]]
            bursts = measure(case, kind, contenders, args, folder)
            ratio = ratios(bursts)
            for name, rounds in bursts.items():
                print(row(name, kind, rounds, ratio.get(name), case.batch, operations * (3 if kind == 'training' else 1), peak))
            rival = min(ratio, key=ratio.get, default=None)
            ours = middle(bursts.get('nervenet'), 'seconds')
            best[kind] = ours and ours / case.batch * 1e3, ratio.get(rival), rival
    if args.layers:
        with left_out('layers'), Worker(args, kind='layers', case=case) as worker:
            print('\n'.join(worker.answer()['lines']))
    return best


def agreeing_libraries(libraries, case, args, folder):
    """Return those of the `libraries` that compute what we compute, each with a line that says so; `folder` then has their networks."""
    found = {}
    for library in libraries:
        network = 'torch' if library in rivals.TRAINABLE else library               # torch.compile runs the network of PyTorch
        if network not in found:
            found[network] = False
            with left_out(f'{network}, check'), Worker(args, kind='check', library=network, case=case, folder=folder) as worker:
                print(f'  {network}: {worker.answer()["line"]}')
                found[network] = True
    return [library for library in libraries if found['torch' if library in rivals.TRAINABLE else library]]


def measure(case, kind, contenders, args, folder=None):
    """Return name → what a burst of steps took (as in `burst`), a list over the rounds, of the contenders that came to the end."""
    workers, bursts = {}, {}
    with contextlib.ExitStack() as stack:
        for name in contenders:
            with left_out(f'{name}, {kind}'):
                worker = stack.enter_context(Worker(args, kind=kind, contender=name, case=case, folder=folder))
                worker.answer()                                         # it is warm
                workers[name], bursts[name] = worker, []
        for _ in range(args.rounds):
            for name in list(bursts):
                time.sleep(PAUSE)
                try:
                    bursts[name].append(workers[name].ask())
                except WorkerEnded as error:
                    print(f'  {name}, {kind}: left out, {error}')
                    del bursts[name]
    return bursts


def middle(rounds, what):
    """Return the median over the rounds of one of the numbers in `burst`; None if it was not measured."""
    values = [one[what] for one in rounds or [] if one[what] is not None]
    return statistics.median(values) if values else None


def ratios(bursts):
    """Return name of a rival → its time by ours in the same round, the median of the rounds. `bursts` is what `measure` returns."""
    ours = bursts.get('nervenet', [])
    return {name: statistics.median(theirs['seconds'] / own['seconds'] for own, theirs in zip(ours, rounds))
            for name, rounds in bursts.items() if ours and name != 'nervenet'}


def row(name, kind, rounds, ratio, images, operations, peak):
    """Return the line of a table about one contender, whose step is so many operations on so many images."""
    seconds, faults, system, memory = (middle(rounds, what) for what in ('seconds', 'faults', 'system', 'peak'))
    rate = operations / seconds
    cells = [written(ratio, 2, '', 8), written(faults, 0, '-', 17), written(system and system * 1e3, 1, '-', 20),
             written(memory and memory / 1024, 0, '-', 10), f'{f"{rate / 1e9:.0f} ({rate / peak:.0%})":>16}']
    return f'  {name:21}{kind:11}{seconds / images * 1e3:12.2f}' + ''.join(cells)


def written(value, decimals, unknown, width):
    return f'{unknown if value is None else f"{value:.{decimals}f}":>{width}}'


def print_summary(results):
    """Print a line for each case: `results` is case → what `run_case` returns."""
    title = f'{next(iter(results)).network}, ms per image'
    width = 2 + max(len(title), *(len(str(case)) for case in results))
    print('\n' + f'{title:{width}}' + ''.join(f'{kind:>10}{"ratio":>8}  {"to the best rival":21}' for kind in KINDS).rstrip())
    for case, best in results.items():
        print((f'{str(case):{width}}' + ''.join(
            f'{written(seconds, 2, "-", 10)}{written(ratio, 2, "-", 8)}  {rival or "":21}' for seconds, ratio, rival in
            (best[kind] for kind in KINDS))).rstrip())


def print_growth(args):
    """Print how the time of a training step and of inference grows with image and batch, for the base and norm of the first case."""
    sides, batches, first = (32, 64, 128, 256, 512), (1, 4, 16, 64), args.case[0]
    model = make_model(first, args.dtype)
    for kind in KINDS:
        print(f'\n  {kind}, {first.network} base {first.base}, norm {first.norm}: ms per image (ns per pixel)\n  {"":9}'
              + ''.join(f'{f"batch {N}":>18}' for N in batches))
        for side in sides:
            cells = []
            for N in batches:
                seconds, cell = None, 'too large'
                if model.training_memory((N, side, side, 1)) <= GROWTH_BYTES:
                    seconds, cell = own_seconds(first._replace(size=(side, side), batch=N), kind, args), 'failed'
                cells.append(f'{seconds / N * 1e3:.2f} ({seconds / N / side**2 * 1e9:.0f})' if seconds else cell)
            print(f'  {f"{side}×{side}":9}' + ''.join(f'{cell:>18}' for cell in cells))


def own_seconds(case, kind, args):
    """Return how long a step of this kind takes; None, and a line that says why, if it fails."""
    if args.device == 'cpu':
        return middle(measure(case, kind, ['nervenet'], args).get('nervenet'), 'seconds')
    job = our_jobs(make_model(case, args.dtype, 'gpu'), *make_batch(case, args.dtype))[1 + KINDS.index(kind)]
    return time_jobs([job], our_clock('gpu'), args)[0][0]


def make_batch(case, dtype):
    """Return phantom images (N, H, W, 1) in [0, 1] and their masks of 0 and 1, of a subject each.

    What is random cannot be learned: a network without norm soon gives up on it, and gradients that are next to 0 are another workload.
    """
    images, masks = zip(*(make_frame(subject, 1, size=case.size) for subject in range(1, case.batch + 1)))
    return (numpy.stack(images)[..., None] / 255).astype(dtype), numpy.stack(masks)[..., None].astype(dtype)


def make_model(case, dtype, device='cpu'):
    """Return the network of this case; where it begins with zeros, as blocks do that are to be nothing at first, with small numbers."""
    rng, norm = numpy.random.default_rng(1), None if case.norm == 'none' else case.norm
    model = NETWORKS[case.model](base_channels=case.base, norm=norm, rng=rng, dtype=dtype)
    for array in model.parameters().values():
        if not array.any():                             # else a rival could have anything there, and nobody would see it
            array += 0.01 * rng.standard_normal(array.shape)
    return model.to(device)


def our_jobs(model, x, target):
    """Return what is timed: forward, training step, inference."""
    x, target = move(x, model.device), move(target, model.device)
    loss, optimizer = DiceLoss(), Adam(model.parameters(), rivals.LEARNING_RATE)
    return (lambda: model.forward(x),
            lambda: train_step(model, loss, optimizer, x, target),
            lambda: predict(model, x))


def measure_peak(dtype):
    """Return operations per second of large matrix products, one per thread at a time: the most that any product here can reach."""
    size, rng = PRODUCT_SIDE['cpu'], numpy.random.default_rng(0)
    a, threads = rng.random((size, size)).astype(dtype), number_of_threads()
    best = float('inf')
    for _ in range(5):
        start = time.perf_counter()
        parallel_for(range(4 * threads), lambda block: a @ a)
        best = min(best, time.perf_counter() - start)
    return 4 * threads * 2 * size**3 / best


# --- Workers: processes that do one thing -----------------------------------------------------------------------------

class WorkerEnded(Exception):
    """A worker ended before it answered; the message says why."""


@contextlib.contextmanager
def left_out(what):
    """Go on, with a line that says why, if a worker ends."""
    try:
        yield
    except WorkerEnded as error:
        print(f'  {what}: left out, {error}')


class Worker:
    """A process of this script that does the one thing its task says (see `work`), until this context is left."""

    def __init__(self, args, **task):
        case = task.pop('case', args.case[0])
        task = {'library': None, 'contender': None, 'folder': None, **task, 'case': str(case), 'model': case.model, 'dtype': args.dtype,
                'threads': number_of_threads(), 'seconds': BURST_SECONDS}
        environment = dict(os.environ)
        if task['kind'] != 'layers' and task['contender'] != 'nervenet':
            environment.update(OMP_NUM_THREADS=str(task['threads']), TORCHINDUCTOR_COMPILE_THREADS='1')     # and it starts no processes
        self.said = tempfile.TemporaryFile()
        self.process = subprocess.Popen([sys.executable, __file__, '--worker', json.dumps(task)], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=self.said, text=True, env=environment)

    def ask(self):
        """Have a burst of steps done, and return what it took, as `burst` has it. Raises WorkerEnded."""
        with contextlib.suppress(BrokenPipeError):              # then there is no answer either
            print('burst', file=self.process.stdin, flush=True)
        return self.answer()

    def answer(self):
        """Wait for the next answer and return it. Raises WorkerEnded."""
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        code = self.process.wait()
        self.said.seek(0)
        lines = [line.strip() for line in self.said.read().decode(errors='replace').splitlines() if line.strip()]
        reasons = ([f'ended by {signal.Signals(-code).name}'] if code < 0 else []) + lines[-1:]
        raise WorkerEnded(': '.join(reasons) or f'ended with {code}')

    def __enter__(self):
        return self

    def __exit__(self, *error):
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()                          # who waits for an order ends now
        try:
            self.process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.said.close()


def be_worker(task):
    """Be the process that a `Worker` starts: answers are lines of JSON."""
    answers = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)                                               # what a library prints is no answer
    try:
        for answer in work(task, sys.stdin):
            print(json.dumps(answer), file=answers, flush=True)
    except Exception as error:                                  # whatever it is, the others go on, and this line says it
        sys.exit(f'{type(error).__name__}: {(str(error).strip().splitlines() or ["no message"])[0]}')


def work(task, orders):
    """Do what `task` says and yield the answers, dicts.

    kind 'versions': the only one has those of the packages that a library needs. 'check': a line on how well it agrees. 'layers': the
    lines of that table. 'training', 'inference': an empty one when the contender is warm, and for each of the `orders` one about a
    burst of steps.
    """
    set_threads(task['threads'])
    kind, dtype = task['kind'], task['dtype']
    if kind == 'versions':
        yield {'versions': rivals.versions(task['library'])}
        return
    case = parse_case(task['case'])._replace(model=task['model'])
    if kind == 'check':
        dtype = 'float64' if task['library'] in rivals.TRAINABLE else dtype
        yield {'line': rivals.check(task['library'], make_model(case, dtype), *make_batch(case, dtype), task['folder'])}
        return
    model, (x, target) = make_model(case, dtype), make_batch(case, dtype)
    if kind == 'layers':
        yield {'lines': [*layer_lines(model, our_jobs(model, x, target)[1], CONVENTIONS['cpu'], 3)]}
        return
    if task['contender'] == 'nervenet':
        if kind == 'inference':
            model.eval()                                        # as a loaded model is
        step = our_jobs(model, x, target)[1 + KINDS.index(kind)]
    else:
        step = rivals.job(task['contender'], kind, model, x, target, task['folder'], task['threads'])
    del model, x, target                                        # a rival has its own
    before = fresh_peak()
    steps = warm_up(step, task['seconds'])
    yield {}
    for _ in orders:
        yield {**burst(step, steps), 'peak': before and resident_memory('VmHWM') - before}


def warm_up(step, seconds):
    """Run steps for so long, three at least; return how many steps fill that time.

    The averages of Adam, and the gradients of the step before, are there from the second on.
    """
    begin, fastest, count = time.perf_counter(), float('inf'), 0
    while count < LEAST_STEPS or time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        step()
        fastest, count = min(fastest, time.perf_counter() - start), count + 1
    return max(LEAST_STEPS, round(seconds / fastest))


def burst(step, steps):
    """Run consecutive steps; return what one of them took: seconds, page faults, and seconds in the system."""
    step()                                  # not counted: during the pause before it threads have ended and caches have gone cold
    used, start = usage(), time.perf_counter()
    for _ in range(steps):
        step()
    seconds, now = time.perf_counter() - start, usage()
    return {'seconds': seconds / steps, **{what: used[what] if used[what] is None else (now[what] - used[what]) / steps for what in used}}


def usage():
    """Return how many page faults this process has had, and how many seconds the system has worked for it; None where nobody says."""
    if resource is None:
        return {'faults': None, 'system': None}
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {'faults': used.ru_minflt + used.ru_majflt, 'system': used.ru_stime}


def fresh_peak():
    """Let the peak resident memory begin anew, where the system can; return the resident memory now in KiB, None without /proc."""
    with contextlib.suppress(OSError), open('/proc/self/clear_refs', 'w') as file:
        file.write('5')                                         # else building the model counts too
    return resident_memory('VmRSS')


def resident_memory(field):
    """Return a field of /proc/self/status in KiB: VmRSS is what the process holds now, VmHWM the most it ever held. None without /proc."""
    if not os.path.exists('/proc/self/status'):
        return None
    with open('/proc/self/status') as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field))


# --- On a GPU ---------------------------------------------------------------------------------------------------------

def run_on_gpu(args, versions, where):
    """Print the tables of all cases, or that of growth."""
    torch = rivals.import_torch(number_of_threads()) if args.against else None
    product, copying = measure_ceilings(args)
    print(', '.join(versions + ([f'PyTorch {torch.__version__}'] if torch else [])))
    print(f'CuPy {get_array_module(move(numpy.zeros(1), "gpu")).__version__}')
    print(f'{where}, {args.dtype}; matrix products reach {args.convention.rate(product)} TF/s, copies {copying / 1e9:.0f} GB/s')
    with kernels.use_kernels() if args.kernels else contextlib.nullcontext():
        if args.growth:
            print_growth(args)
            return
        for case in args.case:
            run_case_on_gpu(case, args, (product, copying), torch)


def run_case_on_gpu(case, args, ceilings, torch):
    """Time one case and print its lines."""
    x, target = make_batch(case, args.dtype)
    model = make_model(case, args.dtype)
    operations = 2 * model.multiply_adds(x.shape)                # of one forward; backward does each product twice
    print(case.describe(operations))

    def build():
        return our_jobs(make_model(case, args.dtype, 'gpu'), x, target)

    contenders, ratios_to = {'nervenet': Contender(build, our_clock('gpu'), peak_memory, free_memory)}, {}
    if torch:
        small = case._replace(size=(48, 64), batch=2)
        print(f'  {rivals.agreement(torch, make_model(small, "float64"), *make_batch(small, "float64"))}')
        theirs = {name: Contender(*parts) for name, parts in rivals.gpu_contenders(torch, model, x, target).items()}
        contenders |= theirs
        ratios_to = {'ratio to tf32 channels_last': ['torch tf32 channels_last'], 'ratio to the best': theirs}
    times, memory = measure_on_gpu(contenders, args)
    print_times(times, memory, ratios_to, operations, case.batch, args, ceilings)
    if args.layers and 'nervenet' in times:
        with skipping('layers'):
            model.to('gpu')
            print('\n'.join(layer_lines(model, our_jobs(model, x, target)[1], args.convention, args.rounds, ceilings)))


def print_times(times, memory, ratios_to, operations, N, args, ceilings):
    """Print a line for each of `times`, which are of N images, and for each of `ratios_to`: label → names of rivals."""
    if not times:
        return
    how, width = args.convention, max(20, 1 + max(map(len, [*times, *ratios_to])))
    print(f'  {"ms per image, median":{width}}{"forward":>10}{"train step":>12}{"predict":>10}{"host ms per step":>20}{"peak MiB":>10}   '
          f'{how.unit} (of peak): train, predict')
    for name, ((forward, _), (step, issued), (inference, _)) in times.items():
        rates = ', '.join(f'{how.rate(rate)} ({rate / ceilings[0]:.0%})'
                          for rate in (3 * operations / step, operations / inference))
        cells = [f'{seconds / N * 1e3:.{how.decimals}f}' for seconds in (forward, step, inference)]
        host = f'{issued * 1e3:.2f} ({issued / step:.0%})'
        print(f'  {name:{width}}{cells[0]:>10}{cells[1]:>12}{cells[2]:>10}{host:>20}{memory[name] / 2**20:10.0f}   {rates}')
    for label, names in ratios_to.items():
        theirs = [times[name] for name in names if name in times]
        if theirs and 'nervenet' in times:
            cells = [min(rival[job][0] for rival in theirs) / times['nervenet'][job][0] for job in range(3)]
            print(f'  {label:{width}}{cells[0]:10.2f}{cells[1]:12.2f}{cells[2]:10.2f}')


def measure_on_gpu(contenders, args):
    """Return (times, memory): name → as in `time_jobs`, and name → bytes that a training step takes at most.

    Each contender is built, timed and dropped before the next: the large cases need all of the device's memory.
    """
    times, memory = {}, {}

    def measure_alone(name, contender):                     # a function, so that all it built goes when it returns
        jobs = contender.build()
        measured = time_jobs(jobs, contender.clock, args)
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
    """Return the seconds one call of `job` takes, and those until it returns, which is when the work is ordered."""
    now, between = clock
    between(now(), now())                               # waits until the GPU is idle
    start, called = now(), time.perf_counter()
    job()
    issued = time.perf_counter() - called
    return between(start, now()), issued


def time_jobs(jobs, clock, args):
    """Return (seconds, seconds until it returned) of each job, medians of the rounds. The first call in a round is not timed."""
    samples = [[] for _ in jobs]
    for _ in range(DISCARDED + args.rounds):
        for job, pairs in zip(jobs, samples):
            job()
            pairs.append(timed(job, clock))
    return [tuple(map(statistics.median, zip(*pairs[DISCARDED:]))) for pairs in samples]


def measure_ceilings(args):
    """Return (operations per second of large matrix products, bytes per second of a copy)."""
    size = PRODUCT_SIDE['gpu']
    a = move(numpy.random.default_rng(0).random((size, size)).astype(args.dtype), 'gpu')
    xp = get_array_module(a)
    source, copy = xp.zeros(COPY_BYTES, 'uint8'), xp.zeros(COPY_BYTES, 'uint8')
    jobs = (lambda: a @ a, lambda: xp.copyto(copy, source))
    (product, _), (copying, _) = time_jobs(jobs, our_clock('gpu'), args)
    return 2 * size**3 / product, 2 * COPY_BYTES / copying          # each byte is read and written


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
    counted, names, norm_and_relu = {}, {layer: name for name, layer in leaves(model)}, fusing.norm_and_relu

    def marked_kernel(x, norm, activation):
        start = now()
        y = norm_and_relu(x, norm, activation)
        calls.append(((names[norm], 'forward'), start, now(), 0, x.nbytes + y.nbytes))
        return y

    for layer, name in names.items():
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
    fusing.norm_and_relu = marked_kernel
    try:
        job()
    finally:
        fusing.norm_and_relu = norm_and_relu
        for layer, method in hidden:
            delattr(layer, method)
    rows = {(name, method): numpy.zeros(3) for name in names.values() for method in ('forward', 'backward')}
    for key, start, end, operations, touched in calls:
        rows[key] += between(start, end), operations, touched
    return rows


def layer_lines(model, step, how, rounds, ceilings=(None, None)):
    """Yield the lines of a table of what each layer costs in a training step, the median of the rounds; `ceilings` are those of a GPU."""
    labels, width = (('forward (of ceiling)', 'backward'), 20) if ceilings[1] else (('GF/s forward', 'backward'), 10)
    step()
    runs = [time_layers(model, step, our_clock(model.device)) for _ in range(rounds)]
    rows = {key: (statistics.median(run[key][0] for run in runs), *runs[0][key][1:]) for key in runs[0]}
    total = {method: sum(row[0] for key, row in rows.items() if key[1] == method) for method in ('forward', 'backward')}
    column = max(24, *(len(name) for name, _ in leaves(model)))
    yield f'  {"layer":{column}}{"forward ms":>12}{"backward ms":>13}{"share":>8}{labels[0]:>{width + 4}}{labels[1]:>{width}}'
    for name, _ in leaves(model):
        forward, backward = rows[name, 'forward'], rows[name, 'backward']
        rates = f'{layer_rate(*forward, how, ceilings):>{width + 4}}{layer_rate(*backward, how, ceilings):>{width}}'.rstrip()
        yield (f'  {name:{column}}{forward[0] * 1e3:12.{how.decimals}f}{backward[0] * 1e3:13.{how.decimals}f}'
               f'{(forward[0] + backward[0]) / sum(total.values()):8.1%}{rates}')
    yield f'  {"all layers":{column}}{total["forward"] * 1e3:12.{how.decimals}f}{total["backward"] * 1e3:13.{how.decimals}f}'


def layer_rate(seconds, operations, touched, how, ceilings):
    """Return, as text, the rate of a layer's products; on a GPU with its share of the ceiling, and without products that of bytes."""
    peak, copying = ceilings
    if operations:
        share = f' {how.unit} ({operations / seconds / peak:.0%})' if copying else ''
        return how.rate(operations / seconds) + share
    return f'{touched / seconds / 1e9:.0f} GB/s ({touched / seconds / copying:.0%})' if copying and touched else ''


# --- Arguments --------------------------------------------------------------------------------------------------------

def parse_case(text):
    """Turn '32:96x128:16:batch' into a Case; its norm is '' if the text has none."""
    try:
        base, size, batch, *norm = text.split(':')
        H, W = map(int, size.split('x'))
        case = Case(int(base), (H, W), int(batch), ''.join(norm))
    except ValueError:
        norm, case = [], Case(0, (0, 0), 0, '')
    if min(case.base, *case.size, case.batch) < 1 or norm not in ([], ['none'], ['batch']):
        raise argparse.ArgumentTypeError(f'{text!r} is no case; expected base:HEIGHTxWIDTH:batch, as in 32:96x128:16, and then :none or '
                                         ':batch if it shall have a norm of its own')
    return case


def whole(text):
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'{text!r} is not a whole number of at least 1')
    return int(text)


def parse(arguments):
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--case', type=parse_case, nargs='+', help='base:HEIGHTxWIDTH:batch, and :norm if it shall differ, one or several')
    parser.add_argument('--model', choices=NETWORKS, default='unet', help='the network of all cases; default: unet')
    parser.add_argument('--device', choices=['cpu', 'gpu'], default='cpu', help='default: cpu')
    parser.add_argument('--precision', choices=['fp32', 'tf32'], help='of our products of float32 matrices on a GPU; default: tf32 '
                        'where the GPU has it')
    parser.add_argument('--kernels', action='store_true', help='on a GPU, use the kernels of nervenet/kernels.cu, which are off otherwise')
    parser.add_argument('--norm', choices=['none', 'batch'], help='of cases that name none; default: none')
    parser.add_argument('--dtype', choices=['float32', 'float64'], default='float32')
    parser.add_argument('--threads', type=whole, help='of all contenders; default: the cores this process may use')
    parser.add_argument('--rounds', type=whole, help='default: 7, with --growth 3, on a GPU 10')
    parser.add_argument('--growth', action='store_true', help='instead: time against image size and batch, for the first case')
    parser.add_argument('--layers', action='store_true', help='also time each layer of a training step')
    parser.add_argument('--against', choices=rivals.CONTENDERS, nargs='+', default=[], help='engines to run the same network in')
    parser.add_argument('--worker', type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.kernels and args.device == 'cpu':
        parser.error('--kernels needs --device gpu: they are for a GPU')
    if args.growth and (args.layers or args.against):
        parser.error('--growth is a table of its own: leave out --layers and --against')
    if args.device == 'gpu' and args.against not in ([], ['torch']):
        parser.error(f'--against {" ".join(args.against)}: on a GPU the only rival is torch')
    if args.dtype == 'float64' and {*args.against} - {*rivals.TRAINABLE}:
        parser.error('--dtype float64: onnx and openvino are compared in float32; leave them out')
    args.convention = CONVENTIONS[args.device]
    args.case = args.case or [parse_case(text) for text in args.convention.cases]
    if args.norm and all(case.norm for case in args.case):
        parser.error(f'--norm {args.norm}: every case names its own norm; give a --case without, as in 32:96x128:16')
    args.case = [case._replace(norm=case.norm or args.norm or 'none', model=args.model) for case in args.case]
    args.rounds = args.rounds or (3 if args.growth and args.device == 'cpu' else args.convention.rounds)
    return args


if __name__ == '__main__':
    print_whatever_comes()
    sys.stdout.reconfigure(line_buffering=True)
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except MemoryError as error:
        sys.exit(f'benchmark.py: not enough memory: choose a smaller --case ({error})')
