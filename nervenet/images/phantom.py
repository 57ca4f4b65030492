"""Synthetic ultrasound of a neck that, in some frames, holds a nerve: images and masks to train on without any scans.

A B-mode image is a map of echoes. The probe sends a pulse down each column and listens; the later an echo returns, the
deeper it is drawn. This module makes an anatomy, moves it a little from frame to frame, and scans it. What makes an
ultrasound image look like one follows from a few lines of `scan` and `Subject`:

- **Speckle**, the grain. Tissue is full of scatterers far smaller than the pulse. The echoes of all that lie within one
  pulse add up with random phases to a complex Gaussian number, and its magnitude is what is drawn (Burckhardt 1978,
  "Speckle in ultrasound B-mode scans"). The grain shows the size of the pulse, not of any tissue (Wagner et al. 1983,
  "Statistics of speckle in ultrasound B-scans"), so an image is simulated as scatterers convolved with the pulse
  (Bamber and Dickinson 1980, "Ultrasonic B-scanning: a computer simulation"). The beam is narrowest at its focus, so
  the grain widens away from it.
- **Bright lines.** A smooth surface (fascia, a vessel's wall, bone) reflects like a mirror: its echoes add in phase,
  without speckle, and most where it faces the probe. So a round wall shows its top and bottom and loses its sides.
- **Shadow and enhancement.** Sound weakens on its way. The scanner amplifies late echoes as if all tissue weakened it
  alike; so what lies below bone comes out too dark, and what lies below blood too bright.
- **Haze.** Echoes differ by a factor of a million, so the screen shows their logarithm; the noise of the amplifier is
  what is left in the dark.

The nerve is a group of fascicles, dark discs in bright connective tissue (Silvestri et al. 1995, "Echotexture of
peripheral nerves"). Its place, size and tilt, and the share of frames that hold it, follow the brachial plexus in the
frames of the Kaggle competition "Ultrasound Nerve Segmentation". Vessels, muscles and the gaps between them remain when
it is gone.

A loop is the same, with time running slowly: probe, tissue and nerve follow the same curves in small steps. Its speckle is neither frozen nor
new in each frame: scatterers move with the tissue, and where the probe leaves the plane, those of one slice fade into those of the next. Two
frames between which nothing moved are equal.

All lengths are in pixels of a 420×580 frame, about 0.1 mm. `y` and `x` are places in the frame; `v` and `u` are the
places in the tissue (depth and across) that these show, which motion and pressure shift. Every number follows from
`(seed, subject, index)`, and of a loop its number, in float64, so that frames need no storage and agree to one grey level between machines.
"""

from functools import lru_cache

import numpy as np

from ..engine.parallel import one_thread_per_product
from .data import Remembering
from .samples import Sample

HEIGHT, WIDTH = 420, 580
STEP = 2.5                                       # distance of the grid points on which tissue and echoes are computed
EDGE = 4                                         # grid columns beside the frame, where left and right run together
MARGIN_Y, MARGIN_X = 70, 150                     # tissue around the frame, which motion may bring into view
Y = ((np.arange(HEIGHT / STEP) + 0.5) * STEP)[:, None]                          # (168, 1)
X = (np.arange(WIDTH / STEP + 2 * EDGE) + 0.5 - EDGE) * STEP                    # (240,)
V = np.arange(-MARGIN_Y, HEIGHT + MARGIN_Y, STEP)[:, None]                      # (224, 1)
U = np.arange(-MARGIN_X, WIDTH + MARGIN_X, STEP)                                # (352,)

AXIAL_SIGMA = 1.6                                # length of the pulse, as a standard deviation
GREY_OF_0_DB, GREY_PER_DB = 76, 6.7              # the display: 255 grey levels show about 40 dB
DECIBEL = np.log(10) / 20                        # amplitude = exp(DECIBEL · level): +20 dB is ten times the amplitude
PACE, APART = 1 / 10, 100                        # steps of the index from one frame of a loop to the next, and from one loop to the next
SLICES = 3                                       # thicknesses of the beam that the probe leaves the plane by where `sweep` changes by 1


