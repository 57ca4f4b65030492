"""Measure how fast the U-Net trains and predicts on this machine.

    python examples/benchmark.py                                  four networks, about two minutes
    python examples/benchmark.py --case 32:96x128:16 --layers     one network, each layer by itself
    python examples/benchmark.py --growth                         time against image size and batch
    python examples/benchmark.py --against torch                  beside PyTorch, if it is installed
    python examples/benchmark.py --device gpu --against torch     the same on an NVIDIA GPU

A case is base channels, height×width and batch. For each one: milliseconds per image of forward, of a training step
(`train_step`: forward, Dice loss, backward, Adam) and of inference (`predict`), the best of several rounds. Effective
GF/s count two operations per multiply-add of the convolutions as the formula says them, whatever way they are computed;
so a fast algorithm may exceed the machine's peak, which is measured here as the speed of large matrix products on the
same threads.

Peak memory is the growth of the peak resident memory in three training steps, over the state with the model built, in a
fresh process.

`--against torch` builds the same network with the same weights in PyTorch, checks in float64 that outputs and gradients
agree, and times both of its memory formats in turn with ours, on as many threads. The ratio is images per second, ours over the
better of the two.

On a GPU the host only orders work, and the device does it later. So times are between two events on the device, from an idle
start, the median of the rounds. `host ms per step` is how long the host takes to order a training step, with its share of the
step: near 100 % the device waits for the host, and faster kernels would not help. The peak is a large matrix product in the
chosen precision. Layers without products are held to the copy of a large array instead, by the bytes of what they are given
and return. Contenders run one after the other, since each may need all of the memory, and what does not fit is left out; peak
MiB are all that a contender's arrays take in a training step, parameters included. PyTorch runs in float32 and in TF32, with
cuDNN trying its algorithms first, and Adam in one kernel; that the networks agree is checked on the host, on small images.
"""

import argparse
import contextlib
import functools
import os
import platform
import statistics
import subprocess
import sys
import time
import typing

import numpy

import nervenet
from nervenet.engine import kernels
from nervenet.engine.backend import free_memory, get_array_module, mark, move, peak_memory, seconds_between, select_device
from nervenet.losses import DiceLoss
from nervenet.optim import Adam
from nervenet.engine.parallel import describe_blas, number_of_threads, parallel_for, set_threads
from nervenet.train import predict, train_step

GROWTH_BYTES = 4 * 2**30         # cases of the growth table that need more are left out
PRODUCT_SIDE, COPY_BYTES = 8192, 2**30          # what the ceilings of a GPU are measured with
TORCH_DEVICE = {'cpu': 'cpu', 'gpu': 'cuda'}


class Convention(typing.NamedTuple):
    """How a device is timed, and how the results are written."""
    cases: list
    rounds: int
    discarded: int                  # rounds before those: at first a GPU compiles, reserves memory and tries algorithms
    statistic: typing.Callable      # of the rounds
    label: str
    decimals: int                   # of milliseconds
    unit: str                       # of rates: `scale` operations per second
    scale: float
    rate_decimals: int

    def rate(self, operations_per_second):
        return f'{operations_per_second / self.scale:.{self.rate_decimals}f}'


CONVENTIONS = {
    'cpu': Convention(['64:128x128:4', '32:96x128:16', '16:96x128:16', '32:416x576:1'],
                      5, 0, min, '', 2, 'GF/s', 1e9, 0),
    'gpu': Convention([f'{base}:{size}:{batch}' for size in ('96x128', '416x576') for base in (16, 32, 64) for batch in (16, 64)],
                      10, 2, statistics.median, ', median', 4, 'TF/s', 1e12, 1)}


class Contender(typing.NamedTuple):
    """A library in one way of using it."""
    build: typing.Callable          # returns what is timed: forward, training step, inference
    clock: tuple                    # two functions, as backend.mark (without argument) and backend.seconds_between
    peak_memory: typing.Callable    # as backend.peak_memory and backend.free_memory; only on a GPU
    free_memory: typing.Callable


