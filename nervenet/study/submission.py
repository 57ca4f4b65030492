"""Run-length encoding of masks, as the Kaggle competition *Ultrasound Nerve Segmentation* writes them.

A mask is a text of pairs `start length`, one for each run of foreground pixels. Pixels are numbered from 1, down the
first column, then down the second (column-major): in a mask of H rows, row r and column c, both counted from 0, is
pixel c·H + r + 1. A run may go on from the bottom of one column to the top of the next. Of an empty mask it is empty.

    0 1 1
    0 1 0      →  '3 3'
"""

import csv
import io

import numpy

from ..files import atomic_write

TEST_HEADER = ('img', 'pixels')                  # a submission
TRAIN_HEADER = ('subject', 'img', 'pixels')      # the competition's own file of training masks, train_masks.csv


def encode(mask):
    """Return the run-length text of `mask` (H, W): bool, or zeros and one other value such as 1 or 255.

    Raises ValueError if the mask is not two-dimensional or not binary.
    """
    mask = numpy.asarray(mask)
    if mask.ndim != 2:
        raise ValueError(f'a mask to encode has shape {mask.shape}; expected (H, W)')
    foreground = mask != 0
    values = mask[foreground]
    if values.size and not values.min() == values.max():                     # written so that NaN is refused too
        raise ValueError(f'a mask to encode holds values from {values.min()} to {values.max()} beside 0; '
                         'expected one value beside 0: apply the threshold first')
    # With background before the first pixel and after the last, the places of change are start, end, start, end, …
    flat = numpy.zeros(mask.size + 2, bool)
    flat[1:-1] = foreground.ravel(order='F')
    changes = numpy.flatnonzero(flat[1:] != flat[:-1])
    starts, ends = changes[::2], changes[1::2]
    pairs = numpy.stack([starts + 1, ends - starts], axis=1)                 # (runs, 2)
    return ' '.join(map(str, pairs.ravel().tolist()))


def decode(text, size):
    """Return the mask (H, W), bool, that the run-length `text` describes; `size` is (H, W) of the image.

    Raises ValueError if the text is not pairs of whole numbers from 1 up, or if its runs overlap, are out of order or
    leave the image.
    """
    H, W = size
    words = text.split()
    for word in words:
        if not (word.isascii() and word.isdigit() and len(word) < 19 and int(word) > 0):
            raise ValueError(f'run-length text holds {word[:24]!r}; expected whole numbers from 1 up and spaces')
    if len(words) % 2:
        raise ValueError(f'run-length text holds {len(words)} numbers; expected pairs of start and length')
    runs = numpy.array(words, 'U18').astype('int64').reshape(-1, 2)          # (runs, 2)
    starts = runs[:, 0] - 1
    ends = starts + runs[:, 1]
    if numpy.any(starts[1:] < ends[:-1]):
        k = int(numpy.argmax(starts[1:] < ends[:-1]))
        raise ValueError(f'run-length text: run {starts[k + 1] + 1} {runs[k + 1, 1]} begins before run {starts[k] + 1} '
                         f'{runs[k, 1]} has ended; expected runs in order and without overlap')
    if len(runs) and ends[-1] > H * W:
        raise ValueError(f'run-length text reaches pixel {ends[-1]}, but an image of {H}×{W} has {H * W}; '
                         'expected the size of the image that was encoded')
    step = numpy.zeros(H * W + 1, 'int8')                                    # +1 where a run starts, −1 after its end
    step[starts] += 1
    step[ends] -= 1                                                          # meets a start where two runs touch: 0
    return numpy.cumsum(step[:-1], dtype='int8').astype(bool).reshape((H, W), order='F')


def write_submission(path, rows, header=TEST_HEADER):
    """Write `rows` under `header` to the CSV file `path`: (img, text), or (subject, img, text) with TRAIN_HEADER.

    `text` comes from `encode`. The order is kept: sort the images naturally (2 before 10) to get the competition's. The
    file appears whole under its name or not at all.
    Raises ValueError for a row that does not fit the header, or an image named twice; OSError if it cannot be written.
    """
    content = io.StringIO(newline='')
    writer = csv.writer(content, lineterminator='\n')
    writer.writerow(header)
    written = set()
    for row in map(tuple, rows):
        image = row[:-1]
        if len(row) != len(header):
            raise ValueError(f'{path}: a row holds {len(row)} values; expected {len(header)}: {", ".join(header)}')
        if image in written:
            raise ValueError(f'{path}: image {", ".join(map(str, image))} comes twice; expected one row for each image')
        written.add(image)
        writer.writerow(row)
    with atomic_write(path) as file:
        file.write(content.getvalue().encode())
