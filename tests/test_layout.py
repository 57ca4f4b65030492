"""Data sets as their publishers ship them: found, read, trained on and predicted with the options that say what they look like."""

import csv
import importlib.util
import json
from pathlib import Path

import numpy
import pytest
from PIL import Image

import nervenet
from helpers import TINY
from nervenet.images.data import Reader, holds_foreground
from nervenet.images.layout import MaskNames
from nervenet.images.reading import MaskRule, fill_outlines, is_outline, read_mask, read_pair
from nervenet.images.samples import DataError, Sample, describe, find_samples, likely_subjects, on_both_sides, own_subjects, subject_warning

SIZE = 24, 36


def drawn(rng):
    """Return (grey (H, W) uint8, mask (H, W) bool): a bright disc on noise."""
    rows, columns = numpy.mgrid[:SIZE[0], :SIZE[1]]
    mask = (rows - rng.uniform(8, 16))**2 + (columns - rng.uniform(8, 28))**2 < 36
    return (60 + 100 * mask + 30 * rng.random(SIZE)).astype('uint8'), mask


def outline(mask):
    """Return the pixels of a mask that lie at its edge."""
    inner = numpy.pad(mask, 1)
    return mask & ~(inner[:-2, 1:-1] & inner[2:, 1:-1] & inner[1:-1, :-2] & inner[1:-1, 2:])


def write(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels.astype('uint8'))
    image.save(path, quality=95)


def labelled(mask, other, number=2):
    """Return an image of a palette: class `number` where `mask`, another where `other`."""
    numbers = numpy.where(mask, number, numpy.where(other, 3 - number, 0)).astype('uint8')
    image = Image.frombytes('P', numbers.shape[::-1], numbers.tobytes())
    image.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
    return image


def lesions(folder, rng):
    """Breast lesions: a folder for each kind, the second lesion of an image in a file of its own."""
    for kind in 'benign', 'malignant', 'normal':
        for number in 1, 2, 10:
            grey, mask = drawn(rng)
            write(folder / kind / f'{kind} ({number}).png', grey)
            write(folder / kind / f'{kind} ({number})_mask.png', 255 * mask * (kind != 'normal'))
        write(folder / kind / f'{kind} (2)_mask_1.png', 255 * drawn(rng)[1] * (kind != 'normal'))
    return ['--data', folder], []


def two_folders(folder, rng):
    """Thyroid nodules: two folders of any name, JPEG masks that are not quite black and white, a subject in each name."""
    for subject in 9, 10, 104:
        for number in 1, 2, 3:
            grey, mask = drawn(rng)
            write(folder / 'thyroid-image' / f'{subject}_{number}.jpg', grey)
            write(folder / 'thyroid-mask' / f'{subject}_{number}.jpg', 255 * mask)
    where = ['--images', folder / 'thyroid-image', '--masks', folder / 'thyroid-mask']
    return [*where, '--mask-threshold', 128, '--subject-pattern', '(.+)_[0-9]+'], where[2:]


def patients(folder, rng):
    for patient in 'P1', 'P2', 'P3':
        for number in 1, 2, 3:
            grey, mask = drawn(rng)
            write(folder / patient / 'left' / f'{number}.png', grey)
            write(folder / patient / 'left' / f'{number}_mask.bmp', 255 * mask)
    return ['--data', folder, '--subject-from', 'folder'], []


def in_two_folders_each(folder, rng, images, masks):
    for patient in 'P1', 'P2', 'P3':
        for number in 1, 2, 3:
            grey, mask = drawn(rng)
            write(folder / patient / images / f'{number}.png', grey)
            write(folder / patient / masks / f'{number}.png', mask)
    return ['--data', folder, '--subject-from', 'folder']


def patients_with_images_and_masks(folder, rng):
    return in_two_folders_each(folder, rng, 'images', 'masks'), []


def labels_in_a_folder_beside(folder, rng):
    return [*in_two_folders_each(folder, rng, 'us', 'seg'), '--mask-pattern', '../seg/{image}'], []


def heads(folder, rng):
    """Fetal heads: annotations that are a closed thin line."""
    for number in range(9):
        grey, mask = drawn(rng)
        write(folder / f'{number:03}_HC.png', grey)
        write(folder / f'{number:03}_HC_Annotation.png', 255 * outline(mask))
    return ['--data', folder, '--mask-pattern', '{image}_Annotation', '--fill-outlines'], []


def masks_of_another_format(folder, rng):
    for number in range(9):
        grey, mask = drawn(rng)
        write(folder / f'{number % 3}_{number}.jpg', grey)
        write(folder / f'{number % 3}_{number}.png', mask)
    return ['--data', folder, '--mask-pattern', '{image}.png'], []


def classes(folder, rng):
    for number in range(9):
        grey, mask = drawn(rng)
        write(folder / f'{number % 3}_{number}.png', grey)
        write(folder / f'{number % 3}_{number}_mask.png', labelled(mask, numpy.arange(SIZE[1]) < 3))
    return ['--data', folder, '--label', 2], []


