"""Uncertainty: what the probabilities of a segmentation say about where, and on which images, it is wrong.

A network asked T times, with dropout left on or as an ensemble, gives T probabilities p_t of a pixel. With the entropy H of a coin,

    H(mean of p_t)  =  mean of H(p_t)  +  mutual information            total = aleatoric + epistemic

Aleatoric is what the image does not show, with any amount of training data; the mutual information is what the T disagree about, from
0 where all say the same up to ln 2 (Gal & Ghahramani 2016, arXiv:1506.02142; Depeweg et al. 2018, arXiv:1710.07283). Neither is worth
anything before it is measured, on subjects that nobody trained or chose on: `Calibration`, `roc_area`, `risk_coverage`.

All of this is NumPy on the CPU, in float64. 0 and 1 have no finite logit, so logarithms see probabilities clipped to [1e-7, 1 − 1e-7].
"""

import math

import numpy

from ..checks import positive as whole
from ..engine.parallel import one_thread_per_product
from ..metrics import foreground, ratio

TEMPERATURES = 0.05, 20              # the least and the most that `temperature` finds


# --- Maps, and one number for an image --------------------------------------------------------------------------------

def entropy(p):
    """Return H = −p·ln p − (1 − p)·ln(1 − p) of probabilities of any shape: near 0 where sure, ln 2 at p = ½."""
    p = _clipped(_probabilities(p))
    return -p * numpy.log(p) - (1 - p) * numpy.log1p(-p)


def decompose(samples):
    """Return (mean, total entropy, aleatoric entropy, mutual information), (H, W) each, of samples (T, H, W) of one image.

    H is concave, so 0 ≤ mutual information ≤ total ≤ ln 2, to rounding. Raises ValueError without a sample.
    """
    p = _clipped(_samples(samples, 1))              # before the mean: clipped after it, the mean could be surer than the samples
    mean = p.mean(axis=0)                                                                       # (H, W)
    total, aleatoric = entropy(mean), entropy(p).mean(axis=0)
    return mean, total, aleatoric, numpy.maximum(total - aleatoric, 0)                          # below 0 it is rounding


def sureness(samples, mask=lambda p: p > 0.5):
    """Return how much T masks of one image agree: the mean Dice of all pairs of them, from 0 to 1. Higher is surer.

    samples: probabilities (T, H, W); mask: what makes a mask of a map (H, W), such as `Settings.mask`. Two empty masks agree, so all
    empty is 1. It estimates the Dice with an unknown truth (Roy et al. 2019, arXiv:1811.09800). Raises ValueError unless T ≥ 2.
    """
    samples = _samples(samples, 2)
    masks = numpy.stack([mask(sample) for sample in samples]).reshape(len(samples), -1).astype('float64')       # (T, H·W)
    with one_thread_per_product():
        overlap, area = masks @ masks.T, masks.sum(axis=1)                                          # (T, T), (T,)
    return float(ratio(2 * overlap, area[:, None] + area)[numpy.triu_indices(len(masks), 1)].mean())


def band(prediction, truth, margin=10):
    """Return where, (H, W) bool, foreground of the prediction or of the truth, masks (H, W), is at most `margin` pixels away.

    Away is the larger of the distances in rows and in columns: a pixel's neighbourhood is a square of side 2·margin + 1. Without any
    foreground it is the whole image. Outside lies background so easy, and so much of it, that it hides how good the rest is.
    """
    prediction, truth, margin = numpy.asarray(prediction), numpy.asarray(truth), whole(margin, 'margin', least=0)
    if prediction.ndim != 2 or prediction.shape != truth.shape:
        raise ValueError(f'prediction {prediction.shape} and truth {truth.shape} differ in shape, or are not (H, W)')
    near = (prediction != 0) | (truth != 0)
    if not near.any():
        return ~near
    for axis, size in enumerate(near.shape):        # along columns, then along rows, makes the square
        before = numpy.insert(near.cumsum(axis), 0, 0, axis)                # foreground before each pixel, and in all
        at = numpy.arange(size)
        near = before.take(numpy.minimum(at + margin + 1, size), axis) > before.take(numpy.maximum(at - margin, 0), axis)
    return near


