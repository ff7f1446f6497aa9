"""Calls a function in a forked child with a limit on time and memory, and returns how it ended.

The child has what this process has imported, so a call takes milliseconds.
"""

import os
import pickle
import resource
import select
import signal
import time
import traceback
from typing import NamedTuple

import torch

from support.program import UserError


class End(NamedTuple):
    """How a call ended."""

    how: str  # 'value', 'refused', 'error', 'killed' or 'timeout'
    what: object  # the value, the UserError's message, the traceback, or the signal's name
    seconds: float
    grown: int  # bytes that were resident at the peak and not at the start


def call(f, *arguments, seconds: float = 10, memory: int = 2**29) -> End:
    """Call f(*arguments) in a child, which may map `memory` bytes more than at its start. The value
    is pickled on its way here."""
    reader, writer = os.pipe()
    start, child = time.monotonic(), os.fork()
    if not child:
        _run(writer, f, arguments, memory)
    os.close(writer)
    answer, complete = _read(reader, start + seconds)
    os.close(reader)
    if not complete:
        os.kill(child, signal.SIGKILL)
    _, status, usage = os.wait4(child, 0)
    resident, _, result = answer.partition(b'\n')
    if not complete:
        how, what = 'timeout', None
    elif os.WIFSIGNALED(status):
        how, what = 'killed', signal.Signals(os.WTERMSIG(status)).name
    elif not result:
        how, what = 'killed', f'exit status {os.waitstatus_to_exitcode(status)}'
    else:
        how, what = pickle.loads(result)
    grown = usage.ru_maxrss * 1024 - int(resident or 0)
    return End(how, what, time.monotonic() - start, grown)


def _run(writer, f, arguments, memory):
    """What the child does. It never returns."""
    try:
        torch.set_num_threads(1)  # the threads of the parent do not exist here
        size, resident = (n * os.sysconf('SC_PAGESIZE') for n in _pages())
        _write(writer, b'%d\n' % resident)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (size + memory, resource.RLIM_INFINITY))
        try:
            answer = 'value', f(*arguments)
        except UserError as e:
            answer = 'refused', str(e)
        except BaseException:  # noqa: BLE001, sent to the parent
            answer = 'error', traceback.format_exc()
        _write(writer, pickle.dumps(answer))
        os._exit(0)
    finally:
        os._exit(1)


def _pages() -> list[int]:
    """[size, resident pages] of this process."""
    with open('/proc/self/statm') as file:
        return [int(n) for n in file.read().split()[:2]]


def _write(descriptor, data: bytes):
    while data:
        data = data[os.write(descriptor, data) :]


def _read(descriptor, deadline: float) -> tuple[bytes, bool]:
    """(what is written to a pipe until the deadline, whether the pipe was closed before)."""
    answer = b''
    while select.select([descriptor], [], [], max(0, deadline - time.monotonic()))[0]:
        part = os.read(descriptor, 2**16)
        if not part:
            return answer, True
        answer += part
    return answer, False
