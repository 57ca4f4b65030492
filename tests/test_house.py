"""The house: who may know whom, and how much a reader has to hold in mind."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / 'nervenet'

# Each room, and the rooms below it that it may import from. Within a room, no circles.
BELOW = {
    'files': set(), 'engine': set(), 'checks': {'engine'},
    'convolution': {'checks', 'engine'},
    'layers': {'checks', 'convolution', 'engine'},
    'resampling': {'checks', 'layers', 'engine'},
    'losses': {'checks', 'layers', 'engine'},
    'metrics': {'checks', 'engine'},
    'optim': {'checks', 'engine'},
    'train': {'checks', 'layers', 'metrics', 'optim', 'engine'},
    'networks': {'checks', 'convolution', 'layers', 'resampling', 'engine'},
    'gradcheck': {'checks', 'layers', 'losses', 'networks', 'resampling', 'engine'},
    'images': {'checks', 'engine', 'files'},
    'classical': {'checks', 'engine', 'images', 'optim'},
    'study': {'checks', 'classical', 'engine', 'files', 'images', 'layers', 'losses', 'metrics', 'networks', 'optim', 'train'},
    'phantom': {'files', 'images', 'study'},
}
CORE = 'layers.py', 'convolution/plain.py', 'losses.py', 'optim.py', 'train.py', 'networks/blocks.py', 'networks/unet.py'


def modules():
    """Yield (dotted name within the package, path) of each module; the package itself, which gathers what is public, is left out."""
    for path in sorted(PACKAGE.rglob('*.py')):
        name = '.'.join(path.relative_to(PACKAGE).with_suffix('').parts).removesuffix('.__init__')
        if name != '__init__':
            yield name, path


def imported(name, path):
    """Return the modules of the package that a module imports, dotted; '' is the package itself."""
    here = name.split('.') if path.name == '__init__.py' else name.split('.')[:-1]
    names, known, found = set(), {name for name, _ in modules()}, set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = here[:len(here) - node.level + 1] + (node.module or '').split('.') * bool(node.module)
            names |= {'.'.join([*base, alias.name]) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or '').split('.')[0] == 'nervenet':
            names |= {'.'.join([*node.module.split('.')[1:], alias.name]) for alias in node.names}
        elif isinstance(node, ast.Import):
            assert not any(alias.name.split('.')[0] == 'nervenet' for alias in node.names), f'{path}: import nervenet'
    for full in names:
        while full not in known and full:
            full = full.rpartition('.')[0]
        found.add(full)
    return found


def room(name):
    return name.partition('.')[0]


@pytest.mark.parametrize('name, path', [*modules()], ids=lambda value: value if isinstance(value, str) else '')
def test_imports_run_downwards_only(name, path):
    own = BELOW[room(name)]
    for other in imported(name, path):
        if not other:                                                   # the version, which a model file states
            assert name == 'study.checkpoint'
        else:
            assert room(other) == room(name) or room(other) in own, f'{name} imports {other}'


def test_rooms_have_an_order_and_modules_no_circles():
    graph = {name: {other for other in imported(name, path) if other} for name, path in modules()}
    for graph in ({name: set(below) for name, below in BELOW.items()}, graph):
        while graph:
            free = {name for name, others in graph.items() if not others - {name}}
            assert free, f'a circle among {sorted(graph)}'
            graph = {name: others - free for name, others in graph.items() if name not in free}


def test_the_core_stays_small_enough_to_be_held_in_mind():
    assert sum(len((PACKAGE / name).read_text().splitlines()) for name in CORE) <= 1500


def test_only_one_file_knows_cupy():
    assert [name for name, path in modules() if 'import cupy' in path.read_text()] == ['engine.backend']