def main(arguments=None):
    args = parse(arguments)
    if args.memory_of:
        print(measure_memory(args.memory_of, args.case[0], args.norm))
        return
    if args.threads:
        set_threads(args.threads)
    try:
        device, _, where = select_device(args.device, args.precision)
    except RuntimeError as error:
        raise SystemExit(f'benchmark.py: {error}') from None
    torch = import_torch(device) if args.against else None
    how, ceilings = args.convention, measure_ceilings(args)
    versions = f'nervenet {nervenet.__version__}, Python {platform.python_version()}, NumPy {numpy.__version__}'
    print(versions + (f', PyTorch {torch.__version__}' if torch else ''))
    if device == 'cpu':
        where, copies = f'{number_of_threads()} threads', ''
        print(describe_blas())
    else:
        copies = f', copies {ceilings[1] / 1e9:.0f} GB/s'
        print(f'CuPy {get_array_module(move(numpy.zeros(1), device)).__version__}')
    print(f'{where}, {args.dtype}, norm {args.norm}; matrix products reach {how.rate(ceilings[0])} {how.unit}{copies}')
    with kernels.use_kernels() if args.kernels else contextlib.nullcontext():
        if args.growth:
            print_growth(args)
            return
        for case in args.case:
            run_case(case, args, ceilings, torch)


def run_case(case, args, ceilings, torch):
    """Time one case and print its lines."""
    base, (H, W), N = case
    on_cpu = args.device == 'cpu'
    x, target = make_batch(case, args.dtype)
    model = make_model(base, args.norm, args.dtype)
    operations = 2 * model.multiply_adds(x.shape)                # of one forward; backward does each product twice
    print(f'\nU-Net base {base}, {H}×{W}, batch {N}: {operations / N / 1e9:.2f} GF per image and forward')

    def build():
        return our_jobs(make_model(base, args.norm, args.dtype, args.device), x, target)

    contenders, ratios = {'nervenet': Contender(build, our_clock(args.device), peak_memory, free_memory)}, {}
    if torch:
        print(f'  {agreement(torch, case if on_cpu else (base, (48, 64), 2), args.norm)}')
        theirs = torch_contenders(torch, model, args, x, target)
        contenders |= theirs
        ratios = ({'ratio to the better': theirs} if on_cpu else
                  {'ratio to tf32 channels_last': ['torch tf32 channels_last'], 'ratio to the best': theirs})
    times, memory = measure(contenders, args)
    print_times(times, memory, ratios, operations, N, args, ceilings)
    if on_cpu:
        libraries = ['nervenet', 'torch'] if torch else ['nervenet']
        memory = [f'{library} {memory_in_fresh_process(library, case, args.norm)}' for library in libraries]
        print(f'  peak memory of three training steps: {", ".join(memory)}')
    if args.layers and 'nervenet' in times:
        with skipping('layers'):
            model.to(args.device)
            print_layers(model, our_jobs(model, x, target)[1], args, ceilings)


def print_times(times, memory, ratios, operations, N, args, ceilings):
    """Print a line for each of `times`, which are of N images, and for each of `ratios`: label → names of rivals."""
    if not times:
        return
    how, width = args.convention, max(20, 1 + max(map(len, [*times, *ratios])))
    of_gpu = f'{"host ms per step":>20}{"peak MiB":>10}' if memory else ''
    print(f'  {"ms per image" + how.label:{width}}{"forward":>10}{"train step":>12}{"predict":>10}{of_gpu}   '
          f'{how.unit} (of peak): train, predict')
    for name, ((forward, _), (step, issued), (inference, _)) in times.items():
        rates = ', '.join(f'{how.rate(rate)} ({rate / ceilings[0]:.0%})'
                          for rate in (3 * operations / step, operations / inference))
        cells = [f'{seconds / N * 1e3:.{how.decimals}f}' for seconds in (forward, step, inference)]
        of_gpu = f'{f"{issued * 1e3:.2f} ({issued / step:.0%})":>20}{memory[name] / 2**20:10.0f}' if memory else ''
        print(f'  {name:{width}}{cells[0]:>10}{cells[1]:>12}{cells[2]:>10}{of_gpu}   {rates}')
    for label, names in ratios.items():
        rivals = [times[name] for name in names if name in times]
        if rivals and 'nervenet' in times:
            cells = [min(rival[job][0] for rival in rivals) / times['nervenet'][job][0] for job in range(3)]
            print(f'  {label:{width}}{cells[0]:10.2f}{cells[1]:12.2f}{cells[2]:10.2f}')


