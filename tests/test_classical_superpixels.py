import numpy
import pytest

from nervenet.images.components import regions
from nervenet.classical.superpixels import adjacency, clusters, joined, means, slic


@pytest.fixture
def image(rng):
    """Smooth grey, an edge and grain: clusters that fall apart, and stray pixels."""
    y, x = numpy.mgrid[:61, :83]
    return numpy.clip(0.4 + 0.2 * numpy.sin(x / 9) * numpy.cos(y / 7) + 0.3 * (x + y > 80) + 0.08 * rng.standard_normal((61, 83)), 0, 1)


def test_an_even_image_falls_into_its_grid():
    image = numpy.full((48, 72), 0.7)
    assert (slic(image, step=12) == 6 * (numpy.arange(48)[:, None] // 12) + numpy.arange(72) // 12).all()
    squares = 12 * 2 * ((numpy.arange(12) - 5.5)**2).sum()               # of distances from the middle of a cell, 4 × 6 cells
    assert clusters(image, 12, 6.0, 1)[1] == pytest.approx([24 * squares * (6 / 12)**2])


@pytest.mark.parametrize('column', range(22, 31))
@pytest.mark.parametrize('turned', [False, True])
def test_no_superpixel_crosses_a_step(column, turned):
    image = numpy.broadcast_to((numpy.arange(60) >= column).astype(float), (40, 60))
    image = image.T if turned else image
    labels = slic(image, step=10, compactness=1.0)
    assert not set(labels[image == 0]) & set(labels[image == 1])
    assert labels.max() >= 20


@pytest.mark.parametrize('compactness', [1.0, 10.0, 40.0])
def test_every_superpixel_is_connected_large_enough_and_numbered_without_gaps(image, compactness):
    raw, _ = clusters(image, 8, compactness, 5)
    assert compactness > 30 or regions(raw).max() > raw.max()            # else there is nothing to mend
    labels = slic(image, 8, compactness, 5)
    assert (labels == regions(labels)).all()                             # each label one 4-connected region, in reading order
    areas = numpy.bincount(labels.ravel())
    assert areas.sum() == image.size and areas.min() >= 16 and labels.max() > 30


def test_the_objective_never_rises(image):
    for compactness in 0.5, 10.0, 100.0:
        labels, objectives = clusters(image, 8, compactness, 15)
        assert (numpy.diff(objectives) <= 1e-12 * objectives[0]).all() and objectives[-1] < 0.95 * objectives[0]
        assert 0 <= labels.min() and labels.max() < 8 * 10


@pytest.mark.parametrize('m', [0.5, 10.0])
def test_the_objective_is_the_sum_of_distances_to_the_best_of_the_centres_nearby(image, m):
    """One more iteration by hand, in loops: the paper's D², over the nine centres around a pixel's cell."""
    rows, columns = 8, 10
    before, _ = clusters(image, 8, m, 3)
    labels, objectives = clusters(image, 8, m, 4)
    (H, W), grey = image.shape, 100 * image
    points = numpy.stack([grey, *numpy.mgrid[:H, :W]], -1)
    centres = numpy.array([points[before == k].mean(axis=0) for k in range(rows * columns)])
    squared_step = H * W / (rows * columns)
    total = 0.0
    for y, x in numpy.ndindex(H, W):
        near = [k for k in range(rows * columns) if abs(k // columns - y * rows // H) <= 1 and abs(k % columns - x * columns // W) <= 1]
        d = [(grey[y, x] - centres[k, 0])**2 + m**2 / squared_step * ((y - centres[k, 1])**2 + (x - centres[k, 2])**2) for k in near]
        total += min(d)
        assert labels[y, x] == near[int(numpy.argmin(d))]
    assert objectives[-1] == pytest.approx(total)


def test_clusters_may_be_tiny_and_even_empty(rng):
    labels, objectives = clusters((rng.random((12, 12)) < 0.15).astype(float), 2, 5.0, 6)
    pixels = numpy.bincount(labels.ravel(), minlength=36)
    assert pixels.min() == 0 and numpy.median(pixels) < 6 and objectives[-1] < 0.8 * objectives[0]


def test_first_centres_move_off_edges():
    """A bright line through the middles of the cells: each centre begins beside it, where grey is even."""
    image = numpy.zeros((30, 30))
    image[:, 4] = 1
    labels, _ = clusters(image, 10, 100.0, 1)                            # so compact that only the places decide
    assert (labels[:, 0] != labels[:, 29]).all()
    shifted = numpy.flatnonzero(numpy.diff(labels[5]))[0]
    even = numpy.flatnonzero(numpy.diff(clusters(numpy.zeros((30, 30)), 10, 100.0, 1)[0][5]))[0]
    assert even == 9 and shifted != even


def test_compactness_trades_straight_outlines_for_even_grey(image):
    def outline_and_spread(m):
        labels, _ = clusters(image, 8, m, 10)
        return adjacency(labels)[1].sum(), (image - means(image, labels)[labels]).std()
    loose, compact = outline_and_spread(2.0), outline_and_spread(60.0)
    assert loose[0] > compact[0] and loose[1] < compact[1]


@pytest.mark.parametrize('shape', [(1, 1), (1, 40), (5, 5), (7, 90)])
def test_images_smaller_than_a_step_are_fine(rng, shape):
    labels = slic(rng.random(shape), step=12)
    assert labels.shape == shape and (labels == regions(labels)).all()


def test_stray_pieces_go_to_the_neighbour_with_the_longest_border():
    labels = numpy.array([[0, 0, 0, 1, 1, 1],
                          [0, 0, 2, 1, 1, 1],
                          [0, 0, 2, 1, 1, 0],
                          [0, 0, 0, 1, 1, 1]])
    halves = numpy.broadcast_to([0, 0, 0, 1, 1, 1], (4, 6))
    assert (joined(labels, 4) == halves).all()
    assert (joined(labels[:, ::-1], 4) == halves).all()                  # whatever the neighbours' numbers are
    assert joined(labels, 2).max() == 2                                  # the piece of two pixels is large enough now
    assert joined(labels, 1).max() == 3                                  # and all four are
    assert (joined(labels, 1000) == 0).all()                             # nobody is left to go to


def test_the_smallest_goes_first_and_what_has_grown_enough_stays():
    labels = numpy.array([[0, 1, 2, 2, 3, 3, 3, 3]])
    # 0 joins 1, which is then as large as 2; 1 and 2 are three and four pixels with each other, and 4 is enough.
    assert joined(labels, 4).tolist() == [[0, 0, 0, 0, 1, 1, 1, 1]]
    assert joined(labels, 2).tolist() == [[0, 0, 1, 1, 2, 2, 2, 2]]


def test_what_has_joined_brings_its_borders_along():
    labels = numpy.array(4 * [[0, 0, 1, 1]] + [[2, 2, 1, 1]] + 2 * [[2, 3, 1, 1]])
    # 2 has two sides in common with 0 and one with 1; but 3 joins it, and has two with 1.
    assert (joined(labels, 8) == 4 * [[0, 0, 1, 1]] + 3 * [[1, 1, 1, 1]]).all()


def test_adjacency_counts_sides():
    labels = numpy.array([[0, 0, 1], [2, 0, 1], [2, 2, 1]])
    edges, lengths = adjacency(labels)
    assert edges.tolist() == [[0, 1], [0, 2], [1, 2]] and lengths.tolist() == [2, 3, 1]
    edges, lengths = adjacency(numpy.zeros((2, 3), int))
    assert edges.shape == (0, 2) and lengths.shape == (0,)


def test_means_of_maps_and_of_many_features(rng):
    labels, values = rng.integers(0, 5, (9, 8)), rng.random((9, 8, 3))
    labels[labels == 2] = 3
    expected = [values[labels == k].mean(axis=0) if k != 2 else [numpy.nan] * 3 for k in range(5)]
    assert means(values, labels) == pytest.approx(numpy.array(expected), nan_ok=True)
    assert means(values[..., 0], labels) == pytest.approx(numpy.array(expected)[:, 0], nan_ok=True)
    assert means(labels == 4, labels)[[0, 4]].tolist() == [0, 1]


@pytest.mark.parametrize('call, message', [
    (lambda: slic(numpy.full((9, 9), 128, numpy.uint8)), 'values from 128 to 128; expected 0 to 1: divide grey levels by 255'),
    (lambda: slic(numpy.full((9, 9), 128.0)), 'values from 128 to 128; expected 0 to 1'),
    (lambda: slic(numpy.full((9, 9), numpy.nan)), 'each a finite number'),
    (lambda: slic(numpy.full((9, 9), -0.1)), 'values from -0.1'),
    (lambda: slic(numpy.zeros((9, 9, 1))), r'\(9, 9, 1\)'),
    (lambda: slic(numpy.zeros((0, 9))), r'\(0, 9\)'),
    (lambda: slic(numpy.zeros((9, 9)), step=1), 'step is 1'),
    (lambda: slic(numpy.zeros((9, 9)), compactness=0), 'compactness is 0'),
    (lambda: slic(numpy.zeros((9, 9)), iterations=0), 'iterations is 0'),
    (lambda: adjacency(numpy.zeros((3, 3))), 'labels have shape'),
    (lambda: adjacency(numpy.full((3, 3), -1)), 'whole numbers from 0 up'),
    (lambda: means(numpy.zeros((3, 4)), numpy.zeros((3, 3), int)), r'values \(3, 4\) and labels \(3, 3\)'),
])
def test_bad_input_is_one_clear_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()
