"""Loops: files that hold many frames, such as multi-page TIFF, GIF, APNG and animated WebP, read and written one frame at a time.

    samples = with_frames(find_samples('DIR'))                 every frame of a loop is a sample of its own: 1_2#1, 1_2#2, …
    with atomic_write('masks.tif') as file, closing(Pages(file)) as pages:
        pages.append(Pages.packed(mask))                       (H, W) uint8 or uint16

A page of a TIFF can be read without those before it. A frame of the other formats is drawn over the one before: to read the tenth, nine are
decoded. So a loop stays open between two frames, and whoever asks for them in order decodes each once; threads that share a loop come nearly in
order. Of pixels, a few frames are held, of WebP the compressed file too.

Frames are counted from 1. Whatever is wrong with a file raises DataError, one line that names the file and the frame.
"""

import io
import itertools
import math
import re
import struct
import threading
import zlib
from dataclasses import replace

import numpy
from PIL import Image, ImageOps, TiffImagePlugin

from ..engine.parallel import number_of_threads, parallel_for
from .layout import FORMATS, DataError

OPEN = 8                                # loops held open: training reads an image and its masks, and two loops where one follows the other
# What a TIFF says of how a page is stored: sizes, depth, compression, what is white, order, orientation, strips, tiles, predictor, palette, colours.
PIXEL_TAGS = {254, 256, 257, 258, 259, 262, 266, 274, 277, 278, 284, 292, 293, 317, 320, 322, 323, 338, 339, 347, 530, 531, 532}
MILLISECONDS = 50                       # that a frame is shown if its file does not say: 20 frames per second


# --- Which frames there are -------------------------------------------------------------------------------------------

def with_frames(samples, unequal=None):
    """Return `samples` with the frames of each loop in its place: of the same subject, named {name}#{number}. Opens all files, decodes nothing.

    The mask of a loop is a loop of as many frames. Where it is not, DataError is raised; or if `unequal` is a list, (sample, error) is added to
    it, and frames have no mask to compare with. A file that cannot be opened counts as one image: whoever reads it says what is wrong.
    """
    def count(sample):
        try:
            return [count_frames(path) for path in (sample.image_path, *(sample.mask_paths or ()))]
        except (DataError, OSError):
            return None

    found = []
    for sample, counts in zip(samples, parallel_for(samples, count)):
        number, *of_masks = counts or [1]
        differs = next((place for place, other in enumerate(of_masks) if other != number), None)
        if differs is not None:
            error = DataError(f'{sample.mask_paths[differs]}: holds {_said(of_masks[differs])}, and its image {sample.image_path.name} '
                              f'{_said(number)}; the mask of a loop is a loop of as many frames')
            if unequal is None:
                raise error
            unequal.append((sample, error))
            sample = replace(sample, mask_paths=None)
        found += [sample] if number == 1 else [replace(sample, name=f'{sample.name}#{frame}', frame=frame, frames=number)
                                               for frame in range(1, number + 1)]
    return found


def _said(number):
    return '1 image' if number == 1 else f'{number} frames'


def count_frames(path):
    """Return how many frames the image file at `path` holds, 1 if it is an image. Raises DataError, also for what Pillow cannot read."""
    try:
        with open(path, 'rb') as file, Image.open(file, formats=FORMATS) as image:
            return frames_of(image, path)
    except (DataError, OSError):
        raise
    except Exception as error:              # Pillow's decoders raise SyntaxError, struct.error and others
        raise DataError(f'{path}: cannot be read as an image ({error})') from error


def frames_of(image, path):
    """Return how many frames an opened Pillow image holds. Raises DataError for a stack of which only a note tells."""
    if image.format == 'MPO':               # a JPEG with a preview or a second view; programs show the first
        return 1
    number = getattr(image, 'n_frames', 1) - _skipped(image)
    stack = re.search(r'^images=(\d+)', str(getattr(image, 'tag_v2', {}).get(270, '')), re.MULTILINE)
    if stack and int(stack[1]) > number:    # ImageJ writes a large stack as one page and a note
        raise DataError(f'{path}: holds {stack[1]} pages, as a note in it says, behind one: a large stack of ImageJ; save it there as an image '
                        'sequence, one file per page')
    return number


