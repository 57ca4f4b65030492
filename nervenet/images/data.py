"""Images and masks at one size, looked at with suspicion, and handed to training batch by batch.

    reader = Reader((96, 128))                                 reads, checks, resizes, remembers samples: see `samples.py`
    mean, std = intensity_statistics(training, reader)
    loader = Loader(training, reader, batch_size=16, seed=0, shuffle=True)
    for images, masks in loader.epoch(0):                      (N, H, W, 1) float32: [0, 1] and {0, 1}
        ...

How one file is read is in `reading.py`. Sizes are (H, W) in pixels; intensities lie in [0, 1], 0 black and 1 white.
"""

import re
import threading
import time
from collections import Counter
from contextlib import closing

import numpy
from PIL import Image

from ..engine.backend import copied_ahead
from ..engine.parallel import parallel_for
from ..engine.workers import in_background
from .reading import MaskRule, header_of, read_pair
from .samples import DataError, some_of

FITS = 'pad', 'crop', 'squeeze'         # how an image comes to a size of another shape, see `places`


# --- What deserves a second look --------------------------------------------------------------------------------------

def mask_oddity(sample, mask):
    """Return in words what is odd about the mask (H, W) 0/1 of a sample whose two files were read; '' if nothing is."""
    if mask.mean() > 0.5:
        return 'foreground for more than half (inverted?)'
    if sample.image_path and sample.mask_paths and (sample.frame or 1) == 1:        # else it was made, not read, or is a later frame
        (mark, is_square), (mark_of_mask, _) = header_of(sample.image_path), header_of(sample.mask_paths[0])
        # Marks from 5 on exchange height and width. If only one file has such a mark, equal sizes show that both are upright.
        if mark != mark_of_mask and (is_square or (mark > 4) == (mark_of_mask > 4)):
            return 'perhaps turned against their images (their orientation marks differ, and are obeyed: save both upright)'
    return ''


def intensity_oddity(image, mean, std):
    """Return in words how the intensities (H, W) of an image lie far from those of mean and std in training; '' if near.

    Frames of one kind lie within one standard deviation, and theirs within a factor of 1.3. Far is beyond 1.5 and 3.
    """
    shift, spread = (image.mean(dtype=float) - mean) / std, image.std(dtype=float) / std
    if abs(shift) <= 1.5 and 1 / 3 <= spread <= 3:
        return ''
    if abs(shift) > 0.5:
        return 'much darker' if shift < 0 else 'much brighter'
    return 'much flatter' if spread < 1 else 'much richer in contrast'


def oddity_warning(what, names, oddities):
    """Return a text, a line for each kind of oddity, that names those of `names` that have one; '' if none has.

    what      what they are names of, such as 'masks'
    oddities  for each name, words or ''
    """
    named = {}
    for name, oddity in zip(names, oddities):
        if oddity:
            named.setdefault(oddity, []).append(name)
    return '\n'.join(f'WARNING: {len(odd)} of {len(names)} {what} are {oddity}: {some_of(odd)}' for oddity, odd in named.items())


def data_warning(samples, reader, mean, std):
    """Return what deserves a second look before training on `samples`, whose intensities have `mean` and `std`; '' if nothing.

    That is masks which are perhaps inverted or turned, and images much darker or brighter than the others, as 12 bits
    in a 16-bit file are beside 8-bit files.
    """
    def oddities(sample):
        place = reader.place(sample)
        image, mask = (array[place] for array in reader.read(sample))
        return mask_oddity(sample, mask), intensity_oddity(image / numpy.float32(65535), mean, std)

    of_masks, of_images = zip(*parallel_for(samples, oddities))
    names = [sample.name for sample in samples]
    of_images = [oddity and f'{oddity} than the others (of fewer bits than their files hold?)' for oddity in of_images]
    return '\n'.join(filter(None, [oddity_warning('masks', names, of_masks), oddity_warning('images', names, of_images)]))


def crop_warning(samples, reader):
    """Return what is to be said of foreground that `crop` cuts away from `samples`; '' if there is none."""
    lost = {sample.name: reader.lost(sample) for sample in samples}
    hit = sorted((name for name in lost if lost[name]), key=lambda name: -lost[name])
    return (f'WARNING: --fit crop cuts foreground away in {len(hit)} of {len(lost)} images, of the most in '
            f'{some_of([f"{name} ({lost[name]:.0%} of it)" for name in hit])}. There, prediction will find none; --fit pad keeps all.') if hit else ''


# --- Changing the size ------------------------------------------------------------------------------------------------

