"""Which files there are: images and their masks, whom they show, and who is trained on and who is not.

    samples = find_samples('DIR')                              which image belongs to which mask and to which subject
    training, validation = split_by_subject(samples, 0.2, seed=0)

A score is honest only if no subject is on both sides of a split: neighbouring frames of one subject are near copies,
and a network that has seen one of them has seen the other.

Whatever is wrong with a folder or a file raises DataError, one line that names the file, what was found and the way out.
"""

import os
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy
from PIL import Image

SUFFIXES = '.png', '.jpg', '.jpeg', '.tif', '.tiff', '.bmp'
MEDICAL = '.dcm', '.nii', '.gz', '.mha', '.mhd', '.nrrd', '.npy', '.npz', '.mat'          # images that Pillow does not know
MASK_NAME = re.compile(r'(.+)_mask([ _-]?\(?\d+\)?)?', re.IGNORECASE | re.DOTALL)    # x_mask; one of several: x_mask_1
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
                tell(f'{path}: left out are masks without image, {some_of([masks_of[name][0].name for name in lost])}')
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
            tell(f'{len(names)} of the files {what}: {some_of(names)}')
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
        raise DataError(f'{files[0]}: is one of {len(files)} masks of one image, with {some_of([path.name for path in files[1:]])}; '
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


def some_of(names, most=3):
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
    return some_of(names, 6) + f' ({reasons})' * bool(reasons) if names else 'nothing, the folder is empty'


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
    said = [f'{kind} ({some_of([path.name for path in paths])})' for kind, paths in kinds.items() if paths]
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
                    f'such as {some_of(unknown)}, and count as subjects of their own. If they show subjects that other images show '
                    'too, these land on both sides of the split and the scores are too good to be true: give --subject-pattern.')
    spelled = {}
    for subject in sorted(subjects, key=natural_key):
        spelled.setdefault(str(natural_key(subject.casefold())[0]), []).append(subject)
    if subject_pattern is None and len(unknown) == len(samples):
        spelled.clear()                                     # they are names of images
    alike = [' and '.join(several) for several in spelled.values() if len(several) > 1]
    if alike:
        said.append(f'WARNING: {some_of(alike)} count as different subjects. If they are not, rename the files: they land on both '
                    'sides of the split and the scores are too good to be true.')
    return '\n'.join(said)


def split_by_subject(samples, validation_share, seed, positive=None, training_positives=1):
    """Return (training, validation): two lists that share no subject, the second near `validation_share` of the images.

    Subjects are drawn in random order, and each is taken for validation if that brings the number of images closer to
    the share. Both sides get at least one.

    positive            (N,) bool, which samples hold foreground: then both sides get a subject with some, if there are
                        two such subjects
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