def print_growth(args):
    """Print how the time of a training step and of inference grows with image and batch, for the base of the first case."""
    base, sides, batches = args.case[0][0], (32, 64, 128, 256, 512), (1, 4, 16, 64)
    model, label = make_model(base, args.norm, args.dtype, args.device), args.convention.label
    for number, name in ((1, 'train step'), (2, 'predict')):
        print(f'\n  {name}, base {base}: ms per image{label} (ns per pixel)\n  {"":9}'
              + ''.join(f'{f"batch {N}":>18}' for N in batches))
        for side in sides:
            cells = []
            for N in batches:
                if model.training_memory((N, side, side, 1)) > GROWTH_BYTES:
                    cells.append('too large')
                    continue
                job = our_jobs(model, *make_batch((base, (side, side), N), args.dtype))[number]
                seconds = time_jobs({name: ([job], our_clock(args.device))}, args)[name][0][0] / N
                cells.append(f'{seconds * 1e3:.2f} ({seconds / side**2 * 1e9:.0f})')
            print(f'  {f"{side}×{side}":9}' + ''.join(f'{cell:>18}' for cell in cells))


def make_batch(case, dtype):
    """Return random images (N, H, W, 1) in [0, 1] and masks of 0 and 1."""
    _, size, N = case
    rng = numpy.random.default_rng(0)
    return rng.random((N, *size, 1)).astype(dtype), (rng.random((N, *size, 1)) > 0.7).astype(dtype)


def make_model(base, norm, dtype, device='cpu'):
    return nervenet.UNet(base_channels=base, norm=norm, rng=numpy.random.default_rng(1), dtype=dtype).to(device)


def our_jobs(model, x, target):
    """Return what is timed: forward, training step, inference."""
    x, target = move(x, model.device), move(target, model.device)
    loss, optimizer = DiceLoss(), Adam(model.parameters(), 1e-4)
    return (lambda: model.forward(x),
            lambda: train_step(model, loss, optimizer, x, target),
            lambda: predict(model, x))


# --- Time -------------------------------------------------------------------------------------------------------------

def measure(contenders, args):
    """Return (times, memory): name → as in `time_jobs`; on a GPU, name → bytes that a training step takes at most.

    There each contender is built, timed and dropped before the next: the large cases need all of the device's memory.
    """
    if args.device == 'cpu':
        return time_jobs({name: (contender.build(), contender.clock) for name, contender in contenders.items()}, args), {}
    times, memory = {}, {}

    def measure_alone(name, contender):                     # a function, so that all it built goes when it returns
        jobs = contender.build()
        measured = time_jobs({name: (jobs, contender.clock)}, args)
        memory[name] = contender.peak_memory(jobs[1])
        times.update(measured)

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


def time_jobs(contenders, args):
    """Return name → [(seconds, seconds until it returned) of each job], of contenders name → (jobs, clock): best or median.

    In every round all contenders have their turn, so that a change of the machine's load meets them alike; the first call of a
    turn is not timed.
    """
    how = args.convention
    samples = {name: [[] for _ in jobs] for name, (jobs, _) in contenders.items()}
    for _ in range(how.discarded + args.rounds):
        for name, (jobs, clock) in contenders.items():
            for job, pairs in zip(jobs, samples[name]):
                job()
                pairs.append(timed(job, clock))
    return {name: [tuple(map(how.statistic, zip(*pairs[how.discarded:]))) for pairs in lists] for name, lists in samples.items()}


def measure_ceilings(args):
    """Return (operations per second of large matrix products, bytes per second of a copy on a GPU, None on the CPU)."""
    if args.device == 'cpu':
        return measure_peak(args.dtype), None
    a = move(numpy.random.default_rng(0).random((PRODUCT_SIDE, PRODUCT_SIDE)).astype(args.dtype), 'gpu')
    xp = get_array_module(a)
    source, copy = xp.zeros(COPY_BYTES, 'uint8'), xp.zeros(COPY_BYTES, 'uint8')
    jobs = (lambda: a @ a, lambda: xp.copyto(copy, source))
    (product, _), (copying, _) = time_jobs({'': (jobs, our_clock('gpu'))}, args)['']
    return 2 * PRODUCT_SIDE**3 / product, 2 * COPY_BYTES / copying          # each byte is read and written


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