def _skipped(image):
    """Return how many frames come before the first of the animation: an APNG may hold a still for programs that know no animations."""
    return int(bool(getattr(image, 'default_image', False)))


def milliseconds_of(path):
    """Return for how long the first frame of a loop is shown, MILLISECONDS if its file does not say. Raises OSError."""
    with open(path, 'rb') as file, Image.open(file, formats=FORMATS) as image:
        if image.format != 'TIFF':          # which never knows; the first frame is to be loaded before an APNG or WebP does
            image.load()
        return max(20, round(image.info.get('duration') or MILLISECONDS))           # players take less than 20 for an error


# --- Reading ----------------------------------------------------------------------------------------------------------

def read_frame(path, frame, convert):
    """Return `convert(image, kind)` of a frame of a loop: a Pillow image that is upright, and the format of its file.

    Raises DataError for a frame that is not there, of another size than the first, or drawn over one that cannot be read; else what Pillow raises.
    """
    state = path.stat()
    key = path, state.st_mtime_ns, state.st_size                # a file that was written anew is another one
    with _lock:
        loop = _loops[key] = _loops.pop(key, None) or _Loop(path)
        old = [_loops.pop(key) for key in [*_loops][:-OPEN]]
    for other in old:
        other.close()
    return loop.read(frame, convert)


class DrawnOverLost(DataError):
    """A frame cannot be read because one before it cannot, over which it is drawn."""


class _Loop:
    """A loop that stays open while its frames are read, by any number of threads. `close` lets go of file and frames, and reading opens it again."""

    def __init__(self, path):
        self.path, self.lock, self.file, self.image, self.broken = path, threading.Lock(), None, None, None

    def close(self):
        with self.lock:
            self._close()

    def read(self, frame, convert):
        """Return what `read_frame` says of a frame."""
        with self.lock:
            if self.image is None:
                self._open()
            if not 1 <= frame <= self.frames:
                raise DataError(f'{self.path}: has no frame {frame}, it holds {_said(self.frames)}')
            image = self._page(frame) if self.kind == 'TIFF' else self._drawn(frame)
            if frame == self.frames if self.kind == 'TIFF' else self.at == self.frames and not self.ahead:
                self._close()
        if self.kind == 'TIFF':                                 # Pillow turns a page upright by itself
            return convert(Image.open(image, formats=('TIFF',)), self.kind)
        return convert(ImageOps.exif_transpose(image), self.kind)

    def _open(self):
        self.file = open(self.path, 'rb')
        try:
            self.image = Image.open(self.file, formats=FORMATS)
            if self.image.width * self.image.height > (Image.MAX_IMAGE_PIXELS or math.inf):
                raise Image.DecompressionBombError
            self.kind, self.size, self.frames = self.image.format, self.image.size, frames_of(self.image, self.path)
            if self.kind == 'PNG' and self.image.mode.startswith('I'):
                raise DataError(f'{self.path}: is an animated PNG of 16 bits, whose frames Pillow lays over each other wrongly; save it as TIFF')
        except BaseException:
            self._close()
            raise
        self.at, self.ahead = 0, {}                     # how many frames are decoded, and those of them that nobody has asked for yet

    def _close(self):
        self.image, self.ahead = None, {}
        if self.file:
            self.file.close()

    def _page(self, frame):
        """Return a page as a TIFF of its own, in a file in memory: in a large one, libtiff walks over all pages to decode one of them."""
        self.image.seek(frame - 1)
        if self.image.size != self.size:
            raise DataError(f'{self.path}, frame {frame}: is {self.image.height}×{self.image.width} pixels (height×width), the first frame is '
                            f'{self.size[1]}×{self.size[0]}; all frames of a loop are equally large')
        tags = self.image.tag_v2
        places, lengths = (324, 325) if 324 in tags else (273, 279)         # tiles, or strips
        alone, pixels = TiffImagePlugin.ImageFileDirectory_v2(prefix=tags.prefix), []
        for start, length in zip(tags[places], tags[lengths]):
            self.file.seek(start)
            pixels.append(self.file.read(length))
        for tag in PIXEL_TAGS & tags.keys():
            alone.tagtype[tag], alone[tag] = tags.tagtype[tag], tags[tag]
        alone.tagtype[places] = alone.tagtype[lengths] = 4                  # whole numbers of 32 bits
        alone[places] = alone[lengths] = tuple(map(len, pixels))
        # Pillow counts strips from the end of the table, tiles from the start of the file; the table is as long whatever it says.
        first = 0 if places == 273 else 8 + len(alone.tobytes(8))
        alone[places] = tuple(itertools.accumulate(map(len, pixels[:-1]), initial=first))
        file = io.BytesIO()
        alone.save(file)
        file.write(b''.join(pixels))
        file.seek(0)
        return file

    def _drawn(self, frame):
        """Return a frame that is drawn over those before it, as a Pillow image of its own."""
        if frame <= self.at and frame not in self.ahead:
            self._close()
            self._open()
        while self.at < frame:
            if self.broken and self.at + 1 == self.broken[0]:
                if frame == self.broken[0]:
                    raise OSError(self.broken[1])
                raise DrawnOverLost(f'{self.path}, frame {frame}: cannot be read, since frame {self.broken[0]}, which it is drawn over, cannot '
                                    f'({self.broken[1]})')
            try:
                self.image.seek(self.at + _skipped(self.image))
                # Pillow gives the first frame of a GIF in numbers of a palette and the others in colour; they are to be read alike.
                as_colour = 'RGBA' if 'transparency' in self.image.info else 'RGB'
                drawn = self.image.convert(as_colour) if (self.kind, self.image.mode) == ('GIF', 'P') else self.image.copy()
            except Exception as error:
                self.broken = self.at + 1, str(error)
                continue
            self.at += 1
            self.ahead[self.at] = drawn
            self.ahead.pop(self.at - 2 * number_of_threads(), None)
        return self.ahead.pop(frame)


