"""One image, one mask: from a file of any kind to an array, or one clear error.

    image = read_image('1_1.tif')                              (H, W) float32 in [0, 1], 0 black and 1 white
    mask = read_mask('1_1_mask.tif')                           (H, W) uint8, 0 background and 1 foreground

Whatever is wrong with a file raises DataError, one line that names the file, what was found and the way out.
"""

import warnings
from dataclasses import dataclass

import numpy
from PIL import Image, ImageOps

from .layout import DICOM, FORMATS, is_dicom
from .loops import count_frames, frames_of, read_frame
from .samples import DataError, some_of

# `_read_grey` refuses such images itself, and names the file; of damaged ones it tells what matters.
warnings.filterwarnings('ignore', category=Image.DecompressionBombWarning)
warnings.filterwarnings('ignore', 'Corrupt EXIF data', module='PIL')


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


def read_image(path, white=None, frame=None):
    """Return the image at `path` as (H, W) float32 intensities in [0, 1]; of a loop, a file of several frames, the one of number `frame`, from 1.

    8-bit grey is divided by 255, 16-bit grey by 65535, or integers of any kind by `white`, as 12 bits in 16-bit files
    need it: 4095. Floating-point grey is taken as it is. Colours, palettes included, become their luma, 0.299 R + 0.587
    G + 0.114 B; what is transparent counts as black. A camera's orientation mark is obeyed. Of a phone's JPEG that
    carries a second picture, the first is read.

    Raises DataError for a file that cannot be read to its end, several frames without `frame`, integers that are signed or of 32 bits
    unless `white` is given, levels above `white`, floats outside [0, 1], a palette that shows nothing.
    """
    pixels, full = _read_grey(path, frame=frame)
    if full is None and white is None:
        raise DataError(f'{_named(path, frame)}: holds signed or 32-bit integers ({pixels.min()} to {pixels.max()}), and nothing says which is '
                        'white; save it with 8 or 16 bits, unsigned')
    if full == 1:
        white = 1
    white = white or full
    if not (pixels.min() >= 0 and pixels.max() <= white):                            # false for NaN as well
        raise DataError(f'{_named(path, frame)}: holds values from {pixels.min():g} to {pixels.max():g}, expected 0 to {white:g}; '
                        + ('scale it, or save it with 8 or 16 bits' if full == 1 else 'is another value white?'))
    return numpy.divide(pixels, white, dtype=numpy.float32)


def white_of(path):
    """Return the level that is likely white in an integer image of few levels, such as 4095 for 12 bits in a 16-bit file.

    None if the image has 8 bits, uses more than an eighth of its range, or is one of floats. Of a loop the first frame says it. Raises DataError.
    """
    pixels, full = _read_grey(path, frame=1 if count_frames(path) > 1 else None)
    if full in (None, 1, 255) or pixels.max() > full // 8:
        return None
    return next(2**bits - 1 for bits in (8, 10, 12, 14) if pixels.max() < 2**bits)


@dataclass(frozen=True)
class MaskRule:
    """What in the file of a mask is foreground. Without any of these 0 is background, and one other value, any, is foreground.

    threshold      values from this one up are foreground, in the file's own units
    label          the values are classes, and this one is foreground; 'all': all but 0 are. The value is what the file stores, of a palette
                   its number: what the description of a data set speaks of
    fill_outlines  whether closed lines stand for what they enclose, True, or for themselves, False; by default a mask that is one is refused.
                   What lies inside and is of another class is not enclosed
    """

    threshold: float | None = None
    label: int | str | None = None
    fill_outlines: bool | None = None


def read_mask(path, threshold=None, label=None, fill_outlines=None, frame=None):
    """Return the mask at `path` as (H, W) uint8: 0 is background, 1 is foreground; of a loop that of number `frame`, from 1.

    In the file, 0 is background and one other value, any, is foreground: 0/255, 0/1 and black/white are all the same. A
    file of the one value 0 is an empty mask, of one other value a full one. Where all colours of a palette look alike,
    its numbers are the values; where only transparency tells pixels apart, what is opaque is foreground.

    Raises DataError for more values, as classes have them and lossy formats make them, unless `label` or `threshold` says which
    are foreground; for closed thin lines, unless `fill_outlines` says what they stand for, and with it for lines that are not closed: see MaskRule.
    """
    return _read_mask(path, MaskRule(threshold, label, fill_outlines), frame)[0]


