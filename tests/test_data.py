import os
import re
import struct
import threading
import time
import unicodedata
from pathlib import Path

import numpy
import pytest
from PIL import Image

from nervenet.images import reading
from nervenet.images.augment import median_filter
from nervenet.images.data import (Filtered, Loader, Reader, data_warning, holds_foreground, intensity_oddity, intensity_statistics,
                                  mask_oddity, oddity_warning, resize, resize_mask)
from nervenet.images.reading import MaskRule, as_intensities, read_image, read_mask, read_pair, white_of
from nervenet.images.samples import DataError, Sample, describe, find_samples, split_by_subject, subject_warning

REAL = Path(__file__).parents[2] / 'shared' / 'data'
GREY = numpy.arange(6 * 5, dtype=numpy.uint8).reshape(6, 5) * 8            # 0 to 232, no two equal


def write(path, pixels, **options):
    """Save an array as an image, making folders as needed, and return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(path, **options)
    return path


def disc(H, W, row, column, radius):
    rows, columns = numpy.ogrid[:H, :W]
    return numpy.uint8(255) * ((rows - row)**2 + (columns - column)**2 < radius**2)


def kaggle(folder, rng, subjects=4, frames=3, size=(10, 14)):
    """Write a small set in the Kaggle layout."""
    for subject in range(1, subjects + 1):
        for frame in range(1, frames + 1):
            write(folder / f'{subject}_{frame}.tif', rng.integers(0, 256, size, dtype=numpy.uint8))
            write(folder / f'{subject}_{frame}_mask.tif', disc(*size, *rng.integers(0, size), 4))
    return folder


def plain(folder, names, image_suffix='.png', mask_suffix='.png'):
    for name in names:
        write(folder / 'images' / (name + image_suffix), GREY)
        write(folder / 'masks' / (name + mask_suffix), GREY // 128 * 255)
    return folder


def message(error, *parts):
    """Assert that the error is one line with these parts in it."""
    text = str(error.value)
    assert '\n' not in text and len(text) < 600
    for part in parts:
        assert str(part) in text
    return text


# --- Finding ----------------------------------------------------------------------------------------------------------

def test_kaggle_layout_is_found_in_train_or_in_the_folder_itself(tmp_path, rng):
    kaggle(tmp_path / 'train', rng, subjects=11, frames=2)
    (tmp_path / 'train' / '._1_1.tif').write_bytes(b'left by another system')
    (tmp_path / 'train' / 'notes.txt').write_text('not an image')
    samples = find_samples(tmp_path)
    assert samples == find_samples(tmp_path / 'train')
    assert [sample.name for sample in samples[:5]] == ['1_1', '1_2', '2_1', '2_2', '3_1'] and samples[-1].name == '11_2'
    assert samples[4] == Sample('3_1', '3', tmp_path / 'train' / '3_1.tif', (tmp_path / 'train' / '3_1_mask.tif',))
    assert not subject_warning(samples)


def test_plain_layout_pairs_by_name_across_formats(tmp_path):
    plain(tmp_path, ['scan 9', 'scan 10'], '.JPG', '.bmp')
    plain(tmp_path, ['scan 11'], '.tiff', '.png')
    write(tmp_path / 'masks' / 'scan 12_mask.png', GREY)
    write(tmp_path / 'images' / 'scan 12.png', GREY)
    samples = find_samples(tmp_path)
    assert [sample.name for sample in samples] == ['scan 9', 'scan 10', 'scan 11', 'scan 12']
    masks = [sample.mask_paths[0].name for sample in samples]
    assert masks == ['scan 9.bmp', 'scan 10.bmp', 'scan 11.png', 'scan 12_mask.png']


def test_without_a_pattern_every_image_of_the_plain_layout_is_its_own_subject(tmp_path):
    samples = find_samples(plain(tmp_path, ['1_1', '1_2', '2_1']))
    assert [sample.subject for sample in samples] == ['1_1', '1_2', '2_1']
    assert subject_warning(samples).startswith('WARNING: no subject is known')


@pytest.mark.parametrize('pattern', [r'^(\w+?)-', r'(left|right)?-?(?P<subject>^[a-z]+)'])
def test_subject_pattern(tmp_path, pattern):
    samples = find_samples(plain(tmp_path, ['ann-left-1', 'ann-right-1', 'bo-1']), pattern)
    assert [sample.subject for sample in samples] == ['ann', 'ann', 'bo'] and not subject_warning(samples, pattern)


def test_subject_pattern_overrides_the_kaggle_name(tmp_path, rng):
    assert {sample.subject for sample in find_samples(kaggle(tmp_path, rng), r'_(\d+)')} == {'1', '2', '3'}


@pytest.mark.parametrize('pattern, parts', [
    ('(', ["'('", 'no regular expression']),
    ('[a-z]+', ['no group']),
    (r'(\d+)', ['bo.png', 'finds no subject']),
    (r'(\d*)', ['bo.png', 'finds no subject']),
])
def test_a_subject_pattern_that_does_not_fit_is_refused(tmp_path, pattern, parts):
    plain(tmp_path, ['bo'])
    with pytest.raises(DataError) as error:
        find_samples(tmp_path, pattern)
    message(error, *parts)


def test_folders_and_files_without_masks(tmp_path, rng):
    kaggle(tmp_path, rng, subjects=1, frames=2)
    write(tmp_path / '7.tif', GREY)
    optional, none = (find_samples(tmp_path, masks=masks) for masks in ('optional', 'none'))
    assert [(sample.name, sample.subject, sample.mask_paths and sample.mask_paths[0].name) for sample in optional] == [
        ('1_1', '1', '1_1_mask.tif'), ('1_2', '1', '1_2_mask.tif'), ('7', '7', None)]
    assert [(sample.name, sample.mask_paths) for sample in none] == [('1_1', None), ('1_2', None), ('7', None)]
    assert find_samples(tmp_path / '1_2.tif', masks='optional') == optional[1:2]
    assert find_samples(tmp_path / '1_2.tif', masks='none') == none[1:2]
    with pytest.raises(DataError) as error:
        find_samples(tmp_path / '1_2.tif')
    message(error, '1_2.tif', 'is a file')
    with pytest.raises(ValueError, match="masks is 'maybe'"):
        find_samples(tmp_path, masks='maybe')


def test_wrong_layouts_say_what_was_looked_for_and_what_was_found(tmp_path):
    with pytest.raises(DataError) as error:
        find_samples(tmp_path / 'absent')
    message(error, tmp_path / 'absent', 'no such folder')

    with pytest.raises(DataError) as error:
        find_samples(tmp_path)
    message(error, tmp_path, 'no pairs of image and mask', '{subject}_{image}_mask.tif', 'images/ and masks/', 'empty')

    for name in 'abcdefgh':
        (tmp_path / f'{name}.dcm').write_bytes(b'')
    (tmp_path / 'scans').mkdir()
    with pytest.raises(DataError) as error:
        find_samples(tmp_path, masks='none')
    message(error, 'holds no images', 'a.dcm, b.dcm', 'and 3 more')

    plain(tmp_path / 'half', ['x'])
    (tmp_path / 'half' / 'masks' / 'x.png').unlink()
    for folder in (tmp_path / 'half', tmp_path / 'half' / 'images'):
        with pytest.raises(DataError) as error:
            find_samples(folder)
        message(error, folder, 'no pairs of image and mask')


def test_an_image_without_mask_and_a_mask_without_image_are_named(tmp_path, rng):
    kaggle(tmp_path / 'a', rng)
    (tmp_path / 'a' / '2_3_mask.tif').unlink()
    with pytest.raises(DataError) as error:
        find_samples(tmp_path / 'a')
    message(error, tmp_path / 'a' / '2_3.tif', 'has no mask', '2_3_mask.tif', '1 of 12')

    write(tmp_path / 'a' / '2_3_mask.tif', GREY)
    (tmp_path / 'a' / '4_1.tif').unlink()
    with pytest.raises(DataError) as error:
        find_samples(tmp_path / 'a')
    message(error, tmp_path / 'a' / '4_1_mask.tif', 'no image', '1 of 12')

    plain(tmp_path / 'b', ['x', 'y'])
    (tmp_path / 'b' / 'masks' / 'y.png').unlink()
    with pytest.raises(DataError) as error:
        find_samples(tmp_path / 'b')
    message(error, tmp_path / 'b' / 'images' / 'y.png', tmp_path / 'b' / 'masks' / 'y.png')


def test_two_images_of_one_name_are_refused(tmp_path):
    plain(tmp_path, ['x'])
    write(tmp_path / 'images' / 'x.bmp', GREY)
    with pytest.raises(DataError) as error:
        find_samples(tmp_path)
    message(error, 'x.png', 'x.bmp', 'same name')


def paired(samples):
    """Return {name: names of the mask files} of samples."""
    return {sample.name: sample.mask_paths and [path.name for path in sample.mask_paths] for sample in samples}


def test_several_masks_of_an_image_are_joined_and_not_taken_for_images(tmp_path):
    union = numpy.zeros_like(GREY)
    for name, rows in (('a (1)_mask', slice(0, 2)), ('a (1)_mask_1', slice(1, 3)), ('a (1)_MASK (2)', slice(5, 6)), ('a (10)_mask', slice(4, 5))):
        drawn = numpy.zeros_like(GREY)
        drawn[rows, 1:3] = 255
        union |= drawn * (name[:5] == 'a (1)')
        write(tmp_path / f'{name}.png', drawn)
    for name in ('a (1)', 'a (10)'):
        write(tmp_path / f'{name}.png', GREY)
    samples = find_samples(tmp_path)
    assert paired(samples) == {'a (1)': ['a (1)_MASK (2).png', 'a (1)_mask.png', 'a (1)_mask_1.png'], 'a (10)': ['a (10)_mask.png']}
    numpy.testing.assert_array_equal(read_pair(samples[0])[1], union // 255)
    assert describe(samples)[1] == '1 images have several masks, which are joined: a (1)'
    assert [sample.name for sample in find_samples(tmp_path / 'a (1).png', masks='optional')] == ['a (1)']
    write(tmp_path / 'a (1)_mask.bmp', GREY)
    with pytest.raises(DataError, match='a .1._mask.png: a .1._mask.bmp has the same name; keep one'):
        find_samples(tmp_path)


def test_a_pattern_of_the_shell_names_masks_too_and_they_are_left_out(tmp_path):
    for name in ('1_1', '1_2'):
        write(tmp_path / f'{name}.PNG', GREY)
        write(tmp_path / f'{name}_mask.PNG', GREY // 128)
    write(tmp_path / '1_1_mask_2.png', GREY)
    told = []
    samples = find_samples(sorted(tmp_path.iterdir()), masks='optional', tell=told.append)
    assert paired(samples) == {'1_1': ['1_1_mask.PNG', '1_1_mask_2.png'], '1_2': ['1_2_mask.PNG']}
    assert '3 of the files left out, being masks, going by name and place: 1_1_mask.PNG, 1_1_mask_2.png, 1_2_mask.PNG' in told
    with pytest.raises(DataError) as error:
        find_samples(sorted(tmp_path.glob('*_mask*')), masks='optional')
    message(error, '1_2_mask.PNG', 'is a mask', 'all 3 files')
    with pytest.raises(DataError, match='absent.png: no such folder or file'):
        find_samples([tmp_path / '1_1.PNG', tmp_path / 'absent.png'], masks='optional')


def test_a_file_is_paired_as_its_folder_is(tmp_path, monkeypatch):
    plain(tmp_path, ['x', 'y', 'z', 'z_mask', 'P1/x', 'P1/w'], '.png', '.TIF')  # z_mask is an image that is called so
    write(tmp_path / 'images' / 'x_mask.png', GREY)                             # a mask in the wrong folder, beside another one
    expected = {'P1/w': ['w.TIF'], 'P1/x': ['x.TIF'], 'x': ['x_mask.png', 'x.TIF'], 'y': ['y.TIF'], 'z': ['z.TIF'],
                'z_mask': ['z_mask.TIF']}

    def found(paths):
        return paired(find_samples(paths, masks='optional'))

    assert found(tmp_path) == found(sorted(tmp_path.rglob('*.*'))) == found(tmp_path / 'images') == expected
    monkeypatch.chdir(tmp_path / 'images')
    assert found([Path('x.png'), Path('y.png'), Path('z.png'), Path('z_mask.png'), Path('P1/x.png'), Path('P1/w.png')]) == found('.') == expected
    with pytest.raises(DataError, match='masks: holds the masks of .*images; give the images'):
        find_samples(tmp_path / 'masks', masks='optional')
    (tmp_path / 'images' / 'x_mask.png').unlink()
    assert find_samples(tmp_path / 'images') == find_samples(tmp_path)


def test_whatever_is_left_out_or_taken_from_elsewhere_is_told(tmp_path, rng):
    def told(folder, **options):
        lines = []
        find_samples(folder, tell=lines.append, **options)
        return lines

    assert told(kaggle(tmp_path / 'clean', rng)) == [] == told(plain(tmp_path / 'tidy', ['x', 'y']))
    (tmp_path / 'clean' / 'notes.txt').write_text('no image')
    (tmp_path / 'clean' / 'thumbnails').mkdir()
    assert told(tmp_path / 'clean') == []

    kaggle(tmp_path / 'a' / 'train', rng)
    for name in ('beside.tif', 'test/5_1.tif', 'more/5_2.tif'):
        write(tmp_path / 'a' / name, GREY)
    (tmp_path / 'a' / 'train' / '9_1.jp2').write_bytes(b'')
    (tmp_path / 'a' / 'train' / '9_2.dcm').write_bytes(b'')
    (tmp_path / 'a' / 'train' / '9_3.tif').symlink_to(tmp_path / 'gone.tif')
    line, = told(tmp_path / 'a')
    for part in (f'{tmp_path / "a"}: images are taken from {tmp_path / "a" / "train"};', 'links that lead nowhere (9_3.tif)',
                 'folders inside (more, test)', 'files of other formats (9_1.jp2)', 'ImageMagick', '(9_2.dcm)', 'images beside that (beside.tif)',
                 f'to score on {tmp_path / "a" / "test"} give it as --test'):
        assert part in line
    with pytest.raises(DataError, match='9_3.tif: is a link that leads nowhere'):
        find_samples(tmp_path / 'a' / 'train' / '9_3.tif', masks='optional')

    images, masks = tmp_path / 'tidy' / 'images', tmp_path / 'tidy' / 'masks'
    assert told(images) == [f'{images}: images are taken from {images}, masks from {masks}']
    write(tmp_path / 'tidy' / 'x.png', GREY)
    write(tmp_path / 'tidy' / 'P1' / 'deep' / 'z.png', GREY)
    assert told(tmp_path / 'tidy') == [f'{tmp_path / "tidy"}: left out are images beside that (x.png), folders inside (P1)']
    write(tmp_path / 'tidy' / 'masks' / 'w.png', GREY)
    assert f'{tmp_path / "tidy"}: left out are masks without image, w.png' in told(tmp_path / 'tidy', masks='optional')


def test_wrong_content_of_images_and_masks_is_listed_with_the_way_out(tmp_path):
    plain(tmp_path / 'jp2', ['0', '1'])
    for path in (tmp_path / 'jp2' / 'masks').iterdir():
        path.rename(path.with_suffix('.jp2'))
    with pytest.raises(DataError) as error:
        find_samples(tmp_path / 'jp2')
    message(error, 'Found images/ with 0.png, 1.png, masks/ with 0.jp2, 1.jp2', 'convert them to PNG')
    (tmp_path / 'links').mkdir()
    (tmp_path / 'links' / '1_1.tif').symlink_to(tmp_path / 'gone')
    with pytest.raises(DataError) as error:
        find_samples(tmp_path / 'links', masks='optional')
    message(error, 'Found 1_1.tif (links lead nowhere)')
    write(tmp_path / 'half' / 'images' / '.hidden.png', GREY)
    with pytest.raises(DataError, match='Found images/ with nothing, the folder is empty, and no masks/'):
        find_samples(tmp_path / 'half')


def test_names_are_compared_in_composed_form(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, 'Müller_1') for form in ('NFC', 'NFD'))
    write(tmp_path / 'images' / f'{decomposed}.png', GREY)
    write(tmp_path / 'masks' / f'{composed}.png', GREY // 128)
    if not (tmp_path / 'images' / f'{decomposed}.png').exists() or (tmp_path / 'images' / f'{composed}.png').exists():
        pytest.skip('this file system composes names itself')
    sample, = find_samples(tmp_path, '(Mü.+)_')
    assert sample.name == composed and sample.subject == unicodedata.normalize('NFC', 'Müller')
    write(tmp_path / 'images' / f'{composed}.png', GREY)
    with pytest.raises(DataError, match='has the same name'):
        find_samples(tmp_path)


def test_names_that_are_not_utf8_are_spelled_out(tmp_path):
    stem = os.fsdecode(b'M\xfcller_1')
    try:
        write(tmp_path / f'{stem}.png', GREY)
    except OSError:
        pytest.skip('this file system refuses such names')
    write(tmp_path / f'{stem}_mask.png', GREY // 128)
    sample, = find_samples(tmp_path, '(M.+)_')
    assert sample.name == 'M\\xfcller_1' and sample.subject == 'M\\xfcller' and sample.name.encode()
    read_pair(sample)
    assert find_samples(sample.image_path, masks='optional')[0].mask_paths == sample.mask_paths


# --- Splitting --------------------------------------------------------------------------------------------------------

def samples_of(images_per_subject):
    return [Sample(f'{subject}_{image}', str(subject), Path(f'{subject}_{image}.tif'), (Path('mask'),))
            for subject, count in enumerate(images_per_subject) for image in range(count)]


@pytest.mark.parametrize('name, subject', [
    ('1_1_flip', '1'), ('1_1 copy', '1'), ('1_1(1)', '1'), ('1_1 (2)', '1'), ('1_1_aug2', '1'), ('1_1-rot90', '1'), ('1_1b', '1'),
    ('1_1_2', '1'), ('1_1_flip_aug', '1'), ('1_12', '1'), ('2_1_flip', '2_1_flip'), ('flip_1_1', 'flip_1_1'), ('1_13x', '1_13x')])
def test_a_copy_belongs_to_the_subject_of_its_original(tmp_path, name, subject):
    for stem in ('1_1', '3_1', name):
        write(tmp_path / f'{stem}.png', GREY)
        write(tmp_path / f'{stem}_mask.png', GREY // 128)
    told = []
    samples = find_samples(tmp_path, tell=told.append)
    assert {sample.name: sample.subject for sample in samples} == {'1_1': '1', '3_1': '3', name: subject}
    is_copy = subject == '1' and name != '1_12'
    expected = f'1 of the files are copies, going by their names, and count with the subject of their original: {name}'
    assert told == [expected] * is_copy
    assert bool(subject_warning(samples)) == (subject != '1')
    assert {sample.name: sample.subject for sample in find_samples(tmp_path, '^(.+)$')}[name] == name


def test_copies_in_the_plain_layout_stay_together_and_numbered_images_do_not(tmp_path):
    names = ['scan', 'scan_2', 'scan_flip', 'scan_flip_aug', 'scans', 'P1_1', 'P1', 'P1_1_flip']
    subjects = {sample.name: sample.subject for sample in find_samples(plain(tmp_path, names))}
    assert subjects == {**{name: name for name in names}, 'scan_flip': 'scan', 'scan_flip_aug': 'scan', 'P1_1_flip': 'P1_1'}


def test_unknown_subjects_are_warned_of_with_examples():
    def named(*names):
        return [Sample(name, subject, None, None) for name, subject in names]

    known = named(('1_1', '1'), ('1_2', '1'), ('2_1', '2'))
    assert subject_warning(known) == subject_warning(known[1:]) == ''
    some = subject_warning(known + named(('b_1_1', 'b_1_1'), ('b_1_2', 'b_1_2'), ('7', '7'), ('8', '8')))
    assert some.startswith('WARNING: 4 of 7 names do not say their subject') and 'b_1_1, b_1_2, 7 and 1 more' in some
    assert subject_warning(named(('1_1', '1_1'), ('1_2', '1_2'))).startswith('WARNING: no subject is known, so every image')
    assert subject_warning(named(('a_1', 'a_1'), ('a_1_flip', 'a_1'))).startswith('WARNING: no subject is known')
    assert subject_warning(named(('a_1', 'a'), ('a_2', 'a')), '(.)_') == ''
    assert subject_warning(named(('a_1', 'a_1'), ('a_2', 'a_2')), '(.+)').startswith('WARNING: no subject is known')
    alike = subject_warning(known + named(('01_3', '01'), ('002_1', '002')))
    assert alike.startswith('WARNING: 01 and 1, 002 and 2 count as different subjects') and '\n' not in alike
    assert 'Ann and ann' in subject_warning(named(('ann-1', 'ann'), ('Ann-2', 'Ann'), ('ann-3', 'ann')), '(.+)-')


def split_with(positives, share=0.2, seed=0, counts=(10,) * 10, **options):
    """Return for both sides of a split how many subjects with foreground they hold, and the sides."""
    samples = samples_of(counts)
    positive = numpy.array([int(sample.subject) in positives and sample.name.endswith('_0') for sample in samples])
    sides = split_by_subject(samples, share, seed, positive, **options)
    assert not {sample.subject for sample in sides[0]} & {sample.subject for sample in sides[1]}
    return [len({sample.subject for sample in side} & set(map(str, positives))) for side in sides], sides


def test_both_sides_of_a_split_hold_foreground_where_two_subjects_do():
    for positives in ({0, 1}, {3, 8}, {2, 5, 9}, set(range(9))):
        for seed in range(20):
            (trained, validated), sides = split_with(positives, seed=seed)
            assert trained and validated and len(sides[1]) == 20
    for seed in range(20):
        assert split_with({4, 6}, seed=seed, counts=(3, 30, 1, 7, 12, 9, 40, 5, 6, 2))[0] == [1, 1]
        assert split_with({0, 1}, 0.9, seed)[0] == [1, 1] == split_with({0, 1}, 0.5, seed, (5, 5))[0]
    assert sorted(split_with({7})[0]) == [0, 1] and split_with(set())[0] == [0, 0]      # not enough
    for seed in range(20):                                                             # training is split again
        (trained, validated), _ = split_with({2, 5, 9}, 0.5, seed, training_positives=2)
        assert (trained, validated) == (2, 1)
        assert split_with({2, 5}, 0.5, seed, training_positives=2)[0] == [1, 1]


def test_a_split_that_has_foreground_on_both_sides_is_the_one_without_looking():
    for seed in range(10):
        samples = samples_of([4, 7, 2, 9, 5, 5])
        blind = split_by_subject(samples, 0.3, seed)
        assert split_by_subject(samples, 0.3, seed, numpy.ones(len(samples), bool)) == blind
        assert split_by_subject(samples, 0.3, seed, numpy.zeros(len(samples), bool)) == blind
        (trained, validated), sides = split_with({0, 5}, 0.3, seed, (4, 7, 2, 9, 5, 5))
        assert trained == validated == 1 and sides == split_with({0, 5}, 0.3, seed, (4, 7, 2, 9, 5, 5))[1]
        held = [{sample.subject for sample in side} & {'0', '5'} for side in blind]
        assert all(held) == (sides == blind)


@pytest.mark.parametrize('counts, share', [([120] * 47, 0.2), ([30, 1, 7, 12, 50, 3, 9, 22], 0.25), ([5, 5], 0.9),
                                           ([1, 99], 0.5), ([50, 50], 0.01)])
def test_no_subject_is_on_both_sides_of_a_split(counts, share):
    samples = samples_of(counts)
    for seed in range(20):
        training, validation = split_by_subject(samples, share, seed)
        assert training and validation and sorted(map(hash, training + validation)) == sorted(map(hash, samples))
        assert not {sample.subject for sample in training} & {sample.subject for sample in validation}
        assert abs(len(validation) - share * len(samples)) <= max(counts)
    kept = set(training)
    assert training == [sample for sample in samples if sample in kept]


def test_a_split_follows_from_its_seed_and_not_from_the_order_of_the_files():
    samples = samples_of([10] * 12)
    sides = [{sample.subject for sample in split_by_subject(order, 0.25, seed)[1]}
             for seed in range(8) for order in (samples, samples[::-1])]
    assert sides[::2] == sides[1::2] and len(set(map(frozenset, sides))) > 4
    assert all(len(side) == 3 for side in sides)


def test_a_split_needs_two_subjects():
    with pytest.raises(DataError) as error:
        split_by_subject(samples_of([7]), 0.2, 0)
    message(error, '7 images of 1 subject', '--subject-pattern')
    with pytest.raises(ValueError, match='share is 1'):
        split_by_subject(samples_of([7, 7]), 1, 0)


# --- Reading images ---------------------------------------------------------------------------------------------------

def grey16():
    return (numpy.arange(6 * 5).reshape(6, 5) * 2259).astype(numpy.uint16)     # up to 65511


LZW = {'compression': 'tiff_lzw'}


@pytest.mark.parametrize('name, options', [('x.png', {}), ('x.bmp', {}), ('x.tif', {}), ('x.tif', LZW)])
def test_8_bit_grey_is_divided_by_255(tmp_path, name, options):
    image = read_image(write(tmp_path / name, GREY, **options))
    assert image.dtype == numpy.float32 and image.shape == (6, 5)
    numpy.testing.assert_array_equal(image, GREY.astype(numpy.float32) / 255)


@pytest.mark.parametrize('name, options', [('x.png', {}), ('x.tif', {}), ('x.tif', {'compression': 'tiff_deflate'})])
def test_16_bit_grey_is_divided_by_65535_and_not_cut_off(tmp_path, name, options):
    numpy.testing.assert_array_equal(read_image(write(tmp_path / name, grey16(), **options)),
                                     grey16().astype(numpy.float32) / 65535)


def tiff(path, bits, photometric, shape, content, sample_format=1):
    """Write a TIFF of one uncompressed strip by hand, for kinds that Pillow reads and does not write."""
    tags = [(256, 4, shape[1]), (257, 4, shape[0]), (258, 3, bits), (259, 3, 1), (262, 3, photometric),
            (273, 4, 8 + 2 + 10 * 12 + 4), (277, 3, 1), (278, 4, shape[0]), (279, 4, len(content)), (339, 3, sample_format)]
    directory = b''.join(struct.pack('<HHII', tag, kind, 1, value) for tag, kind, value in tags)
    path.write_bytes(b'II*\0' + struct.pack('<IH', 8, len(tags)) + directory + bytes(4) + content)
    return path


def test_tiffs_that_count_from_white_to_black_and_12_bit_tiffs(tmp_path):
    inverted = tiff(tmp_path / 'inverted.tif', 16, 0, (6, 5), (65535 - grey16()).astype('<u2').tobytes())
    numpy.testing.assert_array_equal(read_image(inverted), grey16().astype(numpy.float32) / 65535)
    inverted = tiff(tmp_path / 'inverted8.tif', 8, 0, (6, 5), (255 - GREY).tobytes())
    numpy.testing.assert_array_equal(read_image(inverted), GREY.astype(numpy.float32) / 255)
    twelve = tiff(tmp_path / 'twelve.tif', 12, 1, (1, 4), bytes.fromhex('FFF800' '0017FF'))
    numpy.testing.assert_allclose(read_image(twelve), numpy.array([[0xFFF, 0x800, 0x001, 0x7FF]]) / 4095, rtol=1e-6)


def test_colours_become_their_luma(tmp_path, rng):
    colours = rng.integers(0, 256, (6, 5, 3), dtype=numpy.uint8)
    luma = colours @ [0.299, 0.587, 0.114] / 255
    for name in ('x.png', 'x.tif', 'x.bmp'):
        numpy.testing.assert_allclose(read_image(write(tmp_path / name, colours)), luma, atol=0.51 / 255)
    palette = Image.fromarray(colours).quantize(256)
    numpy.testing.assert_allclose(read_image(write(tmp_path / 'palette.png', palette)),
                                  numpy.asarray(palette.convert('RGB')) @ [0.299, 0.587, 0.114] / 255, atol=0.51 / 255)
    smooth = numpy.tile(numpy.arange(0, 240, 5, dtype=numpy.uint8)[:, None, None], (1, 16, 3))
    jpeg = write(tmp_path / 'x.jpg', smooth, quality=95)
    numpy.testing.assert_allclose(read_image(jpeg), smooth[..., 0] / 255, atol=0.02)


def test_transparent_pixels_are_black(tmp_path):
    opaque = numpy.full((6, 5), 255, numpy.uint8)
    opaque[:2] = 0
    expected = numpy.where(opaque, GREY, 0) / numpy.float32(255)
    for name, bands in (('la.png', 'LA'), ('rgba.png', 'RGBA'), ('rgba.tif', 'RGBA')):
        image = Image.merge(bands, [Image.fromarray(GREY)] * (len(bands) - 1) + [Image.fromarray(opaque)])
        numpy.testing.assert_allclose(read_image(write(tmp_path / name, image)), expected, atol=1e-6)
    palette = Image.fromarray(numpy.arange(6, dtype=numpy.uint8).reshape(2, 3)).convert('P')
    palette.putpalette(bytes(value for level in range(6) for value in [40 * level + 55] * 3))
    numpy.testing.assert_allclose(read_image(write(tmp_path / 'p.png', palette, transparency=2)),
                                  numpy.array([[55, 95, 0], [175, 215, 255]]) / 255, atol=1e-6)


def test_arrays_become_intensities_by_their_dtype(rng):
    image = rng.random((6, 5), dtype=numpy.float32)
    assert as_intensities(image) is image
    for given, expected in ((GREY, GREY / 255), (grey16(), grey16() / 65535), (GREY > 99, GREY > 99), (image.astype(float), image),
                            (Image.fromarray(GREY), GREY / 255)):
        found = as_intensities(given)
        assert found.dtype == numpy.float32
        numpy.testing.assert_allclose(found, expected, rtol=1e-6)
    for wrong, what in ((image * 255, 'values from .*divide it by the value that is white'), (image - 1, 'values from -'),
                        (numpy.where(image > 0.5, numpy.nan, image), 'values from nan'), (GREY.astype(int), 'dtype int64'),
                        (image[..., None], r'shape \(6, 5, 1\)'), (image[:0], r'shape \(0, 5\)')):
        with pytest.raises(ValueError, match=what):
            as_intensities(wrong)


def test_white_can_be_given_and_is_guessed_from_few_levels(tmp_path):
    twelve = write(tmp_path / 'twelve.png', (GREY.astype('uint16') * 16))
    numpy.testing.assert_allclose(read_image(twelve, white=4095), GREY.astype('float32') * 16 / 4095, rtol=1e-6)
    assert white_of(twelve) == 4095 and white_of(write(tmp_path / 'ten.tif', GREY.astype('uint16') * 4)) == 1023
    assert white_of(write(tmp_path / 'wide.png', grey16())) is None and white_of(write(tmp_path / 'dark.png', GREY // 100)) is None
    with pytest.raises(DataError, match='twelve.png: holds values from 0 to 3712, expected 0 to 1023'):
        read_image(twelve, white=1023)
    wide = write(tmp_path / 'x.tif', GREY.astype(numpy.int32) * 1000)
    numpy.testing.assert_allclose(read_image(wide, white=232000), GREY / 232, rtol=1e-6)
    floats = write(tmp_path / 'floats.tif', GREY.astype('float32') / 255)
    numpy.testing.assert_array_equal(read_image(floats, white=4095), read_image(floats))
    assert white_of(floats) is None


def test_signed_integers_are_refused_as_images_and_binary_as_masks(tmp_path):
    for bits, dtype in ((8, '<i1'), (16, '<i2')):
        pixels = numpy.array([[0, 1, 100, -1]], dtype)
        with pytest.raises(DataError) as error:
            read_image(tiff(tmp_path / 'x.tif', bits, 1, (1, 4), pixels.tobytes(), sample_format=2))
        message(error, 'signed or 32-bit integers (-1 to 100)', 'unsigned')
        mask = tiff(tmp_path / 'mask.tif', bits, 1, (1, 4), (pixels == 1).astype(dtype).tobytes(), sample_format=2)
        numpy.testing.assert_array_equal(read_mask(mask), [[0, 1, 0, 0]])


def test_1_bit_images(tmp_path):
    pixels = GREY > 100
    for name in ('x.png', 'x.tif', 'x.bmp'):
        numpy.testing.assert_array_equal(read_image(write(tmp_path / name, pixels)), pixels.astype(numpy.float32))


def test_floating_point_images_are_taken_as_they_are_if_they_lie_between_0_and_1(tmp_path, rng):
    pixels = rng.random((6, 5), dtype=numpy.float32)
    numpy.testing.assert_array_equal(read_image(write(tmp_path / 'x.tif', pixels)), pixels)
    for wrong in (pixels * 255, pixels - 0.5, numpy.where(pixels > 0.5, numpy.float32('nan'), pixels)):
        with pytest.raises(DataError) as error:
            read_image(write(tmp_path / 'wrong.tif', wrong))
        message(error, tmp_path / 'wrong.tif', 'expected 0 to 1')


def test_32_bit_integers_are_refused(tmp_path):
    with pytest.raises(DataError) as error:
        read_image(write(tmp_path / 'x.tif', GREY.astype(numpy.int32) * 1000))
    message(error, tmp_path / 'x.tif', '0 to 232000', '8 or 16 bits')


@pytest.mark.parametrize('pixels', [GREY, grey16()], ids=['8 bits', '16 bits'])
@pytest.mark.parametrize('name, options', [('x.png', {}), ('x.tif', {}), ('x.tif', LZW)])
def test_the_orientation_mark_of_a_camera_is_obeyed(tmp_path, name, options, pixels):
    exif = Image.Exif()
    exif[274] = 6                                                               # the top of the scene is at the right
    image = read_image(write(tmp_path / name, pixels, exif=exif, **options))
    numpy.testing.assert_array_equal(image * numpy.iinfo(pixels.dtype).max, numpy.rot90(pixels, -1))


# --- Reading masks ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('low, high, dtype', [
    (0, 255, 'uint8'), (0, 1, 'uint8'), (0, 38, 'uint8'), (0, 65535, 'uint16'), (0, 1, 'int32'), (0, 1, 'float32'),
    (0, 0, 'uint8'), (255, 255, 'uint8')])
def test_masks_are_binary_however_they_are_stored(tmp_path, low, high, dtype):
    pixels = numpy.where(GREY > 100, high, low).astype(dtype)
    mask = read_mask(write(tmp_path / 'x.tif', pixels))
    assert mask.dtype == numpy.uint8
    numpy.testing.assert_array_equal(mask, pixels != 0)


def test_1_bit_palette_and_coloured_masks(tmp_path):
    truth = GREY > 100
    palette = Image.fromarray(truth.astype(numpy.uint8)).convert('P')
    palette.putpalette(bytes([0, 0, 0, 128, 0, 0]))
    backwards = Image.fromarray((~truth).astype(numpy.uint8)).convert('P')      # the colour counts, not its number
    backwards.putpalette(bytes([255, 255, 255, 0, 0, 0]))
    red = truth[..., None] * numpy.array([255, 0, 0], numpy.uint8)
    for number, pixels in enumerate([truth, palette, backwards, red]):
        numpy.testing.assert_array_equal(read_mask(write(tmp_path / f'{number}.png', pixels)), truth)


def test_masks_with_more_values_are_refused_with_the_way_out(tmp_path):
    truth = disc(40, 50, 20, 25, 12)
    jpeg = write(tmp_path / 'x.jpg', truth)
    with pytest.raises(DataError) as error:
        read_mask(jpeg)
    message(error, jpeg, 'values', '--mask-threshold N', '128')
    numpy.testing.assert_array_equal(read_mask(jpeg, threshold=128), truth > 0)

    with pytest.raises(DataError) as error:
        read_mask(write(tmp_path / 'x.png', numpy.array([[100, 200]], numpy.uint8)))
    message(error, tmp_path / 'x.png', '100, 200')
    numpy.testing.assert_array_equal(read_mask(tmp_path / 'x.png', threshold=200), [[0, 1]])
    numpy.testing.assert_array_equal(read_mask(tmp_path / 'x.png', threshold=100), [[1, 1]])


@pytest.mark.parametrize('values, positives', [
    ([0, 1, 2], [1, 2]), ([1, 2], [2]), ([120, 163], [163]), ([0, 3, 250, 255], [250, 255]), ([7, 8, 9], [8, 9]),
    ([254, 255], [255]), ([0, 1, 2, 3], [1, 2, 3]),
    ([0.0, 0.25, 1.0], [1.0]), ([0.5, 1.0], [1.0]), ([300, 60000], [60000]), (list(range(256)), list(range(128, 256)))])
def test_the_threshold_that_the_error_suggests_works(tmp_path, values, positives):
    dtype = 'float32' if isinstance(values[0], float) else 'uint16' if max(values) > 255 else 'uint8'
    pixels = numpy.array([values, values[::-1]], dtype)
    path = write(tmp_path / 'x.tif', pixels)
    with pytest.raises(DataError) as error:
        read_mask(path)
    threshold = float(re.search('--mask-threshold N, for example ([0-9.]+)', str(error.value))[1])
    numpy.testing.assert_array_equal(read_mask(path, threshold), numpy.isin(pixels, positives))


def test_no_threshold_is_suggested_where_none_works(tmp_path):
    with pytest.raises(DataError) as error:
        read_mask(write(tmp_path / 'x.tif', numpy.array([[-3, -2, 0]], numpy.int32)))
    assert 'for example' not in message(error, '-3, -2, 0', 'or save it with 0 as background')


def indexed(numbers, colours):
    """Return an image of palette numbers."""
    image = Image.frombytes('P', numbers.shape[::-1], numbers.astype(numpy.uint8).tobytes())
    image.putpalette(bytes(colours))
    return image


def test_a_palette_that_shows_nothing_is_read_by_its_numbers_as_a_mask_and_refused_as_an_image(tmp_path):
    truth = GREY > 100
    alike = [40, 40, 40] * 2
    for number, (colours, suffix) in enumerate([([0, 0, 0], 'png'), ([0] * 768, 'tif'), (alike, 'png'), ([0, 0, 0], 'tif')]):
        path = write(tmp_path / f'{number}.{suffix}', indexed(truth, colours))
        numpy.testing.assert_array_equal(read_mask(path), truth)
        with pytest.raises(DataError, match='its palette has one grey for all of its 2 colours; save it as grey'):
            read_image(path)
    for numbers, colours in ((truth * 0, [0] * 6), (truth * 0 + 1, [0] * 6)):                # all empty, all full
        numpy.testing.assert_array_equal(read_mask(write(tmp_path / 'x.png', indexed(numbers, colours))), numbers)
    for level in (0, 255):                                                                   # one colour, and it shows
        path = write(tmp_path / 'x.png', indexed(truth * 0, [level] * 3))
        assert (read_mask(path) == (level > 0)).all()
    with pytest.raises(DataError, match='x.png: cannot be read as an image .its colours 0, 1 are all black'):
        read_mask(write(tmp_path / 'x.png', indexed(GREY // 100, [0] * 6 + [128, 0, 0])))


def test_labels_that_only_a_dark_colour_or_transparency_tells_apart_are_read(tmp_path):
    truth = GREY > 100
    blue = truth[..., None] * numpy.array([0, 0, 1], numpy.uint8)
    numpy.testing.assert_array_equal(read_mask(write(tmp_path / 'blue.png', blue)), truth)
    numpy.testing.assert_array_equal(read_mask(write(tmp_path / 'p.png', indexed(truth, [0, 0, 0, 0, 0, 2]))), truth)
    alpha = Image.fromarray(truth.astype(numpy.uint8) * 255)
    for name, colour in (('black', 0), ('white', 255)):
        drawn = Image.merge('LA', [Image.new('L', alpha.size, colour), alpha])
        numpy.testing.assert_array_equal(read_mask(write(tmp_path / f'{name}.png', drawn)), truth)
    opaque = Image.merge('LA', [Image.new('L', alpha.size, 0), Image.new('L', alpha.size, 255)])
    assert not read_mask(write(tmp_path / 'empty.png', opaque)).any()


def test_sizes_that_differ_within_a_pair_are_named(tmp_path):
    image, mask = write(tmp_path / 'x.png', GREY), write(tmp_path / 'x_mask.png', GREY.T // 128)
    with pytest.raises(DataError) as error:
        read_pair(Sample('x', 'x', image, (mask,)))
    message(error, mask, '5×6', 'x.png is 6×5')
    with pytest.raises(DataError) as error:
        read_pair(Sample('x', 'x', image, None))
    message(error, image, 'has no mask')


def marked(path, pixels, mark):
    exif = Image.Exif()
    exif[274] = mark
    return write(path, pixels, exif=exif)


def test_orientation_marks_that_differ_within_a_pair_are_named(tmp_path):
    square = numpy.eye(6, dtype=numpy.uint8)

    def pair(pixels, image_mark, mask_mark):
        return Sample('x', 'x', marked(tmp_path / 'x.png', pixels, image_mark), (marked(tmp_path / 'x_mask.png', pixels, mask_mark),))

    with pytest.raises(DataError) as error:
        read_pair(pair(GREY // 232, 6, 1))
    message(error, 'x_mask.png', 'turned against its image', 'they are 1 and 6', 'save both upright')
    oblong = GREY // 232
    for pixels, image_mark, mask_mark, is_odd in ((oblong, 1, 1, False), (oblong, 3, 3, False), (oblong, 3, 1, True),
                                                  (oblong, 1, 2, True), (square, 6, 1, True), (square, 6, 6, False),
                                                  (oblong, 6, 8, True)):
        sample = pair(pixels, image_mark, mask_mark)
        assert ('turned' in mask_oddity(sample, read_pair(sample)[1])) == is_odd
    sample = Sample('x', 'x', marked(tmp_path / 'x.png', GREY, 6), (write(tmp_path / 'x_mask.png', numpy.rot90(GREY // 232, -1)),))
    assert mask_oddity(sample, read_pair(sample)[1]) == '', 'a mask drawn on the upright image'


def test_odd_masks_and_intensities_are_found_and_named(tmp_path, rng):
    samples, reader = find_samples(kaggle(tmp_path, rng, subjects=6)), Reader(SIZE)
    assert data_warning(samples, reader, *intensity_statistics(samples, reader)) == ''
    for sample in samples[:2]:
        write(sample.mask_paths[0], 255 - 255 * read_mask(sample.mask_paths[0]))
    write(samples[5].image_path, rng.integers(0, 4096, (10, 14), dtype=numpy.uint16))
    reader = Reader(SIZE)
    masks, images = data_warning(samples, reader, *intensity_statistics(samples, reader)).splitlines()
    assert masks.startswith('WARNING: 2 of 18 masks are foreground for more than half') and masks.endswith(': 1_1, 1_2')
    assert images.startswith('WARNING: 1 of 18 images are much darker than the others') and images.endswith(': 2_3')


def test_intensities_are_far_beyond_one_and_a_half_deviations_or_a_factor_of_three(rng):
    image = rng.normal(0.4, 0.2, (40, 50)).astype('float32')
    for scale, shift, words in ((1, 0, ''), (0.5, 0.1, ''), (2, -0.3, ''), (1 / 16, 0, 'much darker'), (1, -0.35, 'much darker'),
                                (1, 0.35, 'much brighter'), (0.2, 0.32, 'much flatter'), (4, -1.2, 'much richer in contrast')):
        assert intensity_oddity(image * scale + shift, 0.4, 0.2) == words
    said = oddity_warning('images', list('abcdef'), ['', 'x', 'y', 'x', 'x', 'x'])
    assert said == 'WARNING: 4 of 6 images are x: b, d, e and 1 more\nWARNING: 1 of 6 images are y: c'


# --- Files that are broken --------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name, options', [('x.png', {}), ('x.jpg', {}), ('x.bmp', {}), ('x.tif', {}), ('x.tif', LZW)])
def test_a_truncated_file_is_refused_or_read_whole(tmp_path, rng, name, options):
    path = write(tmp_path / name, rng.integers(0, 256, (40, 30), dtype=numpy.uint8), **options)
    whole, content = read_image(path), path.read_bytes()
    for length in [*range(0, len(content), len(content) // 40), *range(len(content) - 24, len(content))]:
        path.write_bytes(content[:length])
        if length < len(content) - 24:
            with pytest.raises(DataError) as error:
                read_image(path)
            message(error, path, 'cannot be read as an image')
        else:                                                                   # a trailer holds no pixels
            try:
                numpy.testing.assert_array_equal(read_image(path), whole)
            except DataError:
                pass


@pytest.mark.parametrize('content', [b'not an image at all', b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n',
                                     b'P5 2 2 255\n\1\2\3\4'])
def test_other_content_under_an_image_name_is_refused(tmp_path, content):
    (tmp_path / 'x.png').write_bytes(content)
    with pytest.raises(DataError) as error:
        read_image(tmp_path / 'x.png')
    message(error, tmp_path / 'x.png', 'cannot be read as an image')


def test_missing_files_and_folders_in_place_of_files(tmp_path):
    with pytest.raises(DataError, match='No such file'):
        read_image(tmp_path / 'x.png')
    with pytest.raises(DataError):
        read_image(tmp_path)


def test_a_file_of_several_pages_is_refused(tmp_path):
    pages = [Image.fromarray(GREY), Image.fromarray(GREY[::-1])]
    for name, options in (('x.tif', {}), ('x.png', {})):
        path = write(tmp_path / name, pages[0], save_all=True, append_images=pages[1:], **options)
        for read in (read_image, read_mask):
            with pytest.raises(DataError) as error:
                read(path)
            message(error, path, '2 frames')


@pytest.mark.parametrize('limit', [10, 29])                                     # Pillow warns, or raises
def test_an_image_beyond_the_limit_of_pixels_is_refused(tmp_path, monkeypatch, limit):
    path = write(tmp_path / 'x.png', GREY)
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', limit)
    with pytest.raises(DataError) as error:
        read_image(path)
    message(error, path, f'has more than {limit} pixels', 'make it smaller')
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 30)
    read_image(path)


def test_the_first_picture_of_a_phone_is_read(tmp_path):
    second = Image.new('L', (16, 12))
    path = tmp_path / 'phone.jpg'
    Image.new('L', (40, 30), 200).convert('RGB').save(path, format='MPO', save_all=True, append_images=[second.convert('RGB')])
    image = read_image(path)
    assert image.shape == (30, 40) and abs(image - 200 / 255).max() < 0.01


def test_a_stack_that_imagej_wrote_as_one_page_is_refused(tmp_path):
    for note, number in (('ImageJ=1.53t\nimages=12\nslices=12\n', 12), ('ImageJ=1.53t\nimages=1\n', 1), ('12 images=7', 1)):
        path = write(tmp_path / 'x.tif', GREY, tiffinfo={270: note})
        if number == 1:
            read_image(path)
        else:
            with pytest.raises(DataError) as error:
                read_image(path)
            message(error, path, 'holds 12 pages', 'one file per page')


# --- Resizing ---------------------------------------------------------------------------------------------------------

def test_resizing_keeps_a_constant_the_range_and_the_mean(rng):
    assert (resize(numpy.full((42, 58), 0.3, numpy.float32), (10, 13)) == numpy.float32(0.3)).all()
    image = rng.random((420, 580), dtype=numpy.float32)
    for size in ((96, 128), (7, 500), (640, 600)):
        small = resize(image, size)
        assert small.shape == size and small.dtype == numpy.float32 and small.min() >= 0 and small.max() <= 1
        assert abs(small.mean() - 0.5) < 0.01
    assert resize(image, (420, 580)) is image


def test_shrinking_averages_and_does_not_alias(rng):
    stripes = numpy.tile(numpy.float32([0, 1]), (64, 32))                       # every second column white
    shrunk = resize(stripes, (16, 16))
    assert abs(shrunk[:, 1:-1] - 0.5).max() < 0.13                              # single pixels would give 0 or 1
    noise = rng.standard_normal((400, 400)).astype(numpy.float32)
    assert resize(noise, (100, 100)).std() < 0.3


def test_a_resized_mask_is_binary_keeps_its_area_and_lies_where_the_image_shows_it():
    for size in ((96, 128), (50, 300), (600, 700)):
        mask = disc(420, 580, 180, 330, 70) // 255
        small = resize_mask(mask, size)
        assert small.dtype == numpy.uint8 and set(numpy.unique(small)) == {0, 1}
        assert abs(small.mean() / mask.mean() - 1) < 0.02
        rows, columns = numpy.nonzero(small)
        assert abs((rows.mean() + 0.5) / size[0] - 180.5 / 420) < 0.002
        assert abs((columns.mean() + 0.5) / size[1] - 330.5 / 580) < 0.002
        numpy.testing.assert_array_equal(small, resize(mask.astype(numpy.float32), size) >= 0.5)


def test_a_pixel_that_is_half_foreground_is_foreground():
    mask = numpy.array([[1, 0, 1, 0], [0, 1, 0, 0]], numpy.uint8)
    shrunk = resize(mask[:, :2].astype(numpy.float32), (1, 1))
    assert shrunk == 0.5 and resize_mask(mask[:, :2], (1, 1)) == 1
    assert resize_mask(mask[:, 2:], (1, 1)) == 0


# --- Reader, statistics, loader ---------------------------------------------------------------------------------------

SIZE = (8, 12)


@pytest.fixture
def samples(tmp_path, rng):
    return find_samples(kaggle(tmp_path, rng))


def everything(loader, number=0):
    batches = list(loader.epoch(number))
    return [numpy.concatenate(side) for side in zip(*batches)]


def test_batches_have_the_promised_shapes_values_and_order(samples):
    loader = Loader(samples, Reader(SIZE), batch_size=5)
    batches = list(loader.epoch(0))
    assert [len(images) for images, _ in batches] == [5, 5, 2] and len(loader) == 3          # the short batch is kept
    for images, masks in batches:
        assert images.shape[1:] == masks.shape[1:] == (*SIZE, 1) and images.dtype == masks.dtype == numpy.float32
        assert images.min() >= 0 and images.max() <= 1 and set(numpy.unique(masks)) <= {0, 1}
    images, masks = everything(loader)
    for sample, image, mask in zip(samples, images, masks):
        expected = resize(read_image(sample.image_path), SIZE)
        numpy.testing.assert_allclose(image[..., 0], expected, rtol=0, atol=0.51 / 65535)
        numpy.testing.assert_array_equal(mask[..., 0], resize_mask(read_mask(sample.mask_paths[0]), SIZE))


def test_8_and_16_bit_grey_pass_through_the_reader_unchanged(tmp_path):
    for name, levels, dtype in (('8.png', 256, 'uint8'), ('16.png', 65536, 'uint16')):
        pixels = numpy.arange(levels).astype(dtype).reshape(-1, 64)
        image = write(tmp_path / name, pixels)
        sample = Sample(name, name, image, (write(tmp_path / f'{name}_mask.png', numpy.zeros(pixels.shape, numpy.uint8)),))
        (images, _), = Loader([sample], Reader(pixels.shape), 1).epoch(0)
        numpy.testing.assert_array_equal(images[0, ..., 0], read_image(image))


def test_shuffling_follows_from_seed_and_epoch_alone(samples):
    reader = Reader(SIZE)
    ordered = everything(Loader(samples, reader, 5))[0]
    first, again, later, other = (everything(Loader(samples, reader, 5, shuffle=True, seed=seed), epoch)[0]
                                  for seed, epoch in ((1, 0), (1, 0), (1, 7), (2, 0)))
    numpy.testing.assert_array_equal(first, again)
    for images in (first, later, other):
        assert sorted(map(bytes, images)) == sorted(map(bytes, ordered))                    # every sample exactly once
    assert len({bytes(images) for images in (ordered, first, later, other)}) == 4


def noisy(images, masks, rngs):
    assert images.shape == masks.shape == (len(rngs), *SIZE, 1) and images.dtype == masks.dtype == numpy.float32
    noise = numpy.stack([rng.normal(0, 0.1, images.shape[1:]) for rng in rngs])
    return numpy.clip(images + noise, 0, 1), masks[:, :, ::-1]


def test_reading_ahead_and_remembering_change_no_result(samples):
    results = [everything(Loader(samples, Reader(SIZE, cache_bytes=cache_bytes), 5, seed=3, shuffle=True,
                                 transform=noisy, read_ahead=read_ahead), number=4)
               for read_ahead in (0, 1, 2, 10) for cache_bytes in (0, 1000, 2**30)]
    for images, masks in results[1:]:
        numpy.testing.assert_array_equal(images, results[0][0])
        numpy.testing.assert_array_equal(masks, results[0][1])


def test_the_randomness_of_a_sample_follows_from_seed_epoch_and_index(samples):
    loader = Loader(samples, Reader(SIZE), 5, seed=3, shuffle=True, transform=mark)
    for epoch in (0, 1):
        marks = everything(loader, epoch)[0][:, 0, 0, 0]
        expected = [numpy.random.default_rng([3, epoch, index, 1]).random() for index in loader.order(epoch)]
        numpy.testing.assert_array_equal(marks, numpy.float32(expected))
        assert numpy.float32(numpy.random.default_rng([3, epoch]).random()) not in marks    # the shuffle's own stream


def mark(images, masks, rngs):
    """Fill each image with one draw of its generator."""
    return numpy.stack([numpy.full_like(image, rng.random()) for image, rng in zip(images, rngs)]), masks


def with_foreground(samples, indices):
    """Return samples of which only those at `indices` have a mask that holds foreground."""
    for index, sample in enumerate(samples):
        mask = numpy.zeros_like(read_mask(sample.mask_paths[0]))
        mask[2:20, 2:20] = index in indices
        write(sample.mask_paths[0], 255 * mask)
    return samples


def test_positive_share_is_the_share_of_drawn_samples_with_foreground_and_keeps_the_length_of_an_epoch(samples):
    reader = Reader(SIZE)
    with_foreground(samples, {1, 4, 10})
    numpy.testing.assert_array_equal(numpy.flatnonzero(holds_foreground(samples, reader)), [1, 4, 10])
    for share, positives in (0.5, 6), (0.0, 0), (1.0, 12), (0.6, 7):
        loader = Loader(samples, reader, 5, seed=1, shuffle=True, positive_share=share)
        assert [len(masks) for _, masks in loader.epoch(3)] == [5, 5, 2]
        assert everything(loader, 3)[1].any(axis=(1, 2, 3)).sum() == positives
    orders = [loader.order(epoch).tolist() for epoch in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    for order in orders:
        counts = [order.count(index) for index in (1, 4, 10)]
        assert sorted(counts) == [2, 2, 3] and len(set(order)) == 3 + 5
    assert len({index for epoch in range(20) for index in loader.order(epoch)}) == 12, 'those left out are others each epoch'


def test_a_sample_drawn_twice_in_an_epoch_is_augmented_in_two_ways(samples):
    loader = Loader(with_foreground(samples, {1, 4}), Reader(SIZE), 5, shuffle=True, positive_share=1.0, transform=mark)
    assert set(loader.order(0)) == {1, 4} and len(set(everything(loader)[0][:, 0, 0, 0])) == 12


def test_positive_share_refuses_what_cannot_be(samples):
    reader = Reader(SIZE)
    with pytest.raises(ValueError, match='positive_share is 0.5 and shuffle False'):
        Loader(samples, reader, 5, positive_share=0.5)
    with pytest.raises(ValueError, match='positive_share is 1.5'):
        Loader(samples, reader, 5, shuffle=True, positive_share=1.5)
    with_foreground(samples, set())
    with pytest.raises(DataError, match='6 of 12 training images are to be with foreground, and there are none'):
        Loader(samples, Reader(SIZE), 5, shuffle=True, positive_share=0.5)


def test_a_transform_cannot_spoil_what_the_reader_remembers(samples):
    def wipe(images, masks, rngs):
        images[:], masks[:] = 0.5, 1
        return images, masks

    reader = Reader(SIZE)
    before = everything(Loader(samples, reader, 5))
    everything(Loader(samples, reader, 5, transform=wipe))
    for old, new in zip(before, everything(Loader(samples, reader, 5))):
        numpy.testing.assert_array_equal(old, new)


def test_small_sets_are_read_once_and_large_ones_stay_within_the_budget(samples, monkeypatch):
    reads = []
    monkeypatch.setattr(reading, 'read_image', lambda path, *rest: reads.append(path) or read_image(path, *rest))
    bytes_per_sample = 8 * 12 * 3
    for cache_bytes, expected in ((2**30, 12), (bytes_per_sample * 5 + 7, 12 + 2 * 7), (0, 36)):
        reads.clear()
        reader = Reader(SIZE, cache_bytes=cache_bytes)
        intensity_statistics(samples, reader)
        for epoch in (0, 1):
            everything(Loader(samples, reader, 5, shuffle=True), epoch)
        assert len(reads) == expected
        assert sum(array.nbytes for pair in reader.cache.values() for array in pair) <= cache_bytes


def test_each_image_is_filtered_once_within_the_budget_of_its_reader(samples):
    calls = []

    def function(image):
        calls.append(1)
        return median_filter(image, 3)

    bytes_per_sample = 8 * 12 * 3
    for cache_bytes, expected in ((2**30, 12), (bytes_per_sample * 5 + 7, 12 + 2 * 7), (0, 36)):
        calls.clear()
        inner = Reader(SIZE, cache_bytes=cache_bytes)
        reader = Filtered(inner, function)
        for epoch in range(3):
            images, masks = everything(Loader(samples, reader, 5, shuffle=True, seed=1), epoch)
        assert len(calls) == expected and not inner.cache
        assert sum(array.nbytes for pair in reader.cache.values() for array in pair) <= cache_bytes
    plain_images, plain_masks = everything(Loader(samples, Reader(SIZE), 5, shuffle=True, seed=1), 2)
    numpy.testing.assert_array_equal(masks, plain_masks)
    numpy.testing.assert_array_equal(images[3, ..., 0], median_filter(plain_images[3, ..., 0], 3))


def test_intensity_statistics_are_those_of_all_pixels(samples):
    reader = Reader(SIZE)
    pixels = everything(Loader(samples[:7], reader, 5))[0].astype(numpy.float64)
    mean, std = intensity_statistics(samples[:7], reader)
    assert abs(mean - pixels.mean()) < 1e-7 and abs(std - pixels.std()) < 1e-7
    assert intensity_statistics(samples[7:], reader) != (mean, std)


def test_intensity_statistics_refuse_what_has_none(tmp_path):
    black = write(tmp_path / 'x.png', 0 * GREY)
    with pytest.raises(DataError, match='1 images of one and the same grey'):
        intensity_statistics([Sample('x', 'x', black, (black,))], Reader((6, 5)))
    with pytest.raises(DataError, match='0 images'):
        intensity_statistics([], Reader((6, 5)))


def test_the_mask_threshold_reaches_the_files(tmp_path):
    image = write(tmp_path / 'x.png', GREY)
    sample = Sample('x', 'x', image, (image,))
    with pytest.raises(DataError, match='--mask-threshold'):
        list(Loader([sample], Reader((6, 5)), 1).epoch(0))
    (_, masks), = Loader([sample], Reader((6, 5), MaskRule(threshold=100)), 1).epoch(0)
    numpy.testing.assert_array_equal(masks[0, ..., 0], GREY >= 100)


def loader_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith('background')]


def test_an_error_in_the_background_reaches_the_caller_as_itself_and_in_its_place(samples):
    samples[8].image_path.write_bytes(b'damaged')
    loader, received = Loader(samples, Reader(SIZE), 3, read_ahead=5), []
    with pytest.raises(DataError) as error:
        for images, _ in loader.epoch(0):
            received.append(len(images))
    message(error, samples[8].image_path)
    assert received == [3, 3] and not loader_threads()

    def fail(images, masks, rngs):
        raise ZeroDivisionError('from the transform')

    with pytest.raises(ZeroDivisionError, match='from the transform'):
        list(Loader(samples, Reader(SIZE), 3, transform=fail).epoch(0))


def test_an_abandoned_epoch_leaves_no_thread(samples):
    loader = Loader(samples, Reader(SIZE), 2)
    for _ in loader.epoch(0):
        assert loader_threads()
        break
    assert not loader_threads()

    with pytest.raises(KeyboardInterrupt):
        for _ in loader.epoch(0):
            raise KeyboardInterrupt
    assert not loader_threads()

    list(loader.epoch(0))
    assert not loader_threads()


def test_reading_ahead_is_bounded_and_waiting_is_measured(samples):
    started = []

    def slow(images, masks, rngs):
        started.append(1)
        time.sleep(0.01)
        return images, masks

    loader = Loader(samples, Reader(SIZE), 1, transform=slow, read_ahead=2)
    epoch = loader.epoch(0)
    next(epoch)
    time.sleep(0.1)
    assert len(started) == 3                                                    # the batch in hand and two ahead
    waited = loader.waited_seconds
    assert waited >= 0.01
    next(epoch)                                                                 # was ready
    assert loader.waited_seconds - waited < 0.01
    epoch.close()
    list(loader.epoch(1))
    assert loader.waited_seconds >= 0.05                                        # nobody computes: all waiting
    loader.transform = None
    list(loader.epoch(2))
    assert loader.waited_seconds < 0.05                                         # of this epoch alone


def test_a_loader_needs_samples_and_a_batch_size(samples):
    with pytest.raises(DataError, match='no samples'):
        Loader([], Reader(SIZE), 4)
    with pytest.raises(ValueError, match='batch_size is 0'):
        Loader(samples, Reader(SIZE), 0)


# --- Real files -------------------------------------------------------------------------------------------------------

@pytest.mark.skipif(not REAL.is_dir(), reason=f'the real images are not in {REAL}')
def test_real_files():
    samples = find_samples(REAL / 'kaggle_original')
    assert len(samples) == 60 and {sample.subject for sample in samples} == {'1', '2', '7', '8', '9', '11', '13'}
    pairs = [read_pair(sample) for sample in samples]
    assert all(image.shape == mask.shape == (420, 580) and mask.max() <= 1 for image, mask in pairs)
    areas = sorted(int(mask.sum()) for _, mask in pairs if mask.any())
    assert len(areas) == 23 and 2684 <= areas[0] and areas[-1] <= 17439
    assert len(find_samples(REAL / 'kaggle_original' / 'test', masks='none')) == 24

    samples = find_samples(REAL / 'nerve')
    assert len(samples) == 1940 and len({sample.subject for sample in samples}) == 37
    image, mask = read_pair(samples[0])
    assert image.shape == mask.shape == (139, 192) and mask.any()
