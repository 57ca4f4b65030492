"""What becomes of the frames of a loop: probabilities smoothed over time, masks in one file, an animation, curves.

    with LoopWriter(folder) as writer:
        for frame in smoothed(frames, 5):                      a few of them are held at a time
            writer.append(frame.sample, drawn(frame.sample, mask, probability, picture))
"""

from collections import deque
from contextlib import ExitStack, closing
from dataclasses import dataclass

import numpy

from ..files import atomic_write
from ..images.loops import Pages, milliseconds_of
from . import figures
from .segment import describe

LONGEST = 640                           # pixels of the longer side of an animation: it is there to be looked at, and browsers hold all of it


def smoothed(frames, window):
    """Yield `frames`, whose `probabilities` (h, w) become the mean over the `window` frames around each, an odd number, of its loop.

    frames  in order, with a Sample each. `probabilities` are None if a frame could not be read: it gets none, and means are over the others

    The window is centred, so nothing lags behind. Towards either end of a loop it shrinks to the largest that is: the first and last frame are
    left as they are, the second has 3. Of single images too, and `window` frames are held at most.
    """
    maps, waiting = {}, deque()                                 # as they were, around those that wait; and these
    for frame in frames:
        waiting.append(frame)
        if frame.sample.frame in (None, 1):
            maps.clear()
        maps[frame.sample.frame] = frame.probabilities
        while waiting:
            number, last = (waiting[0].sample.frame or 1), (waiting[0].sample.frames or 1)
            reach = min(window // 2, number - 1, last - number)
            if reach and number + reach > frame.sample.frame:
                break
            maps.pop(number - window // 2 - 1, None)
            ready = waiting.popleft()
            if reach and ready.probabilities is not None:
                near = [p for p in (maps[place] for place in range(number - reach, number + reach + 1)) if p is not None]
                ready.probabilities = sum(near) / len(near)
            yield ready


@dataclass
class Drawn:
    """What is to be written of a frame: the page of its mask, its row of results, and what else was asked for."""

    shape: tuple                                                # (H, W)
    mask: tuple                                                 # as `Pages.append` takes it: 0 and 255
    row: dict
    true_row: dict | None = None
    probability: tuple | None = None                            # 16 bits, 65535 being certain
    overlay: bytes | None = None                                # as `Animation.append` takes it, and its size (height, width)
    size: tuple | None = None


def drawn(sample, mask, probability, picture=None, truth=None, with_probability=False):
    """Return the Drawn of a frame: all of the work that needs no order, for a thread beside others.

    mask         (H, W) bool
    probability  (H, W) float32, in [0, 1]
    picture      (H, W) uint8, if an overlay is to be drawn on it
    truth        (H, W) 0/1, the mask to compare with, if there is one
    """
    of_frame = {'image': sample.file_name, 'frame': sample.frame}
    done = Drawn(mask.shape, Pages.packed(mask.astype('uint8') * 255), {**of_frame, **describe(mask, probability), 'dice': ''})
    if truth is not None:
        true_row = describe(truth > 0, probability)
        done.true_row = {**of_frame, **{key: true_row[key] for key in ('area', 'row', 'column')}}
    if with_probability:
        done.probability = Pages.packed(numpy.round(numpy.clip(probability, 0, 1) * 65535).astype('uint16'))
    if picture is not None:
        done.size = mask.shape if max(mask.shape) <= LONGEST else figures.display_size(mask.shape, LONGEST)
        done.overlay = figures.Animation.encoded(figures.overlay(picture, mask, truth, size=done.size))
    return done


class LoopWriter:
    """Writes what was made of loops, whose frames come one loop after the other and in order.

    Of each loop {name}_mask.tif, a page for every frame; {name}_probability.tif and {name}_overlay.gif, if frames have them; and
    {name}_over_time.png. It is a context, and each file is there whole or not at all: an error leaves none half-written. Raises OSError.
    """

    def __init__(self, output):
        self.output, self.files = output, ExitStack()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return self.files.__exit__(*error)

    def append(self, sample, frame):
        """Append what was Drawn of a frame, None if it could not be read: then its page is empty, and animation and curves go on without it."""
        if sample.frame == 1:
            self.lost, self.rows, self.true_rows, self.masks = 0, [], [], None
        if frame is None and self.masks is None:
            self.lost += 1                                      # how large it is, the first that can be read will tell
        elif frame is None:
            self._append_lost(1)
        else:
            if self.masks is None:
                self._open(sample, frame)
                self._append_lost(self.lost)
            self.masks.append(frame.mask)
            if self.probabilities:
                self.probabilities.append(frame.probability)
            if self.overlays:
                self.overlays.append(frame.overlay)
            self.rows.append(frame.row)
            self.true_rows += [frame.true_row] if frame.true_row else []
        if sample.frame == sample.frames and self.masks:
            self.files.close()
            picture = figures.over_time(self.rows, self.true_rows, sample.file_name)
            figures.save(picture, self.output / f'{sample.file_name}_over_time.png', durable=False)

    def _open(self, sample, frame):
        def opened(ending, writer, *arguments):
            file = self.files.enter_context(atomic_write(self.output / f'{sample.file_name}_{ending}', durable=False))
            return self.files.enter_context(closing(writer(file, *arguments)))

        self.empty = numpy.zeros(frame.shape, 'uint8')
        self.masks = opened('mask.tif', Pages)
        self.probabilities = None if frame.probability is None else opened('probability.tif', Pages)
        self.overlays = None
        if frame.overlay is not None:
            self.overlays = opened('overlay.gif', figures.Animation, frame.size, milliseconds_of(sample.image_path))

    def _append_lost(self, number):
        for _ in range(number):
            self.masks.append(Pages.packed(self.empty))
            if self.probabilities:
                self.probabilities.append(Pages.packed(self.empty.astype('uint16')))
