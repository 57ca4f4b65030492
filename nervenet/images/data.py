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

import os
import re
import threading
import time
import unicodedata
import warnings
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy
from PIL import Image, ImageOps

from ..engine.backend import copied_ahead
from ..engine.parallel import parallel_for

SUFFIXES = '.png', '.jpg', '.jpeg', '.tif', '.tiff', '.bmp'
FORMATS = 'PNG', 'JPEG', 'TIFF', 'BMP'
MEDICAL = '.dcm', '.nii', '.gz', '.mha', '.mhd', '.nrrd', '.npy', '.npz', '.mat'          # images that Pillow does not know
MASK_NAME = re.compile(r'(.+)_mask([ _-]?\(?\d+\)?)?', re.IGNORECASE | re.DOTALL)    # x_mask; one of several: x_mask_1
LAYOUTS = ('{subject}_{image}.tif beside {subject}_{image}_mask.tif, in this folder or in its train/; or two folders '
           f'images/ and masks/ with equal names ({", ".join(SUFFIXES)})')


# `_read_grey` refuses such images itself, and names the file.
warnings.filterwarnings('ignore', category=Image.DecompressionBombWarning)


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

def find_samples(folder, subject_pattern=None, masks='required', tell=None):
    """Return the samples in `folder` as a list, in natural order (2 before 10). Opens no image.

    Two layouts are recognised: `{subject}_{image}.tif` with `{subject}_{image}_mask.tif`, in `folder` or in its
    `train/`; and two folders `images/` and `masks/` with equal names. Formats are PNG, JPEG, TIFF and BMP, and may
    differ within a pair. Names are compared in composed form (NFC), whatever form a system wrote them in; bytes that
    are not UTF-8 are spelled out in a sample's name.

    The subject is what the regular expression `subject_pattern` finds in an image's name: its group `subject`, else its
    first. Without a pattern it is the first number of a name `{subject}_{image}`; any other image is taken for a
    subject of its own (see `subject_warning`). A copy belongs to the subject of its original: its name goes on where
    that of another image ends, and not with a mere number, as `1_1_flip`, `1_1 copy` and `1_1(1)` beside `1_1`.

    masks  'required': every image has one and every mask belongs to an image
           'optional': pairs what there is; `folder` may also be the path of an image, or a list of paths
           'none':     the same, and every mask_path is None
    tell   called with a line of text, if given, for whatever is left out or taken from elsewhere than `folder`

    Raises DataError for a folder without images, an image without mask or with several, a mask without image, two
    images of one name, a subject_pattern that does not fit.
    """
    if masks not in ('required', 'optional', 'none'):
        raise ValueError(f"masks is {masks!r}; expected 'required', 'optional' or 'none'")
    tell = tell or (lambda line: None)
    listed = lru_cache(None)(_listed)                       # a shell's pattern names many files of one folder
    samples, left_out, several, copies = [], [], [], []
    for path in [Path(folder)] if isinstance(folder, (str, os.PathLike)) else map(Path, folder):
        if path.is_dir():
            root, is_plain = _layout(path)
            in_layout, masks_of = listed(root, is_plain)
            images = in_layout
            if not images or masks == 'required' and not masks_of:
                missing = 'pairs of image and mask' if masks == 'required' else 'images'
                raise DataError(f'{path}: holds no {missing}. Looked for {LAYOUTS}. Found {_listing(root, is_plain)}')
            if said := _left_out(path, root, is_plain):
                tell(said)
        elif path.is_file() and masks != 'required':
            root, is_plain = _around(path.parent)
            in_layout, masks_of = listed(root, is_plain)
            if _is_mask(path, in_layout, is_plain):
                left_out.append(path.name)
                continue
            images = {_name(path): [path]}
        elif path.is_symlink() and not path.exists():
            raise DataError(f'{path}: is a link that leads nowhere')
        else:
            problem = 'is a file, expected a folder of images' if path.exists() else 'no such folder'
            raise DataError(f'{path}: {problem}' + ' or file' * (masks != 'required'))

        for name, files in images.items():
            if len(files) > 1:
                raise DataError(f'{files[1]}: {files[0].name} has the same name; keep one of the two')
        if subject_pattern is None:
            copies += [name for name in images if _original(name, in_layout) != name]
        if masks == 'required':
            _check_pairs(images, masks_of)
        elif masks == 'optional' and path.is_dir():
            lost = sorted(masks_of.keys() - images.keys(), key=natural_key)
            if lost:
                tell(f'{path}: left out are masks without image, {_some([masks_of[name][0].name for name in lost])}')
        subject_of = _subject_function(subject_pattern, is_plain, in_layout)
        for name in sorted(images, key=natural_key):
            found = masks_of.get(name, []) if masks != 'none' else []
            if len(found) > 1:
                several.append(images[name][0].name)
            samples.append(Sample(name, subject_of(images[name][0]), images[name][0], found[0] if len(found) == 1 else None))
    if left_out and not samples:
        raise DataError(f'{path}: is a mask, going by its name and place, and so are all {len(left_out)} files given; give images')
    for names, what in ((left_out, 'left out, being masks, going by name and place'),
                        (several, 'have several masks, so none is used'),
                        (copies, 'are copies, going by their names, and count with the subject of their original')):
        if names:
            tell(f'{len(names)} of the files {what}: {_some(names)}')
    return samples


