"""The command `python -m nervenet.phantom`: synthetic ultrasound on disk, in the layout of the Kaggle competition, as images or as loops.

How such an image comes about is in `images/phantom.py`.
"""

import argparse
import math
import shutil
import sys
from contextlib import ExitStack, closing
from itertools import groupby
from pathlib import Path

import numpy
from PIL import Image

from .files import make_folder, refuse_content
from .images.loops import Pages
from .images.phantom import HEIGHT, WIDTH, Phantom
from .study.options import available_bytes, size
from .study.report import print_whatever_comes


def write(out, subjects, frames, seed=0, size=(HEIGHT, WIDTH), report=print, loops=None):
    """Write a set in the layout of the competition: `out`/train/{subject}_{index}.tif and …_mask.tif, masks 0 and 255.

    The files are LZW-compressed grey TIFFs. With `loops` they are loops, so many of each subject, {subject}_{loop}.tif and …_mask.tif, of `frames`
    pages each. They are written into `out`/train.part, which becomes `out`/train when all are there. `report` gets a line of progress per subject.
    Raises OSError if `out` is not empty or cannot be made, MemoryError for frames larger than memory.
    """
    out, needed, there = Path(out), 5 * 8 * math.prod(size), available_bytes()      # some float64 for each pixel
    if there is not None and needed > there:
        raise MemoryError(f'a frame of {size[0]}x{size[1]} needs about {needed / 2**30:.1f} GiB, and {there / 2**30:.1f} GiB are free; '
                          'lower --size')
    phantom = Phantom(subjects, frames, seed, size, cache_bytes=0, loops=loops)
    refuse_content(out, '--out')
    part = out / 'train.part'
    make_folder(part, '--out')
    try:
        for subject, samples in groupby(phantom.samples, lambda sample: sample.subject):
            with_nerve = 0
            for name, of_file in groupby(samples, lambda sample: sample.file_name):
                with ExitStack() as files:
                    writers = [writer(part / f'{name}{ending}.tif', files, loops is not None) for ending in ('', '_mask')]
                    for sample in of_file:
                        image, mask = phantom.read(sample)
                        with_nerve += mask.any()
                        for append, grey in zip(writers, ((image // 257).astype(numpy.uint8), mask * 255)):
                            append(grey)
            report(f'subject {subject} of {subjects}: ' + f'{loops} loops of ' * bool(loops) + f'{frames} frames, {with_nerve} with nerve')
        part.rename(out / 'train')
    finally:
        shutil.rmtree(part, ignore_errors=True)


def writer(path, files, is_loop):
    """Return a function that writes a grey image (H, W) uint8 to the file `path`, or appends it if that is a loop, which the ExitStack `files` ends."""
    if is_loop:
        pages = files.enter_context(closing(Pages(files.enter_context(open(path, 'wb')))))
        return lambda grey: pages.append(Pages.packed(grey))
    return lambda grey: Image.fromarray(grey).save(path, compression='tiff_lzw')


def main(arguments=None):
    """Write a set from the command line: `python -m nervenet.phantom --out DIR`."""
    parser = argparse.ArgumentParser(
        prog='python -m nervenet.phantom', usage=argparse.SUPPRESS, formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description='Write synthetic ultrasound images and nerve masks in the layout of the Kaggle competition.')
    parser.add_argument('--out', type=Path, required=True, default=argparse.SUPPRESS, metavar='DIR',
                        help='new or empty folder')
    parser.add_argument('--subjects', type=int, default=10, metavar='N', help='number of subjects')
    parser.add_argument('--frames', type=int, default=40, metavar='N', help='frames of each subject, or of each loop')
    parser.add_argument('--loops', type=int, nargs='?', const=2, metavar='N', default=argparse.SUPPRESS,
                        help='write loops, in which probe and tissue move, as files of several pages: N of each subject, 2 if it is left out')
    parser.add_argument('--size', type=size, default=f'{HEIGHT}x{WIDTH}', metavar='HxW',
                        help='rows x columns of the images')
    parser.add_argument('--seed', type=int, default=0, metavar='N', help='another number makes other subjects')
    args = parser.parse_args(arguments)
    loops = getattr(args, 'loops', None)
    try:
        write(args.out, args.subjects, args.frames, args.seed, args.size, lambda text: print(text, flush=True), loops)
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, MemoryError) as error:
        sys.exit(f'nervenet.phantom: {error}')
    what = f'{args.subjects * loops} loops of {args.frames} frames' if loops else f'{args.subjects * args.frames} images'
    print(f'\n{what} and their masks are in {args.out / "train"}. Train on them:\n\n'
          f'    python examples/train_unet.py --data {args.out}')


if __name__ == '__main__':
    print_whatever_comes()
    main()