# Smooth random things. A sum of Gaussian bumps with random heights, one bump per sigma, is smooth noise: its variance
# is 1 everywhere to 1e-4, and it costs two small matrix products.

def bumps(points, sigma):
    """Return (len(points), number of bumps): each bump's height at each point, scaled so that its squares sum to 1."""
    centres = np.arange(points.min() - 4 * sigma, points.max() + 4 * sigma, sigma)
    return line(points.reshape(-1, 1) - centres, sigma) / np.pi ** 0.25


def smooth_noise(rng, sigma_y, sigma_x, count=1):
    """Return (count, 224, 352): noise over the tissue with mean 0, variance 1 and grains of `sigma_y` × `sigma_x`."""
    down, across = bumps(V, sigma_y), bumps(U, sigma_x)
    return down @ rng.standard_normal((count, down.shape[1], across.shape[1])) @ across.T


def smooth_curve(rng, sigma, points):
    """Return smooth noise of mean 0 and variance 1 along `points`."""
    across = bumps(points, sigma)
    return across @ rng.standard_normal(across.shape[1])


def wander(rng, scale, shortest=10, longest=70):
    """Return a smooth random function of the frame's index, with mean 0 and standard deviation `scale`.

    It is three sines with periods between `shortest` and `longest` frames.
    """
    periods, phases = rng.uniform(shortest, longest, 3), rng.uniform(0, 2 * np.pi, 3)
    return lambda index: scale * np.sin(np.multiply.outer(index, 2 * np.pi / periods) + phases).sum(-1) / np.sqrt(1.5)


# Shapes, from the signed distance to their surface (negative inside).

def line(distance, sigma):
    """Return the profile of a thin layer: 1 on the surface, falling off as a Gaussian."""
    return np.exp(-0.5 * (distance / sigma) ** 2)


def inside(distance, softness):
    """Return 1 inside, 0 outside, and a ramp `softness` pixels wide between them."""
    return np.clip(0.5 - distance / softness, 0, 1)


def ellipse(v, u, centre_v, centre_u, radius_v, radius_u, tilt):
    """Return `(distance, facing)`: the signed distance to an ellipse, to first order, and how much it faces the probe.

    `facing` is the squared vertical part of the unit normal: 1 at top and bottom, 0 at the sides.
    """
    dv, du, cos, sin = v - centre_v, u - centre_u, np.cos(tilt), np.sin(tilt)
    p, q = (cos * du + sin * dv) / radius_u, (cos * dv - sin * du) / radius_v   # the ellipse is p² + q² = 1
    r = np.sqrt(p * p + q * q) + 1e-6
    slope_p, slope_q = p / radius_u, q / radius_v                               # r · gradient of r, along the two axes
    slope = np.sqrt(slope_p ** 2 + slope_q ** 2) + 1e-9
    return (r - 1) * r / slope, ((sin * slope_p + cos * slope_q) / slope) ** 2


def sample(texture, v, u):
    """Return `texture` (224, 352) at the places v (H, W), u (W,): linear in depth, nearest across."""
    row = np.clip((v + MARGIN_Y) / STEP, 0, len(V) - 1.001)
    above = row.astype(int)
    column = np.clip((u + MARGIN_X) / STEP + 0.5, 0, len(U) - 1).astype(int)
    corner = above * len(U) + column
    upper = texture.take(corner)
    return upper + (row - above) * (texture.take(corner + len(U)) - upper)


def between(texture, v, u):
    """Return `texture` (224, 352) at the places v (H, W), u (W,): linear in depth and across, so that it moves smoothly where they do."""
    corner, down, right = _cell(v, u)
    upper, lower = (texture.take(left) + right * (texture.take(left + 1) - texture.take(left)) for left in (corner, corner + len(U)))
    return upper + down * (lower - upper)


def _cell(v, u):
    """Return (corner, down, right): of places in the tissue the grid point to the upper left, as an index, and the way from it, in [0, 1]."""
    row, column = np.clip((v + MARGIN_Y) / STEP, 0, len(V) - 1.001), np.clip((u + MARGIN_X) / STEP, 0, len(U) - 1.001)
    above, left = row.astype(int), column.astype(int)
    return above * len(U) + left, row - above, column - left