def natural_key(name):
    """Return a key that sorts names as people count: 'a2' before 'a10'."""
    return [int(part) if part.isdecimal() else part for part in re.split(r'(\d+)', name)], name


def _name(path):
    """Return the name of a file without suffix, in composed form; bytes that are not UTF-8 are spelled out, as \\xfc."""
    return unicodedata.normalize('NFC', os.fsencode(path.stem).decode('utf-8', 'backslashreplace'))


def _layout(folder):
    """Return (root, is_plain) for a folder of images: where its layout begins, and whether it is `images/` and `masks/`."""
    root = folder / 'train' if (folder / 'train').is_dir() else folder
    if (root / 'images').is_dir():
        return root, True
    if root is folder and folder.absolute().name == 'masks' and _around(folder)[1]:
        raise DataError(f'{folder}: holds the masks of {_around(folder)[0] / "images"}; give the images')
    return _around(folder) if root is folder else (root, False)


def _around(folder):
    """Return (root, is_plain) for the folder that an image lies in: its masks are beside it, or in `masks/` beside `images/`."""
    place = folder.absolute()
    is_plain = place.name in ('images', 'masks') and (place.parent / 'images').is_dir() and (place.parent / 'masks').is_dir()
    return (folder.parent if folder.name else place.parent, True) if is_plain else (folder, False)


def _listed(root, is_plain):
    """Return (images, masks) of a layout, {name of the image: its files} each; there should be one file, and may be more.

    A mask is called like its image or {image}_mask; {image}_mask_1 and the like are masks too, beside an image so called.
    """
    files = _image_files(root / 'images' if is_plain else root)
    names, images, masks = set(map(_name, files)), {}, {}

    def add(path, default, surely):
        match = MASK_NAME.fullmatch(_name(path))
        if match and (match[1] in names or surely and not match[2]):
            masks.setdefault(match[1], []).append(path)
        else:
            default.setdefault(_name(path), []).append(path)

    for path in files:
        add(path, images, not is_plain)
    for path in _image_files(root / 'masks') if is_plain else ():
        if _name(path) in images:
            masks.setdefault(_name(path), []).append(path)
        else:
            add(path, masks, True)
    return images, masks


def _is_mask(path, images, is_plain):
    """Return whether a file is a mask in its layout, whose images are given."""
    listed = path.suffix.lower() in SUFFIXES and not path.name.startswith('.')
    return listed and (is_plain and path.absolute().parent.name == 'masks' or _name(path) not in images)


def _image_files(folder):
    """Return the image files of a folder in order, hidden ones excepted; an empty list if there is no such folder."""
    return [path for path in _entries(folder) if path.suffix.lower() in SUFFIXES and path.is_file()]


def _entries(folder):
    """Return what lies in a folder and is not hidden, in order; nothing if there is no such folder."""
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith('.')) if folder.is_dir() else []