def table(folder, rng):
    rows = ['image,subject']
    for number in range(9):
        grey, mask = drawn(rng)
        write(folder / 'images' / f'scan{number}.png', grey)
        write(folder / 'masks' / f'scan{number}.png', mask)
        rows.append(f'scan{number}.png,Person {number % 3}')
    (folder / 'subjects.csv').write_text('\n'.join(rows))
    return ['--data', folder, '--subjects', folder / 'subjects.csv'], []


def some_without_mask(folder, rng):
    for number in range(9):
        grey, mask = drawn(rng)
        write(folder / f'{number % 3}_{number}.png', grey)
        if number > 2:
            write(folder / f'{number % 3}_{number}_mask.png', mask)
    return ['--data', folder, '--no-mask-is-empty'], ['--no-mask-is-empty']


PUBLISHED = [lesions, two_folders, patients, patients_with_images_and_masks, labels_in_a_folder_beside, heads, masks_of_another_format, classes,
             table, some_without_mask]


@pytest.fixture
def predict():
    specification = importlib.util.spec_from_file_location('predict', Path(__file__).parents[1] / 'examples' / 'predict.py')
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return lambda *arguments: module.main([*map(str, arguments)])


@pytest.mark.parametrize('published', PUBLISHED, ids=lambda function: function.__name__)
def test_data_train_and_are_predicted_as_published(published, tmp_path, rng, main, predict, capsys):
    options, again = published(tmp_path / 'data', rng)
    main(*options, *TINY, '--epochs', 1, '--validation-share', 0.34, '--out', tmp_path / 'run')
    said = capsys.readouterr().out
    assert 'found:       9 images with ' in said
    config = json.loads((tmp_path / 'run' / 'config.json').read_text())
    assert config['training_images'] + config['validation_images'] == 9
    assert ('masks, 3 subjects' in said) == ('no subject is known' not in said)

    # Prediction reads the masks as training did, says how many it scores, and predicts no mask.
    assert predict('--model', tmp_path / 'run' / 'last.npz', '--input', options[1], '--output', tmp_path / 'out', *again) == 0
    said = capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / 'out' / 'results.csv').read_text().splitlines()))
    assert len(rows) == 9 and all(row['dice'] for row in rows)
    assert f'{config["training_images"]} of 9 are of subjects' in said or 'no subject' in said or 'flattered' in said
    for row in rows:
        assert read_mask(tmp_path / 'out' / f'{row["image"]}_mask.png').shape == SIZE


def test_the_masks_of_published_sets_are_the_regions(tmp_path, rng):
    state = rng.bit_generator.state
    truths = [drawn(rng)[1] for _ in range(9)]
    for published, rule, options in ((heads, MaskRule(fill_outlines=True), {'mask_pattern': '{image}_Annotation'}), (classes, MaskRule(label=2), {}),
                                     (masks_of_another_format, MaskRule(), {'mask_pattern': '{image}.png'})):
        rng.bit_generator.state = state
        published(tmp_path / published.__name__, rng)
        samples = sorted(find_samples(tmp_path / published.__name__, **options), key=lambda sample: sample.image_path.stem.replace('_', '')[-1 - 2 * (published is heads):])
        assert len(samples) == 9
        for sample in samples:
            number = int(sample.name[:3]) if published is heads else int(sample.name[2:])
            numpy.testing.assert_array_equal(read_pair(sample, rule)[1], truths[number])


# --- What belongs together --------------------------------------------------------------------------------------------

@pytest.mark.parametrize('pattern, name, suffix, is_same, image', [
    (None, 'a_mask', '.png', False, 'a'), (None, 'a_MASK-2', '.png', False, 'a'), (None, 'a', '.png', True, 'a'), (None, 'a', '.png', False, None),
    (None, 'a_masks', '.png', False, None), (None, '1_10_mask', '.png', False, '1_10'), (None, 'b_mask', '.png', True, None),
    ('{image}_seg*', 'a_seg', '.tif', False, 'a'), ('{image}_seg*', 'a_seg_left 2', '.tif', False, 'a'), ('{image}_seg', 'a_seg_2', '.tif', False, None),
    ('{image}*', '1_10', '.png', False, None), ('{image}*', '1_1x', '.png', False, '1_1'), ('mask-{image}', 'Mask-a', '.png', False, 'a'),
    ('{image}.png', 'a', '.png', False, 'a'), ('{image}.png', 'a', '.jpg', False, None), ('{image}_L?', 'a_l2', '.jpg', False, 'a'),
    ('{image}_*', 'a_b_seg', '.png', False, 'a_b'), ('{image}_(gt)', 'a_(gt)', '.jpg', False, 'a'), ('../x/{image}_y.tif', 'a_y', '.tif', False, 'a')])
def test_what_a_mask_is_called(pattern, name, suffix, is_same, image):
    images = {'a', 'a_b', '1_1', '1_10'} - ({name} if not is_same and name == '1_10' else set())
    assert MaskNames(pattern).image_of(name, suffix, images.__contains__, is_same) == image


@pytest.mark.parametrize('pattern', ['mask', '{image}/x', '*_{image}', '{image}_{image}', '*/{image}'])
def test_a_pattern_that_names_no_mask_is_refused(tmp_path, pattern):
    with pytest.raises(DataError, match="expected {image} once.*'{image}_mask\\*'"):
        find_samples(tmp_path, mask_pattern=pattern)


