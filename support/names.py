"""Where a net is in a file of another program, and what its parameters are called here.

Training programs store a net under a key ('state_dict'), with a prefix before each name
('module.'), and beside an average of its weights, another net, or counters.

All errors are UserError without the file's name, see readers.reading.
"""

import itertools
import re
from collections.abc import Iterator
from typing import NamedTuple

import torch

from support.program import UserError, listing
from support.readers import StandIn, Stored
from utils import part

# Parts of a name that torch's wrappers (DataParallel, DDP, compile, FSDP) may put anywhere into it.
WRAPPERS = ('module', '_orig_mod', '_fsdp_wrapped_module', '_checkpoint_wrapped_module')
# What is beside a net: counters of batch norm, of thop and of averages of weights, and a loss.
LEFT_OUT = r'(.*\.)?(num_batches_tracked|total_ops|total_params)|n_averaged|steps|criterion\..*'
# In the name of an average of weights: 'model_ema', 'ema_state_dict', 'ModelEMA'.
AVERAGE = r'(?<![A-Za-z])ema(?![a-z])|EMA|Ema(?![a-z])'
COMMON_KEYS = ('params', 'state_dict', 'model', 'model_state_dict', 'net')
# A name that all nets of a kind have, and whose names these are.
ANCHORS = {
    'group0.block0.conv0': 'ours',
    'group0.block0.conv0.weight': 'ours',
    'group0.conv0': 'ours',
    'group0.conv0.weight': 'ours',
    'layer1.0.conv1.weight': 'torchvision',
    'block1.layer.0.conv1.weight': 'RepDistiller',
}
MOST_LEVELS = 6  # of keys
# A small file can hold the same dict very often.
MOST_PLACES = MOST_ITEMS = 1000  # nets, and entries of a list
MOST_NAMES = 100_000  # entries of a dict of tensors


class Place(NamedTuple):
    """A place in a file where a net is."""

    keys: tuple  # of the dicts around it
    table: dict  # {name without wrappers: value}, the innermost dict
    wrappers: list  # the words of WRAPPERS that its names had
    prefix: str = ''  # before the net's names, ends in a dot
    naming: str = ''  # see ANCHORS; '' if the names are of no net that is known here

    def label(self) -> str:
        return '.'.join([*map(str, self.keys), self.prefix]).strip('.')

    def is_average(self) -> bool:
        return re.search(AVERAGE, self.label()) is not None

    def is_published_student(self) -> bool:
        """Whether the published code gives this name to a student in a file with its teacher."""
        return self.keys in ((), ('params',)) and self.prefix == 'student.' and not self.wrappers


class Found(NamedTuple):
    """A net in a file."""

    tensors: dict  # {name without wrappers and prefix: Stored}
    naming: str
    note: str  # what was taken and what was left out, '' if the file holds nothing else


def find(values, key: str = '') -> Found:
    """The net in the values of a file (see readers.Contents), or in their part `key`.

    An average of weights gives way to the weights, and a teacher of the published code to its
    student. Raises UserError with the names if there are several nets, or something that is not
    understood.
    """
    start = ()
    if key:
        values, start = pick(values, key), (key,)
    places = list(itertools.islice(_places(values, start, {}), MOST_PLACES))
    chosen = [place for place in places if not place.is_average()] or places
    students = [place for place in chosen if place.is_published_student()]
    if students and {place.prefix for place in chosen} == {'student.', 'teacher.'}:
        chosen = students
    if len({(id(p.table), p.prefix) for p in chosen}) > 1:
        labels = [place.label() for place in chosen]
        raise UserError(
            f'holds several nets ({listing([label or "(top level)" for label in labels], 8)}): '
            f'choose one by FILE:KEY, such as FILE:{next(filter(None, labels))}'
        )
    place = chosen[0] if chosen else _common_place(values, start)
    return Found(_tensors(place, places), place.naming, _note(place, places, key))


def pick(values, key: str):
    """The part `key` of the values of a file: keys of dicts in dicts and a prefix of names, with or
    without WRAPPERS, joined by dots. Raises UserError with the keys that there are."""
    found, rest = values, key.rstrip('.')
    while rest:
        entries = _entries(found)
        inner = [k for k in entries if f'{rest}.'.startswith(f'{k}.') and _entries(entries[k])]
        if inner:
            longest = max(inner, key=lambda k: len(str(k)))
            found, rest = entries[longest], rest[len(str(longest)) + 1 :]
            continue
        named = _part(entries, rest) or _part(_without_wrappers(entries)[0], rest)
        if not named:
            raise UserError(f'has no part {key!r} of tensors; it has {listing(list(entries), 8)}')
        return named
    return found


