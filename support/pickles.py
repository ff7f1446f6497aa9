"""Pickles as plain data. Nothing in a file is run.

A pickle is a program for a small stack machine, and Python's own machine imports and calls whatever
the program names. This one imports and calls nothing: an object of a class becomes a StandIn.
"""

import pickletools
from collections.abc import Callable
from typing import NamedTuple

# A few bytes of a file can ask for many times as much memory, so the sums are limited.
MOST_OPCODES = 4_000_000
MOST_OBJECTS = 1_000_000  # containers and stand-ins
MOST_BYTES = 2**24  # of one pickle
MOST_AT_ONCE = 2**24  # of one string


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


class Limited:
    """A binary file that refuses to read too much at once, whatever length an entry claims."""

    def __init__(self, file):
        self.file = file

    def __getattr__(self, name):
        return getattr(self.file, name)

    def read(self, size=-1):
        data = (
            b'' if size > MOST_AT_ONCE else self.file.read(MOST_AT_ONCE + 1 if size < 0 else size)
        )
        if max(size, len(data)) > MOST_AT_ONCE:
            raise ValueError('an entry is too long')
        return data

    def readline(self):
        return self.file.readline(MOST_AT_ONCE)


def load(file: Limited, build: Callable, persistent: Callable):
    """The object of the pickle that starts here in the file, which is left behind its end.

    build(name, arguments): the result of a call, or NotImplemented for a StandIn; persistent(id):
    the object of a persistent id. Raises ValueError, IndexError, or whatever pickletools raises if
    the pickle is damaged or too large.
    """
    machine, start = _Machine(build, persistent), file.tell()
    for i, (opcode, argument, place) in enumerate(pickletools.genops(file)):
        objects = machine.objects
        if i > MOST_OPCODES or objects > MOST_OBJECTS or place - start > MOST_BYTES:
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
            stack.append(Name(*argument.split(' ', 1)))
        elif op == 'STACK_GLOBAL':
            module, name = self.pop_many(2)
            if not isinstance(module, str) or not isinstance(name, str):
                raise ValueError('a name is not text')
            stack.append(Name(module, name))
        elif op == 'BINPERSID':
            stack.append(self.persistent(stack.pop()))
        elif op in ('REDUCE', 'NEWOBJ', 'NEWOBJ_EX'):
            name, arguments, *_ = self.pop_many(3 if op == 'NEWOBJ_EX' else 2)
            if not isinstance(name, Name) or not isinstance(arguments, tuple):
                raise ValueError('it calls what is no function')
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
        # A tuple of tuples of tuples may take for ever to hash, and no weights have such a key.
        to.update((k, v) for k, v in zip(items[::2], items[1::2]) if isinstance(k, (str, int)))
        self.stack.append(to)