def test_the_pattern_that_would_fit_is_proposed(tmp_path, rng):
    heads(tmp_path / 'heads', rng)
    with pytest.raises(DataError, match=r"if masks are called so: --mask-pattern '\{image\}_Annotation'"):
        find_samples(tmp_path / 'heads')
    for number in range(4):
        write(tmp_path / 'seg' / f'scan-{number}.png', drawn(rng)[0])
        write(tmp_path / 'seg' / f'seg_scan-{number}.png', drawn(rng)[1])
    write(tmp_path / 'seg' / 'scan-0_mask.png', drawn(rng)[1])
    with pytest.raises(DataError, match=r"; if masks are called so: --mask-pattern 'seg_\{image\}'; "):
        find_samples(tmp_path / 'seg')


def test_no_pattern_is_proposed_for_a_few_of_many(tmp_path, rng):
    for number in range(9):
        write(tmp_path / f'scan-{number}.png', drawn(rng)[0])
    write(tmp_path / 'scan-1_seg.png', drawn(rng)[1])
    with pytest.raises(DataError) as error:
        find_samples(tmp_path)
    assert '_seg' in str(error.value) and "'{image}_seg'" not in str(error.value)


def test_an_image_and_a_mask_of_one_name_are_told_apart_by_a_pattern(tmp_path, rng):
    masks_of_another_format(tmp_path, rng)
    for pattern in None, '{image}*':
        with pytest.raises(DataError, match=r"0_0.png: 0_0.jpg has the same name; keep one of the two; or if one is the mask of the other: --mask-pattern '\{image\}.png' or '\{image\}.jpg'"):
            find_samples(tmp_path, mask_pattern=pattern)


def test_all_that_lack_a_partner_are_counted_and_the_first_are_named(tmp_path, rng):
    patients(tmp_path, rng)
    for name in 'P1/left/1', 'P1/left/3', 'P2/left/2', 'P3/left/1':
        (tmp_path / f'{name}_mask.bmp').unlink()
    with pytest.raises(DataError, match=r'1.png: has no mask; .*4 of 9 images have none: P1/left/1, P1/left/3, P2/left/2 and 1 more.*--no-mask-is-empty'):
        find_samples(tmp_path)
    assert [sample.mask_paths for sample in find_samples(tmp_path, no_mask_is_empty=True)].count(()) == 4
    assert [sample.mask_paths for sample in find_samples(tmp_path, masks='optional')].count(None) == 4
    sample = find_samples(tmp_path, no_mask_is_empty=True)[0]
    assert not read_pair(sample)[1].any() and read_pair(sample)[1].shape == SIZE
    for name in 'P1/left/2', 'P3/left/2', 'P3/left/1':
        (tmp_path / f'{name}.png').unlink()
    with pytest.raises(DataError, match=r'2_mask.bmp: this mask has no image \(2 of 5 masks have none: 2_mask.bmp, 2_mask.bmp\)'):
        find_samples(tmp_path, no_mask_is_empty=True)


def test_masks_in_a_folder_of_any_name_and_inside_that_of_the_images(tmp_path, rng):
    for place in 'a', 'b/c':
        write(tmp_path / place / '1.png', drawn(rng)[0])
        write(tmp_path / 'truth' / place / '1_mask.bmp', drawn(rng)[1])
        write(tmp_path / 'truth' / place / '1.png', drawn(rng)[1])
    samples = find_samples(tmp_path, masks_folder=tmp_path / 'truth')
    assert [(sample.name, [path.relative_to(tmp_path / 'truth').as_posix() for path in sample.mask_paths]) for sample in samples] == [
        ('a/1', ['a/1.png', 'a/1_mask.bmp']), ('b/c/1', ['b/c/1.png', 'b/c/1_mask.bmp'])]
    assert find_samples(tmp_path / 'a' / '1.png', masks='optional', masks_folder=tmp_path / 'truth' / 'a')[0].mask_paths == samples[0].mask_paths
    write(tmp_path / 'numbers' / '1_1.png', drawn(rng)[0])
    write(tmp_path / 'numbers-truth' / '1_1.png', drawn(rng)[1])
    sample, = find_samples(tmp_path / 'numbers', masks_folder=tmp_path / 'numbers-truth')
    assert sample.subject == '1_1', 'in folders of any name, a number need not be a subject'
    with pytest.raises(DataError, match='a: is the folder of the images, and of --masks too; leave out --masks'):
        find_samples(tmp_path / 'a', masks_folder=tmp_path / 'b' / '..' / 'a')
    with pytest.raises(DataError, match='absent: no such folder; expected the folder of masks'):
        find_samples(tmp_path, masks_folder=tmp_path / 'absent')


def test_a_file_without_partner_in_the_folder_of_the_masks_is_named(tmp_path, rng):
    labels_in_a_folder_beside(tmp_path, rng)
    write(tmp_path / 'P2' / 'seg' / '9.png', drawn(rng)[1])
    with pytest.raises(DataError, match=r'9.png: this mask has no image \(1 of 10 masks have none: 9.png\)'):
        find_samples(tmp_path, mask_pattern='../seg/{image}')