class Subject:
    """The anatomy of one subject, its motion over the frames, and the settings of the scanner.

    The tissue is held as two sections, a few millimetres apart; a frame shows a mixture of both. They share muscles,
    vessels and bones and differ in the fine structure. Three properties of every point of the tissue are kept:

    backscatter   (2, 224, 352)   mean strength of the scatterers, dB
    specular      (2, 224, 352)   amplitude of mirror-like surfaces; 1 is as bright as scatterers of 0 dB
    attenuation   (224, 352)      what sound loses per pixel, dB, beyond the average that the scanner makes up for
    """

    def __init__(self, seed, subject):
        rng = np.random.default_rng([seed, subject])
        self.draw_nerve(rng)
        self.draw_motion(rng)
        self.draw_tissue(rng)
        self.draw_scanner(rng)

    def draw_nerve(self, rng):
        """Draw the nerve's place, size, fascicles and contrast, and the share of frames that hold it."""
        self.nerve_v, self.nerve_u = min(95 + rng.gamma(1.5, 36), 290), rng.normal(333, 16)
        self.log_area, self.log_aspect = rng.normal(8.81, 0.12), rng.normal(0.63, 0.12)
        self.tilt = np.radians(rng.normal(-61, 14))      # of the long axis; negative: its right end is higher
        if rng.random() < 0.7:                           # a row of large fascicles, as between the scalene muscles
            count = rng.integers(2, 5)
            along, across = np.linspace(-1, 1, count) * (1 - 1 / count), np.zeros(count)
            length, width = 1 / count, 0.8
        else:                                            # a bunch of small ones, as above the collar bone
            count = rng.integers(4, 7)
            along, across = np.linspace(-0.64, 0.64, count), np.where(np.arange(count) % 2, 0.4, -0.4)
            length, width = 0.3, 0.45
        scale, clarity = rng.uniform(0.75, 1, count), rng.uniform(0.65, 1, count)
        self.fascicles = np.stack([along, across, scale * length, scale * width, clarity], axis=1)      # in half axes
        self.fascicles[:, :4] += rng.normal(0, 0.04, (count, 4))
        self.sheath, self.core, self.rim = rng.uniform(2, 8), rng.uniform(-15, -8), rng.uniform(6, 15)
        self.contrast = rng.uniform(0.8, 1)
        share = 0.017 + 0.873 * rng.beta(1.8, 2.2)
        self.presence = wander(rng, 1, 7, 40)
        self.threshold = np.quantile(self.presence(np.arange(2000)), 1 - share)

    def draw_motion(self, rng):
        """Draw how the probe slides, presses and tilts, and how the nerve moves and changes within the tissue."""
        self.slide, self.press, self.bulge = wander(rng, 34), wander(rng, 14), wander(rng, 8)
        self.roll, self.sweep, self.coupling = wander(rng, 1), wander(rng, 0.9), wander(rng, 0.7)
        self.nerve_changes = [wander(rng, scale) for scale in (10, 8, 0.19, 0.16, 0.24)]

    def draw_scanner(self, rng):
        """Draw what a sonographer sets, gain, contrast and focus, and how well the probe touches the skin."""
        self.gain, self.dynamics, self.beam_width = rng.normal(0, 1), rng.uniform(0.9, 1.1), rng.uniform(0.85, 1.2)
        self.contact = 1.3 * smooth_curve(rng, 70, X)
        self.scatterers = rng.standard_normal((len(V), len(U), 2)).view(complex)[..., 0]    # they move with the tissue

    def draw_tissue(self, rng):
        """Draw the two sections, from the fine structure that is everywhere to the organs that push it aside."""
        half_height = np.exp(0.5 * (self.log_area + self.log_aspect)) / np.sqrt(np.pi) * abs(np.sin(self.tilt))
        skin = rng.uniform(14, 26)
        self.roof = max(self.nerve_v - half_height - rng.uniform(0, 14), skin + 16)      # the fascia over the nerve
        self.wobble = np.stack([9 * smooth_noise(rng, 18, 26)[0] + 2 * smooth_noise(rng, 8, 12)[0],
                                14 * smooth_noise(rng, 20, 26)[0] + 3 * smooth_noise(rng, 8, 12)[0]])
        # Shapes are drawn at shifted places, since nothing in a body is an ellipse.
        v, u = V + self.wobble[0] * np.clip((V - 20) / 60, 0, 1), U + self.wobble[1]

        # Fine structure: noise stretched along the fibres, of which only the crests reflect.
        def fibres(sigma_y, sigma_x):
            bend = V + 12 * smooth_noise(rng, 25, 38)[0] + 14 * smooth_noise(rng, 60, 80)[0]
            return np.stack([sample(noise, bend, U) for noise in smooth_noise(rng, sigma_y, sigma_x, 2)])

        short, long, fine = fibres(1.7, rng.uniform(9, 20)), fibres(2.6, rng.uniform(22, 45)), fibres(2, 24)
        sheets, patches = smooth_noise(rng, 2, 110, 2), smooth_noise(rng, 22, 38, 2)
        broken = np.clip(0.65 + 0.75 * smooth_noise(rng, 7, 20, 2), 0.03, None)          # no surface reflects evenly
        self.broken = broken[0]
        density = rng.uniform(0.6, 1.3) * np.clip(0.8 + 0.6 * smooth_noise(rng, 50, 70), 0.05, None)
        in_skin, in_fat = inside(V - skin, 8), inside(v - self.roof, 40)
        self.backscatter = 3.5 * patches + 2.5 * fine + 2 * in_fat + in_skin * (6 + 3 * sheets)
        self.specular = (14 * density * (1 - 0.7 * in_fat) * (0.3 + 0.7 * broken)
                         * (np.maximum(short - 0.6, 0) ** 1.6 + 1.2 * np.maximum(long - 0.9, 0) ** 1.6)
                         + 5 * in_fat * np.maximum(sheets - 0.4, 0) ** 1.5
                         + 3.5 * in_skin * np.maximum(sheets + 0.3, 0))
        self.attenuation = np.zeros((len(V), len(U)))

        # Muscles: a flat one in the fat, two on either side of the nerve, some deep ones.
        muscles = [(0.72 * self.roof, 290 + rng.choice([-1, 1]) * rng.uniform(60, 220),
                    0.2 * self.roof, rng.uniform(130, 260), 0.05, -9, 10)]
        for side in (-1, 1):
            radius_v, radius_u = rng.uniform(38, 75), rng.uniform(75, 140)
            muscles.append((self.roof + radius_v + rng.uniform(0, 25),
                            self.nerve_u + side * (radius_u + rng.uniform(15, 60)),
                            radius_v, radius_u, 0.15, rng.uniform(-9, -2), rng.uniform(2, 8)))
        for _ in range(rng.integers(1, 4)):
            muscles.append((rng.uniform(250, 360), rng.uniform(40, 540), rng.uniform(25, 50), rng.uniform(60, 130),
                            0.25, rng.uniform(-8, -2), rng.uniform(2, 8)))
        for centre_v, centre_u, radius_v, radius_u, tilt, level, border in muscles:
            distance, facing = ellipse(v, u, centre_v, centre_u, radius_v, radius_u, rng.normal(0, tilt))
            muscle = inside(distance, 10)
            self.backscatter += muscle * (level + 1.5 * fine)        # dark, with the fine striation of its fibres
            self.specular *= 1 - 0.75 * muscle
            self.specular += border * line(distance, 3) * facing ** 2 * broken

        # Fasciae: bright sheets across the whole frame, the deepest the strongest.
        for depth, relief, weakest, strongest in ((0.45, 3, 4, 16), (0.8, 6, 4, 20), (1, 9, 10, 32)):
            distance = 0.5 * (v + V) - max(depth * self.roof, skin + 16 * depth) - relief * smooth_curve(rng, 120, U)
            strength = rng.uniform(weakest, strongest) * np.clip(0.8 + 0.4 * smooth_curve(rng, 60, U), 0.1, None)
            self.specular += strength * line(distance, rng.uniform(1.5, 3.8)) * (0.5 + 0.5 * broken)

        # Bone: a strong surface that lets nothing through.
        for _ in range(rng.integers(1, 4)):
            p = (u - rng.uniform(0, 580)) / rng.uniform(70, 160)
            distance = v - (rng.uniform(330, 420) + rng.uniform(-40, 40) * p + rng.uniform(5, 18) * p * p)
            bone = np.clip(1 - p * p, 0, 1)
            self.specular += rng.uniform(8, 27) * bone * line(distance, 3.5) * (0.5 + 0.5 * broken)
            self.attenuation += 0.15 * bone * (abs(distance) < 15)

        # Vessels: blood sends back and takes away next to nothing; a calcified wall takes away nearly all.
        v, u = V + 0.5 * self.wobble[0], U + 0.5 * self.wobble[1]
        for _ in range(rng.integers(0, 3)):
            radius = rng.uniform(12, 30)
            centre_v = self.nerve_v + rng.uniform(50, 180)
            distance, facing = ellipse(v, u, centre_v, self.nerve_u + rng.normal(0, 110), radius,
                                       radius * rng.uniform(1, 1.6), rng.normal(0, 0.4))
            blood, wall = inside(distance, 6), line(distance - 3, 3) * (0.15 + 0.85 * facing)
            self.backscatter += blood * (rng.uniform(-20, -10) - self.backscatter)
            self.specular *= 1 - blood
            self.specular += rng.uniform(5, 14) * wall * broken
            self.attenuation -= 0.08 * blood
            if rng.random() < 0.2:
                self.attenuation += 0.4 * wall * (v < centre_v - 0.5 * radius)


