"""Graph cut: the best of all 2^(H·W) masks, found exactly; and the few operations on masks that go with it.

Each pixel p is asked for a label L_p, 0 for background or 1 for object, and pays for either; two neighbours pay if they disagree:

    E(L) = Σ_p D_p(L_p) + Σ_{p,q neighbours} w_pq [L_p ≠ L_q]         all w_pq ≥ 0

D_p is what the pixel alone says, such as −log of a probability (`unary0` is D_p(0), `unary1` is D_p(1)); w_pq is small where the image
has an edge, so that outlines are cheap there (`contrast_weights`).

**In words.** Think of water pipes. A source is joined to every pixel by a pipe of width D_p(0), every pixel to a sink by one of width
D_p(1), and neighbours to each other by pipes of width w_pq. Cut pipes until no water arrives: what still hangs on the source is object,
what hangs on the sink is background, and the total width of what was cut is E. So the best mask is the cheapest cut; and the cheapest cut
is as wide as the most water that gets through, for somewhere the pipes are full (Ford and Fulkerson 1956). No search over masks is needed.

**The flow in arrays** (push-relabel: Goldberg and Tarjan 1988). Flood every pixel from the source, then let each push what it has too much
of one step downhill, where the height of a pixel is a lower bound of its distance to the sink through pipes with room left. A pixel
that has water and nobody below it is lifted just above its lowest neighbour; water that cannot reach the sink stays where it is. All pixels
do each step at once. Among several masks of least energy, the one with the most object pixels is returned: it contains all others.

Sources: Greig, Porteous and Seheult 1989, "Exact maximum a posteriori estimation for binary images"; Boykov and Jolly 2001, "Interactive
graph cuts for optimal boundary and region segmentation of objects in N-D images"; for small graphs Dinic 1970.
"""

import itertools
import math

import numpy

from ..checks import positive
from ..images import data

# The way (down, right) from a pixel to those neighbours that come after it, so that each pair of neighbours is named once.
NEIGHBOURS = {4: ((0, 1), (1, 0)), 8: ((0, 1), (1, 0), (1, 1), (1, -1))}
ROUNDS = 20                     # between two measurements of the true distances, which send water that has lost its way elsewhere
LARGEST = 2**62                 # of all sums of energies: what int64 holds, with room


def scaled(values, factor=100):
    """Return round(factor · values) as int64, in which a flow adds up exactly. Raises ValueError for what is not finite or beyond ±2^40."""
    values = numpy.rint(factor * numpy.asarray(values, numpy.float64))
    if not (abs(values) <= 2.0**40).all():                               # also for NaN
        raise ValueError(f'energies times {factor} reach from {values.min()} to {values.max()}; expected finite ones within ±2^40: keep '
                         'probabilities away from 0 before you take their logarithm')
    return values.astype(numpy.int64)


def contrast_weights(image, neighbours=4):
    """Return w (directions, H, W): w[k, y, x] is of pixel (y, x) and its neighbour at NEIGHBOURS[neighbours][k], and 0 if there is none.

        w_pq = exp(−(I_p − I_q)² / 2σ²) / dist(p, q),   dist 1, or √2 along a diagonal

    The paper leaves σ open. Here σ² is the mean of (I_p − I_q)² over all neighbours, so that weights do not depend on the image's contrast.
    """
    image, ways = numpy.asarray(image), _ways(neighbours)
    if image.ndim != 2 or image.dtype.kind not in 'buif' or not numpy.isfinite(image).all():
        raise ValueError(f'image has shape {image.shape} and dtype {image.dtype}; expected (H, W) of finite numbers')
    image = image.astype(numpy.float64)                                  # differences of unsigned levels would wrap around
    squares = numpy.stack([(image - _beyond(image, way, numpy.nan))**2 for way in ways])          # (directions, H, W)
    variance = numpy.nansum(squares) / max(1, numpy.isfinite(squares).sum()) or 1.0               # in an image of one grey, all squares are 0
    distance = numpy.array([math.hypot(*way) for way in ways])[:, None, None]
    return numpy.nan_to_num(numpy.exp(-squares / (2 * variance)) / distance)