# --- Calibration: of all pixels with the probability p, is a share of p foreground? -----------------------------------

class Calibration:
    """How well probabilities are calibrated, over images that come one after another.

    Pixels are counted in `bins` intervals, [0, 1/bins), [1/bins, 2/bins), …; the last holds 1 too. No pixel is kept.
    """

    def __init__(self, bins=15):
        self.bins = whole(bins, 'bins')
        self.counts = numpy.zeros((3, self.bins))                           # of each bin: pixels, Σp, Σy
        self.squares = self.logs = 0.0

    def update(self, p, y):
        """Count probabilities p and truth y, as `metrics.foreground` takes it: arrays of one shape, whichever, even without a pixel.

        Raises ValueError if they differ in shape, if p is not from 0 to 1, or if y is no mask.
        """
        p, y = _pixels(p, y)
        number = numpy.minimum((p * self.bins).astype(int), self.bins - 1)
        self.counts += [numpy.bincount(number, weights, self.bins) for weights in (None, p, y)]
        self.squares += numpy.square(p - y).sum()
        self.logs -= numpy.log(_clipped(numpy.where(y, p, 1 - p))).sum()

    def compute(self):
        """Return a dict of all that was counted so far. Raises ValueError if that is nothing.

        ece    expected calibration error, Σ_b count_b/n·|share_b − mean_b| (Guo et al. 2017, arXiv:1706.04599), from 0, the best, to 1
        brier  mean of (p − y)², from 0 to 1
        nll    mean of −ln of the probability given to what is there
        count, mean, share   (bins,) each: pixels, mean of p, share of foreground; the last two are NaN in a bin without a pixel
        """
        count, p, y = self.counts
        n = count.sum()
        if n == 0:
            raise ValueError('there is nothing to calibrate: no pixel was counted')
        mean, share = numpy.divide((p, y), count, out=numpy.full((2, self.bins), numpy.nan), where=count > 0)
        return {'ece': float(abs(y - p).sum() / n), 'brier': float(self.squares / n), 'nll': float(self.logs / n),
                'count': count.astype(int), 'mean': mean, 'share': share}


def temperature(p, truth):
    """Return the T, within TEMPERATURES, with which `with_temperature` has the least NLL: above 1 if the network was too sure.

    p and truth as in `Calibration.update`, with at least one pixel. In 1/T this is a logistic regression with one weight, which is
    convex, so a golden section on log T finds the one minimum, to 0.01 % (Guo et al. 2017).
    """
    p, y = _pixels(p, truth)
    if p.size == 0:
        raise ValueError('there is nothing to fit a temperature to: no pixel was given')
    right = numpy.where(y, 1, -1) * _logit(p)                               # the logit of what is there

    def nll(log_t):
        return numpy.logaddexp(0, right * -math.exp(-log_t)).mean()

    (low, high), golden = map(math.log, TEMPERATURES), (math.sqrt(5) - 1) / 2
    while high - low > 1e-4:
        a, b = high - golden * (high - low), low + golden * (high - low)    # low < a < b < high
        low, high = (low, b) if nll(a) < nll(b) else (a, high)
    return math.exp((low + high) / 2)


def with_temperature(p, T):
    """Return sigmoid(logit(p) / T), float64, of probabilities of any shape: nearer to ½ for T > 1. The mask p > ½ stays as it is."""
    if not 0 < T < math.inf:
        raise ValueError(f'the temperature is {T}; expected a number above 0')
    p = _probabilities(p)
    scaled = 0.5 + 0.5 * numpy.tanh(_logit(p) / (2 * T))
    return numpy.where(p > 0.5, numpy.maximum(scaled, numpy.nextafter(0.5, 1)), scaled)         # rounding could reach ½ itself


# --- Does it know where, and on which images, the errors are? ---------------------------------------------------------

