"""From an image of any size to its mask: resize, predict, average over flips, threshold, drop what is too small.

A network is trained at one size. `Segmenter` brings an image to that size and the probabilities back to the image's own. What
it does beyond that is a choice, `Settings`, and a choice that looks at data flatters itself there: `choose_from` and
`choose_temperature` belong on data that nobody reports scores of, and the settings are saved with the model.

Several networks predict together by the mean of their probabilities. The networks of a cross-validation are such an ensemble; how their
probabilities become a mask is chosen from what each said of the subjects that it had not seen.
"""

import json
import math
import re
import zipfile
from dataclasses import asdict, dataclass, fields
from itertools import product
from pathlib import Path

import numpy

from ..engine.backend import move, select_device, to_cpu
from ..engine.plan import planned
from ..images.augment import median_filter
from ..images.components import largest_component
from ..images.data import FITS, fitted, intensity_oddity, oddity_warning, places, unfitted
from ..images.reading import as_intensities, white_of
from ..layers import Dropout, sigmoid
from ..metrics import SegmentationScores, ratio
from ..train import predict
from .checkpoint import CHAINS, CheckpointError, load_checkpoint
from .uncertainty import band, with_temperature
from .uncertainty import temperature as fitted_temperature

PARTS = 'training', 'inner', 'validation'                       # whose subjects a model file names
LARGEST_FILTER = 99                     # window of a median filter, in pixels
READING = 'mask_pattern', 'mask_threshold', 'label', 'fill_outlines', 'subject_pattern', 'subject_from'     # how masks and subjects were found
THRESHOLDS, AREAS = numpy.arange(0.1, 0.91, 0.05), (0, 0.0025, 0.005, 0.01, 0.015, 0.02)        # what settings are chosen among


def reading_of(settings):
    """Return what a model file says of how masks and subjects were found, READING, from the settings of its run; 'table' if a table said subjects."""
    return {name: settings.get(name) for name in READING} | ({'subject_from': 'table'} if settings.get('subjects') else {})


@dataclass(frozen=True)
class Settings:
    """How probabilities become a mask.

    threshold     a pixel is foreground where its probability is above it, in [0, 1)
    minimal_area  share of what the network sees, in [0, 1), below which a mask counts as empty: a nerve is never that small
    flip_average  whether to average the prediction with that of the mirrored image, left and right exchanged
    largest_component   whether to keep only the largest connected piece of a mask; its area is the one that counts then
    temperature   what the network's logits are divided by, above 0, so that of the pixels near foreground to which it, alone and without
                  averaging, gives p, a share of p is foreground: above 1 it was too sure there (see `choose_temperature`). The threshold is one
                  of probabilities after that
    """

    threshold: float = 0.5
    minimal_area: float = 0.0
    flip_average: bool = False
    largest_component: bool = False
    temperature: float = 1.0

    def __post_init__(self):
        for name in ('threshold', 'minimal_area'):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f'{name} is {getattr(self, name)}; expected a number from 0 up to, not including, 1')
        if not 0 < self.temperature < math.inf:
            raise ValueError(f'temperature is {self.temperature}; expected a number above 0')

    def mask(self, probability, seen=None):
        """Return the mask (H, W), bool, of a map of probabilities (H, W); `seen` is how many of its pixels the network sees, default all."""
        mask = probability > self.threshold
        mask = largest_component(mask) if self.largest_component else mask
        return mask if numpy.count_nonzero(mask) / (seen or mask.size) >= self.minimal_area else numpy.zeros_like(mask)


def predict_flips(model, x, flip_average, temperature=1.0):
    """Return probabilities (N, H, W, C) of x (N, H, W, C_in), averaged with those of the mirrored images if `flip_average`."""
    probabilities = predict(model, x, temperature)
    if flip_average:
        probabilities = (probabilities + predict(model, x[:, :, ::-1], temperature)[:, :, ::-1]) / 2
    return probabilities


