"""Images and masks: finding them on disk, reading them rightly, and handing them to training batch by batch.

    samples = find_samples('DIR')                              which image belongs to which mask and to which subject
    training, validation = split_by_subject(samples, 0.2, seed=0)
    reader = Reader((96, 128))                                 reads, checks, resizes, remembers
    mean, std = intensity_statistics(training, reader)
    loader = Loader(training, reader, batch_size=16, seed=0, shuffle=True)
    for images, masks in loader.epoch(0):                      (N, H, W, 1) float32: [0, 1] and {0, 1}
        ...

A score is honest only if no subject is on both sides of a split: neighbouring frames of one subject are near copies,
and a network that has seen one of them has seen the other.

Whatever is wrong with a folder or a file raises DataError, one line that names the file, what was found and the way
out. Sizes are (H, W) in pixels; intensities lie in [0, 1], 0 black and 1 white, whatever the format of the file.
"""

import re
import threading
import time
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy
from PIL import Image, ImageOps

from ..engine.backend import copied_ahead
from ..engine.parallel import parallel_for

SUFFIXES = '.png', '.jpg', '.jpeg', '.tif', '.tiff', '.bmp'
FORMATS = 'PNG', 'JPEG', 'TIFF', 'BMP'
LAYOUTS = ('{subject}_{image}.tif beside {subject}_{image}_mask.tif, in this folder or in its train/; or two folders '
           f'images/ and masks/ with equal names ({", ".join(SUFFIXES)})')


class DataError(ValueError):
    """Something is wrong with a folder or a file of images; one line that names it, what was found and the way out."""


@dataclass(frozen=True)
class Sample:
    """One image on disk: its name without suffix, whom it shows, and where its mask is (None if it has none)."""

    name: str
    subject: str
    image_path: Path
    mask_path: Path | None


# --- Which files there are --------------------------------------------------------------------------------------------

def find_samples(folder, subject_pattern=None, masks='required'):
    """Return the samples in `folder` as a list, in natural order (2 before 10). Opens no image.

    Two layouts are recognised: `{subject}_{image}.tif` with `{subject}_{image}_mask.tif`, in `folder` or in its
    `train/`; and two folders `images/` and `masks/` with equal names. Formats are PNG, JPEG, TIFF and BMP, and may
    differ within a pair.

    The subject is what the regular expression `subject_pattern` finds in an image's name: its group `subject`, else its
    first. Without a pattern it is the first number of a name `{subject}_{image}`; any other image is taken for a
    subject of its own (see `is_split_by_image`).

    masks  'required': every image has one and every mask belongs to an image
           'optional': pairs what there is; `folder` may also be the path of one image
           'none':     the same, and every mask_path is None

    Raises DataError for a folder without images, an image without mask, a mask without image, two images of one name, a
    subject_pattern that does not fit.
    """
    if masks not in ('required', 'optional', 'none'):
        raise ValueError(f"masks is {masks!r}; expected 'required', 'optional' or 'none'")
    folder = Path(folder)
    if folder.is_file() and masks != 'required':
        is_plain, image_files = False, [folder]
        mask_files = [path for path in (folder.with_name(f'{folder.stem}_mask{suffix}') for suffix in SUFFIXES)
                      if path.is_file()]
    elif not folder.is_dir():
        problem = 'is a file, expected a folder of images' if folder.exists() else 'no such folder'
        raise DataError(f'{folder}: {problem}')
    else:
        root = folder / 'train' if (folder / 'train').is_dir() else folder
        is_plain = (root / 'images').is_dir()
        if is_plain:
            image_files, mask_files = _image_files(root / 'images'), _image_files(root / 'masks')
        else:
            files = _image_files(root)
            image_files = [path for path in files if not path.stem.endswith('_mask')]
            mask_files = [path for path in files if path.stem.endswith('_mask')]
        if not image_files or masks == 'required' and not mask_files:
            missing = 'pairs of image and mask' if masks == 'required' else 'images'
            raise DataError(f'{folder}: holds no {missing}. Looked for {LAYOUTS}. Found {_listing(root)}')

    images, mask_of = _by_name(image_files), {} if masks == 'none' else _by_name(mask_files, ending='_mask')
    if masks == 'required':
        _check_pairs(images, mask_of)
    subject_of = _subject_function(subject_pattern, is_plain)
    return [Sample(name, subject_of(images[name]), images[name], mask_of.get(name))
            for name in sorted(images, key=natural_key)]


def natural_key(name):
    """Return a key that sorts names as people count: 'a2' before 'a10'."""
    return [int(part) if part.isdecimal() else part for part in re.split(r'(\d+)', name)], name