def test_a_part_of_images_is_read_with_its_part_of_masks_alone(tmp_path, rng):
    for part, names in ('train', '123'), ('val', '45'):
        for name in names:
            write(tmp_path / 'images' / part / f'{name}.png', drawn(rng)[0])
            write(tmp_path / 'masks' / part / f'{name}.png', drawn(rng)[1])
    told = []
    val = find_samples(tmp_path / 'images' / 'val', tell=told.append)
    assert [sample.name for sample in val] == ['val/4', 'val/5'] and 'left out' not in told[0] and str(tmp_path / 'masks' / 'val') in told[0]
    assert find_samples(sorted((tmp_path / 'images' / 'val').iterdir()), masks='optional') == val
    assert len(find_samples(tmp_path)) == 5 == len(find_samples(tmp_path / 'images'))
    with pytest.raises(DataError, match='holds the masks of'):
        find_samples(tmp_path / 'masks' / 'val')


def test_a_pattern_with_a_folder_is_for_folders_called_images_too(tmp_path, rng):
    for name in '12':
        write(tmp_path / 'images' / f'{name}.png', drawn(rng)[0])
        write(tmp_path / 'labels' / f'{name}.png', drawn(rng)[1])
    for folder in tmp_path, tmp_path / 'images':
        found = find_samples(folder, mask_pattern='../labels/{image}', masks='optional')
        assert [sample.name.rpartition('/')[2] for sample in found] == ['1', '2']
    assert len(find_samples(tmp_path, mask_pattern='../labels/{image}')) == 2
    sample, = find_samples(tmp_path / 'images' / '1.png', mask_pattern='../labels/{image}', masks='optional')
    assert [path.resolve() for path in sample.mask_paths] == [tmp_path / 'labels' / '1.png']


def test_a_file_alone_is_paired_by_what_lies_around_it(tmp_path, rng):
    for place in '.', 'P1':
        write(tmp_path / 'scans' / place / 'x.png', drawn(rng)[0])
        write(tmp_path / 'truth' / place / 'x.png', drawn(rng)[1])
    (tmp_path / 'scans' / 'other').mkdir()
    for suffix in 'png', 'bmp':                              # which would be refused
        write(tmp_path / 'scans' / 'other' / f'y.{suffix}', drawn(rng)[0])
    for place in '.', 'P1':
        sample, = find_samples(tmp_path / 'scans' / place / 'x.png', masks='optional', masks_folder=tmp_path / 'truth')
        assert sample.mask_paths == (tmp_path / 'truth' / place / 'x.png',)


def test_masks_elsewhere_are_not_joined_with_masks_beside_the_images(tmp_path, rng):
    for name in '1_1', '1_1_mask':
        write(tmp_path / 'images' / f'{name}.png', drawn(rng)[0])
    write(tmp_path / 'second' / '1_1.png', drawn(rng)[1])
    told = []
    sample, = find_samples(tmp_path / 'images', masks_folder=tmp_path / 'second', tell=told.append)
    assert sample.mask_paths == (tmp_path / 'second' / '1_1.png',) and 'masks beside the images (1_1_mask.png)' in told[0]


def test_no_mask_is_dropped_in_silence(tmp_path, rng):
    """An image that the pattern takes for a mask has masks of its own: whose are they?"""
    for name in '1', '1-1', '1-2', '1-seg', '1-1-seg', '1-2-seg':
        write(tmp_path / f'{name}.png', drawn(rng)[0])
    with pytest.raises(DataError, match='1-1-seg.png: this mask has no image'):
        find_samples(tmp_path, mask_pattern='{image}-*')


def test_links_that_go_round_in_circles_end(tmp_path, rng):
    patients(tmp_path / 'data', rng)
    (tmp_path / 'data' / 'P1' / 'again').symlink_to(tmp_path / 'data')
    assert len(find_samples(tmp_path / 'data')) == 9


# --- Whom an image shows ----------------------------------------------------------------------------------------------

def subjects_of(folder, **options):
    return {sample.name: sample.subject for sample in find_samples(folder, **options)}


def test_subjects_from_a_table_by_any_form_of_the_name(tmp_path, rng):
    patients(tmp_path / 'data', rng)
    rows = ['P1/left/1,A', 'P1/left/2.png, A', 'P1/left/3,B', '2.png,C', '3,C', '1,D']
    (tmp_path / 'table.csv').write_text('﻿Bild,Wer\n' + '\n'.join(rows) + '\n\n')
    found = subjects_of(tmp_path / 'data', subjects=tmp_path / 'table.csv')
    assert found == {'P1/left/1': 'A', 'P1/left/2': 'A', 'P1/left/3': 'B', **{f'P{n}/left/{m}': who for n in (2, 3) for m, who in ((1, 'D'), (2, 'C'), (3, 'C'))}}
    for text, message in (('1,A\n2,B', r'has no row for this image \(3 of 9 such: 3.png, 3.png, 3.png\)'), ('1,A\n1,B', '1 has subject A and, in row 2, subject B'),
                          ('1;A', "row 1 is '1;A'; expected two columns"), ('1,\n', 'expected two columns')):
        (tmp_path / 'table.csv').write_text(text)
        with pytest.raises(DataError, match=message):
            find_samples(tmp_path / 'data', subjects=tmp_path / 'table.csv')
    with pytest.raises(DataError, match='none.csv: no such file'):
        find_samples(tmp_path / 'data', subjects=tmp_path / 'none.csv')
    with pytest.raises(DataError, match='give one of them'):
        find_samples(tmp_path / 'data', '(.)', subjects=tmp_path / 'none.csv')


