import itertools
import json
import re

import numpy
import pytest
from helpers import example, run_example
from PIL import Image

import nervenet
from nervenet.classical import chains
from nervenet.classical.chains import KINDS, Chain, Parts, cut, evenly, halved, inner_split, kept, log_odds
from nervenet.classical.superpixels import means, slic
from nervenet.classical.wavelets import TRANSFORMS, box_features, region_features
from nervenet.engine.parallel import set_threads
from nervenet.images.augment import median_filter
from nervenet.metrics import ratio
from nervenet.study.checkpoint import CHAINS, CheckpointError
from nervenet.study.options import stored_options
from nervenet.study.segment import ChainSegmenter, Segmenter, Settings

SIZE = 40, 56
every_kind = pytest.mark.parametrize('kind', KINDS)


def scenes(rng, subjects=8, frames=3, size=SIZE):
    """Return (images, masks, subjects): dark grain, and in it a smooth bright disc, but in the last frame of each subject.

    Somewhere beside the middle lies a square as bright as the disc, of coarse grain: only texture tells it from one.
    """
    y, x = numpy.indices(size)
    images, masks, who = [], [], []
    for subject, frame in itertools.product(range(subjects), range(frames)):
        row, column = size[0] * (0.45 + 0.1 * rng.random()), size[1] * (0.3 + 0.1 * rng.random())
        square = (abs(y - row) < 0.15 * size[0]) & (abs(x - column - 0.45 * size[1]) < 0.15 * size[0])
        mask = ((y - row)**2 + (x - column)**2 < (0.2 * size[0])**2) & (frame < frames - 1)
        image = 0.3 + 0.3 * (mask | square) + (0.03 + 0.12 * square) * rng.standard_normal(size)
        images.append(image.clip(0, 1).astype('float32'))
        masks.append(mask)
        who.append(str(subject))
    return numpy.array(images), numpy.array(masks), numpy.array(who)


@pytest.fixture
def few_choices(monkeypatch):
    monkeypatch.setattr(chains, 'REGIONS', [(1.0, 0, lenience) for lenience in (-2.0, 0.0, 2.0, 4.0)] + [(1.0, 2, 2.0)])
    monkeypatch.setattr(chains, 'MASKS', [(0.3, 0.3), (0.3, 0.5)])


def fitted_chain(rng, **options):
    return Chain(size=SIZE, examples=60, **options).fit(*scenes(rng))


@pytest.fixture
def chain(rng, few_choices):
    return fitted_chain(rng, kind='superpixels', classifier='logistic')


# --- Both chains ------------------------------------------------------------------------------------------------------

@every_kind
@pytest.mark.parametrize('classifier', ['gp', 'logistic'])
def test_a_bright_disc_is_found_on_unseen_subjects_and_nothing_where_none_is(rng, few_choices, kind, classifier):
    said = []
    chain = Chain(kind=kind, size=SIZE, examples=60, classifier=classifier).fit(*scenes(rng), tell=said.append)
    images, masks, _ = scenes(rng, subjects=3)
    found = numpy.array([chain.map(image) > 0.5 for image in images])
    regions = numpy.array([chain.region(image) for image in images])
    assert (regions & masks).sum() / masks.sum() > 0.95 and regions.mean() < 0.3
    assert ratio(2.0 * (found & masks).sum((1, 2)), found.sum((1, 2)) + masks.sum((1, 2))).min() > 0.8
    assert [line.partition(':')[0] for line in said] == ['region', 'classifier', 'mask']


def test_images_of_any_size_come_back_at_their_size(rng, few_choices):
    chain = fitted_chain(rng, kind='graph-cut', classifier='logistic')
    (image, *_), (mask, *_), _ = scenes(rng, subjects=1, size=(80, 112))
    with pytest.raises(ValueError, match='the chain has learnt nothing yet: fit it, or load'):
        Chain().predict(image)
    p, found = chain.predict(numpy.round(image * 255).astype('uint8'))
    assert p.shape == found.shape == (80, 112) and 2 * (found & mask).sum() / (found.sum() + mask.sum()) > 0.85


