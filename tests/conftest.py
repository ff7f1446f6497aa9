import gc
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest

from programs import ForkedPopen, environment_of_forks, server_address, use_server

sys.path.insert(0, str(Path(__file__).parent.parent))

# The search for cycles among the half million objects of torch takes 7 s in each process otherwise.
gc.set_threshold(100_000, 20)

# Before torch is imported, and for the scripts that tests start: threads that wait for each other
# make tiny tensors a hundred times slower on a busy machine, and tests run side by side.
os.environ['OMP_NUM_THREADS'] = os.environ['TORCHINDUCTOR_COMPILE_THREADS'] = '1'

# The suite tests the CPU, where a command gives the same bits again; test_gpu.py takes the GPU back
# for its own processes. Kept in the environment, as the processes of pytest-xdist inherit it.
os.environ.setdefault('GPU_OF_TESTS', os.environ.get('CUDA_VISIBLE_DEVICES', 'all'))
os.environ['CUDA_VISIBLE_DEVICES'] = ''


def pytest_configure(config):
    """Give the processes of pytest-xdist one server of forks, which takes seconds to start."""
    if 'SERVER_OF_FORKS' in os.environ:
        use_server(os.environ['SERVER_OF_FORKS'])
    elif config.getoption('numprocesses', None):
        os.environ['SERVER_OF_FORKS'] = server_address()


def pytest_collection_finish():
    gc.freeze()  # what is there now stays


@pytest.fixture
def forked_scripts(monkeypatch):
    """Fork the Python scripts that the test starts, see programs.py; kill those that it leaves."""
    monkeypatch.setattr(subprocess, 'Popen', ForkedPopen)
    yield
    for process in multiprocessing.active_children():
        process.kill()


@pytest.fixture(scope='session')
def forked_venv(tmp_path_factory):
    """A folder for VENV: scripts that a shell script starts with its Python are forked."""
    return str(environment_of_forks(tmp_path_factory.mktemp('venv')))