def test_subjects_from_folders_and_from_patterns_on_names_with_folders(tmp_path, rng):
    patients(tmp_path, rng)
    assert set(subjects_of(tmp_path, subject_from='folder').values()) == {'P1', 'P2', 'P3'}
    assert set(subjects_of(tmp_path, subject_pattern=r'(.+)/').values()) == {'P1/left', 'P2/left', 'P3/left'}
    write(tmp_path / 'x.png', drawn(rng)[0])
    write(tmp_path / 'x_mask.png', drawn(rng)[1])
    with pytest.raises(DataError, match=r'x.png: --subject-from folder: this image lies in no folder .*1 of 10 such'):
        find_samples(tmp_path, subject_from='folder')
    assert {sample.subject for sample in find_samples(tmp_path, subject_from='folder', masks='optional')} == {'P1', 'P2', 'P3', 'x'}


@pytest.mark.parametrize('names, advice', [
    (['10_104', '10_105', '11_1'], r"give --subject-pattern '(.+)_[0-9]+', if that is right: it finds 2 subjects, such as 10, 11."),
    (['P1-left-1', 'P1-left-2', 'P2-left-1'], r"--subject-pattern '(.+)-[0-9]+'"), (['A/x', 'A/y', 'B/z', 'C/x', 'D/x', 'E/z'], 'give --subject-from folder, if'),
    (['benign (1)', 'benign (2)'], 'give --subject-pattern, --subject-from folder, or --subjects'), (['benign/a', 'benign/b', 'normal/c'], '--subjects with a table'), (['IMG_1', 'IMG_2'], '--subjects with a table')])
def test_what_would_say_the_subjects_is_proposed(names, advice):
    samples = [Sample(name, name, None, None) for name in names]
    assert advice in likely_subjects(samples)
    if not names[0][0].isdigit():
        assert advice in subject_warning(samples)


def test_an_official_test_part_is_validated_on_and_common_subjects_are_told(tmp_path, rng, main, capsys):
    for part, numbers in ('train', '12345'), ('test', '56'):
        for number in numbers:
            for frame in '1', '2':
                grey, mask = drawn(rng)
                write(tmp_path / part / f'{number}_{frame}.png', grey)
                write(tmp_path / part / f'{number}_{frame}_mask.png', mask)
    main('--data', tmp_path, '--test', tmp_path / 'test', *TINY, '--epochs', 1, '--out', tmp_path / 'run')
    said = capsys.readouterr().out
    assert f'images are taken from {tmp_path / "train"}' in said and 'test part:   4 images with 4 masks, 2 subjects' in said
    assert 'WARNING: 1 subjects of the test part are in the training part too: 5' in said
    assert 'WARNING: 1 subjects of the test part' in (tmp_path / 'run' / 'summary.txt').read_text()
    config = json.loads((tmp_path / 'run' / 'config.json').read_text())
    assert config['training_subjects'] == ['1', '2', '3', '4', '5'] and config['validation_subjects'] == ['5', '6']
    assert config['training_images'] == 10 and config['validation_images'] == 4
    with pytest.raises(SystemExit):
        main('--data', tmp_path, '--test', tmp_path / 'test', '--folds', 2)
    assert '--folds has no meaning with --test' in capsys.readouterr().err
    unknown = [Sample('a', 'a', None, None)]
    assert on_both_sides(unknown, unknown) == '' and own_subjects(unknown)[0].subject == 'test/a'


def test_a_run_goes_on_with_the_masks_subjects_and_test_part_it_began_with(tmp_path, rng, main, capsys):
    options, _ = two_folders(tmp_path / 'data', rng)
    two_folders(tmp_path / 'moved', rng)
    test = ['--test', tmp_path / 'moved' / 'thyroid-image', '--test-masks', tmp_path / 'moved' / 'thyroid-mask']
    main(*options, *test, *TINY, '--epochs', 1, '--what', 'nodule', '--out', tmp_path / 'run')
    main('--resume', tmp_path / 'run', '--epochs', 2)
    assert 'test part:   9 images with 9 masks, 3 subjects' in capsys.readouterr().out
    (tmp_path / 'data').rename(tmp_path / 'elsewhere')
    main('--resume', tmp_path / 'run', '--epochs', 3, '--images', tmp_path / 'elsewhere' / 'thyroid-image', '--masks', tmp_path / 'elsewhere' / 'thyroid-mask')
    config = json.loads((tmp_path / 'run' / 'config.json').read_text())
    assert config['epochs'] == 3 and config['masks'] == str(tmp_path / 'elsewhere' / 'thyroid-mask') and config['what'] == 'nodule'
    assert config['mask_threshold'] == 128 and config['validation_images'] == 9