def resize(image, size):
    """Return image (H, W) float32 at `size` (H, W), without aliasing; itself if that is its size already.

    Shrinking, every new pixel is a weighted mean (a triangle) of all the old ones near it; taking single old pixels
    instead would turn speckle into noise. The weights are positive, so values stay within the old range.
    """
    if image.shape == tuple(size):
        return image
    return numpy.array(Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BILINEAR))


def resize_mask(mask, size):
    """Return mask (H, W) uint8 0/1 at `size` (H, W), 0/1 again: 1 where a pixel covers at least half foreground.

    The same weighted mean as for the image keeps the outline where the image shows it. Taking the nearest old pixel
    would keep the values binary as well, and let one pixel in twenty decide for the others.
    """
    return (resize(mask.astype(numpy.float32), size) >= 0.5).astype(numpy.uint8)


def places(shape, size, fit):
    """Return (part, place): the part of an image (H, W) = `shape` that is seen, and the place in a picture of `size` where it is seen.

    Both are pairs of slices, (rows, columns); the part, resized, fills the place.

    squeeze  all of the image fills all of the picture: a circle becomes an ellipse
    pad      all of it lies in the middle of the picture, as large as it fits in; the rest is black
    crop     the middle of it fills all of the picture; what sticks out is not seen
    """
    if fit not in FITS:
        raise ValueError(f'fit is {fit!r}; expected one of {", ".join(FITS)}')
    whole = slice(0, shape[0]), slice(0, shape[1])
    full = slice(0, size[0]), slice(0, size[1])
    return _centred(size, shape) if fit == 'crop' else whole, _centred(shape, size) if fit == 'pad' else full