@lru_cache(maxsize=4)
def subject_of(seed, number):
    """Return the Subject; the last few are kept, since the frames of one are mostly made one after the other."""
    return Subject(seed, number)


def add_nerve(subject, index, v, u, backscatter, specular, at=sample):
    """Draw the nerve of frame `index` into `backscatter` and `specular` (168, 240), and return its level (168, 240). `at` reads textures.

    The level is 1 in the middle of the nerve, 0 on its outline and negative outside, −1 everywhere if there is none.
    Where the section comes near the nerve without showing it clearly, a trace of it is drawn, as in real frames.
    """
    level = np.full(v.shape, -1.0)
    visible = subject.presence(index) - subject.threshold
    if at is sample:
        contrast = subject.contrast * np.clip(0.75 + visible / 1.5 if visible > 0 else 0.25 + visible, 0, 1)
    else:                                                            # the same, without the step
        contrast = subject.contrast * np.interp(visible, (-0.25, -0.1, 0.1, 0.375), (0, 0.15, 0.75 + 0.1 / 1.5, 1))
    if contrast == 0:
        return level
    dv, du, log_area, log_aspect, tilt = (change(index) for change in subject.nerve_changes)
    area = np.clip(np.exp(subject.log_area + log_area), 2800, 17000)
    aspect = np.clip(np.exp(subject.log_aspect + log_aspect), 1.1, 3.3)
    minor = np.sqrt(area / (np.pi * aspect))                         # half axes: area = π · minor · major
    major = minor * aspect
    cos, sin = np.cos(subject.tilt + tilt), np.sin(subject.tilt + tilt)
    centre_v = max(subject.nerve_v + dv, subject.roof + major * abs(sin) - 4)       # it does not pass through its roof
    centre_u = subject.nerve_u + du

    # Everything happens within a box; p and q run along the two axes of the nerve, in units of the half axes.
    rows = np.flatnonzero((v.max(axis=1) > centre_v - 1.6 * major) & (v.min(axis=1) < centre_v + 1.6 * major))
    box = slice(rows[0], rows[-1] + 1), slice(*np.searchsorted(u, [centre_u - 1.6 * major, centre_u + 1.6 * major]))
    v, u = v[box], u[box[1]]
    dv = v - centre_v + 0.4 * at(subject.wobble[0], v, u)
    du = u - centre_u + 0.4 * at(subject.wobble[1], v, u)
    p, q = (cos * du + sin * dv) / major, (cos * dv - sin * du) / minor
    r = np.sqrt(p * p + q * q)
    if visible > 0:
        level[box] = np.clip(1 - r, -1, 1)

    # Connective tissue around dark fascicles; what reflects are the fascicles' rims and the outer sheath.
    nearest, facing, clarity = np.full(r.shape, 9.0), np.zeros(r.shape), np.zeros(r.shape)      # of the nearest one
    for centre_p, centre_q, length, width, clear in subject.fascicles:
        along, across = (p - centre_p) / length, (q - centre_q) / width
        distance = np.sqrt(along * along + across * across) + 1e-6
        closer = distance < nearest
        nearest = np.where(closer, distance, nearest)
        facing = np.where(closer, ((sin * along + cos * across) / distance) ** 2, facing)
        clarity = np.where(closer, clear, clarity)
    outward = (sin * p + cos * q) ** 2 / (r * r + 1e-6)
    sheath, core = contrast * inside(r - 1, 0.2), contrast * clarity * inside(nearest - 0.8, 0.25)
    backscatter[box] += sheath * (subject.sheath - backscatter[box])
    backscatter[box] += core * (subject.core - backscatter[box])
    specular[box] *= (1 - 0.6 * sheath) * (1 - core)
    specular[box] += contrast * subject.rim * (0.3 + 0.7 * at(subject.broken, v, u)) * (
        clarity * line(nearest - 1, 0.14) * (0.2 + 0.8 * facing) * (r < 1.1)
        + 0.75 * line(r - 1, 0.07) * (0.2 + 0.8 * outward))
    return level