def with_dropout(model, x, number, temperature=1.0, seed=0):
    """Return `number` probabilities (N, H, W, C) of x (N, H, W, C_in), on the CPU, all layers in inference mode but for dropout.

    Each is the answer of another thinned network: samples of what training left open (Gal & Ghahramani 2016, arXiv:1506.02142). `seed`
    decides what is dropped, the same for every image, whatever images are beside it. Meanwhile nobody else may use the model.
    """
    dropouts = [layer for _, layer in model.eval().layers() if isinstance(layer, Dropout)]
    before, drawn = [layer.rng for layer in dropouts], numpy.empty((number, *x.shape[:3], model.config['out_channels']), 'float32')
    try:
        for n, row in numpy.ndindex(len(x), number):
            if row == 0:
                rng = numpy.random.default_rng(seed)
                for layer in dropouts:
                    layer.training, layer.rng = True, rng
            with planned(model, 'sampling', x[:1].shape):
                drawn[row, n] = to_cpu(sigmoid(model.forward(x[n:n + 1]) / temperature))[0]
        return list(drawn)
    finally:
        for layer, own in zip(dropouts, before):
            layer.training, layer.rng = False, own


def by_image(drawn):
    """Return for each of N images what `drawn`, T arrays (N, h, w, 1), holds of it: a list of (T, h, w) float32."""
    return [*numpy.stack(drawn, axis=1)[..., 0].astype('float32', copy=False)]


class Segmenter:
    """A trained model, or several that predict together; how images were prepared for their training; and the settings they are used with.

    Images are brought to `size` (H, W) as `fit` says, see `data.places`, and, if `median_filter` is a number and not None, filtered with
    a window of that size. `temperatures` are of each model; by default that of the settings is of all.
    """

    def __init__(self, models, size, settings=Settings(), median_filter=None, fit='squeeze', temperatures=None):
        self.models = [model.eval() for model in (models if isinstance(models, list) else [models])]
        self.temperatures = temperatures or [settings.temperature] * len(self.models)
        self.size, self.settings, self.median_filter, self.fit = tuple(size), settings, median_filter, fit

    @property
    def model(self):
        """The model, of several the first."""
        return self.models[0]

    @property
    def device(self):
        """Where it computes: 'cpu' or 'gpu'."""
        return self.model.device

    @classmethod
    def from_file(cls, path, **overrides):
        """Return (segmenter, extra) of a model file that `train_unet.py` wrote; `overrides` replace settings stored in it.

        Raises CheckpointError if the file lacks what a segmenter needs, or holds it in another form.
        """
        segmenter, (extra,) = cls.from_files([path], **overrides)
        return segmenter, extra

    @classmethod
    def from_files(cls, paths, **overrides):
        """Return (segmenter, extras) of model files that predict together; else as `from_file`.

        The settings of several are chosen from what each said of its validation subjects, at its own temperature, which it keeps. Raises
        CheckpointError also if the files are for images of different sizes, fits or filters, or if one does not hold what settings are chosen
        from.
        """
        models, extras = zip(*(read_network(path) for path in paths))
        for path, extra in zip(paths, extras):
            for name in 'size', 'fit', 'median_filter', 'reading':
                if extra.get(name) != extras[0].get(name):
                    raise CheckpointError(f'{path}: its {name} is {extra.get(name)}, that of {paths[0]} is {extras[0].get(name)}; networks '
                                          'predict together if they see the same')
        if len(paths) > 1:
            lacking = [path for path, extra in zip(paths, extras) if not is_count(extra.get('held_out'))]
            if lacking:
                raise CheckpointError(f'{lacking[0]}: does not say what its network made of subjects it had not seen; several predict together '
                                      'if each is the last.npz of a run that came to its end with this version and had validation subjects: '
                                      'not of --validation-share 0, --init or a split by image')
        stored = [stored_settings(path, extra, **overrides) for path, extra in zip(paths, extras)]
        settings = stored[0] if len(paths) == 1 else Settings(**{**asdict(choose_from([extra['held_out'] for extra in extras])[0]), **overrides})
        return cls([*models], extras[0]['size'], settings, extras[0].get('median_filter'), extras[0]['fit'],
                   [each.temperature for each in stored]), [*extras]

    def prepare(self, image):
        """Return image (H, W) as the network is to see it, (h, w) float32: in [0, 1], at its size, filtered if it was trained so.

        uint8 and uint16 are divided by 255 and 65535; floats lie in [0, 1] already, or ValueError is raised.
        """
        image = fitted(as_intensities(image), self.size, self.fit)
        return image if self.median_filter is None else median_filter(image, self.median_filter)

    def probabilities(self, images):
        """Return, for each of `images`, (H, W) of any sizes, its map of probabilities (H, W). For values see `prepare`."""
        images = [numpy.asarray(image) for image in images]
        maps = self.maps([self.prepare(image) for image in images])
        return [self.restore(small, image.shape) for small, image in zip(maps, images)]

    def restore(self, small, shape):
        """Return a map (h, w) float32 of what `prepare` returned, at the size (H, W) = `shape` of its image; 0 where nothing is seen of it."""
        return unfitted(small, shape, self.fit)

    def mask(self, probability):
        """Return the mask (H, W), bool, that the settings make of a map of probabilities at the size (H, W) of its image."""
        part, place = (math.prod(side.stop - side.start for side in sides) for sides in places(probability.shape, self.size, self.fit))
        return self.settings.mask(probability, seen=part * math.prod(self.size) / place)

    def maps(self, prepared, members=None):
        """Return for each of the images that `prepare` returned its map of probabilities at the network's size, (h, w) float32.

        That is the networks' own part of `probabilities`; `restore` brings a map to the size of its image. `members` are the numbers of
        those of the models that predict, all by default.
        """
        return [drawn.mean(axis=0) for drawn in self.samples(prepared, members, mirrored=self.settings.flip_average)] if prepared else []

    def map_of(self, samples):
        """Return the map (h, w) that `maps` returns of an image, of which `samples` returned these (T, h, w), those of mirrored images too."""
        return samples[::1 if self.settings.flip_average else 2].mean(axis=0)

    def samples(self, prepared, members=None, mirrored=True):
        """Return what each of the models makes of each image, and then, if `mirrored`, of the mirrored image: a list of (T, h, w) float32."""
        drawn = []
        for model, temperature in self._members(members):
            x = self._batch(prepared, model)
            drawn.append(to_cpu(predict(model, x, temperature)))
            if mirrored:
                drawn.append(to_cpu(predict(model, x[:, :, ::-1], temperature)[:, :, ::-1]))
        return by_image(drawn)

    def dropout_samples(self, prepared, number, members=None):
        """Return what each of the models makes of each image `number` times with dropout kept on, see `with_dropout`: a list as of `samples`."""
        return by_image([p for model, temperature in self._members(members)
                         for p in with_dropout(model, self._batch(prepared, model), number, temperature)])

    @property
    def intensities(self):
        """(mean, deviation) of the intensities of training; (0, 1) if unknown."""
        return self.model.config['input_mean'], self.model.config['input_std']

    def _members(self, members):
        models = [*zip(self.models, self.temperatures)]
        return models if members is None else [models[number] for number in members]

    def _batch(self, prepared, model):
        return move(numpy.stack(prepared)[..., None].astype(model.dtype), model.device)             # (N, h, w, 1)

    def oddity(self, prepared, shape=None):
        """Return in words how the intensities of an image that `prepare` returned lie far from training's; '' if near or unknown.

        `shape` (H, W) is that of the image before, by default the network's: the black around a padded one does not count, as in
        `intensity_statistics`.
        """
        mean, std = self.intensities
        return '' if (mean, std) == (0, 1) else intensity_oddity(prepared[places(shape or self.size, self.size, self.fit)[1]], mean, std)