def _check_pairs(images, masks_of):
    """Raise DataError unless images and masks, both {name: files}, belong together one to one."""
    bare = sorted(images.keys() - masks_of.keys(), key=natural_key)
    lost = sorted(masks_of.keys() - images.keys(), key=natural_key)
    several = sorted((name for name in masks_of if len(masks_of[name]) > 1), key=natural_key)
    if several:
        files = masks_of[several[0]]
        raise DataError(f'{files[0]}: is one of {len(files)} masks of one image, with {_some([path.name for path in files[1:]])}; '
                        'expected one mask for each image: merge them into one, foreground where any of them is, and keep that '
                        f'({len(several)} of {len(masks_of)} images have several)')
    if bare:
        image, = images[bare[0]]
        expected = (image.parent.parent / 'masks' / image.name if image.parent.name == 'images'
                    else image.with_name(f'{image.stem}_mask{image.suffix}'))
        raise DataError(f'{image}: has no mask; expected {expected}, or one in another format '
                        f'({len(bare)} of {len(images)} images have none)')
    if lost:
        raise DataError(f'{masks_of[lost[0]][0]}: this mask has no image {lost[0]}.* '
                        f'({len(lost)} of {len(masks_of)} masks have none); add the image or remove the mask')


def _subject_function(pattern, is_plain, names):
    """Return a function from an image's path to its subject; `names` are those of all images, for finding copies."""
    if pattern is None:
        def subject_of(path):
            name = _original(_name(path), names)
            match = None if is_plain else re.fullmatch(r'(\d+)_\d+', name)
            return match[1] if match else name
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
        match = compiled.search(_name(path))
        if not match or not match[group]:
            raise DataError(f'{path}: --subject-pattern {pattern!r} finds no subject in the name {_name(path)!r}')
        return match[group]
    return subject_of


def _original(name, names):
    """Return which of `names` the name of a copy begins with, such as 1_1 for 1_1_flip or '1_1 (2)'; itself if it is no copy."""
    for end in range(len(name) - 1, 0, -1):
        start, rest = name[:end], name[end:]
        # scans is no copy of scan, 1_12 is none of 1_1, and scan_2 is the second scan. But 1_1_2 is one more of frame 1_1.
        if (start in names and not (rest[0].isdigit() or rest[0].isalpha() and start[-1].isalpha())
                and (re.search(r'[^\d _.-]', rest) or re.fullmatch(r'\d+_\d+', start))):
            return _original(start, names)
    return name


def _some(names, most=3):
    """Return the first few of `names` in words, and how many more there are."""
    return ', '.join(names[:most]) + f' and {len(names) - most} more' * (len(names) > most)


def _listing(root, is_plain):
    """Return in words what lies where images and masks were looked for, and why it may not do."""
    if is_plain:
        parts = [folder for folder in (root / 'images', root / 'masks') if folder.is_dir()]
        found = ', '.join(f'{part.name}/ with {_listing(part, False)}' for part in parts)
        return found if len(parts) == 2 else f'{found}, and no masks/'
    entries = _entries(root)
    names = [entry.name + '/' * entry.is_dir() for entry in entries]
    reasons = {'links lead nowhere': any(entry.is_symlink() and not entry.exists() for entry in entries),
               'folders inside are not searched, so put all images into one, with names that begin with the folder':
                   any(map(_holds_images, entries)),
               'files of other formats are not read, so convert them to PNG': any(map(_is_of_another_format, entries))}
    reasons = ', '.join(reason for reason, holds in reasons.items() if holds)
    return _some(names, 6) + f' ({reasons})' * bool(reasons) if names else 'nothing, the folder is empty'


def _holds_images(entry):
    """Return whether `entry` is a folder in which files lie that look like images."""
    return entry.is_dir() and any(path.suffix.lower() in SUFFIXES or _is_of_another_format(path) for path in _entries(entry))


def _is_of_another_format(path):
    """Return whether a file looks like an image that is not read."""
    suffix = path.suffix.lower()
    return suffix not in SUFFIXES and (suffix in Image.registered_extensions() or suffix in MEDICAL) and not path.is_dir()


def _left_out(folder, root, is_plain):
    """Return in words where the images of `folder` are taken from, and what is left out; '' if there is nothing to say."""
    searched = [root / 'images', root / 'masks'] if is_plain else [root]
    # Where the layout begins further down, images beside it are left out like folders beside it.
    beside = {folder, root}.difference(searched) if folder in (root, *root.parents) else set()
    entries = [entry for place in [*searched, *sorted(beside)] for entry in _entries(place) if entry not in (root, *searched)]
    kinds = {'links that lead nowhere': [path for path in entries if path.is_symlink() and not path.exists()],
             'folders inside': list(filter(_holds_images, entries)),
             'files of other formats': list(filter(_is_of_another_format, entries)),
             'images beside that': [path for path in entries if path.parent in beside and path.suffix.lower() in SUFFIXES]}
    said = [f'{kind} ({_some([path.name for path in paths])})' for kind, paths in kinds.items() if paths]
    said = [f'left out are {", ".join(said)}'] if said else []
    if root != folder:
        said.insert(0, f'images are taken from {searched[0]}' + (f', masks from {searched[1]}' if is_plain else ''))
    return f'{folder}: {"; ".join(said)}' if said else ''


