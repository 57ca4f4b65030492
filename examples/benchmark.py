"""Measure how fast the U-Net trains and predicts on this machine.

    python examples/benchmark.py                                  four networks, about a minute
    python examples/benchmark.py --case 32:96x128:16 --layers     one network, each layer by itself
    python examples/benchmark.py --growth                         time against image size and batch
    python examples/benchmark.py --against torch                  beside PyTorch, if it is installed

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

CPU only: on a GPU, these numbers would mostly say how long it takes to start kernels.
"""

import argparse
import os
import platform
import subprocess
import sys
import time

import numpy

import nervenet
from nervenet.losses import DiceLoss
from nervenet.optim import Adam
from nervenet.parallel import describe_blas, number_of_threads, parallel_for, set_threads
from nervenet.train import predict, train_step

GROWTH_BYTES = 4 * 2**30         # cases of the growth table that need more are left out
DEFAULT_CASES = ('64:128x128:4', '32:96x128:16', '16:96x128:16', '32:416x576:1')


def main(arguments=None):
    args = parse(arguments)
    if args.memory_of:
        print(measure_memory(args.memory_of, args.case[0], args.norm))
        return
    if args.threads:
        set_threads(args.threads)
    torch = import_torch() if args.against else None
    peak = measure_peak(args.dtype)
    versions = f'nervenet {nervenet.__version__}, Python {platform.python_version()}, NumPy {numpy.__version__}'
    print(versions + (f', PyTorch {torch.__version__}' if torch else '') + f'\n{describe_blas()}')
    print(f'{number_of_threads()} threads, {args.dtype}, norm {args.norm}; matrix products reach {peak:.0f} GF/s')
    if args.growth:
        print_growth(args)
        return
    for case in args.case:
        run_case(case, args, peak, torch)


def run_case(case, args, peak, torch):
    """Time one case and print its lines."""
    base, (H, W), N = case
    x, target = make_batch(case, args.dtype)
    model = make_model(base, args.norm, args.dtype)
    gigaflops = 2e-9 * multiply_adds(model, x)              # of one forward; backward does each product twice
    print(f'\nU-Net base {base}, {H}×{W}, batch {N}: {gigaflops / N:.2f} GF per image and forward')

    contenders = {'nervenet': our_jobs(model, x, target)}
    if torch:
        print(f'  {agreement(torch, case, args.norm)}')
        formats = {'torch NCHW': torch.contiguous_format, 'torch channels_last': torch.channels_last}
        for name, memory_format in formats.items():
            other = torch_unet(torch, model, base, args.norm).to(memory_format=memory_format)
            contenders[name] = torch_jobs(torch, other, memory_format, x, target)
    seconds = best_times(contenders, args.rounds)

    print(f'  {"ms per image":20}{"forward":>10}{"train step":>12}{"predict":>10}   GF/s (of peak): train, predict')
    for name, (forward, step, inference) in seconds.items():
        rates = ', '.join(f'{rate:.0f} ({rate / peak:.0%})' for rate in (3 * gigaflops / step, gigaflops / inference))
        print(f'  {name:20}{forward / N * 1e3:10.2f}{step / N * 1e3:12.2f}{inference / N * 1e3:10.2f}   {rates}')
    if torch:
        ours, *theirs = seconds.values()
        ratios = [min(times) / our for our, times in zip(ours, zip(*theirs))]
        print(f'  {"ratio to the better":20}{ratios[0]:10.2f}{ratios[1]:12.2f}{ratios[2]:10.2f}')
    libraries = ['nervenet', 'torch'] if torch else ['nervenet']
    memory = [f'{library} {memory_in_fresh_process(library, case, args.norm)}' for library in libraries]
    print(f'  peak memory of a training step: {", ".join(memory)}')
    if args.layers:
        print_layers(model, x, target)


