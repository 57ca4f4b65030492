"""Model files: everything a trained model is, in one file that is safe to write, to keep and to open.

A file is a NumPy `.npz` archive, without pickle: opening one runs no code. Inside are plain arrays and one header:

    header                           JSON text as uint8: format, version, model class, its config and dtype, the extras
    model/stem.conv1.weight, ...     parameters and buffers, or what a chain has learnt, under the names of `model.state_dict()`
    extra/0, extra/1, ...            arrays found in the extras; the header says where they belong

The config is the keyword arguments that built the model, so a file knows its own architecture and `load(path)` needs no
other argument. Extras are whatever a training run wants to keep beside the model: optimizer state, history, random
state.

Writing: a process killed half-way through a file leaves half a file. So the new content goes to a second file, is
forced to the disk, and only then takes the name of the old one, which the operating system does in one step. At any
moment the name belongs to one whole file, old or new.

Reading: a file may be cut, damaged, or made by someone else on purpose. Nothing in it is believed before it is checked,
and no more memory is asked for than a few times the file's own size.
"""

import io
import json
import math
import os
import zipfile

import numpy

from ..classical.chains import Chain
from ..engine.backend import to_cpu
from ..files import atomic_write
from ..networks import NETWORKS

FORMAT, VERSION = 'nervenet checkpoint', 1
MODELS = {network.__name__: network for network in NETWORKS.values()}       # what a file may ask to be built
CHAINS = {'Chain': Chain}                   # and the systems from before deep networks, where they will do as well
SMALL_MODEL = 10**6                         # weights that a file may ask for whatever it holds: what does not fit is named then
ARRAY = '__array__'                         # in the header, {ARRAY: 'extra/0'} stands for an array


class CheckpointError(RuntimeError):
    """A model file cannot be read or written; one line that names the file and says why."""


def save(path, model, **extra):
    """Write `model`, and extras of your own, to the file `path`, whole or not at all; the name is taken as it is.

    An extra is a dict, list, string, number, None or array, nested as you like. It comes back from `load_checkpoint`
    equal to the bit, except that tuples come back as lists, NumPy numbers as Python numbers and arrays of the GPU as
    NumPy arrays. Dicts have strings as keys; integers may be of any size (random states are); floats may be infinite or
    NaN.

    Raises CheckpointError if the file cannot be written (disk full, no such folder): then the old file is as it was.
    Raises TypeError, before anything is written, for a model or an extra that a file cannot hold.
    """
    from .. import __version__          # which is set after this file has been read

    name = type(model).__name__
    if name not in MODELS | CHAINS:
        raise TypeError(f'cannot save a {name}: a file holds one of {", ".join(MODELS | CHAINS)} (nervenet.networks.NETWORKS)')
    arrays = {}
    header = dict(format=FORMAT, version=VERSION, library=__version__, model=name, dtype=model.dtype.name,
                  config=_pack(model.config, arrays, 'config'), extra=_pack(extra, arrays, 'extra'))
    header = numpy.frombuffer(json.dumps(header).encode(), numpy.uint8)
    state = {f'model/{key}': to_cpu(array) for key, array in model.state_dict().items()}
    try:
        # numpy.savez makes the same file; some versions leave the archive open on a full disk
        with atomic_write(path) as file, zipfile.ZipFile(file, 'w') as archive:
            for key, array in {'header': header, **state, **arrays}.items():
                with archive.open(f'{key}.npy', 'w', force_zip64=True) as entry:
                    numpy.lib.format.write_array(entry, array, allow_pickle=False)
    except OSError as error:
        raise CheckpointError(f'{path}: not saved ({_reason(error)}); what was there before is untouched') from error


def load(path):
    """Return the model in the file `path`, a network or a chain.

    A network is on the CPU, in inference mode: `model.train()` to go on training. Raises CheckpointError.
    """
    return load_checkpoint(path, MODELS | CHAINS)[0]


def load_checkpoint(path, models=MODELS):
    """Return `(model, extra)` from the file `path`: the model as from `load`, and `extra`, the dict of what was saved beside it.

    Raises CheckpointError, in one line, for whatever is wrong: no such file, cut or damaged, not a file of this
    library, a later format, a model class that is not in `models`, arrays that do not fit the architecture.
    """
    try:
        header, arrays = _read(path)
        state = {key[len('model/'):]: array for key, array in arrays.items() if key.startswith('model/')}
        return _build(header, state, models), header['extra']
    except CheckpointError as error:
        raise CheckpointError(f'{path}: {error}') from error.__cause__
    except FileNotFoundError:
        raise CheckpointError(f'{path}: no such file') from None
    except IsADirectoryError:
        raise CheckpointError(f'{path}: is a folder; expected a model file, such as best.npz in a run folder') from None
    except Exception as error:      # a damaged archive fails in any of a dozen ways, each with an exception of its own
        raise CheckpointError(f'{path}: not a readable model file, cut short or damaged ({_reason(error)})') from error