def test_the_subjects_that_were_held_out_can_be_predicted_alone(tmp_path, rng, main, predict, capsys):
    options, _ = patients(tmp_path / 'data', rng)
    main(*options, *TINY, '--epochs', 1, '--validation-share', 0.34, '--out', tmp_path / 'run')
    held = json.loads((tmp_path / 'run' / 'config.json').read_text())['validation_subjects']
    capsys.readouterr()
    assert predict('--model', tmp_path / 'run' / 'last.npz', '--input', tmp_path / 'data', '--output', tmp_path / 'out', '--held-out') == 0
    assert 'held out: 3 of 9 images, of 1 subjects' in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / 'out' / 'results.csv').read_text().splitlines()))
    assert len(rows) == 3 and {row['image'].partition('/')[0] for row in rows} == set(held)
    # From the folder of one subject, or from single files, its images are known by it too.
    for number, given in enumerate([[tmp_path / 'data' / held[0]], sorted((tmp_path / 'data' / held[0] / 'left').glob('?.png'))]):
        assert predict('--model', tmp_path / 'run' / 'last.npz', '--input', *given, '--output', tmp_path / f'one{number}', '--held-out') == 0
        assert 'held out: 3 of 3 images, of 1 subjects' in capsys.readouterr().out
    with pytest.raises(DataError, match='none of the 3 images shows a subject that was validated on, such as'):
        other = next(name for name in ('P1', 'P2', 'P3') if name not in held)
        predict('--model', tmp_path / 'run' / 'last.npz', '--input', tmp_path / 'data' / other, '--output', tmp_path / 'new', '--held-out',
                '--subject-from', 'name')


def test_who_was_seen_is_known_from_any_folder_and_said_where_a_table_is_missing(tmp_path, rng, main, predict, capsys):
    lesions(tmp_path / 'data', rng)
    main('--data', tmp_path / 'data', *TINY, '--epochs', 1, '--folds', 2, '--out', tmp_path / 'cv')
    predict('--model', tmp_path / 'cv', '--input', tmp_path / 'data' / 'benign', '--output', tmp_path / 'out')
    assert '3 of 3 images with a mask are of subjects, by their names, that some of the 2 networks' in capsys.readouterr().out

    options, _ = table(tmp_path / 'table', rng)
    main(*options, *TINY, '--epochs', 1, '--out', tmp_path / 'run')
    model = '--model', tmp_path / 'run' / 'last.npz', '--input', tmp_path / 'table'
    predict(*model, '--output', tmp_path / 'blind')
    assert 'WARNING: a table said the subjects in training; give it as --subjects' in capsys.readouterr().out
    with pytest.raises(DataError, match='give --subjects with the table of training'):
        predict(*model, '--output', tmp_path / 'new', '--held-out')
    predict(*model, '--output', tmp_path / 'told', *options[2:], '--held-out')
    assert 'held out: 3 of 9 images, of 1 subjects' in capsys.readouterr().out


def test_an_official_test_part_without_known_subjects_can_be_predicted_alone(tmp_path, rng, main, predict, capsys):
    data = tmp_path / 'data'
    for part in 'train', 'test':
        for name in 'abcd':
            write(data / part / f'{name}.png', drawn(rng)[0])
            write(data / part / f'{name}_mask.png', drawn(rng)[1])
    main('--data', data, '--test', data / 'test', *TINY, '--epochs', 1, '--out', tmp_path / 'run')
    predict('--model', tmp_path / 'run' / 'last.npz', '--input', data / 'test', '--output', tmp_path / 'out', '--held-out')
    said = capsys.readouterr().out
    assert 'held out: 4 of 4 images' in said and 'that the network was trained or chosen on: these' not in said
    (data / 'train').rename(data / 'other')
    with pytest.raises(DataError, match=r'is in the test part and among the images to train on \(4 of 4 are\)'):
        main('--data', data, '--test', data / 'test', *TINY, '--out', tmp_path / 'new')


def test_masks_are_found_by_their_usual_names_where_those_of_training_are_missing(tmp_path, rng, main, predict, capsys):
    options, _ = heads(tmp_path / 'heads', rng)
    main(*options, *TINY, '--epochs', 1, '--out', tmp_path / 'run')
    patients(tmp_path / 'other', rng)
    assert predict('--model', tmp_path / 'run' / 'last.npz', '--input', tmp_path / 'other', '--output', tmp_path / 'out', '--no-fill-outlines') == 0
    assert 'masks: none are called {image}_Annotation, as in training; those with the usual names are taken' in capsys.readouterr().out
    assert len(list((tmp_path / 'out').rglob('*_mask.png'))) == 9