@every_kind
def test_the_map_is_above_a_half_exactly_where_the_mask_is(rng, few_choices, kind, monkeypatch):
    chain = fitted_chain(rng, kind=kind, classifier='logistic')
    chain.chosen['mask'] = 0.3, 0.4, 0.0, 0.0                           # so that the cut and p > ½ disagree
    image = scenes(rng, subjects=1)[0][0]
    region = chain.region(image)
    parts = chain.parts(image, region)
    p = rng.uniform(0.2, 0.8, SIZE).repeat(4, 0).repeat(4, 1)[:SIZE[0], :SIZE[1]] * region
    monkeypatch.setattr(Chain, 'probability', lambda self, parts, region: p)
    mask, map = chain.mask(image, parts, p), chain.map(image)
    assert mask.any() and ((map > 0.5) == mask).all() and ((p > 0.5) != mask).any() and map.dtype == numpy.float32
    agree = (abs(p - 0.5) > 0.02) & ((p > 0.5) == mask)
    assert map[agree] == pytest.approx(p[agree], abs=1e-6)


@pytest.mark.parametrize('flip, asked', [(False, 1), (True, 2)])
def test_the_mirrored_image_is_asked_for_only_where_flips_are_averaged(rng, few_choices, flip, asked, monkeypatch):
    chain, (image, *_) = fitted_chain(rng, kind='graph-cut', classifier='logistic'), scenes(rng, subjects=1)[0]
    seen, before = [], chain.map
    monkeypatch.setattr(chain, 'map', lambda image: seen.append(image) or before(image))
    p, = ChainSegmenter(chain, Settings(flip_average=flip)).maps([image])
    ways = [before(image), before(image[:, ::-1])[:, ::-1]][:asked]
    assert len(seen) == asked and p.dtype == 'float32'
    numpy.testing.assert_allclose(p, numpy.mean(ways, axis=0), atol=1e-6)


def test_the_same_seed_gives_the_same_chain_and_threads_change_nothing(rng, few_choices):
    data, image = scenes(rng), scenes(rng, subjects=1)[0][0]
    found = []
    for seed, threads in (1, 1), (1, 2), (2, 1):
        with set_threads(threads):
            found.append(Chain(size=SIZE, examples=40, classifier='logistic').fit(*data, seed=seed).map(image))
    a, b, c = found
    assert numpy.array_equal(a, b) and not numpy.array_equal(a, c)


# --- Step by step -----------------------------------------------------------------------------------------------------

def test_log_odds_of_levels_and_places():
    image, mask = numpy.full((40, 60), 0.2), numpy.zeros((40, 60), bool)
    image[:, :30], mask[:, :30] = 0.8, True
    levels, place = log_odds([image, image], [mask, numpy.zeros_like(mask)])
    bright, dark = int(0.8 * 32), int(0.2 * 32)
    # Of 600 pixels at half size 300 are inside, all bright, and 900 outside, 300 of them bright; each of 32 bins begins with one.
    assert levels[bright] == pytest.approx(numpy.log((301 / 332) / (301 / 932))) == levels[0]
    assert levels[dark] == pytest.approx(numpy.log((1 / 332) / ((601 + 1) / 2 / 932)))
    assert place.shape == (20, 30) and place[10, 0] == pytest.approx(numpy.log(99)) and place[10, 29] == pytest.approx(-numpy.log(99))
    assert place[10, 14] == pytest.approx(-place[10, 15]) and place[10, 14] > 0     # of the empty mask nothing is counted


def test_the_less_likely_label_alone_is_paid_for():
    odds, edges = numpy.array([-1.5, 0.0, 2.0]), numpy.array([[0, 1], [1, 2]])
    assert cut(odds, edges, numpy.zeros(2)).tolist() == [False, True, True]
    assert cut(odds, edges, numpy.array([1.49, 3.0])).tolist() == [False, True, True] and cut(odds, edges, numpy.array([1.51, 3.0])).all()