def print_growth(args):
    """Print how the time of a training step and of inference grows with image and batch, for the base of the first case."""
    base, sides, batches = args.case[0][0], (32, 64, 128, 256, 512), (1, 4, 16, 64)
    model = make_model(base, args.norm, args.dtype)
    for number, name in ((1, 'train step'), (2, 'predict')):
        print(f'\n  {name}, base {base}: ms per image (ns per pixel)\n  {"":9}' + ''.join(f'{f"batch {N}":>18}' for N in batches))
        for side in sides:
            cells = []
            for N in batches:
                if model.training_memory((N, side, side, 1)) > GROWTH_BYTES:
                    cells.append('too large')
                    continue
                job = our_jobs(model, *make_batch((base, (side, side), N), args.dtype))[number]
                seconds = best_times({'nervenet': [job]}, args.rounds)['nervenet'][0] / N
                cells.append(f'{seconds * 1e3:.2f} ({seconds / side**2 * 1e9:.0f})')
            print(f'  {f"{side}×{side}":9}' + ''.join(f'{cell:>18}' for cell in cells))


def make_batch(case, dtype):
    """Return random images (N, H, W, 1) in [0, 1] and masks of 0 and 1."""
    _, size, N = case
    rng = numpy.random.default_rng(0)
    return rng.random((N, *size, 1)).astype(dtype), (rng.random((N, *size, 1)) > 0.7).astype(dtype)


def make_model(base, norm, dtype):
    return nervenet.UNet(base_channels=base, norm=norm, rng=numpy.random.default_rng(1), dtype=dtype)


def our_jobs(model, x, target):
    """Return what is timed: forward, training step, inference."""
    loss, optimizer = DiceLoss(), Adam(model.parameters(), 1e-4)
    return (lambda: model.forward(x),
            lambda: train_step(model, loss, optimizer, x, target),
            lambda: predict(model, x))


def best_times(contenders, rounds):
    """Return name → seconds of each job, the best of `rounds`.

    In every round all contenders have their turn, so that a change of the machine's load meets them alike; the first call of a
    turn is not timed.
    """
    best = {name: [float('inf')] * len(jobs) for name, jobs in contenders.items()}
    for _ in range(rounds):
        for name, jobs in contenders.items():
            for number, job in enumerate(jobs):
                job()
                start = time.perf_counter()
                job()
                best[name][number] = min(best[name][number], time.perf_counter() - start)
    return best


def measure_peak(dtype):
    """Return the GF/s of large matrix products, one per thread at a time: the most that any product here can reach."""
    size, rng = 1024, numpy.random.default_rng(0)
    a, threads = rng.random((size, size)).astype(dtype), number_of_threads()
    best = float('inf')
    for _ in range(5):
        start = time.perf_counter()
        parallel_for(range(4 * threads), lambda block: a @ a)
        best = min(best, time.perf_counter() - start)
    return 4 * threads * 2 * size**3 / best / 1e9


def leaves(model):
    """Yield (name, layer) for every layer that computes something itself."""
    for prefix, layer in model.layers():
        if prefix and not layer.children:
            yield prefix[:-1], layer


def multiply_adds(model, x):
    """Return the multiply-adds of model.forward(x)."""
    return sum(row['multiply_adds'] for row in time_layers(model, lambda: model.forward(x)).values())


def time_layers(model, job):
    """Run `job` with a clock in every layer; return name → {'forward', 'backward': seconds, 'multiply_adds'}."""
    rows, hidden = {}, []
    for name, layer in leaves(model):
        rows[name] = row = {'forward': 0.0, 'backward': 0.0, 'multiply_adds': 0}
        for method in ('forward', 'backward'):
            def timed(*inputs, layer=layer, method=method, row=row):
                start = time.perf_counter()
                result = getattr(type(layer), method)(layer, *inputs)
                row[method] += time.perf_counter() - start
                if method == 'forward':
                    row['multiply_adds'] = layer.multiply_adds(inputs[0].shape)
                return result
            setattr(layer, method, timed)           # an attribute of the object hides the method of its class
            hidden.append((layer, method))
    try:
        job()
    finally:
        for layer, method in hidden:
            delattr(layer, method)
    return rows