def roc_area(score, positive):
    """Return the area under the ROC curve: how often a positive has a higher score than a negative, equal scores counted half.

    score: (N,) numbers; positive: (N,) bool. A score that knows nothing has ½. The ranks of n positives add up to n·(n + 1)/2, and
    to 1 more for each negative below each (Mann & Whitney 1947). Raises ValueError if all are positive, or all negative.
    """
    score, positive = _rows(score, positive)
    positive = positive != 0
    n = numpy.count_nonzero(positive)
    if n in (0, len(score)):
        raise ValueError(f'{n} of {len(score)} are positive; expected some of either class: one alone has no ROC curve')
    return float((_ranks(score)[positive].sum() - n * (n + 1) / 2) / (n * (len(score) - n)))


def spearman(a, b):
    """Return the rank correlation of two arrays (N,), from −1 to 1: Pearson's of the ranks. Raises ValueError if one is constant."""
    a, b = (ranks - ranks.mean() for ranks in map(_ranks, _rows(a, b)))
    if not (a.any() and b.any()):
        raise ValueError(f'all {len(a)} numbers of one side are equal; expected different ones: a constant has no rank correlation')
    return float((a * b).sum() / math.sqrt(numpy.square(a).sum() * numpy.square(b).sum()))


def risk_coverage(score, dice, coverages=(1, .9, .8, .7, .6, .5)):
    """Return what the Dice of an image is when the least sure go to a human and the others stay.

    score: (N,), higher is surer; dice: (N,); coverages: shares in (0, 1] of the images that stay, rounded up to whole images. The
    result holds three orders, 'score', 'oracle', which knows the Dice, and 'random', each a dict (Geifman & El-Yaniv 2017,
    arXiv:1705.08500):

        dice  for each coverage, the mean Dice of the images that stay
        mean  of that over all coverages 1/N, 2/N, …, 1: the area under the curve

    Which images of one score stay is left to chance, so they count with their mean Dice. Raises ValueError without an image.
    """
    score, dice = _rows(score, dice)
    n, result = len(dice), {}
    if not all(0 < coverage <= 1 for coverage in coverages):
        raise ValueError(f'the coverages are {coverages}; expected shares above 0, up to 1')
    kept = [math.ceil(coverage * n - 1e-9) for coverage in coverages]       # 0.07 · 100 is above 7
    for name, order in ('score', score), ('oracle', dice), ('random', numpy.zeros(n)):
        _, where, counts = numpy.unique(-order, return_inverse=True, return_counts=True)        # the surest first
        curve = numpy.repeat(numpy.bincount(where, dice) / counts, counts).cumsum() / numpy.arange(1, n + 1)
        result[name] = {'dice': [float(curve[number - 1]) for number in kept], 'mean': float(curve.mean())}
    return result


