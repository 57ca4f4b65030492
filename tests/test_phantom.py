import re
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import numpy
import pytest
from PIL import Image

from nervenet import phantom as command
from nervenet.images import data, phantom
from nervenet.images.data import Loader, intensity_statistics
from nervenet.images.reading import read_pair
from nervenet.images.samples import find_samples, split_by_subject
from nervenet.images.phantom import Phantom, make_frame

# Frame 9 of subject 3, seed 0, at 8×10, and what its mask holds at 96×128: area, sum of rows, sum of columns.
GOLDEN = [[141, 159, 150, 159, 185, 186, 165, 148, 162, 161], [103, 86, 75, 93, 141, 176, 184, 130, 123, 145],
          [102, 106, 116, 105, 102, 123, 107, 85, 76, 98], [83, 118, 104, 77, 85, 113, 106, 103, 96, 110],
          [115, 106, 93, 72, 77, 133, 156, 124, 101, 93], [85, 68, 65, 90, 126, 154, 165, 126, 132, 142],
          [79, 75, 96, 119, 165, 159, 137, 105, 110, 117], [77, 90, 117, 105, 100, 134, 120, 131, 130, 94]]
GOLDEN_MASK = 324, 9157, 22780


@lru_cache(maxsize=None)
def population(subjects=40, frames=range(1, 41, 7), size=(42, 58)):
    """Return (images, masks) of a population, (subjects, frames, 42, 58) each: a pixel is 10 × 10 reference pixels."""
    pairs = [[make_frame(subject, index, size=size) for index in frames] for subject in range(1, subjects + 1)]
    return (numpy.array([[image for image, _ in row] for row in pairs], float),
            numpy.array([[mask for _, mask in row] for row in pairs]))


def correlation(a, b):
    return numpy.corrcoef(a.ravel(), b.ravel())[0, 1]


# --- One frame --------------------------------------------------------------------------------------------------------

def test_golden_frame_to_within_one_grey_level():
    image, _ = make_frame(3, 9, size=(8, 10))
    assert abs(image.astype(int) - numpy.array(GOLDEN)).max() <= 1
    mask = make_frame(3, 9)[1]
    rows, columns = mask.nonzero()
    numpy.testing.assert_allclose((len(rows), rows.sum(), columns.sum()), GOLDEN_MASK, rtol=0.01)


def test_a_frame_follows_from_its_numbers_alone():
    image, mask = make_frame(2, 5, seed=7)
    phantom.subject_of.cache_clear()
    make_frame(3, 1, seed=7)
    again, same_mask = make_frame(2, 5, seed=7)
    assert (image == again).all() and (mask == same_mask).all()
    for other in (3, 5, 7), (2, 6, 7), (2, 5, 8):
        assert correlation(make_frame(*other)[0], image) < 0.999


@pytest.mark.parametrize('size', [(1, 1), (7, 5), (33, 200), (96, 128), (420, 580), (500, 431)])
def test_any_size_shows_the_same_picture(size):
    image, mask = make_frame(3, 9, size=size)
    assert image.shape == mask.shape == size and image.dtype == numpy.uint8 and mask.dtype == bool
    large, large_mask = make_frame(3, 9, size=(420, 580))
    expected = data.resize(large.astype(numpy.float32), size)
    assert abs(image - expected).mean() < 3
    if min(size) > 30:
        assert mask.any() and abs(mask.mean() - large_mask.mean()) < 0.1 * large_mask.mean()


def test_mask_is_one_region_inside_the_image():
    masks = population()[1]
    masks = masks[masks.any(axis=(2, 3))]                                # (N, 42, 58)
    assert not (masks[:, [0, -1]].any() or masks[:, :, [0, -1]].any())
    reached = numpy.zeros_like(masks)
    reached.reshape(len(masks), -1)[numpy.arange(len(masks)), masks.reshape(len(masks), -1).argmax(axis=1)] = True
    for _ in range(42 + 58):                                             # flood each mask from its first pixel
        grown = reached.copy()
        grown[:, 1:] |= reached[:, :-1]
        grown[:, :-1] |= reached[:, 1:]
        grown[:, :, 1:] |= reached[:, :, :-1]
        grown[:, :, :-1] |= reached[:, :, 1:]
        reached = grown & masks
    assert (reached == masks).all()


# --- The statistics of a population -----------------------------------------------------------------------------------

