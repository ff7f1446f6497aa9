"""Which file may import which. Read from the source, so that imports inside functions count."""

import ast
import graphlib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {'examples', 'scripts', 'support'}
# A file may import files of lower layers, and of its own layer.
LAYERS = [
    {'examples', 'scripts'},
    {'cifar', 'imagenet'},
    {'support'},
    {'resnet', 'nin', 'data'},
    {'support.program', 'images', 'utils'},
]
# Each of these may import earlier ones only, directly or through other files.
CHAIN = ['support.program', 'support.files', 'support.logs', 'support.weights', 'support.runs']


def name_of(path):
    """'support.runs' of support/runs.py, 'support' of support/__init__.py."""
    parts = path.relative_to(ROOT).with_suffix('').parts
    return '.'.join(parts).removesuffix('.__init__')


PATHS = sorted([*ROOT.glob('*.py'), *ROOT.glob('[!.]*/*.py')])
FILES = {name_of(path): path for path in PATHS if path.parent.name != 'tests'}
# A script's own folder is in sys.path: `import plot` means scripts/plot.py.
SHORT = {name.rpartition('.')[2]: name for name in FILES if not name.startswith('support')}


def imported(name):
    """What a file imports: 'a.b' of `import a.b`; 'a' and 'a.b' of `from a import b`."""
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f'{name}: give the full name in place of a relative import'
            found |= {node.module} | {f'{node.module}.{alias.name}' for alias in node.names}
    return found


def imports_of(name):
    """The files of this repository that a file imports."""
    # The package `support` itself is empty.
    return {SHORT.get(found, found) for found in imported(name)} & FILES.keys() - {'support'}


GRAPH = {name: imports_of(name) for name in FILES}


def reached_from(name):
    """The files that a file imports, directly or through other files."""
    reached, new = set(), {name}
    while new:
        new = set().union(*(GRAPH[n] for n in new)) - reached
        reached |= new
    return reached


def layer_of(name):
    """The index of the layer that lists a file, or else its folder."""
    places = {entry: i for i, layer in enumerate(LAYERS) for entry in layer}
    return places.get(name, places.get(name.partition('.')[0], -1))


def test_every_file_has_a_layer():
    folders = {name for name in FILES if name.partition('.')[0] in FOLDERS}
    files = set().union(*LAYERS) - FOLDERS
    assert files <= FILES.keys() <= files | folders
    assert set(CHAIN) <= FILES.keys()
    assert not [path for folder in FOLDERS for path in ROOT.glob(f'{folder}/*/*.py')]
    assert len(SHORT) == len([name for name in FILES if not name.startswith('support')])


def test_a_file_imports_its_own_and_lower_layers_only():
    wrong = {(a, b) for a in FILES for b in GRAPH[a] if layer_of(b) < layer_of(a)}
    assert not wrong


def test_what_is_imported_from_support_exists():
    names = {n for name in FILES for n in imported(name)}
    assert {n for n in names if n.startswith('support.') and n.count('.') == 1} <= FILES.keys()


def test_the_lowest_layer_imports_nothing_of_ours():
    assert not GRAPH['utils'] and not imported('support')
    packages = {name.partition('.')[0] for name in imported('support.program')}
    assert packages <= sys.stdlib_module_names


def test_the_training_scripts_do_not_import_each_other():
    assert 'imagenet' not in reached_from('cifar') and 'cifar' not in reached_from('imagenet')


def test_files_logs_weights_and_runs_import_earlier_ones_only():
    for i, name in enumerate(CHAIN):
        assert not reached_from(name).intersection(CHAIN[i:]), name


def test_no_file_imports_itself_through_others():
    list(graphlib.TopologicalSorter(GRAPH).static_order())
