"""Pictures of training and of segmentations, drawn with Pillow alone.

Every function takes NumPy arrays, lists and dicts and returns a `PIL.Image`, which `save` writes.

    curves, fold_curves         training and validation over the epochs: one run, or all folds with mean and band
    over_time                   area, place and confidence of a mask over the frames of a loop
    overlay, heat, rectangle    masks, a map of magnitudes, a box of pixels, drawn on an image
    predictions                 image, truth, prediction and overlay side by side, case by case
    feature_maps                what each stage of a network makes of an image
    picture, grid               one image enlarged; many pictures in rows, with captions

`save_animation` makes a GIF of several, `Animation` one of overlays, frame by frame.

Images are (H, W), uint8 or floats in [0, 1]; masks are (H, W), binary: bool, {0, 1} or {0, 255}. Both may have a last
axis of one channel. Small images are enlarged by a whole factor, so that all pixels stay equally large.

The colours are those of Okabe & Ito, *Color Universal Design* (2008), which colour-blind readers can tell apart. Lines
and outlines are drawn enlarged and averaged down, which smooths their steps.
"""

import struct
import unicodedata
import zlib
from functools import lru_cache

import numpy
from PIL import GifImagePlugin, Image, ImageDraw, ImageFont

from ..files import atomic_write
from ..metrics import ratio

BLUE, VERMILLION, SKY, ORANGE = (0, 114, 178), (213, 94, 0), (86, 180, 233), (230, 159, 0)
PAPER, INK, FAINT, LINE = (255, 255, 255), (40, 40, 40), (110, 110, 110), (228, 228, 228)
TRUTH, PREDICTION = SKY, ORANGE
# From black over violet and orange to pale yellow: ever brighter, so that it also reads in grey.
HEAT = numpy.array([(0, 0, 0), (45, 15, 95), (120, 30, 125), (190, 55, 115), (240, 100, 90), (252, 175, 115),
                    (255, 250, 195)])

TITLE, HEADING, TEXT = 26, 21, 18               # sizes of the font in pixels
GAP = 14                                        # pixels between neighbours
FINE = 3                                        # lines are drawn so many times larger

PANELS = (('loss', 'Loss'), ('accuracy', 'Pixel accuracy'), ('iou_pooled', 'IoU, pooled'),
          ('dice_pooled', 'Hard Dice, pooled'))
PARTS = (('train', 'training', BLUE), ('validation', 'validation', VERMILLION))
DASHES = ((9, 6), (2, 5), (15, 5), (5, 3))      # pixels on and off, for one baseline after the other


@lru_cache
def _font(size):
    return ImageFont.load_default(size)


def _printable(text):
    """Return `text` in letters that Pillow's own font has: × becomes x, dashes become -, é becomes e, the rest '?'."""
    plain = {letter: unicodedata.normalize('NFKD', letter).encode('ascii', 'ignore').decode() or '?' for letter in text}
    plain |= {'×': 'x', '−': '-', '–': '-', '—': '-', '±': '±', '·': '·'}
    return ''.join(plain[letter] for letter in text)


def _write(draw, position, text, size=TEXT, colour=INK, anchor='la', width=float('inf')):
    """Write one line of text, cut to `width` pixels with an ellipsis if need be, and return its width."""
    font, text = _font(size), _printable(str(text))
    if font.getlength(text) > width:
        while text and font.getlength(text + '…') > width:
            text = text[:-1]
        text += '…'
    draw.text(position, text, colour, font, anchor)
    return font.getlength(text)


def save(image, path, durable=True, **options):
    """Write a picture as PNG to `path`, whole or not at all (for `durable` see `atomic_write`); `options` are Pillow's. Raises OSError."""
    with atomic_write(path, durable) as file:
        image.save(file, 'PNG', **options)


def save_animation(frames, path, milliseconds=400):
    """Write pictures of equal size to `path` as a GIF that goes round and stays longer at its last frame. Raises OSError."""
    some = [frames[place] for place in numpy.linspace(0, len(frames) - 1, 5).astype(int)]
    colours = Image.fromarray(numpy.concatenate(some)).quantize(128)               # one palette for all
    frames = [frame.quantize(palette=colours, dither=Image.Dither.NONE) for frame in frames]
    with atomic_write(path) as file:
        frames[0].save(file, 'GIF', save_all=True, append_images=frames[1:], loop=0,
                       duration=[milliseconds] * (len(frames) - 1) + [5 * milliseconds])


