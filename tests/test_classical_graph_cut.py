import collections
import itertools

import numpy
import pytest

from nervenet.classical import graph_cut
from nervenet.classical.graph_cut import contrast_weights, energy, grid, minimise
from nervenet.images.components import dilate, largest_component, regions

WAYS = {4: [(0, 1), (1, 0)], 8: [(0, 1), (1, 0), (1, 1), (1, -1)]}


def as_graph(weights, neighbours):
    """Return (edges, weights) of a grid, from weights (directions, H, W), pixel by pixel."""
    _, H, W = weights.shape
    pairs = [((y * W + x, (y + down) * W + x + right), weights[k, y, x]) for k, (down, right) in enumerate(WAYS[neighbours])
             for y, x in numpy.ndindex(H, W) if y + down < H and 0 <= x + right < W]
    return numpy.array([edge for edge, _ in pairs], int).reshape(-1, 2), numpy.array([weight for _, weight in pairs], int)


def minimise_on_grid(unary0, unary1, weights, neighbours=4):
    edges, weights = as_graph(numpy.broadcast_to(weights, (len(WAYS[neighbours]), *unary0.shape)), neighbours)
    own, _, groups = grid(unary0.shape, neighbours)
    assert (own == edges).all()
    return minimise(unary0, unary1, edges, weights, groups, factor=1)


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
        given = random_grid(rng, (3, 3), neighbours, high=(6, 30)[trial % 2])         # small numbers make ties
        energies = by_hand(masks, *given, neighbours)
        least, union = best(energies, masks)
        labels, flow = minimise_on_grid(*given, neighbours)
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
        assert flow == energy(labels * 255, unary0, unary1, *as_graph(weights, neighbours)) == by_hand(labels, unary0, unary1, weights, neighbours)


def test_flow_finds_long_ways_through_an_image(rng):
    """A flow from the left edge to the right one, through a wall with a gap: the cut is the gap."""
    unary0, unary1, weights = numpy.zeros((21, 30), int), numpy.zeros((21, 30), int), numpy.full((2, 21, 30), 100)
    unary0[:, 0] = unary1[:, -1] = 10**6
    weights[0, :, 17] = 0
    weights[0, 18:20, 17] = 7, 8
    labels, flow = minimise_on_grid(unary0, unary1, weights)
    assert flow == 15 and (labels == (numpy.arange(30) <= 17)).all()


def test_inputs_stay_as_they_are(rng):
    unary0, unary1, weights = random_grid(rng, (5, 6), 4)
    given = unary0, unary1, *as_graph(weights, 4), grid((5, 6))[2]
    before = [array.copy() for array in given]
    minimise(*given)
    assert all((a == b).all() for a, b in zip(given, before))


def test_two_pixels_by_hand():
    unary0, unary1, weight = numpy.array([[3.0, 2.0]]), numpy.array([[1.0, 4.0]]), [1.5]
    edges, distances, groups = grid((1, 2))
    assert edges.tolist() == [[0, 1]] and distances.tolist() == [1]
    energies = {labels: energy(numpy.array([labels]), unary0, unary1, edges, weight) for labels in itertools.product([0, 1], repeat=2)}
    assert energies == {(1, 1): 5.0, (1, 0): 4.5, (0, 1): 8.5, (0, 0): 5.0}
    for given in (groups,), ():
        labels, least = minimise(unary0, unary1, edges, weight, *given)
        assert labels.tolist() == [[True, False]] and least == 450
    labels, least = minimise(unary0[0], unary1[0], [(0, 1)], weight)
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


def test_a_grid_names_each_pair_of_neighbours_once():
    edges, distances, _ = grid((3, 4), 8)
    y, x = numpy.divmod(edges, 4)
    steps = abs(numpy.diff(y)) + abs(numpy.diff(x)), numpy.maximum(abs(numpy.diff(y)), abs(numpy.diff(x)))
    assert (steps[1] == 1).all() and len({frozenset(edge) for edge in edges.tolist()}) == len(edges) == 9 + 8 + 6 + 6
    assert distances == pytest.approx(numpy.sqrt(steps[0][:, 0])) and len(grid((3, 4))[0]) == 9 + 8