def test_the_region_is_the_smallest_that_holds_enough(rng, monkeypatch):
    """Candidates that are squares of known recall: of those with 95 % the smallest is taken, else the one that holds most."""
    images, masks, who = scenes(rng)
    squares = [numpy.zeros(SIZE, bool) for _ in range(3)]
    squares[0][:], squares[1][4:-4, 4:-4], squares[2][18:20, 26:28] = True, True, True
    monkeypatch.setattr(chains, 'REGIONS', [(1.0, 0, float(n)) for n in range(3)])
    monkeypatch.setattr(Chain, '_regions', lambda self, image, choices: [squares[int(choice[2])] for choice in choices])
    assert Chain(size=SIZE).fit_region(images, masks, who).chosen['region'] == (1.0, 0, 1.0)
    squares[0][:], squares[1][:] = False, False
    assert Chain(size=SIZE).fit_region(images, masks, who).chosen['region'] == (1.0, 0, 2.0)


def test_regions_grow_with_lenience_and_specks_are_left_out(chain, rng):
    image = scenes(rng, subjects=1)[0][0]
    small, large, grown = chain._regions(image, [(1.0, 0, 0.0), (1.0, 0, 5.0), (1.0, 2, 0.0)])
    assert (small <= large).all() and (small <= grown).all() and small.sum() < grown.sum() and small.sum() < large.sum()
    chain.levels, chain.place = numpy.zeros(32), numpy.full((20, 28), -1.0)
    chain.place[3, 3], chain.place[10:15, 10:15], chain.place[12, 12] = 50, 50, -9
    chain_speck = chains.SPECK
    try:
        chains.SPECK = 2 / 560
        found = chain._regions(image, [(0.0, 0, 0.0)])[0]
    finally:
        chains.SPECK = chain_speck
    assert not found[6, 6] and found[20:30, 20:30].all() and found.sum() == 100     # one pixel is a speck, the hole is filled


@pytest.mark.parametrize('wavelet', TRANSFORMS)
def test_parts_of_the_superpixel_chain(rng, wavelet):
    image, region = scenes(rng, subjects=1)[0][0], numpy.zeros(SIZE, bool)
    region[5:25, 7:40] = True
    labels, features = Chain(size=SIZE, wavelet=wavelet).parts(image, region)
    whole = slic(median_filter(image, 3), 5)
    inside = numpy.flatnonzero(means(region, whole) >= 0.5)
    assert features.shape == (len(inside), 25) and 10 < len(inside) < whole.max()
    assert all((labels[whole == k] == n).all() for n, k in enumerate(inside)) and ((labels < 0) == ~numpy.isin(whole, inside)).all()
    expected = region_features(TRANSFORMS[wavelet].decompose(image), image, whole)[inside]
    assert numpy.array_equal(features[:, 1:], expected) and features[0, 0] == pytest.approx(numpy.log((whole == inside[0]).sum()))
    assert numpy.array_equal(Chain(size=SIZE, wavelet=wavelet, position=False).parts(image, region).features, features[:, :-2])


@pytest.mark.parametrize('size', [SIZE, (42, 54)])
def test_parts_of_the_graph_cut_chain(rng, size):
    image, region = scenes(rng, subjects=1, size=size)[0][0], numpy.zeros(size, bool)
    region[5:25, 7:41] = True
    labels, features = Chain(kind='graph-cut', size=size).parts(image, region)
    points = [(y, x) for y in range(2, size[0], 4) for x in range(2, size[1], 4) if region[y, x]]
    assert labels.shape == size and labels.max() == len(points) - 1 and features.shape == (len(points), 24)
    assert [labels[y, x] for y, x in points] == list(range(len(points))) and labels[2, 2] == -1
    assert numpy.array_equal(features, box_features(TRANSFORMS['median'].decompose(image), image, points))


def test_a_region_without_any_part_has_probability_0_and_no_mask(chain, rng):
    image, nowhere = scenes(rng, subjects=1)[0][0], numpy.zeros(SIZE, bool)
    parts = chain.parts(image, nowhere)
    p = chain.probability(parts, nowhere)
    assert not p.any() and (parts.labels == -1).all() and not chain.mask(image, parts, p).any()


