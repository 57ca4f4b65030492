import io
import json
import os
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path

import numpy
import pytest

from nervenet import ReLU, UNet
from nervenet.engine.backend import to_cpu
from nervenet.files import atomic_write
from nervenet.networks import NETWORKS
from nervenet.study.checkpoint import CheckpointError, load, load_checkpoint, save
from nervenet.optim import Adam


def small(seed=0, **options):
    """A U-Net of unequal channels whose arrays, buffers included, are all random."""
    rng = numpy.random.default_rng(seed)
    model = UNet(**{'in_channels': 2, 'out_channels': 3, 'base_channels': 2, 'depth': 2, 'rng': rng, **options})
    for array in model.state_dict().values():
        array[...] = rng.random(array.shape)                                # positive, as a variance must be
    return model


def same(model, other):
    """True if both models have the same architecture and, to the bit, the same arrays."""
    ours, theirs = model.state_dict(), other.state_dict()
    return (model.config == other.config and model.dtype == other.dtype and list(ours) == list(theirs)
            and all(to_cpu(ours[name]).tobytes() == to_cpu(theirs[name]).tobytes() for name in ours))


def refused(path, *parts):
    """Assert that the file is refused in one line that names it and holds these parts."""
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(path)
    text = str(error.value)
    assert text.startswith(f'{path}: ') and '\n' not in text
    for part in parts:
        assert str(part) in text


# --- What goes in comes out -------------------------------------------------------------------------------------------

@pytest.mark.parametrize('options', [{}, {'dtype': numpy.float64, 'norm': None, 'depth': 3, 'base_channels': 5,
                                          'dropout': 0.25, 'input_mean': numpy.float32(0.1), 'input_std': 1 / 3}])
def test_a_model_comes_back_equal_to_the_bit_without_being_told_its_architecture(tmp_path, options):
    model = small(**options)
    save(tmp_path / 'm.npz', model)
    loaded = load(tmp_path / 'm.npz')
    assert same(model, loaded) and not loaded.training
    x = numpy.random.default_rng(1).random((2, 9, 14, 2)).astype(model.dtype)
    numpy.testing.assert_array_equal(model.eval().forward(x), loaded.eval().forward(x))


def test_a_model_is_saved_from_any_device_and_loaded_on_the_cpu(tmp_path, xp):
    model = small()
    if xp is not numpy:
        model.to('gpu')
    save(tmp_path / 'm.npz', model, moment=next(iter(model.parameters().values())))
    loaded, extra = load_checkpoint(tmp_path / 'm.npz')
    assert same(model, loaded)
    assert all(type(array) is numpy.ndarray for array in [*loaded.state_dict().values(), extra['moment']])


def test_extras_come_back_equal(tmp_path):
    rng = numpy.random.default_rng(3)
    extra = {
        'history': [{'loss': -0.1 - 0.2, 'epoch': 1}, {'loss': float('-inf'), 'epoch': 2}],
        'best': None, 'done': True, 'note': 'é\n"/"', 'random': rng.bit_generator.state,       # integers of 128 bits
        'nested': {'a/b': [1, [2.5, {'c': rng.standard_normal((2, 3))}]], 'a': {'b': rng.integers(0, 9, 4)}, '': []},
        'arrays': [numpy.zeros((0, 3)), numpy.array(7, 'int8'), numpy.array([True, False]), rng.random(5, 'float32'),
                   numpy.asfortranarray(rng.random((3, 4))), numpy.arange(3, dtype='>i2'), rng.random(3) * 1j],
    }
    save(tmp_path / 'm.npz', small(), **extra, pair=(1, 'two'), number=numpy.float32(0.1), count=numpy.int64(3))
    loaded = load_checkpoint(tmp_path / 'm.npz')[1]
    pair, number, count = (loaded.pop(name) for name in ('pair', 'number', 'count'))
    assert pair == [1, 'two'] and number == float(numpy.float32(0.1)) and count == 3
    assert (type(pair), type(number), type(count)) == (list, float, int)

    def compare(ours, theirs):
        assert type(ours) is type(theirs)
        if isinstance(ours, numpy.ndarray):
            assert ours.dtype == theirs.dtype and ours.shape == theirs.shape and ours.tobytes() == theirs.tobytes()
            assert theirs.flags.writeable
        elif isinstance(ours, dict):
            assert list(ours) == list(theirs)
            for key in ours:
                compare(ours[key], theirs[key])
        elif isinstance(ours, list):
            assert len(ours) == len(theirs)
            for pair in zip(ours, theirs):
                compare(*pair)
        else:
            assert ours == theirs

    compare(extra, loaded)