@pytest.mark.parametrize('neighbours', [4, 8])
@pytest.mark.parametrize('shape', [(5, 6), (1, 7), (7, 1), (1, 1)])
def test_no_node_is_twice_in_a_group(rng, shape, neighbours):
    edges, _, groups = grid(shape, neighbours)
    assert all(numpy.bincount(edges[groups == group].ravel()).max() == 1 for group in set(groups.tolist())) and len(set(groups)) <= neighbours
    edges = rng.integers(0, 12, (60, 2)).tolist()
    groups = graph_cut._grouped(edges, 12)
    for group in set(groups):
        nodes = [node for edge, number in zip(edges, groups) if number == group for node in set(edge)]
        assert len(nodes) == len(set(nodes))


def test_contrast_weights_of_a_small_image_by_hand():
    image, edges = numpy.array([[0, 2], [4, 2]], numpy.uint8), grid((2, 2))[0]                    # unsigned: differences must not wrap around
    assert edges.tolist() == [[0, 1], [2, 3], [0, 2], [1, 3]]
    variance = (4 + 4 + 16 + 0) / 4
    expected = [numpy.exp(-4 / (2 * variance)), numpy.exp(-4 / (2 * variance)), numpy.exp(-16 / (2 * variance)), 1]
    assert contrast_weights(image, edges) == pytest.approx(expected)
    assert contrast_weights(image, edges, numpy.arange(4)) == pytest.approx(numpy.arange(4) * expected)


def test_contrast_weights_do_not_depend_on_contrast(rng):
    image, (edges, distances, _) = rng.random((6, 7)), grid((6, 7), 8)
    assert contrast_weights(image, edges, 1 / distances) == pytest.approx(contrast_weights(10 * image + 3, edges, 1 / distances))
    assert (contrast_weights(numpy.full((6, 7), 0.3), edges) == 1).all() and len(contrast_weights(numpy.ones((1, 1)), grid((1, 1))[0])) == 0


def test_outlines_follow_edges(rng):
    """Where the data say nothing but at two seeds, the outline lies on the edge between them, wherever the seeds are."""
    image = numpy.where(numpy.arange(20) < 13, 0.2, 0.8) + 0.02 * rng.random((12, 20))
    unary0, unary1 = numpy.zeros((2, 12, 20), int)
    unary0[4:8, 1] = unary1[4:8, 18] = 10**6
    for neighbours in 4, 8:
        edges, distances, groups = grid((12, 20), neighbours)
        labels, _ = minimise(unary0, unary1, edges, contrast_weights(image, edges, 1 / distances), groups)
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
        labels, flow = minimise(unary0, unary1, edges, weights, factor=1)
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
        _, flow = minimise(unary0, unary1, [(c, b), (b, a), (a, d), (d, e)], [10, 5, 10, 10])
        assert flow == 1500


def flow_by_augmenting_ways(unary0, unary1, edges, weights):
    """The energy of the best labels by Ford and Fulkerson: along one shortest way after the other, until none leads from source to sink."""
    nodes, room = len(unary0), collections.defaultdict(int)
    source, sink = nodes, nodes + 1
    for node, (background, object_) in enumerate(zip(unary0.tolist(), unary1.tolist())):
        room[source, node] += background - min(background, object_)
        room[node, sink] += object_ - min(background, object_)
    for (a, b), weight in zip(edges, weights):
        room[a, b] += int(weight)
        room[b, a] += int(weight)
    after, flow = collections.defaultdict(set), int(numpy.minimum(unary0, unary1).sum())
    for a, b in [*room]:
        after[a].add(b)
        after[b].add(a)
    while True:
        before, queue = {source: None}, [source]
        for node in queue:
            for other in after[node]:
                if other not in before and room[node, other] > 0:
                    before[other] = node
                    queue.append(other)
        if sink not in before:
            return flow
        way = [sink]
        while way[-1] != source:
            way.append(before[way[-1]])
        pushed = min(room[a, b] for b, a in zip(way, way[1:]))
        for b, a in zip(way, way[1:]):
            room[a, b] -= pushed
            room[b, a] += pushed
        flow += pushed


def test_grid_and_graph_agree_with_another_algorithm(rng):
    """On an image too large to try all masks."""
    unary0, unary1, weights = random_grid(rng, (14, 17), 8)
    edges, weights = as_graph(weights, 8)
    on_grid, energy_on_grid = minimise(unary0, unary1, edges, weights, grid((14, 17), 8)[2], factor=1)
    on_graph, energy_on_graph = minimise(unary0.ravel(), unary1.ravel(), edges, weights, factor=1)
    assert energy_on_grid == energy_on_graph and (on_grid.ravel() == on_graph).all() and 0 < on_grid.sum() < on_grid.size
    assert energy_on_grid == flow_by_augmenting_ways(unary0.ravel(), unary1.ravel(), edges, weights)


