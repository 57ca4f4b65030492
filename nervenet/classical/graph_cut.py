"""Graph cut: the best of all 2^(H·W) masks, found exactly.

Each pixel p is asked for a label L_p, 0 for background or 1 for object, and pays for either; two neighbours pay if they disagree:

    E(L) = Σ_p D_p(L_p) + Σ_{p,q neighbours} w_pq [L_p ≠ L_q]         all w_pq ≥ 0

D_p is what the pixel alone says, such as −log of a probability (`unary0` is D_p(0), `unary1` is D_p(1)); w_pq is small where the image
has an edge, so that outlines are cheap there (`contrast_weights`).

**In words.** Think of water pipes. A source is joined to every pixel by a pipe of width D_p(0), every pixel to a sink by one of width
D_p(1), and neighbours to each other by pipes of width w_pq. Cut pipes until no water arrives: what still hangs on the source is object,
what hangs on the sink is background, and the total width of what was cut is E. So the best mask is the cheapest cut; and the cheapest cut
is as wide as the most water that gets through, for somewhere the pipes are full (Ford and Fulkerson 1956). No search over masks is needed.

**The flow in arrays** (push-relabel: Goldberg and Tarjan 1988). Flood every pixel from the source, then let each push what it has too much
of one step downhill, where the height of a pixel is a lower bound of its distance to the sink through pipes with room left. A pixel that
has water and nobody below it is lifted just above its lowest neighbour; water that cannot reach the sink stays where it is. All pixels do
each step at once. For that the pipes between neighbours form groups, in each of which a pixel has one partner at most, so that no two push
into one: on a grid, the pipes from even columns to the right, those from odd ones, from even rows down, from odd ones.

Sources: Greig, Porteous and Seheult 1989, "Exact maximum a posteriori estimation for binary images"; Boykov and Jolly 2001, "Interactive
graph cuts for optimal boundary and region segmentation of objects in N-D images".
"""

import itertools
import math

import numpy

# The way (down, right) from a pixel to those neighbours that come after it, so that each pair of neighbours is named once.
NEIGHBOURS = {4: ((0, 1), (1, 0)), 8: ((0, 1), (1, 0), (1, 1), (1, -1))}
ROUNDS = 20                     # between two measurements of the true distances, which send water that has lost its way elsewhere
LARGEST = 2.0**40               # energy: the sum of 2^22 of them is still an int64