def _pack(value, arrays, where):
    """Return `value` as JSON holds it. Arrays go into `arrays` and leave their entry's name. `where` is for errors."""
    if isinstance(value, numpy.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_pack(item, arrays, f'{where}[{i}]') for i, item in enumerate(value)]
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str) or key == ARRAY:
                raise TypeError(f'{where} has the key {key!r}; expected strings other than {ARRAY!r}')
        return {key: _pack(item, arrays, f'{where}[{key!r}]') for key, item in value.items()}
    kind = getattr(getattr(value, 'dtype', None), 'kind', None)
    if kind is None or kind not in 'biufc':
        raise TypeError(f'{where} is a {type(value).__name__}{kind and f" of kind {kind!r}" or ""}; '
                        'expected dicts, lists, strings, numbers, None and arrays of numbers')
    name = f'extra/{len(arrays)}'
    arrays[name] = to_cpu(value)
    return {ARRAY: name}


def _unpack(value, arrays):
    """Return `value` with every array back in its place: the inverse of `_pack`."""
    if isinstance(value, list):
        return [_unpack(item, arrays) for item in value]
    if isinstance(value, dict):
        return arrays[value[ARRAY]] if ARRAY in value else {key: _unpack(item, arrays) for key, item in value.items()}
    return value


def _read(path):
    """Return (header, {entry name: array}) from the file `path`. Every byte of the entries has passed its checksum."""
    with open(path, 'rb') as file, zipfile.ZipFile(file) as archive:
        entries = {entry.filename.removesuffix('.npy'): entry for entry in archive.infolist()}
        if 'header' not in entries:
            raise CheckpointError('not a model file of nervenet: an archive without a header')
        header = json.loads(_read_array(archive, entries['header']).tobytes())
        if not isinstance(header, dict) or header.get('format') != FORMAT:
            raise CheckpointError(f'not a model file of nervenet: its header is not of the format {FORMAT!r}')
        if header['version'] > VERSION:
            raise CheckpointError(f'written by nervenet {header["library"]} in format version {header["version"]}, '
                                  f'this one reads versions up to {VERSION}; update nervenet')
        if sum(entry.file_size for entry in entries.values()) > os.fstat(file.fileno()).st_size:
            raise CheckpointError('its entries claim to be larger than the file')
        arrays = {name: _read_array(archive, entry) for name, entry in entries.items()}
    return _unpack(header, arrays), arrays


def _read_array(archive, entry):
    """Return the array in an entry, a `.npy` file, of the archive. A header that does not fit the bytes is refused."""
    if entry.compress_type != zipfile.ZIP_STORED:           # a few compressed bytes can ask for any amount of memory
        raise CheckpointError(f'{entry.filename} is compressed; a model file of nervenet holds its arrays as they are')
    data = archive.read(entry)
    stream = io.BytesIO(data)
    if numpy.lib.format.read_magic(stream) != (1, 0):
        raise CheckpointError(f'{entry.filename} is not an array of numbers')
    shape, is_fortran, dtype = numpy.lib.format.read_array_header_1_0(stream)
    if dtype.kind not in 'biufc':
        raise CheckpointError(f'{entry.filename} holds {dtype}, expected numbers')
    values = data[stream.tell():]
    if math.prod(shape) * dtype.itemsize != len(values):
        raise CheckpointError(f'{entry.filename} claims shape {shape} of {dtype} and holds {len(values)} bytes')
    return numpy.ndarray(shape, dtype, values, order='F' if is_fortran else 'C').copy()


def _build(header, state, models):
    """Return the model that `header` describes, one of `models`, with the arrays of `state`."""
    name, config, options = header['model'], header['config'], {}
    if name not in models:
        raise CheckpointError(f'holds a model of class {name!r}; expected one of {", ".join(models)}')
    for key, array in state.items():
        if array.dtype.name != header['dtype']:
            raise CheckpointError(f'its {key} is {array.dtype}, its header says {header["dtype"]}')
    if name in MODELS:
        if not 1 <= config['depth'] <= min(len(state), 64):
            raise CheckpointError(f'its header asks for depth {config["depth"]}, its {len(state)} arrays do not')
        options = dict(dtype=header['dtype'], rng=_Bounded(SMALL_MODEL + 2 * sum(array.size for array in state.values())))
    try:
        model = models[name](**config, **options)
        model.load_state_dict(state)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f'its {name} cannot be built: {_reason(error)}') from error
    return model.eval() if name in MODELS else model


class _Bounded(numpy.random.Generator):
    """A generator that draws no more than so many weights.

    Building a model allocates it, and a header that asks for terabytes is quickly written. The arrays of a file cannot lie about their sizes,
    since their bytes are there. In every network the weights of convolutions are most of it, and they are drawn.
    """

    def __init__(self, left):
        super().__init__(numpy.random.PCG64())
        self.left = left

    def standard_normal(self, size=None, *options, **more):
        self.left -= math.prod(size)
        if self.left < 0:
            raise CheckpointError(f'its header asks for far more weights than it holds; the next would have the shape {size}')
        return super().standard_normal(size, *options, **more)


def _reason(error):
    """Return what an exception says, in one line."""
    return (str(error).splitlines() or [type(error).__name__])[0]