class ChainSegmenter(Segmenter):
    """A chain from before deep networks, `classical.chains`, used as a network is."""

    device = 'cpu'

    def __init__(self, chain, settings=Settings(), intensities=(0, 1)):
        super().__init__([], chain.size, settings, fit=chain.config['fit'])
        self.models, self._intensities = [chain], tuple(intensities)

    def samples(self, prepared, members=None, mirrored=True):
        return [numpy.stack([self._one(image), *([self._one(image[:, ::-1])[:, ::-1]] if mirrored else [])]).astype('float32') for image in prepared]

    def _one(self, image):
        return with_temperature(self.model.map(image), self.settings.temperature)

    @property
    def intensities(self):
        return self._intensities


def stored_settings(path, extra, **overrides):
    """Return the Settings in the file `path`, of which `extra` was read, with `overrides` in their place. Raises CheckpointError."""
    settings = extra.get('settings', {})
    try:
        return Settings(**{**settings, **overrides})
    except TypeError as error:
        raise CheckpointError(f'{path}: its settings {settings!r} are not those of this version ({error})') from error


def is_chain(path):
    """Return whether the file holds a chain; False too if it cannot be opened, which whoever reads it then says."""
    try:
        with zipfile.ZipFile(path) as archive:
            return 'model/levels.npy' in archive.namelist()
    except (OSError, zipfile.BadZipFile):
        return False