def grid(shape, neighbours=4):
    """Return (edges (pairs, 2), distances (pairs,), groups (pairs,)) of the neighbours in an image (H, W), pixels in reading order.

    `neighbours` is 4, or 8 with diagonals, along which outlines are less jagged and pixels √2 apart. `groups` are for `minimise`.
    """
    if neighbours not in NEIGHBOURS:
        raise ValueError(f'neighbours is {neighbours!r}; expected 4 or 8')
    (H, W), found = shape, []
    pixel = numpy.arange(H * W).reshape(H, W)
    for way, (down, right) in enumerate(NEIGHBOURS[neighbours]):
        a = pixel[:H - down, max(0, -right):W - max(0, right)].ravel()
        group = 2 * way + (a // W if down else a % W) % 2
        found.append([numpy.stack([a, a + down * W + right], axis=1), numpy.full(len(a), math.hypot(down, right)), group])
    return [numpy.concatenate(part) for part in zip(*found)]


def contrast_weights(values, edges, scale=1.0):
    """Return w (edges,) for the grey levels of nodes, (nodes,) or (H, W) in reading order: small where two that touch differ.

        w_pq = scale_pq · exp(−(I_p − I_q)² / 2σ²)

    `scale` is 1 / distance between pixels, and the length of the border between superpixels. The paper leaves σ open. Here σ² is the mean
    of (I_p − I_q)² over all edges, so that weights do not depend on the image's contrast.
    """
    squares = numpy.diff(numpy.asarray(values, numpy.float64).ravel()[edges])[:, 0]**2             # unsigned levels would wrap around
    return scale * numpy.exp(-squares / (2 * squares.sum() / max(1, len(squares)) or 1))          # where all is of one grey, they are 0


def energy(labels, unary0, unary1, edges, weights):
    """Return E of labels (nodes,), of a mask (H, W) the pixels in reading order; the rest is as for `minimise`, but of any numbers."""
    labels = numpy.asarray(labels, bool).ravel()
    apart = numpy.diff(labels[edges])[:, 0]
    return (numpy.where(labels, numpy.ravel(unary1), numpy.ravel(unary0)).sum() + numpy.sum(weights * apart)).item()


def minimise(unary0, unary1, edges, weights, groups=None, factor=100):
    """Return (labels, energy): the labels of least energy, exactly, bool in the shape of the unaries, and their energy. Raises ValueError.

    unary0, unary1  (nodes,), or (H, W) in reading order: what a node pays as background, and as object; negative numbers are fine
    edges, weights  (edges, 2) pairs of nodes from 0 up, few for each node, such as of `grid`; numbers ≥ 0, (edges,)
    groups          (edges,) numbers of groups, in each of which no node is twice; they are found if not given
    factor          energies are multiplied by it and rounded to whole numbers, in which a flow adds up exactly; so is what is returned

    Among several labelings of least energy, the one with the most object nodes is returned: it contains all others.
    """
    energies = []
    for name, values in ('unary0', unary0), ('unary1', unary1), ('weights', weights):
        values = numpy.rint(factor * numpy.asarray(values, numpy.float64))
        if not (abs(values) <= LARGEST).all():                           # also for NaN
            raise ValueError(f'{name} times {factor} reach from {values.min()} to {values.max()}; expected finite numbers within ±2^40: '
                             'keep probabilities away from 0 before you take their logarithm')
        energies.append(values.astype(numpy.int64))
    unary0, unary1, weights = energies
    if unary0.shape != unary1.shape or weights.min(initial=0) < 0:
        raise ValueError(f'unaries {unary0.shape} and {unary1.shape} differ in shape, or a weight is below 0: {weights.min(initial=0)}')
    shape, nodes, edges = unary0.shape, unary0.size, numpy.asarray(edges)
    if edges.shape != (*weights.shape, 2) or edges.dtype.kind not in 'iu' or edges.min(initial=0) < 0 or edges.max(initial=-1) >= nodes:
        raise ValueError(f'edges {edges.shape} of dtype {edges.dtype} must be (edges, 2) integers, one pair of nodes from 0 to {nodes - 1} '
                         f'for each of the weights {weights.shape}')
    groups = numpy.array(_grouped(edges.tolist(), nodes), int) if groups is None else groups
    partners = numpy.tile(numpy.arange(nodes), (groups.max(initial=0) + 1, 1))            # (groups, nodes): at first itself
    room = numpy.zeros_like(partners)                                    # what still fits through the pipe from a node to its partner
    partners[groups, edges[:, 0]], partners[groups, edges[:, 1]] = edges[:, 1], edges[:, 0]
    room[groups, edges[:, 0]] = room[groups, edges[:, 1]] = weights
    # What both labels cost flows straight through. Of the rest, either the source's pipe is left or the sink's.
    both = numpy.minimum(unary0, unary1).ravel()
    excess, drain = unary0.ravel() - both, unary1.ravel() - both
    unreachable = nodes + 1                                              # no way is longer: each node once, and the sink

    def distances():
        """Return each node's distance to the sink through pipes with room, outwards from the sink in rings."""
        distance, ring, reached = numpy.full(nodes, unreachable), numpy.flatnonzero(drain), 1
        distance[ring] = reached
        while ring.size:
            reached, found = reached + 1, []
            for partner, space in zip(partners, room):
                before = partner[ring]
                before = before[(space[before] > 0) & (distance[before] == unreachable)]
                distance[before] = reached
                found.append(before)
            ring = numpy.concatenate(found)
        return distance

    flow, height = int(both.sum()), distances()
    for rounds in itertools.count(1):
        active = numpy.flatnonzero((excess > 0) & (height < unreachable))
        if not active.size:
            return (distances() == unreachable).reshape(shape), flow       # cut off from the sink
        last = active[height[active] == 1]                               # the sink is at height 0
        pushed = numpy.minimum(excess[last], drain[last])
        excess[last] -= pushed
        drain[last] -= pushed
        flow += int(pushed.sum())
        for partner, space in zip(partners, room):
            p = active[(space[active] > 0) & (excess[active] > 0) & (height[active] > height[partner[active]])]
            q, pushed = partner[p], numpy.minimum(excess[p], space[p])
            for amount in excess, space:
                amount[p] -= pushed
                amount[q] += pushed                                      # what flowed can flow back
        if rounds % ROUNDS == 0:
            height = distances()
            continue
        stuck = active[excess[active] > 0]
        lowest = numpy.where(drain[stuck] > 0, 0, unreachable - 1)
        for partner, space in zip(partners, room):
            lowest = numpy.where(space[stuck] > 0, numpy.minimum(lowest, height[partner[stuck]]), lowest)
        height[stuck] = lowest + 1


def _grouped(edges, nodes):
    """Return the numbers of groups: each of the edges goes into the first one in which neither of its nodes has a partner yet."""
    taken, groups = [set() for _ in range(nodes)], []
    for a, b in edges:
        groups.append(next(group for group in itertools.count() if group not in taken[a] and group not in taken[b]))
        taken[a].add(groups[-1])
        taken[b].add(groups[-1])
    return groups
