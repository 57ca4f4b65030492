"""Random changes of image and mask together, so that a network never meets the same scan twice; and the median filter.

A flipped, turned, stretched or brighter scan is a new scan of the same anatomy: it shows what must not matter.

**Coordinates as homogeneous matrices.** A pixel is a point (y, x): y rows down, x columns right, pixel centres at whole
numbers, so that the image's centre is ((H−1)/2, (W−1)/2). Written with a third coordinate that is always 1, a shift is
a matrix product too, as rotation, shear, zoom and flip are already:

    | y' |   | a  b  shift_y |   | y |
    | x' | = | c  d  shift_x | · | x |
    | 1  |   | 0  0  1       |   | 1 |

So a chain of changes is one matrix, the product of theirs. "About the centre" is two more factors: first move the
centre to (0, 0), last move it back. Lengths are pixels, so a rotation keeps shapes in images that are not square, too.

**The inverse map.** To send every pixel to its new place would leave holes where places spread, and collisions where
they crowd. So each *output* pixel asks where it came from. The matrices here map output to source: every output pixel
gets exactly one value, and only a look-up between source pixels is left.

**One look-up.** Every interpolation blurs a little, and what one step pushes over the edge the next cannot bring back.
So all geometric changes become one source position per output pixel, for image and mask alike, which is read once: the
image bilinearly, because its grey levels are samples of something continuous; the mask at the nearest pixel, because
the mean of nerve and background is neither.

Sources: Simard, Steinkraus and Platt 2003, "Best practices for convolutional neural networks applied to visual document
analysis" (elastic deformation); Ronneberger, Fischer and Brox 2015, "U-Net" (smooth deformation from a coarse grid).
"""

import math
import numbers
from dataclasses import dataclass, fields
from functools import lru_cache
from types import SimpleNamespace

import numpy

from ..engine.backend import device_of, generator_like, get_array_module, move, to_cpu
from ..engine.parallel import one_thread_per_product

FILL_MODES = 'nearest', 'reflect', 'constant'


# --- Where each output pixel comes from -------------------------------------------------------------------------------

def affine(size, rotation=0.0, shift=(0.0, 0.0), shear=0.0, zoom=1.0, flip=(False, False)):
    """Return the (3, 3) float64 matrix that maps an output pixel (y, x, 1) of an image of `size` (H, W) to its source.

    What is seen, in this order, about the centre: `flip` (upside down, left-right); `zoom`, the factor by which things
    grow; `shear` in degrees, rows slide right in proportion to their depth; `rotation` in degrees, counter-clockwise;
    `shift` (down, right) in pixels. Flips, quarter turns and whole-pixel shifts give exact matrices.
    """
    H, W = size
    turn = math.radians(rotation)
    cos, sin = round(math.cos(turn), 15), round(math.sin(turn), 15)  # so that cos 90° is 0, not 6e-17
    slope = math.tan(math.radians(shear))
    centre_y, centre_x = (H - 1) / 2, (W - 1) / 2
    # The inverse of a chain is the chain of inverses in reverse: shifted back first, flipped back last.
    return (numpy.array([[1, 0, centre_y], [0, 1, centre_x], [0, 0, 1]])
            @ numpy.diag([-1.0 if flip[0] else 1.0, -1.0 if flip[1] else 1.0, 1.0])
            @ numpy.diag([1 / zoom, 1 / zoom, 1])
            @ numpy.array([[1, 0, 0], [-slope, 1, 0], [0, 0, 1]])
            @ numpy.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]])
            @ numpy.array([[1, 0, -centre_y - shift[0]], [0, 1, -centre_x - shift[1]], [0, 0, 1]]))


@lru_cache
def spline_basis(length, spacing):
    """Return B (length, controls): how much each control point, one every `spacing` pixels, moves each pixel.

    It is the cubic B-spline of the distance, a smooth bump four spacings wide: in each row four weights that sum to 1.
    """
    controls = int((length - 1) / spacing) + 4                       # from one spacing before the first pixel on
    distance = abs(numpy.arange(length)[:, None] / spacing + 1 - numpy.arange(controls))          # (length, controls)
    basis = (numpy.maximum(2 - distance, 0)**3 - 4 * numpy.maximum(1 - distance, 0)**3) / 6
    basis.flags.writeable = False                                    # it is remembered, and handed to every caller
    return basis