def read_chain(path):
    """Return (chain, extra) of a file that `classical.py` wrote, `extra` as `read_network` has it. Raises CheckpointError."""
    chain, extra = load_checkpoint(path, CHAINS)
    extra |= {'fit': chain.config['fit'], 'size': [*chain.size]}
    intensities, mask = extra.setdefault('intensity', [0, 1]), extra.get('mean_training_mask')
    if not (isinstance(intensities, list) and len(intensities) == 2 and all(isinstance(n, float | int) for n in intensities) and intensities[1] > 0):
        raise CheckpointError(f'{path}: gives {intensities!r} as mean and deviation of the intensities of training')
    if mask is not None and getattr(mask, 'shape', None) != chain.size:
        raise CheckpointError(f'{path}: its mean training mask is not an array {chain.size}')
    check_what_was_seen(path, extra)
    return chain, extra


def read_network(path):
    """Return (model, extra) of a model file that `train_unet.py` wrote, checked for what a segmenter needs. Raises CheckpointError."""
    model, extra = load_checkpoint(path)
    size, median_size = extra.get('size'), extra.get('median_filter')
    if not (isinstance(size, list) and len(size) == 2 and all(isinstance(n, int) and n > 0 for n in size)):
        raise CheckpointError(f'{path}: gives {size!r} as the size of its images, expected [height, width]; '
                              'was it written by train_unet.py?')
    if extra.setdefault('fit', 'squeeze') not in FITS:              # files of earlier versions do not say it
        raise CheckpointError(f'{path}: gives {extra["fit"]!r} as the way that images come to its size, expected one of {", ".join(FITS)}')
    if not (median_size is None or isinstance(median_size, int) and 3 <= median_size <= LARGEST_FILTER and median_size % 2):
        raise CheckpointError(f'{path}: gives {median_size!r} as the size of its median filter, expected an odd number '
                              f'from 3 to {LARGEST_FILTER}')
    if (model.config['in_channels'], model.config['out_channels']) != (1, 1):
        raise CheckpointError(f'{path}: its network maps {model.config["in_channels"]} channels to '
                              f'{model.config["out_channels"]}, expected grey images and one kind of mask')
    mean_mask = extra.get('mean_training_mask')
    if mean_mask is not None and getattr(mean_mask, 'ndim', 0) != 2:
        raise CheckpointError(f'{path}: its mean training mask is not an array (H, W)')
    check_what_was_seen(path, extra)
    return model, extra


def check_what_was_seen(path, extra):
    """Raise CheckpointError unless what the file says of the subjects of its training has the form that `RunFolder` writes."""
    reading = extra.get('reading', {})
    for part in PARTS:
        subjects = extra.get(f'{part}_subjects')
        if not (subjects is None or isinstance(subjects, list) and all(isinstance(subject, str) for subject in subjects)):
            raise CheckpointError(f'{path}: its subjects are no list of names')
    kinds = dict(zip(READING, (str, float | int, str | int, bool, str, str)))
    if (not isinstance(reading, dict) or not reading.keys() <= kinds.keys()
            or not all(isinstance(extra.get(name), str | None) for name in ('what', 'perhaps_seen'))
            or any(value is not None and not isinstance(value, kinds[name]) for name, value in reading.items())):
        raise CheckpointError(f'{path}: what it says of the masks it was trained on is not of the form of this version')
    pattern = reading.get('subject_pattern')
    try:
        has_group = pattern is None or isinstance(pattern, str) and re.compile(pattern).groups > 0
    except re.error:
        has_group = False
    if not has_group:
        raise CheckpointError(f'{path}: its subject pattern {pattern!r} is no regular expression with a group')


def is_count(held_out):
    """Return whether what a file says of subjects that its network had not seen is of the form of `count_masks`: older ones differ."""
    try:
        thresholds, pixels, counts = (held_out[name] for name in ('thresholds', 'pixels', 'counts'))
        return isinstance(pixels, int) and counts.dtype.kind == 'i' and counts.shape[:4] == (2, 2, *thresholds.shape, 3) and counts.ndim == 5
    except (TypeError, KeyError, AttributeError):
        return False


