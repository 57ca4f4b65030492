"""Two systems from before deep networks, from an image to its mask: what is thought of in each step is written down, and little is learnt.

    image ─► region ─► parts ─► features ─► probability ─► mask
             graph     points    wavelets    Gaussian       graph cut
             cut       or SLIC               process

1. *Where to look.* Each pixel, of the image at half its size without speckle, has odds of being object: by its grey level I_p and by where
   it lies. A graph cut finds the region: it has few holes, its outline follows edges, and it is generous, since what it misses is lost.

       D_p(0) − D_p(1) = log h₁(I_p)/h₀(I_p) + log π_p/(1 − π_p) + lenience        w_pq = smoothness · contrast weight

   h₁ and h₀ are histograms of training pixels inside and outside the masks, π the blurred mean of those masks that are not empty.
2. *What to look at.* 'graph-cut': a point in each square of 4×4 pixels, described by the 17×17 pixels around it. 'superpixels': SLIC.
3. *What it looks like.* Strength and spread of wavelet coefficients, grey, and place (which `position=False` leaves out).
4. *How likely it is.* A Gaussian process that has learnt from a few hundred parts, half of them object; the odds are corrected for that.
5. *The mask.* A second cut, whose D_p(0) − D_p(1) are the log-odds of p against a threshold: of the pixels at half size, or of the
   superpixels, weighted by area and length of border. Holes are filled, the largest piece stays, and none if it is small or nowhere likely.

Sources: Gil González, Álvarez & Orozco 2015 (EMBC; 'graph-cut') and 2016 (EMBC; 'superpixels'). Of these only titles, part of an abstract
and what others say of them could be read. They leave unsaid, or we could not read: energies and seeds of the cut, which non-linear wavelet
and features, number of superpixels, kernel, inference, training sizes, what follows the classifier. All of that is our choice here, and so
is the rule that lenience, smoothness and growth (step 1), and the settings of step 5 are chosen on a quarter of the training subjects, of
which nothing else was learnt: the smallest region that holds 95 % of the object's pixels; the best mean of pooled and per-image Dice.
"""

import itertools
import math
from collections import namedtuple

import numpy

from ..checks import check_match, positive
from ..engine.parallel import one_thread_per_product, parallel_for
from ..images.augment import median_filter
from ..images.components import dilate, largest_component, regions
from ..images.data import FITS, fitted, resize, unfitted
from ..images.reading import as_intensities, fill_outlines
from .gaussian_process import GaussianProcess, LogisticRegression, odds_shift
from .graph_cut import contrast_weights, grid, minimise
from .superpixels import adjacency, means, slic
from .wavelets import TRANSFORMS, box_features, region_features

KINDS, CLASSIFIERS = ('graph-cut', 'superpixels'), {'gp': GaussianProcess, 'logistic': LogisticRegression}
LEVELS, GRID, SPECK = 32, 4, 0.002                                     # grey levels told apart; pixels per point; share of the image
REGIONS = [*itertools.product((1.0, 4.0), (0, 3, 6), numpy.arange(-2.0, 8.1).tolist())]           # smoothness, growth, lenience
MASKS = [*itertools.product((0.3, 2.0), (0.1, 0.2, 0.3, 0.4, 0.5, 0.6))]                          # smoothness, threshold
EMPTY = [*itertools.product((0.0, 0.005, 0.01), (0.0, 0.3, 0.5, 0.7))]                            # minimal area, least of the highest p
CHOSEN, CHOOSE = ('region', 'shift', 'mask'), 80                       # what is chosen; on so many images, at most

# What of an image (H, W) is classified: `labels` (H, W), the part that a pixel is in, −1 outside the region; `features` (parts, D).
Parts = namedtuple('Parts', 'labels features')


