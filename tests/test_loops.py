"""Loops: read and written frame by frame, predicted, smoothed, trained on, and made."""

import csv
import itertools
import os
import random
import struct
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy
import pytest
from PIL import Image

import nervenet
from helpers import TINY, example, run_example
from nervenet import phantom as command
from nervenet.engine.workers import in_background
from nervenet.files import atomic_write
from nervenet.images import loops, phantom
from nervenet.images.copies import copies_warning
from nervenet.images.data import Reader, holds_foreground
from nervenet.images.loops import Pages, count_frames, milliseconds_of, with_frames
from nervenet.images.phantom import Phantom, make_frame
from nervenet.images.reading import read_image, read_mask, read_pair
from nervenet.images.samples import DataError, Sample, describe, find_samples, own_subjects, split_by_subject, subject_warning
from nervenet.study import figures
from nervenet.study.loops import smoothed
from nervenet.study.segment import Segmenter

SIZE, DEFLATE = (13, 17), {'compression': 'tiff_adobe_deflate'}
FORMATS = [('x.tif', {}, 'L'), ('x.tif', {'compression': 'tiff_lzw'}, 'L'), ('x.tif', {'compression': 'tiff_lzw'}, 'I;16'), ('x.tif', {}, 'RGBA'),
           ('x.gif', {}, 'L'), ('x.gif', {}, 'P'), ('x.apng', {'format': 'PNG'}, 'L'), ('x.png', {}, 'RGBA'), ('x.webp', {'lossless': True}, 'RGB'),
           ('x.webp', {'lossless': True}, 'RGBA')]


def levels(rng, number, size=SIZE, dtype='uint8'):
    """Return frames (number, H, W) no two of which are alike."""
    return rng.integers(0, numpy.iinfo(dtype).max, (number, *size), dtype=dtype, endpoint=True)


def write(path, frames, mode='L', **options):
    """Write grey frames (N, H, W) as a loop, in another mode of the same greys."""
    pictures = [Image.fromarray(frame) for frame in frames]
    if mode in ('P', 'RGB', 'RGBA'):
        pictures = [picture.convert(mode) for picture in pictures]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], **options)
    return path


def line(error, *parts):
    """Assert that the error is one line that holds all parts."""
    assert '\n' not in str(error.value) and all(str(part) in str(error.value) for part in parts), str(error.value)


# --- Reading ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name, options, mode', FORMATS)
def test_frames_are_those_that_were_written_in_any_order_and_on_any_thread(tmp_path, rng, name, options, mode):
    frames = levels(rng, 9, dtype='uint16' if mode == 'I;16' else 'uint8')
    path = write(tmp_path / name, frames, mode, **options)
    assert count_frames(path) == 9
    white = 65535 if mode == 'I;16' else 255
    order = [*range(9), *range(8, -1, -1), 4, 4, 7, 2]
    for place in order:
        assert (numpy.rint(read_image(path, frame=place + 1) * white) == frames[place]).all()
    order = list(range(9)) * 3
    random.Random(1).shuffle(order)
    with ThreadPoolExecutor(4) as threads:
        for place, image in zip(order, threads.map(lambda place: read_image(path, frame=place + 1), order)):
            assert (numpy.rint(image * white) == frames[place]).all()
    for wrong in 0, 10:
        with pytest.raises(DataError) as error:
            read_image(path, frame=wrong)
        line(error, path, f'no frame {wrong}, it holds 9 frames')


@pytest.mark.parametrize('name', ['x.gif', 'x.apng', 'x.webp'])
def test_threads_that_share_a_loop_decode_each_frame_once(tmp_path, rng, name, monkeypatch):
    path, drawn, opened = write(tmp_path / name, levels(rng, 30), **({'format': 'PNG'} if name == 'x.apng' else {})), [], []
    monkeypatch.setattr(loops, 'number_of_threads', lambda: 4)
    before = loops._Loop._open

    class Counting(dict):
        def __setitem__(self, frame, image):
            drawn.append(frame)
            super().__setitem__(frame, image)

    def count(loop):
        before(loop)
        loop.ahead = Counting()
        opened.append(loop)

    monkeypatch.setattr(loops._Loop, '_open', count)
    with closing(in_background(lambda frame: read_image(path, frame=frame), range(1, 31), 6, threads=4)) as images:
        assert len(list(images)) == 30
    assert drawn == list(range(1, 31)) and len(opened) == 1
    assert opened[0].image is None, 'a loop that was read to its end is closed'


def test_frames_that_nobody_asks_for_are_not_kept(tmp_path, rng, monkeypatch):
    monkeypatch.setattr(loops, 'number_of_threads', lambda: 2)
    path = write(tmp_path / 'x.gif', levels(rng, 40))
    read_image(path, frame=30)
    loop = loops._loops[path, path.stat().st_mtime_ns, path.stat().st_size]
    assert sorted(loop.ahead) == [27, 28, 29]


def test_few_loops_stay_open(tmp_path, rng):
    for number in range(3 * loops.OPEN):
        read_image(write(tmp_path / f'{number}.gif', levels(rng, 3)), frame=1)
    assert len(loops._loops) == loops.OPEN
    if Path('/proc/self/fd').exists():
        assert sum(os.path.realpath(f'/proc/self/fd/{name}').startswith(str(tmp_path)) for name in os.listdir('/proc/self/fd')) == loops.OPEN