def _image_files(folder):
    """Return the image files of a folder, hidden ones excepted; an empty list if there is no such folder."""
    if not folder.is_dir():
        return []
    return [path for path in folder.iterdir()
            if path.suffix.lower() in SUFFIXES and not path.name.startswith('.') and path.is_file()]


def _by_name(paths, ending=''):
    """Return {name without suffix, and without `ending`: path}."""
    by_name = {}
    for path in sorted(paths):
        name = path.stem.removesuffix(ending)
        if name in by_name:
            raise DataError(f'{path}: {by_name[name].name} has the same name; keep one of the two')
        by_name[name] = path
    return by_name


def _check_pairs(images, mask_of):
    """Raise DataError unless images and masks, both {name: path}, belong together one to one."""
    bare = sorted(images.keys() - mask_of.keys(), key=natural_key)
    lost = sorted(mask_of.keys() - images.keys(), key=natural_key)
    if bare:
        image = images[bare[0]]
        expected = (image.parent.parent / 'masks' / image.name if image.parent.name == 'images'
                    else image.with_name(f'{image.stem}_mask{image.suffix}'))
        raise DataError(f'{image}: has no mask; expected {expected}, or one in another format '
                        f'({len(bare)} of {len(images)} images have none)')
    if lost:
        raise DataError(f'{mask_of[lost[0]]}: this mask has no image {lost[0]}.* '
                        f'({len(lost)} of {len(mask_of)} masks have none); add the image or remove the mask')


def _subject_function(pattern, is_plain):
    """Return a function from an image's path to its subject."""
    if pattern is None:
        def subject_of(path):
            match = None if is_plain else re.fullmatch(r'(\d+)_\d+', path.stem)
            return match[1] if match else path.stem
        return subject_of

    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise DataError(f'--subject-pattern {pattern!r} is no regular expression: {error}') from None
    if compiled.groups == 0:
        raise DataError(f'--subject-pattern {pattern!r} has no group; put parentheses around the subject, '
                        'as in (.+)_[0-9]+')
    group = 'subject' if 'subject' in compiled.groupindex else 1

    def subject_of(path):
        match = compiled.search(path.stem)
        if not match or not match[group]:
            raise DataError(f'{path}: --subject-pattern {pattern!r} finds no subject in the name {path.stem!r}')
        return match[group]
    return subject_of


def _listing(folder):
    """Return in words what lies in `folder`."""
    names = sorted(entry.name + '/' * entry.is_dir() for entry in folder.iterdir())
    if not names:
        return 'nothing, the folder is empty'
    return ', '.join(names[:6]) + f' and {len(names) - 6} more' * (len(names) > 6)


# --- Who is trained on and who is not ---------------------------------------------------------------------------------

def is_split_by_image(samples):
    """Return True if every image is a subject of its own, so that a split by subject is one by image.

    If they come from fewer subjects in truth, frames of one subject land on both sides, and scores are too good to be
    true.
    """
    return len({sample.subject for sample in samples}) == len(samples)


def split_by_subject(samples, validation_share, seed, positive=None):
    """Return (training, validation): two lists that share no subject, the second near `validation_share` of the images.

    Subjects are drawn in random order, and each is taken for validation if that brings the number of images closer to
    the share. Both sides get at least one. Raises DataError with fewer than two subjects, ValueError for a share
    outside (0, 1).
    """
    if not 0 < validation_share < 1:
        raise ValueError(f'the validation share is {validation_share}; expected a number between 0 and 1')
    images = Counter(sample.subject for sample in samples)
    if len(images) < 2:
        raise DataError(f'{len(samples)} images of {len(images)} subject ({", ".join(images)}): a split by subject '
                        'needs two or more; add subjects, or give --subject-pattern if the names hold them')
    subjects = sorted(images, key=natural_key)
    numpy.random.default_rng(seed).shuffle(subjects)
    wanted, count, chosen = validation_share * len(samples), 0, set()
    for subject in subjects:
        if abs(count + images[subject] - wanted) < abs(count - wanted) and len(chosen) < len(subjects) - 1:
            chosen.add(subject)
            count += images[subject]
    chosen = chosen or {min(subjects, key=images.get)}
    return ([sample for sample in samples if sample.subject not in chosen],
            [sample for sample in samples if sample.subject in chosen])


# --- Reading one file -------------------------------------------------------------------------------------------------

