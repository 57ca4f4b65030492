"""The scans of an experiment, found and read as its options say (`options.add_reading_options`), and what is to be said of them."""

from ..images.copies import copies_warning
from ..images.data import Reader, crop_warning
from ..images.loops import with_frames
from ..images.reading import MaskRule
from ..images.samples import describe, find_samples


def open_reader(args):
    """Return the Reader that `args` ask for."""
    return Reader(args.size, MaskRule(args.mask_threshold, args.label, args.fill_outlines), fit=args.fit)


def found(args, folder, masks, label):
    """Return the samples in a folder, frames of loops among them, found as `args` say, with their masks in the folder `masks` if that is not None.

    Prints what was found. Raises DataError.
    """
    samples = find_samples(folder, args.subject_pattern, tell=print, masks_folder=masks, mask_pattern=args.mask_pattern,
                           subject_from=args.subject_from, subjects=args.subjects, no_mask_is_empty=args.no_mask_is_empty)
    samples = with_frames(samples)
    for line in describe(samples):
        print(f'{label + ":" if label else "":12} {line}')
        label = ''
    return samples


def subjects_by(args):
    """Return what says whom an image shows, for `samples.subject_warning`; None if nothing does."""
    return args.subject_pattern or args.subjects or (args.subject_from if args.subject_from != 'name' else None)


def noted(args, samples, reader, note):
    """Return `note` with what is to be said of all images together, once they are read; print that."""
    said = [copies_warning(samples, reader), crop_warning(samples, reader) if args.fit == 'crop' else '']
    for line in filter(None, said):
        print(line)
    return '\n'.join(filter(None, [note, *said]))