def model_files(paths):
    """Return the model files that `paths` stand for: of a file itself, of the folder of a cross-validation the last.npz of each fold.

    Raises CheckpointError for another folder, and for a cross-validation of which a fold is missing.
    """
    files = []
    for path in map(Path, paths):
        if not path.is_dir():
            files.append(path)
            continue
        folds = [fold for fold in path.glob('fold_*') if fold.name[5:].isdigit()]
        if not folds:
            there = next((name for name in ('best.npz', 'last.npz') if (path / name).exists()), 'best.npz')
            raise CheckpointError(f'{path}: is a folder, and not that of a cross-validation; give a model file, such as {path / there}')
        number = read_folds(path) or len(folds)
        missing = [n for n in range(1, number + 1) if not (path / f'fold_{n}' / 'last.npz').exists()]
        if chain := next((file for fold in folds if (file := fold / 'chain.npz').exists()), None):
            raise CheckpointError(f'{path}: holds chains, which predict alone; give one of them, such as {chain}')
        if missing:
            raise CheckpointError(f'{path}: fold {missing[0]} of {number} has no network yet; train it, or give the files of those that are there')
        files += [path / f'fold_{n}' / 'last.npz' for n in range(1, number + 1)]
    return [*{file.resolve(): file for file in files}.values()]                 # each once


def read_folds(path):
    """Return how many folds the cross-validation in the folder `path` has by its config.json; None if that does not say."""
    try:
        return int(json.loads((path / 'config.json').read_text())['folds'])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def open_segmenter(args):
    """Return (segmenter, extras) as the options of `options.add_prediction_options` say, on its device; print what will predict.

    Raises CheckpointError, or RuntimeError if the device does not work.
    """
    given = {field.name: getattr(args, field.name) for field in fields(Settings) if hasattr(args, field.name)}
    files = model_files(args.model)
    if chains := [path for path in files if is_chain(path)]:
        if len(files) > 1:
            raise CheckpointError(f'{chains[0]}: is a chain, which predicts alone; give no other model')
        chain, extra = read_chain(files[0])
        print(f'model:    {files[0]}, {chain.config["kind"]} chain, {chain.size[0]}x{chain.size[1]}, fit {extra["fit"]}; it is computed on the CPU')
        return ChainSegmenter(chain, Settings(**given), extra['intensity']), [extra]
    device, _, reason = select_device(args.device, args.precision)
    segmenter, extras = Segmenter.from_files(files, **given)
    for model in segmenter.models:
        model.to(device)
    print(reason)
    for path, extra in zip(files, extras):
        print(f'model:    {path}, epoch {extra.get("epoch", "?")}, {extra["size"][0]}x{extra["size"][1]}, fit {extra["fit"]}')
    own, mean = segmenter.temperatures, math.exp(sum(map(math.log, segmenter.temperatures)) / len(files))
    said = asdict(segmenter.settings) | {'temperature': f'{own[0]:g}' if len({*own}) == 1 else f'{mean:.4g} on the (geometric) mean'}
    print('settings: ' + ', '.join(f'{name} {value}' for name, value in said.items())
          + (', chosen from what each network made of the subjects that it had not seen' if len(files) > 1 else ''))
    return segmenter, extras


def intensity_warning(oddities, white):
    """Return what is to be said of {path of an image: what `Segmenter.oddity` says of it}; '' if nothing.

    `white` is the level that was given, or None.
    """
    said = oddity_warning('images', [path.stem for path in oddities],
                          [oddity and f'{oddity} than those the network was trained on, so their masks may be wrong'
                           for oddity in oddities.values()])
    first = next((path for path, oddity in oddities.items() if oddity), None)
    if first and white is None and (likely := white_of(first)):
        said += f'\n{first.stem} uses few levels of its 16 bits: if it holds fewer bits, give --white {likely}'
    return said


def choose_temperature(model, batches, margin=0.05):
    """Return the temperature at which the probabilities of (images, masks) of `batches` fit the masks best; 1 without any foreground.

    They are those of the model alone, not averaged over flips, which makes them less sure. Only pixels near foreground count
    (`uncertainty.band`), `margin` is a share of the shorter side: elsewhere all is sure, and right.
    """
    probabilities, truths = [], []
    for images, masks in batches:
        for p, y in zip(to_cpu(predict(model, move(images, model.device)))[..., 0], masks[..., 0] > 0):
            if not ((p > 0.5) | y).any():
                continue                                                # all of it is far from foreground
            near = band(p > 0.5, y, round(margin * min(y.shape)))
            probabilities.append(p[near].astype('float32'))
            truths.append(y[near])
    if not any(there.any() for there in truths):
        return 1.0
    return round(fitted_temperature(numpy.concatenate(probabilities), numpy.concatenate(truths)), 4)


