"""support/ranks.py: several processes start together, and end together with one message."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from programs import run_script
from samples import make_photographs, words
from support import ranks

ROOT = Path(__file__).resolve().parent.parent
LAUNCHED = {'WORLD_SIZE': '2', 'RANK': '0', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': '29500'}

# A rank of two: `python rank.py PORT RANK WHAT`.
SCRIPT = f"""
import os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
_, port, rank, what = sys.argv
os.environ.update(WORLD_SIZE='2', RANK=rank, MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
os.environ['TORCHELASTIC_USE_AGENT_STORE'] = 'True'  # the test has it, as torchrun does
import torch
from support import photographs, program, ranks
from support.program import UserError

def main(argv):
    ranks.join(argv)
    if what.startswith('first') and rank == '1' or what.startswith('second') and rank == '0':
        torch.distributed.all_reduce(torch.zeros(1))  # waits for the rank that fails
        torch.distributed.all_reduce(torch.zeros(1))
    torch.distributed.all_reduce(torch.zeros(1))
    if what.endswith('error') and not what.startswith('end_all'):
        raise UserError('the reason', status=1)
    if what.endswith('bug'):
        raise KeyError('a bug')
    if what.endswith('killed'):
        os.kill(os.getpid(), signal.SIGKILL)
    if what.endswith('stopped'):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    if what == 'end_all error':
        ranks.end_all(UserError('the reason'), teller=1, status=3)

if __name__ == '__main__':
    ranks.leave(program.call_main(ranks.together(main)))
"""


@pytest.fixture
def both(tmp_path, monkeypatch):
    """both(what): the two ranks of SCRIPT, ended."""
    (tmp_path / 'rank.py').write_text(SCRIPT)
    monkeypatch.delenv('TORCHELASTIC_RUN_ID', raising=False)

    def call(what):
        store = dist.TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False)
        done = [None, None]

        def run(rank):
            script = tmp_path / 'rank.py'
            done[rank] = run_script(script, store.port, rank, what, cwd=tmp_path)

        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return done

    return call


@pytest.fixture
def environment(monkeypatch):
    """environment(**variables): those of a launcher, no others."""

    def change(**variables):
        for name in 'WORLD_SIZE', 'RANK', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT':
            monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv('TORCHELASTIC_RUN_ID', raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return change


def lines_of(done):
    """What a program has printed on stderr, without the warnings of torch."""
    lines = [line for line in done.stderr.splitlines() if line]
    return [line for line in lines if line.startswith('rank.py') or 'Traceback' in line]


# ------------------------ how they end


@pytest.mark.parametrize('which', ['first', 'second', 'each'])
def test_one_rank_prints_its_mistake_and_all_end_with_its_status(both, which):
    done = both(f'{which} error')
    assert [d.returncode for d in done] == [1, 1]
    (line,) = lines_of(done[0]) + lines_of(done[1])
    assert line.endswith(': error: the reason')
    if which != 'each':
        assert line.startswith(f'rank.py, rank {int(which == "second")}: ')


def test_end_all_ends_all_with_the_message_of_one(both):
    done = both('end_all error')
    assert [d.returncode for d in done] == [3, 2]  # the rank that prints ends with 2
    assert lines_of(done[0]) == [] and lines_of(done[1]) == ['rank.py, rank 1: error: the reason']


def test_a_stopped_rank_stops_the_others(both):
    done = both('second stopped')
    assert [d.returncode for d in done] == [143, 143]
    assert lines_of(done[0]) == [] and 'stopped by SIGTERM' in lines_of(done[1])[0]


def test_a_rank_that_is_killed_ends_the_others_in_one_line(both):
    done = both('second killed')
    assert [d.returncode for d in done] == [1, -signal.SIGKILL]
    (line,) = lines_of(done[0])
    assert line.startswith('rank.py, rank 0: error: lost the connection to another process')


def test_a_bug_keeps_its_traceback_on_the_rank_that_has_it(both):
    done = both('second bug')
    assert done[0].returncode == 1 and lines_of(done[0]) == []
    assert done[1].returncode != 0 and "KeyError: 'a bug'" in done[1].stderr


def test_ranks_that_succeed_end_with_status_0(both):
    assert [d.returncode for d in both('success')] == [0, 0]


# ------------------------ how they start


@pytest.mark.parametrize(
    'changed, fault',
    [
        ({}, ''),
        ({'RANK': ''}, 'but without RANK'),
        ({'RANK': '2'}, 'RANK=2: not a number from 0 to 1'),
        ({'RANK': '-1'}, 'RANK=-1: not a number'),
        ({'RANK': 'abc'}, 'RANK=abc: not a number'),
        ({'MASTER_ADDR': ''}, 'but without MASTER_ADDR'),
        ({'MASTER_PORT': ''}, 'but without MASTER_PORT'),
        ({'MASTER_PORT': 'abc'}, 'MASTER_PORT=abc: not a number'),
        ({'MASTER_PORT': '65536'}, 'MASTER_PORT=65536: not a number from 0 to 65535'),
        ({'MASTER_ADDR': '', 'MASTER_PORT': ''}, 'but without MASTER_ADDR, MASTER_PORT'),
    ],
)
def test_incomplete_variables_are_named(changed, fault, environment):
    environment(**LAUNCHED | changed)
    found = ranks.find_fault(2)
    assert fault in found and bool(fault) == bool(found)


@pytest.mark.parametrize(
    'variables, status, error',
    [
        ({'WORLD_SIZE': '2'}, 2, 'imagenet.py: error: WORLD_SIZE=2, but without RANK, MASTER_'),
        ({'WORLD_SIZE': '2', 'RANK': '0'}, 2, 'imagenet.py, rank 0: error: WORLD_SIZE=2, but'),
        ({'WORLD_SIZE': '2', 'RANK': '1'}, 2, ''),
        (LAUNCHED | {'RANK': '2'}, 2, 'imagenet.py, rank 2: error: RANK=2: not a number from 0'),
        ({'WORLD_SIZE': 'abc'}, 2, 'imagenet.py: error: WORLD_SIZE=abc: not a number'),
        ({'WORLD_SIZE': '', 'RANK': ''}, 2, 'imagenet.py: error: --imagenetpath: give'),
        ({'WORLD_SIZE': '1', 'RANK': '0'}, 2, 'imagenet.py: error: --imagenetpath: give'),
    ],
)
def test_a_wrong_environment_is_one_line_and_help_always_works(
    variables, status, error, environment, tmp_path
):
    environment(**variables)
    done = run_script('imagenet.py', cwd=tmp_path)
    assert done.returncode == status and done.stderr.startswith(error)
    assert done.stderr.count('\n') == bool(error)
    helped = run_script('imagenet.py', '--help', cwd=tmp_path)
    assert helped.returncode == 0 and 'usage: imagenet.py' in helped.stdout


def test_every_program_has_help_in_any_environment(environment, tmp_path):
    environment(WORLD_SIZE='abc', RANK='x')
    programs = [ROOT / 'cifar.py', *sorted((ROOT / 'scripts').glob('*.py'))]
    programs = [p for p in programs if 'Parser(__doc__)' in p.read_text()]
    assert len(programs) > 5
    for path in programs:
        done = run_script(path, '--help', cwd=tmp_path)
        assert done.returncode == 0 and f'usage: {path.name}' in done.stdout, done.stderr


def test_a_rank_that_waits_for_the_others_can_be_stopped(environment, tmp_path):
    environment(**LAUNCHED | {'RANK': '1', 'MASTER_ADDR': 'no-such-host.invalid'})
    (tmp_path / 'rank.py').write_text(
        f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from support import program, ranks

def main(argv):
    print('joining', flush=True)
    ranks.join(argv)

sys.exit(program.call_main(main))
"""
    )
    command = [sys.executable, tmp_path / 'rank.py']
    quiet = {'stdout': subprocess.PIPE, 'stderr': subprocess.DEVNULL, 'text': True}
    with subprocess.Popen(command, **quiet) as rank:
        try:
            assert rank.stdout.readline() == 'joining\n'
            time.sleep(1)  # it looks for the host, again and again
            rank.terminate()
            assert rank.wait(20) in (-signal.SIGTERM, 143)
        finally:
            rank.kill()