def read_image(path):
    """Return the image at `path` as (H, W) float32 intensities in [0, 1].

    8-bit grey is divided by 255, 16-bit grey by 65535, floating-point grey is taken as it is. Colours, palettes
    included, become their luma, 0.299 R + 0.587 G + 0.114 B; what is transparent counts as black. A camera's
    orientation mark is obeyed.

    Raises DataError for a file that cannot be read to its end, several pages, 32-bit integers, floats outside [0, 1].
    """
    pixels, white = _read_grey(path)
    if white is None:
        raise DataError(f'{path}: holds 32-bit integers ({pixels.min()} to {pixels.max()}), and nothing says which is '
                        'white; save it with 8 or 16 bits')
    if white == 1 and not (pixels.min() >= 0 and pixels.max() <= 1):                 # false for NaN as well
        raise DataError(f'{path}: holds floating-point values from {pixels.min():g} to {pixels.max():g}, expected 0 to '
                        '1; scale it, or save it with 8 or 16 bits')
    return pixels.astype(numpy.float32) / white


def read_mask(path, threshold=None):
    """Return the mask at `path` as (H, W) uint8: 0 is background, 1 is foreground.

    In the file, 0 is background and one other value, any, is foreground: 0/255, 0/1 and black/white are all the same. A
    file of the one value 0 is an empty mask, of one other value a full one. Raises DataError for more values, as lossy
    formats make them, unless `threshold` says that values ≥ threshold, in the file's own units, are foreground.
    """
    values, _ = _read_grey(path)
    if threshold is not None:
        return (values >= threshold).astype(numpy.uint8)
    if not ((values == 0) | (values == values.max())).all():
        found = [f'{value:g}' for value in numpy.unique(values)]
        shown = ', '.join(found if len(found) <= 6 else [*found[:3], '…', *found[-2:]])
        middle = (values.max().item() + 1) // 2
        raise DataError(f'{path}: a mask holds 0 and one other value, this file holds {len(found)} values, {shown}; to '
                        f'count all values from N up as foreground give --mask-threshold N, for example {middle:g}')
    return (values != 0).astype(numpy.uint8)


def read_pair(sample, mask_threshold=None):
    """Return (image (H, W) float32, mask (H, W) uint8) of a sample. Raises DataError, also if their sizes differ."""
    if sample.mask_path is None:
        raise DataError(f'{sample.image_path}: has no mask')
    image, mask = read_image(sample.image_path), read_mask(sample.mask_path, mask_threshold)
    if image.shape != mask.shape:
        raise DataError(f'{sample.mask_path}: this mask is {mask.shape[0]}×{mask.shape[1]} pixels (height×width), its '
                        f'image {sample.image_path.name} is {image.shape[0]}×{image.shape[1]}; they must be equal')
    return image, mask


def _read_grey(path):
    """Return (pixels (H, W), white): the grey levels as stored, and the level that is white, None if unknown."""
    try:
        # Given a path, Pillow maps an uncompressed TIFF into memory, and scrambles it if it has an orientation mark.
        with open(path, 'rb') as file, Image.open(file, formats=FORMATS) as image:
            pages = getattr(image, 'n_frames', 1)
            if pages > 1:
                raise DataError(f'{path}: holds {pages} pages, expected one; split it into one file per page')
            return _grey(image)
    except DataError:
        raise
    except Exception as error:              # Pillow's decoders raise OSError, SyntaxError, struct.error and others
        reason = (str(error).splitlines() or [type(error).__name__])[0].partition(' <_io')[0]
        raise DataError(f'{path}: cannot be read as an image ({reason})') from error


def _grey(image):
    """Return (pixels (H, W), white) of an opened Pillow image."""
    tags = getattr(image, 'tag_v2', {})             # of a TIFF
    image_format = image.format
    if image_format != 'TIFF':                      # Pillow turns a TIFF by itself
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith('I;16'):
        white = 2**tags.get(258, (16,))[0] - 1      # TIFF knows 12 bits
        pixels = numpy.array(image)                 # not convert('L'), which cuts off at 255
        return (white - pixels if tags.get(262) == 0 else pixels), white     # TIFF may count from white to black
    if image.mode == 'I':
        return numpy.array(image), 65535 if image_format == 'PNG' else None     # older Pillows open 16-bit PNGs so
    if image.mode == 'F':
        return numpy.array(image), 1
    if image.mode in ('LA', 'La', 'PA', 'RGBA', 'RGBa') or 'transparency' in image.info:
        image = Image.alpha_composite(Image.new('RGBA', image.size, 'black'), image.convert('RGBA'))
    return numpy.array(image.convert('L')), 255


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


# --- Reading many files -----------------------------------------------------------------------------------------------

