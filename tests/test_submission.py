"""Run-length encoding: golden rows, round trips, refusals, and the competition's own file byte for byte."""

import csv
import os
from pathlib import Path

import numpy
import pytest
from PIL import Image

from nervenet.study.submission import TRAIN_HEADER, decode, encode, write_submission

REAL = Path(__file__).parents[2] / 'shared' / 'data' / 'kaggle_original'

GOLDEN = [                                       # mask, text worked out by hand
    ([[0, 1, 1],
      [0, 1, 0]], '3 3'),                        # down the second column, on to the top of the third
    ([[1, 0, 0],
      [0, 0, 1]], '1 1 6 1'),                    # first and last pixel
    ([[0, 0, 0, 0],
      [1, 1, 1, 1],
      [0, 0, 0, 0]], '2 1 5 1 8 1 11 1'),        # a row is one run per column: rows and columns are not swapped
    ([[0], [1], [1], [0]], '2 2'),
    ([[1, 1], [1, 1], [1, 1]], '1 6'),
    ([[0, 0], [0, 0], [0, 0]], ''),
]


@pytest.mark.parametrize('mask, text', GOLDEN)
@pytest.mark.parametrize('dtype, foreground', [(bool, 1), ('uint8', 1), ('uint8', 255), ('float32', 1)])
def test_golden_rows(mask, text, dtype, foreground):
    mask = numpy.array(mask)
    assert encode((mask * foreground).astype(dtype)) == text
    decoded = decode(text, mask.shape)
    assert decoded.dtype == bool
    numpy.testing.assert_array_equal(decoded, mask)


@pytest.mark.parametrize('size', [(1, 1), (1, 9), (9, 1), (13, 7), (40, 61)])
@pytest.mark.parametrize('share', [0.02, 0.5, 0.98])
def test_decode_undoes_encode(size, share):
    for seed in range(20):
        mask = numpy.random.default_rng([seed, *size]).random(size) < share
        numpy.testing.assert_array_equal(decode(encode(mask), size), mask)


def test_encode_reads_any_memory_layout():
    mask = numpy.random.default_rng(0).random((6, 10)) < 0.5
    assert encode(numpy.asfortranarray(mask)) == encode(mask)
    assert encode(mask[::2, ::-1]) == encode(mask[::2, ::-1].copy())


def test_runs_that_touch_are_joined():
    numpy.testing.assert_array_equal(decode('1 2 3 1', (2, 2)), [[1, 1], [1, 0]])


@pytest.mark.parametrize('mask, problem', [
    (numpy.zeros((2, 2, 1)), 'shape'),
    (numpy.array([[0, 100, 255]]), 'from 100 to 255'),
    (numpy.array([[0.0, 0.2, 0.7]]), 'threshold'),
    (numpy.array([[0.0, 1.0, numpy.nan]]), 'nan'),
])
def test_encode_refuses_what_is_no_binary_mask(mask, problem):
    with pytest.raises(ValueError, match=problem):
        encode(mask)


@pytest.mark.parametrize('text, problem', [
    ('1 2 3', '3 numbers'),
    ('1 x', "'x'"),
    ('1 2,5', "'2,5'"),
    ('1 -2', "'-2'"),
    ('1 2.0', "'2.0'"),
    ('0 3', "'0'"),
    ('3 0', "'0'"),
    ('1 ' + 30 * '9', "'9999"),
    ('1 ٣', 'whole numbers'),                    # a digit, though not of ours
    ('4 2 1 1', 'run 1 1 begins before run 4 2'),
    ('1 3 3 1', 'run 3 1 begins before run 1 3'),
    ('5 3', 'reaches pixel 7.*2×3 has 6'),
    ('7 1', 'reaches pixel 7'),
    (f'{10**18 - 1} {10**18 - 1}', 'reaches pixel'),
])
def test_decode_refuses_malformed_text(text, problem):
    with pytest.raises(ValueError, match=problem) as caught:
        decode(text, (2, 3))
    assert '\n' not in str(caught.value)


def test_written_file(tmp_path):
    path = tmp_path / 'submission.csv'
    write_submission(path, ((image, text) for image, text in [(1, '3 3'), (2, ''), ('a,b', '1 1')]))
    assert path.read_bytes() == b'img,pixels\n1,3 3\n2,\n"a,b",1 1\n'
    assert os.listdir(tmp_path) == ['submission.csv']


def failing_rows():
    yield 1, '3 3'
    raise KeyboardInterrupt


@pytest.mark.parametrize('rows, error', [
    ([(1, ''), (1, '3 3')], ValueError),
    ([(1, '')] + [(1, 2, '')], ValueError),
    (failing_rows(), KeyboardInterrupt),
])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, rows, error):
    path = tmp_path / 'submission.csv'
    path.write_text('old')
    with pytest.raises(error):
        write_submission(path, rows)
    assert path.read_text() == 'old'
    assert os.listdir(tmp_path) == ['submission.csv']


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError('No space left on device')

    path = tmp_path / 'submission.csv'
    path.write_text('old')
    monkeypatch.setattr(os, 'fsync', fail)
    with pytest.raises(OSError):
        write_submission(path, [(1, '3 3')])
    assert path.read_text() == 'old'
    assert os.listdir(tmp_path) == ['submission.csv']


@pytest.mark.skipif(not REAL.exists(), reason='the competition\'s files are not here')
def test_the_competitions_own_file_byte_for_byte(tmp_path):
    with open(REAL / 'train_masks.csv', newline='') as file:
        published = list(csv.reader(file))[1:]
    paths = sorted((REAL / 'train').glob('*_mask.tif'), key=lambda path: [int(n) for n in path.name.split('_')[:2]])
    rows = []
    for path, (_, _, text) in zip(paths, published, strict=True):
        with Image.open(path) as picture:
            mask = numpy.asarray(picture)
        numpy.testing.assert_array_equal(decode(text, mask.shape), mask > 0)
        rows.append((*path.name.split('_')[:2], encode(mask)))
    write_submission(tmp_path / 'masks.csv', rows, TRAIN_HEADER)
    assert (tmp_path / 'masks.csv').read_bytes() == (REAL / 'train_masks.csv').read_bytes()