class Animation:
    """Appends overlays to a GIF that goes round, each written as it comes, so none is held; `close` ends it.

    file          opened for writing in binary, and empty
    size          (height, width) of all pictures
    milliseconds  that each is shown, in steps of 10

    A GIF has 256 colours. Those of overlays are known before any is drawn: greys, and greys under a pale fill, and the two outlines.
    """

    def __init__(self, file, size, milliseconds):
        self.file, self.milliseconds = file, milliseconds
        file.write(struct.pack('<6sHHBBB', b'GIF89a', *size[::-1], 0b11110111, 0, 0) + bytes(_overlay_palette().getpalette()))
        file.write(b'!\xff\x0bNETSCAPE2.0\x03\x01\0\0\0')                               # without end

    @staticmethod
    def encoded(shown):
        """Return a picture that `overlay` drew as the bytes of a frame: the work, which a thread can do while another frame is written."""
        return b''.join(GifImagePlugin.getdata(shown.quantize(palette=_overlay_palette(), dither=Image.Dither.NONE), interlace=0))

    def append(self, encoded):
        self.file.write(struct.pack('<4sHH', b'!\xf9\x04\0', round(self.milliseconds / 10), 0) + encoded)

    def close(self):
        self.file.write(b';')


@lru_cache
def _overlay_palette():
    """Return a Pillow image with the colours of overlays: 63 greys, as they are and under the fill of truth, prediction and both; both outlines."""
    greys = numpy.linspace(0, 255, 63)[:, None].repeat(3, axis=1)
    fills = [greys, *(0.75 * greys + 0.25 * numpy.array(colour) for colour in (TRUTH, PREDICTION))]
    fills.append(0.75 * fills[1] + 0.25 * numpy.array(PREDICTION))
    colours = numpy.concatenate([*fills, [TRUTH, PREDICTION, PAPER, (0, 0, 0)]])                      # (256, 3)
    palette = Image.new('P', (1, 1))
    palette.putpalette(colours.round().astype('uint8').tobytes())
    return palette


def save_mask(mask, path):
    """Write a mask (H, W), bool, to `path` as a grey PNG of 8 bits, 0 and 255: one of many, so not durably. Raises OSError."""
    # Of a mask there is nothing to compress but runs, and to look for them alone gives smaller files, sooner.
    save(Image.fromarray(mask.astype('uint8') * 255), path, durable=False, compress_type=zlib.Z_RLE)


def save_probabilities(probabilities, path):
    """Write a map of probabilities (H, W), in [0, 1], as a grey PNG of 16 bits: 0 to 65535."""
    save(Image.fromarray(numpy.round(numpy.clip(probabilities, 0, 1) * 65535).astype('uint16')), path, durable=False, compress_level=1)


# Curves

def curves(history, panels=PANELS, baselines=None, title=''):
    """Return the curves of one run, one panel for each metric, training and validation in each.

    `history` is a list of dicts, one for each epoch, or a dict of lists, with the keys `epoch` (if there is none, they
    count from 1), `train_X` and `validation_X` for the metrics X. `panels` are pairs (X, title of the panel). Where a
    value is missing, NaN or infinite, the curve has a gap. `baselines`, {name: {X: value}}, at most four, are drawn as
    broken level lines. The legend gives the last finite values.
    Raises ValueError if a history is empty or holds neither part of a panel's metric.
    """
    return _figure([history], panels, baselines or {}, title)


def fold_curves(histories, panels=PANELS, baselines=None, title=''):
    """Return the curves of all folds: each fold thin, their mean bold, ± one standard deviation as a band.

    `histories` holds one history for each fold, as for `curves`. Mean and deviation at an epoch (the root of the mean
    squared distance from the mean) are over the folds that have a value there; the legend gives them for the last value
    of each fold.
    """
    return _figure(list(histories), panels, baselines or {}, title)


def _columns(history):
    """Return `history` as a dict of equally long lists that has an 'epoch'."""
    if not isinstance(history, dict):
        keys = dict.fromkeys(key for row in history for key in row)
        history = {key: [row.get(key) for row in history] for key in keys}
    lengths = {key: len(values) for key, values in history.items()}
    if not any(lengths.values()):
        raise ValueError('a history is empty; curves need one epoch at least')
    if len(set(lengths.values())) > 1:
        raise ValueError(f'a history has columns of different lengths: {lengths}; expected one value for each epoch')
    epochs = numpy.array(history.get('epoch', range(1, max(lengths.values()) + 1)), 'float64')
    return {**history, 'epoch': epochs}


