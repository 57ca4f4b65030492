"""Find nerves in frames as a probe sends them: one after another, each at once.

    python examples/live.py --model RUN/best.npz --folder FOLDER --output MASKS

watches a folder that is being filled, predicts each new image by itself, writes {name}_mask.png (0 and 255, at the image's own
size) if --output is given, and says how long that took. Ctrl-C, or --frames or --idle, ends it with a summary. To try it without
a probe, let synthetic frames that are there already count as new:

    python -m nervenet.phantom --out DIR --subjects 2
    python examples/live.py --model RUN/best.npz --folder DIR/train --existing --idle 1

What is assumed: a frame is a file with a name of its own, is written once, and ends in .png, .tif, .bmp or the like. It may be
written under another suffix (.part, .tmp) and renamed, or straight under its name: then it is taken once it reads whole and did not
change meanwhile; one that neither reads nor changes for a second is skipped. {name}_mask files are no frames.
"""

import argparse
import os
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy

from nervenet.engine.communicator import refuse_company
from nervenet.files import make_folder, refuse_content
from nervenet.images.layout import SUFFIXES, DataError, MaskNames, natural_key
from nervenet.images.reading import read_image
from nervenet.study.figures import save_mask
from nervenet.study.options import HelpFormatter, add_prediction_options, positive, whole
from nervenet.study.report import print_whatever_comes
from nervenet.study.segment import intensity_warning, open_segmenter

POLL, PATIENCE = 0.002, 1.0             # seconds between two looks at the folder; and for which a broken file may stay as it is


def main(arguments=None):
    refuse_company()
    args = parse(arguments)
    if not args.folder.is_dir():
        raise DataError(f'{args.folder}: no such folder; give the one that the frames are written into')
    if args.output and args.output.resolve() == args.folder.resolve():
        raise DataError(f'{args.output}: is the folder of the frames too; choose another --output')
    segmenter, extras = open_segmenter(args)
    what = extras[0].get('what') or 'foreground'
    if args.output:
        refuse_content(args.output, '--output')           # its masks would mix with those of another model
        make_folder(args.output, '--output')
    for _ in range(2):                                                    # what is made once is made before the first frame
        segmenter.maps([numpy.zeros(segmenter.size, 'float32')])

    times, oddities, names, skipped = [], {}, set(), 0                    # times: (latency, reading, network, writing) of each frame
    with suppress(KeyboardInterrupt):
        for path, seen in arrivals(args.folder, args.existing, args.idle):
            start = time.perf_counter()
            try:
                if path.stem in names:
                    raise DataError(f'{path}: a frame of this name came before, with another suffix')
                names.add(path.stem)
                image = read_whole(path, args.white)
                prepared = segmenter.prepare(image)
                read = time.perf_counter()
                probabilities, = segmenter.maps([prepared])
                computed = time.perf_counter()
                mask = segmenter.mask(segmenter.restore(probabilities, image.shape))
                if args.output:
                    save_mask(mask, args.output / f'{path.stem}_mask.png')
                done = time.perf_counter()
                times.append((done - seen, read - start, computed - read, done - computed))
                oddities[path] = segmenter.oddity(prepared, image.shape)
                print(f'{path.name}: {1000 * (done - seen):.1f} ms, {numpy.count_nonzero(mask)} pixels of {what}', flush=True)
            except DataError as error:
                skipped += 1
                print(f'skipped: {error}', file=sys.stderr, flush=True)
            if len(times) + skipped == args.frames:
                break

    print(f'{len(times)} frames predicted, {skipped} skipped' + (f'; masks are in {args.output}' if args.output else ''))
    if times:
        latency, reading, network, writing = 1000 * numpy.median(times, axis=0)
        print(f'from seeing a frame to its mask: median {latency:.1f} ms, 99th percentile {1000 * numpy.percentile(times, 99, axis=0)[0]:.1f} ms'
              f'\nof these reading {reading:.1f}, network {network:.1f}, writing {writing:.1f} ms (medians): up to '
              f'{1 / numpy.mean(times, axis=0)[1:].sum():.1f} frames per second')
    if said := intensity_warning(oddities, args.white):
        print(said)
    return 1 if skipped else 0


def arrivals(folder, existing, idle):
    """Yield (path, time) of each frame in `folder` as it comes, and when it was seen; end after `idle` seconds without one, if given.

    Frames that are there at the start count only if `existing`: each is then seen when its turn comes. For later ones that come
    while another is predicted, the time is before their turn.
    """
    def names():
        stems = ((entry.name, *os.path.splitext(entry.name)) for entry in os.scandir(folder))
        return {name for name, stem, suffix in stems
                if suffix.lower() in SUFFIXES and not stem.startswith('.') and not MaskNames().image_of(stem, suffix, bool)}

    known = set() if existing else names()
    print(f'watching {folder}; Ctrl-C ends it', flush=True)
    at_start, last = existing, time.perf_counter()
    while idle is None or time.perf_counter() - last < idle:
        seen, new = time.perf_counter(), names() - known
        for name in sorted(new, key=natural_key):
            yield folder / name, time.perf_counter() if at_start else seen
            last = time.perf_counter()
        known |= new
        at_start = False
        time.sleep(POLL)


def read_whole(path, white):
    """Return the image at `path` once it reads whole and did not change meanwhile. Raises DataError."""
    def state():
        try:
            now = os.stat(path)
        except OSError as error:
            raise DataError(f'{path}: was gone before it was read ({error.strerror})') from error
        return now.st_size, now.st_mtime_ns

    before, since = state(), time.perf_counter()
    while True:
        try:
            image = read_image(path, white)
            if state() == before:
                return image
        except DataError:
            if state() == before and time.perf_counter() - since > PATIENCE:
                raise
        if (now := state()) != before:
            before, since = now, time.perf_counter()
        time.sleep(POLL)


def parse(arguments):
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__.split('\n')[0], formatter_class=HelpFormatter)
    parser.add_argument('--folder', type=Path, required=True, metavar='FOLDER', help='folder that the frames are written into')
    parser.add_argument('--output', type=Path, metavar='FOLDER', help='new folder for masks; default: none are written')
    parser.add_argument('--existing', action='store_true', help='begin with the frames that are there')
    parser.add_argument('--frames', type=whole, metavar='N', help='end after so many frames')
    parser.add_argument('--idle', type=positive, metavar='SECONDS', help='end after so long without a new frame')
    add_prediction_options(parser)
    return parser.parse_args(arguments)


if __name__ == '__main__':
    print_whatever_comes()
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, RuntimeError, OSError, MemoryError, OverflowError) as error:
        sys.exit(f'live.py: {error}')