class Reader:
    """Reads samples at one size (H, W), and remembers the first ones read, up to `cache_bytes` of memory.

    Training meets every sample once per epoch, so it makes no difference which ones are remembered, only how many; one
    Reader can serve several loaders, within one budget. Images are held as uint16, 65535 being white: 8 bits would
    leave a few levels of an image that uses little of its 16-bit range.
    """

    def __init__(self, size, mask_threshold=None, cache_bytes=2**30):
        self.size, self.mask_threshold = tuple(size), mask_threshold
        self.free_bytes = cache_bytes
        self.cache, self.lock = {}, threading.Lock()

    def read(self, sample):
        """Return (image (H, W) uint16, mask (H, W) uint8 0/1); do not write into them. Raises DataError."""
        pair = self.cache.get(sample)
        if pair is None:
            image, mask = read_pair(sample, self.mask_threshold)
            pair = numpy.rint(resize(image, self.size) * 65535).astype(numpy.uint16), resize_mask(mask, self.size)
            with self.lock:
                if sum(array.nbytes for array in pair) <= self.free_bytes and sample not in self.cache:
                    self.free_bytes -= sum(array.nbytes for array in pair)
                    self.cache[sample] = pair
        return pair


class Filtered:
    """A reader whose images have passed `function`, (H, W) uint16 to the same; masks are those of `reader`."""

    def __init__(self, reader, function):
        self.reader, self.function, self.size = reader, function, reader.size

    def read(self, sample):
        image, mask = self.reader.read(sample)
        return self.function(image), mask


def intensity_statistics(samples, reader):
    """Return (mean, std) of the intensities, in [0, 1], of all pixels of `samples`, accumulated in float64.

    Where this is the first reading of all samples, it is the slow one, so the cores share it.

    Give it the training part only: what is measured on validation images is knowledge of them. Raises DataError if
    there are no samples or all pixels are equal.
    """
    def sums(sample):
        image = reader.read(sample)[0] / 65535                                       # float64
        return image.size, image.sum(), numpy.square(image).sum()

    count, total, squares = map(sum, zip(*parallel_for(samples, sums))) if samples else (0, 0.0, 0.0)
    mean = total / max(count, 1)
    variance = squares / max(count, 1) - mean**2
    if not variance > 1e-12:                                                         # below what 16 bits can hold
        raise DataError(f'{len(samples)} images of one and the same grey: there is nothing to learn from')
    return float(mean), float(variance**0.5)


def holds_foreground(samples, reader):
    """Return an array (N,) of bool: whether the mask of each sample holds any foreground at the reader's size."""
    return numpy.array(parallel_for(samples, lambda sample: reader.read(sample)[1].any()))


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

    After an epoch, `waited_seconds` is the time the caller spent waiting for batches in it. Raises DataError without
    samples, or if positive_share asks for a kind that there is none of.
    """

    def __init__(self, samples, reader, batch_size, *, seed=0, shuffle=False, positive_share=None, transform=None,
                 read_ahead=2, device='cpu'):
        if not samples:
            raise DataError('no samples to load')
        if batch_size < 1:
            raise ValueError(f'batch_size is {batch_size}; expected 1 or more')
        self.samples, self.reader, self.batch_size = list(samples), reader, batch_size
        self.seed, self.shuffle, self.transform, self.read_ahead = seed, shuffle, transform, read_ahead
        self.device = device
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
                                    'are none: leave out --nerve-share')

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
        return (images, masks) if self.transform is None else self.transform(images, masks, rngs)

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
            return (self.batch if self.device == 'cpu' else self.read)(order[part], number, draws[part])

        def waited(batches):
            for _ in starts:
                asked = time.perf_counter()
                batch = next(batches)
                self.waited_seconds += time.perf_counter() - asked
                yield batch

        with (closing(read_ahead(prepare, starts, self.read_ahead)) as batches,
              closing(copied_ahead(waited(batches), self.device)) as copied):
            for batch in copied:
                yield batch if self.device == 'cpu' else self.transformed(*batch)


def drawn(indices, number, rng):
    """Return `number` of `indices`: all of them as often as they fit in, and a random few once more."""
    times, rest = divmod(number, len(indices)) if number else (0, 0)
    return numpy.concatenate([numpy.tile(indices, times), rng.permutation(indices)[:rest]])


def read_ahead(function, items, ahead=2):
    """Yield `function(item)` for each of `items`, in order; a background thread keeps `ahead` results ready.

    An error in the background is raised here, as itself. A caller that leaves its loop half-way leaves no thread
    behind.
    """
    pending, background = deque(), ThreadPoolExecutor(1, thread_name_prefix='read ahead')
    try:
        for item in items:
            pending.append(background.submit(function, item))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        background.shutdown(cancel_futures=True)