def _read_mask(path, rule, frame=None):
    """Return (mask (H, W) uint8 0/1, value): the value in the file that is foreground, if nothing says it, and there is any; else None."""
    value = None
    (values, _), classes = _read_grey(path, lambda image, kind: (_labels(image, kind), _classes(image, kind)), frame)
    name = _named(path, frame)
    if rule.label is not None:
        if classes is None or path.suffix.lower() in ('.jpg', '.jpeg'):
            problem = 'is drawn in colours' if classes is None else 'has a lossy format, which changes numbers'
            raise DataError(f'{name}: {problem}, and --label {rule.label} asks for numbers; save it as grey or with a palette, as PNG')
        mask = classes != 0 if rule.label == 'all' else classes == rule.label
    elif rule.threshold is not None:
        mask = values >= rule.threshold
    else:
        _check_two_values(name, values, classes)
        mask = values != 0
        if mask.any():
            value = f'colour {values.max()}' if classes is None else classes[mask].max().item()
    mask = mask.astype(numpy.uint8)
    if rule.fill_outlines is False:
        return mask, value
    filled = fill_outlines(mask)
    encloses = (filled > mask).any()
    if rule.label is not None:
        filled[(classes != 0) & (mask == 0)] = 0            # another class, and no hole
    if rule.fill_outlines is None and is_outline(mask, filled):
        raise DataError(f'{name}: is a line around a region, not the region: it encloses {filled.sum() / mask.sum() - 1:.1f} times its own area; give '
                        '--fill-outlines, or --no-fill-outlines if the line itself is meant')
    if rule.fill_outlines and not encloses and is_thin(mask):
        raise DataError(f'{name}: holds a line that is not closed, so nothing of what it goes around can be filled; close it, at the border of the '
                        'image too')
    return filled if rule.fill_outlines else mask, value


def _check_two_values(name, values, classes):
    """Raise DataError if a mask holds other values than 0 and one more; say which options say what is foreground."""
    if ((values == 0) | (values == values.max())).all():
        return
    found = numpy.unique(values)

    def listed(found):
        shown = [f'{value:g}' for value in found]
        return ', '.join(shown if len(shown) <= 6 else [*shown[:3], '…', *shown[-2:]])

    # Half-way between the extremes neither side is empty. Whole numbers from 0 up, and few, are classes: 0 is background.
    middle = found[1] if found[0] == 0 and found[-1] == len(found) - 1 <= 10 else (found[0] / 2 + found[-1] / 2)
    middle = numpy.ceil(middle).item() if values.dtype.kind in 'iu' else float(f'{middle:.2g}')
    if not max(found[0], 0) < middle <= found[-1]:
        middle = None
    classes = numpy.unique(classes) if classes is not None and classes.dtype.kind in 'iu' else ()
    said = ''
    if 1 < len(classes) and classes[0] >= 0 and (len(classes) <= 6 or classes[-1] <= 30):      # a lossy format leaves more
        said = (f'if they are classes (numbers {listed(classes)} in the file), give --label {classes[classes > 0][0]}, or another, to train on that '
                'one, or --label all; else, ')
    raise DataError(f'{name}: a mask holds 0 and one other value, this file holds {len(found)} values, {listed(found)}; {said}to '
                    'count all values from N up as foreground give --mask-threshold N'
                    + (f', for example {middle:g}' if middle else ', or save it with 0 as background'))


def fill_outlines(mask):
    """Return mask (H, W) uint8 0/1 with its holes filled: all background that no way over edges of pixels leads to from outside.

    The outside is what can be reached. Each sweep carries it along all rows and columns as far as no foreground is in the way, and sweeps
    go on until one changes nothing: for outlines of few bends that is soon.
    """
    if not mask.any():
        return mask
    box = _box(mask)
    free = numpy.pad(mask[box] == 0, 1, constant_values=True)
    outside = numpy.zeros_like(free)
    outside[0] = True
    before = 0
    while (reached := numpy.count_nonzero(outside)) != before:
        before = reached
        for axis in (0, 1):
            # Along an axis, runs of free pixels have numbers; a run is outside if any pixel of it is.
            runs = numpy.cumsum(numpy.diff(free, axis=axis, prepend=~free.take([0], axis)), axis=axis)
            lines = numpy.arange(free.shape[1 - axis]) * (free.shape[axis] + 1)
            runs = runs + (lines[:, None] if axis == 1 else lines[None])
            is_outside = numpy.zeros(runs.max() + 1, bool)
            is_outside[runs[outside]] = True
            outside = is_outside[runs] & free
    filled = mask.copy()
    filled[box] = ~outside[1:-1, 1:-1]
    return filled


def _box(mask):
    """Return slices (rows, columns): the smallest box that holds all of a mask (H, W) that is not empty."""
    return tuple(slice(places[0], places[-1] + 1) for places in (numpy.flatnonzero(mask.any(axis=axis)) for axis in (1, 0)))


def is_outline(mask, filled):
    """Return whether a mask (H, W) uint8 0/1 is a thin closed line: what it encloses is more than twice its own area.

    A ring of radius r and width w encloses r / 2w times its own area: here w is below a quarter of r. `filled` is what `fill_outlines` returns.
    """
    return bool(numpy.count_nonzero(filled) > 3 * numpy.count_nonzero(mask))