class Chain:
    """One of the two systems, for images of any size, which are fitted to `size` (H, W), both even, as `fit` says (`images.data.places`).

    `step` is the width of a superpixel in pixels, `examples` how many parts are learnt from. `config`, `state_dict` and `load_state_dict`
    are as a network has them, so that `nervenet.save` and `nervenet.load` take a chain too.
    """

    dtype = numpy.dtype(numpy.float64)

    def __init__(self, kind='superpixels', size=(192, 256), fit='squeeze', wavelet='median', position=True, classifier='gp', step=5,
                 examples=800):
        self.size, self.config = tuple(size), dict(kind=kind, size=[*size], fit=fit, wavelet=wavelet, position=position,
                                                   classifier=classifier, step=step, examples=examples)
        for name, known in ('kind', KINDS), ('wavelet', TRANSFORMS), ('classifier', CLASSIFIERS), ('fit', FITS):
            if self.config[name] not in known:
                raise ValueError(f'{name} is {self.config[name]!r}; expected one of {", ".join(known)}')
        if len(self.size) != 2 or any(positive(side, 'size', 16) % 2 for side in self.size):
            raise ValueError(f'size is {self.size}; expected two even numbers')
        for name in 'step', 'examples':
            positive(self.config[name], name, 2)
        self.classifier, self.chosen = CLASSIFIERS[classifier](), {}

    # --- The steps, on images (H, W) of `size`, float32 in [0, 1]

    def region(self, image):
        """Return where to look, (H, W) bool. Raises ValueError, as all that follows, before the chain has learnt it."""
        if 'region' not in self.chosen:
            raise ValueError('the chain has learnt nothing yet: fit it, or load what another has learnt')
        return self._regions(image, [self.chosen['region']])[0]

    def _regions(self, image, choices):
        small, cuts, found = seen_small(image), {}, []
        odds = self.levels[grey_level(small)] + self.place
        for smoothness, growth, lenience in choices:
            if (smoothness, lenience) not in cuts:
                mask = cut_pixels(odds + lenience, small, smoothness)
                piece = regions(mask)
                cuts[smoothness, lenience] = fill_outlines(mask & (numpy.bincount(piece.ravel()) >= SPECK * mask.size)[piece])
            found.append(doubled(dilate(cuts[smoothness, lenience], growth)))
        return found

    def parts(self, image, region):
        """Return the Parts of the image in a region (H, W)."""
        coefficients = TRANSFORMS[self.config['wavelet']].decompose(image)
        if self.config['kind'] == 'superpixels':
            labels = slic(median_filter(image, 3), self.config['step'])
            features = numpy.column_stack([numpy.log(numpy.bincount(labels.ravel())), region_features(coefficients, image, labels)])
            inside = means(region, labels) >= 0.5
        else:
            rows, columns = (length // GRID for length in self.size)
            points = GRID * numpy.indices((rows, columns)).reshape(2, -1).T + GRID // 2
            y, x = (numpy.arange(number).repeat(GRID) for number in (rows, columns))
            labels = numpy.pad(y[:, None] * columns + x, [(0, length % GRID) for length in self.size], 'edge')
            features, inside = box_features(coefficients, image, points), region[tuple(points.T)]
        number = numpy.where(inside, numpy.cumsum(inside) - 1, -1)
        return Parts(number[labels], features[inside, :None if self.config['position'] else -2])

    def probability(self, parts, region):
        """Return (H, W), the probability that a pixel is object, 0 outside the region."""
        if not len(parts.features):
            return numpy.zeros(self.size)
        p = numpy.append(self.classifier.predict(parts.features, self.chosen['shift']).probability, 0)[parts.labels]
        if self.config['kind'] == 'graph-cut':                         # between the points, what lies between
            p = resize(p[GRID // 2::GRID, GRID // 2::GRID].astype(numpy.float32), self.size) * region
        return p

    def mask(self, image, parts, p):
        """Return the mask (H, W), bool."""
        smoothness, threshold, area, least = self.chosen['mask']
        return kept(self._outline(image, parts, p, smoothness, threshold), p, area, least)

    def _outline(self, image, parts, p, smoothness, threshold):
        clipped = p.clip(1e-3, 1 - 1e-3)
        odds = numpy.log(clipped / (1 - clipped)) - math.log(threshold / (1 - threshold))
        if self.config['kind'] == 'graph-cut':
            return doubled(cut_pixels(halved(odds), seen_small(image), smoothness))
        labels = parts.labels + 1                                      # 0 is all that lies outside the region, and may be empty
        edges, lengths = adjacency(labels)
        weights = contrast_weights(means(image, labels), edges, smoothness * lengths / self.config['step'])
        area, is_outer = numpy.bincount(labels.ravel()) / self.config['step']**2, edges[:, 0] == 0
        # The outside is background, whatever it would cost: a border with it is a cost of being object.
        odds = numpy.nan_to_num(means(odds, labels)) * area - numpy.bincount(edges[is_outer, 1], weights[is_outer], len(area))
        return cut(odds, edges[~is_outer], weights[~is_outer])[labels]

    # --- Together

    def classified(self, image):
        """Return (parts, probability)."""
        region = self.region(image)
        parts = self.parts(image, region)
        return parts, self.probability(parts, region)

    def map(self, image):
        """Return (H, W) float32 for an image of `size`: the probability, moved where the mask says otherwise: it is above ½ there alone."""
        parts, p = self.classified(image)
        return numpy.where(self.mask(image, parts, p), p.clip(0.51, None), p.clip(None, 0.49)).astype(numpy.float32)

    def predict(self, image):
        """Return (probability, mask) of an image (H, W) of any size, at that size; for its values see `images.reading.as_intensities`."""
        p = unfitted(self.map(fitted(as_intensities(image), self.size, self.config['fit'])), image.shape, self.config['fit'])
        return p, p > 0.5

    def fit(self, images, masks, subjects, seed=0, tell=lambda line: None):
        """Learn from images (N, H, W) of `size`, masks (N, H, W), bool, and subjects (N,); tell lines of text. Raises ValueError."""
        return self.fit_region(images, masks, subjects, seed, tell).fit_classifier(images, masks, subjects, seed, tell)

    def fit_region(self, images, masks, subjects, seed=0, tell=lambda line: None):
        """Learn what `region` needs, the first half of `fit`."""
        learn, choose = inner_split(masks, subjects, seed)
        self.levels, self.place = log_odds(images[learn], masks[learn])
        counts = numpy.array(parallel_for(choose, lambda n: [(found.sum(), (found & masks[n]).sum())
                                                             for found in self._regions(images[n], REGIONS)]))      # (N, choices, 2)
        area, recall = counts[..., 0].mean(axis=0), counts[..., 1].sum(axis=0) / masks[choose].sum()
        best = numpy.where(recall >= 0.95, area, math.inf).argmin() if (recall >= 0.95).any() else recall.argmax()
        self.chosen['region'] = REGIONS[best]
        tell('region:      smoothness {:g}, growth {}, lenience {:g}'.format(*REGIONS[best]) + f', chosen on {len(choose)} of '
             f'{len(subjects)} images: recall {recall[best]:.1%}, area {area[best] / masks[0].size:.1%}')
        return self

    def fit_classifier(self, images, masks, subjects, seed=0, tell=lambda line: None):
        """Learn all else, the second half of `fit`."""
        (learn, choose), rng = inner_split(masks, subjects, seed), numpy.random.default_rng(seed)

        def described(n):
            parts = self.parts(images[n], self.region(images[n]))
            share = means(masks[n], parts.labels + 1)[1:] if len(parts.features) else numpy.zeros(0)
            return parts.features, share >= 0.5, [subjects[n]] * len(share)
        x, target, who = map(numpy.concatenate, zip(*parallel_for(learn, described)))
        if target.all() or not target.any():
            raise ValueError(f'of {len(target)} parts in the regions, {target.sum()} are foreground; expected some of each kind: take smaller '
                             'superpixels, or more images')
        sample = evenly(target, who, self.config['examples'], rng)
        self.classifier.fit(x[sample], target[sample])
        self.chosen['shift'] = odds_shift(target.mean(), target[sample].mean())
        tell(f'classifier:  {len(sample)} of {len(target)} parts, each of {x.shape[1]} features; {target.mean():.1%} are foreground')

        def scored(n):
            parts, p = self.classified(images[n])
            outlines = [self._outline(images[n], parts, p, *choice) for choice in MASKS]
            found = [kept(outline, p, *empty) for outline in outlines for empty in EMPTY]
            return [((mask & masks[n]).sum(), mask.sum() + masks[n].sum()) for mask in found]
        overlap, total = numpy.moveaxis(numpy.array(parallel_for(choose, scored), float), -1, 0)                    # (N, choices)
        dice = overlap.sum(0) / total.sum(0) + numpy.where(total == 0, 1, 2 * overlap / total.clip(1)).mean(0) / 2
        self.chosen['mask'] = [*itertools.chain(*[*itertools.product(MASKS, EMPTY)][dice.argmax()])]
        tell('mask:        smoothness {:g}, threshold {:g}, minimal area {:g}, least highest probability {:g}'.format(*self.chosen['mask'])
             + f', chosen there: Dice {dice.max():.3f}, the mean of pooled and per image')
        return self

    # --- What was learnt

    def state_dict(self):
        """Return all that was learnt, {name: float64 array}."""
        of_classifier = {name: getattr(self.classifier, name) for name in self.classifier.learnt}
        state = {'levels': self.levels, 'place': self.place, **self.chosen, **of_classifier}
        return {name: numpy.asarray(value, numpy.float64) for name, value in state.items()}

    def load_state_dict(self, state):
        """Take what was learnt by another chain of this config. Raises ValueError for what does not fit, or cannot have been learnt."""
        D = 22 + 2 * bool(self.config['position']) + (self.config['kind'] == 'superpixels')
        n, (H, W) = len(state.get('target', ())), self.size
        shapes = {'levels': (LEVELS,), 'place': (H // 2, W // 2), 'region': (3,), 'mask': (4,), 'shift': (), 'variance': (), 'x': (n, D),
                  'target': (n,), 'weights': (D + 1,), 'centre': (D,), 'scale': (D,), 'length_scales': (D,)}
        expected = {name: numpy.broadcast_to(0, shapes[name]) for name in ('levels', 'place', *CHOSEN, *self.classifier.learnt)}
        check_match(expected, state, 'what was learnt', 'the chain')
        self.chosen = {name: state[name].tolist() for name in CHOSEN}
        (smoothness, growth, _), (outline, threshold, *_) = self.chosen['region'], self.chosen['mask']
        if not (all(numpy.isfinite(array).all() for array in state.values()) and (state['scale'] > 0).all()
                and smoothness >= 0 <= outline and growth in range(100) and 0 < threshold < 1):
            raise ValueError(f'what was learnt cannot be: {self.chosen}, scale from {state["scale"].min()}, or numbers that are not finite')
        self.levels, self.place, self.classifier.features = state['levels'], state['place'], D
        for name in self.classifier.learnt:
            setattr(self.classifier, name, state[name])
        if self.config['classifier'] == 'gp':
            self.classifier.condition(state['x'], state['target'])


def inner_split(masks, subjects, seed):
    """Return the numbers of the images to learn from, and of at most CHOOSE to choose on, of other subjects: a quarter of them."""
    names = [*numpy.random.default_rng(seed).permutation(sorted(set(subjects)))]
    quarter, with_some = max(1, len(names) // 4), {subject for subject, mask in zip(subjects, masks) if mask.any()}
    if with_some and with_some.isdisjoint(names[:quarter]):            # there is to be something to choose by
        names.insert(0, names.pop(next(place for place, name in enumerate(names) if name in with_some)))
    chosen_on = numpy.isin(subjects, names[:quarter])
    learn, choose = numpy.flatnonzero(~chosen_on), numpy.flatnonzero(chosen_on)
    choose = choose[::-(-len(choose) // CHOOSE)]
    if not (masks[learn].any() and masks[choose].any()):
        raise ValueError(f'of {len(names)} training subjects, some are learnt from and others chosen on, and on one side no mask holds any '
                         'foreground; give more subjects, or more images of each')
    return learn, choose


def halved(image):
    """Return (H/2, W/2): the means of squares of 2×2 pixels."""
    return (image[::2, ::2] + image[1::2, ::2] + image[::2, 1::2] + image[1::2, 1::2]) / 4


def doubled(mask):
    return mask.repeat(2, 0).repeat(2, 1)


def seen_small(image):
    """Return the image at half its size, without speckle."""
    return median_filter(halved(image), 5)


def grey_level(image):
    return (image * LEVELS).astype(int).clip(0, LEVELS - 1)


def cut(odds, edges, weights, groups=None):
    """Return the labels of least energy for log-odds D(0) − D(1), of which the less likely label alone is paid for."""
    return minimise(odds.clip(0, None), (-odds).clip(0, None), edges, weights, groups)[0]


def cut_pixels(odds, image, smoothness):
    edges, distances, groups = grid(image.shape)
    return cut(odds, edges, contrast_weights(image, edges, smoothness / distances), groups)


@one_thread_per_product()
def log_odds(images, masks):
    """Return (levels (LEVELS,), place (H/2, W/2)): log h₁/h₀ of grey levels, where each bin begins with one, and the log-odds of π."""
    inside, outside, total, count = numpy.ones(LEVELS), numpy.ones(LEVELS), 0, 0
    for image, mask in zip(images, masks):
        level, object_ = grey_level(seen_small(image)), halved(mask.astype(numpy.float32)) >= 0.5
        inside += numpy.bincount(level[object_], minlength=LEVELS)
        outside += numpy.bincount(level[~object_], minlength=LEVELS)
        total, count = total + object_, count + object_.any()
    h1, h0 = (numpy.convolve(numpy.pad(h / h.sum(), 1, 'edge'), [0.25, 0.5, 0.25], 'valid') for h in (inside, outside))
    p = total / max(count, 1)
    for axis in 0, 1:                                                  # a blur by a Gaussian of 5 % of the image
        place = numpy.arange(p.shape[axis])
        blur = numpy.exp(-0.5 * ((place[:, None] - place) / (0.05 * len(place)))**2)
        p = numpy.moveaxis(numpy.tensordot(blur / blur.sum(1, keepdims=True), p, (1, axis)), 0, axis)
    p = p.clip(0.01, 0.99)
    return numpy.log(h1 / h0), numpy.log(p / (1 - p))


def evenly(target, who, number, rng):
    """Return the numbers of `number` examples, or of what there is: half of each class, and of each as many of each subject as can be."""
    chosen = []
    for kind in True, False:
        those, rank = rng.permutation(numpy.flatnonzero(target == kind)), {}
        turn = [rank.setdefault(who[n], itertools.count()).__next__() for n in those]       # the how manieth of its subject
        chosen.append(those[numpy.argsort(turn, kind='stable')][:number // 2])
    return numpy.concatenate(chosen)


def kept(mask, p, area, least):
    """Return the largest piece of a mask (H, W), holes filled; none if below a share `area` of all pixels, or if p is nowhere `least`."""
    mask = fill_outlines(largest_component(mask))
    return mask if mask.any() and mask.mean() >= area and p[mask].max() >= least else numpy.zeros_like(mask)
