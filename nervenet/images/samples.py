"""Which files there are: images and their masks, whom they show, and who is trained on and who is not.

    samples = find_samples('DIR')                              which image belongs to which mask and to which subject
    training, validation = split_by_subject(samples, 0.2, seed=0)

A score is honest only if no subject is on both sides of a split: neighbouring frames of one subject are near copies,
and a network that has seen one of them has seen the other.

Whatever is wrong with a folder or a file raises DataError, one line that names the file, what was found and the way out.
"""

import csv
import os
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy

from .layout import LAYOUTS, DataError, check_pairs, find_around, find_pairs, left_out, likely_pattern, listing, name_of, natural_key, some_of


@dataclass(frozen=True)
class Sample:
    """One image on disk: its name without suffix, whom it shows, and where its masks are, of which it is the union.

    The name begins with the folders it lies in below the one that was given, P1/scan_2. mask_paths is None if it is not known what the
    image shows, and () if it is known to show nothing. Of a loop, a file of several frames (see `loops.py`), a sample is the frame with the number
    `frame`, from 1, of so many `frames`; its name is P1/loop_2#17.
    """

    name: str
    subject: str
    image_path: Path
    mask_paths: tuple | None
    frame: int | None = None
    frames: int | None = None

    @property
    def file_name(self):
        """The name of the image, of a frame that of its loop."""
        return self.name if self.frame is None else self.name.removesuffix(f'#{self.frame}')


# --- Which files there are --------------------------------------------------------------------------------------------

def find_samples(folder, subject_pattern=None, masks='required', tell=None, *, masks_folder=None, mask_pattern=None,
                 subject_from='name', subjects=None, no_mask_is_empty=False):
    """Return the samples in `folder` as a list, in natural order (2 before 10). Opens no image.

    Which file is a mask of which is said in `layout.py`: `{subject}_{image}.tif` with `{subject}_{image}_mask.tif`, in `folder` or in
    its `train/`; two folders `images/` and `masks/` with equal names; or as `masks_folder` and `mask_pattern` say. Folders are read
    with all inside them. Formats are PNG, JPEG, TIFF, BMP, GIF and WebP, and may differ within a pair. Names are compared in composed form
    (NFC), whatever form a system wrote them in; bytes that are not UTF-8 are spelled out in a sample's name.

    The subject of an image is what the table in the CSV file `subjects` says, of two columns, the image's name and its subject; or
    with `subject_from` 'folder' the first folder it lies in; or what the regular expression `subject_pattern` finds in its name: its
    group `subject`, else its first. Without any it is the first number of a name `{subject}_{image}`; any other image is taken for a
    subject of its own (see `subject_warning`). A copy belongs to the subject of its original: its name goes on where that of
    another image ends, and not with a mere number, as `1_1_flip`, `1_1 copy` and `1_1(1)` beside `1_1`.

    masks  'required': every image has one, unless `no_mask_is_empty`, and every mask belongs to an image
           'optional': pairs what there is; `folder` may also be the path of an image, or a list of paths; an image of which
                       pattern, folder or table say nothing is a subject of its own
           'none':     the same, and all mask_paths are None
    tell   called with a line of text, if given, for whatever is left out or taken from elsewhere than `folder`

    Raises DataError for a folder without images, an image without mask, a mask without image, two images of one name, a
    subject_pattern or a table that does not fit.
    """
    if masks not in ('required', 'optional', 'none'):
        raise ValueError(f"masks is {masks!r}; expected 'required', 'optional' or 'none'")
    tell = tell or (lambda line: None)
    find_around.cache_clear()                               # a shell's pattern names many files of one folder, which is read once
    samples, not_images, copies, unknown = [], [], [], []
    subject_in = _subjects(subject_pattern, subject_from, subjects)
    for path in [Path(folder)] if isinstance(folder, (str, os.PathLike)) else map(Path, folder):
        if path.is_dir():
            found = find_pairs(path, masks_folder, mask_pattern)
            images = found.images
            if not images or masks == 'required' and not found.masks:
                missing = 'pairs of image and mask' if masks == 'required' else 'images'
                raise DataError(f'{path}: holds no {missing}. Looked for {LAYOUTS}. Found {listing(found.root, found.is_plain)}{likely_pattern(found)}')
            if said := left_out(path, found):
                tell(said)
            if masks == 'required':
                check_pairs(found, no_mask_is_empty)
            elif masks == 'optional' and found.lost:
                tell(f'{path}: left out are masks without image, {some_of(sorted(lost.name for lost in found.lost))}')
        elif path.is_file() and masks != 'required':
            found = find_around(path.absolute().parent, masks_folder and masks_folder.absolute(), mask_pattern)
            name = found.name_of(path)
            if name is None:
                not_images.append(path.name)
                continue
            images = {name: path}
        elif path.is_symlink() and not path.exists():
            raise DataError(f'{path}: is a link that leads nowhere')
        else:
            problem = 'is a file, expected a folder of images' if path.exists() else 'no such folder'
            raise DataError(f'{path}: {problem}' + ' or file' * (masks != 'required'))

        for name in sorted(images, key=natural_key):
            known = subject_in(name, images[name])
            if known is None:
                original = _original(name, found.images)
                copies += [name] if original != name else []
                match = None if found.is_plain or masks_folder else re.fullmatch(r'(\d+)_\d+', original)
                known = match[1] if match else original
            elif not known:
                unknown.append(images[name])
                known = name
            masks_of = found.masks.get(name) if masks != 'none' else None
            samples.append(Sample(name, known, images[name], tuple(masks_of) if masks_of else () if no_mask_is_empty else None))
    if unknown and masks == 'required':
        raise DataError(f'{unknown[0]}: {subject_in.said} ({len(unknown)} of {len(samples)} such: '
                        f'{some_of([path.name for path in unknown])})')
    if not_images and not samples:
        raise DataError(f'{path}: is a mask, going by its name and place, and so are all {len(not_images)} files given; give images')
    for names, what in ((not_images, 'left out, being masks, going by name and place'),
                        (copies, 'are copies, going by their names, and count with the subject of their original')):
        if names:
            tell(f'{len(names)} of the files {what}: {some_of(names)}')
    return samples