class Assessment:
    """What uncertainty is worth, over images with masks that come one after another: each is given to `update`, `lines` says what came out.

    Calibration counts all pixels that it is given, the ROC at most 1,000 of an image, evenly spread.
    """

    def __init__(self):
        self.prediction, self.mean, self.pixels, self.images = Calibration(), Calibration(), [], []

    def update(self, subject, sureness, dice, near):
        """Count an image: its subject, how sure the network is of it, its Dice, and `near`, what `near_truth` returned, or None."""
        self.images.append((subject, sureness, dice))
        if near is None:
            return
        self.prediction.update(near['probability'], near['truth'])
        self.mean.update(near['mean'], near['truth'])
        step = -(-len(near['wrong']) // 1000)
        self.pixels.append(numpy.stack([near[name][::step] for name in ('wrong', 'total', 'information')]))

    def lines(self, coverages):
        """Return in words, a list of lines: calibration, how well errors are found, and Dice when the least sure go to a human."""
        subjects, sure, dice = map(numpy.array, zip(*self.images))
        said = [f'{"Dice per image of the surest":32}' + ''.join(f'{coverage:>9.0%}' for coverage in coverages) + f'{"mean":>9} of all shares']
        curve = risk_coverage(sure, dice, coverages)
        for name, words in (('score', 'by agreement of masks'), ('oracle', 'if one knew'), ('random', 'by chance')):
            said.append(f'{words:32}' + ''.join(f'{value:9.3f}' for value in [*curve[name]['dice'], curve[name]['mean']]))
        names = numpy.unique(subjects)
        of_subjects = [numpy.array([values[subjects == name].mean() for name in names]) for values in (sure, dice)]
        for kind, (a, b) in (('images', (sure, dice)), ('subjects', of_subjects)):
            if numpy.ptp(a) and numpy.ptp(b):
                said.append(f'rank correlation of agreement and Dice, {len(a)} {kind}: {spearman(a, b):.2f}')
        least = numpy.argsort(of_subjects[0], kind='stable')[:3]
        said.append('least sure of: ' + ', '.join(f'subject {names[n]} (agreement {of_subjects[0][n]:.2f}, Dice {of_subjects[1][n]:.2f})' for n in least)
                    + f'; lowest Dice: subject {names[of_subjects[1].argmin()]} ({of_subjects[1].min():.2f})')
        if not self.pixels:
            return said
        for words, calibration in (('prediction', self.prediction), ('mean of samples', self.mean)):
            found = calibration.compute()
            said.append(f'{words + ":":17}expected calibration error {found["ece"]:.3f}, Brier score {found["brier"]:.3f}, '
                        f'negative log-likelihood {found["nll"]:.3f}')
        wrong, total, information = numpy.concatenate(self.pixels, axis=1)
        if wrong.any() and not wrong.all():
            said.append(f'area under the ROC for wrong pixels there: entropy {roc_area(total, wrong):.3f}, mutual information '
                        f'{roc_area(information, wrong):.3f}')
        return said


def near_truth(mask, truth, margin, **maps):
    """Return what `Assessment.update` needs of the pixels near a mask or the truth, see `band`: a dict of arrays (pixels,); None if both are empty.

    Of mask and truth (H, W) it holds 'truth' and 'wrong', and of `maps`, (H, W) each, the same names: probability, mean, total, information.
    """
    if not (mask.any() or truth.any()):
        return None
    near = band(mask, truth, margin)
    return {'truth': truth[near], 'wrong': (mask != 0)[near] != (truth != 0)[near], **{name: values[near] for name, values in maps.items()}}


# --- What is given ----------------------------------------------------------------------------------------------------

def _probabilities(p):
    """Return p in float64. Raises ValueError unless all lie from 0 to 1, to the rounding of float32; also for NaN."""
    p = numpy.asarray(p, 'float64')
    if p.size and not (p.min() >= -1e-6 and p.max() <= 1 + 1e-6):
        raise ValueError(f'the probabilities lie from {p.min()} to {p.max()}; expected 0 to 1: take the sigmoid of logits')
    return p


def _clipped(p):
    return p.clip(1e-7, 1 - 1e-7)


def _logit(p):
    p = _clipped(p)
    return numpy.log(p / (1 - p))                                           # exactly 0 at ½


def _samples(samples, least):
    samples = _probabilities(samples)
    if samples.ndim != 3 or len(samples) < least:
        raise ValueError(f'samples have the shape {samples.shape}; expected (T, H, W), and T at least {least}')
    return samples


def _pixels(p, y):
    """Return probabilities (N,), float64, and where there is foreground (N,), bool, of arrays of one shape."""
    p, y = _probabilities(p), numpy.asarray(y)
    if p.shape != y.shape:
        raise ValueError(f'probabilities {p.shape} and truth {y.shape} differ in shape')
    return p.ravel(), foreground(y)[0].ravel()


def _rows(*arrays):
    """Return two arrays (N,) in float64. Raises ValueError unless they are that, not empty and without NaN."""
    a, b = (numpy.asarray(array, 'float64') for array in arrays)
    if a.ndim != 1 or a.shape != b.shape or a.size == 0 or numpy.isnan((a, b)).any():
        raise ValueError(f'got arrays of {a.shape} and {b.shape}; expected (N,) and (N,), N at least 1, and no NaN among the numbers')
    return a, b


def _ranks(values):
    """Return the ranks of values (N,), from 1 on; equal values share the mean of theirs."""
    _, where, counts = numpy.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[where]
