"""Runs Python scripts as processes of their own, without the seconds of importing torch: they are
forked from a server that has imported it, and has done nothing else."""

import contextlib
import gc
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import runpy
import shlex
import signal
import subprocess
import sys
import traceback
from multiprocessing.connection import Connection
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
IMPORTED = 'torch torch._inductor.compile_fx torch.distributed torchnet hickle cv2 tqdm'
IMPORTED += ' torch.utils.flop_counter hickle.loaders.load_numpy'
IMPORTED += ' matplotlib.pyplot safetensors.torch'

PROCESSES = multiprocessing.get_context('forkserver')
PROCESSES.set_forkserver_preload(IMPORTED.split())


class ForkedPopen(subprocess.Popen):
    """subprocess.Popen, whose `python script.py` and `python -m torch.distributed.*` are forked.

    The process has the given arguments, environment, folder and streams, and it ends and is killed
    as any other. What it starts itself is forked too. OMP_NUM_THREADS is that of the server.
    """

    def __init__(self, args, *more, start_new_session=False, **options):
        self._forked, self._session = None, start_new_session
        super().__init__(args, *more, start_new_session=start_new_session, **options)

    def _execute_child(self, args, *more):
        """What subprocess.Popen calls, to start the process in its three streams."""
        words = list(map(os.fspath, args)) if isinstance(args, (list, tuple)) else [args]
        if not can_be_forked(words):
            return super()._execute_child(args, *more)
        cwd, env = more[4:6]
        pipes = more[9:15]  # the two ends of stdin, stdout and stderr, or -1
        ends = pipes[0], pipes[3], pipes[5]
        # Each is a Connection only to be sent to the server.
        streams = [Connection(os.dup(i if end < 0 else end)) for i, end in enumerate(ends)]
        environment = dict(os.environ if env is None else env)
        become = words, os.path.abspath(cwd or '.'), environment, streams, self._session
        self._forked = PROCESSES.Process(target=_become, args=become)
        self._forked.start()
        self.pid, self._child_created = self._forked.pid, True
        self._close_pipe_fds(*pipes)

    def _internal_poll(self, *more, **options):
        """What subprocess.Popen calls, to see whether the process has ended."""
        if not self._forked:
            return super()._internal_poll(*more, **options)
        self.returncode = self._forked.exitcode
        return self.returncode

    def _wait(self, timeout):
        """What subprocess.Popen calls, to wait for the end of the process."""
        if not self._forked:
            return super()._wait(timeout)
        self._forked.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode


def server_address():
    """The address of the server, which starts now if it does not run yet, and its key, which Python
    asks for from 3.14 on."""
    server = multiprocessing.forkserver._forkserver
    server.ensure_running()
    return f'{server._forkserver_address} {getattr(server, "_forkserver_authkey", b"").hex()}'


def use_server(address):
    """Fork from the server at that address, which runs as long as the process that started it."""
    server = multiprocessing.forkserver._forkserver
    server._forkserver_address, _, key = address.rpartition(' ')
    server._forkserver_authkey = bytes.fromhex(key)
    server._forkserver_alive_fd = os.open(os.devnull, os.O_RDWR)
    server.ensure_running = lambda: None


STAND_IN = """#!/bin/sh
exec {python} -c 'import sys; sys.path[0] = sys.argv[1]; import programs
sys.exit(programs.stand_in(sys.argv[2], sys.argv[3:]))' {tests} {address} "$@"
"""


def environment_of_forks(folder):
    """Make a Python environment for shell scripts, whose Python forks the scripts that it is given
    from the server. It runs everything else itself. Returns the folder."""
    paths = {'python': sys.executable, 'tests': str(ROOT / 'tests'), 'address': server_address()}
    python = folder / 'bin' / 'python'
    python.parent.mkdir(parents=True)
    python.write_text(STAND_IN.format(**{k: shlex.quote(v) for k, v in paths.items()}))
    python.chmod(0o755)
    return folder


def stand_in(address, words):
    """Be `python words`, forked from the server at that address. Returns the exit status."""
    words = [sys.executable, *words]
    if not can_be_forked(words):
        os.execv(sys.executable, words)
    use_server(address)
    tracker = multiprocessing.resource_tracker._resource_tracker
    tracker._fd = os.open(os.devnull, os.O_RDWR)
    tracker.ensure_running = lambda: None  # it runs in the tests' process
    process = ForkedPopen(words)
    for signum in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(signum, lambda signum, frame: process.send_signal(signum))
    status = process.wait()
    return status if status >= 0 else 128 - status


def can_be_forked(words):
    """Whether a command is `python script.py` or `python -m torch.distributed.*`."""
    if words[0] != sys.executable or len(words) == 1:
        return False
    words = [word for word in words[1:] if word != '-u']
    return words[0].endswith('.py') or words[0] == '-m' and words[1].startswith('torch.distributed')


def run_script(script, *options, cwd):
    """`python script options` in that folder, as subprocess.run returns it with its output."""
    words = [sys.executable, str(ROOT / script), *map(str, options)]
    pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True}
    with ForkedPopen(words, cwd=cwd, **pipes) as process:
        texts = process.communicate()
    return subprocess.CompletedProcess(words, process.returncode, *texts)


def ranks_in(folder):
    """{rank: process id} of torchrun's forked processes in that folder."""
    found = {}
    for comm in Path('/proc').glob('[0-9]*/comm'):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            name, _, rank = comm.read_text().strip().partition('.py ')
            if name and rank.isdecimal() and os.readlink(comm.parent / 'cwd') == str(folder):
                found[int(rank)] = int(comm.parent.name)
    return found


def _become(words, cwd, environment, streams, session):
    """Be the process of that command, in a fork of the server."""
    gc.freeze()  # half a million objects of the server's imports need no search for cycles
    if session:
        os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream.fileno(), number)
        stream.close()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    unbuffered = words[1] == '-u' or bool(environment.get('PYTHONUNBUFFERED'))
    sys.stdout.reconfigure(line_buffering=unbuffered)
    subprocess.Popen = ForkedPopen
    # What this process starts comes from the server too, and not from another one.
    multiprocessing.forkserver._forkserver.ensure_running = lambda: None
    multiprocessing.resource_tracker._resource_tracker._fd = None  # it gets its own when needed
    script, *options = words[1 + (words[1] == '-u') :]
    # Without the folders that pytest has added, except this file's, which a fork imports.
    folders = {str(ROOT / name) for name in ('', 'tests', 'scripts', 'examples')}
    own = cwd if script == '-m' else str(Path(script).parent)
    sys.path = [own, *(path for path in sys.path if path not in folders), str(ROOT / 'tests')]
    with contextlib.suppress(OSError):  # /proc/PID/cmdline remains the server's
        Path('/proc/self/comm').write_text(f'{Path(script).name} {environment.get("RANK")}')
    try:
        if script == '-m':
            # torchrun reads the source files of its stack nine times to name a method for its log.
            from torch.distributed.elastic.rendezvous import dynamic_rendezvous

            dynamic_rendezvous.get_method_name = lambda n=2: sys._getframe(n).f_code.co_name
            sys.argv = options
            runpy.run_module(options[0], run_name='__main__', alter_sys=True)
        else:
            sys.argv = [script, *options]
            runpy.run_path(script, run_name='__main__')
    except Exception as e:  # noqa: BLE001, ends as a script does
        traceback.print_exception(e.with_traceback(e.__traceback__.tb_next))  # without this file
        sys.exit(1)
