"""Metrics: how good a predicted mask is, in numbers that can be compared.

All of them are made of a few counts over pixels. With the true mask y (0 or 1), the probabilities p in [0, 1] and the
predicted mask m = (p > threshold):

    soft Dice  2·Σpy / (Σp + Σy)       hard Dice  2·Σmy / (Σm + Σy)       IoU  Σmy / (Σm + Σy − Σmy)

    accuracy   the share of pixels where m = y                            foreground share  Σm / pixels

Each comes in two kinds. *Pooled* adds up the counts of all images and divides once: large nerves weigh more than small
ones, and an image without nerve only counts through what was predicted on it. *Per image* divides for each image and
takes the mean: each image weighs the same, and an image without nerve is all or nothing, 1 if the prediction is empty
too, 0 if one pixel is not. The numbers differ, so each is labelled. With several output channels, each channel of an
image is counted like an image of its own, and pooled scores are means over the channels.

A Dice score says nothing by itself: a test part with many empty masks gives the empty prediction a high per-image Dice.
`Baselines` computes what can be had without looking at the images.
"""

import numpy

from .engine.backend import get_array_module, to_cpu
from .engine.communicator import current

# What `SegmentationScores.compute` gives that a history records; and those of them that are of masks, not of probabilities.
SCORES = ('soft_dice_pooled', 'soft_dice_per_image', 'dice_pooled', 'dice_per_image', 'iou_pooled', 'iou_per_image', 'accuracy',
          'foreground_share')
HARD_SCORES = 'dice_pooled', 'dice_per_image', 'iou_pooled', 'iou_per_image', 'accuracy'


def ratio(numerator, denominator):
    """Return numerator / denominator of two arrays of counts, and 1 where the denominator is 0.

    This is the one place that decides what empty against empty scores: Dice and IoU divide 0 by 0 exactly if neither
    mask has any foreground, and then the prediction is right.
    """
    empty = denominator == 0
    return numpy.where(empty, 1.0, numerator / numpy.where(empty, 1.0, denominator))


def foreground(target):
    """Return (y, doubt): where `target`, of any shape and dtype, is foreground, bool; and 0, or NaN on a GPU if it is no mask.

    A mask is 0 for background and 1 for foreground or, as files have it, 255. On the CPU, anything else raises ValueError.
    """
    if target.dtype.kind == 'b' or target.size == 0:
        return target != 0, 0.0
    xp, y, value = get_array_module(target), target != 0, target.max()
    is_mask = (target == y * value).all() & ((value == 0) | (value == 1) | (value == 255))
    if xp is not numpy:
        return y, xp.where(is_mask, 0.0, numpy.nan)
    if not is_mask:
        values = ', '.join(map(str, numpy.unique(target)[:5].tolist()))
        raise ValueError(f'the target holds the values {values}…; expected 0 and 1, or 0 and 255: a score needs a mask, cut soft '
                         'targets at a threshold')
    return y, 0.0


class SegmentationScores:
    """Scores over a whole part of the data, from batches that come one after another.

        scores = SegmentationScores()
        for x, target in part:
            scores.update(predict(model, x), target)
        print(scores.compute()['dice_pooled'])

    A pixel is predicted foreground where its probability is above `threshold`. The counts of each batch stay on its
    device until `compute`, so that scoring never makes the host wait for the device.
    """

    def __init__(self, threshold=0.5):
        if not 0 <= threshold < 1:
            raise ValueError(f'threshold is {threshold}; expected a probability from 0 up to, not including, 1')
        self.threshold = threshold
        self.counts = []                                        # one (6, N, C) float64 array per batch

    def update(self, probabilities, target):
        """Count one batch: probabilities in [0, 1], and target as `foreground` takes it, both (N, H, W, C) on one device.

        A batch without a pixel counts for nothing. Raises ValueError if the two differ in shape or hold other values; on a GPU,
        where to look would be to wait, all scores then are NaN. So are those of an image with a probability of NaN.
        """
        p, xp = probabilities, get_array_module(probabilities)
        if p.shape != target.shape or p.ndim != 4:
            raise ValueError(f'probabilities {p.shape} and target {target.shape} differ in shape, or are not (N, H, W, C)')
        y, doubt = foreground(target)
        if p.size == 0:
            return
        low, high = p.min(), p.max()
        if xp is not numpy:
            doubt = doubt + xp.where((low < 0) | (high > 1), numpy.nan, 0.0)
        elif low < 0 or high > 1:
            raise ValueError(f'the probabilities lie from {low} to {high}; expected 0 to 1. Take the sigmoid of logits, and '
                             'divide masks of 0 and 255 by 255')
        m = p > self.threshold
        counted = p * y, p, m & y, m, y, xp.ones_like(y)        # the order in which compute takes them apart
        counts = xp.stack([pixels.sum(axis=(1, 2), dtype='float64') for pixels in counted])      # (6, N, C)
        self.counts.append(counts + 0 * counts[1] + doubt)      # Σp, NaN if one p is, makes all counts of its image so

    def pool(self):
        """Take in what the other processes of the training, if there are any, have counted: then all of them score the same images."""
        self.counts = [counts for of_process in current().gather(self.counts) for counts in of_process]

    def compute(self):
        """Return the scores of everything counted so far: a dict of name → float.

        Names: soft_dice_pooled, soft_dice_per_image, dice_pooled, dice_per_image, iou_pooled, iou_per_image, accuracy
        (of all pixels), accuracy_per_image, foreground_share (predicted) and true_foreground_share (of all pixels).
        Raises ValueError if nothing was counted.
        """
        per_image, scores = self.per_image_counts(), {}
        for kind, counts in ('pooled', per_image.sum(axis=1)), ('per_image', per_image):         # (6, C), (6, N, C)
            soft_overlap, p, overlap, m, y, pixels = counts
            scores['soft_dice_' + kind] = ratio(2 * soft_overlap, p + y)
            scores['dice_' + kind] = ratio(2 * overlap, m + y)
            scores['iou_' + kind] = ratio(overlap, m + y - overlap)
            scores['accuracy_' + kind] = (pixels - (m + y - 2 * overlap)) / pixels          # all but the wrong ones
            if kind == 'pooled':
                scores.update(foreground_share=m / pixels, true_foreground_share=y / pixels)
        scores['accuracy'] = scores.pop('accuracy_pooled')
        return {name: float(score.mean()) for name, score in scores.items()}

    def dice_of_images(self):
        """Return the hard Dice of every image counted so far, in order, (N,), the mean over channels."""
        _, _, overlap, m, y, _ = self.per_image_counts()                                         # (N, C) each
        return ratio(2 * overlap, m + y).mean(axis=1)

    def per_image_counts(self):
        """Return all counts on the host, (6, N, C), in the order of `update`."""
        if not self.counts:
            raise ValueError('there is nothing to score: no batch was counted')
        return to_cpu(get_array_module(self.counts[0]).concatenate(self.counts, axis=1))