def describe(samples):
    """Return in lines of text what was found: how many images and masks, whom they show, and an example."""
    joined = [sample.name for sample in samples if sample.mask_paths and len(sample.mask_paths) > 1]
    empty = [sample.name for sample in samples if sample.mask_paths == ()]
    subjects = {sample.subject for sample in samples}
    example = next((sample for sample in samples if sample.mask_paths), samples[0])
    said = f'{example.file_name}{example.image_path.suffix}'
    if example.mask_paths:
        said += f' with {os.path.relpath(example.mask_paths[0], example.image_path.parent)}'
    loops = {sample.image_path for sample in samples if sample.frame}
    of_loops = f'{sum(sample.frame is not None for sample in samples):,} of them frames of {len(loops):,} loops, ' if loops else ''
    lines = [f'{len(samples):,} images with {sum(len(sample.mask_paths or ()) for sample in samples):,} masks, {of_loops}{len(subjects)} '
             f'subject{"s" * (len(subjects) != 1)}; such as {said}, subject {example.subject}']
    if joined:
        lines.append(f'{len(joined)} images have several masks, which are joined: {some_of(joined)}')
    if empty:
        lines.append(f'{len(empty)} images have no mask, and count as empty: {some_of(empty)}')
    return lines


# --- Whom an image shows ----------------------------------------------------------------------------------------------

def _subjects(pattern, place, table):
    """Return a function of an image's name and path that gives its subject: '' if it cannot be told, None if nothing says how.

    Its attribute `said` is what is wrong with an image whose subject cannot be told.
    """
    if (pattern is not None) + (place != 'name') + (table is not None) > 1:
        raise DataError('--subject-pattern, --subject-from folder and --subjects each say what the subject is; give one of them')
    if table is not None:
        rows = read_table(table)

        def subject_of(name, path):
            return next((rows[key] for key in (name, f'{name}{path.suffix}', name_of(path.name), name_of(path.stem)) if key in rows), '')
        subject_of.said = f'--subjects {table} has no row for this image'
    elif place == 'folder':
        def subject_of(name, path):
            return name.partition('/')[0] if '/' in name else ''
        subject_of.said = '--subject-from folder: this image lies in no folder of a subject, but beside them'
    elif pattern is not None:
        try:
            compiled = re.compile(pattern)
        except re.error as error:
            raise DataError(f'--subject-pattern {pattern!r} is no regular expression: {error}') from None
        if compiled.groups == 0:
            raise DataError(f'--subject-pattern {pattern!r} has no group; put parentheses around the subject, as in (.+)_[0-9]+')
        group = 'subject' if 'subject' in compiled.groupindex else 1

        def subject_of(name, path):
            match = compiled.search(name)
            return match and match[group] or ''
        subject_of.said = f'--subject-pattern {pattern!r} finds no subject in the name'
    else:
        def subject_of(name, path):
            return None
    return subject_of


def read_table(path):
    """Return {image: subject} of a CSV file of two columns, with a row of headings or without. Raises DataError."""
    try:
        with open(path, newline='', encoding='utf-8-sig') as file:
            rows = [row for row in csv.reader(file) if row]
    except FileNotFoundError:
        raise DataError(f'{path}: no such file') from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f'{path}: cannot be read as a table ({error}); expected CSV of two columns, image and subject') from None
    table = {}
    for number, row in enumerate(rows, 1):
        if len(row) != 2 or not all(map(str.strip, row)):
            raise DataError(f'{path}: row {number} is {",".join(row)!r}; expected two columns, the name of an image and its subject')
        image, subject = (unicodedata.normalize('NFC', cell.strip()) for cell in row)
        if table.setdefault(image, subject) != subject:
            raise DataError(f'{path}: {image} has subject {table[image]} and, in row {number}, subject {subject}')
    return table