@lru_cache(maxsize=8)
def blur(axis, sigma):
    """Return the matrix that blurs along 'depth' (from the left) or 'across' (from the right) with a Gaussian."""
    points = Y[:, 0] if axis == 'depth' else X
    weights = line(points[:, None] - points, sigma)
    weights /= weights.sum(axis=1, keepdims=True)
    return weights if axis == 'depth' else weights.T


@lru_cache(maxsize=8)
def beam(width):
    """Return `(transfer, gain)`: the beam's effect on lateral frequencies (168, 240), the gain it asks for (168, 1).

    Across, the pulse is a Gaussian whose sigma grows with the distance from the focus, so each row has a blur of its
    own: a product after a Fourier transform along the row. It averages random scatterers away: their amplitude falls to
    STEP / √(4π · axial sigma · lateral sigma). `gain` makes up for that, so that 0 dB looks alike at every depth.
    """
    sigma = width * (3.4 + 2 * abs(Y - 150) / 270)
    transfer = np.exp(-2 * (np.pi * sigma * np.fft.fftfreq(len(X), STEP)) ** 2)
    return transfer, np.sqrt(4 * np.pi * AXIAL_SIGMA * sigma) / STEP


def speckle(subject, rng, v, u):
    """Return two looks (2, 168, 240) at random scatterers: at those that stay with the tissue, and at those that this frame alone brings into view."""
    row = np.clip((v + MARGIN_Y) / STEP + 0.5, 0, len(V) - 1).astype(int)
    column = np.clip((u + MARGIN_X) / STEP + 0.5, 0, len(U) - 1).astype(int)
    return np.stack([subject.scatterers.take(row * len(U) + column),
                     rng.standard_normal((*v.shape, 2)).view(complex)[..., 0]])          # (2, 168, 240)