def test_an_optimizer_goes_on_from_a_file_as_if_nothing_had_happened(tmp_path):
    def train(model, optimizer, steps):
        for step in steps:
            rng = numpy.random.default_rng(step)
            optimizer.step({name: rng.standard_normal(array.shape).astype(array.dtype)
                            for name, array in model.parameters().items()})

    model = small()
    optimizer = Adam(model.parameters(), 0.01)
    train(model, optimizer, range(3))
    save(tmp_path / 'm.npz', model, optimizer=optimizer.state_dict())
    train(model, optimizer, range(3, 6))

    resumed, extra = load_checkpoint(tmp_path / 'm.npz')
    optimizer = Adam(resumed.parameters(), 0.01)
    optimizer.load_state_dict(extra['optimizer'])
    train(resumed, optimizer, range(3, 6))
    assert same(model, resumed)


def test_the_file_is_an_npz_of_plain_arrays_with_a_header_in_json(tmp_path):
    model = small()
    save(tmp_path / 'any name', model, epoch=3)
    with numpy.load(tmp_path / 'any name', allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive}
    header = json.loads(arrays.pop('header').tobytes())
    assert header == {'format': 'nervenet checkpoint', 'version': 1, 'library': header['library'], 'model': 'UNet',
                      'dtype': 'float32', 'config': model.config, 'extra': {'epoch': 3}}
    assert set(arrays) == {f'model/{name}' for name in model.state_dict()}


@pytest.mark.parametrize('extra, where', [
    ({'a': {1: 2}}, r"extra\['a'\] has the key 1"), ({'a': {'__array__': 2}}, '__array__'),
    ({'a': [0, {1, 2}]}, r"extra\['a'\]\[1\] is a set"), ({'a': b'x'}, 'bytes'), ({'a': 1j}, 'complex'),
    ({'a': numpy.array([None])}, "kind 'O'"), ({'a': numpy.array(['x'])}, "kind 'U'"),
])
def test_what_a_file_cannot_hold_is_refused_before_anything_is_written(tmp_path, extra, where):
    save(tmp_path / 'm.npz', small())
    before = (tmp_path / 'm.npz').read_bytes()
    with pytest.raises(TypeError, match=where):
        save(tmp_path / 'm.npz', small(1), **extra)
    with pytest.raises(TypeError, match='cannot save a ReLU'):
        save(tmp_path / 'm.npz', ReLU())
    assert (tmp_path / 'm.npz').read_bytes() == before and os.listdir(tmp_path) == ['m.npz']


# --- Nothing is lost --------------------------------------------------------------------------------------------------

KILLED_WHILE_SAVING = '''
import os, random, signal, sys, time, zipfile
from nervenet import UNet
from nervenet.study import checkpoint

path, kills = sys.argv[1], int(sys.argv[2])
model = UNet(base_channels=8, depth=2)          # 130 KB

def write(step):
    for array in model.state_dict().values():
        array[...] = step
    checkpoint.save(path, model, step=step)

def killed_at(owner, name, call, after):
    """Make the given call of a function the last thing this process does."""
    original, calls = getattr(owner, name), [0]
    def function(*args, **kwargs):
        calls[0] += 1
        if calls[0] == call and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **kwargs)
        if calls[0] == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(owner, name, function)

# At every stage of saving, then at random moments
stages = [(owner, name, call, after) for owner, name, calls in
          ((zipfile.ZipFile, 'open', (1, 5, 20)), (zipfile.ZipFile, 'close', (1,)), (os, 'fsync', (1, 2)),
           (os, 'replace', (1,)))
          for call in calls for after in (False, True)]
write(0)
step = 0
for kill in range(kills):
    child = os.fork()
    if child == 0:
        if kill < len(stages):
            killed_at(*stages[kill])
        for _ in range(3 if kill < len(stages) else 1000):      # and no longer, should it never come to that stage
            step += 1
            write(step)
        os._exit(1)
    if kill >= len(stages):
        time.sleep(random.Random(kill).uniform(0, 0.04))
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, f'kill {kill}: the child was not killed, {status}'
    loaded, extra = checkpoint.load_checkpoint(path)
    assert extra['step'] >= step, (kill, step, extra)               # never older than the last one seen
    step = extra['step']
    assert all((array == step).all() for array in loaded.state_dict().values()), kill
write(step + 1)
assert os.listdir(os.path.dirname(path)) == [os.path.basename(path)]
print('kills', kills, 'of them at chosen stages', len(stages), 'last step', step)
'''


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
def test_killed_at_any_moment_of_saving_the_old_file_or_the_new_one_is_whole(tmp_path):
    """NERVENET_KILLS=1000 tries so many."""
    kills = os.environ.get('NERVENET_KILLS', '48')
    done = subprocess.run([sys.executable, '-c', KILLED_WHILE_SAVING, str(tmp_path / 'm.npz'), kills],
                          capture_output=True, text=True, cwd=Path(__file__).parents[1], timeout=60 + 5 * int(kills))
    assert done.returncode == 0, done.stderr
    print(done.stdout)