def print_layers(model, x, target):
    """Print what each layer costs in a training step, the best of three."""
    step = our_jobs(model, x, target)[1]
    step()
    runs = [time_layers(model, step) for _ in range(3)]
    rows = {name: {key: min(run[name][key] for run in runs) for key in row} for name, row in runs[0].items()}
    total = sum(row['forward'] + row['backward'] for row in rows.values())
    print(f'  {"layer":24}{"forward ms":>12}{"backward ms":>13}{"share":>8}{"GF/s forward":>14}{"backward":>10}')
    for name, row in rows.items():
        rates = ''
        if row['multiply_adds']:
            gigaflops = 2e-9 * row['multiply_adds']
            rates = f'{gigaflops / row["forward"]:14.0f}{2 * gigaflops / row["backward"]:10.0f}'
        print(f'  {name:24}{row["forward"] * 1e3:12.2f}{row["backward"] * 1e3:13.2f}'
              f'{(row["forward"] + row["backward"]) / total:8.1%}{rates}')
    print(f'  {"all layers":24}{sum(row["forward"] for row in rows.values()) * 1e3:12.2f}'
          f'{sum(row["backward"] for row in rows.values()) * 1e3:13.2f}')


# --- Memory -----------------------------------------------------------------------------------------------------------

def memory_in_fresh_process(library, case, norm):
    """Return the peak memory of a training step as text, measured in a process that does nothing else."""
    base, (H, W), N = case
    result = subprocess.run([sys.executable, __file__, '--case', f'{base}:{H}x{W}:{N}', '--norm', norm or 'none',
                             '--memory-of', library], capture_output=True, text=True)
    if result.returncode:
        return f'not measured ({result.stderr.strip().splitlines()[-1]})'
    return result.stdout.strip()


def measure_memory(library, case, norm):
    """Run one training step and return by how much it raised the peak resident memory, as text."""
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

def import_torch():
    try:
        import torch
    except ImportError as error:
        raise SystemExit(f'--against torch: PyTorch cannot be imported ({error}). Install it, or leave the flag out')
    torch.set_num_threads(number_of_threads())
    return torch


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


def torch_batch(torch, memory_format, *arrays):
    """Return images (N, H, W, C) as (N, C, H, W) in the given memory format."""
    return [torch.tensor(array.transpose(0, 3, 1, 2)).contiguous(memory_format=memory_format) for array in arrays]


def torch_dice_loss(torch, logits, target):
    p = torch.sigmoid(logits)
    return -(2 * (p * target).sum() + 1) / (p.sum() + target.sum() + 1)


def torch_jobs(torch, other, memory_format, x, target):
    """Return what is timed: forward, training step, inference."""
    x, target = torch_batch(torch, memory_format, x, target)
    optimizer = torch.optim.Adam(other.parameters(), 1e-4)

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
        assert min(case[0], H, W, case[2]) >= 1
        return case
    except (ValueError, AssertionError):
        problem = f'{text!r} is no case; expected base:HEIGHTxWIDTH:batch, as in 32:96x128:16'
        raise argparse.ArgumentTypeError(problem) from None


def positive(text):
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'{text!r} is not a whole number of at least 1')
    return int(text)


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--case', type=parse_case, nargs='+', default=[parse_case(text) for text in DEFAULT_CASES],
                        help='base:HEIGHTxWIDTH:batch, one or several')
    parser.add_argument('--norm', choices=['none', 'batch'], default='none')
    parser.add_argument('--dtype', choices=['float32', 'float64'], default='float32')
    parser.add_argument('--threads', type=positive, help='default: the cores this process may use')
    parser.add_argument('--rounds', type=positive, default=5, help='of which the best counts (default 5)')
    parser.add_argument('--growth', action='store_true', help='instead: time against image size and batch, for the first base')
    parser.add_argument('--layers', action='store_true', help='also time each layer of a training step')
    parser.add_argument('--against', choices=['torch'], help='also run the same network in PyTorch')
    parser.add_argument('--memory-of', choices=['nervenet', 'torch'], help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    args.norm = None if args.norm == 'none' else args.norm
    return args


if __name__ == '__main__':
    main()
