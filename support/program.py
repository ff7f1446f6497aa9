"""How a program starts and ends: errors of one line, signals, exit statuses.

Imports the standard library alone, so that a script can call `start` before its slow imports, and
every other file may import this one.
"""

import os
import signal
import sys


class UserError(ValueError):
    """A mistake of the user (exit status 2) or a limit of the machine (1), printed as one line."""

    def __init__(self, message: str, status: int = 2):
        super().__init__(message)
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
    """Let a signal during the imports, which take seconds, end in one line. Ignore `ignored`.

    name: the caller's __name__. Does nothing unless that is '__main__'.
    """
    if name != '__main__':
        return
    line = f'{os.path.basename(sys.argv[0])}: stopped before it began\n'.encode()

    def stop(signum, frame):
        os.write(2, line)
        os._exit(128 + signum)

    for signum in signal.SIGINT, signal.SIGTERM:
        signal.signal(signum, stop)
    for signum in ignored:
        signal.signal(signum, signal.SIG_IGN)


def listing(names, most: int = 5) -> str:
    """The first names, for a message: 'a, b, c, …'."""
    return ', '.join(map(str, names[:most])) + (', …' if len(names) > most else '')


def call_main(main, argv=None) -> int:
    """Call main(argv) and return the exit status.

    0 after success, the status of a UserError, 130 after SIGINT and 143 after SIGTERM; each of the
    last three prints one line on stderr. Any other exception is a bug and keeps its traceback.
    """

    def stop(signum, frame):
        raise Stopped(signum)

    program = os.path.basename(sys.argv[0])
    if int(os.environ.get('WORLD_SIZE', '1')) > 1:
        program += f', rank {os.environ["RANK"]}'
    before = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        main(argv)
        return 0
    except UserError as e:
        print(f'{program}: error: {" ".join(str(e).split())}', file=sys.stderr)
        return e.status
    except Stopped as e:
        for s in before:  # a second signal does not interrupt the line
            signal.signal(s, signal.SIG_IGN)
        after_bar = '\n' if sys.stderr.isatty() else ''
        stopped = f'stopped by {signal.Signals(e.signum).name}'
        print(f'{after_bar}{program}: {stopped}: {e.hint}', file=sys.stderr)
        return 128 + e.signum
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
