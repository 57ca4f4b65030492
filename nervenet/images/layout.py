"""Which files are images, and which are their masks: whatever a folder looks like.

    found = find_pairs(Path('DIR'))                            found.images {name: file}, found.masks {name: [files]}

Folders are read with all that is inside them. Masks lie beside their images, as `{image}_mask` or as a pattern says; or in a folder
`masks/` beside `images/`, at any depth; or in another folder that is named, at the same place below it as the image below its own.

Whatever is wrong with a folder or a file raises DataError, one line that names the file, what was found and the way out.
"""

import fnmatch
import glob
import itertools
import os
import posixpath
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from PIL import Image

FORMATS = 'PNG', 'JPEG', 'TIFF', 'BMP', 'GIF', 'WEBP'
SUFFIXES = '.png', '.jpg', '.jpeg', '.tif', '.tiff', '.bmp', '.gif', '.apng', '.webp'
DICOM = 'convert it, for example with "magick FILE.dcm FILE.tif" of ImageMagick: a loop becomes one TIFF of all its frames'
MEDICAL = '.dcm', '.dicom', '.nii', '.gz', '.mha', '.mhd', '.nrrd', '.npy', '.npz', '.mat'          # images that Pillow does not know
LAYOUTS = ('{subject}_{image}.tif beside {subject}_{image}_mask.tif, in this folder or in its train/; or two folders '
           f'images/ and masks/ with equal names ({", ".join(SUFFIXES)}); if masks lie elsewhere: --images DIR --masks DIR, or '
           "--mask-pattern '{image}_mask*'")


class DataError(ValueError):
    """Something is wrong with a folder or a file of images; one line that names it, what was found and the way out."""


# --- What a mask is called --------------------------------------------------------------------------------------------

class MaskNames:
    """What the masks of an image are called.

    pattern  such as '{image}_mask*', for a file beside the image, in any format: {image} stands for the image's name, * for
             anything, ? for one character. With a suffix, '{image}.png', only such files are masks. Before a last / stands
             the folder of the mask as seen from that of the image: '../labels/{image}'. Upper and lower case are one.
             By default '{image}_mask', and '{image}_mask_1', '{image}_mask (2)' and the like; in a folder of masks also
             '{image}'

    Raises DataError for a pattern without {image}, or with it or with * before the mask's own name.
    """

    def __init__(self, pattern=None):
        self.pattern, self.folder, self.before, self.suffix = pattern, '', '', ''
        self.ending = self.likely = re.compile(r'_mask([ _-]?\(?\d+\)?)?', re.IGNORECASE)
        if pattern is None:
            self.likely = re.compile('_mask', re.IGNORECASE)
            return
        self.folder, _, name = pattern.rpartition('/')
        before, image, after = name.partition('{image}')
        if not image or '{image}' in after or re.search(r'[*?[{]', self.folder + before):
            raise DataError(f"--mask-pattern {pattern!r}: expected {{image}} once, in the name of the mask, and * only after it, such as "
                            "'{image}_mask*' or '../labels/{image}'")
        suffix = Path(name).suffix
        if suffix.lower() in SUFFIXES:
            after, self.suffix = after.removesuffix(suffix), suffix.lower()
        self.before, self.ending = before, re.compile(fnmatch.translate(after), re.IGNORECASE)
        self.likely = self.ending if before or re.search(r'\w', after) else None

    def image_of(self, name, suffix, is_image, is_same=False):
        """Return the name of the image, the longest for which `is_image` says so, that a file of this name is a mask of; None if there is none.

        With `is_same` it may be called like its image, as in a folder of masks.
        """
        if self.suffix not in ('', suffix) or not name.lower().startswith(self.before.lower()):
            return None
        rest = name[len(self.before):]
        for end in range(len(rest), 0, -1):
            if is_image(rest[:end]) and (self.ending.fullmatch(rest, end) or self.pattern is None and is_same and end == len(rest)):
                # 1_10 is no mask of 1_1, even of '{image}*'.
                if not (rest[end - 1].isdigit() and rest[end:end + 1].isdigit()):
                    return rest[:end]
        return None

    def is_likely(self, name):
        """Return whether a file of this name is a mask even if its image is not there."""
        return bool(self.likely) and name.lower().startswith(self.before.lower()) and any(
            self.likely.fullmatch(name, end) for end in range(len(self.before) + 1, len(name)))


# --- What lies where --------------------------------------------------------------------------------------------------