def test_share_of_frames_with_nerve():
    present = population()[1].any(axis=(2, 3))
    assert 0.33 < present.mean() < 0.49
    assert present.mean(axis=1).std() > 0.12                             # it differs between subjects


def test_area_and_centroid_of_the_nerve():
    masks = population()[1]
    masks = masks[masks.any(axis=(2, 3))]
    area = masks.sum(axis=(1, 2)) * 100
    rows, columns = numpy.arange(42) * 10 + 5, numpy.arange(58) * 10 + 5
    centre_y = (masks.sum(axis=2) * rows).sum(axis=1) / masks.sum(axis=(1, 2))
    centre_x = (masks.sum(axis=1) * columns).sum(axis=1) / masks.sum(axis=(1, 2))
    assert abs(area.mean() - 7126) < 700 and area.min() > 2000 and area.max() < 18000
    assert abs(centre_y.mean() - 145) < 18 and abs(centre_y.std() - 36) < 12
    assert abs(centre_x.mean() - 334) < 16 and abs(centre_x.std() - 42) < 12


def test_frames_of_one_subject_resemble_each_other():
    images = population()[0]                                             # frames 1, 8, 15, …
    following = [correlation(make_frame(s + 1, 2, size=(42, 58))[0], images[s, 0]) for s in range(10)]
    own = [correlation(images[s, i], images[s, i + 1]) for s in range(40) for i in range(5)]
    other = [correlation(images[s, i], images[s + 1, i]) for s in range(39) for i in range(5)]
    assert numpy.mean(following) > 0.9 > 0.85 > numpy.mean(own) > 0.4 > 0.35 > numpy.mean(other)


def test_look_of_the_images():
    images = population()[0]
    assert 85 < images.mean() < 110 and 6 < images.mean(axis=(1, 2, 3)).std() < 16
    top, middle, bottom = (images[:, :, rows].mean() for rows in (slice(0, 10), slice(16, 26), slice(36, 42)))
    assert top > 1.3 * middle and middle > 1.05 * bottom                 # sound weakens more than the gain makes up for
    assert images[..., 0].mean() < 0.9 * images[..., 1].mean()           # the dark left border


# --- The physics ------------------------------------------------------------------------------------------------------

def scanned(backscatter=0.0, specular=0.0, attenuation=0.0):
    """Return the scan of a subject in whose tissue these are the same at all depths, or given (168, 240)."""
    subject = phantom.Subject(0, 1)
    subject.gain, subject.dynamics, subject.contact, subject.coupling = 0, 1, 0, lambda index: 0
    grid = numpy.zeros((len(phantom.Y), len(phantom.X)))
    looks = phantom.speckle(subject, numpy.random.default_rng(0), grid + phantom.Y, phantom.X)
    return phantom.scan(subject, 1, looks, grid + backscatter, grid + specular, grid + attenuation)


def grain(patch):
    """Return (height, width) of the grain, in grid points: the lag at which the autocorrelation falls to one half."""
    patch = patch - patch.mean()
    power = abs(numpy.fft.fft2(patch)) ** 2
    autocorrelation = numpy.fft.ifft2(power).real / power.mean()
    return [numpy.interp(-0.5, -line[:12], numpy.arange(12)) for line in (autocorrelation[:, 0], autocorrelation[0])]


def test_speckle_is_wide_and_widens_away_from_the_focus():
    image = scanned()
    height, width = grain(image[40:80])
    assert 0.5 < height < 1.5 and 1.8 * height < width                   # of 2.5 px each
    assert grain(image[128:168])[1] > 1.2 * width


def test_envelope_of_fully_developed_speckle_is_rayleigh():
    """The square of a Rayleigh envelope is exponential: its standard deviation equals its mean."""
    rng = numpy.random.default_rng(0)
    transfer, gain = phantom.beam(1.0)
    field = rng.standard_normal((168, 240, 2)).view(complex)[..., 0] * numpy.sqrt(0.5) * gain
    field = phantom.blur('depth', phantom.AXIAL_SIGMA) @ numpy.fft.ifft(numpy.fft.fft(field) * transfer)
    intensity = abs(field[10:-10]) ** 2
    assert abs(intensity.mean() - 1) < 0.05 and abs(intensity.std() / intensity.mean() - 1) < 0.05
    assert abs(intensity[:50].mean() / intensity[-50:].mean() - 1) < 0.1