def test_probabilities_of_parts_become_a_map(chain, rng):
    class Classifier:
        def predict(self, features, shift):
            class Found:
                probability = features[:, 0] + shift
            return Found
    labels = numpy.full(SIZE, -1)
    labels[:8, :8], labels[8:16, :8] = 0, 1
    chain.classifier, chain.chosen['shift'] = Classifier(), 0.25
    p = chain.probability(Parts(labels, numpy.array([[0.5], [0.125]])), labels >= 0)
    assert (p[:8, :8] == 0.75).all() and (p[8:16, :8] == 0.375).all() and p.sum() == 64 * 1.125
    chain.config['kind'] = 'graph-cut'
    p = chain.probability(Parts(labels, numpy.array([[0.5], [0.125]])), labels >= 0)
    assert p[1, 1] == pytest.approx(0.75) and 0.375 < p[8, 2] < p[7, 2] < 0.75 and not p[16:].any() and not p[:, 8:].any()


@pytest.mark.parametrize('step', [4, 5])
def test_the_second_cut_of_superpixels_has_the_least_energy_of_all_labelings(chain, step):
    chain.config['step'] = step
    labels = numpy.kron(numpy.arange(6).reshape(2, 3), numpy.ones((4, 4), int))
    image, odds = numpy.array([0.2, 0.25, 0.8, 0.2, 0.22, 0.9])[labels].astype('float32'), numpy.array([2.0, -0.8, -2.0, 1.5, -0.7, -3.0])
    p, smoothness, threshold = 1 / (1 + numpy.exp(-odds)), 1.5, 0.4
    found = chain._outline(image, Parts(labels, numpy.zeros((6, 1))), p[labels], smoothness, threshold)
    grey, edges = means(image, labels), [(0, 1), (1, 2), (3, 4), (4, 5), (0, 3), (1, 4), (2, 5)]
    squares = numpy.array([(grey[a] - grey[b])**2 for a, b in edges])

    def energy(chosen):
        return (16 / step**2 * sum(max(0, -s if c else s) for s, c in zip(odds - numpy.log(threshold / (1 - threshold)), chosen))
                + sum(smoothness * 4 / step * numpy.exp(-square / (2 * squares.mean())) * (chosen[a] != chosen[b]) for (a, b), square in zip(edges, squares)))
    best = min(itertools.product((False, True), repeat=6), key=energy)
    assert (found == numpy.array(best)[labels]).all() and sum(best) == 4 and sum(odds > numpy.log(0.4 / 0.6)) == 2


def test_what_lies_outside_the_region_is_background_and_a_border_with_it_costs(chain):
    chain.config['step'] = 4
    labels = numpy.full((4, 16), -1)
    labels[:, 4:8], labels[:, 8:12] = 0, 1                              # two parts in a row, the outside at either end
    image, p = numpy.full((4, 16), 0.5, 'float32'), numpy.zeros((4, 16))
    p[:, 4:12] = 1 / (1 + numpy.exp(-1.0))                              # log-odds 1 each, and 2 borders that cost `smoothness` each
    for smoothness, expected in (0.98, True), (1.02, False):
        found = chain._outline(image, Parts(labels, numpy.zeros((2, 1))), p, smoothness, 0.5)
        assert (found == ((labels >= 0) & expected)).all()
    labels[:], p[:] = 0, 1 / (1 + numpy.exp(-1.0))
    labels[0, 0], p[0, 0] = -1, 0                                       # an outside so small that it would go along with the rest
    assert (chain._outline(image, Parts(labels, numpy.zeros((1, 1))), p, 2.0, 0.5) == (labels == 0)).all()


def test_the_second_cut_of_pixels_smooths(rng, few_choices):
    chain = fitted_chain(rng, kind='graph-cut', classifier='logistic')
    p = numpy.full(SIZE, 0.2)
    p[10:30, 10:30] = 0.8
    p[18:20, 18:20] = 0.4                                               # a pixel of the half size that says otherwise
    image = numpy.full(SIZE, 0.5, 'float32')
    rough, smooth = (chain._outline(image, None, p, smoothness, 0.5) for smoothness in (0.0, 3.0))
    assert not rough[18, 18] and rough.sum() == 396 and smooth[18, 18] and smooth[12:28, 12:28].all() and not smooth[:10].any()
    assert chain._outline(image, None, p, 0.0, 0.1).all()