def energy(labels, unary0, unary1, weights, neighbours=4):
    """Return E of `labels` (H, W), bool. The rest is as for `minimise_on_grid`, but may be of any numbers. Raises ValueError."""
    labels, ways = _mask(labels), _ways(neighbours)
    if numpy.shape(unary0) != labels.shape or numpy.shape(unary1) != labels.shape:
        raise ValueError(f'labels {labels.shape}, unary0 {numpy.shape(unary0)} and unary1 {numpy.shape(unary1)} differ in shape')
    apart = numpy.stack([labels != _beyond(labels, way, False) for way in ways])
    return (numpy.where(labels, unary1, unary0).sum() + (_per_pixel(weights, ways, labels.shape) * apart).sum()).item()


def _ways(neighbours):
    if neighbours not in NEIGHBOURS:
        raise ValueError(f'neighbours is {neighbours!r}; expected 4 or 8')
    return NEIGHBOURS[neighbours]


def _beyond(values, way, outside):
    """Return (H, W): for each pixel the value of its neighbour this way, `outside` where there is none."""
    (H, W), (down, right) = values.shape, way
    return numpy.pad(values, 1, constant_values=outside)[1 + down:1 + down + H, 1 + right:1 + right + W]


def _per_pixel(weights, ways, shape):
    """Return the weights (directions, H, W), 0 for those that lead out of the image."""
    try:
        weights = numpy.broadcast_to(weights, (len(ways), *shape))
    except ValueError:
        raise ValueError(f'weights {numpy.shape(weights)} do not fit {2 * len(ways)} neighbours of {shape} pixels; expected '
                         f'{(len(ways), *shape)}, as contrast_weights gives them, or what broadcasts to it') from None
    return weights * numpy.stack([_beyond(numpy.ones(shape, bool), way, False) for way in ways])


def _checked(unary0, unary1, weights, axes):
    """Return the three as int64. Raises ValueError unless they are integers that add up in int64, and no weight is negative."""
    given = {'unary0': numpy.asarray(unary0), 'unary1': numpy.asarray(unary1), 'weights': numpy.asarray(weights)}
    unary0, unary1, weights = given.values()
    if unary0.shape != unary1.shape or unary0.ndim != len(axes) or unary0.size == 0:
        raise ValueError(f'unary0 {unary0.shape} and unary1 {unary1.shape} must have one shape, ({", ".join(axes)}), and not be empty')
    for name, array in given.items():
        if array.dtype.kind not in 'iu' and array.size:
            raise ValueError(f'{name} is of dtype {array.dtype}; expected integers, in which a minimum is exact: give scaled({name})')
    if weights.min(initial=0) < 0:
        raise ValueError(f'a weight is {weights.min()}; expected none below 0: neighbours that want to differ are no matter for a cut')
    total = sum(abs(array.astype(numpy.float64)).sum() for array in (unary0, unary1)) + 8.0 * unary0.size * weights.max(initial=0)
    if total > LARGEST:
        raise ValueError(f'the energies add up to {total:.3g}; expected at most {LARGEST:.3g}: use a smaller factor')
    return [array.astype(numpy.int64) for array in given.values()]