def test_a_full_disk_is_one_clear_error_and_the_old_file_stays(tmp_path):
    resource = pytest.importorskip('resource')
    path, old = tmp_path / 'm.npz', small()
    save(path, old)
    size, limits = path.stat().st_size, resource.getrlimit(resource.RLIMIT_FSIZE)
    for room in range(0, size, size // 25):
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))        # the system refuses every byte beyond
        try:
            with pytest.raises(CheckpointError) as error:
                save(path, small(1))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert str(error.value).startswith(f'{path}: not saved (') and '\n' not in str(error.value)
        assert same(load(path), old) and os.listdir(tmp_path) == ['m.npz']


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(CheckpointError, match='m.npz: not saved .*No such file'):
        save(tmp_path / 'absent' / 'm.npz', small())


@pytest.mark.parametrize('error', [KeyboardInterrupt, OSError, ZeroDivisionError])
@pytest.mark.parametrize('stage', ['write_array', 'fsync', 'replace'])
def test_an_interrupted_save_leaves_no_trace(tmp_path, monkeypatch, stage, error):
    old = small()
    save(tmp_path / 'm.npz', old)

    def interrupt(*args, **kwargs):
        assert sorted(os.listdir(tmp_path)) == ['m.npz', 'm.npz.partial']
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(numpy.lib.format if stage == 'write_array' else os, stage, interrupt)
        with pytest.raises(CheckpointError if error is OSError else error):
            save(tmp_path / 'm.npz', small(1))
    assert os.listdir(tmp_path) == ['m.npz'] and same(load(tmp_path / 'm.npz'), old)


def test_content_then_name_then_folder_reach_the_disk_in_this_order(tmp_path, monkeypatch):
    calls = []

    def spy(name, describe):
        original = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args: calls.append((name, describe(*args))) or original(*args))

    spy('fsync', lambda file: os.fstat(file).st_size if os.path.isfile(f'/proc/self/fd/{file}') else 'folder')
    spy('replace', lambda source, target: (os.path.getsize(source), Path(target).name))
    save(tmp_path / 'm.npz', small())
    size = (tmp_path / 'm.npz').stat().st_size
    assert calls == [('fsync', size), ('replace', (size, 'm.npz')), ('fsync', 'folder')]


def test_atomic_write_replaces_a_file_whole_or_not_at_all(tmp_path):
    path = tmp_path / 'history.csv'
    (tmp_path / 'history.csv.partial').write_text('left by a killed process, longer than what follows')
    with atomic_write(path) as file:
        file.write(b'old')
        assert not path.exists()
    with pytest.raises(ZeroDivisionError):
        with atomic_write(path) as file:
            file.write(b'new')
            raise ZeroDivisionError
    assert path.read_bytes() == b'old' and os.listdir(tmp_path) == ['history.csv']


# --- Nothing is believed ----------------------------------------------------------------------------------------------

@pytest.fixture
def saved(tmp_path):
    """(path, content, model, extra) of a file with extras."""
    model, extra = small(depth=1), {'step': 3, 'moment': numpy.arange(5.0)}
    save(tmp_path / 'm.npz', model, **extra)
    return tmp_path / 'm.npz', (tmp_path / 'm.npz').read_bytes(), model, extra


def test_a_file_cut_at_any_length_is_refused(saved):
    """With NERVENET_KILLS, at every length."""
    path, content, *_ = saved
    lengths = [*range(0, len(content), 1 if 'NERVENET_KILLS' in os.environ else 97), *range(len(content) - 30, len(content))]
    for length in lengths:
        path.write_bytes(content[:length])
        refused(path)
    print(f'{len(lengths)} cuts, all refused')