def test_files_that_cannot_be_opened_leave_room_for_others(tmp_path, rng):
    for number in range(2 * loops.OPEN):
        (tmp_path / f'{number}.gif').write_bytes(b'damaged')
        with pytest.raises(DataError, match=f'{number}.gif, frame 1: cannot be read'):
            read_image(tmp_path / f'{number}.gif', frame=1)
    loops._Loop(tmp_path / 'never read').close()
    assert read_image(write(tmp_path / 'x.gif', levels(rng, 3)), frame=2).shape == SIZE


def test_a_loop_that_was_written_anew_is_read_anew(tmp_path, rng):
    for frames in levels(rng, 3), levels(rng, 4), levels(rng, 4):
        path = write(tmp_path / 'x.tif', frames)
        os.utime(path, ns=(0, frames.sum()))                    # two may be written within one tick of the clock
        assert (read_image(path, frame=2) * 255 == frames[1]).all()


def test_a_still_beside_an_animation_is_no_frame_of_it(tmp_path, rng):
    frames = levels(rng, 4)
    path = write(tmp_path / 'x.png', frames, default_image=True)
    assert count_frames(path) == 3
    assert [(numpy.rint(read_image(path, frame=k) * 255) == frames[k]).all() for k in (1, 2, 3)] == [True] * 3


def test_masks_of_a_palette_are_read_alike_in_all_frames(tmp_path):
    """Pillow opens the first frame of a GIF with its palette, and the others in colour."""
    frames = numpy.zeros((3, *SIZE), 'uint8')
    for number, frame in enumerate(frames):
        frame[2:5 + number, 3:9] = 200
    pictures = []
    for frame in frames:
        picture = Image.fromarray((frame > 0).astype('uint8'), 'L').convert('P')
        picture.putpalette([0, 0, 0, 250, 20, 20] + [9] * 762)
        pictures.append(picture)
    pictures[0].save(tmp_path / 'x.gif', save_all=True, append_images=pictures[1:])
    for number, frame in enumerate(frames):
        assert (read_mask(tmp_path / 'x.gif', frame=number + 1) == (frame > 0)).all()
    samples = with_frames([Sample('x', 'x', write(tmp_path / 'image.tif', frames), (tmp_path / 'x.gif',))])
    assert holds_foreground(samples, Reader(SIZE)).all(), 'values of masks are compared across files, and these do not contradict each other'


def test_tiles_and_strips_are_read(tmp_path, rng):
    """A page is cut out of its file with all its pieces, and 16 bits keep their order of bytes."""
    frames = levels(rng, 2, (16, 48), 'uint16')
    with open(tmp_path / 'tiles.tif', 'wb') as file:
        file.write(b'MM\0*\0\0\0\x08')                                                                     # big-endian
        for number, frame in enumerate(frames):
            start = file.tell()
            short = {256: 48, 257: 16, 258: 16, 259: 1, 262: 1, 277: 1, 322: 16, 323: 16}
            tags = [*((tag, 3, value << 16) for tag, value in short.items()), (324, 4, start + 126), (325, 4, start + 138)]
            counts = {324: 3, 325: 3}
            file.write(struct.pack('>H', len(tags)))
            file.write(b''.join(struct.pack('>HHII', tag, kind, counts.get(tag, 1), value) for tag, kind, value in tags))
            pixels = start + 150
            file.write(struct.pack('>7I', 0 if number else pixels + 3 * 512, *(pixels + 512 * k for k in range(3)), *[512] * 3))
            file.write(b''.join(frame[:, 16 * k:16 * k + 16].astype('>u2').tobytes() for k in range(3)))
    write(tmp_path / 'strips.tif', levels(rng, 2, (400, 300)), compression='tiff_lzw')
    with Image.open(tmp_path / 'strips.tif') as image:
        assert len(image.tag_v2[273]) > 1
        image.seek(1)
        assert (read_image(tmp_path / 'strips.tif', frame=2) * 255 == numpy.array(image)).all()
    for number, frame in enumerate(frames, 1):
        assert (numpy.rint(read_image(tmp_path / 'tiles.tif', frame=number) * 65535) == frame).all()


@pytest.mark.parametrize('mode, compression', [('RGB', 'jpeg'), ('L', 'jpeg'), ('1', 'group4'), ('1', 'raw'), ('L', 'packbits'), ('P', 'tiff_lzw'),
                                               ('I;16', 'tiff_adobe_deflate'), ('LA', 'tiff_lzw'), ('F', 'tiff_lzw'), ('CMYK', 'raw')])