_loops, _lock = {}, threading.Lock()                    # those that were read last, the last at the end


# --- Writing ----------------------------------------------------------------------------------------------------------

class Pages:
    """Appends grey pages to a TIFF, each written as it comes, so none is held; `close` ends it.

    file  opened for writing in binary, and empty: of `atomic_write`, and the TIFF is there whole or not at all

    Pillow can append pages too, but walks over all that are there for each: 2 million steps for 2,000 pages. A page is its pixels, row by row,
    compressed as in a PNG, and then a table of properties, which ends in the place of the next table (TIFF 6.0, 1992, and its supplement of 2002).
    """

    def __init__(self, file):
        self.file, self.end = file, 4           # what is written; there the place of the next table is to stand
        file.write(b'II*\0')                    # little-endian

    @staticmethod
    def packed(page):
        """Return a page (H, W), uint8 or uint16, 0 being black, as `append` takes it: the work, which a thread can do while another one is written.

        Raises ValueError for another dtype.
        """
        if page.dtype not in (numpy.uint8, numpy.uint16):
            raise ValueError(f'a page has dtype {page.dtype}; expected uint8 or uint16')
        return *page.shape, page.itemsize, zlib.compress(numpy.ascontiguousarray(page, page.dtype.newbyteorder('<')), 1)

    def append(self, packed):
        """Append a page that `packed` returned. Raises OSError beyond 4 GiB, which a TIFF cannot hold."""
        H, W, itemsize, pixels = packed
        pixels += bytes(len(pixels) % 2)                                # tables begin at even places
        start = self.end + 4
        table = start + len(pixels)
        if table >= 2**32 - 2**8:
            raise OSError(f'{self.file.name}: would be larger than 4 GiB, which a TIFF cannot be; cut the loop into several')
        long, short = 4, 3
        properties = ((256, long, W), (257, long, H), (258, short, 8 * itemsize), (259, short, 8), (262, short, 1),      # deflate; 0 is black
                      (273, long, start), (277, short, 1), (278, long, H), (279, long, len(pixels)))                          # all rows in one strip
        self.file.write(struct.pack('<I', table) + pixels + struct.pack('<H', len(properties)))
        self.file.write(b''.join(struct.pack('<HHII', number, kind, 1, value) for number, kind, value in properties))
        self.end = table + 2 + 12 * len(properties)

    def close(self):
        self.file.write(bytes(4))               # there is no next page