class Baselines:
    """What a prediction that never looks at the image scores: the empty mask, and the mean training mask.

    Nerves lie in similar places, so the share of training masks that cover a pixel is a prediction of its own. It is
    cut at the threshold where its pooled Dice on the training masks is best, and the same mask then stands for every
    image.

        baselines = Baselines()
        for target in training_masks:
            baselines.update(target)
        baselines.compute(validation_masks)['mean training mask']['dice_pooled']
    """

    def __init__(self):
        self.total, self.images = 0, 0

    def update(self, target):
        """Count one batch of training masks, (N, H, W, C), as `foreground` takes them. Raises ValueError unless all have one size.

        A batch without a pixel counts for nothing.
        """
        if target.ndim != 4:
            raise ValueError(f'masks have the shape {target.shape}; expected (N, H, W, C)')
        y, doubt = foreground(target)
        if target.size == 0:
            return
        batch = y.sum(axis=0, dtype='float64') + doubt                                           # (H, W, C)
        if self.images and batch.shape != self.total.shape:
            raise ValueError(f'masks of {batch.shape} and {self.total.shape} (height, width, channels) have no mean; '
                             'resize them to one size')
        self.total, self.images = self.total + batch, self.images + len(target)

    def mean_mask(self):
        """Return the mean training mask cut where its Dice is best, (H, W, C), 0 or 1, on the device of the masks.

        Let q be the share of training masks that cover a pixel. On all of them together, a set of pixels has the pooled
        Dice 2·Σq / (number of pixels + Q), with Σq over the set and Q over the whole image. For a given number of
        pixels the best are those of largest q, so it is enough to try every number. The best set then is where q > best
        Dice / 2: adding a pixel helps as long as its own 2q/1 is above the fraction it is added to.
        """
        if not self.images:
            raise ValueError('there is no mean training mask: no mask was counted')
        if numpy.isnan(to_cpu(self.total)).any():
            raise ValueError('there is no mean training mask: masks held other values than 0 and 1, or 0 and 255')
        xp = get_array_module(self.total)
        q = self.total / self.images                                                             # (H, W, C)
        descending = xp.sort(q.reshape(-1, q.shape[2]), axis=0)[::-1]                            # (H·W, C)
        number = xp.arange(1, len(descending) + 1)[:, None]                                      # (H·W, 1)
        dice = 2 * descending.cumsum(axis=0) / (number + descending.sum(axis=0))                 # (H·W, C)
        return (q > dice.max(axis=0) / 2).astype('float64')

    def compute(self, targets):
        """Return {'empty mask': scores, 'mean training mask': scores} on `targets`, an iterable of masks (N, H, W, C).

        `scores` are those of `SegmentationScores`. Both predictions are 0 or 1, so their soft scores equal their hard
        ones.
        """
        mean_mask, empty, mean = self.mean_mask(), SegmentationScores(), SegmentationScores()
        for target in targets:
            xp = get_array_module(target)
            empty.update(xp.zeros_like(target), target)
            mean.update(xp.broadcast_to(mean_mask, target.shape), target)
        return {'empty mask': empty.compute(), 'mean training mask': mean.compute()}