def is_thin(mask):
    """Return whether a mask (H, W) uint8 0/1 is a long thin line: nowhere wider than a hundredth of its extent, or than two pixels."""
    if not mask.any():
        return False
    inside = mask[_box(mask)]
    extent, left = max(inside.shape), numpy.pad(inside, 1)
    for _ in range(max(1, extent // 200)):                  # each takes a pixel from either side
        inner = left[1:-1, 1:-1] & left[:-2, 1:-1] & left[2:, 1:-1] & left[1:-1, :-2] & left[1:-1, 2:]
        left = numpy.pad(inner, 1)
    return bool(extent >= 12 and not left.any())


def read_pair(sample, rule=MaskRule(), white=None, seen=None):
    """Return (image (H, W) float32, mask (H, W) uint8) of a sample; see `read_mask_of`. Raises DataError, also if their sizes differ."""
    if sample.mask_paths is None:
        raise DataError(f'{sample.image_path}: has no mask')
    image = read_image(sample.image_path, white, sample.frame)
    return image, read_mask_of(sample, image, rule, seen)


def read_mask_of(sample, image, rule=MaskRule(), seen=None):
    """Return the mask (H, W) uint8 of a sample whose image (H, W) is read already: the union of its masks.

    `seen`, a dict, remembers across calls which value is foreground, and in which file. Raises DataError, also if sizes differ, and if the
    value is another one than in files before: then they are classes, and it is to be said which is meant.
    """
    union = numpy.zeros(image.shape, numpy.uint8)
    for path in sample.mask_paths:
        mask, value = _read_mask(path, rule, sample.frame)
        if image.shape != mask.shape:
            turned = ''
            if mask.shape == image.shape[::-1]:
                marks = ' and '.join(str(header_of(path)[0]) for path in (path, sample.image_path))
                turned = (f': it is turned against its image (orientation marks are obeyed, they are {marks}); save both upright, '
                          'without mark')
            raise DataError(f'{path}: this mask is {mask.shape[0]}×{mask.shape[1]} pixels (height×width), its '
                            f'image {sample.image_path.name} is {image.shape[0]}×{image.shape[1]}; they must be equal{turned}')
        if value is not None and seen is not None:
            first, where = seen.setdefault('first', (value, path))
            if value != first and not {value, first} <= {1, 255, 65535}:
                way = ('--mask-threshold 1 to count all of them, or save them as grey' if isinstance(value, str) or isinstance(first, str) else
                       f'--label {first:g}, --label {value:g}, or --label all; else save them alike')
                raise DataError(f'{path}: its foreground has the value {value}, that of {where.name} has {first}; if they are classes, give {way}')
        union |= mask
    return union


def _read_grey(path, convert=None, frame=None):
    """Return (pixels (H, W), white): the grey levels as stored, and the level that is white, None if unknown; of a loop those of a frame.

    `convert` takes the opened image, upright, and its format to them; by default as an image, `_grey`.
    """
    limit = Image.MAX_IMAGE_PIXELS or numpy.inf
    try:
        if frame is not None:
            return read_frame(path, frame, convert or _grey)
        # Given a path, Pillow maps an uncompressed TIFF into memory, and scrambles it if it has an orientation mark.
        with open(path, 'rb') as file, Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > limit:
                raise Image.DecompressionBombError
            if (frames := frames_of(image, path)) > 1:
                raise DataError(f'{path}: holds {frames} frames, expected one image; predict.py and train_unet.py take loops, here save one frame as '
                                'a file of its own')
            kind = image.format
            if kind != 'TIFF':                      # Pillow turns a TIFF by itself
                image = ImageOps.exif_transpose(image)
            return (convert or _grey)(image, kind)
    except DataError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise DataError(f'{path}: has more than {limit:,} pixels, the limit for one image; make it smaller') from None
    except Exception as error:              # Pillow's decoders raise OSError, SyntaxError, struct.error and others
        if is_dicom(path):
            raise DataError(f'{path}: is a DICOM file, which is not read; {DICOM}') from error
        reason = (str(error).splitlines() or [type(error).__name__])[0].partition(' <_io')[0]
        raise DataError(f'{_named(path, frame)}: cannot be read as an image ({reason})') from error


def _named(path, frame):
    """Return a file and, of a loop, the number of a frame, in words."""
    return path if frame is None else f'{path}, frame {frame}'


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


def _classes(image, kind):
    """Return the numbers (H, W) that an opened mask stores: of a palette its numbers, of greys their levels; None of colours."""
    if image.mode == 'P':
        return numpy.array(image)
    if image.mode == '1':
        return numpy.array(image).astype(numpy.uint8)
    if image.mode in ('L', 'I', 'F') or image.mode.startswith('I;16'):
        return _grey(image, kind)[0]
    bands = numpy.array(_opaque(image).convert('RGB'))
    return bands[..., 0] if (bands == bands[..., :1]).all() else None


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
            raise ValueError(f'its colours {some_of([str(number) for number in black])} are all black, beside others that are not; '
                             'save it as grey, 0 being background')
    elif opaque is not image and values.min() == values.max():
        alpha = numpy.array(image.convert('RGBA'))[..., 3]
        if alpha.min() < alpha.max():
            return alpha, 255
    return values, 255


def header_of(path):
    """Return (mark, is_square) of an image file: its orientation mark, 1 (upright, also if it has none) to 8."""
    with open(path, 'rb') as file, Image.open(file, formats=FORMATS) as image:
        return image.getexif().get(274, 1), image.width == image.height
