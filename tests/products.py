"""Run the library and report, for every matrix product in its source, on how many BLAS threads it ran: `python tests/products.py`.

The source is rewritten as it is imported: each `a @ b`, and each call of a function that multiplies by BLAS, first notes where it
is and how many threads BLAS has. Prints a JSON object: place → thread counts seen there, [] if it did not run. A place is
'file:function', the file below nervenet/.
"""

import ast
import builtins
import importlib.abc
import importlib.machinery
import importlib.util
import json
import sys
from pathlib import Path

import numpy

MULTIPLY = {'matmul', 'dot', 'vdot', 'inner', 'einsum', 'tensordot', 'vecdot', 'matvec', 'vecmat', 'convolve', 'correlate', 'cov',
            'corrcoef', 'polyfit'}
PACKAGE = Path(importlib.util.find_spec('nervenet').origin).parent
seen = {}


class Rewrite(ast.NodeTransformer):
    """Put `_product(place)` before each product, as part of the expression."""

    def __init__(self, file):
        self.file, self.functions = file, []

    def visit_FunctionDef(self, node):
        self.functions.append(node.name)
        self.generic_visit(node)
        self.functions.pop()
        return node

    visit_ClassDef = visit_FunctionDef

    def noted(self, node):
        """Return (_product(place), node)[1]."""
        place = f'{self.file}:{".".join(self.functions)}'
        seen.setdefault(place, set())
        note = ast.Call(ast.Name('_product', ast.Load()), [ast.Constant(place)], [])
        return ast.Subscript(ast.Tuple([note, node], ast.Load()), ast.Constant(1), ast.Load())

    def visit_BinOp(self, node):
        self.generic_visit(node)
        return self.noted(node) if isinstance(node.op, ast.MatMult) else node

    def visit_AugAssign(self, node):
        self.generic_visit(node)
        if isinstance(node.op, ast.MatMult):
            node.value = self.noted(node.value)
        return node

    def visit_Call(self, node):
        self.generic_visit(node)
        name = ast.unparse(node.func).split('.')                # a bare name is a function of our own
        return self.noted(node) if len(name) > 1 and (name[-1] in MULTIPLY or 'linalg' in name) else node


def rewritten(path):
    tree = Rewrite(path.relative_to(PACKAGE).as_posix()).visit(ast.parse(path.read_text(encoding='utf-8')))
    return compile(ast.fix_missing_locations(tree), str(path), 'exec')


class Loader(importlib.machinery.SourceFileLoader):
    def get_code(self, name):
        return rewritten(Path(self.path))


class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split('.')[0] != 'nervenet':
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None:                                    # `from . import a` may also ask for what is no module
            spec.loader = Loader(name, spec.origin)
        return spec


def run():
    """Use the library as training and prediction do, in one thread at a time, so that nothing hides behind another thread's setting."""
    from nervenet import Adam, BCEWithLogitsLoss, Conv2D, DiceLoss, RefineNet, UNet, WeightedSum, optim, plain
    from nervenet.classical.chains import log_odds
    from nervenet.classical.gaussian_process import GaussianProcess, LogisticRegression
    from nervenet.engine import parallel
    from nervenet.images.augment import ULTRASOUND
    from nervenet.images.data import Loader
    from nervenet.images.phantom import Phantom
    from nervenet.metrics import Baselines
    from nervenet.study import segment, uncertainty
    from nervenet.train import evaluate, predict, train_epoch

    parallel._blas.set(2)
    builtins._product = lambda place: seen[place].add(parallel._blas.get())
    rng = numpy.random.default_rng(0)
    phantom = Phantom(subjects=2, frames=3, size=(64, 96))
    training = Loader(phantom.samples, phantom, 3, shuffle=True, transform=ULTRASOUND, read_ahead=0)
    validation = Loader(phantom.samples, phantom, 4, read_ahead=0)
    model, loss = UNet(base_channels=16, depth=2, rng=rng), WeightedSum([(1, DiceLoss()), (1, BCEWithLogitsLoss())])
    optimizer = Adam(model.parameters())
    train_epoch(model, loss, optimizer, training.epoch(1), optim.ConstantSchedule(1e-3), max_norm=1.0)
    evaluate(model, loss, validation.epoch(1))
    predict(model, next(iter(validation.epoch(1)))[0])
    segment.choose_temperature(model, validation.epoch(1))
    settings, _ = segment.choose_from([segment.count_masks(model, lambda: validation.epoch(1))])
    segment.score(model, validation.epoch(1), settings)
    uncertainty.sureness(rng.random((3, 20, 30)))
    baselines = Baselines()
    for _, masks in validation.epoch(1):
        baselines.update(masks)
    baselines.mean_mask()
    refined = RefineNet(base_channels=2, depth=2, rng=rng)
    refined.backward(refined.forward(rng.random((2, 32, 48, 1), dtype='float32')))
    layer = Conv2D(4, 5, stride=2, rng=rng)                     # one of the ways to convolve that no U-Net takes
    layer.backward(layer.forward(rng.random((2, 33, 50, 4), dtype='float32')))
    x = rng.standard_normal((70, 3))
    for classifier in GaussianProcess().fit(x, x[:, 0] > 0, steps=1), LogisticRegression().fit(x, x[:, 0] > 0):
        classifier.predict(x)
    log_odds(rng.random((2, 32, 48), dtype='float32'), rng.random((2, 32, 48)) < 0.3)
    with plain():
        layer.backward(layer.forward(rng.random((2, 33, 50, 4), dtype='float32')))


if __name__ == '__main__':
    sys.meta_path.insert(0, Finder())
    run()
    for path in PACKAGE.rglob('*.py'):                          # also what was not imported
        rewritten(path)
    print(json.dumps({place: sorted(counts) for place, counts in sorted(seen.items())}, indent=1))
