"""The same network in other engines, with the same weights, for `benchmark.py`: PyTorch, torch.compile, ONNX Runtime, OpenVINO.

Each is set up the way that is fastest on a CPU as its own documentation has it, on as many threads as nervenet. The network is written
once, in PyTorch; the last two read it from a file. None of them is needed to use nervenet, so each is imported only where it is used.
"""

import collections
import functools
import importlib
import operator

import numpy

from nervenet.layers import Add, BatchNorm2D, Concat, Conv2D, ConvTranspose2D, Dropout, MaxPool2D, ReLU
from nervenet.losses import DiceLoss
from nervenet.networks.optimised_resunet import Stack
from nervenet.networks.summary import Part, trace
from nervenet.resampling import Enlarging
from nervenet.train import predict

# What --against takes → what has to be importable for it, and its contenders.
MODULES = {'torch': ['torch'], 'compile': ['torch'], 'onnx': ['torch', 'onnx', 'onnxscript', 'onnxruntime'],
           'openvino': ['torch', 'openvino']}
CONTENDERS = {'torch': ['torch NCHW', 'torch channels_last'], 'compile': ['torch.compile'], 'onnx': ['ONNX Runtime'],
              'openvino': ['OpenVINO']}
TRAINABLE = 'torch', 'compile'
LEARNING_RATE = 1e-5                    # of all contenders: low, so that they are still learning at the end
TORCH_DEVICE = {'cpu': 'cpu', 'gpu': 'cuda'}


# --- In the processes of the benchmark on a CPU -----------------------------------------------------------------------

def versions(library):
    """Return [name and version of each package that `library` needs]. Raises ImportError, or what torch.compile raises if it cannot."""
    modules = [importlib.import_module(name) for name in MODULES[library]]
    if library == 'compile':
        torch, = modules
        torch.compile(lambda x: x + 1)(torch.zeros(8))                      # it may lack a C++ compiler
    return [f'{module.__name__} {module.__version__.partition("-")[0]}' for module in modules]          # OpenVINO adds its commit


def check(library, model, x, target, folder):
    """Return a line that says how far `library` and `model` agree on the images x and masks target, (N, H, W, 1); exit if they do not.

    PyTorch computes in float64, with gradients. The engines that only predict do so in the precision of `model`, and the network
    that they read lies in `folder` afterwards.
    """
    import torch
    if library in TRAINABLE:
        return agreement(torch, model, x, target)
    model.forward(x)                                # in training mode, so that the averages of batch norm are not all 0 and 1
    other = torch_twin(torch, model, x.shape)
    write(torch, library, torch.nn.Sequential(other, torch.nn.Sigmoid()).eval(), torch_batch(torch, torch.contiguous_format, x)[0], folder)
    error = relative_error(predict(model, x), read(library, x, folder, threads=None)().reshape(x.shape))
    if not error < 1e-4:
        raise SystemExit(f'the probabilities differ by {error:.1e}, expected below 1e-4')
    return f'probabilities agree to {error:.0e}'


def job(contender, kind, model, x, target, folder, threads):
    """Return the function that is timed: one step of `kind`, 'training' or 'inference'. Its model is there when this returns."""
    if contender in CONTENDERS['onnx']:
        return read('onnx', x, folder, threads)
    if contender in CONTENDERS['openvino']:
        return read('openvino', x, folder, threads)
    import torch
    torch.set_num_threads(threads)
    memory_format = torch.contiguous_format if contender == 'torch NCHW' else torch.channels_last
    other = torch_twin(torch, model, x.shape).to(memory_format=memory_format)
    _, training, inference = torch_jobs(torch, other, memory_format, x, target, torch.compile if contender == 'torch.compile' else None)
    return training if kind == 'training' else inference


def write(torch, library, network, x, folder):
    """Write the PyTorch `network`, for images of the shape of x, as a file that `library` reads."""
    if library == 'onnx':
        torch.onnx.export(network, (x,), f'{folder}/network.onnx', opset_version=18, input_names=['x'])
    else:
        import openvino
        openvino.save_model(openvino.convert_model(torch.export.export(network, (x,))), f'{folder}/network.xml', compress_to_fp16=False)