@dataclass
class Listing:
    """The files below a folder: (place, name, path, role), and what is left out, {kind: paths}.

    place is the folder of a file below the first one, images/ and masks/ left out; role 'image', 'mask' or 'either'.
    """

    files: list = field(default_factory=list)
    left_out: dict = field(default_factory=dict)
    seen: set = field(default_factory=set)

    def add(self, folder, role='either', place='', but=None, is_deep=True, plain=True):
        """Add what lies in a folder and, if `is_deep`, in the folders inside, but for the folder `but`.

        With `plain` a folder that has images/ inside has its images there, and their masks in masks/.
        """
        real = os.path.realpath(folder)
        if real in self.seen or real == but:                # links may go round in circles
            return self
        self.seen.add(real)
        entries = entries_of(folder)
        if plain and is_deep and role == 'either' and (folder / 'images').is_dir():
            self.add(folder / 'images', 'image', place).add(folder / 'masks', 'mask', place)
            entries = [entry for entry in entries if entry.name not in ('images', 'masks')]
            self.leave(entries, 'images beside that', lambda entry: entry.suffix.lower() in SUFFIXES and entry.is_file())
            self.leave(entries, 'folders inside', holds_images)
        else:
            for entry in entries:
                if entry.is_dir():
                    if is_deep:
                        self.add(entry, role, posixpath.join(place, name_of(entry.name)), but, plain=plain)
                elif entry.suffix.lower() in SUFFIXES and entry.is_file():
                    self.files.append((place, name_of(entry.stem), entry, role))
        self.leave(entries, 'links that lead nowhere', lambda entry: entry.is_symlink() and not entry.exists())
        others = list(filter(is_of_another_format, entries))
        self.leave(others, f'DICOM files ({DICOM})', is_dicom)
        self.leave(others, 'files of other formats', lambda entry: not is_dicom(entry))
        return self

    def leave(self, entries, kind, belongs):
        if paths := list(filter(belongs, entries)):
            self.left_out.setdefault(kind, []).extend(paths)


@dataclass
class Found:
    """What `find_pairs` found; names are those of the files without suffix, with the folders they lie in: P1/scan_2.

    images     {name: file}
    masks      {name of the image: its masks, in order}
    lost       masks whose image is not there
    root       the folder that was read
    is_plain   whether that is one of images/ and masks/
    left_out   {kind: files and folders that were not read}
    taken      in words, where images and masks were taken from, if not just from the folder that was given
    """

    images: dict
    masks: dict
    lost: list
    root: Path
    is_plain: bool
    left_out: dict
    taken: str = ''
    names: dict | None = None

    def name_of(self, path):
        """Return the name of the image file at `path`, which lies in the root; None if it is one of the masks."""
        if self.names is None:
            self.names = {file.absolute(): name for name, file in self.images.items()}
            self.names |= {file.absolute(): None for file in itertools.chain(self.lost, *self.masks.values())}
        return self.names.get(path.absolute(), name_of(path.stem))      # by a suffix that is not looked for


def find_pairs(folder, masks_folder=None, mask_pattern=None):
    """Return what Found says of the images in a folder and of their masks. Opens no image.

    folder        read as it is if it is the folder of images/ and masks/ or `masks_folder` is given, else its train/ if it has one
    masks_folder  where the masks are, if not beside the images or in masks/: at the same place below it
    mask_pattern  see MaskNames

    Raises DataError for two images, or two masks, of one name in one place.
    """
    names = MaskNames(mask_pattern)
    listing, root, is_plain, taken = Listing(), folder, False, ''
    if masks_folder is not None:
        if not masks_folder.is_dir():
            raise DataError(f'{masks_folder}: {"is a file" if masks_folder.exists() else "no such folder"}; expected the folder of masks')
        if masks_folder.samefile(folder):
            raise DataError(f'{folder}: is the folder of the images, and of --masks too; leave out --masks, and say with --mask-pattern what '
                            'masks are called')
        listing.add(folder, 'image', but=os.path.realpath(masks_folder)).add(masks_folder, 'mask')
    elif not names.folder and (inside := _inside_images(folder)):
        images_there, masks_there, place = inside
        if masks_there in (folder.absolute(), *folder.absolute().parents):
            raise DataError(f'{folder}: holds the masks of {images_there}; give the images')
        root, is_plain = images_there.parent, True
        listing.add(folder, 'image', place).add(masks_there / place, 'mask', place)
        taken = f'images are taken from {folder}, masks from {masks_there / place}'
    else:
        root = folder / 'train' if (folder / 'train').is_dir() else folder
        is_plain = not names.folder and (root / 'images').is_dir()
        listing.add(root, plain=not names.folder)
        if root != folder:                                  # what lies beside train/ is not read
            taken = f'images are taken from {root / "images"}, masks from {root / "masks"}' if is_plain else f'images are taken from {root}'
            beside = [entry for entry in entries_of(folder) if entry != root]
            listing.leave(beside, 'folders inside', holds_images)
            listing.leave(beside, 'images beside that', lambda entry: entry.suffix.lower() in SUFFIXES and entry.is_file())
    return _paired(listing, names, root, is_plain, taken, masks_folder is not None)


