"""Pickles as plain data. Nothing in a file is run.

A pickle is a program for a small stack machine, and Python's own machine imports and calls whatever
the program names. This one imports and calls nothing: an object of a class becomes a StandIn.
"""

import io
import pickletools
from collections.abc import Callable
from typing import NamedTuple

# A few bytes of a file can ask for much memory and time, so the sums are limited. The checkpoint of
# a large net has 100,000 instructions and 20,000 objects.
MOST_OPCODES = 1_000_000
MOST_OBJECTS = 300_000  # changes of containers, calls, and entries of lists in calls
MOST_BYTES = 2**28  # of the pickles of a file; a log of every step may be in them
MOST_LETTERS = 1000  # of a key, or of the name of a class


class Name(NamedTuple):
    """A class or function that a pickle names."""

    module: str
    name: str

    def __str__(self):
        return f'{self.module}.{self.name}'


class StandIn(dict):
    """An object of the class `name`. It keeps the items of a dict and nothing else."""

    def __init__(self, name):
        super().__init__()
        self.name = name


def load(data: io.BytesIO, build: Callable, persistent: Callable):
    """The object of the pickle that starts here in the data, which are left behind its end.

    data: MOST_BYTES or less. build(name, arguments): the result of a call, or NotImplemented
    for a StandIn; persistent(id): the object of a persistent id. Raises ValueError, IndexError, or
    whatever pickletools raises if the pickle is damaged or too large.
    """
    machine = _Machine(build, persistent)
    for i, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        if i > MOST_OPCODES or machine.objects > MOST_OBJECTS:
            raise ValueError('it holds too many objects')
        if opcode.name == 'STOP':
            return machine.stack.pop()
        machine.step(opcode.name, argument)
    raise ValueError('it has no end')


_LITERALS = {
    *('BININT', 'BININT1', 'BININT2', 'LONG1', 'LONG4', 'BINFLOAT'),
    *('BINSTRING', 'SHORT_BINSTRING', 'BINUNICODE', 'SHORT_BINUNICODE', 'BINUNICODE8'),
    *('BINBYTES', 'SHORT_BINBYTES', 'BINBYTES8', 'BYTEARRAY8'),
}
_CONSTANTS = {'NONE': None, 'NEWTRUE': True, 'NEWFALSE': False}
_EMPTY = {'EMPTY_LIST': list, 'EMPTY_TUPLE': tuple, 'EMPTY_DICT': dict, 'EMPTY_SET': list}
_TUPLES = {'TUPLE1': 1, 'TUPLE2': 2, 'TUPLE3': 3}


class _Machine:
    """The instructions of pickle protocols 2 to 5, without text and extensions."""

    def __init__(self, build, persistent):
        self.build, self.persistent = build, persistent
        self.stack, self.marks, self.memo, self.objects = [], [], {}, 0

    def step(self, op, argument):
        if op in _LITERALS:
            self.stack.append(argument)
        elif op in _CONSTANTS:
            self.stack.append(_CONSTANTS[op])
        elif op in ('BINPUT', 'LONG_BINPUT', 'MEMOIZE'):
            self.memo[len(self.memo) if op == 'MEMOIZE' else argument] = self.stack[-1]
        elif op in ('BINGET', 'LONG_BINGET'):
            self.stack.append(self.memo[argument])
        elif op == 'MARK':
            self.marks.append(len(self.stack))
        elif op == 'POP':
            self.stack.pop()
        elif op == 'POP_MARK':
            self.above_mark()
        elif op == 'DUP':
            self.stack.append(self.stack[-1])
        elif op not in ('PROTO', 'FRAME'):
            self.objects += 1
            self.make(op, argument)

    def make(self, op, argument):
        stack = self.stack
        if op in _EMPTY:
            stack.append(_EMPTY[op]())
        elif op in _TUPLES:
            stack.append(tuple(self.pop_many(_TUPLES[op])))
        elif op in ('TUPLE', 'LIST', 'FROZENSET'):
            stack.append((tuple if op == 'TUPLE' else list)(self.above_mark()))
        elif op == 'DICT':
            self.add_items(self.above_mark(), to={})
        elif op in ('APPEND', 'APPENDS', 'ADDITEMS'):
            values = self.pop_many(1) if op == 'APPEND' else self.above_mark()
            if isinstance(stack[-1], list):
                stack[-1].extend(values)
        elif op in ('SETITEM', 'SETITEMS'):
            items = self.pop_many(2) if op == 'SETITEM' else self.above_mark()
            self.add_items(items, to=stack.pop())
        elif op == 'GLOBAL':
            stack.append(_name(*argument.split(' ', 1)))
        elif op == 'STACK_GLOBAL':
            stack.append(_name(*self.pop_many(2)))
        elif op == 'BINPERSID':
            stack.append(self.persistent(stack.pop()))
        elif op in ('REDUCE', 'NEWOBJ', 'NEWOBJ_EX'):
            name, arguments, *_ = self.pop_many(3 if op == 'NEWOBJ_EX' else 2)
            if not isinstance(name, Name) or not isinstance(arguments, tuple):
                raise ValueError('it calls something that is not a function')
            self.objects += sum(len(a) for a in arguments if isinstance(a, list))
            made = self.build(name, arguments)
            stack.append(StandIn(str(name)) if made is NotImplemented else made)
        elif op == 'BUILD':
            stack.pop()  # the state of an object
        else:
            raise ValueError(f'torch.save writes no {op}')

    def pop_many(self, n):
        if n > len(self.stack):
            raise IndexError('it takes more than it has put')
        values = self.stack[-n:]
        del self.stack[-n:]
        return values

    def above_mark(self):
        start = self.marks.pop()
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def add_items(self, items, to):
        if not isinstance(to, dict) or len(items) % 2:
            raise ValueError('it has entries of no dict')
        to.update((k, v) for k, v in zip(items[::2], items[1::2]) if is_key(k))
        self.stack.append(to)


def _name(module, name) -> Name:
    if not all(isinstance(part, str) and len(part) <= MOST_LETTERS for part in (module, name)):
        raise ValueError('the name of a class is not text, or too long')
    return Name(module, name)


def is_key(value) -> bool:
    """Whether it is a key of a dict as weights have them. Others are left out: tuples of tuples and
    huge numbers take very long to hash. Raises ValueError if it is a very long text."""
    if isinstance(value, str):
        if len(value) > MOST_LETTERS:
            raise ValueError('it has a key that is too long')
        return True
    return isinstance(value, int) and value.bit_length() < 64