def test_what_is_kept_of_a_mask():
    mask, p = numpy.zeros((10, 10), bool), numpy.full((10, 10), 0.6)
    mask[1:6, 1:6], mask[3, 3], mask[8:, 8:], p[8, 8] = True, False, True, 0.9
    found = kept(mask, p, 0.25, 0.6)
    assert found[1:6, 1:6].all() and found.sum() == 25
    assert not kept(mask, p, 0.26, 0.6).any() and not kept(mask, p, 0.25, 0.61).any() and not kept(mask & False, p, 0.0, 0.0).any()


def test_examples_are_half_of_each_class_and_evenly_of_the_subjects(rng):
    target, who = rng.random(900) < 0.2, numpy.repeat(['1', '2', '3'], [600, 200, 100])
    chosen = evenly(target, who, 30, rng)
    assert len(set(chosen)) == 30 and target[chosen].sum() == 15
    assert all((who[chosen][target[chosen] == kind] == subject).sum() == 5 for kind in (True, False) for subject in '123')
    few = evenly(numpy.arange(900) < 4, who, 30, rng)                   # of one class there are not so many
    assert sorted(few[few < 4]) == [0, 1, 2, 3] and len(few) == 19


def test_settings_are_chosen_on_subjects_that_are_not_learnt_from(monkeypatch):
    masks, who = numpy.ones((100, 2, 2), bool), numpy.repeat(numpy.arange(10).astype(str), 10)
    learn, choose = inner_split(masks, who, 0)
    assert len(set(who[choose])) == 2 and not set(who[learn]) & set(who[choose]) and len(learn) == 80 and len(choose) == 20
    monkeypatch.setattr(chains, 'CHOOSE', 7)
    assert len(inner_split(masks, who, 0)[1]) == 7 and set(who[inner_split(masks, who, 0)[1]]) == set(who[choose])
    few = masks & numpy.isin(who, sorted({*who[learn]})[:2])[:, None, None]
    learn, choose = inner_split(few, who, 0)
    assert few[learn].any() and few[choose].any(), 'one of two subjects with foreground is chosen on, although none was drawn'
    with pytest.raises(ValueError, match='on one side no mask holds any foreground'):
        inner_split(few & (who == who[few.any(axis=(1, 2))][0])[:, None, None], who, 0)
    with pytest.raises(ValueError, match='on one side no mask'):
        inner_split(masks, numpy.full(100, 'a'), 0)


def test_halved_is_the_mean_of_squares(rng):
    image = rng.random((6, 8))
    assert halved(image) == pytest.approx(image.reshape(3, 2, 4, 2).mean(axis=(1, 3)))


# --- Files ------------------------------------------------------------------------------------------------------------

@every_kind
@pytest.mark.parametrize('classifier, position', [('gp', True), ('logistic', False)])
def test_a_chain_comes_back_from_its_file(rng, few_choices, tmp_path, kind, classifier, position):
    chain = fitted_chain(rng, kind=kind, classifier=classifier, position=position)
    nervenet.save(tmp_path / 'chain.npz', chain, what='nerve', mean_training_mask=numpy.eye(3))
    (back, extra), image = read_checkpoint(tmp_path / 'chain.npz'), scenes(rng, subjects=1)[0][0]
    assert numpy.array_equal(back.map(image), chain.map(image)) and back.config == chain.config
    assert extra['what'] == 'nerve' and numpy.array_equal(extra['mean_training_mask'], numpy.eye(3))
    assert numpy.array_equal(nervenet.load(tmp_path / 'chain.npz').map(image), chain.map(image))
    with numpy.load(tmp_path / 'chain.npz', allow_pickle=False) as file:
        assert json.loads(file['header'].tobytes())['config']['kind'] == kind


def read_checkpoint(path):
    return nervenet.load_checkpoint(path, CHAINS)


def test_where_a_network_is_expected_a_chain_is_one_clear_error(chain, tmp_path):
    nervenet.save(tmp_path / 'chain.npz', chain)
    for read in nervenet.load_checkpoint, Segmenter.from_file:
        with pytest.raises(CheckpointError, match="chain.npz: holds a model of class 'Chain'; expected one of UNet, .*Net$"):
            read(tmp_path / 'chain.npz')