@lru_cache(64)
def find_around(folder, masks_folder=None, mask_pattern=None):
    """Return what Found says of the images that lie in a folder, absolute, itself: all that pairing one of its files takes."""
    names, listing = MaskNames(mask_pattern), Listing()
    inside = None if masks_folder or names.folder else _inside_images(folder)
    if inside:
        images_there, masks_there, place = inside
        listing.add(images_there / place, 'image', place, is_deep=False).add(masks_there / place, 'mask', place, is_deep=False)
    elif masks_folder:
        place = _place(folder, masks_folder)
        listing.add(folder, 'image', place, is_deep=False).add(masks_folder / place, 'mask', place, is_deep=False)
    else:
        listing.add(folder, is_deep=False)
        if names.folder:
            listing.add(folder / names.folder, 'mask', posixpath.normpath(names.folder), is_deep=False)
    return _paired(listing, names, folder, bool(inside), '', bool(masks_folder) and not inside)


def _inside_images(folder):
    """Return (images/, masks/, place) for a folder that is, or lies in, one of the two beside the other: place is where in it; None for another."""
    for outer in folder.absolute(), *folder.absolute().parents:
        pair = outer.parent / 'images', outer.parent / 'masks'
        if outer in pair and all(part.is_dir() for part in pair):
            place = folder.absolute().relative_to(outer).as_posix()
            return *pair, '' if place == '.' else place
    return None


def _place(folder, masks_folder):
    """Return the end of the path of a folder of images that is a path in the folder of masks too: of several the longest, '' if none is."""
    ends = [Path(*folder.parts[-count:]) for count in range(len(folder.parts) - 1, 0, -1)]
    return next((end.as_posix() for end in ends if (masks_folder / end).is_dir()), '')


def _paired(listing, names, root, is_plain, taken, is_elsewhere):
    """Return what Found says of the files listed; with `is_elsewhere` masks lie in a folder of their own, and those beside images are left out."""
    expected = {}                                           # place of masks: {name of an image: [(place, path)]}
    for place, name, path, role in listing.files:
        if role != 'mask':
            where = posixpath.normpath(posixpath.join(place, names.folder)) if names.folder else place
            expected.setdefault('' if where == '.' else where, {}).setdefault(name, []).append((place, path))
    named = {(place, name) for place, name, _, role in listing.files if role == 'mask'}
    images, masks, lost = {}, {}, []
    for place, name, path, role in listing.files:
        around = expected.get(place, {})
        # A file is no mask of itself: called like its image, it lies elsewhere or has another suffix.
        image = names.image_of(name, path.suffix.lower(), lambda image: any(other != path for _, other in around.get(image, ())),
                               role == 'mask')
        if image == name and role == 'either' and not (names.folder or names.suffix):
            image = None
        if image is not None and role == 'image' and is_elsewhere:
            listing.left_out.setdefault('masks beside the images', []).append(path)
        elif image is not None and not (role == 'image' and (place, name) in named):
            where = next(where for where, other in around[image] if other != path)
            masks.setdefault(posixpath.join(where, image), []).append(path)
        elif role == 'mask' or role == 'either' and (names.is_likely(name) or any(where != place for files in around.values() for where, _ in files)):
            lost.append(path)                               # by its role, its name, or where it lies
        else:
            images.setdefault(posixpath.join(place, name), []).append(path)
    for kind in images, masks:
        for files in kind.values():
            for first, second in itertools.pairwise(files):             # in the order of their names
                if kind is images or first.parent == second.parent and name_of(first.stem) == name_of(second.stem):
                    way = (f"; or if one is the mask of the other: --mask-pattern '{{image}}{second.suffix}' or '{{image}}{first.suffix}'"
                           if kind is images and first.suffix != second.suffix else '')
                    raise DataError(f'{second}: {first.name} has the same name; keep one of the two{way}')
    for name in masks.keys() - images.keys():               # it is itself a mask
        lost += masks.pop(name)
    return Found({name: files[0] for name, files in images.items()}, masks, lost, root, is_plain, listing.left_out, taken)


def entries_of(folder):
    """Return what lies in a folder and is not hidden, in order; nothing if there is no such folder."""
    return sorted(entry for entry in folder.iterdir() if entry.name[0] != '.' and entry.name != '__MACOSX') if folder.is_dir() else []


def holds_images(entry):
    """Return whether `entry` is a folder in which files lie, at any depth, that look like images."""
    return entry.is_dir() and any(path.suffix.lower() in SUFFIXES or is_of_another_format(path) for path in entry.rglob('*'))


def is_of_another_format(path):
    """Return whether a file looks like an image that is not read."""
    suffix = path.suffix.lower()
    if suffix in SUFFIXES or path.is_dir():
        return False
    return suffix in Image.registered_extensions() or suffix in MEDICAL or bool(re.fullmatch(r'(\.\d+)?', suffix)) and is_dicom(path)