def smooth_field(controls, size, spacing):
    """Return displacements (N, 2, H, W) from those of control points (N, 2, a, b), one every `spacing` pixels.

    Two small products spread the moves of few points to all pixels, smoothly. The weights are positive and sum to 1, so
    no pixel moves further along an axis than some control point does.
    """
    xp = get_array_module(controls)
    down, across = (xp.asarray(spline_basis(length, spacing).astype(controls.dtype)) for length in size)
    with one_thread_per_product():
        return down @ controls @ across.T                            # (H, a) @ (N, 2, a, b) @ (b, W)


def positions(matrices, size, displacement=None):
    """Return (y, x), each (N, H, W): the source of every output pixel, for `matrices` (N, 3, 3) and `size` (H, W).

    `displacement` (N, 2, H, W) in pixels, down and right, is added to the output pixel before its matrix is applied.
    """
    xp = get_array_module(matrices)
    y, x = (xp.arange(length, dtype=matrices.dtype) for length in size)
    y = y[:, None]                                                                                # (H, 1), and x (W,)
    if displacement is not None:
        y, x = y + displacement[:, 0], x + displacement[:, 1]                                     # (N, H, W)
    m = matrices[:, :2, :, None, None]                                                            # (N, 2, 3, 1, 1)
    return tuple(m[:, row, 0] * y + m[:, row, 1] * x + m[:, row, 2] for row in (0, 1))


# --- The look-up ------------------------------------------------------------------------------------------------------

def brought_inside(position, length, fill_mode):
    """Return `position` (any shape), in pixels along an axis of `length` pixels, brought into [0, length − 1].

    'nearest' continues an image by its edge pixels: a a a | a b c d | d d d; 'reflect' by its mirror image, edge pixel
    included: c b a | a b c d | d c b.
    """
    xp = get_array_module(position)
    if fill_mode == 'reflect':                                       # the mirror is half a pixel beyond the last centre
        turn = position + 0.5
        turn = turn - 2 * length * xp.floor(turn / (2 * length))     # there and back is 2·length
        position = xp.minimum(turn, 2 * length - turn) - 0.5
    return xp.clip(position, 0, length - 1)


def resample(images, masks, source, fill_mode='nearest', cval=0.0):
    """Return (images, masks) read at `source` = (y, x), each (N, H, W): images bilinearly, masks at the nearest pixel.

    images (N, H, W, C) of floats and masks (N, H, W, C') keep their dtypes. Beyond the edge they continue as `brought_inside` says,
    or, if `fill_mode` is 'constant', with `cval` around images and background around masks. At whole-numbered positions
    the result is the very pixel. Raises ValueError for an unknown fill_mode and for images that are not of floats.
    """
    xp, (y, x) = get_array_module(images), source
    if images.dtype.kind != 'f':                                     # differences of unsigned levels would wrap around
        raise ValueError(f'images are of dtype {images.dtype}; expected floats')
    if fill_mode not in FILL_MODES:
        raise ValueError(f'fill_mode is {fill_mode!r}; expected one of {FILL_MODES}')
    if fill_mode == 'constant':                                      # a frame of it, one pixel wide, to continue from
        images, masks, y, x = _framed(images, cval), _framed(masks, 0), y + 1, x + 1
    N, H, W = images.shape[:3]
    y, x = brought_inside(y, H, fill_mode), brought_inside(x, W, fill_mode)
    top, left = xp.floor(y), xp.floor(x)
    down, right = y - top, x - left                                  # in [0, 1): the way to the next row and column
    # Pixels are numbered through the batch, row by row. One number per look-up is faster than three.
    index = top.astype(xp.int64) * W + left.astype(xp.int64) + H * W * xp.arange(N)[:, None, None]

    pixels = images.reshape(N * H * W, -1)
    below, beside = W * (down > 0), right > 0                        # a neighbour with weight 0 may not exist: stay
    down_, right_ = down[..., None], right[..., None]                # (N, H, W, 1), one weight for all channels

    def row_at(index):
        start, end = pixels.take(index, axis=0), pixels.take(index + beside, axis=0)              # (N, H, W, C)
        return start + (end - start) * right_

    upper, lower = row_at(index), row_at(index + below)
    nearest = index + W * (down >= 0.5) + (right >= 0.5)
    return upper + (lower - upper) * down_, masks.reshape(N * H * W, -1).take(nearest, axis=0)