def forge(path, header=lambda header: None, savez=numpy.savez, **arrays):
    with numpy.load(path) as file:
        content = dict(file)
    told = json.loads(content['header'].tobytes())
    told = header(told) or told
    content |= {'header': numpy.frombuffer(json.dumps(told).encode(), 'uint8'), **{f'model/{name}': array for name, array in arrays.items()}}
    savez(path, **{name: array for name, array in content.items() if array is not None})


def config(**changes):
    return dict(header=lambda header: header['config'].update(changes))


@pytest.mark.parametrize('forged, said', (
    (config(kind='deep'), "kind is 'deep'; expected one of graph-cut, superpixels"), (config(fit='bend'), "fit is 'bend'"),
    (config(size=[33, 40]), 'expected two even numbers'), (config(size=5), 'not iterable'), (config(size='ab'), 'size is a'), (config(size=[16.5, 40]), 'size is 16.5'),
    (config(size=[42, 56]), 'place has shape (20, 28), expected (21, 28)'), (config(size=[10**12, 56]), f'expected ({10**12 // 2}, 28)'),
    (config(step=0), 'step is 0'), (config(colour=1), "unexpected keyword argument 'colour'"), (config(classifier='gp'), 'is missing'),
    (dict(header=lambda header: header.update(version=2)), 'version 2'), (dict(header=lambda header: header.update(format='x')), 'not of the format'),
    (dict(header=lambda header: header.update(dtype='float32')), 'is float64, its header says float32'), (dict(header=lambda header: [1]), 'not of the format'),
    (dict(header=lambda header: header.pop('config') and None), 'config'), (dict(mask=numpy.array([1.0, 0, 0, 0])), 'what was learnt cannot be'),
    (dict(region=numpy.array([1, 1e9, 0])), 'what was learnt cannot be'), (dict(region=numpy.array([1, 2.5, 0])), 'what was learnt cannot be'),
    (dict(region=numpy.array([numpy.nan, 1, 0])), 'what was learnt cannot be'), (dict(region=numpy.array([-1.0, 1, 0])), 'what was learnt cannot be'),
    (dict(mask=numpy.array([-1, 0.5, 0, 0])), 'what was learnt cannot be'), (dict(mask=numpy.array([1, 1.0, 0, 0])), 'what was learnt cannot be'),
    (dict(shift=numpy.zeros(2)), 'shift has shape (2,)'), (dict(shift=numpy.array(numpy.inf)), 'what was learnt cannot be'),
    (dict(levels=None), 'levels is missing'), (dict(levels=numpy.zeros(31)), 'levels has shape (31,), expected (32,)'),
    (dict(place=numpy.full((20, 28), numpy.nan)), 'numbers that are not finite'), (dict(weights=numpy.zeros(3)), 'weights has shape (3,)'),
    (dict(weights=numpy.array([{}] * 26)), 'expected numbers'), (dict(scale=numpy.zeros(25)), 'scale from 0.0'),
    (dict(savez=numpy.savez_compressed), 'is compressed')))
def test_a_forged_file_is_one_clear_error(chain, tmp_path, forged, said):
    path = tmp_path / 'chain.npz'
    nervenet.save(path, chain)
    forge(path, **forged)
    with pytest.raises(CheckpointError, match=re.escape(said)) as error:
        read_checkpoint(path)
    assert str(error.value).startswith(f'{path}: ') and '\n' not in str(error.value)


def test_a_forged_process_is_refused(rng, few_choices, tmp_path):
    path = tmp_path / 'chain.npz'
    chain = fitted_chain(rng, classifier='gp')
    for forged in (dict(target=numpy.full(60, 2.0)), dict(target=numpy.zeros(3)), dict(target=numpy.array(1.0)), dict(x=numpy.full((60, 25), numpy.inf)),
                   dict(length_scales=numpy.full(25, -1.0)), dict(variance=numpy.array(-1.0))):
        nervenet.save(path, chain)
        forge(path, **forged)
        with pytest.raises(CheckpointError, match='its Chain cannot be built'):
            read_checkpoint(path)