def is_dicom(path):
    """Return whether a file is DICOM, by its suffix or, since many are called IM_0001 or 1.2.840.113619, by its content."""
    try:
        with open(path, 'rb') as file:
            return path.suffix.lower() in ('.dcm', '.dicom') or file.read(132)[128:] == b'DICM'
    except OSError:
        return False


def name_of(name):
    """Return a file's name in composed form (NFC); bytes that are not UTF-8 are spelled out, as \\xfc."""
    return unicodedata.normalize('NFC', os.fsencode(name).decode('utf-8', 'backslashreplace'))


# --- In words ---------------------------------------------------------------------------------------------------------

def some_of(names, most=3):
    """Return the first few of `names` in words, and how many more there are."""
    return ', '.join(names[:most]) + f' and {len(names) - most} more' * (len(names) > most)


def natural_key(name):
    """Return a key that sorts names as people count: 'a2' before 'a10'."""
    return [int(part) if part.isdecimal() else part for part in re.split(r'(\d+)', name)], name


def left_out(folder, found):
    """Return in words where the images of `folder` are taken from, and what is left out; '' if there is nothing to say."""
    said = [f'{kind} ({some_of(sorted(path.name for path in paths))})' for kind, paths in found.left_out.items() if paths]
    said = [f'left out are {", ".join(said)}'] if said else []
    if found.taken:
        said.insert(0, found.taken)
        if (folder / 'test').is_dir() and found.root == folder / 'train':
            said.append(f'to score on {folder / "test"} give it as --test')
    return f'{folder}: {"; ".join(said)}' if said else ''


def listing(root, is_plain):
    """Return in words what lies where images and masks were looked for, and why it may not do."""
    if is_plain:
        parts = [folder for folder in (root / 'images', root / 'masks') if folder.is_dir()]
        found = ', '.join(f'{part.name}/ with {listing(part, False)}' for part in parts)
        return found if len(parts) == 2 else f'{found}, and no masks/'
    entries = entries_of(root)
    names, others = [entry.name + '/' * entry.is_dir() for entry in entries], list(filter(is_of_another_format, entries))
    reasons = {'links lead nowhere': any(entry.is_symlink() and not entry.exists() for entry in entries),
               f'DICOM files are not read: {DICOM}': any(map(is_dicom, others)),
               'files of other formats are not read, so convert them to PNG': not all(map(is_dicom, others))}
    reasons = ', '.join(reason for reason, holds in reasons.items() if holds)
    return some_of(names, 6) + f' ({reasons})' * bool(reasons) if names else 'nothing, the folder is empty'


def check_pairs(found, no_mask_is_empty=False):
    """Raise DataError unless every image has a mask, which it need not with `no_mask_is_empty`, and every mask an image."""
    bare = sorted(found.images.keys() - found.masks.keys(), key=natural_key)
    if bare and not no_mask_is_empty:
        image = found.images[bare[0]]
        expected = (image.parent.parent / 'masks' / image.name if image.parent.name == 'images'
                    else image.with_name(f'{image.stem}_mask{image.suffix}'))
        raise DataError(f'{image}: has no mask; expected {expected}, or one in another format ({len(bare)} of {len(found.images)} images '
                        f'have none: {some_of(bare)}){likely_pattern(found)}; if it shows none of what is looked for: --no-mask-is-empty')
    if found.lost:
        lost = sorted(found.lost, key=lambda path: natural_key(path.name))
        number = len(lost) + sum(map(len, found.masks.values()))
        raise DataError(f'{lost[0]}: this mask has no image ({len(lost)} of {number} masks have none: '
                        f'{some_of([path.name for path in lost])}){likely_pattern(found)}; add the images or remove the masks')


def likely_pattern(found):
    """Return the advice to give the pattern by which files that have no partner would be pairs; '' if there is none for half of them.

    Where all that some names have beyond the names of images is the same, but for numbers, that is how masks are called.
    """
    bare = {name: path for name, path in found.images.items() if name not in found.masks}
    stems = {name_of(path.stem) for path in bare.values()}
    patterns = Counter()
    for path in [*found.lost, *bare.values()]:
        name = name_of(path.stem)
        for place in range(1, len(name)):
            if name[:place] in stems and not (name[place - 1].isdigit() and name[place].isdigit()):
                patterns['{image}' + re.sub(r'\d+', '*', glob.escape(name[place:]))] += 1
            if name[place:] in stems and not re.search(r'[\d*?[{]', name[:place]):
                patterns[name[:place] + '{image}'] += 1
    pattern, number = max(patterns.items(), key=lambda item: item[1], default=('', 0))
    return f"; if masks are called so: --mask-pattern '{pattern}'" if number and 3 * number >= len(bare) else ''