def _original(name, names):
    """Return which of `names` the name of a copy begins with, such as 1_1 for 1_1_flip or '1_1 (2)'; itself if it is no copy."""
    for end in range(len(name) - 1, 0, -1):
        start, rest = name[:end], name[end:]
        # scans is no copy of scan, 1_12 is none of 1_1, and scan_2 is the second scan. But 1_1_2 is one more of frame 1_1.
        if (start in names and not (rest[0].isdigit() or rest[0].isalpha() and start[-1].isalpha())
                and (re.search(r'[^\d _.-]', rest) or re.fullmatch(r'\d+_\d+', start))):
            return _original(start, names)
    return name


# --- Who is trained on and who is not ---------------------------------------------------------------------------------

def subject_warning(samples, how=None):
    """Return what is to be said of the subjects of `samples`, as `find_samples` found them; '' if nothing.

    `how` is what said which they are, such as a pattern; None if nothing did. If images come from fewer subjects than their names say, frames of one subject land on both sides of a split, and
    scores are too good to be true.
    """
    subjects, said = {sample.subject for sample in samples}, []

    def is_known(sample):
        match = re.match(r'(\d+)_\d+(?!\d)', sample.name)
        return bool(match) and match[1] == sample.subject

    unknown = [sample.name for sample in samples if not is_known(sample)]
    if how is None and len(unknown) == len(samples) or how is not None and len(subjects) == len({sample.file_name for sample in samples}):
        each = 'image, and every loop,' if any(sample.frame for sample in samples) else 'image'
        said.append(f'WARNING: no subject is known, so every {each} counts as its own. If several images show one subject, some '
                    'land on both sides of the split and the scores are too good to be true: ' + likely_subjects(samples))
    elif how is None and unknown:
        said.append(f'WARNING: {len(unknown)} of {len(samples)} names do not say their subject as {{subject}}_{{image}} does, '
                    f'such as {some_of(unknown)}, and count as subjects of their own. If they show subjects that other images show '
                    'too, these land on both sides of the split and the scores are too good to be true: ' + likely_subjects(samples))
    spelled = {}
    for subject in sorted(subjects, key=natural_key):
        spelled.setdefault(str(natural_key(subject.casefold())[0]), []).append(subject)
    if how is None and len(unknown) == len(samples):
        spelled.clear()                                     # they are names of images
    alike = [' and '.join(several) for several in spelled.values() if len(several) > 1]
    if alike:
        said.append(f'WARNING: {some_of(alike)} count as different subjects. If they are not, rename the files: they land on both '
                    'sides of the split and the scores are too good to be true.')
    return '\n'.join(said)


def own_subjects(test):
    """Return the samples of a test part; those of which no subject is known count as others than images of that name elsewhere."""
    return [replace(sample, subject=f'test/{sample.file_name}') if sample.subject == sample.file_name else sample for sample in test]


def refuse_common_files(samples, test):
    """Raise DataError if an image of the test part is among those of the training part."""
    files = {sample.image_path.resolve() for sample in samples}
    common = [sample for sample in test if sample.image_path.resolve() in files]
    if common:
        raise DataError(f'{common[0].image_path}: is in the test part and among the images to train on ({len(common)} of {len(test)} are); give --data '
                        'a folder that --test does not lie in')


def on_both_sides(samples, test):
    """Return the warning that subjects of a test part are among those of the training part; '' if none are."""
    common = sorted({sample.subject for sample in samples} & {sample.subject for sample in own_subjects(test)}, key=natural_key)
    return (f'WARNING: {len(common)} subjects of the test part are in the training part too: {some_of(common)}. If they are the same persons, '
            'the scores are too good to be true.') if common else ''


def likely_subjects(samples):
    """Return the advice how to say the subjects of `samples`: what would fit their names, if there is such."""
    for pattern in '(.+)_[0-9]+', '(.+)-[0-9]+', '([^/]+)/':
        found = [re.search(pattern, sample.name) for sample in samples]
        subjects = {match and match[1] for match in found}
        # A few folders are kinds, benign and malignant, not persons.
        if None not in subjects and (5 if '/' in pattern else 2) <= len(subjects) < len(samples):
            option = '--subject-from folder' if '/' in pattern else f"--subject-pattern '{pattern}'"
            return f'give {option}, if that is right: it finds {len(subjects)} subjects, such as {some_of(sorted(subjects, key=natural_key))}.'
    return 'give --subject-pattern, --subject-from folder, or --subjects with a table.'


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