def test_a_flipped_byte_is_refused_or_was_none_of_the_content(saved):
    """Every byte of the header and the arrays is under a checksum. Dates and the like in the archive's own tables are
    not; a flip there is refused, or changes nothing. With NERVENET_KILLS, a bit of every byte is flipped."""
    path, content, model, extra = saved
    content_bytes, positions = set(), range(0, len(content), 1 if 'NERVENET_KILLS' in os.environ else 23)
    harmless = 0
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            name_length, more_length = struct.unpack_from('<HH', content, entry.header_offset + 26)
            start = entry.header_offset + 30 + name_length + more_length
            content_bytes.update(range(start, start + entry.file_size))
    for position in positions:
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        try:
            loaded, loaded_extra = load_checkpoint(path)
        except CheckpointError as error:
            assert '\n' not in str(error)
        else:
            assert position not in content_bytes
            assert same(loaded, model) and loaded_extra['step'] == 3
            assert (loaded_extra['moment'] == extra['moment']).all()
            harmless += 1
    print(f'{len(positions)} flips: {len(positions) - harmless} refused, {harmless} outside of the content, which was read as it is')


def test_no_file_and_files_that_are_not_ours(tmp_path):
    path = tmp_path / 'm.npz'
    refused(path, 'no such file')
    refused(tmp_path)
    for content in (b'', b'text', b'\x93NUMPY\x01\x00', b'\x80\x04K\x01.'):
        path.write_bytes(content)
        refused(path)
    numpy.savez(path, weights=numpy.ones(3))
    refused(path, 'not a model file of nervenet')
    numpy.savez(path, header=numpy.frombuffer(b'{"format": "something else"}', numpy.uint8))
    refused(path, 'not a model file of nervenet')
    numpy.savez(path, header=numpy.frombuffer(b'[' * 100_000, numpy.uint8))
    refused(path)


def forge(path, change_header=None, **arrays):
    """Write the file anew with another header, or other arrays (None removes one)."""
    with numpy.load(path) as archive:
        entries = {name: archive[name] for name in archive}
    header = json.loads(entries['header'].tobytes())
    if change_header:
        change_header(header)
    entries['header'] = numpy.frombuffer(json.dumps(header).encode(), numpy.uint8)
    entries.update(arrays)
    numpy.savez(path, **{name: array for name, array in entries.items() if array is not None})


def test_a_later_format_and_an_unknown_model_are_refused(saved):
    path, content, *_ = saved
    forge(path, lambda header: header.update(version=2, library='9.1', model='Later', config=['of another kind']))
    refused(path, 'nervenet 9.1', 'version 2', 'versions up to 1', 'update nervenet')
    path.write_bytes(content)
    forge(path, lambda header: header.update(model='os.system'))
    refused(path, "'os.system'", 'UNet')


@pytest.mark.parametrize('arrays, parts', [
    ({'model/stem.conv2.weight': numpy.ones((3, 3, 2, 5), 'f')}, ['stem.conv2.weight', '(3, 3, 2, 5)', '(3, 3, 2, 2)']),
    ({'model/stem.conv1.weight': numpy.ones((3, 3, 1, 2), 'f')}, ['stem.conv1.weight', '(3, 3, 1, 2)', '(3, 3, 2, 2)']),
    ({'model/head.weight': numpy.ones((1, 1, 2, 3))}, ['head.weight', 'float64', 'float32']),
    ({'model/ups.0.conv1.weight': None}, ['ups.0.conv1.weight is missing']),
    ({'model/downs.0.conv2.weight': None}, ['downs.0.conv2.weight is missing']),
    ({'model/further': numpy.ones(2, 'f')}, ['further']),
    ({'extra/0': None}, ['extra/0']),
])
def test_arrays_that_do_not_fit_the_architecture_are_named_with_both_shapes(saved, arrays, parts):
    forge(saved[0], **arrays)
    refused(saved[0], *parts)


@pytest.mark.parametrize('change, said', [
    ({'base_channels': 10**7}, 'far more weights than it holds'), ({'base_channels': -2}, 'base_channels is -2'), ({'depth': 30}, 'header asks for'),
    ({'depth': 10**10}, 'asks for depth'), ({'depth': 10**15}, 'asks for depth'), ({'depth': 0}, 'asks for depth 0'), ({'depth': -1}, 'asks for depth -1'),
    ({'in_channels': 10**12}, 'far more weights'), ({'out_channels': 10**12}, 'far more weights')])