def count_masks(model, batches, thresholds=THRESHOLDS, temperature=1.0):
    """Return what settings are chosen from: of each image, what its mask at each threshold has in common with the true one.

    A dict of 'thresholds' (T,), 'pixels' of an image, and 'counts' (2, 2, T, 3, N): without and with averaging over flips, of the whole
    mask and of its largest component, at each threshold, the pixels of overlap, of the mask and of the truth, of each image. `batches` is called
    for an iterable of (images, masks), (N, H, W, 1) each, once for each kind of averaging; the thresholds are those of probabilities at this
    `temperature`.
    """
    counts, device = [], model.device
    for flip_average in (False, True):
        of_batches = []                                         # of each batch, (2, thresholds, 3, N)
        for images, masks in batches():
            p, y = to_cpu(predict_flips(model, move(images, device), flip_average, temperature))[..., 0], masks[..., 0] > 0
            whole = [p > level for level in thresholds]
            largest = [numpy.stack([*map(largest_component, cut)]) for cut in whole]
            of_batches.append([[[pixels.sum(axis=(1, 2)) for pixels in (cut & y, cut, y)] for cut in kind] for kind in (whole, largest)])
        counts.append(numpy.concatenate(of_batches, axis=3))
    return {'thresholds': numpy.array(thresholds), 'pixels': int(y[0].size), 'counts': numpy.array(counts, 'int32')}


def choose_from(several, areas=AREAS):
    """Return (Settings, score): settings with a high mean Dice per image, of all images that each of `several`, from `count_masks`, counted.

    Candidates are tried from the simplest on, and one takes over only if it is better by 0.002 than the one before, so that noise does
    not decide. Raises CheckpointError unless all were counted at the same thresholds on images of one size.
    """
    first, best, best_score = several[0], Settings(), None
    if not all(numpy.array_equal(one['thresholds'], first['thresholds']) and one['pixels'] == first['pixels'] for one in several):
        raise CheckpointError('the networks were judged at different thresholds or sizes, so no settings can be chosen for them together')
    thresholds, all_counts = first['thresholds'], numpy.concatenate([one['counts'] for one in several], axis=4)
    for flip_average, largest, area in product((False, True), (False, True), areas):
        overlap, predicted, true = all_counts[int(flip_average), int(largest)].swapaxes(0, 1)       # (thresholds, images) each
        kept = predicted >= area * first['pixels']
        scores = ratio(2 * overlap * kept, predicted * kept + true).mean(axis=1)
        if best_score is None:
            best_score = scores[abs(thresholds - best.threshold).argmin()]
        if scores.max() > best_score + 0.002:
            best = Settings(round(float(thresholds[scores.argmax()]), 4), area, flip_average, largest)
            best_score = scores.max()
    return best, float(best_score)


def score(model, batches, settings):
    """Return the scores of the masks that `settings` makes on (images, masks) of `batches`: those of `SegmentationScores.compute`
    that are of masks, so not the soft ones, which are of probabilities."""
    scores, device = SegmentationScores(), model.device
    for images, masks in batches:
        probabilities = to_cpu(predict_flips(model, move(images, device), settings.flip_average, settings.temperature))[..., 0]
        predicted = numpy.stack([settings.mask(probability) for probability in probabilities])[..., None]
        scores.update(predicted.astype(masks.dtype), masks)
    return {name: value for name, value in scores.compute().items() if not name.startswith('soft_')}


def describe(mask, probability):
    """Return what a table of results says of a mask (H, W): area, centroid, confidence.

    area        pixels of foreground;   share   of all pixels
    row, column the centroid in pixels, counted from 0; empty for an empty mask
    confidence  the mean probability of the mask's pixels; of an empty mask, 1 − the highest probability anywhere
    """
    if not mask.any():
        return {'area': 0, 'share': 0.0, 'row': '', 'column': '', 'confidence': round(float(1 - probability.max()), 4)}
    (top, bottom), (left, right) = (numpy.flatnonzero(mask.any(axis=axis))[[0, -1]] for axis in (1, 0))
    around = slice(top, bottom + 1), slice(left, right + 1)             # most of an image lies outside
    rows, columns = numpy.nonzero(mask[around])
    return {'area': len(rows), 'share': round(len(rows) / mask.size, 6), 'row': round(float((rows + top).mean()), 1),
            'column': round(float((columns + left).mean()), 1),
            'confidence': round(float(probability[around][mask[around]].mean()), 4)}
