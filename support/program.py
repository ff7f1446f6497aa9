"""How a program starts and ends: its streams, errors of one line, signals, exit statuses; and how
it opens a path that a user gives.

Imports the standard library alone, so that a script can call `start` before its slow imports, and
every other file may import this one.
"""

import contextlib
import errno
import functools
import operator
import os
import re
import signal
import stat
import sys
import time

# Control characters, changes of the direction of writing, and bytes of a name that are not UTF-8.
UNPRINTABLE = '\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff'


def printable(text) -> str:
    """The text with control characters, such as line breaks, and bytes that are not UTF-8 as
    escapes: a file name must not move the cursor."""
    return re.sub(f'[{UNPRINTABLE}]', _escaped, str(text))


def _escaped(found) -> str:
    code = ord(found.group())
    if 0xDC80 <= code <= 0xDCFF:  # how Python stores the byte 0x80 to 0xff of a name
        return f'\\x{code - 0xDC00:02x}'
    return found.group().encode('unicode_escape').decode()


class UserError(ValueError):
    """A mistake of the user (exit status 2) or a limit of the machine (1), printed as one line.

    An empty message is not printed: another rank has printed it.
    """

    def __init__(self, message: str, status: int = 2):
        super().__init__(printable(re.sub(r'[ \t]*\n[ \t\n]*', ' ', message)))
        self.status = status


class Stopped(BaseException):
    """A signal that ends the run, raised wherever the program is at that moment.

    hint: how to continue the run, printed behind the signal's name.
    """

    def __init__(self, signum: int):
        super().__init__(signum)
        self.signum = signum
        self.hint = 'nothing was written; the same command starts it again'


def start(name: str, ignored: tuple = ()) -> None:
    """Call this before torch is imported. Limit how long its threads spin, and let a signal during
    the imports, which take seconds, end in one line. Ignore the signals `ignored`.

    name: the caller's __name__. Does nothing unless that is '__main__'.
    """
    if name != '__main__':
        return
    open_streams()
    limit_spinning()
    line = f'{os.path.basename(sys.argv[0])}: stopped before it started\n'
    line = b'' if is_later_rank() else os.fsencode(line)

    def stop(signum, frame):
        with contextlib.suppress(OSError):
            os.write(2, line)
        os._exit(128 + signum)

    for signum in signal.SIGINT, signal.SIGTERM:
        signal.signal(signum, stop)
    for signum in ignored:
        signal.signal(signum, signal.SIG_IGN)


def limit_spinning() -> None:
    """Let OpenMP's threads sleep if they wait long for each other, unless the user has chosen.

    By default they spin for milliseconds. Beside another busy process, a step then takes up to 1.5
    times as long. GNU's OpenMP, which torch for Linux has, reads this once, when torch is imported.
    """
    if not {'GOMP_SPINCOUNT', 'OMP_WAIT_POLICY'} & os.environ.keys():
        os.environ['GOMP_SPINCOUNT'] = '10000'


def listing(names, most: int = 5) -> str:
    """The first names, for a message: 'a, b, c, …'."""
    return ', '.join(map(str, names[:most])) + (', …' if len(names) > most else '')


def warn_once(kind: str, text: str) -> None:
    """Print a warning on stderr, the first of its kind in this process."""
    if kind not in printed:
        printed.add(kind)
        print(f'warning: {printable(text)}', file=sys.stderr, flush=True)


def say_once(text: str) -> None:
    """Print a line on stderr, once in this process and only in the first of several."""
    if text not in printed and not is_later_rank():
        printed.add(text)
        print(printable(text), file=sys.stderr, flush=True)


printed = set()  # kinds of warnings, and lines


# ------------------------ paths that a user gives

# Without waiting for the other end of a pipe. Windows has some of these.
FLAGS = 'O_RDONLY', 'O_NONBLOCK', 'O_NOCTTY', 'O_CLOEXEC', 'O_BINARY', 'O_NOINHERIT'
OPEN_FLAGS = functools.reduce(operator.or_, (getattr(os, name, 0) for name in FLAGS))


def open_regular(file):
    """Open a regular file to read bytes. Anything else is an OSError: a pipe would wait forever."""
    fd = os.open(file, OPEN_FLAGS)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.ENODEV, 'not a regular file', file)
    return open(fd, 'rb')