# --- Who is trained on and who is not ---------------------------------------------------------------------------------

def subject_warning(samples, subject_pattern=None):
    """Return what is to be said of the subjects of `samples`, as `find_samples` found them; '' if nothing.

    If images come from fewer subjects than their names say, frames of one subject land on both sides of a split, and
    scores are too good to be true.
    """
    subjects, said = {sample.subject for sample in samples}, []

    def is_known(sample):
        match = re.match(r'(\d+)_\d+(?!\d)', sample.name)
        return bool(match) and match[1] == sample.subject

    unknown = [sample.name for sample in samples if not is_known(sample)]
    if subject_pattern is None and len(unknown) == len(samples) or subject_pattern is not None and len(subjects) == len(samples):
        said.append('WARNING: no subject is known, so every image counts as its own. If several images show one subject, some '
                    'land on both sides of the split and the scores are too good to be true: give --subject-pattern.')
    elif subject_pattern is None and unknown:
        said.append(f'WARNING: {len(unknown)} of {len(samples)} names do not say their subject as {{subject}}_{{image}} does, '
                    f'such as {_some(unknown)}, and count as subjects of their own. If they show subjects that other images show '
                    'too, these land on both sides of the split and the scores are too good to be true: give --subject-pattern.')
    spelled = {}
    for subject in sorted(subjects, key=natural_key):
        spelled.setdefault(str(natural_key(subject.casefold())[0]), []).append(subject)
    if subject_pattern is None and len(unknown) == len(samples):
        spelled.clear()                                     # they are names of images
    alike = [' and '.join(several) for several in spelled.values() if len(several) > 1]
    if alike:
        said.append(f'WARNING: {_some(alike)} count as different subjects. If they are not, rename the files: they land on both '
                    'sides of the split and the scores are too good to be true.')
    return '\n'.join(said)


def split_by_subject(samples, validation_share, seed, positive=None, training_positives=1):
    """Return (training, validation): two lists that share no subject, the second near `validation_share` of the images.

    Subjects are drawn in random order, and each is taken for validation if that brings the number of images closer to
    the share. Both sides get at least one.

    positive            (N,) bool, which samples hold foreground: then both sides get a subject with some, if there are
                        two such subjects; see `positive_warning`
    training_positives  how many such subjects training keeps, if there are enough: 2 if it is to be split again

    Raises DataError with fewer than two subjects, ValueError for a share outside (0, 1).
    """
    if not 0 < validation_share < 1:
        raise ValueError(f'the validation share is {validation_share}; expected a number between 0 and 1')
    images = Counter(sample.subject for sample in samples)
    if len(images) < 2:
        raise DataError(f'{len(samples)} images of {len(images)} subject ({", ".join(images)}): a split by subject '
                        'needs two or more; add subjects, or give --subject-pattern if the names hold them')
    subjects = sorted(images, key=natural_key)
    numpy.random.default_rng(seed).shuffle(subjects)
    wanted = validation_share * len(samples)

    def draw(chosen, kept):
        """Return the subjects of validation: those `chosen`, none of those `kept`, and others in their order."""
        chosen = set(chosen)
        count = sum(images[subject] for subject in chosen)
        for subject in subjects:
            if (subject not in chosen and subject not in kept and len(chosen) < len(subjects) - 1
                    and abs(count + images[subject] - wanted) < abs(count - wanted)):
                chosen.add(subject)
                count += images[subject]
        return chosen or {min(subjects, key=images.get)}

    chosen = draw([], [])
    if positive is not None:
        positive = {sample.subject for sample, is_positive in zip(samples, positive) if is_positive}
        least = min(training_positives, len(positive) - 1)
        if len(positive) > 1 and not (positive & chosen and len(positive - chosen) >= least):
            # The draw missed one side: one subject is set for validation, the nearest in size, and some for training.
            first, *others = sorted((subject for subject in subjects if subject in positive),
                                    key=lambda subject: abs(images[subject] - wanted))
            chosen = draw([first], sorted(others, key=lambda subject: -images[subject])[:least])
    return ([sample for sample in samples if sample.subject not in chosen],
            [sample for sample in samples if sample.subject in chosen])