def _centred(shape, within):
    """Return slices (rows, columns): the largest box of the proportions of `shape` in the middle of an image (H, W) = `within`.

    The side that does not touch is rounded to the nearest pixel, and at least 1; in whole numbers, so that rounding never lets it
    exceed the image.
    """
    (H, W), (height, width) = shape, within
    if H * width >= W * height:
        width = max(1, (2 * W * height + H) // (2 * H))
    else:
        height = max(1, (2 * H * width + W) // (2 * W))
    top, left = (within[0] - height) // 2, (within[1] - width) // 2
    return slice(top, top + height), slice(left, left + width)


def fitted(image, size, fit, by=resize):
    """Return what is seen of image (H, W) in a picture of `size` (H, W); 0 is around it. `by` resizes: a mask by `resize_mask`."""
    return _moved(image, *places(image.shape, size, fit), size, by)


def unfitted(picture, shape, fit, by=resize):
    """Return a picture, such as a map of probabilities, as `fitted` made it of an image (H, W) = `shape`, at the size of that image.

    The same part and place are used, so what lies on a pixel there lies on it here. 0 is where the picture shows nothing of the image.
    """
    part, place = places(shape, picture.shape, fit)
    return _moved(picture, place, part, shape, by)


def _moved(image, part, place, size, by):
    """Return what `place` (rows, columns) of a picture of `size` (H, W) holds, if it is filled with `part` of the image; 0 elsewhere."""
    rows, columns = place
    moved = by(image[part], (rows.stop - rows.start, columns.stop - columns.start))
    if moved.shape == tuple(size):
        return moved
    picture = numpy.zeros(size, moved.dtype)
    picture[place] = moved
    return picture


# --- Reading many files -----------------------------------------------------------------------------------------------

class Remembering:
    """A reader that remembers the first pairs read, up to `cache_bytes` of memory; `make(sample)` reads one, at `size`.

    Training meets every sample once per epoch, so it makes no difference which ones are remembered, only how many; one
    reader can serve several loaders, within one budget.
    """

    def __init__(self, cache_bytes):
        self.free_bytes, self.cache, self.lock = cache_bytes, {}, threading.Lock()

    def read(self, sample):
        """Return (image (H, W) uint16, 65535 being white; mask (H, W) uint8 0/1); do not write into them. Raises DataError."""
        pair = self.cache.get(sample)
        if pair is None:
            pair = self.make(sample)
            needed = sum(array.nbytes for array in pair)
            with self.lock:
                if needed <= self.free_bytes and sample not in self.cache:
                    self.free_bytes -= needed
                    self.cache[sample] = pair
        return pair

    def place(self, sample):
        """Return slices (rows, columns): where in what `read` returns the image is, and not black around it."""
        return slice(0, self.size[0]), slice(0, self.size[1])


class Reader(Remembering):
    """Reads samples at one size (H, W), to which they are fitted by `fit`, and remembers the first ones, up to `cache_bytes` of memory.

    Images are held as uint16, 65535 being white: 8 bits would leave a few levels of an image that uses little of its
    16-bit range.
    """

    def __init__(self, size, rule=MaskRule(), cache_bytes=2**30, fit='squeeze'):
        super().__init__(cache_bytes)
        self.size, self.rule, self.values, self.fit = tuple(size), rule, {}, fit
        self.files = {}                     # of each sample: (H, W) of its file, and what share of its foreground is not seen

    def make(self, sample):
        image, mask = read_pair(sample, self.rule, seen=self.values)
        part, _ = places(image.shape, self.size, self.fit)
        self.files[sample] = image.shape, 1 - mask[part].sum() / mask.sum() if mask.any() else 0.0
        return (numpy.rint(fitted(image, self.size, self.fit) * 65535).astype(numpy.uint16),
                fitted(mask, self.size, self.fit, by=resize_mask))

    def place(self, sample):
        return places(self._file(sample)[0], self.size, self.fit)[1]

    def lost(self, sample):
        """Return the share of the sample's foreground that `crop` cuts away, in [0, 1]; 0 if it has none."""
        return self._file(sample)[1]

    def _file(self, sample):
        if sample not in self.files:
            self.read(sample)
        return self.files[sample]


class Filtered(Remembering):
    """A reader whose images have passed `function`, (H, W) uint16 to the same; masks are those of `reader`.

    Each image is filtered once and not in each epoch. What is remembered lies within the memory that `reader` has left;
    `reader` itself remembers no more, since nobody asks twice for what is not filtered.
    """

    def __init__(self, reader, function):
        super().__init__(reader.free_bytes)
        self.reader, self.function, self.size, reader.free_bytes = reader, function, reader.size, 0

    def make(self, sample):
        image, mask = self.reader.read(sample)
        return self.function(image), mask

    def place(self, sample):
        return self.reader.place(sample)

    def lost(self, sample):
        return self.reader.lost(sample)


def intensity_statistics(samples, reader):
    """Return (mean, std) of the intensities, in [0, 1], of all pixels of `samples`, accumulated in float64.

    The black around an image that is padded does not count: it says nothing of the scanner. So they hardly depend on the size that
    images are fitted to, and an image of another shape is not odd because of its shape; `Segmenter.oddity` leaves it out as well.

    Where this is the first reading of all samples, it is the slow one, so the cores share it.

    Give it the training part only: what is measured on validation images is knowledge of them. Raises DataError if
    there are no samples or all pixels are equal.
    """
    def sums(sample):
        image = reader.read(sample)[0][reader.place(sample)] / 65535                 # float64
        return image.size, image.sum(), numpy.square(image).sum()

    count, total, squares = map(sum, zip(*parallel_for(samples, sums))) if samples else (0, 0.0, 0.0)
    mean = total / max(count, 1)
    variance = squares / max(count, 1) - mean**2
    if not variance > 1e-12:                                                         # below what 16 bits can hold
        raise DataError(f'{len(samples)} images of one and the same grey: there is nothing to learn from')
    return float(mean), float(variance**0.5)


def holds_foreground(samples, reader):
    """Return an array (N,) of bool: whether the mask of each sample holds any foreground at the reader's size.

    Where this is the first reading of all, it finds all that cannot be used. Raises DataError: the first of each kind, and how many there are.
    """
    def look(sample):
        try:
            return reader.read(sample)[1].any()
        except DataError as error:
            return error

    found = parallel_for(samples, look)
    if bad := [sample.name for sample, error in zip(samples, found) if isinstance(error, DataError)]:
        kinds = {re.sub(r'[\d.]+', '', str(error).partition(': ')[2])[:30]: str(error) for error in found[::-1] if isinstance(error, DataError)}
        raise DataError('; '.join([*kinds.values()][::-1][:3])
                        + f' ({len(bad)} of {len(samples)} pairs cannot be used: {some_of(bad)})' * (len(bad) > 1))
    return numpy.array(found)


class Loader:
    """Hands out batches of samples, reading ahead in the background.

    reader      a Reader: size, mask threshold, memory
    shuffle     a new order each epoch, drawn from `default_rng([seed, epoch])`; else the order of `samples`
    positive_share  the share of drawn samples whose mask holds foreground, whatever it is in `samples`; needs shuffle.
                An epoch keeps its number of images: of the kind asked for more often than it is there, some come again,
                of the other some do not come, others each epoch
    transform   `transform(images, masks, rngs) -> images, masks`, applied to each batch: images (N, H, W, 1) float32 in
                [0, 1], masks (N, H, W, 1) float32 0/1, and for each sample a Generator of its own,
                `default_rng([seed, epoch, index, draw])` with the sample's index in `samples`; `draw` is 1, and 2, 3, …
                when the sample comes again in one epoch. It is never 0: a seed sequence ignores trailing zeros, and
                the shuffle and sample 0 would draw alike
    read_ahead  how many batches to prepare while the caller works on one; it changes no result
    device      'cpu' or 'gpu': where `epoch` hands out its batches. On a GPU they are copied there ahead of their use, and transformed
                there
    rows        where several processes compute together: `rows(images)` is the slice of a batch of so many that `epoch` hands out here.
                The others are not read, and it may be empty

    After an epoch, `waited_seconds` is the time the caller spent waiting for batches in it. Raises DataError without
    samples, or if positive_share asks for a kind that there is none of.
    """

    def __init__(self, samples, reader, batch_size, *, seed=0, shuffle=False, positive_share=None, transform=None,
                 read_ahead=2, device='cpu', rows=lambda images: slice(0, images)):
        if not samples:
            raise DataError('no samples to load')
        if batch_size < 1:
            raise ValueError(f'batch_size is {batch_size}; expected 1 or more')
        self.samples, self.reader, self.batch_size = list(samples), reader, batch_size
        self.seed, self.shuffle, self.transform, self.read_ahead = seed, shuffle, transform, read_ahead
        self.device, self.rows = device, rows
        self.waited_seconds, self.kinds = 0.0, None
        if positive_share is not None:
            if not shuffle or not 0 <= positive_share <= 1:
                raise ValueError(f'positive_share is {positive_share} and shuffle {shuffle}; expected a share in [0, 1], '
                                 'and a random order')
            positive, wanted = holds_foreground(samples, reader), round(positive_share * len(samples))
            self.kinds = [(numpy.flatnonzero(positive), wanted), (numpy.flatnonzero(~positive), len(samples) - wanted)]
            for (indices, number), kind in zip(self.kinds, ('with', 'without')):
                if number and not len(indices):
                    raise DataError(f'{number} of {len(samples)} training images are to be {kind} foreground, and there '
                                    'are none: leave out --foreground-share')

    def __len__(self):
        """The number of batches in an epoch; the last one may be short."""
        return -(-len(self.samples) // self.batch_size)

    def order(self, epoch):
        """Return the indices of the samples in the order in which `epoch` meets them."""
        order, rng = numpy.arange(len(self.samples)), numpy.random.default_rng([self.seed, epoch])
        if self.kinds:
            order = numpy.concatenate([drawn(indices, number, rng) for indices, number in self.kinds])
        if self.shuffle:
            rng.shuffle(order)
        return order

    def batch(self, indices, epoch, draws=None):
        """Return (images, masks) of these samples, (N, H, W, 1) float32 each; `draws` are 1 unless a sample comes again."""
        return self.transformed(*self.read(indices, epoch, draws))

    def read(self, indices, epoch, draws=None):
        """Return (images, masks, rngs): a batch before it is transformed, and for each of its samples a Generator."""
        images, masks = numpy.empty((2, len(indices), *self.reader.size, 1), numpy.float32)
        for row, index in enumerate(indices):
            image, mask = self.reader.read(self.samples[index])
            images[row, ..., 0], masks[row, ..., 0] = image.astype(numpy.float32) / 65535, mask
        rngs = [numpy.random.default_rng([self.seed, epoch, int(index), draw])
                for index, draw in zip(indices, draws or [1] * len(indices))] if self.transform else None
        return images, masks, rngs

    def transformed(self, images, masks, rngs):
        return self.transform(images, masks, rngs) if self.transform and len(images) else (images, masks)

    def epoch(self, number):
        """Yield the batches (images, masks) of one epoch. An error in the background is raised here, as itself."""
        order, self.waited_seconds = self.order(number), 0.0
        seen, draws = Counter(), []
        for index in order:
            seen[index] += 1
            draws.append(seen[index])
        starts = range(0, len(order), self.batch_size)

        def prepare(start):
            part = slice(start, start + self.batch_size)
            rows = self.rows(len(order[part]))
            return (self.batch if self.device == 'cpu' else self.read)(order[part][rows], number, draws[part][rows])

        def waited(batches):
            for _ in starts:
                asked = time.perf_counter()
                batch = next(batches)
                self.waited_seconds += time.perf_counter() - asked
                yield batch

        with (closing(in_background(prepare, starts, self.read_ahead)) as batches,
              closing(copied_ahead(waited(batches), self.device)) as copied):
            for batch in copied:
                yield batch if self.device == 'cpu' else self.transformed(*batch)


def drawn(indices, number, rng):
    """Return `number` of `indices`: all of them as often as they fit in, and a random few once more."""
    times, rest = divmod(number, len(indices)) if number else (0, 0)
    return numpy.concatenate([numpy.tile(indices, times), rng.permutation(indices)[:rest]])
