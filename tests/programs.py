"""Runs a script of this repository as a process of its own, without the seconds of importing torch:
the process is forked from a server that has imported it, and has done nothing else."""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

_processes = multiprocessing.get_context('forkserver')
_processes.set_forkserver_preload(
    ['torch', 'torch._dynamo', 'torchnet', 'hickle', 'cv2', 'tqdm', 'torch.utils.flop_counter']
)


def run_script(script, *options, cwd):
    """`python script options` in that folder, as subprocess.run returns it with its output."""
    words = [str(ROOT / script), *map(str, options)]
    with tempfile.TemporaryDirectory() as folder:
        printed = [Path(folder) / name for name in ('stdout', 'stderr')]
        process = _processes.Process(
            target=_become, args=(words, str(cwd), printed, {**os.environ})
        )
        process.start()
        process.join()
        texts = [path.read_text() for path in printed]
    return subprocess.CompletedProcess(words, process.exitcode, *texts)


def _become(words, cwd, printed, environment):
    for stream, path in enumerate(printed, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream)
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv, sys.path[0] = words, str(Path(words[0]).parent)
    runpy.run_path(words[0], run_name='__main__')