def positive_warning(parts, reader):
    """Return what is to be said of the parts of a split, {name: samples}, that hold no foreground; '' if nothing.

    Reads them all, as training does anyway.
    """
    said = []
    for name, samples in parts.items():
        if not holds_foreground(samples, reader).any():
            said.append(f'WARNING: no {name} image holds any foreground, so its scores, and what is chosen by them, say nothing '
                        'of how well it is found: add subjects with foreground, or choose another --seed or share.')
    return '\n'.join(said)


# --- Reading one file -------------------------------------------------------------------------------------------------

def as_intensities(image):
    """Return an image (H, W) of any dtype that says what is white as float32 in [0, 1]: itself if it is that already.

    uint8 is divided by 255, uint16 by 65535; bool and floats in [0, 1] are taken as they are. Raises ValueError for
    another shape or dtype, and for floats outside [0, 1], NaN among them.
    """
    image = numpy.asarray(image)
    if image.ndim != 2 or not image.size:
        raise ValueError(f'an image has shape {image.shape}; expected (H, W), grey')
    if image.dtype in (numpy.uint8, numpy.uint16):
        return image.astype(numpy.float32) / numpy.iinfo(image.dtype).max
    if image.dtype != bool and image.dtype.kind != 'f':
        raise ValueError(f'an image has dtype {image.dtype}, which does not say what is white; expected uint8, uint16, bool, '
                         'or floats in [0, 1]')
    if not (image.min() >= 0 and image.max() <= 1):                                  # written so that NaN is refused too
        raise ValueError(f'an image of {image.dtype} holds values from {image.min():g} to {image.max():g}; expected [0, 1]: '
                         'divide it by the value that is white')
    return image.astype(numpy.float32, copy=False)


def read_image(path, white=None):
    """Return the image at `path` as (H, W) float32 intensities in [0, 1].

    8-bit grey is divided by 255, 16-bit grey by 65535, or integers of any kind by `white`, as 12 bits in 16-bit files
    need it: 4095. Floating-point grey is taken as it is. Colours, palettes included, become their luma, 0.299 R + 0.587
    G + 0.114 B; what is transparent counts as black. A camera's orientation mark is obeyed. Of a phone's JPEG that
    carries a second picture, the first is read.

    Raises DataError for a file that cannot be read to its end, several pages, integers that are signed or of 32 bits
    unless `white` is given, levels above `white`, floats outside [0, 1], a palette that shows nothing.
    """
    pixels, full = _read_grey(path)
    if full is None and white is None:
        raise DataError(f'{path}: holds signed or 32-bit integers ({pixels.min()} to {pixels.max()}), and nothing says which is '
                        'white; save it with 8 or 16 bits, unsigned')
    if full == 1:
        white = 1
    white = white or full
    if not (pixels.min() >= 0 and pixels.max() <= white):                            # false for NaN as well
        raise DataError(f'{path}: holds values from {pixels.min():g} to {pixels.max():g}, expected 0 to {white:g}; '
                        + ('scale it, or save it with 8 or 16 bits' if full == 1 else 'is another value white?'))
    return pixels.astype(numpy.float32) / white


def white_of(path):
    """Return the level that is likely white in an integer image of few levels, such as 4095 for 12 bits in a 16-bit file.

    None if the image has 8 bits, uses more than an eighth of its range, or is one of floats. Raises DataError.
    """
    pixels, full = _read_grey(path)
    if full in (None, 1, 255) or pixels.max() > full // 8:
        return None
    return next(2**bits - 1 for bits in (8, 10, 12, 14) if pixels.max() < 2**bits)