def print_layers(model, step, args, ceilings):
    """Print what each layer costs in a training step, the best of three, or on a GPU the median of the rounds."""
    how, on_cpu = args.convention, args.device == 'cpu'
    labels, width = (('GF/s forward', 'backward'), 10) if on_cpu else (('forward (of ceiling)', 'backward'), 20)
    step()
    runs = [time_layers(model, step, our_clock(args.device)) for _ in range(3 if on_cpu else args.rounds)]
    rows = {key: (how.statistic(run[key][0] for run in runs), *runs[0][key][1:]) for key in runs[0]}
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
    peak, copying = ceilings
    if operations:
        share = f' {how.unit} ({operations / seconds / peak:.0%})' if copying else ''
        return how.rate(operations / seconds) + share
    return f'{touched / seconds / 1e9:.0f} GB/s ({touched / seconds / copying:.0%})' if copying and touched else ''


# --- Memory -----------------------------------------------------------------------------------------------------------

def memory_in_fresh_process(library, case, norm):
    """Return the peak memory of three training steps as text, measured in a process that does nothing else."""
    base, (H, W), N = case
    result = subprocess.run([sys.executable, __file__, '--case', f'{base}:{H}x{W}:{N}', '--norm', norm or 'none',
                             '--memory-of', library], capture_output=True, text=True)
    if result.returncode:
        return f'not measured ({result.stderr.strip().splitlines()[-1]})'
    return result.stdout.strip()


def measure_memory(library, case, norm):
    """Run three training steps and return by how much it raised the peak resident memory, as text."""
    if not os.path.exists('/proc/self/status'):
        return 'not measured (this needs /proc, so Linux)'
    x, target = make_batch(case, 'float32')
    model = make_model(case[0], norm, 'float32')
    if library == 'torch':
        torch = import_torch()
        other = torch_unet(torch, model, case[0], norm).to(memory_format=torch.channels_last)
        del model
        before = resident_memory('VmRSS')
        step = torch_jobs(torch, other, torch.channels_last, x, target)[1]
    else:
        before = resident_memory('VmRSS')
        step = our_jobs(model, x, target)[1]
    for _ in range(3):              # the averages of Adam, and the gradients of the step before, are there from the second on
        step()
    return f'{(resident_memory("VmHWM") - before) / 1024:.0f} MiB'


def resident_memory(field):
    """Return a field of /proc/self/status in KiB: VmRSS is what the process holds now, VmHWM the most it ever held."""
    with open('/proc/self/status') as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field))


# --- PyTorch ----------------------------------------------------------------------------------------------------------

def import_torch(device='cpu'):
    try:
        import torch
    except ImportError as error:
        raise SystemExit(f'--against torch: PyTorch cannot be imported ({error}). Install it, or leave the flag out')
    torch.set_num_threads(number_of_threads())
    if device == 'gpu':
        if not torch.cuda.is_available():
            raise SystemExit(f'--against torch: PyTorch {torch.__version__} finds no GPU. Install a build with CUDA that fits the '
                             'driver, or leave the flag out')
        torch.backends.cudnn.benchmark = True
    return torch


def torch_contenders(torch, model, args, x, target):
    """Return name → Contender, with the weights of `model`: both memory formats, on a GPU each of them in float32 and in TF32."""
    formats = {'NCHW': torch.contiguous_format, 'channels_last': torch.channels_last}

    def contender(memory_format, precision):
        def build():
            if precision:
                torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == 'tf32 '
            other = torch_unet(torch, model, model.config['base_channels'], args.norm)
            return torch_jobs(torch, other.to(TORCH_DEVICE[args.device], memory_format=memory_format), memory_format, x, target)
        return Contender(build, our_clock('cpu') if args.device == 'cpu' else torch_clock(torch),
                         functools.partial(torch_peak_memory, torch), torch.cuda.empty_cache)

    return {f'torch {precision}{name}': contender(memory_format, precision)
            for precision in ([''] if args.device == 'cpu' else ['fp32 ', 'tf32 ']) for name, memory_format in formats.items()}