def check_reachable(path, option: str = '') -> None:
    """Raise UserError if the system refuses to tell whether `path` exists: it lies in a closed
    folder, or on a disk that is gone."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        pass
    except OSError as e:
        raise UserError(f'{option} {path}: {e.strerror}'.strip()) from e


# ------------------------ streams


def open_streams() -> None:
    """Put the null device in the place of closed standard streams.

    Otherwise the next file that is opened would get the number of the closed one, and with it what
    is printed.
    """
    for descriptor in 0, 1, 2:
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # takes the lowest number
    for name, mode in ('stdin', 'r'), ('stdout', 'w'), ('stderr', 'w'):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115, stays open


class Output:
    """A text stream whose writes never fail: the program continues if its reader is gone.

    Characters that the encoding lacks become escapes; with `escape`, so do control characters
    except tabs and newlines. After an error the stream writes to the null device; `fault` is that
    OSError.
    """

    def __init__(self, stream, escape: bool = False):
        self.stream, self.fault = stream, None
        kept = re.compile(f'(?![\t\n])[{UNPRINTABLE}]')
        self._escape = functools.partial(kept.sub, _escaped) if escape else str

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        encoding = getattr(self.stream, 'encoding', None) or 'utf-8'
        known = self._escape(text).encode(encoding, 'backslashreplace').decode(encoding)
        self._try(self.stream.write, known)
        return len(text)

    def writelines(self, lines) -> None:
        self.write(''.join(lines))

    def flush(self) -> None:
        self._try(self.stream.flush)

    def close(self) -> None:
        self.flush()
        self.stream.close()

    def _try(self, f, *arguments):
        try:
            f(*arguments)
        except OSError as e:
            self.fault = self.fault or e
            with contextlib.suppress(OSError):  # a stream of a test has no descriptor
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self.stream.fileno())  # also for what its buffer still holds
                os.close(null)


# ------------------------ the whole program

# What a disk refuses, whatever the program does. A file that is missing may be a bug.
REFUSALS = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EIO,
    errno.ESTALE,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
}


def call_main(main, argv=None) -> int:
    """Call main(words of the command) and return the exit status.

    0 after success, the status of a UserError, 1 without enough memory or if the disk refuses a
    file, 130 after SIGINT and 143 after SIGTERM; all but the first print one line on stderr. Any
    other exception is a bug and keeps its traceback.
    Status 1 also if stdout cannot be written, unless its reader has gone.
    """
    open_streams()
    if argv is None:
        # torch.distributed.launch adds --local-rank; torchrun gives it in the environment alone.
        argv = [word for word in sys.argv[1:] if not re.match('--local[-_]rank=', word)]
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = out, err = Output(sys.stdout, escape=True), Output(sys.stderr)
    try:
        status = _end_of(main, argv)
        out.flush()
        if status == 0 and out.fault and out.fault.errno not in (errno.EPIPE, errno.EIO):
            lost = f'standard output: {out.fault.strerror}; some printed lines are lost'
            print(f'{_name()}: error: {lost}', file=err)
            status = 1
        return status
    finally:
        out.flush()
        err.flush()
        sys.stdout, sys.stderr = streams


def _end_of(main, argv) -> int:
    def stop(signum, frame):
        raise Stopped(signum)

    before = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        main(argv)
        return 0
    except UserError as e:
        ignore_signals()
        if str(e):
            print(f'{_name()}: error: {e}', file=sys.stderr)
        return e.status
    except (MemoryError, RuntimeError) as e:
        if not is_out_of_memory(e):
            raise
        ignore_signals()
        needs_less = 'use a smaller batch, net or image'
        print(f'{_name()}: error: not enough memory; {needs_less}', file=sys.stderr)
        return 1
    except OSError as e:
        if e.errno not in REFUSALS or not e.filename:
            raise
        ignore_signals()
        print(f'{_name()}: error: {printable(e.filename)}: {e.strerror}', file=sys.stderr)
        return 1
    except Stopped as e:
        ignore_signals()
        after_bar = '\n' if sys.stderr.isatty() else ''
        stopped = f'stopped by {signal.Signals(e.signum).name}'
        print(f'{after_bar}{_name()}: {stopped}: {printable(e.hint)}', file=sys.stderr)
        return 128 + e.signum
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def is_out_of_memory(error) -> bool:
    """Whether memory was refused, by Python, or by torch for the CPU or a GPU."""
    texts = "can't allocate memory", 'not enough memory', 'out of memory'
    return isinstance(error, MemoryError) or any(text in str(error) for text in texts)


def ignore_signals() -> None:
    """Ignore SIGINT and SIGTERM: what is printed last is not interrupted."""
    for signum in signal.SIGINT, signal.SIGTERM:
        signal.signal(signum, signal.SIG_IGN)


# ------------------------ torchrun's variables


def processes() -> int:
    """The number of processes that torchrun has started, from WORLD_SIZE; 1 without it. Raises
    UserError if it is not a number."""
    text = os.environ.get('WORLD_SIZE', '').strip() or '1'
    if not text.isdecimal() or int(text) == 0:
        raise UserError(
            f'WORLD_SIZE={text}: not a number of processes; unset it to run a single one'
        )
    return int(text)


def wants_help(argv) -> bool:
    return not {'-h', '--help'}.isdisjoint(argv)


def expect_one_process(argv) -> None:
    """Raise UserError if torchrun, or a variable that a cluster has set, asks for several.

    --help works even then. argv: the words of the command.
    """
    if wants_help(sys.argv[1:] if argv is None else argv) or processes() == 1:
        return
    if is_later_rank():
        end_quietly()
    name = os.path.basename(sys.argv[0])
    raise UserError(
        f'WORLD_SIZE={processes()}: {name} is a single process, and only imagenet.py is for '
        f'torchrun: run plain `python {name}`, with WORLD_SIZE unset'
    )


def end_quietly(status: int = 2):
    """End a rank whose mistake the first rank prints."""
    if 'TORCHELASTIC_RUN_ID' in os.environ:  # torchrun stops all ranks once one has ended
        with contextlib.suppress(Stopped):
            time.sleep(15)
    raise UserError('', status)


def is_later_rank() -> bool:
    """Whether this is one of several processes, and not the first."""
    rank = os.environ.get('RANK', '').strip()
    try:
        return rank.isdecimal() and 0 < int(rank) < processes()
    except UserError:
        return False


def _name() -> str:
    # 'imagenet.py, rank 1' of several processes
    name, rank = os.path.basename(sys.argv[0]), os.environ.get('RANK', '').strip()
    with contextlib.suppress(UserError):
        name += f', rank {rank}' if rank and processes() > 1 else ''
    return printable(name)