def _entries(value) -> dict:
    """{key: value} of a dict or list, {} of anything else."""
    if isinstance(value, (list, tuple)) and not isinstance(value, Stored):
        return dict(enumerate(value)) if len(value) <= MOST_ITEMS else {}
    return value if isinstance(value, dict) else {}


def _has_tensors(entries: dict) -> bool:
    return any(isinstance(value, Stored) for value in entries.values())


def _part(table: dict, name: str) -> dict:
    return part({k: v for k, v in table.items() if isinstance(k, str)}, name)


def _places(values, keys: tuple, known: dict) -> Iterator[Place]:
    """The nets in dicts in dicts, by their anchors. known: the places of each dict, by its id."""
    entries, is_new = _entries(values), id(values) not in known
    if is_new:
        known[id(values)] = _places_in(entries)
    yield from (place._replace(keys=keys) for place in known[id(values)])
    if is_new and len(keys) < MOST_LEVELS:
        for key, value in entries.items():
            yield from _places(value, (*keys, key), known)


def _places_in(entries: dict) -> list[Place]:
    if not _has_tensors(entries):
        return []
    (table, wrappers), prefixes = _without_wrappers(entries), {}
    for name in table:
        name = str(name)
        anchor = next((a for a in ANCHORS if f'.{name}'.endswith(f'.{a}')), None)
        if anchor:
            prefixes[name.removesuffix(anchor)] = ANCHORS[anchor]
    return [Place((), table, wrappers, *found) for found in prefixes.items()]


def _common_place(values, start: tuple) -> Place:
    """Where programs store a net, for one that is not known here."""
    keys, table = start, _entries(values)
    for _ in range(MOST_LEVELS):
        inner = [k for k in COMMON_KEYS if _entries(table.get(k))]
        if not inner and not _has_tensors(table):
            inner = [k for k, v in table.items() if _has_tensors(_entries(v))]
            inner = inner if len(inner) == 1 else []
        if inner:
            keys, table = (*keys, inner[0]), _entries(table[inner[0]])
    table, wrappers = _without_wrappers(table)
    return Place(keys, table, wrappers, 'student.' if _part(table, 'student') else '')


def _without_wrappers(table: dict) -> tuple[dict, list]:
    """(the dict with names without WRAPPERS, those of them that it had)."""
    renamed, found = {}, set()
    if len(table) > MOST_NAMES:
        raise UserError(f'has a dict of {len(table):,} entries, too many for a net')
    for name, value in table.items():
        words = str(name).split('.')
        found |= set(WRAPPERS).intersection(words)
        short = '.'.join(word for word in words if word not in WRAPPERS)
        short = short if isinstance(name, str) else name
        if short in renamed:
            raise UserError(f'has two parameters {short!r}, with and without a wrapper')
        renamed[short] = value
    return renamed, sorted(found)


def _stem(prefix: str) -> str:
    """'ema.' of 'ema.backbone.': what an average holds beside its net belongs to it."""
    found = re.match(rf'.*?({AVERAGE})[^.]*\.', prefix)
    return found[0] if found else prefix


def _tensors(place: Place, places: list) -> dict:
    """{name: Stored} of the net. Raises UserError if something else is in or beside it, except
    the other places, which find has left out."""
    if not _has_tensors(place.table) and any(map(_entries, place.table.values())):
        raise UserError(
            f'has no net under the usual keys; its keys: {listing(list(place.table), 8)}. '
            'Choose a dict of tensors with FILE:KEY, or save the state_dict of the net'
        )
    for name in place.table:
        if not isinstance(name, str):
            raise UserError(f'an entry has the name {name!r}, which is not text')
    prefix = place.prefix
    others = {_stem(p.prefix) for p in places if p.table is place.table and p.prefix != prefix}
    if place.is_published_student():
        others.add('teacher.')
    named = {
        k: v
        for k, v in place.table.items()
        if not re.fullmatch(LEFT_OUT, k) and not k.startswith(tuple(others))
    }
    inside = {k.removeprefix(prefix): v for k, v in named.items() if k.startswith(prefix)}
    outside = [k for k in named if not k.startswith(prefix)]
    if prefix.endswith('backbone.'):  # of mmpretrain
        head = part(named, f'{prefix.removesuffix("backbone.")}head')
        if head.keys() == {'fc.weight', 'fc.bias'} and not head.keys() & inside.keys():
            inside |= head
            outside = [k for k in outside if not k.endswith(('head.fc.weight', 'head.fc.bias'))]
    if outside:
        raise UserError(
            f'has {len(outside)} unknown entries besides the net {place.label()!r} '
            f'({listing(outside)}): to load only the net, give FILE:{place.label()}'
        )
    if not inside:
        raise UserError('holds no dict of tensors; save the state_dict of the net')
    for name, value in inside.items():
        if not isinstance(value, Stored):
            kind = value.name if isinstance(value, StandIn) else type(value).__name__
            raise UserError(f'{name!r} is {kind}, not a dense tensor')
    return inside