def torch_clock(torch):
    """Return what `our_clock` returns, for work that PyTorch orders on a GPU."""
    def now():
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(start, end):
        end.synchronize()
        return start.elapsed_time(end) / 1000               # PyTorch too gives milliseconds

    return now, between


def torch_peak_memory(torch, work):
    torch.cuda.reset_peak_memory_stats()
    work()
    return torch.cuda.max_memory_allocated()


def torch_unet(torch, model, base, norm):
    """Return the same network in PyTorch, part for part under the same names, with the weights of `model`."""
    nn = torch.nn

    class DoubleConv(nn.Module):
        def __init__(self, in_channels, out_channels):
            super().__init__()
            for number, channels in (('1', in_channels), ('2', out_channels)):
                setattr(self, 'conv' + number, nn.Conv2d(channels, out_channels, 3, padding=1, bias=norm is None))
                if norm:
                    setattr(self, 'norm' + number, nn.BatchNorm2d(out_channels))

        def forward(self, x):
            for number in '12':
                x = getattr(self, 'conv' + number)(x)
                if norm:
                    x = getattr(self, 'norm' + number)(x)
                x = nn.functional.relu(x, inplace=True)
            return x

    class Up(DoubleConv):
        def __init__(self, in_channels, out_channels):
            super().__init__(2 * out_channels, out_channels)
            self.upconv = nn.ConvTranspose2d(in_channels, out_channels, 2, stride=2)

    class UNet(nn.Module):
        def __init__(self, depth=4):
            super().__init__()
            channels = [base * 2**level for level in range(depth + 1)]
            self.stem = DoubleConv(1, base)
            self.downs = nn.ModuleList(DoubleConv(channels[i], channels[i + 1]) for i in range(depth))
            self.ups = nn.ModuleList(Up(channels[i + 1], channels[i]) for i in reversed(range(depth)))
            self.head = nn.Conv2d(base, 1, 1)

        def forward(self, x):
            x, skips = self.stem(x), []
            for down in self.downs:
                skips.append(x)
                x = down(nn.functional.max_pool2d(x, 2))
            for up in self.ups:
                x = up(torch.cat([skips.pop(), up.upconv(x)], dim=1))
            return self.head(x)

    other = UNet().to(getattr(torch, str(model.dtype)))
    state = {name: torch.from_numpy(to_torch_layout(array)) for name, array in model.state_dict().items()}
    other.load_state_dict(state, strict=False)      # PyTorch also counts batches, and would miss that number
    return other


def to_torch_layout(array):
    """Return weights (KH, KW, in, out) as (out, in, KH, KW), vectors as they are."""
    return numpy.ascontiguousarray(array.transpose(3, 2, 0, 1)) if array.ndim == 4 else array.copy()


def torch_batch(torch, memory_format, *arrays, device='cpu'):
    """Return images (N, H, W, C) as (N, C, H, W) in the given memory format."""
    return [torch.tensor(array.transpose(0, 3, 1, 2)).contiguous(memory_format=memory_format).to(device) for array in arrays]


def torch_dice_loss(torch, logits, target):
    p = torch.sigmoid(logits)
    return -(2 * (p * target).sum() + 1) / (p.sum() + target.sum() + 1)


def torch_jobs(torch, other, memory_format, x, target):
    """Return what is timed: forward, training step, inference."""
    device = next(other.parameters()).device
    x, target = torch_batch(torch, memory_format, x, target, device=device)
    optimizer = torch.optim.Adam(other.parameters(), 1e-4, fused=device.type == 'cuda' or None)

    def step():
        other.train()
        optimizer.zero_grad()
        torch_dice_loss(torch, other(x), target).backward()
        optimizer.step()

    def inference():
        other.eval()
        with torch.inference_mode():
            return torch.sigmoid(other(x))

    def forward():
        other.train()
        return other(x)

    return forward, step, inference