def minimise_on_grid(unary0, unary1, weights, neighbours=4):
    """Return (labels, energy): the mask (H, W), bool, of least energy, exactly, and its energy, an int. Raises ValueError.

    unary0, unary1  (H, W) integers: what a pixel pays as background, and as object; negative ones are fine; see `scaled`
    weights         integers ≥ 0, (directions, H, W) as of `contrast_weights`, or what broadcasts to it; those out of the image do not count
    neighbours      4, or 8 with diagonals, along which outlines are less jagged
    """
    unary0, unary1, weights = _checked(unary0, unary1, weights, ('H', 'W'))
    ways, (H, W) = _ways(neighbours), unary0.shape
    # A frame of pixels without pipes around the image lets a neighbour be p + step, for all pixels in one flat array.
    steps = [down * (W + 2) + right for down, right in ways]
    ahead = [numpy.pad(weight, 1).ravel() for weight in _per_pixel(weights, ways, (H, W))]
    room = ahead + [numpy.roll(weight, step) for weight, step in zip(ahead, steps)]    # per direction, what still fits through a pipe
    steps += [-step for step in steps]
    # What both labels cost flows straight through. Of the rest, either the source's pipe is left or the sink's.
    both = numpy.minimum(unary0, unary1)
    excess, drain = (numpy.pad(unary - both, 1).ravel() for unary in (unary0, unary1))
    unreachable = H * W + 2                                              # no way is longer: each pixel once, and the sink

    def distances():
        """Return each pixel's distance to the sink through pipes with room, outwards from the sink in rings."""
        distance = numpy.full(len(drain), unreachable)
        ring, reached = numpy.flatnonzero(drain), 1
        distance[ring] = reached
        while ring.size:
            reached, found = reached + 1, []
            for step, space in zip(steps, room):
                before = ring - step
                before = before[(space[before] > 0) & (distance[before] == unreachable)]
                distance[before] = reached
                found.append(before)
            ring = numpy.concatenate(found)
        return distance

    flow, height = int(both.sum()), distances()
    for rounds in itertools.count(1):
        active = numpy.flatnonzero((excess > 0) & (height < unreachable))
        if not active.size:
            break
        last = active[height[active] == 1]                               # the sink is at height 0
        pushed = numpy.minimum(excess[last], drain[last])
        excess[last] -= pushed
        drain[last] -= pushed
        flow += int(pushed.sum())
        for k, (step, space) in enumerate(zip(steps, room)):
            p = active[(space[active] > 0) & (excess[active] > 0) & (height[active] > height[active + step])]
            pushed = numpy.minimum(excess[p], space[p])
            excess[p] -= pushed
            space[p] -= pushed
            excess[p + step] += pushed                                   # no two pixels push into one
            room[k - len(ways)][p + step] += pushed                      # the same pipe backwards
        if rounds % ROUNDS == 0:
            height = distances()
            continue
        stuck = active[excess[active] > 0]
        lowest = numpy.where(drain[stuck] > 0, 0, unreachable - 1)
        for step, space in zip(steps, room):
            lowest = numpy.where(space[stuck] > 0, numpy.minimum(lowest, height[stuck + step]), lowest)
        height[stuck] = numpy.minimum(lowest + 1, unreachable)
    labels = distances() == unreachable                                  # cut off from the sink
    return labels.reshape(H + 2, W + 2)[1:1 + H, 1:1 + W], flow


def minimise_on_graph(unary0, unary1, edges, weights):
    """Return (labels, energy) as `minimise_on_grid`, labels (nodes,), for hundreds of nodes: edges (edges, 2) are pairs of nodes from 0 up.

    Dinic's algorithm: measure all distances to the sink, then send water along shortest ways only, until these are full; the next
    shortest are longer, so this is done fewer times than there are nodes.
    """
    unary0, unary1, weights = _checked(unary0, unary1, weights, ('nodes',))
    nodes, edges = len(unary0), numpy.asarray(edges)
    if edges.shape != (*weights.shape, 2) or edges.dtype.kind not in 'iu' or (edges.size and not 0 <= edges.min() <= edges.max() < nodes):
        raise ValueError(f'edges {edges.shape} of dtype {edges.dtype} must be (edges, 2) integers, one pair of nodes from 0 to {nodes - 1} '
                         f'for each of the weights {weights.shape}')
    source, sink, both = nodes, nodes + 1, numpy.minimum(unary0, unary1)
    head, room, pipes = [], [], [[] for _ in range(nodes + 2)]           # pipe i leads to head[i]; i ^ 1 is the same one backwards
    every = range(nodes)
    for a, b, there, back in itertools.chain(zip([source] * nodes, every, (unary0 - both).tolist(), [0] * nodes),
                                             zip(every, [sink] * nodes, (unary1 - both).tolist(), [0] * nodes),
                                             zip(*edges.T.tolist(), weights.tolist(), weights.tolist())):
        pipes[a].append(len(head))
        pipes[b].append(len(head) + 1)
        head += b, a
        room += there, back

    def distances():
        distance, queue = [math.inf] * (nodes + 2), [sink]
        distance[sink] = 0
        for node in queue:                                               # which grows meanwhile
            for pipe in pipes[node]:
                if room[pipe ^ 1] and distance[head[pipe]] == math.inf:
                    distance[head[pipe]] = distance[node] + 1
                    queue.append(head[pipe])
        return distance

    flow = int(both.sum())
    while (distance := distances())[source] < math.inf:
        untried, way = [list(those) for those in pipes], []              # pipes that may lead on; the way from the source so far
        while True:
            node = head[way[-1]] if way else source
            while untried[node] and not (room[pipe := untried[node][-1]] and distance[head[pipe]] < distance[node]):
                untried[node].pop()                                      # full, or no shortest way
            if node == sink:
                pushed = min(room[pipe] for pipe in way)
                for pipe in way:
                    room[pipe] -= pushed
                    room[pipe ^ 1] += pushed
                flow, way = flow + pushed, []
            elif untried[node]:
                way.append(pipe)
            elif way:
                untried[head[way.pop() ^ 1]].pop()                       # a dead end
            else:
                break
    return numpy.array(distances()[:nodes]) == math.inf, flow