@lru_cache(maxsize=4)
def slice_of(seed, subject, number):
    """Return the scatterers (224, 352) of a slice of the tissue of a subject, as thick as the beam."""
    return np.random.default_rng([seed, subject, 2**20, number]).standard_normal((len(V), len(U), 2)).view(complex)[..., 0]


def moving_speckle(subject, slices, place, v, u):
    """Return two looks (2, 168, 240) at random scatterers: at those that are in all slices, and at those of the two slices at `place`.

    `slices(k)` are the scatterers of slice k. From k to k + 1 one fades into the other, by cosine and sine, and between grid points likewise:
    independent numbers of variance 1 whose squared weights sum to 1 have variance 1, so speckle is as strong wherever it is looked at.
    """
    corner, down, right = _cell(v, u)
    strength = np.sqrt(((1 - down) ** 2 + down ** 2) * ((1 - right) ** 2 + right ** 2))
    first = int(np.floor(place))
    angle = np.pi / 2 * (place - first)
    faded = np.cos(angle) * slices(first) + np.sin(angle) * slices(first + 1)
    return np.stack([between(scatterers, v, u) / strength for scatterers in (subject.scatterers, faded)])


def scan(subject, index, looks, backscatter, specular, attenuation):
    """Return the B-mode image (168, 240), grey levels 0 to 255, of tissue given at every grid point; `looks` are what `speckle` returns."""
    # 1. What is there: scatterers with random phases, and surfaces whose echoes add in phase.
    transfer, gain = beam(subject.beam_width)
    looks = looks * (gain * np.sqrt(0.5) * np.exp(DECIBEL * backscatter)) + specular
    # 2. What comes back: sound passes all tissue above twice, down and up.
    looks *= np.exp(-2 * DECIBEL * STEP * np.cumsum(attenuation, axis=0))
    # 3. The pulse smears it, across (wider away from the focus) and in depth.
    looks = np.fft.ifft(np.fft.fft(looks) * transfer)
    looks = blur('depth', AXIAL_SIGMA) @ looks.view(float)                           # (2, 168, 480): real, imaginary, …
    # 4. Only the strength is kept; the looks are averaged (compounding), which halves the variance of speckle.
    looks *= looks
    looks = 0.5 * (looks[0] + looks[1])
    intensity = blur('depth', 1.2) @ (looks[:, ::2] + looks[:, 1::2]) @ blur('across', 2.4)
    # 5. Amplifier noise, the logarithm, the gain that the sonographer set over depth and width.
    level = 10 * np.log10(intensity + 10 ** ((-8 + 2 * Y / HEIGHT) / 10))
    level += subject.gain + subject.coupling(index) + subject.contact - 6 * Y / HEIGHT
    # 6. The display: edges enhanced, a grey scale with a soft toe.
    grey = GREY_OF_0_DB + GREY_PER_DB * subject.dynamics * level
    grey += 0.5 * (grey - blur('depth', 6) @ grey)
    return np.clip(0.5 * (grey + np.sqrt(grey * grey + 900)), 0, 255)