def test_a_forged_config_is_refused_before_anything_of_its_size_is_built(saved, change, said):
    forge(saved[0], lambda header: header['config'].update(change))
    tracemalloc.start()
    refused(saved[0], said)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**25


@pytest.mark.parametrize('name', NETWORKS)
def test_every_network_comes_back_from_its_file_and_a_forged_one_does_not(name, tmp_path, rng):
    options = dict(base_channels=2, depth=2, dropout=0.2, input_mean=0.4, input_std=0.2)
    models = [NETWORKS[name](**options, rng=rng)]
    if name == 'optimised-resunet':
        models += [NETWORKS[name](**options, **part, rng=rng) for part in (dict(dac=False), dict(rmp=False))]
    for model in models:
        save(tmp_path / 'm.npz', model)
        loaded = load(tmp_path / 'm.npz')
        assert type(loaded) is type(model) and same(loaded, model)
        forge(tmp_path / 'm.npz', lambda header: header['config'].update(base_channels=4096))
        refused(tmp_path / 'm.npz', 'far more weights than it holds')


@pytest.mark.parametrize('change', [{'base_channels': '2'}, {'base_channels': None}, {'depth': '1'}, {'norm': 'other'},
                                    {'input_std': 0}, {'dropout': 7}, {'dropout': 'x'}, {'unknown': 1}])
def test_a_config_that_no_model_can_have_is_refused(saved, change):
    forge(saved[0], lambda header: header['config'].update(change))
    refused(saved[0])


@pytest.mark.parametrize('change', [{'version': '1'}, {'model': ['UNet']}, {'config': 3}, {'config': {}},
                                    {'dtype': 'float64'}, {'dtype': 'S999999999999'},
                                    {'extra': {'__array__': 'nowhere'}}])
def test_a_forged_header_is_refused(saved, change):
    forge(saved[0], lambda header: header.update(change))
    refused(saved[0])


@pytest.mark.parametrize('key', ['format', 'version', 'model', 'dtype', 'config', 'extra'])
def test_a_header_that_lacks_a_key_is_refused(saved, key):
    forge(saved[0], lambda header: header.pop(key))
    refused(saved[0])


def test_terabytes_hidden_under_small_arrays_are_refused(saved):
    """Arrays that make depth 40 look present, without the convolutions that depth 40 has."""
    forge(saved[0], lambda header: header['config'].update(depth=40),
          **{f'model/downs.{level}.conv2.weight': numpy.ones((3, 3, 1, 1), 'f') for level in range(1, 40)})
    refused(saved[0], 'far more weights than it holds')


def npy(shape, content=b'', dtype="'<f4'"):
    """The bytes of a `.npy` file with a header of one's choice."""
    header = f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b'\x93NUMPY\x01\x00' + (len(header) + 1).to_bytes(2, 'little') + header + b'\n' + content


@pytest.mark.parametrize('content', [
    npy('(1000000000000,)'), npy('(1000000000000,)', bytes(64)), npy('(-1,)', bytes(4)), npy('(-2, -2)', bytes(16)),
    npy('(2,)', bytes(12)), npy('(1,)', bytes(8), "'|O'"), npy('(1,)', bytes(8), "'<U2'"), npy('(0,)', b'', "'|V0'"),
    npy('__import__'), b'', b'\x93NUMPY\x03\x00', b'\x93NUMPY\x01\x00\xff\xff'])
def test_an_array_whose_header_lies_is_refused(saved, content):
    path, *_ = saved
    with zipfile.ZipFile(path, 'a') as archive:
        archive.writestr('extra/9.npy', content)
    refused(path)


def test_an_archive_that_claims_or_unpacks_to_more_than_its_size_is_refused(saved):
    path, content, *_ = saved
    for count, reason in ((100, 'extra/9.npy is compressed'), (10_000_000, 'larger than the file')):
        path.write_bytes(content)
        with zipfile.ZipFile(path, 'a') as archive:
            archive.writestr('extra/9.npy', npy(f'({count},)', bytes(4 * count)), zipfile.ZIP_DEFLATED)
        assert path.stat().st_size < 100_000
        refused(path, reason)

    entry = io.BytesIO(content)
    directory = content.rindex(b'PK\x01\x02')                                       # of the last entry
    entry.seek(directory + 20)
    entry.write((2**31).to_bytes(4, 'little') * 2)                                  # its sizes, packed and unpacked
    path.write_bytes(entry.getvalue())
    refused(path, 'larger than the file')
