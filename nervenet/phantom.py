"""The command `python -m nervenet.phantom`: synthetic ultrasound on disk, in the layout of the Kaggle competition.

How such an image comes about is in `images/phantom.py`.
"""

import argparse
import math
import shutil
import sys
from pathlib import Path

import numpy
from PIL import Image

from .files import make_folder, refuse_content
from .images.phantom import HEIGHT, WIDTH, Phantom
from .study.options import available_bytes, size
from .study.report import print_whatever_comes


def write(out, subjects, frames, seed=0, size=(HEIGHT, WIDTH), report=print):
    """Write a set in the layout of the competition: `out`/train/{subject}_{index}.tif and …_mask.tif, masks 0 and 255.

    The files are LZW-compressed grey TIFFs. They are written into `out`/train.part, which becomes `out`/train when all
    are there. `report` gets a line of progress per subject. Raises OSError if `out` is not empty or cannot be made, MemoryError for
    frames larger than memory.
    """
    out, needed, there = Path(out), 5 * 8 * math.prod(size), available_bytes()      # some float64 for each pixel
    if there is not None and needed > there:
        raise MemoryError(f'a frame of {size[0]}x{size[1]} needs about {needed / 2**30:.1f} GiB, and {there / 2**30:.1f} GiB are free; '
                          'lower --size')
    phantom = Phantom(subjects, frames, seed, size, cache_bytes=0)
    refuse_content(out, '--out')
    part = out / 'train.part'
    make_folder(part, '--out')
    try:
        for first in range(0, len(phantom.samples), frames):
            with_nerve = 0
            for sample in phantom.samples[first:first + frames]:
                image, mask = phantom.read(sample)
                with_nerve += mask.any()
                for suffix, grey in ('', (image // 257).astype(numpy.uint8)), ('_mask', mask * 255):
                    Image.fromarray(grey).save(part / f'{sample.name}{suffix}.tif', compression='tiff_lzw')
            report(f'subject {sample.subject} of {subjects}: {frames} frames, {with_nerve} with nerve')
        part.rename(out / 'train')
    finally:
        shutil.rmtree(part, ignore_errors=True)


def main(arguments=None):
    """Write a set from the command line: `python -m nervenet.phantom --out DIR`."""
    parser = argparse.ArgumentParser(
        prog='python -m nervenet.phantom', usage=argparse.SUPPRESS, formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description='Write synthetic ultrasound images and nerve masks in the layout of the Kaggle competition.')
    parser.add_argument('--out', type=Path, required=True, default=argparse.SUPPRESS, metavar='DIR',
                        help='new or empty folder')
    parser.add_argument('--subjects', type=int, default=10, metavar='N', help='number of subjects')
    parser.add_argument('--frames', type=int, default=40, metavar='N', help='frames of each subject')
    parser.add_argument('--size', type=size, default=f'{HEIGHT}x{WIDTH}', metavar='HxW',
                        help='rows x columns of the images')
    parser.add_argument('--seed', type=int, default=0, metavar='N', help='another number makes other subjects')
    args = parser.parse_args(arguments)
    try:
        write(args.out, args.subjects, args.frames, args.seed, args.size, lambda text: print(text, flush=True))
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, MemoryError) as error:
        sys.exit(f'nervenet.phantom: {error}')
    print(f'\n{args.subjects * args.frames} images and their masks are in {args.out / "train"}. Train on them:\n\n'
          f'    python examples/train_unet.py --data {args.out}')


if __name__ == '__main__':
    print_whatever_comes()
    main()
