from nervenet.images.augment import ULTRASOUND
from nervenet.study.options import augmentation, parse


def test_scans_are_augmented_and_endless_synthetic_images_are_not(tmp_path):
    assert (parse([]).augment, parse([]).epochs) == ('none', 5)
    scans = parse(['--data', str(tmp_path)])
    assert (scans.augment, scans.epochs) == ('default', 15)
    given = parse(['--data', str(tmp_path), '--augment', 'none', '--epochs', '3'])
    assert (given.augment, given.epochs) == ('none', 3)


def test_single_options_replace_those_of_the_recipe():
    assert augmentation(parse(['--augment', 'default'])) == ULTRASOUND
    changed = augmentation(parse(['--augment', 'default', '--zoom-range', '0.25', '--no-horizontal-flip', '--fill-mode', 'nearest']))
    assert (changed.zoom_range, changed.horizontal_flip, changed.fill_mode) == (0.25, False, 'nearest')
    assert changed.rotation_range == ULTRASOUND.rotation_range