def agreement(torch, case, norm):
    """Return a line that says how far outputs and gradients of the two networks lie apart in float64; exit if too far.

    In float32 the gradients of two correct networks differ: where a ReLU's input is within rounding of 0, one passes the
    gradient on and the other does not. In float64 hardly any input is that close, and a mistake has nowhere to hide.
    """
    x, target = make_batch(case, 'float64')
    model, loss = make_model(case[0], norm, 'float64'), DiceLoss()
    logits = model.forward(x)
    loss.forward(logits, target)
    model.backward(loss.backward(), input_gradient=False)
    other = torch_unet(torch, model, case[0], norm)
    x, target = torch_batch(torch, torch.contiguous_format, x, target)
    other_logits = other(x)
    torch_dice_loss(torch, other_logits, target).backward()
    gradients = dict(other.named_parameters())
    errors = {name: relative_error(to_torch_layout(gradient), gradients[name].grad)
              for name, gradient in model.gradients().items()}
    errors['logits'] = relative_error(logits.transpose(0, 3, 1, 2), other_logits)
    worst = max(errors, key=errors.get)
    if errors[worst] > 1e-6:
        raise SystemExit(f'the two networks disagree: {worst} differs by {errors[worst]:.1e}, expected below 1e-6')
    return f'the two agree in float64: logits to {errors["logits"]:.0e}, all gradients to {errors[worst]:.0e}'


def relative_error(ours, theirs):
    theirs = theirs.detach().numpy()
    return float(numpy.linalg.norm((ours - theirs).ravel()) / numpy.linalg.norm(theirs.ravel()))


# --- Arguments --------------------------------------------------------------------------------------------------------

def parse_case(text):
    """Turn '32:96x128:16' into (32, (96, 128), 16)."""
    try:
        base, size, batch = text.split(':')
        H, W = map(int, size.split('x'))
        case = int(base), (H, W), int(batch)
    except ValueError:
        case = 0, (0, 0), 0
    if min(case[0], *case[1], case[2]) < 1:
        raise argparse.ArgumentTypeError(f'{text!r} is no case; expected base:HEIGHTxWIDTH:batch, as in 32:96x128:16')
    return case


def whole(text):
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'{text!r} is not a whole number of at least 1')
    return int(text)


def parse(arguments):
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--case', type=parse_case, nargs='+', help='base:HEIGHTxWIDTH:batch, one or several')
    parser.add_argument('--device', choices=['cpu', 'gpu'], default='cpu', help='default: cpu')
    parser.add_argument('--precision', choices=['fp32', 'tf32'], help='of our products of float32 matrices on a GPU; default: tf32 '
                        'where the GPU has it')
    parser.add_argument('--kernels', action='store_true', help='on a GPU, use the kernels of nervenet/kernels.cu, which are off otherwise')
    parser.add_argument('--norm', choices=['none', 'batch'], default='none')
    parser.add_argument('--dtype', choices=['float32', 'float64'], default='float32')
    parser.add_argument('--threads', type=whole, help='default: the cores this process may use')
    parser.add_argument('--rounds', type=whole, help='of which the best counts (default 5), on a GPU the median (default 10)')
    parser.add_argument('--growth', action='store_true', help='instead: time against image size and batch, for the first base')
    parser.add_argument('--layers', action='store_true', help='also time each layer of a training step')
    parser.add_argument('--against', choices=['torch'], help='also run the same network in PyTorch')
    parser.add_argument('--memory-of', choices=['nervenet', 'torch'], help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.kernels and args.device == 'cpu':
        parser.error('--kernels needs --device gpu: they are for a GPU')
    if args.growth and (args.layers or args.against):
        parser.error('--growth is a table of its own: leave out --layers and --against')
    args.convention = CONVENTIONS[args.device]
    args.case = args.case or [parse_case(text) for text in args.convention.cases]
    args.rounds = args.rounds or args.convention.rounds
    args.norm = None if args.norm == 'none' else args.norm
    return args


if __name__ == '__main__':
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except MemoryError as error:
        sys.exit(f'benchmark.py: not enough memory: choose a smaller --case ({error})')
