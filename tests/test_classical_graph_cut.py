import itertools

import numpy
import pytest

from nervenet.classical.graph_cut import (components, contrast_weights, dilate, energy, fill_holes, minimise_on_graph, minimise_on_grid,
                                          regions, scaled)

WAYS = {4: [(0, 1), (1, 0)], 8: [(0, 1), (1, 0), (1, 1), (1, -1)]}


def labelings(count):
    return numpy.array(list(itertools.product([False, True], repeat=count)))


def by_hand(labels, unary0, unary1, weights, neighbours):
    """The energies of one labeling (H, W), or of many (…, H, W), pixel by pixel and pair by pair."""
    H, W = unary0.shape
    total = sum(numpy.where(labels[..., y, x], unary1[y, x], unary0[y, x]) for y, x in numpy.ndindex(H, W))
    for k, (down, right) in enumerate(WAYS[neighbours]):
        for y, x in numpy.ndindex(H, W):
            if y + down < H and 0 <= x + right < W:
                total = total + weights[k, y, x] * (labels[..., y, x] != labels[..., y + down, x + right])
    return total


def best(energies, labels):
    """The least energy, and the union of all labelings that have it, which has it too."""
    return energies.min(), labels[energies == energies.min()].any(axis=0)


def random_grid(rng, shape, neighbours, high=30):
    weights = rng.integers(0, max(2, high // 3), (len(WAYS[neighbours]), *shape))       # also where they lead out of the image
    return rng.integers(-high, high, shape), rng.integers(-high, high, shape), weights


@pytest.mark.parametrize('neighbours', [4, 8])
def test_no_mask_of_nine_pixels_has_less_energy(rng, neighbours):
    masks = labelings(9).reshape(-1, 3, 3)
    sizes = set()
    for trial in range(60):
        grid = random_grid(rng, (3, 3), neighbours, high=(6, 30)[trial % 2])         # small numbers make ties
        energies = by_hand(masks, *grid, neighbours)
        least, union = best(energies, masks)
        labels, flow = minimise_on_grid(*grid, neighbours)
        assert type(flow) is int and flow == least
        assert labels.dtype == bool and (labels == union).all()
        sizes.add(int(labels.sum()))
    assert len(sizes) >= 8                                              # the cases were not all of one kind


@pytest.mark.parametrize('neighbours', [4, 8])
@pytest.mark.parametrize('shape', [(1, 1), (1, 17), (17, 1), (2, 2), (23, 31)])
def test_flow_is_the_energy_of_the_labels_to_the_last_unit(rng, shape, neighbours):
    for high in 3, 50, 10**9:
        unary0, unary1, weights = random_grid(rng, shape, neighbours, high)
        labels, flow = minimise_on_grid(unary0, unary1, weights, neighbours)
        assert flow == energy(labels, unary0, unary1, weights, neighbours) == by_hand(labels, unary0, unary1, weights, neighbours)


def test_flow_finds_long_ways_through_an_image(rng):
    """A flow from the left edge to the right one, through a wall with a gap: the cut is the gap."""
    unary0, unary1, weights = numpy.zeros((21, 30), int), numpy.zeros((21, 30), int), numpy.full((2, 21, 30), 100)
    unary0[:, 0] = unary1[:, -1] = 10**6
    weights[0, :, 17] = 0
    weights[0, 18:20, 17] = 7, 8
    labels, flow = minimise_on_grid(unary0, unary1, weights)
    assert flow == 15 and (labels == (numpy.arange(30) <= 17)).all()


def test_inputs_stay_as_they_are(rng):
    grid = random_grid(rng, (5, 6), 4)
    before = [array.copy() for array in grid]
    minimise_on_grid(*grid)
    assert all((a == b).all() for a, b in zip(grid, before))


def test_two_pixels_by_hand():
    unary0, unary1, weight = numpy.array([[3.0, 2.0]]), numpy.array([[1.0, 4.0]]), 1.5
    energies = {labels: energy(numpy.array([labels], bool), unary0, unary1, weight) for labels in itertools.product([0, 1], repeat=2)}
    assert energies == {(1, 1): 5.0, (1, 0): 4.5, (0, 1): 8.5, (0, 0): 5.0}
    labels, least = minimise_on_grid(scaled(unary0), scaled(unary1), scaled(weight))
    assert labels.tolist() == [[True, False]] and least == 450
    labels, least = minimise_on_graph(scaled(unary0[0]), scaled(unary1[0]), [(0, 1)], scaled([weight]))
    assert labels.tolist() == [True, False] and least == 450


@pytest.mark.parametrize('neighbours', [4, 8])
def test_without_weights_each_pixel_decides_for_itself_and_with_large_ones_all_together(rng, neighbours):
    unary0, unary1, _ = random_grid(rng, (9, 11), neighbours)
    labels, least = minimise_on_grid(unary0, unary1, 0, neighbours)
    assert (labels == (unary1 <= unary0)).all() and least == numpy.minimum(unary0, unary1).sum()
    for advantage in -1, 1:
        unary0[0, 0] += unary1.sum() - unary0.sum() + advantage          # what all pixels pay as background, beyond what they pay as object
        labels, least = minimise_on_grid(unary0, unary1, 10**6, neighbours)
        assert (labels == (advantage > 0)).all() and least == min(unary0.sum(), unary1.sum())


def test_contrast_weights_of_a_small_image_by_hand():
    image = numpy.array([[0, 2], [4, 2]], numpy.uint8)                   # unsigned: differences must not wrap around
    right, down = contrast_weights(image)
    variance = (4 + 4 + 16 + 0) / 4
    assert right == pytest.approx(numpy.array([[numpy.exp(-4 / (2 * variance)), 0], [numpy.exp(-4 / (2 * variance)), 0]]))
    assert down == pytest.approx(numpy.array([[numpy.exp(-16 / (2 * variance)), 1], [0, 0]]))
    right, down, falling, rising = contrast_weights(image, 8)
    variance = (4 + 4 + 16 + 0 + 4 + 4) / 6
    assert right[0, 0] == pytest.approx(numpy.exp(-4 / (2 * variance)))
    assert falling == pytest.approx(numpy.array([[numpy.exp(-4 / (2 * variance)) / 2**0.5, 0], [0, 0]]))
    assert rising == pytest.approx(numpy.array([[0, numpy.exp(-4 / (2 * variance)) / 2**0.5], [0, 0]]))


def test_contrast_weights_do_not_depend_on_contrast(rng):
    image = rng.random((6, 7))
    assert contrast_weights(image, 8) == pytest.approx(contrast_weights(10 * image + 3, 8))
    flat = contrast_weights(numpy.full((3, 4), 0.3))
    assert (flat[0, :, :-1] == 1).all() and (flat[0, :, -1] == 0).all() and (flat[1, :-1] == 1).all() and (flat[1, -1] == 0).all()
    assert (contrast_weights(numpy.ones((1, 1)), 8) == 0).all()


def test_outlines_follow_edges(rng):
    """Where the data say nothing but at two seeds, the outline lies on the edge between them, wherever the seeds are."""
    image = numpy.where(numpy.arange(20) < 13, 0.2, 0.8) + 0.02 * rng.random((12, 20))
    unary0, unary1 = numpy.zeros((2, 12, 20), int)
    unary0[4:8, 1] = unary1[4:8, 18] = 10**6
    for neighbours in 4, 8:
        labels, _ = minimise_on_grid(unary0, unary1, scaled(contrast_weights(image, neighbours)), neighbours)
        assert (labels == (numpy.arange(20) < 13)).all()


# --- On a graph -------------------------------------------------------------------------------------------------------

def test_no_labels_of_six_nodes_have_less_energy(rng):
    every = labelings(6)
    for trial in range(60):
        high = (4, 30)[trial % 2]
        edges = numpy.array([pair for pair in itertools.combinations(range(6), 2) if rng.random() < 0.5] + [(3, 1), (1, 3), (2, 2)])
        unary0, unary1, weights = rng.integers(-high, high, 6), rng.integers(-high, high, 6), rng.integers(0, high, len(edges))
        energies = (numpy.where(every, unary1, unary0).sum(axis=1)
                    + (weights * (every[:, edges[:, 0]] != every[:, edges[:, 1]])).sum(axis=1))
        least, union = best(energies, every)
        labels, flow = minimise_on_graph(unary0, unary1, edges, weights)
        assert type(flow) is int and flow == least and labels.dtype == bool and (labels == union).all()


def test_what_was_sent_the_wrong_way_can_be_sent_back():
    """A chain c, b, a, d, e of pipes 10 wide, but 5 from b to a. The sink takes 5 from b and 10 from e; 10 come into c and 5 into a.

    The shortest way for the 5 of a ends in b. Then the 10 of c must flow to e, against those 5. The order of the nodes decides which way is
    found first, so all orders are tried.
    """
    for order in itertools.permutations(range(5)):
        c, b, a, d, e = order
        unary0, unary1 = numpy.zeros((2, 5), int)
        unary0[[c, a]], unary1[[b, e]] = (10, 5), (5, 10)
        _, flow = minimise_on_graph(unary0, unary1, [(c, b), (b, a), (a, d), (d, e)], [10, 5, 10, 10])
        assert flow == 15


def test_grid_and_graph_agree(rng):
    """Two algorithms that share nothing, on an image too large to try all masks."""
    H, W = 14, 17
    unary0, unary1, weights = random_grid(rng, (H, W), 8)
    edges, kept = [], []
    for k, (down, right) in enumerate(WAYS[8]):
        for y, x in numpy.ndindex(H, W):
            if y + down < H and 0 <= x + right < W:
                edges.append((y * W + x, (y + down) * W + x + right))
                kept.append(weights[k, y, x])
    on_grid, energy_on_grid = minimise_on_grid(unary0, unary1, weights, 8)
    on_graph, energy_on_graph = minimise_on_graph(unary0.ravel(), unary1.ravel(), edges, kept)
    assert energy_on_grid == energy_on_graph and (on_grid.ravel() == on_graph).all() and 0 < on_grid.sum() < H * W


def test_a_graph_may_have_no_edges():
    labels, least = minimise_on_graph([1, 5], [2, 3], numpy.zeros((0, 2), int), [])
    assert labels.tolist() == [False, True] and least == 4


# --- Masks ------------------------------------------------------------------------------------------------------------

def flood(labels):
    """Regions by flood fill, numbered in reading order."""
    number, count = numpy.full(labels.shape, -1), 0
    for start in numpy.ndindex(labels.shape):
        if number[start] < 0:
            waiting = [start]
            while waiting:
                y, x = waiting.pop()
                if (0 <= y < labels.shape[0] and 0 <= x < labels.shape[1] and number[y, x] < 0 and labels[y, x] == labels[start]):
                    number[y, x] = count
                    waiting += [(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)]
            count += 1
    return number


def spiral(size):
    """A way of one pixel's width from the corner to the middle."""
    mask, (y, x), (down, right) = numpy.zeros((size, size), bool), (0, 0), (0, 1)
    while not mask[y, x]:
        mask[y, x] = True
        ahead = y + 2 * down, x + 2 * right
        if not (0 <= y + down < size and 0 <= x + right < size) or (
                0 <= ahead[0] < size and 0 <= ahead[1] < size and mask[ahead]):
            down, right = right, -down
        y, x = y + down, x + right
    return mask


@pytest.mark.parametrize('values', [1, 2, 3])
def test_regions_are_those_of_a_flood_fill(rng, values):
    for shape in (1, 1), (1, 9), (9, 1), (13, 18), (40, 30):
        labels = rng.integers(0, values, shape)
        assert (regions(labels) == flood(labels)).all()


def test_components_are_numbered_in_reading_order_and_the_background_is_0(rng):
    for mask in spiral(25), ~spiral(24), rng.random((40, 50)) < 0.6, numpy.zeros((4, 5), bool), numpy.ones((4, 5), bool):
        flooded, expected = flood(mask), numpy.zeros(mask.shape, int)
        for number, region in enumerate(numpy.unique(flooded[mask]), 1):
            expected[mask & (flooded == region)] = number
        assert (components(mask) == expected).all()
    assert components(spiral(25)).max() == 1 and spiral(25).sum() > 300
    assert components(numpy.eye(3, dtype=bool)).max() == 3               # a diagonal joins nothing


def test_fill_holes_fills_what_the_edge_cannot_reach(rng):
    mask = numpy.array([[0, 1, 1, 1, 0, 0],
                        [1, 0, 0, 1, 1, 1],
                        [1, 1, 0, 1, 0, 1],
                        [0, 1, 1, 1, 1, 1],
                        [0, 0, 1, 0, 1, 0]], bool)
    filled = mask.copy()
    filled[1, 1:3] = filled[2, 2] = filled[2, 4] = True
    assert (fill_holes(mask) == filled).all()
    for trial in range(20):
        mask = rng.random((7, 8)) < 0.6
        flooded = flood(numpy.pad(mask, 1))                              # a frame of background joins all that the edge can reach
        assert (fill_holes(mask) == (flooded != flooded[0, 0])[1:-1, 1:-1]).all()


def test_dilate_grows_by_a_disc(rng):
    mask = rng.random((11, 14)) < 0.03
    y, x = numpy.nonzero(mask)
    rows, columns = numpy.mgrid[:11, :14]
    squared = ((rows[..., None] - y)**2 + (columns[..., None] - x)**2).min(axis=-1)
    for radius in 0, 1, 2, 5, 20:
        assert (dilate(mask, radius) == (squared <= radius**2)).all()


# --- What is refused --------------------------------------------------------------------------------------------------

ONES = numpy.ones((3, 4), int)


@pytest.mark.parametrize('call, message', [
    (lambda: minimise_on_grid(ONES, ONES[:2], 1), r'unary0 \(3, 4\) and unary1 \(2, 4\) must have one shape'),
    (lambda: minimise_on_grid(ONES[0], ONES[0], 1), r'must have one shape, \(H, W\)'),
    (lambda: minimise_on_grid(ONES[:0], ONES[:0], 1), 'not be empty'),
    (lambda: minimise_on_grid(ONES * 0.5, ONES, 1), r'unary0 is of dtype float64; expected integers.*scaled\(unary0\)'),
    (lambda: minimise_on_grid(ONES, ONES, 0.5), 'weights is of dtype float64'),
    (lambda: minimise_on_grid(ONES, ONES, -1), 'a weight is -1'),
    (lambda: minimise_on_grid(ONES, ONES, numpy.ones((4, 3, 4), int)), r'weights \(4, 3, 4\) do not fit 4 neighbours'),
    (lambda: minimise_on_grid(ONES, ONES, 1, 6), 'neighbours is 6; expected 4 or 8'),
    (lambda: minimise_on_grid(ONES * 2**61, ONES, 1), 'the energies add up to'),
    (lambda: minimise_on_grid(ONES, ONES, 2**60), 'the energies add up to'),
    (lambda: minimise_on_graph([1, 2], [1, 2], [(0, 2)], [1]), 'one pair of nodes from 0 to 1'),
    (lambda: minimise_on_graph([1, 2], [1, 2], [(0, -1)], [1]), 'one pair of nodes from 0 to 1'),
    (lambda: minimise_on_graph([1, 2], [1, 2], [(0, 1)], [1, 2]), r'edges \(1, 2\)'),
    (lambda: minimise_on_graph([1, 2], [1, 2], [(0.0, 1.0)], [1]), 'float64'),
    (lambda: minimise_on_graph(ONES, ONES, [(0, 1)], [1]), r'must have one shape, \(nodes\)'),
    (lambda: energy(ONES > 0, ONES, ONES[:2], 1), 'differ in shape'),
    (lambda: energy(ONES, ONES, ONES, 1), 'of bool'),
    (lambda: scaled([1.0, numpy.inf]), 'keep probabilities away from 0'),
    (lambda: scaled(numpy.nan), 'expected finite ones'),
    (lambda: contrast_weights(numpy.ones((2, 3, 1))), r'expected \(H, W\) of finite numbers'),
    (lambda: contrast_weights(numpy.full((2, 3), numpy.nan)), 'finite numbers'),
    (lambda: contrast_weights(numpy.ones((2, 3)), 5), 'neighbours is 5'),
    (lambda: components(255 * ONES), 'mask has shape .* and dtype int64; expected'),
    (lambda: fill_holes(ONES[0] > 0), r'mask has shape \(4,\)'),
    (lambda: dilate(ONES > 0, -1), 'radius is -1'),
    (lambda: dilate(ONES > 0, 1.5), 'radius is 1.5'),
    (lambda: regions(ONES[0]), r'\(4,\); expected \(H, W\)'),
])
def test_bad_input_is_one_clear_error(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert '\n' not in str(error.value)


def test_scaled_rounds_to_hundredths():
    assert scaled([0.004, 0.006, -1.239, 2]).tolist() == [0, 1, -124, 200] and scaled(1.5).dtype == numpy.int64
    assert scaled(1.26, factor=10) == 13