def add_overlay(grey):
    """Return `grey` with what the screen draws over it: dark left and upper borders, a mark at the probe's middle."""
    arrow = abs(abs(X - 303) - (10 - Y / 2))                         # pixels from the two strokes of a V
    ink = np.where((Y < 20) & (abs(X - 303) < 12), np.clip(1 - arrow / 3, 0, 0.7), 0)
    ink = np.maximum(ink, 0.6 * (abs(X) < STEP) + 0.3 * (Y < STEP))
    return grey * (1 - ink)


@lru_cache(maxsize=16)
def resize_matrix(target, source):
    """Return (target, source): weights of linear interpolation, widened when shrinking so that every sample counts."""
    scale = source / target
    centre = np.clip((np.arange(target)[:, None] + 0.5) * scale - 0.5, 0, source - 1)
    weights = np.clip(1 - abs(centre - np.arange(source)) / max(scale, 1), 0, None)
    return weights / weights.sum(axis=1, keepdims=True)


def seen(subject, index):
    """Return `(v, u)`: the places in the tissue that frame `index` shows, v (168, 240) in depth, u (240,) across.

    The probe slides and rolls over the skin, and presses it; the skin itself stays at the probe.
    """
    roll = subject.roll(index)
    u = X + subject.slide(index) + 10 * np.sin(X / 90 + roll)
    pressed = subject.press(index) + subject.bulge(index) * np.sin(X / 120 + 2 * roll)
    return Y + np.clip(Y / 150, 0, 1) * pressed, u


def check_numbers(subject, index, seed, size):
    """Raise ValueError unless these name a frame."""
    for name, value, least in (('subject', subject, 1), ('index', index, 1), ('seed', seed, 0),
                               ('height', size[0], 1), ('width', size[1], 1)):
        if not isinstance(value, (int, np.integer)) or value < least:
            raise ValueError(f'{name} is {value!r}; expected a whole number of {least} or more')