def read(library, x, folder, threads):
    """Return the function that gives the probabilities (N, 1, H, W) of the images x (N, H, W, 1), by the network in `folder`.

    `threads` is how many compute, None for as many as `library` likes.
    """
    x = numpy.ascontiguousarray(x.transpose(0, 3, 1, 2))
    if library == 'onnx':
        import onnxruntime
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        session = onnxruntime.InferenceSession(f'{folder}/network.onnx', options, providers=['CPUExecutionProvider'])
        return lambda: session.run(None, {'x': x})[0]
    import openvino
    config = {'INFERENCE_PRECISION_HINT': 'f32', 'PERFORMANCE_HINT': 'LATENCY', 'INFERENCE_NUM_THREADS': threads or 0}
    request = openvino.Core().compile_model(f'{folder}/network.xml', 'CPU', config).create_infer_request()
    return lambda: request.infer([x], share_inputs=True, share_outputs=True)[0]


# --- On a GPU ---------------------------------------------------------------------------------------------------------

def import_torch(threads):
    """Return PyTorch, ready for a GPU."""
    try:
        import torch
    except ImportError as error:
        raise SystemExit(f'--against torch: PyTorch cannot be imported ({error}). Install it, or leave the flag out') from None
    torch.set_num_threads(threads)
    if not torch.cuda.is_available():
        raise SystemExit(f'--against torch: PyTorch {torch.__version__} finds no GPU. Install a build with CUDA that fits the '
                         'driver, or leave the flag out')
    torch.backends.cudnn.benchmark = True
    return torch


def gpu_contenders(torch, model, x, target):
    """Return name → as in `benchmark.Contender`, with the weights of `model`: both memory formats, each in float32 and in TF32."""
    formats = {'NCHW': torch.contiguous_format, 'channels_last': torch.channels_last}

    def contender(memory_format, precision):
        def build():
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == 'tf32'
            other = torch_twin(torch, model, x.shape).to(TORCH_DEVICE['gpu'], memory_format=memory_format)
            return torch_jobs(torch, other, memory_format, x, target)

        def peak_memory(work):
            torch.cuda.reset_peak_memory_stats()
            work()
            return torch.cuda.max_memory_allocated()

        return build, torch_clock(torch), peak_memory, torch.cuda.empty_cache

    return {f'torch {precision} {name}': contender(memory_format, precision)
            for precision in ('fp32', 'tf32') for name, memory_format in formats.items()}


def torch_clock(torch):
    """Return two functions, as backend.mark (without argument) and backend.seconds_between, for work that PyTorch orders on a GPU."""
    def now():
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(start, end):
        end.synchronize()
        return start.elapsed_time(end) / 1000               # PyTorch too gives milliseconds

    return now, between


# --- PyTorch ----------------------------------------------------------------------------------------------------------

def torch_twin(torch, model, shape):
    """Return `model`, for images of `shape` (N, H, W, C), in PyTorch: layer for layer, under the same names, with the same weights.

    What `summary.trace` saw is written down as a graph, of which `torch.fx` makes straight code that lets go of each array after its last
    use. As one would by hand, ReLU and sums write into what they are given, unless somebody else needs it. Raises
    NotImplementedError for a kind of layer that has no counterpart here.
    """
    nn, functional = torch.nn, torch.nn.functional
    made, stages, _ = trace(model, shape)
    logits, modules, graph = stages['head'], {}, torch.fx.Graph()
    order = dict.fromkeys(value for y in (*made, logits) for value in (*y.inputs, y))          # with the parts taken out of what was made
    readers = collections.Counter(x for y in order for x in y.inputs)

    def is_free(x):                                         # backward of what made it does without, and nobody else reads it
        return readers[x] == 1 and x.layer is not None and 'output' not in x.layer.keeps

    def call(function, *inputs, **options):
        return graph.call_function(function, inputs, options)

    def computed(y, *x):
        match y.layer:
            case Conv2D(params=params, geometry=geometry):
                few, many = params['weight'].shape[2:]
                modules[y.name] = nn.Conv2d(few, many, geometry.kernel_size, geometry.stride, geometry.padding, geometry.dilation,
                                            bias='bias' in params)
            case ConvTranspose2D(params=params, geometry=geometry):
                many, few = params['weight'].shape[2:]
                modules[y.name] = nn.ConvTranspose2d(few, many, geometry.kernel_size, geometry.stride, bias='bias' in params)
            case BatchNorm2D(params=params, eps=eps, momentum=momentum):
                modules[y.name] = nn.BatchNorm2d(len(params['weight']), eps, momentum)
            case Dropout(p=p):
                modules[y.name] = nn.Dropout(p)
            case ReLU():
                return call(functional.relu, *x, inplace=is_free(y.inputs[0]))
            case Add():
                terms = sorted(zip(y.inputs, x), key=lambda term: not is_free(term[0]))
                total = call(operator.iadd if is_free(terms[0][0]) else operator.add, terms[0][1], terms[1][1])
                return functools.reduce(functools.partial(call, operator.iadd), (term for _, term in terms[2:]), total)
            case Concat():
                return call(torch.cat, x, 1)
            case Stack():
                return call(torch.cat, x, 0)
            case MaxPool2D(geometry=geometry):
                return call(functional.max_pool2d, *x, geometry.kernel_size, geometry.stride, geometry.padding)
            case Enlarging(mode=mode):
                return call(functional.interpolate, *x, y.shape[1:3], mode=mode)
            case Part(index=index):
                N, H, W, C = index + (slice(None),) * (4 - len(index))
                return call(operator.getitem, *x, (N, C, H, W))
            case layer:
                raise NotImplementedError(f'{y.name} is a {type(layer).__name__}, which has no counterpart in PyTorch yet: add it to '
                                          'rivals.torch_twin')
        return graph.call_module(y.name, x)

    (H, W), (more_H, more_W) = shape[1:3], numpy.subtract(model.padded_size(shape[1:3]), shape[1:3]).tolist()
    x = graph.placeholder('x')
    if more_H or more_W:
        x = call(functional.pad, x, (0, more_W, 0, more_H))
    for y in order:
        order[y] = x if y.layer is None else computed(y, *(order[value] for value in y.inputs))
    graph.output(call(operator.getitem, order[logits], (..., slice(H), slice(W))) if more_H or more_W else order[logits])
    other = torch.fx.GraphModule(modules, graph).to(getattr(torch, str(model.dtype)))
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