def _note(place: Place, places: list, key: str) -> str:
    """What find has taken of the part `key`, for a line."""
    notes = [f'took {place.label()}'] if place.label() != key.rstrip('.') else []
    if place.wrappers:
        notes.append(f'removed {", ".join(place.wrappers)} from the names')
    left = [p.label() for p in places if p is not place]
    if left:
        notes.append(f'left out {listing(left)}')
    if place.naming == 'RepDistiller':
        notes.append(
            "its names are RepDistiller's and mdistiller's, whose nets expect images normalised "
            "with CIFAR-100's mean and std; here CIFAR-10's are used, so accuracy may be lower"
        )
    return '; '.join(notes)


# ------------------------ names


def to_ours(name: str, naming: str) -> str:
    """Our name of a parameter: layer1.0.conv1.weight of torchvision and timm, or
    block1.layer.0.conv1.weight of RepDistiller and mdistiller, is group0.block0.conv0."""
    if naming == 'torchvision':
        name = re.sub(r'^layer(\d)\.(\d+)', lambda m: f'group{int(m[1]) - 1}.block{m[2]}', name)
        name = re.sub(r'downsample\.0\.weight$', 'convdim', name).replace('downsample.1', 'bndim')
    elif naming == 'RepDistiller':
        name = re.sub(r'^bn1\.', 'bn.', name)
        name = re.sub(
            r'^block(\d)\.layer\.(\d+)', lambda m: f'group{int(m[1]) - 1}.block{m[2]}', name
        )
        name = name.replace('convShortcut.weight', 'convdim')
    else:
        return name
    name = re.sub(r'\bconv(\d)\.weight$', lambda m: f'conv{int(m[1]) - 1}', name)
    return re.sub(r'\bbn(\d)\.', lambda m: f'bn{int(m[1]) - 1}.', name)


def to_theirs(name: str, naming: str) -> str:
    """The inverse of to_ours, also of the name of a group or block."""
    if naming not in ('torchvision', 'RepDistiller'):
        return name
    name = re.sub(r'\bbn(\d)\.', lambda m: f'bn{int(m[1]) + 1}.', name)
    name = re.sub(r'\bconv(\d)$', lambda m: f'conv{int(m[1]) + 1}.weight', name)
    if naming == 'RepDistiller':
        name = re.sub(r'^bn\.', 'bn1.', name).replace('convdim', 'convShortcut.weight')
        name = re.sub(r'^group(\d)', lambda m: f'block{int(m[1]) + 1}', name)
        return name.replace('.block', '.layer.', 1)
    name = name.replace('convdim', 'downsample.0.weight').replace('bndim', 'downsample.1')
    name = re.sub(r'^group(\d)', lambda m: f'layer{int(m[1]) + 1}', name)
    return name.replace('.block', '.', 1)


def spell(message: str, naming: str) -> str:
    """A message with the names of the file in place of ours."""
    return re.sub(r'\b(?:group\d|conv\d|bn)[\w.]*', lambda m: to_theirs(m[0], naming), message)


def to_torchvision(params: dict) -> dict:
    """The parameters of a resnet under torchvision's names. Each batch norm gets a
    num_batches_tracked of 0."""
    renamed = {}
    for name, value in params.items():
        theirs = to_theirs(name, 'torchvision')
        renamed[theirs] = value
        if theirs.endswith('running_var'):
            renamed[theirs.replace('running_var', 'num_batches_tracked')] = torch.tensor(0)
    return renamed