def read_mask(path, threshold=None):
    """Return the mask at `path` as (H, W) uint8: 0 is background, 1 is foreground.

    In the file, 0 is background and one other value, any, is foreground: 0/255, 0/1 and black/white are all the same. A
    file of the one value 0 is an empty mask, of one other value a full one. Where all colours of a palette look alike,
    its numbers are the values; where only transparency tells pixels apart, what is opaque is foreground. Raises
    DataError for more values, as lossy formats make them, unless `threshold` says that values ≥ threshold, in the
    file's own units, are foreground.
    """
    values, _ = _read_grey(path, _labels)
    if threshold is not None:
        return (values >= threshold).astype(numpy.uint8)
    if not ((values == 0) | (values == values.max())).all():
        found = numpy.unique(values)
        shown = [f'{value:g}' for value in found]
        shown = ', '.join(shown if len(shown) <= 6 else [*shown[:3], '…', *shown[-2:]])
        # Half-way between the extremes neither side is empty. Whole numbers from 0 up, and few, are labels: 0 is background.
        middle = found[1] if found[0] == 0 and found[-1] == len(found) - 1 <= 10 else (found[0] / 2 + found[-1] / 2)
        middle = numpy.ceil(middle).item() if values.dtype.kind in 'iu' else float(f'{middle:.2g}')
        if not max(found[0], 0) < middle <= found[-1]:
            middle = None
        raise DataError(f'{path}: a mask holds 0 and one other value, this file holds {len(found)} values, {shown}; to '
                        'count all values from N up as foreground give --mask-threshold N'
                        + (f', for example {middle:g}' if middle else ', or save it with 0 as background'))
    return (values != 0).astype(numpy.uint8)


def read_pair(sample, mask_threshold=None, white=None):
    """Return (image (H, W) float32, mask (H, W) uint8) of a sample. Raises DataError, also if their sizes differ."""
    if sample.mask_path is None:
        raise DataError(f'{sample.image_path}: has no mask')
    image, mask = read_image(sample.image_path, white), read_mask(sample.mask_path, mask_threshold)
    if image.shape != mask.shape:
        turned = ''
        if mask.shape == image.shape[::-1]:
            marks = ' and '.join(str(_header(path)[0]) for path in (sample.mask_path, sample.image_path))
            turned = (f': it is turned against its image (orientation marks are obeyed, they are {marks}); save both upright, '
                      'without mark')
        raise DataError(f'{sample.mask_path}: this mask is {mask.shape[0]}×{mask.shape[1]} pixels (height×width), its '
                        f'image {sample.image_path.name} is {image.shape[0]}×{image.shape[1]}; they must be equal{turned}')
    return image, mask


def _read_grey(path, convert=None):
    """Return (pixels (H, W), white): the grey levels as stored, and the level that is white, None if unknown.

    `convert` takes the opened image, upright, and its format to them; by default as an image, `_grey`.
    """
    limit = Image.MAX_IMAGE_PIXELS or numpy.inf
    try:
        # Given a path, Pillow maps an uncompressed TIFF into memory, and scrambles it if it has an orientation mark.
        with open(path, 'rb') as file, Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > limit:
                raise Image.DecompressionBombError
            pages, kind = getattr(image, 'n_frames', 1), image.format
            if kind == 'MPO':                       # a JPEG with a preview or a second view; programs show the first
                pages = 1
            elif stack := re.search(r'^images=(\d+)', str(getattr(image, 'tag_v2', {}).get(270, '')), re.MULTILINE):
                pages = max(pages, int(stack[1]))   # ImageJ writes a large stack as one page and a note
            if pages > 1:
                raise DataError(f'{path}: holds {pages} pages, expected one; split it into one file per page')
            if kind != 'TIFF':                      # Pillow turns a TIFF by itself
                image = ImageOps.exif_transpose(image)
            return (convert or _grey)(image, kind)
    except DataError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise DataError(f'{path}: has more than {limit:,} pixels, the limit for one image; make it smaller') from None
    except Exception as error:              # Pillow's decoders raise OSError, SyntaxError, struct.error and others
        reason = (str(error).splitlines() or [type(error).__name__])[0].partition(' <_io')[0]
        raise DataError(f'{path}: cannot be read as an image ({reason})') from error


def _grey(image, kind):
    """Return (pixels (H, W), white) of an opened Pillow image that is upright; `kind` is the format of its file."""
    tags = getattr(image, 'tag_v2', {})             # of a TIFF
    if image.mode.startswith('I;16'):
        white = 2**tags.get(258, (16,))[0] - 1      # TIFF knows 12 bits
        pixels = numpy.array(image)                 # not convert('L'), which cuts off at 255
        return (white - pixels if tags.get(262) == 0 else pixels), white     # TIFF may count from white to black
    if image.mode == 'I':
        return numpy.array(image), 65535 if kind == 'PNG' else None             # older Pillows open 16-bit PNGs so
    if image.mode == 'F':
        return numpy.array(image), 1
    if image.mode == 'L' and 2 in tags.get(339, ()):                            # signed
        return numpy.array(image).view(numpy.int8), None
    pixels = numpy.array(_opaque(image).convert('L'))
    if image.mode == 'P' and pixels.min() == pixels.max() and len(found := numpy.unique(numpy.array(image))) > 1:
        raise ValueError(f'its palette has one grey for all of its {len(found)} colours; save it as grey')
    return pixels, 255