def torch_jobs(torch, other, memory_format, x, target, compiled=None):
    """Return what is timed: forward, training step, inference; the last two through `compiled`, if it is torch.compile."""
    x, target = torch_batch(torch, memory_format, x, target, device=next(other.parameters()).device)
    optimizer = torch.optim.Adam(other.parameters(), LEARNING_RATE, fused=True)          # in one pass, on a CPU in a third of the time
    compiled = compiled or (lambda function: function)
    loss = compiled(lambda x, target: torch_dice_loss(torch, other(x), target))
    probabilities = compiled(lambda x: torch.sigmoid(other(x)))

    def in_mode(training):
        if other.training != training:              # to look is quick; to set it goes through all layers
            other.train(training)

    def step():
        in_mode(True)
        optimizer.zero_grad()
        loss(x, target).backward()
        optimizer.step()

    def inference():
        in_mode(False)
        with torch.inference_mode():
            return probabilities(x)

    def forward():
        in_mode(True)
        return other(x)

    return forward, step, inference


def agreement(torch, model, x, target):
    """Return a line that says how far outputs and gradients of `model`, in float64, and of the same in PyTorch lie apart; exit if too far.

    In float32 the gradients of two correct networks differ: where a ReLU's input is within rounding of 0, one passes the
    gradient on and the other does not. In float64 hardly any input is that close, and a mistake has nowhere to hide.
    """
    loss = DiceLoss()
    logits = model.forward(x)
    loss.forward(logits, target)
    model.backward(loss.backward(), input_gradient=False)
    other = torch_twin(torch, model, x.shape)
    x, target = torch_batch(torch, torch.contiguous_format, x, target)
    other_logits = other(x)
    torch_dice_loss(torch, other_logits, target).backward()
    gradients = {name: parameter.grad.numpy() for name, parameter in other.named_parameters()}
    # A bias that the next norm takes away again has gradient 0, of which both know no more than how far rounding lets it be from that.
    least = 1e-6 * max(numpy.linalg.norm(gradient.ravel()) for gradient in gradients.values())
    errors = {name: relative_error(to_torch_layout(gradient), gradients[name], least) for name, gradient in model.gradients().items()}
    errors['logits'] = relative_error(logits.transpose(0, 3, 1, 2), other_logits.detach().numpy())
    worst = max(errors, key=errors.get)
    if not errors[worst] < 1e-6:
        raise SystemExit(f'the two networks disagree: {worst} differs by {errors[worst]:.1e}, expected below 1e-6')
    return f'the two agree in float64: logits to {errors["logits"]:.0e}, all gradients to {errors[worst]:.0e}'


def relative_error(ours, theirs, least=0):
    return float(numpy.linalg.norm((ours - theirs).ravel()) / max(numpy.linalg.norm(theirs.ravel()), least))