def test_shadow_below_bone_and_enhancement_below_blood():
    plain, organ = scanned(), numpy.zeros((168, 240))
    organ[50:60, 100:140] = 1
    for attenuation, lower, upper in (0.15, -100, -20), (-0.08, 12, 80):
        change = scanned(attenuation=attenuation * organ) - plain
        assert abs(change[:45]).max() < 1 and abs(change[:, :80]).max() < 1
        assert lower < change[80:, 105:135].mean() < upper


def test_reflecting_surface_has_no_speckle():
    surface = scanned(specular=8.0)
    tissue = scanned()
    assert surface[60:100].mean() > tissue[60:100].mean() + 60 and surface[60:100].std() < 0.5 * tissue[60:100].std()


def test_round_walls_face_the_probe_at_top_and_bottom():
    v, u = numpy.array([[-20.0], [0.0], [20.0]]), numpy.array([-30.0, 0.0, 30.0])
    distance, facing = phantom.ellipse(v, u, 0, 0, 20, 30, 0)
    assert facing[0, 1] > 0.99 < facing[2, 1] and facing[1, 0] < 0.01 > facing[1, 2]
    numpy.testing.assert_allclose([distance[0, 1], distance[1, 2]], 0, atol=1e-4)
    assert distance[1, 1] < 0 < distance[0, 0]


def test_smooth_noise_has_unit_variance_and_the_grain_asked_for():
    noise = phantom.smooth_noise(numpy.random.default_rng(0), 5, 15, count=8)
    assert noise.shape == (8, 224, 352) and abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.03
    assert abs(noise.std(axis=(0, 2)) - 1).max() < 0.35                   # the same at every depth, up to chance
    lag = 6                                                              # 15 px: exp(−(15 / 15)² / 4)
    assert abs((noise[..., lag:] * noise[..., :-lag]).mean() - numpy.exp(-0.25)) < 0.05


def test_sample_interpolates_and_stays_inside():
    texture = phantom.V + 0 * phantom.U
    v = numpy.array([[3.3, 100.0], [250.0, 401.7]])
    numpy.testing.assert_allclose(phantom.sample(texture, v, numpy.array([0.0, 500.0])), v, atol=1e-9)
    assert numpy.isfinite(phantom.sample(texture, numpy.array([[-1e4], [1e4]]), numpy.array([-1e4]))).all()


# --- A set of frames --------------------------------------------------------------------------------------------------

def test_phantom_serves_a_loader_as_a_reader_does():
    frames = Phantom(subjects=4, frames=3, seed=1, size=(24, 32))
    assert [sample.name for sample in frames.samples[:4]] == ['1_1', '1_2', '1_3', '2_1']
    training, validation = split_by_subject(frames.samples, 0.25, seed=0)
    assert len(training) == 9 and len({sample.subject for sample in validation}) == 1
    mean, std = intensity_statistics(training, frames)
    assert 0.3 < mean < 0.5 and 0.1 < std < 0.3
    images, masks = next(iter(Loader(training, frames, batch_size=9).epoch(0)))
    expected = [make_frame(*map(int, sample.name.split('_')), seed=1, size=(24, 32)) for sample in training]
    numpy.testing.assert_allclose(images[..., 0], numpy.array([image for image, _ in expected]) / 255, atol=1e-6)
    assert (masks[..., 0] == [mask for _, mask in expected]).all()


def test_two_sets_of_one_seed_share_no_subject():
    assert not ({s.name for s in Phantom(3, 2).samples} & {s.name for s in Phantom(3, 2, first=4).samples})


def test_memory_is_bounded():
    frames = Phantom(2, 3, size=(10, 12), cache_bytes=4 * 10 * 12 * 3)
    for _ in range(2):
        for sample in frames.samples:
            frames.read(sample)
    assert len(frames.cache) == 4


@pytest.mark.parametrize('call, said', [
    (lambda: make_frame(0, 1), 'subject is 0'), (lambda: make_frame(1, 0), 'index is 0'),
    (lambda: make_frame(1, 1, seed=-1), 'seed is -1'), (lambda: make_frame(1, 1, size=(0, 5)), 'height is 0'),
    (lambda: make_frame(1, 1, size=(5, 2.5)), 'width is 2.5'), (lambda: Phantom(subjects=0), 'subjects is 0'),
    (lambda: Phantom(frames=1.5), 'frames is 1.5'), (lambda: Phantom(seed='a'), "seed is 'a'")])
