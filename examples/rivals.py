"""The same U-Net, with the same weights, in the engines that benchmark.py can compare with.

`RIVALS` lists them. Each builds one kind of work, training or inference, and returns it as a function without arguments that does one
step on the batch. An engine is imported only when something is built with it.
"""

import functools
import importlib.metadata
import importlib.util
import io
import typing

import numpy

from nervenet.engine.parallel import number_of_threads
from nervenet.losses import DiceLoss

TORCH_DEVICE = {'cpu': 'cpu', 'gpu': 'cuda'}


class Rival(typing.NamedTuple):
    """An engine in one way of using it."""
    option: str                     # of --against
    packages: tuple                 # that it needs
    kinds: tuple                    # of work that it can do
    build: typing.Callable          # (model, kind, x, target) → one step; inference returns the probabilities (N, 1, H, W)


def missing(option):
    """Return the packages that a choice of --against needs and that are not installed."""
    packages = dict.fromkeys(package for rival in RIVALS.values() if rival.option == option for package in rival.packages)
    return [package for package in packages if importlib.util.find_spec(package) is None]


def versions(options):
    """Return 'package version' of all that the given choices of --against use."""
    packages = dict.fromkeys(package for rival in RIVALS.values() if rival.option in options for package in rival.packages)
    return list(map(version, packages))


def version(package):
    try:
        return f'{package} {importlib.metadata.version(package)}'
    except importlib.metadata.PackageNotFoundError:         # installed under another name, or without one
        return f'{package} of unknown version'


# --- How they are built -----------------------------------------------------------------------------------------------

def build_torch(model, kind, x, target, memory_format='channels_last', compiled=False):
    """Return a step of PyTorch, operation by operation, or of what `torch.compile` makes of the network."""
    torch = import_torch()
    memory_format = getattr(torch, memory_format)
    other = torch_unet(torch, model).to(memory_format=memory_format)
    if not compiled:
        _, step, inference = torch_jobs(torch, other, memory_format, x, target)
        return step if kind == 'training' else inference
    if kind == 'training':
        return torch_jobs(torch, torch.compile(other), memory_format, x, target)[1]
    images, = torch_batch(torch, memory_format, x)
    network = torch.compile(with_sigmoid(torch, other))

    def inference():
        with torch.inference_mode():
            return network(images)

    return inference


def build_onnx(model, kind, x, target):
    """Return inference by ONNX Runtime, of a network of fixed shape."""
    torch = import_torch()
    import onnxruntime
    images, = torch_batch(torch, torch.contiguous_format, x)
    file = io.BytesIO()
    torch.onnx.export(with_sigmoid(torch, torch_unet(torch, model)), (images,), file, dynamo=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = number_of_threads()
    session = onnxruntime.InferenceSession(file.getvalue(), options, providers=['CPUExecutionProvider'])
    inputs = {session.get_inputs()[0].name: images.numpy()}
    return lambda: session.run(None, inputs)[0]


def build_openvino(model, kind, x, target):
    """Return inference by OpenVINO in float32, of a network of fixed shape."""
    torch = import_torch()
    import openvino
    images, = torch_batch(torch, torch.contiguous_format, x)
    network = openvino.convert_model(with_sigmoid(torch, torch_unet(torch, model)), example_input=images, input=list(images.shape))
    compiled = openvino.Core().compile_model(network, 'CPU', {'INFERENCE_PRECISION_HINT': 'f32', 'PERFORMANCE_HINT': 'LATENCY',
                                                              'INFERENCE_NUM_THREADS': number_of_threads()})
    images = images.numpy()
    return lambda: compiled(images)[0]


BOTH = 'training', 'inference'
RIVALS = {
    'torch NCHW': Rival('torch', ('torch',), BOTH, functools.partial(build_torch, memory_format='contiguous_format')),
    'torch channels_last': Rival('torch', ('torch',), BOTH, build_torch),
    'torch.compile': Rival('compile', ('torch',), BOTH, functools.partial(build_torch, compiled=True)),
    'ONNX Runtime': Rival('onnx', ('torch', 'onnx', 'onnxruntime'), ('inference',), build_onnx),
    'OpenVINO': Rival('openvino', ('torch', 'openvino'), ('inference',), build_openvino)}


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


def with_sigmoid(torch, other):
    """Return the network that gives probabilities, for inference."""
    return torch.nn.Sequential(other, torch.nn.Sigmoid()).eval()


def torch_unet(torch, model):
    """Return the same network in PyTorch, part for part under the same names, with the weights of `model`."""
    nn, base, norm = torch.nn, model.config['base_channels'], model.config['norm']

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

    def set_training(training):
        if other.training != training:
            other.train(training)

    def step():
        set_training(True)
        optimizer.zero_grad()
        torch_dice_loss(torch, other(x), target).backward()
        optimizer.step()

    def inference():
        set_training(False)
        with torch.inference_mode():
            return torch.sigmoid(other(x))

    def forward():
        set_training(True)
        return other(x)

    return forward, step, inference


def agreement(torch, model, x, target):
    """Return a line that says how far outputs and gradients of the two networks lie apart, of a model in float64; exit if too far.

    In float32 the gradients of two correct networks differ: where a ReLU's input is within rounding of 0, one passes the
    gradient on and the other does not. In float64 hardly any input is that close, and a mistake has nowhere to hide.
    """
    loss = DiceLoss()
    logits = model.forward(x)
    loss.forward(logits, target)
    model.backward(loss.backward(), input_gradient=False)
    other = torch_unet(torch, model)
    x, target = torch_batch(torch, torch.contiguous_format, x, target)
    other_logits = other(x)
    torch_dice_loss(torch, other_logits, target).backward()
    gradients = dict(other.named_parameters())
    errors = {name: relative_error(to_torch_layout(gradient), gradients[name].grad.numpy())
              for name, gradient in model.gradients().items()}
    errors['logits'] = relative_error(logits.transpose(0, 3, 1, 2), other_logits.detach().numpy())
    worst = max(errors, key=errors.get)
    if not errors[worst] <= 1e-6:
        raise SystemExit(f'the two networks disagree: {worst} differs by {errors[worst]:.1e}, expected below 1e-6')
    return f'nervenet and PyTorch agree in float64: logits to {errors["logits"]:.0e}, all gradients to {errors[worst]:.0e}'


def relative_error(ours, theirs):
    """Return the norm of the difference of two arrays of equal size, over the norm of the second."""
    ours, theirs = numpy.ravel(ours), numpy.ravel(theirs)
    return float(numpy.linalg.norm(ours - theirs) / numpy.linalg.norm(theirs))


# --- On a GPU ---------------------------------------------------------------------------------------------------------

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
