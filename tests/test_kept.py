"""What is prepared once for inference is never out of date."""
import copy
import gc
import pickle
import weakref

import numpy
import pytest

import nervenet
from nervenet.convolution import kept
from nervenet.engine import paths
from nervenet.networks import fusing
from nervenet.networks.blocks import DoubleConv
from nervenet.train import predict, train_step


@pytest.fixture(autouse=True)
def maps_are_few_pixels(monkeypatch):
    """All weights of a network are prepared here, however large the map."""
    monkeypatch.setattr(fusing, 'FEW_PIXELS', 10**9)


@pytest.fixture
def made(monkeypatch):
    """Count what is made anew of a weight."""
    names, call = [], kept.Kept.__call__

    def counted(self, name, make):
        return call(self, name, lambda: names.append(name) or make())
    monkeypatch.setattr(kept.Kept, '__call__', counted)
    return names


def network(rng, norm='batch'):
    model = nervenet.UNet(base_channels=6, depth=2, norm=norm, rng=rng)
    x = rng.random((2, 40, 52, 1), dtype='float32')
    for _ in range(2):
        model.forward(x)                                            # running statistics of its own
    return model.eval(), x


def expected(model, x):
    with nervenet.plain():
        return predict(model, x)


@pytest.mark.parametrize('norm', ['batch', None])
def test_weights_are_prepared_once(rng, made, norm):
    model, x = network(rng, norm)
    first = predict(model, x)
    count = len(made)
    assert {'winograd_1d'} | ({'folded'} if norm else set()) <= {name if isinstance(name, str) else name[0] for name in made}
    for _ in range(3):
        assert numpy.array_equal(predict(model, x), first)
    assert len(made) == count
    numpy.testing.assert_allclose(first, expected(model, x), rtol=1e-4)


def step(model, x):
    loss, optimizer = nervenet.DiceLoss(), nervenet.SGD(model.parameters(), 0.5)
    train_step(model.train(), loss, optimizer, x, (x > 0.5).astype('float32'))
    model.eval()


CHANGES = {
    'a step': step,
    'loading': lambda model, x: model.load_state_dict({name: 1.3 * array for name, array in model.state_dict().items()}),
    'writing into an array': lambda model, x: model.ups[0].conv1.params['weight'].__imul__(-1),
    'writing one value through a view': lambda model, x: model.stem.conv2.params['weight'][1].T.__setitem__((2, 1, 0), 3),
    'turning a kernel': lambda model, x: model.downs[0].conv2.params['weight'].__setitem__(
        ..., model.downs[0].conv2.params['weight'][::-1].copy()),
    'another array': lambda model, x: model.ups[1].conv1.params.update(weight=2 * model.ups[1].conv1.params['weight']),
    'a running mean': lambda model, x: model.downs[1].norm1.buffers['running_mean'].__iadd__(1),
    'a running variance': lambda model, x: model.downs[1].norm1.buffers['running_var'].__imul__(4),
    'the weight of a norm': lambda model, x: model.stem.norm2.params['weight'].__setitem__(0, -1),
    'the bias of a norm': lambda model, x: model.stem.norm2.params['bias'].__setitem__(0, 1)}


@pytest.mark.parametrize('change', CHANGES.values(), ids=CHANGES)
def test_what_was_prepared_is_not_used_after(change, rng):
    model, x = network(rng)
    before = predict(model, x)
    change(model, x)
    now = predict(model, x)
    assert abs(now - before).max() > 1e-4
    numpy.testing.assert_allclose(now, expected(model, x), rtol=1e-3, atol=1e-5)


def test_an_old_view_of_a_weight_still_reaches_the_prediction(rng):
    model, x = network(rng, norm=None)
    view = model.stem.conv2.params['weight'].reshape(-1)[5:]
    predict(model, x)
    view *= 2
    numpy.testing.assert_allclose(predict(model, x), expected(model, x), rtol=1e-4)


def test_what_is_prepared_is_neither_copied_nor_saved_and_goes_with_the_model_or_when_it_learns(rng, monkeypatch):
    monkeypatch.setattr(kept, '_of', weakref.WeakKeyDictionary())
    model, x = network(rng)
    predict(model, x)
    layers = len(kept._of)
    assert layers > 0
    other, size = copy.deepcopy(model), len(pickle.dumps(model))
    assert len(kept._of) == layers and size < 1.5 * sum(array.nbytes for array in model.state_dict().values()) + 50_000
    numpy.testing.assert_allclose(predict(other, x), predict(model, x), rtol=1e-6)
    assert len(kept._of) == 2 * layers
    del other
    gc.collect()
    assert len(kept._of) == layers
    step(model, x)
    assert len(kept._of) == 0


def test_a_layer_that_computes_its_own_weight_is_served_as_it_computes(rng):
    """Nothing is kept for a weight given to `apply` but under the arrays it was made of."""
    block, x = DoubleConv(6, 6, None, rng=rng, dtype=float).eval(), rng.random((2, 40, 44, 6))
    with paths.paths_taken() as taken:
        y = block.forward(x)
    assert 'prepared once' in taken and 'winograd_1d' in taken
    conv = block.conv1
    other = conv.apply(x, 2 * conv.params['weight'], conv.params['bias'])
    numpy.testing.assert_allclose(other, 2 * conv.apply(x, conv.params['weight'], 0 * conv.params['bias']) + conv.params['bias'], rtol=1e-9)
    assert numpy.array_equal(block.forward(x), y)


def test_eps_of_a_norm_counts_too(rng):
    model, x = network(rng)
    before = predict(model, x)
    model.stem.norm1.eps = 10.0
    assert abs(predict(model, x) - before).max() > 1e-3
    numpy.testing.assert_allclose(predict(model, x), expected(model, x), rtol=1e-3, atol=1e-5)


def test_another_way_to_cut_the_input_is_another_preparation(rng):
    model, x = network(rng)
    before = predict(model, x)
    concat = model.ups[1].concat
    forward = concat.forward
    concat.forward = lambda *pair: forward(*pair)                   # watched, it is computed, and its convolution gets one array
    numpy.testing.assert_allclose(predict(model, x), before, rtol=1e-4)
    del concat.forward
    assert numpy.array_equal(predict(model, x), before)


def test_what_was_made_of_a_weight_that_changed_meanwhile_is_not_kept():
    weight = numpy.ones(4)
    one = kept.Kept([weight])
    assert one('double', lambda: (weight.__imul__(3), 2 * weight)[1])[0] == 6
    weight /= 3
    assert one.holds([weight]) and one('double', lambda: 2 * weight)[0] == 2


def test_for_maps_of_many_pixels_nothing_is_kept(rng, monkeypatch):
    monkeypatch.setattr(kept, '_of', weakref.WeakKeyDictionary())
    monkeypatch.setattr(fusing, 'FEW_PIXELS', 2 * 10 * 13)
    model, x = network(rng)
    y = predict(model, x)
    assert {*kept._of} == {model.downs[1].conv1, model.downs[1].conv2}
    numpy.testing.assert_allclose(y, expected(model, x), rtol=1e-4)