def _framed(x, value):
    """Return x (N, H, W, C) with a frame of `value`, one pixel wide, around each image."""
    N, H, W, C = x.shape
    framed = get_array_module(x).full((N, H + 2, W + 2, C), value, x.dtype)
    framed[:, 1:1 + H, 1:1 + W] = x
    return framed


# --- Random augmentation ----------------------------------------------------------------------------------------------

@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Random changes of a batch: `images, masks = augmentation(images, masks, rngs)`. Everything is off by default.

    rotation_range      degrees; the angle is drawn from ±this
    width_shift_range   share of the width, in [0, 1); drawn from ±this
    height_shift_range  share of the height, likewise
    shear_range         degrees; drawn from ±this
    zoom_range          z for factors in [1 − z, 1 + z], or (low, high); above 1 things grow; one factor for both axes
    horizontal_flip     left-right in half of all cases
    vertical_flip       upside down in half of all cases
    elastic_range       smooth deformation: how far a control point moves along an axis at most, a share of the shorter
                        side; 0.48 / elastic_grid is the limit, below which the image cannot fold over itself (Choi and
                        Lee 2000, "Injectivity conditions of 2D and 3D uniform cubic B-spline functions")
    elastic_grid        control points per shorter side: the fewer, the smoother
    gamma_range         exponent of the intensities, g or (low, high) as for the zoom; above 1 darkens the middle greys
    gain_range          factor on the intensities, g or (low, high): brightness and contrast at once
    speckle_range       grain: each pixel times 1 + s·(standard normal), with s drawn from [0, this] for each image
    fill_mode, cval     what is outside: 'nearest', 'reflect', or 'constant' with intensity `cval`; see `resample`

    A frozen dataclass: two with equal settings are equal, `dataclasses.replace` makes a variant, `asdict` a record.
    Raises ValueError for a setting out of its range.
    """
    rotation_range: float = 0.0
    width_shift_range: float = 0.0
    height_shift_range: float = 0.0
    shear_range: float = 0.0
    zoom_range: float | tuple = 0.0
    horizontal_flip: bool = False
    vertical_flip: bool = False
    elastic_range: float = 0.0
    elastic_grid: int = 4
    gamma_range: float | tuple = 0.0
    gain_range: float | tuple = 0.0
    speckle_range: float = 0.0
    fill_mode: str = 'nearest'
    cval: float = 0.0

    def __post_init__(self):
        def check(name, good, expected):
            if not good(getattr(self, name)):
                raise ValueError(f'{name} is {getattr(self, name)!r}; expected {expected}')

        def number(low, high):
            return lambda value: isinstance(value, numbers.Real) and low <= value <= high

        def factors(value):
            if isinstance(value, tuple):
                return len(value) == 2 and all(map(number(1e-3, 1e3), value)) and value[0] <= value[1]
            return number(0, 0.999)(value)

        check('elastic_grid', lambda value: isinstance(value, int) and value >= 1, 'a whole number from 1 up')
        for name, low, high, unit in (
                ('rotation_range', 0, 180, 'degrees'), ('shear_range', 0, 80, 'degrees'),
                ('width_shift_range', 0, 0.999, 'the share of the width,'),
                ('height_shift_range', 0, 0.999, 'the share of the height,'),
                ('elastic_range', 0, 0.48 / self.elastic_grid,
                 f'the share of the shorter side, with elastic_grid {self.elastic_grid}'),
                ('speckle_range', 0, 1, 'the standard deviation of a factor,'), ('cval', 0, 1, 'an intensity')):
            check(name, number(low, high), f'{unit} from {low} to {high:g}')
        for name in ('zoom_range', 'gamma_range', 'gain_range'):
            if isinstance(getattr(self, name), list):                # as JSON gives a pair back
                object.__setattr__(self, name, tuple(getattr(self, name)))
            check(name, factors, 'a number r from 0 up to below 1, for factors from 1 − r to 1 + r, '
                                 'or a pair (low, high) with 0.001 ≤ low ≤ high ≤ 1000')
        for name in ('horizontal_flip', 'vertical_flip'):
            check(name, lambda value: isinstance(value, bool), 'True or False')
        check('fill_mode', lambda value: value in FILL_MODES, f'one of {FILL_MODES}')

    def draw(self, rng, size):
        """Return what is drawn for one sample of `size` (H, W): arguments of `affine`, of the grey levels, two seeds.

        All numbers are drawn in one fixed order whatever is on, and what needs many has a generator of its own: so a
        setting never changes what is drawn for the others.
        """
        u = rng.random(10).tolist()
        elastic_seed, speckle_seed = rng.integers(2**63, size=2).tolist()

        def either_way(range_, u):
            return range_ * (2 * u - 1)

        def factor(range_, u):
            low, high = range_ if isinstance(range_, tuple) else (1 - range_, 1 + range_)
            return low + (high - low) * u

        return SimpleNamespace(
            rotation=either_way(self.rotation_range, u[0]),
            shift=(either_way(self.height_shift_range * size[0], u[1]),
                   either_way(self.width_shift_range * size[1], u[2])),
            shear=either_way(self.shear_range, u[3]), zoom=factor(self.zoom_range, u[4]),
            flip=(self.vertical_flip and u[5] < 0.5, self.horizontal_flip and u[6] < 0.5),
            gamma=factor(self.gamma_range, u[7]), gain=factor(self.gain_range, u[8]), speckle=self.speckle_range * u[9],
            elastic_seed=elastic_seed, speckle_seed=speckle_seed)

    def controls(self, draw, size):
        """Return the displacements (2, a, b) float64, in pixels, of the control points of an image of `size` (H, W)."""
        shorter = min(size)
        shape = (2, *(spline_basis(length, shorter / self.elastic_grid).shape[1] for length in size))
        most = self.elastic_range * shorter
        return numpy.random.default_rng(draw.elastic_seed).uniform(-most, most, shape)

    def __call__(self, images, masks, rngs):
        """Return (images, masks), changed: images (N, H, W, C) float in [0, 1], clipped to it, masks (N, H, W, C') 0/1.

        `rngs` holds one `numpy.random.Generator` per sample; a sample's result depends on its own alone, not on the
        batch. With nothing on, the arguments themselves come back. Raises ValueError if their numbers or sizes differ,
        or values are others than these; on a device, where a look at them would wait for it, wrong ones become NaN.
        """
        N, xp = len(images), get_array_module(images)
        if images.ndim != 4 or masks.ndim != 4 or images.shape[:3] != masks.shape[:3] or len(rngs) != N:
            raise ValueError(f'images {images.shape}, masks {masks.shape} and {len(rngs)} generators differ; expected '
                             "(N, H, W, C), (N, H, W, C') with the same N, H, W, and N generators")
        if images.dtype.kind != 'f':
            raise ValueError(f'images are of dtype {images.dtype}; expected floats in [0, 1]: divide by the value that is white')
        right = [(images >= 0) & (images <= 1), (masks == 0) | (masks == 1)]                      # NaN is not
        if xp is numpy and not right[0].all():
            raise ValueError(f'images hold values from {images.min():g} to {images.max():g}; expected intensities in [0, 1]: '
                             'divide by the value that is white')
        if xp is numpy and not right[1].all():
            raise ValueError(f'masks hold values from {masks.min():g} to {masks.max():g}; expected 0 and 1 only')
        off = Augmentation()
        on = {field.name for field in fields(self) if getattr(self, field.name) != getattr(off, field.name)}
        if N == 0 or not on - {'elastic_grid', 'fill_mode', 'cval'}:
            return images, masks
        if xp is not numpy:
            images, masks = (xp.where(good, values, xp.nan).astype(values.dtype) for good, values in zip(right, (images, masks)))
        draws = [self.draw(rng, images.shape[1:3]) for rng in rngs]
        # One image's arrays stay in the processor's cache; a device is best given all at once.
        blocks = [slice(n, n + 1) for n in range(N)] if xp is numpy else [slice(N)]
        changed = [self._changed(images[block], masks[block], draws[block], on) for block in blocks]
        return tuple(map(xp.concatenate, zip(*changed)))

    def _changed(self, images, masks, draws, on):
        """Return (images, masks) as `draws` say; `on` names the settings that are not at their defaults."""
        xp, dtype, size = get_array_module(images), images.dtype, images.shape[1:3]

        def moved(values):
            return xp.asarray(numpy.array(values, dtype))

        def of_each(name):                                           # (N, 1, 1, 1), beside the images
            return moved([getattr(draw, name) for draw in draws])[:, None, None, None]

        if on & GEOMETRIC:
            field = None
            if 'elastic_range' in on:
                controls = moved([self.controls(draw, size) for draw in draws])                   # (N, 2, a, b)
                field = smooth_field(controls, size, min(size) / self.elastic_grid)               # (N, 2, H, W)
            matrices = [affine(size, draw.rotation, draw.shift, draw.shear, draw.zoom, draw.flip) for draw in draws]
            source = positions(moved(matrices), size, field)
            images, masks = resample(images, masks, source, self.fill_mode, self.cval)
        if 'gamma_range' in on:
            images = images**of_each('gamma')
        if 'gain_range' in on:
            images = images * of_each('gain')
        if 'speckle_range' in on:
            generators = [generator_like(images, numpy.random.default_rng(draw.speckle_seed)) for draw in draws]
            noise = xp.stack([generator.standard_normal(images.shape[1:], dtype) for generator in generators])
            images = images + images * noise * of_each('speckle')
        return xp.clip(images, 0, 1), masks


GEOMETRIC = {'rotation_range', 'width_shift_range', 'height_shift_range', 'shear_range', 'zoom_range',
             'horizontal_flip', 'vertical_flip', 'elastic_range'}

# A start for nerve scans: what the next patient, hand and scanner may change, and no more.
ULTRASOUND = Augmentation(
    rotation_range=10,          # the tilt of the probe on the neck
    width_shift_range=0.1,      # where the probe is put down
    height_shift_range=0.1,     # how firmly it is pressed on, and the thickness of skin and fat above the nerve
    shear_range=5,              # tissue slides along the skin when the probe is pushed sideways
    zoom_range=0.1,             # patients and depth settings differ in size
    horizontal_flip=True,       # the left neck mirrors the right; upside down does not occur, the skin is always on top
    elastic_range=0.05,         # soft tissue: outlines bend, layers stay in order
    gamma_range=0.2,            # the scanner's curve from echo to grey
    gain_range=0.2,             # the scanner's gain knob
    speckle_range=0.06,         # grain changes from frame to frame, anatomy does not; more hides the nerve's texture
    fill_mode='reflect')        # tissue goes on beyond the edge: 'nearest' draws streaks there, 'constant' black wedges


# --- Preprocessing ----------------------------------------------------------------------------------------------------

def median_filter(images, size=3, fill_mode='nearest'):
    """Return `images` (H, W) or (N, H, W, C), each pixel replaced by the median of the size×size pixels around it.

    Against speckle: a median drops bright and dark grains and, unlike a mean, leaves edges sharp. Nothing in it is
    random: what a network is trained on filtered, it must be given filtered. `size` is odd, 3 or more; beyond the edge
    images continue as `fill_mode` 'nearest' or 'reflect' says. Any dtype that can be ordered. Raises ValueError.

    A small window's median is found by forgetting, a large one's by counting; the second takes equally long for any size.
    """
    if not isinstance(size, numbers.Integral) or size % 2 == 0 or size < 3 or fill_mode not in FILL_MODES[:2]:
        raise ValueError(f'size is {size}, fill_mode {fill_mode!r}; expected an odd size from 3 up and one of '
                         f'{FILL_MODES[:2]}')
    if images.ndim not in (2, 4):
        raise ValueError(f'images have shape {images.shape}; expected (H, W) or (N, H, W, C)')
    xp, x = get_array_module(images), images if images.ndim == 4 else images[None, ..., None]
    (H, W), reach = x.shape[1:3], size // 2
    for axis, length in (1, H), (2, W):
        around = xp.arange(-reach, length + reach).astype(xp.float64)
        x = x.take(brought_inside(around, length, fill_mode).astype(xp.int64), axis=axis)     # (N, H + 2·reach, W + 2·reach, C)
    if size <= 11:
        return median_by_forgetting([x[:, i:i + H, j:j + W] for i in range(size) for j in range(size)]).reshape(images.shape)
    host, filtered = to_cpu(x), numpy.empty((len(x), H, W, x.shape[3]), x.dtype)      # counting is work for the host
    for n, c in numpy.ndindex(len(x), x.shape[3]):
        filtered[n, :, :, c] = _median_by_counting(host[n, :, :, c], size)
    return move(filtered, device_of(images)).reshape(images.shape)


def median_by_forgetting(windows):
    """Return the median of an odd number of equally large arrays, element by element.

    Source: Paeth 1990, "Median finding on a 3×3 grid".
    Of any n//2 + 2 of n values, the smallest has too many above it to be the median, and the largest too many below.
    Drop both, take in the next value, and so on until one is left. It takes only minima and maxima of whole images.
    """
    xp, first = get_array_module(windows[0]), len(windows) // 2 + 2
    kept, waiting = windows[:first], windows[first:]

    def order(a, b):
        kept[a], kept[b] = xp.minimum(kept[a], kept[b]), xp.maximum(kept[a], kept[b])

    while len(kept) > 1:
        last = len(kept) - 1
        for a in range(len(kept) // 2):
            order(a, last - a)                                       # the smaller ones in front, the larger ones behind
        for a in range(1, last // 2 + 1):
            order(0, a)                                              # the smallest first
        for a in range(len(kept) // 2, last):
            order(a, last)                                           # the largest last
        kept = kept[1:-1] + ([waiting.pop()] if waiting else [])
    return kept[0]


def _median_by_counting(x, size):
    """Return the medians (H, W) of all size×size windows of x (H + size − 1, W + size − 1), NumPy.

    Let all pixels of x stand in order, cut into about √(pixels) parts of equal length. How many pixels of the first
    parts lie in each window is a difference of running sums, whatever the window's size. So halving the parts again and
    again finds the one that holds a window's middle pixel; there its pixels are counted one by one.
    """
    H, W = (length - size + 1 for length in x.shape)
    order, middle = x.ravel().argsort(kind='stable'), size**2 // 2
    length = math.isqrt(len(order)) + 1
    part_of = numpy.empty(x.shape, numpy.int32)
    part_of.flat[order] = numpy.arange(len(order)) // length
    rows, columns = (order // x.shape[1]).astype(numpy.int32), (order % x.shape[1]).astype(numpy.int32)

    def counted(there):                                              # in each window: (H·W,) of there, bool like x
        sums = numpy.zeros((x.shape[0] + 1, x.shape[1] + 1), numpy.int32)
        there.cumsum(axis=0, dtype=numpy.int32, out=sums[1:, 1:])
        sums = (sums[size:] - sums[:H]).cumsum(axis=1, dtype=numpy.int32)                         # (H, W + size)
        return (sums[:, size:] - sums[:, :W]).ravel()

    result, before = numpy.empty(H * W, x.dtype), numpy.zeros(H * W, numpy.int32)
    todo = [(0, -(-len(order) // length), numpy.arange(H * W))]
    while todo:                                                      # windows whose middle pixel is in parts low … high − 1
        low, high, windows = todo.pop()
        if high - low > 1 and len(windows):
            half = (low + high) // 2
            number = counted(part_of < half)[windows]
            later = number <= middle
            before[windows[later]] = number[later]
            todo += [(low, half, windows[~later]), (half, high, windows[later])]
            continue
        for some in numpy.array_split(windows, -(-len(windows) // 4096)) if len(windows) else ():
            start = low * length
            row = rows[start:start + length] - (some // W).astype(numpy.int32)[:, None]           # (windows, length)
            column = columns[start:start + length] - (some % W).astype(numpy.int32)[:, None]
            within = (row >= 0) & (row < size) & (column >= 0) & (column < size)
            number = within.cumsum(axis=1, dtype=numpy.int32) + before[some, None]
            result[some] = x.flat[order[start + (number > middle).argmax(axis=1)]]
    return result.reshape(H, W)