def test_bad_numbers_are_named(call, said):
    with pytest.raises(ValueError, match=re.escape(said) + '.*expected a whole number'):
        call()


# --- The command line -------------------------------------------------------------------------------------------------

def test_command_writes_a_set_that_can_be_read(tmp_path, capsys):
    command.main(['--out', str(tmp_path / 'set'), '--subjects', '2', '--frames', '3', '--size', '42x58', '--seed', '5'])
    printed = capsys.readouterr().out
    assert 'subject 2 of 2: 3 frames' in printed and f'examples/train_unet.py --data {tmp_path / "set"}' in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ['set']
    assert [path.name for path in (tmp_path / 'set').iterdir()] == ['train']
    assert len(list((tmp_path / 'set/train').iterdir())) == 12
    samples = find_samples(tmp_path / 'set')
    assert [sample.name for sample in samples] == ['1_1', '1_2', '1_3', '2_1', '2_2', '2_3']
    for sample in samples:
        image, mask = read_pair(sample)
        expected_image, expected_mask = make_frame(int(sample.subject), int(sample.name[2:]), seed=5, size=(42, 58))
        assert (numpy.rint(image * 255) == expected_image).all() and (mask == expected_mask).all()
        for path in sample.image_path, *sample.mask_paths:
            with Image.open(path) as file:
                assert file.mode == 'L' and file.info['compression'] == 'tiff_lzw' and file.size == (58, 42)
        assert set(numpy.unique(numpy.array(Image.open(sample.mask_paths[0])))) <= {0, 255}


def test_command_runs_as_a_module(tmp_path):
    arguments = [sys.executable, '-W', 'error', '-m', 'nervenet.phantom',
               '--out', str(tmp_path), '--subjects', '1', '--frames', '1']
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=Path(command.__file__).parents[1])
    assert done.returncode == 0 and done.stderr == '' and len(list((tmp_path / 'train').iterdir())) == 2


def test_command_refuses_a_folder_that_is_not_empty(tmp_path):
    (tmp_path / 'notes.txt').write_text('mine')
    with pytest.raises(SystemExit, match='exists and is not an empty folder; choose another --out'):
        command.main(['--out', str(tmp_path)])
    with pytest.raises(SystemExit, match='is a file'):
        command.main(['--out', str(tmp_path / 'notes.txt')])
    assert [path.name for path in tmp_path.iterdir()] == ['notes.txt']


@pytest.mark.parametrize('options, said', [(['--frames', '0'], 'frames is 0'), (['--subjects', '-3'], 'subjects is -3'),
                                           (['--seed', '-1'], 'seed is -1')])
def test_command_refuses_bad_numbers(tmp_path, options, said):
    with pytest.raises(SystemExit, match=said):
        command.main(['--out', str(tmp_path / 'set'), *options])
    assert not (tmp_path / 'set').exists()


@pytest.mark.parametrize('size', ['96', 'x128', '0x5', '4x-5', 'axb'])
def test_command_refuses_a_bad_size(tmp_path, capsys, size):
    with pytest.raises(SystemExit):
        command.main(['--out', str(tmp_path / 'set'), '--size', size])
    assert 'not of the form HxW' in capsys.readouterr().err


def test_nothing_half_written_is_left(tmp_path, monkeypatch):
    made = []

    def fail_late(*args):
        made.append(args)
        if len(made) == 4:
            raise KeyboardInterrupt
        return make_frame(*args)

    monkeypatch.setattr(phantom, 'make_frame', fail_late)
    with pytest.raises(KeyboardInterrupt):
        command.write(tmp_path / 'set', 2, 3, size=(10, 12), report=lambda text: None)
    assert list((tmp_path / 'set').iterdir()) == []


def test_frames_larger_than_memory_are_refused_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(command, 'available_bytes', lambda: 2**20)
    with pytest.raises(SystemExit, match=r'a frame of 420x580 needs about 0\.0 GiB, and 0\.0 GiB are free; lower --size'):
        command.main(['--size', '420x580', '--subjects', '1', '--frames', '1', '--out', str(tmp_path / 'set')])
    assert not (tmp_path / 'set').exists()