def test_files_that_are_cut_or_none_are_one_clear_error(chain, tmp_path):
    path = tmp_path / 'chain.npz'
    with pytest.raises(CheckpointError, match='no such file'):
        read_checkpoint(path)
    nervenet.save(path, chain)
    whole = path.read_bytes()
    for content in b'', b'text', whole[:len(whole) // 2], whole[:-9], whole[:300] + b'\0\1\2' + whole[303:]:
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match='not a readable model file'):
            read_checkpoint(path)


@pytest.mark.parametrize('options, said', (
    (dict(kind='both'), "kind is 'both'"), (dict(wavelet='db4'), "wavelet is 'db4'; expected one of haar"), (dict(classifier='svm'), 'classifier'),
    (dict(size=(31, 40)), 'size is (31, 40); expected two even numbers'), (dict(size=(14, 40)), 'size is 14, expected a whole number of at least 16'), (dict(step=1), 'step is 1, expected'),
    (dict(examples=1), 'examples is 1, expected')))
def test_options_that_cannot_be_are_refused(options, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        Chain(**options)


# --- The scripts ------------------------------------------------------------------------------------------------------

@pytest.fixture
def data(tmp_path, rng):
    images, masks, who = scenes(rng, subjects=6)
    (tmp_path / 'data').mkdir()
    for n, (image, mask, subject) in enumerate(zip(images, masks, who)):
        for end, picture in ('', image), ('_mask', mask):
            Image.fromarray((picture * 255).astype('uint8')).save(tmp_path / 'data' / f'{subject}_{n}{end}.png')
    return tmp_path / 'data'


@every_kind
def test_the_script_fits_and_predict_takes_what_it_wrote(data, capsys, few_choices, kind, monkeypatch):
    run, options = data.parent / 'run', ['--data', data, '--size', '40x56', '--folds', '2', '--fold', '1', '--chain', kind, '--examples', '40']
    example('classical').main([str(option) for option in [*options, '--out', run, '--what', 'disc']])
    said = capsys.readouterr().out
    assert re.search(r'9 images of unseen subjects the region holds (8\d|9\d|100).\d% of the foreground', said)
    assert re.search(r'one step of the fit of the Gaussian process: \d+ examples \d.\d+ s, \d+ examples \d.\d+ s, \d+ examples \d.\d+ s', said)
    assert re.search(r'seconds: +region \d.\d+, parts \d.\d+, probability \d.\d+, mask \d.\d+ of computing per image', said)
    scores, config = (json.loads((run / 'fold_1' / name).read_text()) for name in ('scores.json', 'config.json'))
    assert scores[kind]['dice_pooled'] > 0.85 > scores['mean training mask']['dice_pooled'] > scores['empty mask']['dice_pooled'] == 0
    assert 0.9 < scores[kind]['geometric_mean'] <= 1 and scores['empty mask']['dice_per_image'] == pytest.approx(1 / 3)
    assert f'{kind} ' in (run / 'fold_1' / 'summary.txt').read_text() and 'region:' in (run / 'fold_1' / 'summary.txt').read_text()
    assert numpy.asarray(Image.open(run / 'fold_1' / 'cases.png')).shape[1] > 1000 and len((run / 'fold_1' / 'validation.csv').read_text().splitlines()) == 10
    assert set(config['validation_subjects']) == set(json.loads((run / 'split.json').read_text())['folds'][0]['subjects'])
    for again, where in (options, run / 'fold_1'), (options[:-6], run):                            # the second without --fold
        with pytest.raises(FileExistsError, match=f'{where}: exists and is not an empty folder; choose another --out, or remove what is there$'):
            example('classical').main([str(option) for option in [*again, '--out', run, '--what', 'disc']])
    for folder in run, run / 'fold_1':
        with pytest.raises(ValueError, match=f'{folder} is the run of a chain, which is fitted at once'):
            stored_options(folder)
    capsys.readouterr()

    out = data.parent / 'out'
    example('predict').main([str(word) for word in ['--model', run / 'fold_1' / 'chain.npz', '--input', data, '--held-out', '--output', out,
                                                    '--uncertainty']])
    said = capsys.readouterr().out
    assert f'{kind} chain, 40x56' in said and '9 images predicted, 6 with disc' in said and 'mean training mask' in said
    rows = [line.split(',') for line in (out / 'results.csv').read_text().splitlines()]
    assert len(rows) == 10 and min(float(row[6]) for row in rows[1:]) > 0.7
    mask = numpy.asarray(Image.open(out / f'{rows[1][0]}_mask.png'))
    assert mask.shape == SIZE and (mask > 0).sum() == int(rows[1][1])


def test_the_script_uses_a_given_split_and_summarises_folds(data, capsys, few_choices):
    split = data.parent / 'split.json'
    split.write_text('{"folds": [{"subjects": ["0", "3"]}, {"subjects": ["1", "2", "4", "5"]}]}')
    run = data.parent / 'run'
    example('classical').main([str(word) for word in ['--data', data, '--size', '40x56', '--folds', '2', '--split', split, '--out', run,
                                                      '--classifier', 'logistic', '--no-position', '--wavelet', 'haar']])
    assert json.loads((run / 'fold_1' / 'config.json').read_text())['validation_subjects'] == ['0', '3']
    scores = [json.loads((run / f'fold_{number}' / 'scores.json').read_text())['superpixels']['dice_pooled'] for number in (1, 2)]
    assert f'{sum(scores) / 2:.3f}' in (run / 'summary.txt').read_text() and '2 of 2 folds' in capsys.readouterr().out
    config = nervenet.load(run / 'fold_2' / 'chain.npz').config
    assert config['wavelet'] == 'haar' and config['classifier'] == 'logistic' and not config['position']


def test_memory_is_left_out_where_the_system_does_not_tell_it(monkeypatch):
    script = example('classical')
    assert script.resource is None or re.fullmatch(r', \d+\.\d GiB at most', script.memory())
    monkeypatch.setattr(script, 'resource', None)
    assert script.memory() == ''


@pytest.mark.parametrize('options, said', (
    (['--size', '41x56'], 'size is (41, 56); expected two even numbers'), (['--step', '1'], 'step is 1'), (['--fold', '2'], '--fold is 2 and --folds not given'),
    (['--split', 'x'], '--split needs --folds'), (['--data', 'nowhere'], 'no such folder'), (['--label', '2'], '--label has no meaning without --data'),
    (['--chain', 'deep'], 'invalid choice')))
def test_what_the_script_cannot_do_is_one_line(tmp_path, options, said):
    process = run_example('classical.py', *options, cwd=tmp_path)
    assert process.returncode and said in process.stderr.splitlines()[-1] and 'Traceback' not in process.stderr


def test_a_forged_chain_is_one_line_in_predict(data, chain, tmp_path):
    def refused(*models):
        with pytest.raises(CheckpointError) as error:
            example('predict').main([str(word) for word in ['--model', *models, '--input', data, '--output', tmp_path / 'out']])
        assert '\n' not in str(error.value) and str(error.value).startswith(str(models[0]))
        return str(error.value)
    for extra, said in ((dict(mean_training_mask=numpy.zeros(3)), 'mean training mask is not an array (40, 56)'),
                        (dict(intensity=[0.3, 'x']), 'as mean and deviation'), (dict(training_subjects='all'), 'its subjects are no list of names')):
        nervenet.save(tmp_path / 'forged.npz', chain, **extra)
        assert said in refused(tmp_path / 'forged.npz')
    nervenet.save(tmp_path / 'chain.npz', chain)
    assert 'predicts alone' in refused(tmp_path / 'chain.npz', tmp_path / 'forged.npz')
    forge(tmp_path / 'chain.npz', scale=numpy.zeros(25))
    process = run_example('predict.py', '--model', tmp_path / 'chain.npz', '--input', data, '--output', tmp_path / 'out')
    assert process.returncode and len(process.stderr.splitlines()) == 1 and process.stderr.startswith(f'predict.py: {tmp_path / "chain.npz"}: its Chain')