def test_what_is_given_replaces_what_excludes_it_in_the_file(tmp_path, rng, main, predict, capsys):
    """A label that is given replaces the stored threshold, and files of one class each are told apart in prediction too."""
    for number, value in enumerate((1, 2, 1, 2)):
        write(tmp_path / 'data' / f'{number}_1.png', drawn(rng)[0])
        write(tmp_path / 'data' / f'{number}_1_mask.png', value * drawn(rng)[1])
    main('--data', tmp_path / 'data', *TINY, '--epochs', 1, '--mask-threshold', 1, '--out', tmp_path / 'run')
    model = '--model', tmp_path / 'run' / 'last.npz', '--input', tmp_path / 'data'

    def accuracy(name, *options):
        predict(*model, '--output', tmp_path / name, '--threshold', 0.999999, *options)
        return [float(row['dice']) for row in csv.DictReader((tmp_path / name / 'results.csv').read_text().splitlines())]

    assert accuracy('all') == [0, 0, 0, 0] and accuracy('two', '--label', 2) == [1, 0, 1, 0], 'empty against empty is 1'
    network, extra = nervenet.load_checkpoint(tmp_path / 'run' / 'last.npz')
    nervenet.save(tmp_path / 'run' / 'last.npz', network, **extra | {'reading': extra['reading'] | {'label': 2, 'mask_threshold': None}})
    assert accuracy('stored') == [1, 0, 1, 0] and accuracy('again', '--mask-threshold', 1) == [0, 0, 0, 0]
    nervenet.save(tmp_path / 'run' / 'last.npz', *nervenet.load_checkpoint(tmp_path / 'run' / 'last.npz')[:1], size=[16, 24], settings={})
    assert predict(*model, '--output', tmp_path / 'mixed') == 1
    assert 'if they are classes, give --label' in capsys.readouterr().err


# --- What in a mask is foreground -------------------------------------------------------------------------------------

def test_classes_are_told_apart_by_the_numbers_in_the_file(tmp_path, rng):
    mask, other = drawn(rng)[1], numpy.broadcast_to(numpy.arange(SIZE[1]) < 2, SIZE)
    for name, image in (('palette.png', labelled(mask, other)), ('grey.png', numpy.where(mask, 2, other)), ('rgb.png', numpy.repeat(numpy.where(mask, 2, other)[..., None], 3, -1))):
        write(tmp_path / name, image)
        numpy.testing.assert_array_equal(read_mask(tmp_path / name, label=2), mask)
        numpy.testing.assert_array_equal(read_mask(tmp_path / name, label=1), other & ~mask)
        numpy.testing.assert_array_equal(read_mask(tmp_path / name, label='all'), mask | other)
        assert not read_mask(tmp_path / name, label=7).any()
        with pytest.raises(DataError, match=r'numbers 0, 1, 2 in the file\), give --label 1, or another, .* or --label all; else, .*--mask-threshold N'):
            read_mask(tmp_path / name)
    write(tmp_path / 'colours.png', numpy.where(mask[..., None], [255, 0, 0], [0, 0, 0]))
    with pytest.raises(DataError, match='is drawn in colours, and --label 1 asks for numbers'):
        read_mask(tmp_path / 'colours.png', label=1)


@pytest.mark.parametrize('first, second, is_odd', [(1, 2, True), (38, 75, True), (2, 255, True), (1, 255, False), (255, 255, False), (1, 1, False)])
def test_files_of_one_class_each_are_not_taken_for_one_another(tmp_path, rng, first, second, is_odd):
    """Of a set with two classes an image may show one alone: whichever it is must not become foreground in silence."""
    mask = drawn(rng)[1]
    for name, value in ('1_1', first), ('1_2', second), ('2_1', 0):
        write(tmp_path / f'{name}.png', drawn(rng)[0])
        write(tmp_path / f'{name}_mask.png', mask * value)
    samples, reader = find_samples(tmp_path), Reader(SIZE)
    if is_odd:
        with pytest.raises(DataError, match=rf'has the value {second}, that of 1_1_mask.png has {first}; .*--label {first}, --label {second}, or --label all'):
            for sample in samples:
                reader.read(sample)
    else:
        assert [reader.read(sample)[1].any() for sample in samples] == [True, True, False]
    assert [Reader(SIZE, MaskRule(label=second)).read(sample)[1].any() for sample in samples] == [first == second, True, False]


def test_a_palette_counts_by_its_numbers(tmp_path, rng):
    for name, number in ('1_1', 1), ('1_2', 2):
        write(tmp_path / f'{name}.png', drawn(rng)[0])
        write(tmp_path / f'{name}_mask.png', labelled(drawn(rng)[1], False, number))
    reader = Reader(SIZE)
    with pytest.raises(DataError, match='has the value 2, that of 1_1_mask.png has 1'):
        for sample in find_samples(tmp_path):
            reader.read(sample)