def test_nothing_has_no_labels_and_costs_nothing():
    labels, least = minimise(numpy.zeros((0, 4), int), numpy.zeros((0, 4), int), grid((0, 4))[0], [])
    assert labels.shape == (0, 4) and least == 0


def test_a_graph_may_have_no_edges():
    labels, least = minimise([1, 5], [2, 3], numpy.zeros((0, 2), int), [])
    assert labels.tolist() == [False, True] and least == 400


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


def test_regions_of_a_spiral_are_two_and_a_diagonal_joins_nothing(rng):
    for mask in spiral(25), ~spiral(24), rng.random((40, 50)) < 0.6, numpy.zeros((4, 5), bool), numpy.ones((4, 5), bool):
        assert (regions(mask) == flood(mask)).all()
    assert not regions(spiral(25))[spiral(25)].any() and spiral(25).sum() > 300
    assert len(set(regions(numpy.eye(3, dtype=bool)).diagonal())) == 3


def test_dilate_grows_by_a_disc(rng):
    mask = rng.random((11, 14)) < 0.03
    y, x = numpy.nonzero(mask)
    rows, columns = numpy.mgrid[:11, :14]
    squared = ((rows[..., None] - y)**2 + (columns[..., None] - x)**2).min(axis=-1)
    for radius in 0, 1, 2, 5, 20:
        assert (dilate(mask, radius) == (squared <= radius**2)).all()


# --- What is refused --------------------------------------------------------------------------------------------------

ONES = numpy.ones((3, 4), int)


EDGES = [(0, 1)]


@pytest.mark.parametrize('call, message', [
    (lambda: minimise(ONES, ONES[:2], EDGES, [1]), r'unaries \(3, 4\) and \(2, 4\) differ in shape'),
    (lambda: minimise(ONES, ONES, EDGES, [-1]), 'or a weight is below 0: -100'),
    (lambda: minimise(ONES * -2**61, ONES, EDGES, [1]), r'unary0 times 100 reach from -2.* expected finite numbers within ±2\^40'),
    (lambda: minimise(ONES, ONES, EDGES, [2.0**60]), 'weights times 100 reach from 1.15'),
    (lambda: minimise(ONES, [[0, 1, 2, numpy.inf]] * 3, EDGES, [1]), 'unary1 times .* keep probabilities away from 0'),
    (lambda: minimise(ONES, ONES, EDGES, [numpy.nan]), 'weights times 100 reach from nan'),
    (lambda: minimise(ONES, ONES, EDGES, 1), r'edges \(1, 2\) of dtype int64 must be .* for each of the weights \(\)'),
    (lambda: minimise([1, 2], [1, 2], [(0, 2)], [1]), 'one pair of nodes from 0 to 1'),
    (lambda: minimise([1, 2], [1, 2], [(0, -1)], [1]), 'one pair of nodes from 0 to 1'),
    (lambda: minimise([1, 2], [1, 2], EDGES, [1, 2]), r'edges \(1, 2\)'),
    (lambda: minimise([1, 2], [1, 2], [(0.0, 1.0)], [1]), 'float64'),
    (lambda: energy(ONES > 0, ONES, ONES[:2], EDGES, [1]), 'could not be broadcast'),
    (lambda: grid((2, 3), 5), 'neighbours is 5; expected 4 or 8'),
    (lambda: dilate(ONES > 0, -1), 'radius is -1'),
    (lambda: dilate(ONES > 0, 1.5), 'radius is 1.5'),
    (lambda: regions(ONES[0]), r'\(4,\); expected \(H, W\)'),
])
def test_bad_input_is_one_clear_error(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert '\n' not in str(error.value)


def test_energies_are_rounded_to_hundredths():
    for weight, least in (0.004, 0), (0.006, 1), (1.239, 124):
        labels, found = minimise([-1e3, 0.0], [0.0, -1e3], [(0, 1)], [weight])
        assert labels.tolist() == [False, True] and found == -2 * 10**5 + least
    assert minimise([1.26], [5], numpy.zeros((0, 2), int), [], factor=10)[1] == 13


def test_the_largest_component_is_that_of_a_flood_fill(rng):
    for _ in range(20):
        mask = rng.random((9, 13)) < 0.45
        piece = flood(mask)
        sizes = {number: (piece == number).sum() for number in piece[mask]}         # in reading order, of equals the first
        assert (largest_component(mask) == (piece == max(sizes, key=sizes.get))).all()
    assert not largest_component(numpy.zeros((3, 4), bool)).any() and largest_component(numpy.ones((3, 4), bool)).all()