def _opaque(image):
    """Return a Pillow image with what is transparent as black."""
    if image.mode in ('LA', 'La', 'PA', 'RGBA', 'RGBa') or 'transparency' in image.info:
        return Image.alpha_composite(Image.new('RGBA', image.size, 'black'), image.convert('RGBA'))
    return image


def _labels(image, kind):
    """Return (values (H, W), white) of an opened mask: its grey levels, but what greys do not tell apart is told apart.

    A palette may be all black because only its numbers were meant; a colour may be so dark that its grey is 0; a
    drawing may be black on a transparent ground.
    """
    if image.mode in ('L', 'F', 'I', '1') and 'transparency' not in image.info or image.mode.startswith('I;16'):
        return _grey(image, kind)
    opaque = _opaque(image)
    colours = numpy.array(opaque.convert('RGB'))                                    # (H, W, 3)
    values = numpy.maximum(numpy.array(opaque.convert('L')), colours.any(axis=-1))
    if image.mode == 'P':
        numbers = numpy.array(image)
        black = numpy.unique(numbers[values == 0])
        if values.min() == values.max() and (len(numpy.unique(numbers)) > 1
                                             or not any(image.getpalette()) and 'transparency' not in image.info):
            return numbers, None
        if len(black) > 1 and values.any() and 'transparency' not in image.info:
            raise ValueError(f'its colours {_some([str(number) for number in black])} are all black, beside others that are not; '
                             'save it as grey, 0 being background')
    elif opaque is not image and values.min() == values.max():
        alpha = numpy.array(image.convert('RGBA'))[..., 3]
        if alpha.min() < alpha.max():
            return alpha, 255
    return values, 255


def _header(path):
    """Return (mark, is_square) of an image file: its orientation mark, 1 (upright, also if it has none) to 8."""
    with open(path, 'rb') as file, Image.open(file, formats=FORMATS) as image:
        return image.getexif().get(274, 1), image.width == image.height


# --- What deserves a second look --------------------------------------------------------------------------------------

def mask_oddity(sample, mask):
    """Return in words what is odd about the mask (H, W) 0/1 of a sample whose two files were read; '' if nothing is."""
    if mask.mean() > 0.5:
        return 'foreground for more than half (inverted?)'
    if sample.image_path:                   # else it was made, not read
        (mark, is_square), (mark_of_mask, _) = _header(sample.image_path), _header(sample.mask_path)
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
    return '\n'.join(f'WARNING: {len(odd)} of {len(names)} {what} are {oddity}: {_some(odd)}' for oddity, odd in named.items())


def data_warning(samples, reader, mean, std):
    """Return what deserves a second look before training on `samples`, whose intensities have `mean` and `std`; '' if nothing.

    That is masks which are perhaps inverted or turned, and images much darker or brighter than the others, as 12 bits
    in a 16-bit file are beside 8-bit files.
    """
    def oddities(sample):
        image, mask = reader.read(sample)
        return mask_oddity(sample, mask), intensity_oddity(image / numpy.float32(65535), mean, std)

    of_masks, of_images = zip(*parallel_for(samples, oddities))
    names = [sample.name for sample in samples]
    of_images = [oddity and f'{oddity} than the others (of fewer bits than their files hold?)' for oddity in of_images]
    return '\n'.join(filter(None, [oddity_warning('masks', names, of_masks), oddity_warning('images', names, of_images)]))


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

class Remembering:
    """A reader that remembers the first pairs read, up to `cache_bytes` of memory; `make(sample)` reads one.

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


class Reader(Remembering):
    """Reads samples at one size (H, W), and remembers the first ones read, up to `cache_bytes` of memory.

    Images are held as uint16, 65535 being white: 8 bits would leave a few levels of an image that uses little of its
    16-bit range.
    """

    def __init__(self, size, mask_threshold=None, cache_bytes=2**30):
        super().__init__(cache_bytes)
        self.size, self.mask_threshold = tuple(size), mask_threshold

    def make(self, sample):
        image, mask = read_pair(sample, self.mask_threshold)
        return numpy.rint(resize(image, self.size) * 65535).astype(numpy.uint16), resize_mask(mask, self.size)


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