def test_outlines_are_filled_or_refused(tmp_path, rng):
    mask = drawn(rng)[1]
    numpy.testing.assert_array_equal(fill_outlines(outline(mask).astype('uint8')), mask)
    write(tmp_path / 'x.png', 255 * outline(mask))
    with pytest.raises(DataError, match=r'x.png: is a line around a region, .* times its own area; give --fill-outlines'):
        read_mask(tmp_path / 'x.png')
    numpy.testing.assert_array_equal(read_mask(tmp_path / 'x.png', fill_outlines=True), mask)
    numpy.testing.assert_array_equal(read_mask(tmp_path / 'x.png', fill_outlines=False), outline(mask))
    solid = mask.astype('uint8')
    numpy.testing.assert_array_equal(fill_outlines(solid), solid)
    assert not is_outline(solid, fill_outlines(solid)) and not is_outline(solid * 0, fill_outlines(solid * 0))
    ring = solid.copy()                                     # a vessel's wall is a ring, and no outline
    ring[numpy.hypot(*(numpy.mgrid[:SIZE[0], :SIZE[1]] - numpy.argwhere(mask).mean(0)[:, None, None])) < 3.5] = 0
    assert 0 < ring.sum() < solid.sum() and fill_outlines(ring).sum() == solid.sum() and not is_outline(ring, fill_outlines(ring))
    cut = outline(mask)[:, :round(numpy.argwhere(mask)[:, 1].mean())]                    # by the border
    for opened in (numpy.where(numpy.arange(outline(mask).size).reshape(SIZE) == numpy.flatnonzero(outline(mask))[0], False, outline(mask)), cut):
        large = numpy.kron(opened, numpy.ones((2, 2), bool))
        write(tmp_path / 'open.png', large)
        with pytest.raises(DataError, match='holds a line that is not closed'):
            read_mask(tmp_path / 'open.png', fill_outlines=True)
        numpy.testing.assert_array_equal(read_mask(tmp_path / 'open.png'), large)
    write(tmp_path / 'solid.png', mask)
    numpy.testing.assert_array_equal(read_mask(tmp_path / 'solid.png', fill_outlines=True), mask)


def test_a_wall_around_another_class_is_no_outline(tmp_path, rng):
    mask = drawn(rng)[1]
    wall = outline(mask)
    write(tmp_path / 'x.png', labelled(wall, mask & ~wall))
    for fill in None, True, False:
        numpy.testing.assert_array_equal(read_mask(tmp_path / 'x.png', label=2, fill_outlines=fill), wall)


def test_lossy_formats_and_colours_hold_no_classes(tmp_path, rng):
    mask = drawn(rng)[1]
    write(tmp_path / 'x.jpg', 2 * mask)
    with pytest.raises(DataError, match='has a lossy format, which changes numbers, and --label all asks'):
        read_mask(tmp_path / 'x.jpg', label='all')
    (tmp_path / 'x.jpg').unlink()
    for number, colour in enumerate(([255, 0, 0], [0, 255, 0])):
        write(tmp_path / f'{number}_1.png', drawn(rng)[0])
        write(tmp_path / f'{number}_1_mask.png', mask[..., None] * numpy.array(colour))
    samples = find_samples(tmp_path)[:2]
    with pytest.raises(DataError, match='value colour 150, that of 0_1_mask.png has colour 76; if they are classes, give --mask-threshold 1'):
        reader = Reader(SIZE)
        for sample in samples:
            reader.read(sample)
    assert holds_foreground(samples, Reader(SIZE, MaskRule(threshold=1))).all()


def test_holes_are_what_no_way_leads_to(rng):
    """Against a flood, pixel by pixel, on mazes."""
    for _ in range(30):
        mask = (rng.random((13, 17)) < 0.45).astype('uint8')
        free = numpy.pad(mask == 0, 1, constant_values=True)
        reached, waiting = {(0, 0)}, [(0, 0)]
        while waiting:
            row, column = waiting.pop()
            for place in (row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1):
                if 0 <= place[0] < free.shape[0] and 0 <= place[1] < free.shape[1] and free[place] and place not in reached:
                    reached.add(place)
                    waiting.append(place)
        expected = numpy.ones_like(free)
        expected[tuple(zip(*reached))] = False
        numpy.testing.assert_array_equal(fill_outlines(mask), expected[1:-1, 1:-1])


def test_all_pairs_that_cannot_be_used_are_told_at_once(tmp_path, rng):
    patients(tmp_path, rng)
    for name in 'P1/left/1', 'P2/left/2':
        write(tmp_path / f'{name}_mask.bmp', drawn(rng)[1][:-2])
    (tmp_path / 'P3' / 'left' / '3.png').write_bytes(b'no image')
    with pytest.raises(DataError) as error:
        holds_foreground(find_samples(tmp_path), Reader(SIZE))
    text = str(error.value)
    assert 'this mask is 22×36 pixels' in text and 'cannot be read as an image' in text and '\n' not in text
    assert text.endswith('(3 of 9 pairs cannot be used: P1/left/1, P2/left/2, P3/left/3)') and text.count('22×36') == 1


def test_what_was_found_is_said_before_anything_is_read(tmp_path, rng):
    lesions(tmp_path, rng)
    (tmp_path / 'benign' / 'benign (1)_mask.png').unlink()
    lines = describe(find_samples(tmp_path, mask_pattern='{image}_mask*', no_mask_is_empty=True))
    assert lines == ['9 images with 11 masks, 9 subjects; such as benign/benign (2).png with benign (2)_mask.png, subject benign/benign (2)',
                     '3 images have several masks, which are joined: benign/benign (2), malignant/malignant (2), normal/normal (2)',
                     '1 images have no mask, and count as empty: benign/benign (1)']