def test_pages_are_those_that_pillow_reads(tmp_path, rng, mode, compression):
    pictures = [Image.fromarray(numpy.kron(frame // 64 * 64, numpy.ones((8, 8), 'uint8'))) for frame in levels(rng, 3)]
    pictures = [Image.fromarray((numpy.asarray(picture).astype('uint16') * 257)) if mode == 'I;16' else picture.convert(mode) for picture in pictures]
    pictures[0].save(tmp_path / 'x.tif', save_all=True, append_images=pictures[1:], compression=compression)
    for frame in 1, 2, 3:
        with Image.open(tmp_path / 'x.tif') as image:
            image.seek(frame - 1)
            expected, kind = numpy.array(image), image.mode
        found, found_kind = loops.read_frame(tmp_path / 'x.tif', frame, lambda image, kind: (numpy.array(image), image.mode))
        assert found_kind == kind and (found == expected).all() and expected.std() > 0


def test_orientation_marks_of_pages_are_obeyed(tmp_path, rng):
    frames = levels(rng, 3)
    pictures = [Image.fromarray(frame) for frame in frames]
    pictures[0].save(tmp_path / 'x.tif', save_all=True, append_images=pictures[1:], tiffinfo={274: 3})
    assert (read_image(tmp_path / 'x.tif', frame=2) * 255 == frames[1][::-1, ::-1]).all()


def test_frames_without_number_are_refused_and_images_have_one(tmp_path, rng):
    for read in read_image, read_mask:
        with pytest.raises(DataError) as error:
            read(write(tmp_path / 'x.gif', levels(rng, 3)))
        line(error, 'x.gif: holds 3 frames, expected one image')
    for name in 'x.gif', 'x.tif', 'x.png', 'x.webp':
        path = write(tmp_path / name, levels(rng, 1), **({'lossless': True} if name == 'x.webp' else {}))
        assert count_frames(path) == 1 and read_image(path).shape == SIZE


def test_what_a_loop_says_of_time_is_taken(tmp_path, rng):
    for name in 'x.gif', 'x.png', 'x.webp':
        assert milliseconds_of(write(tmp_path / name, levels(rng, 3), duration=70)) == 70
    assert milliseconds_of(write(tmp_path / 'x.tif', levels(rng, 3))) == loops.MILLISECONDS


# --- What is wrong with a loop ----------------------------------------------------------------------------------------

def test_frames_of_different_sizes_are_named(tmp_path, rng):
    pictures = [Image.fromarray(levels(rng, 1, size)[0]) for size in (SIZE, SIZE, (14, 17), SIZE)]
    pictures[0].save(tmp_path / 'x.tif', save_all=True, append_images=pictures[1:])
    with pytest.raises(DataError) as error:
        read_image(tmp_path / 'x.tif', frame=3)
    line(error, 'x.tif, frame 3: is 14×17 pixels (height×width), the first frame is 13×17')
    assert read_image(tmp_path / 'x.tif', frame=4).shape == SIZE


def damaged(path, rng, **options):
    """Write a loop of 8 frames, the fifth of which cannot be read."""
    content = bytearray(write(path, levels(rng, 8, (42, 58)), **options).read_bytes())
    start = len(content) * 57 // 100
    content[start:start + 9] = bytes(9)                         # which the checksum of a deflated page or frame shows
    path.write_bytes(content)
    return path


def test_a_damaged_page_costs_itself_and_a_damaged_frame_all_that_are_drawn_over_it(tmp_path, rng):
    for name, options in (('x.tif', DEFLATE), ('x.png', {})):
        path, readable = damaged(tmp_path / name, rng, **options), []
        for frame in range(1, count_frames(path) + 1):
            try:
                readable.append((frame, read_image(path, frame=frame))[0])
            except DataError as error:
                assert str(error).startswith(f'{path}, frame {frame}: cannot be read') and '\n' not in str(error)
                assert isinstance(error, loops.DrawnOverLost) == (frame > 5) == ('since frame 5' in str(error))
        assert readable == ([1, 2, 3, 4, 6, 7, 8] if name == 'x.tif' else [1, 2, 3, 4]) and frame > 5
        assert read_image(path, frame=2).shape == (42, 58)
    path = write(tmp_path / 'x.gif', levels(rng, 8, (42, 58)))
    path.write_bytes(path.read_bytes()[:path.stat().st_size * 6 // 10])
    assert count_frames(path) == 5 and read_image(path, frame=4).shape == (42, 58)
    with pytest.raises(DataError) as error:
        read_image(path, frame=5)
    line(error, f'{path}, frame 5: cannot be read', 'truncated')


def test_animated_png_of_16_bits_is_refused(tmp_path, rng):
    path = write(tmp_path / 'x.png', levels(rng, 3, dtype='uint16'))
    with pytest.raises(DataError) as error:
        read_image(path, frame=1)
    line(error, path, 'animated PNG of 16 bits', 'save it as TIFF')


def test_errors_of_values_name_the_frame(tmp_path, rng):
    path = write(tmp_path / 'x.tif', levels(rng, 3, dtype='uint16'))
    with pytest.raises(DataError) as error:
        read_image(path, white=4095, frame=2)
    line(error, f'{path}, frame 2: holds values from')
    with pytest.raises(DataError) as error:
        read_mask(path, frame=3)
    line(error, f'{path}, frame 3: a mask holds 0 and one other value')


# --- DICOM ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name, content', [('x.dcm', b'1234'), ('IM_0001', bytes(128) + b'DICM' + bytes(9)), ('1.2.840.11', bytes(128) + b'DICM')])
def test_dicom_is_refused_with_what_converts_it(tmp_path, name, content):
    folder = tmp_path / 'dicom'
    folder.mkdir()
    (folder / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        read_image(folder / name)
    line(error, folder / name, 'is a DICOM file', 'ImageMagick', 'one TIFF of all its frames')
    for masks in 'required', 'optional':
        with pytest.raises(DataError) as error:
            find_samples(folder, masks=masks)
        line(error, folder, name, 'DICOM files are not read', 'ImageMagick')
        assert 'convert them to PNG' not in str(error.value)
    Image.new('L', (3, 4)).save(folder / '1_1.png')
    told = []
    find_samples(folder, masks='optional', tell=told.append)
    assert len(told) == 1 and 'DICOM files' in told[0] and 'ImageMagick' in told[0] and name in told[0]


# --- Frames as samples ------------------------------------------------------------------------------------------------

def write_loops(folder, rng, names=('1_1', '1_2', '2_1', '3_1'), number=5, size=(20, 30), masks=True):
    """Write loops in which a bright square moves, and their masks."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        truth = numpy.zeros((number, *size), 'uint8')
        for place, frame in enumerate(truth):
            frame[4:12, 3 + place % 15:13 + place % 15] = 255
        write(folder / f'{name}.tif', (truth // 3 + levels(rng, number, size) // 3 + 40).astype('uint8'))
        if masks:
            write(folder / f'{name}_mask.tif', truth)
    return folder


def test_frames_of_a_loop_are_samples_of_one_subject(tmp_path, rng):
    folder = write_loops(tmp_path, rng)
    Image.fromarray(levels(rng, 1)[0]).save(folder / '4_1.png')
    Image.fromarray(numpy.zeros(SIZE, 'uint8')).save(folder / '4_1_mask.png')
    samples = with_frames(find_samples(folder))
    assert len(samples) == 21 and [sample.name for sample in samples[4:7]] == ['1_1#5', '1_2#1', '1_2#2'] and samples[-1].name == '4_1'
    assert [sample.subject for sample in samples] == ['1'] * 10 + ['2'] * 5 + ['3'] * 5 + ['4']
    assert (samples[6].frame, samples[6].frames, samples[6].file_name) == (2, 5, '1_2') and samples[-1].frame is None
    training, validation = split_by_subject(samples, 0.3, 0)
    assert not {sample.subject for sample in training} & {sample.subject for sample in validation}
    assert subject_warning(samples) == '' and '20 of them frames of 4 loops, 4 subjects; such as 1_1.tif with 1_1_mask.tif' in describe(samples)[0]
    for sample in samples[:5]:
        image, mask = read_pair(sample)
        assert mask[:, 2 + sample.frame:12 + sample.frame].sum() == mask.sum() == 80 and image[mask > 0].mean() > image[mask == 0].mean() + 0.1


def test_a_loop_whose_name_tells_no_subject_is_one_by_itself(tmp_path, rng):
    samples = with_frames(find_samples(write_loops(tmp_path, rng, ('a', 'b'))))
    assert [sample.subject for sample in samples] == ['a'] * 5 + ['b'] * 5
    assert 'every image, and every loop, counts as its own' in subject_warning(samples)
    assert {sample.subject for sample in own_subjects(samples)} == {'test/a', 'test/b'}


def test_unequal_lengths_are_refused_with_both_files_and_counts(tmp_path, rng):
    folder = write_loops(tmp_path, rng, ('1_1', '2_1'))
    write(folder / '2_1_mask.tif', numpy.zeros((4, 20, 30), 'uint8'))
    with pytest.raises(DataError) as error:
        with_frames(find_samples(folder))
    line(error, f'{folder / "2_1_mask.tif"}: holds 4 frames, and its image 2_1.tif 5 frames')
    unequal = []
    samples = with_frames(find_samples(folder), unequal)
    assert [sample.mask_paths is None for sample in samples] == [False] * 5 + [True] * 5
    (sample, error), = unequal
    assert sample.name == '2_1' and '4 frames' in str(error)
    for image, mask in (1, 5), (5, 1):
        write(folder / '2_1.tif', levels(rng, image))
        write(folder / '2_1_mask.tif', numpy.zeros((mask, *SIZE), 'uint8'))
        with pytest.raises(DataError) as error:
            with_frames(find_samples(folder))
        line(error, '2_1.tif', '5 frames', '1 image')


def test_equal_frames_of_one_loop_do_not_contradict_each_other(tmp_path, rng):
    one, other = levels(rng, 1, (32, 32))[0], numpy.zeros((32, 32), 'uint8')
    other[4:9, 3:8] = 255
    for name in '1_1', '1_2':
        write(tmp_path / f'{name}.tif', [one, one])
        write(tmp_path / f'{name}_mask.tif', [0 * other, other])
    samples, reader = with_frames(find_samples(tmp_path)), Reader((32, 32))
    assert '2 of 4 images equal another one' not in copies_warning(samples, reader)
    assert '1_1#1 and 1_2#2' in copies_warning(samples, reader) and '1_1#1 and 1_1#2' not in copies_warning(samples, reader)


def test_a_network_is_trained_on_frames_of_loops(tmp_path, rng, main, capsys):
    folder = write_loops(tmp_path / 'data', rng, ('1_1', '1_2', '2_1', '3_1', '4_1'), number=6)
    main('--data', folder, '--out', tmp_path / 'run', '--epochs', 1, *TINY)
    assert '30 images with 30 masks, 30 of them frames of 5 loops, 4 subjects' in capsys.readouterr().out
    _, extra = nervenet.load_checkpoint(tmp_path / 'run' / 'last.npz')
    assert sorted(extra['training_subjects'] + extra['validation_subjects']) == ['1', '2', '3', '4']
    rows = list(csv.DictReader((tmp_path / 'run' / 'validation.csv').read_text().splitlines()))
    assert {row['image'].partition('_')[0] for row in rows} == set(extra['validation_subjects']) and len(rows) % 6 == 0
    write(folder / '2_1_mask.tif', numpy.zeros((4, 20, 30), 'uint8'))
    with pytest.raises(DataError, match='2_1_mask.tif: holds 4 frames, and its image 2_1.tif 6 frames'):
        main('--data', folder, '--out', tmp_path / 'other', '--epochs', 1, *TINY)


# --- Writing ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('dtype', ['uint8', 'uint16'])
def test_pages_come_back(tmp_path, rng, dtype):
    frames = levels(rng, 5, dtype=dtype)
    with atomic_write(tmp_path / 'x.tif') as file, closing(Pages(file)) as pages:
        for frame in frames:
            pages.append(Pages.packed(frame))
    with Image.open(tmp_path / 'x.tif') as image:
        assert image.n_frames == 5 and image.mode == ('L' if dtype == 'uint8' else 'I;16')
        for number in 3, 0, 4, 1, 2:
            image.seek(number)
            assert (numpy.array(image) == frames[number]).all()
    with pytest.raises(ValueError, match='dtype bool; expected uint8 or uint16'):
        Pages.packed(frames[0] > 3)


def test_more_than_a_tiff_can_hold_is_refused(tmp_path):
    with open(tmp_path / 'x.tif', 'wb') as file:
        pages = Pages(file)
        pages.end = 2**32 - 200
        with pytest.raises(OSError, match='x.tif: would be larger than 4 GiB'):
            pages.append(Pages.packed(numpy.zeros((20, 30), 'uint8')))


def test_an_animation_shows_the_overlays(tmp_path, rng):
    mask, truth = numpy.zeros((2, 64, 96), 'uint8')
    mask[10:40, 20:50], truth[20:50, 30:60] = 1, 1
    pictures = [figures.overlay(numpy.full((64, 96), grey, 'uint8'), mask, truth, size=(64, 96)) for grey in (0, 60, 140, 255)]
    with atomic_write(tmp_path / 'x.gif') as file, closing(figures.Animation(file, (64, 96), 70)) as animation:
        for picture in pictures:
            animation.append(figures.Animation.encoded(picture))
    with Image.open(tmp_path / 'x.gif') as image:
        assert (image.n_frames, image.size, image.info['loop']) == (4, (96, 64), 0)
        for number, picture in enumerate(pictures):
            image.seek(number)
            assert image.info['duration'] == 70
            off = abs(numpy.array(image.convert('RGB'), int) - numpy.array(picture, int)).max(axis=2)
            assert off[mask == truth].mean() < 4 and numpy.median(off) <= 6 and off[25, 25] <= 6 and off[45, 55] <= 6 and off[30, 40] <= 6


def test_curves_over_time_have_gaps_where_there_is_no_value():
    rows = [{'frame': frame, 'area': 10 * frame, 'confidence': 0.5, 'row': 3 if frame != 4 else '', 'column': 9} for frame in (2, 3, 4, 5, 9)]
    with_gap, whole = (numpy.asarray(figures.over_time(some, rows, 'P1/loop')) for some in
                       (rows, [{**rows[0], 'frame': frame, 'area': 10 * frame} for frame in range(2, 10)]))
    drawn = [(picture == figures.PREDICTION).all(axis=2).sum() for picture in (with_gap, whole)]
    assert 0 < drawn[0] < drawn[1]
    with pytest.raises(ValueError, match='there is no frame to draw'):
        figures.over_time([])


# --- Smoothing --------------------------------------------------------------------------------------------------------

def of_loops(rng, lengths, lost=()):
    """Return frames with probabilities, of loops of these lengths, 0 for a single image; of the first loop, those numbered `lost` are lost."""
    frames = []
    for loop, length in enumerate(lengths):
        samples = with_numbers(str(loop), length)
        frames += [types.SimpleNamespace(sample=sample, probabilities=None if loop == 0 and sample.frame in lost else rng.random((3, 4)).astype('f4'))
                   for sample in samples]
    return frames


def with_numbers(name, length):
    return [Sample(f'{name}#{frame}', name, None, None, frame, length) for frame in range(1, length + 1)] or [Sample(name, name, None, None)]


@pytest.mark.parametrize('window', [1, 3, 5, 9])
def test_smoothing_is_the_mean_over_a_centred_window_that_shrinks_at_the_ends(rng, window):
    lengths, lost = (12, 0, 0, 2, 7, 0), (4, 5, 12)
    frames = of_loops(rng, lengths, lost)
    before = [frame.probabilities for frame in frames]
    came = list(smoothed(iter(frames), window))
    assert came == frames
    start = 0
    for loop, length in enumerate(lengths):
        for place in range(max(length, 1)):
            reach = min(window // 2, place, max(length, 1) - 1 - place)
            near = [p for p in before[start + place - reach:start + place + reach + 1] if p is not None]
            if before[start + place] is None:
                assert frames[start + place].probabilities is None
            else:
                numpy.testing.assert_allclose(frames[start + place].probabilities, numpy.mean(near, axis=0), rtol=1e-6)
                if reach == 0:
                    assert frames[start + place].probabilities is before[start + place]
        start += max(length, 1)


def test_smoothing_holds_no_more_frames_than_its_window(rng):
    read = [0]

    def frames():
        for frame in of_loops(rng, [50, 50]):
            read[0] += 1
            yield frame

    for number, frame in enumerate(smoothed(frames(), 9), 1):
        assert read[0] - number <= 4


# --- predict.py -------------------------------------------------------------------------------------------------------

@pytest.fixture
def data(tmp_path, rng):
    """A network, and two loops with masks."""
    network = nervenet.UNet(base_channels=2, depth=1, input_mean=0.4, input_std=0.2, rng=rng)
    network.parameters()['head.weight'][:] *= -100                           # so that it reacts, and finds some of what is there
    nervenet.save(tmp_path / 'model.npz', network, size=[16, 24], settings={})
    return write_loops(tmp_path / 'data', rng, ('1_1', '2_1'), number=7)


def predict(data, *options, inputs=None, out='out'):
    """Predict the inputs, by default the folder; return (exit status, rows of results.csv)."""
    status = example('predict').main([*map(str, ['--model', data.parent / 'model.npz', '--input', *(inputs or [data]), '--output', data.parent / out,
                                                 *options])])
    return status, list(csv.DictReader((data.parent / out / 'results.csv').read_text().splitlines()))


def test_a_loop_is_predicted_as_its_frames_are_one_by_one(data, rng, capsys):
    Image.fromarray(levels(rng, 1, (20, 30))[0]).save(data / '3_1.png')
    status, rows = predict(data, '--overlays', '--probabilities', '--batch-size', 4)
    assert status == 0 and 'frames of 2 loops among them' in capsys.readouterr().out
    assert {path.name for path in (data.parent / 'out').iterdir()} == {
        'results.csv', '3_1_mask.png', '3_1_overlay.png', '3_1_probability.png',
        *(f'{loop}_{what}' for loop in ('1_1', '2_1') for what in ('mask.tif', 'probability.tif', 'overlay.gif', 'over_time.png'))}
    assert [(row['image'], row['frame']) for row in rows] == [*itertools.product(('1_1', '2_1'), '1234567'), ('3_1', '')]
    single = data.parent / 'single'
    single.mkdir()
    for loop, frame in itertools.product(('1_1', '2_1'), range(1, 8)):
        for ending in '', '_mask':
            with Image.open(data / f'{loop}{ending}.tif') as image:
                image.seek(frame - 1)
                Image.fromarray(numpy.array(image)).save(single / f'{loop}_{frame}{ending}.png')
    _, expected = predict(data, '--probabilities', inputs=[single], out='expected')
    assert 'frame' not in expected[0]
    for row, other in zip(rows, expected):
        name = f'{row.pop("image")}_{row.pop("frame")}'
        assert name == other.pop('image') and row == other
        for ending in 'mask', 'probability':
            loop, _, frame = name.rpartition('_')
            with (Image.open(data.parent / 'out' / f'{loop}_{ending}.tif') as image,
                  Image.open(data.parent / 'expected' / f'{name}_{ending}.png') as one):
                image.seek(int(frame) - 1)
                assert image.n_frames == 7 and image.mode == one.mode and (numpy.array(image) == numpy.array(one)).all()
    assert 0 < sum(float(row['dice']) for row in rows[:14]) < 14
    with Image.open(data.parent / 'out' / '1_1_overlay.gif') as image:
        assert image.n_frames == 7 and image.size == (30, 20)


def test_smoothing_changes_frames_of_loops_and_nothing_else(data, rng):
    Image.fromarray(levels(rng, 1, (20, 30))[0]).save(data / '3_1.png')
    plain, smooth = (predict(data, '--probabilities', '--smooth-frames', window, '--batch-size', 2, out=f'out{window}')[1] for window in (1, 3))
    assert plain[-1] == smooth[-1] and plain[0] == smooth[0] and plain[6] == smooth[6] and plain[3] != smooth[3]
    segmenter, _ = Segmenter.from_file(data.parent / 'model.npz')
    maps = segmenter.maps([segmenter.prepare(read_image(data / '1_1.tif', frame=frame)) for frame in (3, 4, 5)])
    expected = segmenter.restore(sum(maps) / 3, (20, 30))
    with Image.open(data.parent / 'out3' / '1_1_probability.tif') as image:
        image.seek(3)
        assert abs(numpy.array(image) / 65535 - expected).max() < 1e-4
    for wrong in 0, 4, -3:
        with pytest.raises(SystemExit):
            predict(data, '--smooth-frames', wrong, out='wrong')


def test_a_lost_frame_has_an_empty_page_and_no_row_and_costs_one_line(data, rng, capsys):
    for path in data.iterdir():
        path.unlink()
    damaged(data / '1_1.tif', rng, **DEFLATE)
    damaged(data / '2_1.png', rng)
    status, rows = predict(data, '--overlays')
    said = capsys.readouterr().err.splitlines()
    assert status == 1 and [text.partition('cannot')[0] for text in said[:-1]] == [f'skipped: {data / "1_1.tif"}, frame 5: ',
                                                                                  f'skipped: {data / "2_1.png"}, frame 5: ']
    assert said[-1] == 'predict.py: 5 of 16 images skipped or not scored: 1_1#5, 2_1#5, 2_1#6, 2_1#7, 2_1#8'
    assert [(row['image'], row['frame']) for row in rows] == [*(('1_1', frame) for frame in '1234678'), *(('2_1', frame) for frame in '1234')]
    for loop, number, lost in ('1_1', 8, (4,)), ('2_1', 8, (4, 5, 6, 7)):
        with Image.open(data.parent / 'out' / f'{loop}_mask.tif') as image:
            assert image.n_frames == number
            for frame in range(number):
                image.seek(frame)
                assert numpy.array(image).any() == (frame not in lost)


def test_a_loop_of_which_the_first_frame_is_lost_is_written_and_one_without_any_is_not(data, rng, capsys):
    for path in data.iterdir():
        path.unlink()
    for name, lost in ('1_1', [0]), ('2_1', range(4)):
        content = bytearray(write(data / f'{name}.tif', levels(rng, 4, (42, 58)), compression='tiff_lzw').read_bytes())
        with Image.open(data / f'{name}.tif') as image:
            for frame in lost:
                image.seek(frame)
                start = image.tag_v2[273][0]
                content[start:start + 300] = bytes(300)
        (data / f'{name}.tif').write_bytes(content)
    status, rows = predict(data, '--overlays', '--probabilities')
    assert status == 1 and [row['frame'] for row in rows] == ['2', '3', '4'] and count_frames(data.parent / 'out' / '1_1_mask.tif') == 4
    assert not read_mask(data.parent / 'out' / '1_1_mask.tif', frame=1).any() and count_frames(data.parent / 'out' / '1_1_probability.tif') == 4
    assert not [path for path in (data.parent / 'out').iterdir() if path.name.startswith('2_1')]


def test_a_mask_loop_of_another_length_is_told_and_not_scored(data, capsys):
    write(data / '2_1_mask.tif', numpy.zeros((5, 20, 30), 'uint8'))
    status, rows = predict(data)
    said = capsys.readouterr()
    assert status == 1 and f'predicted, but not scored: {data / "2_1_mask.tif"}: holds 5 frames, and its image 2_1.tif 7 frames' in said.err
    assert [bool(row['dice']) for row in rows] == [True] * 7 + [False] * 7 and 'These scores cover 7 of 14 images: 7 have no mask.' in said.out


def test_uncertainty_of_frames_is_told(data, capsys):
    _, rows = predict(data, '--uncertainty')
    assert all(0 <= float(row['sureness']) <= 1 for row in rows) and 'by agreement of masks' in capsys.readouterr().out
    assert not list((data.parent / 'out').glob('*uncertainty*'))


def test_an_error_while_a_loop_is_written_leaves_nothing_half_written(data, monkeypatch):
    before, written = Pages.append, []

    def full(pages, page):
        written.append(page)
        if len(written) > 10:
            raise OSError(28, 'No space left on device')
        before(pages, page)

    monkeypatch.setattr(Pages, 'append', full)
    with pytest.raises(OSError, match='No space left'):
        predict(data, '--overlays')
    assert {path.name for path in (data.parent / 'out').iterdir()} == {'1_1_mask.tif', '1_1_overlay.gif', '1_1_over_time.png'}


def test_masks_that_were_written_can_be_trained_on(data):
    predict(data, '--overlays')
    for name in '1_1', '2_1':
        (data.parent / 'out' / f'{name}_mask.tif').replace(data / f'{name}_mask.tif')
    samples = with_frames(find_samples(data))
    assert len(samples) == 14 and holds_foreground(samples, Reader((16, 24))).any()


@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='this system does not tell the peak of memory')
def test_memory_does_not_grow_with_the_loop(data, rng):
    """The 300 frames more are 51 MiB as they are stored, and 206 MiB as intensities."""
    script = ('import sys, predict; predict.main(sys.argv[1:]); '
              'print([line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")][0])')
    peaks = []
    for number in 60, 360:
        path, frame = data.parent / f'{number}.tif', levels(rng, 1, (400, 450))[0]
        with atomic_write(path) as file, closing(Pages(file)) as pages:
            for place in range(number):
                pages.append(Pages.packed(numpy.roll(frame, place, axis=0)))
        done = run_script(script, '--model', data.parent / 'model.npz', '--input', path, '--output', data.parent / f'out{number}', '--smooth-frames', 5,
                          '--batch-size', 4, '--device', 'cpu')
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout.split()[-1]))
    assert peaks[1] - peaks[0] < 15 * 1024


def run_script(script, *arguments):
    root = Path(__file__).parents[1]
    return subprocess.run([sys.executable, '-c', script, *map(str, arguments)], capture_output=True, text=True, check=False,
                          env={**os.environ, 'PYTHONPATH': f'{root}{os.pathsep}{root / "examples"}'})


def test_command_says_what_is_wrong_in_one_line(data):
    (data.parent / 'IM_1').write_bytes(bytes(128) + b'DICM')
    done = run_example('predict.py', '--model', data.parent / 'model.npz', '--input', data.parent / 'IM_1', '--output', data.parent / 'out')
    assert done.returncode == 1 and 'is a DICOM file' in done.stderr and 'ImageMagick' in done.stderr and 'Traceback' not in done.stderr
    done = run_example('look_inside.py', '--model', data.parent / 'model.npz', '--image', data / '1_1.tif', '--output', data.parent / 'inside')
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and '1_1.tif: holds 7 frames, expected one image' in done.stderr


# --- Synthetic loops --------------------------------------------------------------------------------------------------

def detail(image):
    """Return what is left of an image (H, W) when all that is smooth is taken off, at the places where tissue is."""
    box, image = numpy.ones(9) / 9, image.astype(float)
    smooth = image
    for axis in 0, 1:
        smooth = numpy.apply_along_axis(numpy.convolve, axis, smooth, box, 'same')
    return (image - smooth)[20:-20, 20:-20].ravel()


def test_speckle_of_a_loop_is_neither_frozen_nor_new_in_each_frame():
    for subject in 2, 5:
        frames = [detail(make_frame(subject, index, size=(210, 290), loop=1)[0]) for index in range(1, 26)]
        by_lag = [numpy.mean([numpy.corrcoef(frames[at], frames[at + lag])[0, 1] for at in range(0, 25 - lag, 2)]) for lag in (1, 4, 12, 24)]
        assert 0.85 < by_lag[0] < 0.9999 and by_lag[0] - 0.01 > by_lag[1] > by_lag[2] > by_lag[3] and by_lag[3] < 0.8
    strangers = detail(make_frame(2, 1, size=(210, 290))[0]), detail(make_frame(2, 30, size=(210, 290))[0])
    assert numpy.corrcoef(*strangers)[0, 1] < by_lag[0] - 0.2


def test_leaving_the_plane_brings_other_scatterers_into_view(monkeypatch):
    """Here the probe only tilts: what is in the plane stays where it is."""
    alike, before = [], phantom.seen
    monkeypatch.setattr(phantom, 'seen', lambda subject, index: before(subject, 100))
    for slices in 0, phantom.SLICES:
        monkeypatch.setattr(phantom, 'SLICES', slices)
        alike.append(numpy.corrcoef(*(detail(make_frame(2, index, size=(210, 290), loop=1)[0]) for index in (1, 13)))[0, 1])
    assert alike[1] < alike[0] - 0.03


def test_frames_between_which_nothing_moved_are_equal(monkeypatch):
    monkeypatch.setattr(phantom, 'PACE', 0)
    one, other = make_frame(2, 1, size=(42, 58), loop=1), make_frame(2, 9, size=(42, 58), loop=1)
    assert (one[0] == other[0]).all() and (one[1] == other[1]).all()
    assert (make_frame(2, 1, size=(42, 58), loop=2)[0] != one[0]).any()


def test_masks_move_smoothly():
    """From frame to frame the nerve moves by less than a tenth of its size, and over the loop by more."""
    masks = numpy.array([make_frame(2, index, size=(210, 290), loop=1)[1] for index in range(1, 31)])
    assert masks.any(axis=(1, 2)).all()
    dice = [2 * (a & b).sum() / (a.sum() + b.sum()) for a, b in itertools.pairwise(masks)]
    assert min(dice) > 0.93 and 2 * (masks[0] & masks[-1]).sum() / (masks[0].sum() + masks[-1].sum()) < 0.9


def test_moving_speckle_is_as_strong_at_all_places(rng):
    """Between grid points and between slices too; and of one place only the slices near it are asked for."""
    subject = phantom.Subject(0, 1)
    drawn = {number: rng.standard_normal((224, 352, 2)).view(complex)[..., 0] for number in (-3, -2, 4, 5)}
    for place in -2.5, 4.0, 4.3:
        for shift in 0, 0.5, 1.25:
            looks = phantom.moving_speckle(subject, drawn.__getitem__, place, phantom.Y + 0 * phantom.X + shift, phantom.X + shift)
            assert looks.shape == (2, 168, 240)
            numpy.testing.assert_allclose((abs(looks) ** 2).mean(axis=(1, 2)), 2, atol=0.12)
    exactly = phantom.moving_speckle(subject, drawn.__getitem__, 4.0, phantom.Y + 0 * phantom.X - 1.25, phantom.X - 1.25)[1]
    numpy.testing.assert_allclose(exactly[0, 0], drawn[4][28, 56], rtol=1e-12)


def test_textures_are_read_linearly_in_both_directions():
    texture = 3 * phantom.V + 2 * phantom.U
    v, u = numpy.array([[3.3, 100.0], [250.0, 401.7]]), numpy.array([11.1, 501.3])
    numpy.testing.assert_allclose(phantom.between(texture, v, u), 3 * v + 2 * u, rtol=1e-12)
    assert numpy.isfinite(phantom.between(texture, numpy.array([[-1e4], [1e4]]), numpy.array([-1e4]))).all()


def test_a_frame_of_a_loop_follows_from_its_numbers_alone():
    image, mask = make_frame(2, 5, 7, (42, 58), 3)
    phantom.subject_of.cache_clear(), phantom.slice_of.cache_clear()
    make_frame(3, 1, 7, (42, 58), 1)
    again, same_mask = make_frame(2, 5, 7, (42, 58), 3)
    assert (image == again).all() and (mask == same_mask).all()
    with pytest.raises(ValueError, match='whole number of 1 or more'):
        make_frame(1, 1, loop=0)
    with pytest.raises(ValueError, match='loops is 0; expected a whole number of 1 or more'):
        Phantom(loops=0)


def test_command_writes_loops_that_are_trained_on_and_predicted(tmp_path, capsys):
    command.main(['--out', str(tmp_path / 'set'), '--subjects', '2', '--loops', '--frames', '3', '--size', '42x58', '--seed', '5'])
    said = capsys.readouterr().out
    assert 'subject 2 of 2: 2 loops of 3 frames' in said and '4 loops of 3 frames and their masks are in' in said
    assert sorted(path.name for path in (tmp_path / 'set' / 'train').iterdir()) == sorted(
        f'{subject}_{loop}{ending}.tif' for subject in (1, 2) for loop in (1, 2) for ending in ('', '_mask'))
    samples = with_frames(find_samples(tmp_path / 'set'))
    assert [sample.name for sample in samples] == [sample.name for sample in Phantom(2, 3, 5, (42, 58), loops=2).samples]
    for sample in samples:
        image, mask = read_pair(sample)
        expected, truth = make_frame(int(sample.subject), sample.frame, 5, (42, 58), int(sample.file_name[2:]))
        assert (numpy.rint(image * 255) == expected).all() and (mask == truth).all()


def test_a_phantom_loop_does_not_run_into_the_next_one():
    with pytest.raises(ValueError, match='frames is 1001; expected at most 1000 in a loop'):
        Phantom(1, 1001, loops=2)


def test_loops_of_one_each_are_warned_of_as_images_are(tmp_path, rng):
    for name in '1_1', '1_2':
        for ending in '', '_mask':
            with open(tmp_path / f'{name}{ending}.tif', 'wb') as file, closing(Pages(file)) as pages:
                for _ in range(2):
                    pages.append(Pages.packed((rng.random((8, 12)) < 0.5).astype('uint8') * 255))
    samples = with_frames(find_samples(tmp_path, '^(.+)'))
    assert len(samples) == 4 and 'no subject is known, so every image, and every loop, counts as its own' in subject_warning(samples, '^(.+)')