# ------------------------ the launchers of torch


def launched(launcher, *command, cwd):
    """A command in two processes of a launcher, with the lines that are ours of its stderr."""
    options = ['--nproc_per_node', '2', '--master_port', str(free_port())]
    environment = {k: v for k, v in os.environ.items() if k not in LAUNCHED}
    done = subprocess.run(
        [sys.executable, '-m', launcher, *options, *command],
        check=False,
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
    )
    # torchrun ends in a traceback of its own.
    errors = [v for v in done.stderr.splitlines() if '.py, rank' in v or '.py: ' in v]
    ours = f'File "{ROOT}'  # not the .venv in it
    own = [v for v in done.stderr.splitlines() if ours in v and 'site-packages' not in v]
    return done, [v for v in errors if v[:1] not in 'EIW'] + own


def free_port():
    return dist.TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False).port


@pytest.mark.usefixtures('forked_scripts')
def test_a_broken_photograph_of_one_rank_is_reported_once(tmp_path):
    make_photographs(tmp_path / 'set')
    file = tmp_path / 'set/train/city/3.jpg'
    file.write_bytes(file.read_bytes()[:200])
    options = words('--imagenetpath set --image_size 40 --width 0.25 --batch_size 12 --nthread 1')
    script = str(ROOT / 'imagenet.py')
    done, errors = launched('torch.distributed.run', script, *options, cwd=tmp_path)
    assert done.returncode and len(errors) == 1 and '3.jpg' in errors[0], done.stderr
    # The old launcher starts the same processes, and adds an option to the command.
    file.unlink()
    done, errors = launched(
        'torch.distributed.launch', script, *options, '--epochs', '1', cwd=tmp_path
    )
    assert done.returncode == 0 and 'epoch 1/1' in done.stdout, done.stderr


def test_torchrun_of_cifar_says_what_to_run_instead(tmp_path):
    script = str(ROOT / 'cifar.py')
    done, errors = launched('torch.distributed.run', script, cwd=tmp_path)
    assert done.returncode and not os.listdir(tmp_path)
    (error,) = errors
    assert error.startswith('cifar.py, rank 0: error: ') and 'run plain `python cifar.py`' in error
