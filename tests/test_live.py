import re
import shutil
import signal
import threading
import time
from types import SimpleNamespace

import numpy
import pytest
from PIL import Image

import nervenet
from helpers import example, run_example, start_example
from nervenet.images.reading import read_image
from nervenet.images.samples import DataError
from nervenet.study.segment import Segmenter


@pytest.fixture
def live():
    return example('live')


@pytest.fixture
def folder(tmp_path, rng):
    """An empty folder beside a model that reacts and the frames that are to come, with a mask that is none."""
    network = nervenet.UNet(base_channels=2, depth=1, rng=rng)
    network.parameters()['head.weight'][:] *= 100
    nervenet.save(tmp_path / 'model.npz', network, size=[16, 24], settings={})
    for name in 'frames', 'folder':
        (tmp_path / name).mkdir()
    for number in (2, 10, 1):
        Image.fromarray(rng.integers(0, 256, (20, 30), dtype='uint8')).save(tmp_path / 'frames' / f'1_{number}.png')
    Image.fromarray(numpy.zeros((20, 30), 'uint8')).save(tmp_path / 'frames' / '1_2_mask.png')
    return tmp_path / 'folder'


def options(folder, *more):
    return [str(option) for option in ('--model', folder.parent / 'model.npz', '--folder', folder, '--output', folder.parent / 'masks', *more)]


def assert_masks_are_those_of_a_segmenter(folder, names):
    segmenter, _ = Segmenter.from_file(folder.parent / 'model.npz')
    masks = folder.parent / 'masks'
    assert {path.name for path in masks.iterdir()} == {f'{name}_mask.png' for name in names}
    for name in names:
        mask = segmenter.settings.mask(segmenter.probabilities([read_image(folder.parent / 'frames' / f'{name}.png')])[0])
        assert 0 < mask.sum() < mask.size
        numpy.testing.assert_array_equal(numpy.array(Image.open(masks / f'{name}_mask.png')), 255 * mask)


def test_frames_are_predicted_as_they_come_and_none_is_read_by_half(live, folder, capsys, monkeypatch):
    content = (folder.parent / 'frames' / '1_1.png').read_bytes()
    (folder / '1_0.png').write_bytes(content)                             # was there before, so it does not count

    watching = threading.Event()
    monkeypatch.setattr(live, 'time', SimpleNamespace(perf_counter=time.perf_counter, sleep=lambda seconds: watching.set() or time.sleep(seconds)))

    def probe():
        watching.wait(10)
        (folder / '1_2.png.part').write_bytes(b'to be renamed')
        with open(folder / '1_1.png', 'wb') as file:                      # straight under its name, and slowly
            for start in range(0, len(content), len(content) // 3):
                file.write(content[start:start + len(content) // 3])
                file.flush()
                time.sleep(0.1)
        shutil.copy(folder.parent / 'frames' / '1_2_mask.png', folder)
        shutil.copy(folder.parent / 'frames' / '1_2.png', folder / '1_2.png.part')
        (folder / '1_2.png.part').rename(folder / '1_2.png')

    thread = threading.Thread(target=probe)
    thread.start()
    try:
        assert live.main(options(folder, '--frames', 2)) == 0
    finally:
        thread.join()
    assert_masks_are_those_of_a_segmenter(folder, ['1_1', '1_2'])
    said = capsys.readouterr()
    assert re.findall(r'^(\S+): +([\d.]+) ms', said.out, re.MULTILINE)[1][0] == '1_2.png' and not said.err
    latency = float(re.search(r'1_1.png: ([\d.]+) ms', said.out)[1])
    assert latency > 100, 'it was seen when only a third of it was there'
    assert '2 frames predicted, 0 skipped' in said.out and 'frames per second' in said.out


def test_frames_that_are_there_count_if_asked_for_in_natural_order_and_it_ends_when_idle(live, folder, capsys):
    for path in (folder.parent / 'frames').iterdir():
        shutil.copy(path, folder)
    assert live.main(options(folder, '--existing', '--idle', 0.2)) == 0
    assert_masks_are_those_of_a_segmenter(folder, ['1_1', '1_2', '1_10'])
    assert re.findall(r'^(\S+): [\d.]+ ms', capsys.readouterr().out, re.MULTILINE) == ['1_1.png', '1_2.png', '1_10.png']


def test_a_broken_frame_costs_one_line_and_the_others_are_predicted(live, folder, capsys, monkeypatch):
    monkeypatch.setattr(live, 'PATIENCE', 0.1)
    for path in (folder.parent / 'frames').iterdir():
        shutil.copy(path, folder)
    (folder / '1_3.png').write_bytes((folder / '1_2.png').read_bytes()[:100])
    shutil.copy(folder / '1_2.png', folder / '1_2.tif')
    assert live.main(options(folder, '--existing', '--frames', 5)) == 1
    said = capsys.readouterr()
    broken, twice = sorted(said.err.splitlines(), key=lambda line: '1_3' not in line)
    assert '1_3.png: cannot be read as an image' in broken and '1_2.tif: a frame of this name came before' in twice
    assert '3 frames predicted, 2 skipped' in said.out
    assert_masks_are_those_of_a_segmenter(folder, ['1_1', '1_2', '1_10'])


def test_ctrl_c_ends_it_with_the_summary(folder):
    process = start_example('live.py', *options(folder, '--device', 'cpu'))
    lines = iter(process.stdout.readline, '')
    assert any(line.startswith('watching') for line in lines)
    shutil.copy(folder.parent / 'frames' / '1_1.png', folder / '1_1.part')
    (folder / '1_1.part').rename(folder / '1_1.png')
    assert next(lines).startswith('1_1.png: ')
    process.send_signal(signal.SIGINT)
    out, error = process.communicate()
    assert process.returncode == 0 and not error and out.startswith('1 frames predicted, 0 skipped')


def test_what_cannot_be_watched_is_refused_in_one_line(live, folder):
    done = run_example('live.py', '--model', folder.parent / 'model.npz', '--folder', folder / 'not there')
    assert done.returncode == 1 and done.stderr.startswith('live.py: ') and 'no such folder' in done.stderr
    assert len(done.stderr.splitlines()) == 1
    with pytest.raises(DataError, match='is the folder of the frames too'):
        live.main(options(folder, '--output', folder))
    with pytest.raises(FileExistsError, match='choose another --output'):
        live.main(options(folder, '--output', folder.parent / 'frames'))