def regions(labels):
    """Return (H, W) int64: the number, from 0 up in reading order, of the 4-connected region of equal values that a pixel is in.

    Each row falls into runs of equal values. Runs that touch are of one region, and take the smallest number among them; a run whose number
    is another run's takes that one's number, again and again, so that numbers travel far in few rounds (pointer jumping).
    """
    labels = numpy.asarray(labels)
    if labels.ndim != 2:
        raise ValueError(f'labels or mask has shape {labels.shape}; expected (H, W)')
    begins = numpy.diff(labels, axis=1, prepend=labels[:, :1]) != 0
    begins[:, 0] = True
    run = (numpy.cumsum(begins) - 1).reshape(labels.shape)
    touching = labels[1:] == labels[:-1]
    upper, lower = run[:-1][touching], run[1:][touching]
    number = numpy.arange(begins.sum())
    while (number[upper] != number[lower]).any():
        smaller = numpy.minimum(number[upper], number[lower])
        for ends in upper, lower:
            numpy.minimum.at(number, number[ends], smaller)              # told to the run whose number it has, for all that have it
        number = number[number]
    return numpy.unique(number, return_inverse=True)[1][run]


def components(mask):
    """Return (H, W) int64: 0 in the background, and 1, 2, … in reading order for each 4-connected component of `mask` (H, W), bool."""
    mask = _mask(mask)
    region, numbers = regions(mask), numpy.zeros(mask.shape, numpy.int64)
    numbers[mask] = numpy.unique(region[mask], return_inverse=True)[1] + 1
    return numbers


def largest_component(mask):
    """Return the largest 4-connected component of `mask` (H, W), bool; of equals the first in reading order, and none of an empty mask."""
    numbers = components(mask)
    return numbers == 1 + numpy.bincount(numbers.ravel())[1:].argmax() if mask.any() else mask


def fill_holes(mask):
    """Return `mask` (H, W) and all background that no 4-connected way joins to the image's edge."""
    return data.fill_outlines(_mask(mask).astype('uint8')) > 0


def dilate(mask, radius):
    """Return all pixels (H, W) that are at most `radius`, a whole number, from one of `mask`, centre to centre: it grows by a disc."""
    mask, radius = _mask(mask), positive(radius, 'radius', 0)
    (H, W), framed, grown = mask.shape, numpy.pad(mask, radius), numpy.zeros_like(mask)
    for down, right in numpy.ndindex(2 * radius + 1, 2 * radius + 1):
        if (down - radius)**2 + (right - radius)**2 <= radius**2:
            grown |= framed[down:down + H, right:right + W]
    return grown


def _mask(mask):
    """Return the mask as an array. Raises ValueError unless it is (H, W) of bool: 0 and 255 may be meant otherwise."""
    mask = numpy.asarray(mask)
    if mask.ndim != 2 or mask.dtype != bool or mask.size == 0:
        raise ValueError(f'mask has shape {mask.shape} and dtype {mask.dtype}; expected (H, W) of bool, such as probabilities > 0.5')
    return mask