def _values(histories, epochs, key):
    """Return the values of `key`, (folds, epochs), NaN where there is none."""
    values = numpy.full((len(histories), len(epochs)), numpy.nan)
    for row, history in zip(values, histories):
        if key in history:
            numbers = [numpy.nan if value is None or value == '' else float(value) for value in history[key]]
            row[numpy.searchsorted(epochs, history['epoch'])] = numbers
    values[numpy.isinf(values)] = numpy.nan
    return values


def _figure(histories, panels, baselines, title):
    """Return the picture of all panels, two side by side."""
    histories = [_columns(history) for history in histories]
    if not histories:
        raise ValueError('there is no history to draw; expected one at least')
    epochs = numpy.unique(numpy.concatenate([history['epoch'] for history in histories]))
    columns, margin, gap, top = min(2, len(panels)), 34, 54, 34 + (54 if title else 0)
    width, height = 640, 400 + (26 if baselines else 0)
    rows = -(-len(panels) // columns)
    inside = columns * width + (columns - 1) * gap
    bottom = top + rows * height + (30 if len(histories) > 1 else 0)
    image = Image.new('RGB', (inside + 2 * margin, bottom + margin // 2), PAPER)
    if title:
        _write(ImageDraw.Draw(image), (margin, margin), title, TITLE, width=inside)
    if len(histories) > 1:
        note = f'thin: each of {len(histories)} folds · bold: their mean · band: ± one (population) standard deviation'
        _write(ImageDraw.Draw(image), (margin, bottom), note, colour=FAINT, anchor='ld', width=inside)
    for k, (metric, name) in enumerate(panels):
        keys = [f'{part}_{metric}' for part, _, _ in PARTS]
        if not any(key in history for key in keys for history in histories):
            raise ValueError(f'no history has {" or ".join(keys)}; the first one has {", ".join(histories[0])}')
        parts = [(label, colour, _values(histories, epochs, key)) for key, (_, label, colour) in zip(keys, PARTS)]
        levels = [(label, float(scores[metric])) for label, scores in baselines.items() if metric in scores]
        corner = margin + k % columns * (width + gap), top + k // columns * height
        _panel(image, corner, (width, height), name, epochs, parts, levels, legend_rows=2 if baselines else 1)
    return image


def over_time(rows, truth=(), title=''):
    """Return how a mask changes over the frames of a loop: a panel each for its area, confidence, and the row and column of its centroid.

    rows    dicts as a table of results has them: frame, area, confidence, row, column; '' where there is no such value, and no row for a frame
            that was not predicted: there the curve has a gap
    truth   the same of the masks to compare with, if there are any

    Raises ValueError without a row.
    """
    if not rows:
        raise ValueError('there is no frame to draw; expected one at least')
    frames = numpy.arange(rows[0]['frame'], rows[-1]['frame'] + 1)
    panels = (('area', 'Area in pixels'), ('confidence', 'Confidence'), ('row', 'Row of the centroid, from the top'),
              ('column', 'Column of the centroid, from the left'))
    margin, gap, top, width, height = 34, 54, 34 + (54 if title else 0), 640, 400
    image = Image.new('RGB', (2 * (width + margin) + gap, top + 2 * height + margin // 2), PAPER)
    if title:
        _write(ImageDraw.Draw(image), (margin, margin), title, TITLE, width=2 * width + gap)
    for k, (key, name) in enumerate(panels):
        parts = []
        for label, colour, of in (('true mask', TRUTH, truth), ('prediction', PREDICTION, rows)):
            if any(key in row for row in of):
                columns = {'epoch': numpy.array([row['frame'] for row in of]), key: [row[key] for row in of]}
                parts.append((label, colour, _values([columns], frames, key)))
        _panel(image, (margin + k % 2 * (width + gap), top + k // 2 * height), (width, height), name, frames, parts, (), legend_rows=1, along='frame')
    return image


def nice_ticks(low, high, count=5, whole=False):
    """Return about `count` numbers in [low, high], 1, 2 or 5 times a power of ten apart; if `whole`, whole numbers."""
    rough = (high - low) / count
    power = 10.0 ** numpy.floor(numpy.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.8)
    if whole:
        step = max(step, 1)
    first, last = numpy.ceil(low / step - 1e-6), numpy.floor(high / step + 1e-6)
    return numpy.arange(first, last + 1) * step + 0.0                        # −0 + 0 is 0


def _number(value, step=0.001):
    """Return `value` as text with as many decimals as `step` needs."""
    if step < 1e-5 or abs(value) >= 1e5:
        return f'{value:.3g}'
    return f'{value:.{max(0, -int(numpy.floor(numpy.log10(step) + 1e-9)))}f}'


def _limits(values):
    """Return (low, high), the ends of an axis that holds all `values` with some room, even if they are all the same."""
    low, high = values.min(), values.max()
    spread = high - low
    room = 0.06 * spread if spread > 1e-4 * max(abs(low), abs(high)) else 0.1 * max(abs(low), abs(high)) or 0.1
    return low - room, high + room


def _runs(there):
    """Return pairs (start, end) of the stretches where `there`, bool, is true."""
    return numpy.flatnonzero(numpy.diff(there, prepend=False, append=False)).reshape(-1, 2)


def _panel(image, corner, size, name, epochs, parts, levels, legend_rows, along='epoch'):
    """Draw one panel: title, legend, axes, broken lines for `levels`, and the curves of `parts` over the `epochs`, or what they run `along`."""
    draw = ImageDraw.Draw(image)
    (left, top), (width, height) = corner, size
    _write(draw, (left, top), name, HEADING, width=width)

    _legend(draw, (left, top + 36), width, parts, levels, with_values=along == 'epoch')
    # The plot lies inside the panel: numbers on its left, title and legend above it, numbers and a word below it.
    above = 52 + 26 * legend_rows
    left, top, width, height = left + 66, top + above, width - 66, height - above - 78
    everything = numpy.concatenate([values.ravel() for _, _, values in parts] + [[level for _, level in levels]])
    everything = everything[numpy.isfinite(everything)]
    if not everything.size:
        _write(draw, (left + width / 2, top + height / 2), 'no values', colour=FAINT, anchor='mm')
        return
    low, high = _limits(everything)
    first, last = (epochs[0], epochs[-1]) if len(epochs) > 1 else (epochs[0] - 0.5, epochs[0] + 0.5)
    first, last = first - 0.015 * (last - first), last + 0.015 * (last - first)

    def x_of(epoch):                            # pixels from the left of the plot
        return (epoch - first) / (last - first) * width

    def y_of(value):                            # pixels from the top of the plot
        return (high - value) / (high - low) * height

    plot = Image.new('RGB', (width * FINE, height * FINE), PAPER)
    fine = ImageDraw.Draw(plot, 'RGBA')
    ticks = nice_ticks(low, high)
    for tick in ticks:
        y = round(y_of(tick))
        fine.rectangle((0, y * FINE, width * FINE, y * FINE + FINE - 1), LINE)
        _write(draw, (left - 10, top + y), _number(tick, ticks[1] - ticks[0] if len(ticks) > 1 else 0.001), anchor='rm')
    for tick in nice_ticks(first, last, 8, whole=True):
        if tick < epochs[0]:                    # there is no epoch 0
            continue
        x = left + round(x_of(tick))
        draw.line((x, top + height, x, top + height + 5), FAINT)
        _write(draw, (x, top + height + 10), _number(tick, 1), anchor='ma')
    _write(draw, (left + width / 2, top + height + 34), along, colour=FAINT, anchor='ma')

    for (_, level), (on, off) in zip(levels, DASHES):
        y = round(y_of(level) * FINE)
        for x in range(0, width, on + off):
            fine.rectangle((x * FINE, y - FINE, (x + on) * FINE - 1, y + FINE - 1), FAINT)

    means = []
    for _, colour, values in parts:
        count = numpy.isfinite(values).sum(axis=0)
        mean = numpy.where(count, numpy.nansum(values, axis=0) / numpy.maximum(count, 1), numpy.nan)
        deviation = numpy.sqrt(numpy.nansum((values - mean) ** 2, axis=0) / numpy.maximum(count, 1))
        means.append(mean)
        if len(values) > 1:
            for start, end in _runs(count > 0):
                edge = [*zip(epochs[start:end], (mean + deviation)[start:end]),
                        *zip(epochs[start:end][::-1], (mean - deviation)[start:end][::-1])]
                fine.polygon([(x_of(x) * FINE, y_of(y) * FINE) for x, y in edge], (*colour, 50))
    for _, colour, values in parts:
        for row in values if len(values) > 1 else ():
            _curve(fine, x_of(epochs), y_of(row), tuple(120 + c * 135 // 255 for c in colour), 1)
    for (_, colour, _), mean in zip(parts, means):
        _curve(fine, x_of(epochs), y_of(mean), colour, 2.5 if len(epochs) <= 200 else 1.5)
    image.paste(plot.reduce(FINE), (left, top))
    draw.line((left, top + height, left + width, top + height), FAINT)


def _legend(draw, corner, width, parts, levels, with_values=True):
    """Write what the lines are, and their last values: `parts` in one row, `levels` in the next."""
    left, y = corner
    x = left
    for label, colour, values in parts:
        ends = numpy.array([row[numpy.isfinite(row)][-1] for row in values if numpy.isfinite(row).any()])
        if ends.size:
            draw.rectangle((x, y + 8, x + 26, y + 11), colour)
            text = f' {_number(ends.mean())}' + (f' ± {_number(ends.std())}' if len(values) > 1 else '')
            x += 62 + _write(draw, (x + 34, y), label + text * with_values)
    x, y = left, y + 26
    for (label, level), (on, off) in zip(levels, DASHES):
        for dash in range(0, 27, on + off):
            draw.rectangle((x + dash, y + 9, x + min(dash + on, 27) - 1, y + 10), FAINT)
        x += 62 + _write(draw, (x + 34, y), f'{label} {_number(level)}', width=left + width - x - 34)


def _curve(fine, x, y, colour, thickness):
    """Draw the points (x, y), in pixels of the plot, on its enlarged drawing `fine`: a line, broken where y is NaN.

    A value without neighbours is a dot, and so is every value of a short curve.
    """
    points = [(a * FINE, b * FINE) for a, b in zip(x, y)]
    for start, end in _runs(numpy.isfinite(y)):
        if end - start > 1:
            fine.line(points[start:end], colour, round(thickness * FINE), 'curve')
        if thickness > 1 and (end - start == 1 or len(points) <= 25):
            for a, b in points[start:end]:
                radius = 1.7 * thickness * FINE
                fine.ellipse((a - radius, b - radius, a + radius, b + radius), colour)


def reliability(calibrations):
    """Return reliability diagrams side by side, one of each of {title: what `uncertainty.Calibration.compute` returned}.

    A bar for each bin of probabilities is as high as the share of its pixels that are foreground: on the diagonal, probabilities are what
    they say; below it, foreground is promised too often, above it too rarely. The darker a bar, the more pixels it stands for. The error is the expected one.
    """
    side, left, top = 330, 66, 78
    cells = []
    for title, found in calibrations.items():
        cell = Image.new('RGB', (left + side + GAP, top + side + 64), PAPER)
        draw, plot = ImageDraw.Draw(cell), Image.new('RGB', (side * FINE, side * FINE), PAPER)
        fine, bins = ImageDraw.Draw(plot), len(found['count'])
        _write(draw, (left, 0), title, HEADING, width=side)
        _write(draw, (left, 34), f'calibration error {found["ece"]:.3f}', colour=FAINT, width=side)
        for tick in (0, 0.25, 0.5, 0.75, 1):
            y = round((1 - tick) * (side * FINE - FINE))
            fine.rectangle((0, y, side * FINE, y + FINE - 1), LINE)
            _write(draw, (left - 10, top + (1 - tick) * side), f'{tick:g}', anchor='rm')
            _write(draw, (left + tick * side, top + side + 10), f'{tick:g}', anchor='ma')
        for number, (count, share) in enumerate(zip(found['count'], found['share'])):
            if count:
                shade = 0.25 + 0.75 * (count / found['count'].max())**0.5
                edges = (number / bins * side * FINE + FINE, (1 - share) * side * FINE, (number + 1) / bins * side * FINE - FINE, side * FINE)
                fine.rectangle(edges, tuple(round(255 - shade * (255 - c)) for c in BLUE))
        fine.line((0, side * FINE, side * FINE, 0), VERMILLION, 2 * FINE)
        cell.paste(plot.reduce(FINE), (left, top))
        _write(draw, (left + side / 2, top + side + 34), 'probability', colour=FAINT, anchor='ma')
        cells.append(cell)
    return grid([cells])


# Images and masks

def display_size(size, longest):
    """Return (height, width) to show an image of `size` (H, W) at: its longer side about `longest` pixels.

    A smaller image is enlarged by a whole factor, a larger one is reduced to `longest`.
    """
    factor = longest / max(size)
    factor = max(1, round(factor)) if factor >= 1 else factor
    return tuple(max(1, round(length * factor)) for length in size)


def _plane(array):
    """Return `array` without its last axis if that is the one channel of (H, W, 1)."""
    array = numpy.asarray(array)
    return array[:, :, 0] if array.ndim == 3 and array.shape[2] == 1 else array


def _grey(image):
    """Return `image` as (H, W) uint8. Raises ValueError if it is not one grey image in uint8 or floats in [0, 1]."""
    image = _plane(image)
    if image.ndim != 2 or not image.size:
        raise ValueError(f'an image has shape {image.shape}; expected (H, W) or (H, W, 1)')
    if image.dtype == 'uint8':
        return image
    if image.dtype.kind != 'f':
        raise ValueError(f'an image has dtype {image.dtype}; expected uint8, or floats in [0, 1]')
    if not (image.min() >= 0 and image.max() <= 1):                          # written so that NaN is refused too
        raise ValueError(f'an image of floats holds values from {image.min()} to {image.max()}; expected [0, 1]')
    return numpy.round(image * 255).astype('uint8')


def _binary(mask, size):
    """Return `mask` as (H, W) bool. Raises ValueError if it is not binary or not of the image's `size`."""
    mask = _plane(mask)
    if mask.shape != tuple(size):
        raise ValueError(f'a mask has shape {mask.shape}, its image {tuple(size)}; expected the same size')
    if mask.dtype != bool and not (numpy.isin(mask, (0, 1)).all() or numpy.isin(mask, (0, 255)).all()):
        raise ValueError(f'a mask holds values from {mask.min()} to {mask.max()}; expected only 0 and 1, or 0 and 255: '
                         'apply the threshold first')
    return mask != 0


def picture(image, size=None):
    """Return `image` as an RGB picture of `size` (height, width), by default enlarged to about 512 if it is smaller."""
    image = _grey(image)
    height, width = size or _default_size(image.shape)
    return Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC).convert('RGB')


def _default_size(size):
    return display_size(size, max(512, *size))


def _enlarged(mask, size):
    """Return `mask` drawn for a picture of `size`, at twice that size: the ½ level of its linear interpolation."""
    drawn = Image.fromarray(mask.astype('uint8') * 255).resize((2 * size[1], 2 * size[0]), Image.Resampling.BILINEAR)
    return numpy.asarray(drawn) >= 128


def _outline(mask, thickness, inside):
    """Return a line of `thickness` pixels along the edge of `mask`, in the mask or, with inside=False, around it.

    The mask is taken to go on beyond the image's border, so there is no line along it.
    """
    outline = numpy.zeros_like(mask)
    if mask.any():
        rows, columns = (numpy.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
        around = tuple(slice(max(0, at[0] - thickness), at[-1] + thickness + 1) for at in (rows, columns))
        area = mask[around] if inside else ~mask[around]
        padded = numpy.pad(area, thickness, mode='edge')
        inner = area.copy()
        for row in range(2 * thickness + 1):
            for column in range(2 * thickness + 1):
                if (row - thickness) ** 2 + (column - thickness) ** 2 <= thickness ** 2:
                    inner &= padded[row:row + area.shape[0], column:column + area.shape[1]]
        outline[around] = area & ~inner
    return outline


def overlay(image, mask, truth=None, size=None):
    """Return `image` with the predicted `mask` on it in orange and the `truth`, if given, in blue: outline, pale fill.

    The prediction's outline lies just inside its mask and the truth's just outside, so both are seen where they agree.
    `size` (height, width) is that of the picture, as for `picture`.
    Raises ValueError for a mask that is not binary or not as large as the image.
    """
    image = _grey(image)
    size = size or _default_size(image.shape)
    thickness = 2 * max(2, round(max(size) ** 0.5 / 7))                      # on drawings of twice the size
    areas = [(_enlarged(_binary(area, image.shape), size), colour, inside)
             for area, colour, inside in ((truth, TRUTH, False), (mask, PREDICTION, True)) if area is not None]
    shown = picture(image, size)
    for area, colour, _ in areas:
        _lay(shown, area, colour, 0.25)
    for area, colour, inside in areas:
        _lay(shown, _outline(area, thickness, inside), colour, 1)
    return shown


def _lay(shown, area, colour, opacity):
    """Lay `colour` over the picture `shown` where `area`, drawn at twice its size, is true."""
    share = Image.fromarray(area.astype('uint8') * round(255 * opacity)).reduce(2)
    shown.paste(colour, None, share)


def _coloured(values):
    """Return the picture of `values` (H, W) in [0, 1] on the scale of colours HEAT."""
    stops = numpy.linspace(0, 1, len(HEAT))
    colours = numpy.stack([numpy.interp(values, stops, channel) for channel in HEAT.T], axis=-1)
    return Image.fromarray(colours.round().astype('uint8'))


def heat(image, magnitude, size=None, largest=None):
    """Return `image` with `magnitude` (H, W), from 0 up, on it: the larger, the brighter and the less transparent.

    Shown is the square root of magnitude / `largest`, by default its maximum, because a gradient's few large values would hide all others.
    Raises ValueError if magnitude has another size, or is negative, NaN or infinite somewhere.
    """
    image, magnitude = _grey(image), numpy.asarray(magnitude, 'float64')
    if magnitude.shape != image.shape:
        raise ValueError(f'magnitude has shape {magnitude.shape}, its image {image.shape}; expected the same size')
    if not (magnitude.min() >= 0 and numpy.isfinite(magnitude.max())):
        raise ValueError(f'magnitude holds values from {magnitude.min()} to {magnitude.max()}; '
                         'expected finite ones from 0 up')
    size = size or _default_size(image.shape)
    level = numpy.sqrt((magnitude / (largest or magnitude.max() or 1)).clip(0, 1))
    opacity = Image.fromarray((level * 255).round().astype('uint8')).resize(size[::-1], Image.Resampling.BILINEAR)
    shown = picture(image, size)
    shown.paste(_coloured(numpy.asarray(opacity) / 255), None, opacity)
    return shown


def rectangle(shown, box, size, colour=ORANGE, line=3):
    """Return a copy of the picture `shown` of an image of `size` (H, W), with a frame around `box`.

    `box` is (top, left, height, width) in pixels of the image. The frame runs around it, `line` pixels of the picture
    thick; where the box leaves the image, along the border.
    """
    top, left, height, width = box
    down, across = shown.height / size[0], shown.width / size[1]
    corner = max(0, round(left * across) - line), max(0, round(top * down) - line)
    opposite = (min(shown.width, round((left + width) * across) + line) - 1,
                min(shown.height, round((top + height) * down) + line) - 1)
    shown = shown.copy()
    ImageDraw.Draw(shown).rectangle((*corner, *opposite), outline=colour, width=line)
    return shown


# Many pictures in one

def grid(rows, captions=None, row_titles=None, column_titles=None, title='', margin=2 * GAP):
    """Return the pictures of `rows`, a list of lists, arranged in rows and columns on white; None leaves a place empty.

    `captions` (lists like rows) are above the pictures, `row_titles` above the rows, `column_titles` above the columns;
    text too wide for its place is cut.
    """
    columns = max(map(len, rows))
    widths = [max((row[c].width for row in rows if c < len(row) and row[c]), default=0) for c in range(columns)]
    heights = [max((cell.height for cell in row if cell), default=0) for row in rows]
    title_height, header_height = 50 if title else 0, 34 if column_titles else 0
    row_title_height, caption_height = 34 if row_titles else 0, 26 if captions else 0
    inside = sum(widths) + GAP * (columns - 1)
    height = title_height + header_height + sum(heights) + len(rows) * (row_title_height + caption_height)
    sheet = Image.new('RGB', (inside + 2 * margin, height + GAP * (len(rows) - 1) + 2 * margin), PAPER)
    draw = ImageDraw.Draw(sheet)
    lefts = [margin + sum(widths[:c]) + GAP * c for c in range(columns)]
    top = margin
    if title:
        _write(draw, (margin, top), title, TITLE, width=inside)
        top += title_height
    for left, width, text in zip(lefts, widths, column_titles or ()):
        _write(draw, (left, top), text, HEADING, width=width)
    top += header_height
    for r, row in enumerate(rows):
        if row_titles:
            _write(draw, (margin, top + 6), row_titles[r], TEXT, width=inside)
            top += row_title_height
        for c, cell in enumerate(row):
            if captions:
                _write(draw, (lefts[c], top), captions[r][c], TEXT, FAINT, width=widths[c])
            if cell:
                sheet.paste(cell, (lefts[c], top + caption_height))
        top += caption_height + heights[r] + GAP
    return sheet


def best_median_worst(scores):
    """Return [('best', i), ('median', j), ('worst', k)], places in `scores`; best and worst of two, best of one."""
    scores = numpy.asarray(scores, 'float64')
    if scores.ndim != 1 or not scores.size or numpy.isnan(scores).any():
        raise ValueError(f'scores are {numpy.array2string(scores, threshold=6)}; expected a list of numbers')
    order = numpy.argsort(-scores, kind='stable').tolist()
    if len(order) < 3:
        return list(zip(('best', 'worst'), order))
    return [('best', order[0]), ('median', order[len(order) // 2]), ('worst', order[-1])]


def predictions(cases, title=''):
    """Return rows of image, truth, prediction and overlay, one row for each of `cases`.

    A case is a dict with `image`, `prediction` (a binary mask) and, if wanted, `truth` (if no case has one, there is no
    such column), `dice` (else it is that of the two masks; empty against empty is 1), `name` and `label`, as 'best'.
    """
    has_truth = any(case.get('truth') is not None for case in cases)
    rows, row_titles = [], []
    for case in cases:
        image = _grey(case['image'])
        prediction, truth = _binary(case['prediction'], image.shape), case.get('truth')
        size = display_size(image.shape, 350)
        row = [picture(image, size), _silhouette(prediction, size, PREDICTION), overlay(image, prediction, truth, size)]
        text = [case[key] for key in ('label', 'name') if case.get(key)]
        if truth is not None:
            truth = _binary(truth, image.shape)
            dice = case.get('dice', float(ratio(2.0 * (prediction & truth).sum(), prediction.sum() + truth.sum())))
            text.append(f'Dice {dice:.3f}')
        if has_truth:
            row.insert(1, truth if truth is None else _silhouette(truth, size, TRUTH))
        rows.append(row)
        row_titles.append(' · '.join(text))
    column_titles = ['image', *['truth'] * has_truth, 'prediction', 'overlay']
    return grid(rows, row_titles=row_titles, column_titles=column_titles, title=title)


def _silhouette(mask, size, colour):
    """Return `mask` as a picture of `size`: `colour` on black."""
    shown = Image.new('RGB', size[::-1], (20, 20, 20))
    _lay(shown, _enlarged(mask, size), colour, 1)
    return shown


def feature_maps(stages, count=8, title=''):
    """Return what the `stages` of a network hold: in each row one stage (title, features (H, W, C)), or a list of them.

    Of each stage the `count` channels that vary most over the image are shown (a list of stages shares the count), each
    on its own scale from its minimum, dark, to its maximum, bright. All maps are equally large on paper, so that a deep
    stage is seen for what it is: few and large pixels, many channels.
    Raises ValueError if features are not (H, W, C) or not finite.
    """
    stages = [row if isinstance(row, list) else [row] for row in stages]
    sizes = [numpy.shape(features)[:2] for row in stages for _, features in row]
    size = display_size(max(sizes, key=max), 1500 // count)
    rows = [grid([[_strip(name, numpy.asarray(features), count // len(row), size) for name, features in row]], margin=0)
            for row in stages]
    return grid([[row] for row in rows], title=title)


def _strip(name, features, count, size):
    """Return `count` channels of one stage side by side under its name and shape."""
    if features.ndim != 3 or not numpy.isfinite(features).all():
        raise ValueError(f'stage {name}: features of shape {features.shape}; expected (H, W, C), all finite')
    H, W, C = features.shape
    varied = numpy.sort(numpy.argsort(-features.std(axis=(0, 1)), kind='stable')[:count])
    tiles = []
    for channel in numpy.moveaxis(features[:, :, varied], 2, 0).astype('float64'):
        level = (channel - channel.min()) / (numpy.ptp(channel) or 1)
        tiles.append(_coloured(level).resize(size[::-1], Image.Resampling.NEAREST))
    empty = [Image.new('RGB', size[::-1], PAPER)] * (count - len(tiles))     # so that all strips are equally wide
    shown = f'{len(tiles)} of {C} channels' if len(tiles) < C else f'{C} channels' if C > 1 else '1 channel'
    return grid([tiles + empty], row_titles=[f'{name} · {H}×{W}, {shown}'], margin=0)