@one_thread_per_product()
def make_frame(subject, index, seed=0, size=(96, 128), loop=None):
    """Return frame `index` of subject number `subject`: `(image, mask)`, (H, W) uint8 in 0 … 255 and (H, W) bool.

    Both count from 1, as file names do (a seed sequence ignores trailing zeros, so index 0 would share its stream with
    the subject). The frame follows from `(seed, subject, index)` alone and is the same picture at every `size`. With `loop`, a number from 1,
    it is frame `index` of that loop, which follows smoothly on the one before. Raises ValueError if a number is not a whole one in its range.
    """
    check_numbers(subject, index, seed, size)
    if loop is not None:
        check_numbers(subject, loop, seed, size)
    anatomy = subject_of(int(seed), int(subject))
    time, at = (index, sample) if loop is None else (APART * loop + PACE * index, between)
    v, u = seen(anatomy, time)
    share = 0.5 + 0.5 * np.sin(anatomy.sweep(time))                  # how near to the first section the probe is
    backscatter, specular = (at(share * first + (1 - share) * second, v, u)
                             for first, second in (anatomy.backscatter, anatomy.specular))
    level = add_nerve(anatomy, time, v, u, backscatter, specular, at)
    if loop is None:
        looks = speckle(anatomy, np.random.default_rng([seed, subject, index]), v, u)
    else:
        looks = moving_speckle(anatomy, lambda k: slice_of(int(seed), int(subject), k + 2**10), SLICES * anatomy.sweep(time), v, u)
    grey = scan(anatomy, time, looks, backscatter, specular, at(anatomy.attenuation, v, u))
    down, across = resize_matrix(size[0], len(Y)), resize_matrix(size[1], len(X) - 2 * EDGE).T
    image, level = (down @ grid[:, EDGE:len(X) - EDGE] @ across for grid in (add_overlay(grey), level))
    return np.rint(image).astype(np.uint8), level > 0


class Phantom(Remembering):
    """`frames` frames of each of `subjects` subjects, made when they are asked for: a Reader for a Loader.

    loops         number of loops of each subject, of `frames` frames each; None: single frames
    size          (H, W) of the frames
    first         number of the first subject: two sets of one seed whose numbers do not overlap share no subject
    cache_bytes   memory for frames already made; what does not fit is made anew each time

    `samples` lists what there is, `read` makes it. Reading the frames of a subject one after the other is fastest: an
    anatomy takes ten times as long as a frame, and only the last few are kept.
    """

    def __init__(self, subjects=60, frames=15, seed=0, size=(96, 128), first=1, cache_bytes=2**30, loops=None):
        for name, count in ('subjects', subjects), ('frames', frames), *([('loops', loops)] if loops is not None else []):
            if not isinstance(count, (int, np.integer)) or count < 1:
                raise ValueError(f'{name} is {count!r}; expected a whole number of 1 or more')
        if loops is not None and frames > APART / PACE:
            raise ValueError(f'frames is {frames}; expected at most {APART / PACE:.0f} in a loop, beyond which it would run into the next one')
        check_numbers(first, 1, seed, size)
        super().__init__(cache_bytes)
        self.seed, self.size = seed, tuple(size)
        numbers = range(first, first + subjects)
        if loops is None:
            self.samples = [Sample(f'{subject}_{index}', str(subject), None, None) for subject in numbers for index in range(1, frames + 1)]
        else:
            self.samples = [Sample(f'{subject}_{loop}#{index}', str(subject), None, None, index, frames)
                            for subject in numbers for loop in range(1, loops + 1) for index in range(1, frames + 1)]

    def make(self, sample):
        subject, index = map(int, sample.file_name.split('_'))
        of_loop = (sample.frame, self.seed, self.size, index) if sample.frame else (index, self.seed, self.size)
        image, mask = make_frame(subject, *of_loop)
        return image.astype(np.uint16) * 257, mask.astype(np.uint8)
