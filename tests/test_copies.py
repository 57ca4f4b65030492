"""Near copies of different subjects, and masks that contradict each other."""

import numpy
import pytest
from PIL import Image

from helpers import TINY
from nervenet.images import copies
from nervenet.images.copies import EQUAL, NEAR, copies_warning, first_equal, nearest, thumbnails
from nervenet.images.data import Reader, resize
from nervenet.images.phantom import Phantom
from nervenet.images.samples import Sample, find_samples


class Given:
    """A reader of images (H, W) in [0, 1] and masks that are there."""

    def __init__(self, pairs):
        self.pairs, self.size = pairs, next(iter(pairs.values()))[0].shape

    def read(self, sample):
        image, mask = self.pairs[sample.name]
        return numpy.rint(image * 65535).astype('uint16'), mask.astype('uint8')

    def place(self, sample):
        return slice(0, self.size[0]), slice(0, self.size[1])


def scan(rng, size=(48, 64)):
    """Return what all ultrasound images look like, bright above and dark below, with a texture of its own."""
    texture = resize(rng.standard_normal((size[0] // 3, size[1] // 3)).astype('float32'), size)
    return numpy.clip(0.8 - 0.6 * numpy.linspace(0, 1, size[0])[:, None] + 0.1 * texture / texture.std(), 0, 1)


def block(size, column):
    mask = numpy.zeros(size, bool)
    mask[10:20, column:column + 12] = True
    return mask


def of(*rows):
    """Return (samples, reader) of rows (name, subject, image, mask); None is an empty mask."""
    return ([Sample(name, subject, None, None) for name, subject, _, _ in rows],
            Given({name: (image, numpy.zeros(image.shape) if mask is None else mask) for name, _, image, mask in rows}))


def test_copies_across_subjects_are_told_with_the_nearest_pairs_and_others_not(rng):
    a, b, c, d = (scan(rng) for _ in range(4))
    noisy = numpy.clip(0.8 * b + 0.1 + rng.normal(0, 0.03, b.shape), 0, 1)               # another gain, and noise
    samples, reader = of(('1_1', '1', a, None), ('1_2', '1', a, None), ('2_1', '2', b, None), ('3_1', '3', noisy[:, ::-1], None),
                         ('4_1', '4', c, None), ('5_1', '5', d, None), ('6_1', '6', c, None))
    said = copies_warning(samples, reader)
    assert said.startswith('WARNING: 4 of 7 images are near copies of an image of another subject') and 'leak' in said and '\n' not in said
    assert 'The nearest: 4_1 and 6_1 (1.00), 2_1 and 3_1 (mirrored, 0.9' in said and '1_1' not in said
    assert copies_warning(samples[:3] + samples[4:6], reader) == ''                     # within a subject they are expected


def test_two_numbers_of_one_person_are_one_pair_of_subjects(rng):
    frames = [scan(rng) for _ in range(4)]
    samples, reader = of(*((f'{subject}_{n}', subject, frame, None) for subject in ('17', '18') for n, frame in enumerate(frames)))
    said = copies_warning(samples, reader)
    assert 'WARNING: 8 of 8 images' in said and said.count(' and 18_') == 1 and ', subjects 17 and 18: 8 images)' in said


def test_images_that_are_alike_in_the_large_alone_are_no_copies(rng):
    rows = [(f'{n}_1', str(n), scan(rng), None) for n in range(40)]
    samples, reader = of(*rows)
    pixels = numpy.stack([image.ravel() for _, _, image, _ in rows])
    assert numpy.sort(numpy.corrcoef(pixels), axis=None)[-50] > 0.7                     # they do correlate
    assert copies_warning(samples, reader) == ''
    correlation, _, _ = nearest(thumbnails(samples, reader), numpy.arange(40))
    assert correlation.max() < 0.7


def test_black_frames_make_no_copies(tmp_path, rng):
    """Neither black around padded images, nor images without any detail."""
    for n in range(6):
        Image.fromarray((scan(rng, (48, 16)) * 255).astype('uint8')).save(tmp_path / f'{n}_1.png')
        Image.new('L', (16, 48)).save(tmp_path / f'{n}_1_mask.png')
    Image.new('L', (16, 48)).save(tmp_path / '6_1.png')
    Image.new('L', (16, 48)).save(tmp_path / '7_1.png')
    for n in 6, 7:
        Image.new('L', (16, 48)).save(tmp_path / f'{n}_1_mask.png')
    samples = find_samples(tmp_path)
    padded = Reader((48, 96), fit='pad')
    assert copies_warning(samples, padded) == ''
    numpy.testing.assert_allclose(thumbnails(samples, padded), thumbnails(samples, Reader((48, 16))), atol=1e-6)
    assert not thumbnails(samples, padded)[6:].any()


def test_synthetic_subjects_are_strangers_and_their_frames_near_copies():
    phantom = Phantom(subjects=6, frames=3, seed=3, size=(48, 64))
    assert copies_warning(phantom.samples, phantom) == ''
    correlation, _, _ = nearest(thumbnails(phantom.samples, phantom), numpy.arange(18))
    assert numpy.count_nonzero(correlation >= NEAR) > 9


@pytest.mark.parametrize('block_size', [1, 40, 2**22])
def test_the_nearest_is_that_of_all_pairs_one_by_one(rng, monkeypatch, block_size):
    monkeypatch.setattr(copies, 'BLOCK', block_size)
    images = [scan(rng) for _ in range(6)]
    images += [images[0] + 0.01, numpy.clip(images[1] + rng.normal(0, 0.1, (48, 64)), 0, 1)[:, ::-1], images[2][:, ::-1]]
    samples, reader = of(*((str(n), str(n), numpy.clip(image, 0, 1), None) for n, image in enumerate(images)))
    details, groups = thumbnails(samples, reader), numpy.array([0, 1, 1, 2, 2, 3, 4, 4, 5])
    numpy.testing.assert_allclose((details**2).sum(axis=1), 1, rtol=1e-5)
    correlation, index, is_mirrored = nearest(details, groups)
    pictures = details.reshape(-1, 16, 16)
    for i, one in enumerate(pictures):
        pairs = {(j, mirrored): (one * (other[:, ::-1] if mirrored else other)).sum() for j, other in enumerate(pictures)
                 for mirrored in (False, True) if groups[j] != groups[i]}
        assert correlation[i] == pytest.approx(max(pairs.values()), abs=1e-5)
        assert correlation[i] == pytest.approx(pairs[index[i], is_mirrored[i]], abs=1e-5)      # of equals any
    assert (index[[0, 2, 6, 8]] == [6, 8, 0, 2]).all() and is_mirrored[[2, 7, 8]].all() and not is_mirrored[[0, 6]].any()
    assert (correlation[[0, 2, 6, 8]] > EQUAL).all() and NEAR < correlation[7] < EQUAL
    first, mirrored = first_equal(details)
    assert first.tolist() == [0, 1, 2, 3, 4, 5, 0, 7, 2] and mirrored.tolist() == [False] * 8 + [True]


def test_with_one_group_there_is_no_nearest(rng):
    samples, reader = of(('1', '1', scan(rng), None), ('2', '1', scan(rng), None))
    assert (nearest(thumbnails(samples, reader), numpy.zeros(2))[0] == -1).all()
    assert copies_warning(samples, reader) == ''


def test_contradicting_masks_of_equal_images_are_told_whoever_they_show(rng):
    a, b, c, d, e = (scan(rng) for _ in range(5))
    left, right = block(a.shape, 5), block(a.shape, 40)
    samples, reader = of(('1_1', '1', a, left), ('1_2', '1', a, None),                  # one of them is empty
                         ('1_3', '1', b, left), ('1_4', '1', b[:, ::-1], left),         # mirrored, and the mask is not
                         ('1_5', '1', c, left), ('1_6', '1', c[:, ::-1], left[:, ::-1]),        # mirrored with its mask
                         ('1_7', '1', d, left), ('1_8', '1', d, block(a.shape, 8)),     # Dice 0.75: two readers
                         ('1_9', '1', e, None), ('1_10', '1', e, None), ('1_11', '1', scan(rng), right))
    said = copies_warning(samples, reader)
    assert said == ('WARNING: 2 of 11 images equal another one, and their masks contradict each other: 1_1 and 1_2 (Dice 0.00), '
                    '1_3 and 1_4 (mirrored, Dice 0.00). At most one mask of each pair is right.')
    samples, reader = of(('1_1', '1', a, left), ('2_1', '2', a, right))
    assert len(copies_warning(samples, reader).splitlines()) == 2                       # it leaks, and it contradicts
    assert copies_warning(*of(('1_1', '1', a, left), ('1_2', '1', b, right))) == ''


def write(folder, rng, subjects=4):
    """Write four subjects of three images each; the first image of the last is one of the first, mirrored."""
    folder.mkdir()
    for subject in range(1, subjects + 1):
        for number in range(1, 4):
            image = scan(rng)
            if (subject, number) == (1, 1):
                copied = image
            if (subject, number) == (subjects, 1):
                image = copied[:, ::-1]
            Image.fromarray((image * 255).astype('uint8')).save(folder / f'{subject}_{number}.png')
            Image.fromarray(block(image.shape, 26).astype('uint8') * 255).save(folder / f'{subject}_{number}_mask.png')
    return folder


def test_training_tells_copies_once_before_it_begins_and_in_the_summary(tmp_path, rng, main, capsys):
    data = write(tmp_path / 'data', rng)
    told = 'WARNING: 2 of 12 images are near copies of an image of another subject'
    for options in [], ['--folds', 2, '--fold', 2]:
        out = tmp_path / f'run{len(options)}'
        main('--data', data, *TINY, '--size', '32x48', '--epochs', 1, '--out', out, *options)
        before_training = capsys.readouterr().out.partition('epoch')[0]
        assert before_training.count(told) == 1 and '1_1 and 4_1 (mirrored, ' in before_training
        assert told in (out / 'summary.txt').read_text()
    test = write(tmp_path / 'test', numpy.random.default_rng(1), 2)
    for path in data.glob('4_*'):
        path.rename(test / f'9{path.name}')
    main('--data', data, '--test', test, *TINY, '--size', '32x48', '--epochs', 1, '--out', tmp_path / 'tested')
    before_training = capsys.readouterr().out.partition('epoch')[0]
    assert 'WARNING: 4 of 18 images' in before_training and '1_1 and 94_1 (mirrored, ' in before_training
