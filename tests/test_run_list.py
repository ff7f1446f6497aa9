"""The runner of the table scripts, with a program that does nothing in place of the training."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest

import data
from support.files import lock_folder
from support.program import UserError
from table_scripts import CIFAR, ROOT, finish, options, start, until, write_run

sys.path.insert(0, str(ROOT / 'scripts'))
import run_list
import table_list

FAKE_PYTHON = """#!/bin/bash
# Stands for python: a run takes a moment, and writes a log and empty weights. Each says in CALLS
# when it begins and ends.
case $1 in *.py) ;; *) exit ;; esac
case $1 in scripts/*) echo "tool $1" >> "$CALLS"; echo 3; exit ;; esac
while [ $# -gt 0 ]; do
  case $1 in
    --save) save=$2 ;;
    --epochs) epochs=$2 ;;
    --teacher_id | --teacher_params) [ -f "$2/model.hkl" ] || echo "no teacher" >> "$CALLS" ;;
  esac
  shift
done
name=${save##*/}
echo "begin $name ${CUDA_VISIBLE_DEVICES:-}" >> "$CALLS"
trap 'echo "stopped $name" >> "$CALLS"; exit 143' TERM
sleep "${PAUSE:-0.05}" > /dev/null 2>&1 & wait # after a stop it holds no pipe
if [ -z "$save" ]; then echo "json_stats: {}"; exit; fi # a test of a net
if [ "$name" = "${FAIL:-}" ]; then echo "cifar.py: error: made to fail" >&2; exit 3; fi
mkdir -p "$save"
record="{\\"epochs\\": $epochs, \\"epoch\\": $epochs, \\"test_acc\\": 50.0}"
echo "json_stats: $record" > "$save/log.txt"
touch "$save/model.hkl"
echo "end $name" >> "$CALLS"
"""


@pytest.fixture
def fake(tmp_path):
    """(the environment of a script whose Python does nothing, calls(): what that was called
    for)."""
    (tmp_path / 'venv' / 'bin').mkdir(parents=True)
    python = tmp_path / 'venv' / 'bin' / 'python'
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    log = tmp_path / 'calls'
    log.touch()

    def calls():
        return [line.rstrip() for line in log.read_text().splitlines()]

    given = {'VENV': str(tmp_path / 'venv'), 'CALLS': str(log), 'LOGS': str(tmp_path / 'logs')}
    return given | {'DATAROOT': str(tmp_path), 'EPOCHS': '2', 'CUDA_VISIBLE_DEVICES': ''}, calls


def test_what_is_done_is_skipped_without_a_start_of_python(fake):
    given, calls = fake
    assert finish('figure_convergence', SEEDS='0', **given)[0] == 0
    first = calls()
    assert first.count('tool scripts/plot.py') == 1 and len(first) == 2 * 4 + 2
    status, out, _ = finish('figure_convergence', SEEDS='0 1', **given)
    assert status == 0 and out.count(': done') == 4
    assert len([c for c in calls()[len(first) :] if c.startswith('begin')]) == 4
    # More epochs, or weights that a kill has left older than the log, are not done.
    log = Path(given['LOGS']) / 'wrn_16_1_seed0' / 'log.txt'
    os.utime(log, (time.time() + 100,) * 2)
    status, out, _ = finish('figure_convergence', SEEDS='0 1', **given)
    assert status == 0 and out.count(': done') == 7 and '== wrn_16_1_seed0\n' in out
    # Nor is a run of other options, which the training script itself compares.
    for extra in '--lr 0.5', '--epochs 3':
        status, out, _ = finish('figure_convergence', SEEDS='1', **given | {'EXTRA': extra})
        assert status == 0 and ': done' not in out


def test_folders_may_have_names_that_are_not_utf8(fake, tmp_path):
    given, calls = fake
    given |= {'SEEDS': '0', 'LOGS': os.fsdecode(os.fsencode(tmp_path) + b'/caf\xe9')}
    for done in 0, 4:
        status, out, err = finish('figure_convergence', **given)
        assert status == 0 and out.count(': done') == done, err
    assert calls()[-1] == 'tool scripts/plot.py'


@pytest.mark.parametrize('name', ['LOGS', 'DATAROOT'])
def test_a_folder_that_cannot_be_made_is_one_line_that_names_it(name, fake, tmp_path):
    given, calls = fake
    (tmp_path / 'file').touch()
    given |= {'SEEDS': '0', name: str(tmp_path / 'file/below')}
    status, _, err = finish('figure_convergence', **given)
    assert status == 2 and not calls()
    error = f'figure_convergence.sh: error: {name} {tmp_path}/file/below: '
    assert err == f'{error}{tmp_path}/file is not a folder\n'


def test_a_part_of_a_script_ends_in_its_table(fake):
    """With ONLY, what is left out is neither measured nor drawn."""
    given, calls = fake
    given |= {'SEEDS': '0'}
    status, _, err = finish('controls', **given, ONLY='untrained_*')
    assert status == 0 and calls()[-1] == 'tool scripts/summarize.py', err
    assert not [c for c in Path(given['LOGS']).iterdir() if c.name.startswith('equal_time')]
    for names, pictures in ('wrn_16_2_*', 0), ('wrn_16_1_*', 1):
        before = len(calls())
        status, _, err = finish('figure_convergence', **given, ONLY=names)
        assert status == 0, err
        assert calls()[before:].count('tool scripts/plot.py') == pictures


def test_a_stop_does_not_wait_for_the_test_of_a_net(fake, tmp_path):
    given, calls = fake
    weights = tmp_path / 'a.hkl'
    weights.touch()
    given |= {'IMAGENET': str(tmp_path), 'SEEDS': '0', 'TEACHER_PARAMS': str(weights)}
    process = start('table5', **given, PAUSE='8')
    until(calls)
    time.sleep(0.2)  # its trap stands
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == 143 and calls()[-1] == 'stopped'
    assert not [f for f in Path(given['LOGS']).iterdir() if f.suffix == '.txt']


@pytest.mark.parametrize(
    'script, given, named',
    [
        ('table1', {'SEEDS': ' '}, 'SEEDS'),
        ('cifar100', {'EPOCHS': '08'}, 'EPOCHS=08'),
        ('cifar100', {}, '100 classes'),
    ],
)
def test_what_cannot_be_meant_is_refused(script, given, named, fake, tmp_path):
    environment, calls = fake
    for split in 'train', 'test':
        (tmp_path / split / 'cat').mkdir(parents=True)
    status, _, err = finish(script, **environment | given)
    assert status == 2 and named in err and err.count('\n') == 1 and not calls()


def test_a_run_of_another_length_is_not_gone_on_with(fake):
    given, calls = fake
    write_run(Path(given['LOGS']), 'wrn_16_2_seed0', [9.0], epochs=30)
    status, _, err = finish('table2', **given | {'EPOCHS': '200', 'SEEDS': '0'})
    assert status == 2 and 'wrn_16_2_seed0 of 30 epochs, not 200' in err and not calls()
    status, _, err = finish('table2', **given | {'EPOCHS': '30', 'SEEDS': '0'})
    assert status == 0 and len(calls()) > 2, err


def test_a_net_is_tested_again_where_it_is_another(fake, tmp_path):
    given, calls = fake
    given |= {'IMAGENET': str(tmp_path), 'SEEDS': '0'}
    for name, times in ('a.hkl', 1), ('a.hkl', 1), ('b.hkl', 2), ('b.hkl', 3):
        weights = tmp_path / name
        weights.touch()
        os.utime(weights, (time.time() + (100 if times == 3 else -100),) * 2)
        status, _, err = finish('table5', **given, TEACHER_PARAMS=str(weights))
        assert status == 0, err
        assert len([c for c in calls() if c == 'begin']) == times, name


@pytest.mark.parametrize('jobs', ['1', '3'])
def test_a_run_that_fails_stops_the_script_with_its_name(fake, jobs):
    given, calls = fake
    given |= {'SEEDS': '0', 'JOBS': jobs, 'FAIL': 'at_wrn_16_1_from_wrn_16_2_seed0'}
    status, out, err = finish('table2', **given, PAUSE='0.1')
    assert status == 3 and 'made to fail' in err
    assert 'table2.sh: error: the run at_wrn_16_1_from_wrn_16_2_seed0 failed, exit status 3' in err
    started = [c.split()[1] for c in calls() if c.startswith('begin')]
    over = [c.split()[1] for c in calls() if c.startswith(('end', 'stopped'))]
    assert sorted(over) == sorted(set(started) - {given['FAIL']}), 'nothing runs on'
    assert 'tool scripts/summarize.py' not in calls() and len(started) < 9
    del given['FAIL']
    status, out, _ = finish('table2', **given)
    assert status == 0 and '== wrn_16_2_seed0: done' in out and calls()[-1].startswith('tool')


@pytest.mark.parametrize('script', [*CIFAR, 'table4'])
def test_teachers_are_finished_before_their_students_begin(script, fake, tmp_path):
    given, calls = fake
    files = {k: str(tmp_path / 'calls') for k in ('STUDENT_PARAMS', 'TEACHER_PARAMS')}
    seeds = '0 1' if script == 'controls' else '0'  # the only one with teachers of other seeds
    given |= {'JOBS': '30', 'SEEDS': seeds, 'BETAS': '10'} | files
    given |= {'CUB': 'birds', 'SCENES': 'rooms'}
    status, _, err = finish(script, **given)
    assert status == 0, err
    assert 'no teacher' not in calls() and calls()[-1].startswith('tool')
    assert len([c for c in calls() if c.startswith('end')]) == len(options(script, **given))


def test_runs_side_by_side_have_a_gpu_each(fake):
    given, calls = fake
    given |= {'JOBS': '2', 'SEEDS': '0 1', 'CUDA_VISIBLE_DEVICES': '5,7'}
    status, _, err = finish('figure_convergence', **given, PAUSE='0.4')
    assert status == 0, err
    under_way, most, gpus = {}, 0, set()
    for call in calls():
        kind, name, *gpu = call.split()
        if kind == 'begin':
            assert gpu[0] not in under_way.values(), 'two runs on one GPU'
            under_way[name] = gpu[0]
            gpus |= set(gpu)
        elif kind == 'end':
            del under_way[name]
        most = max(most, len(under_way))
    assert most == 2 and gpus == {'5', '7'}
    assert (Path(given['LOGS']) / 'wrn_16_2_seed0.out').exists()


@pytest.mark.parametrize('signum, status', [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_script_that_is_stopped_stops_its_runs(fake, signum, status):
    given, calls = fake
    process = start('table2', **given, SEEDS='0', JOBS='2', PAUSE='30')
    until(lambda: len(calls()) == 2)
    time.sleep(0.2)  # the trap of the second stands
    process.send_signal(signum)
    process.communicate()
    assert process.returncode == status
    assert sorted(calls()[2:]) == ['stopped wrn_16_1_seed0', 'stopped wrn_16_2_seed0']


def test_a_seed_that_is_given_twice_is_trained_once(fake):
    given, calls = fake
    status, _, err = finish('table2', **given, SEEDS='0 0', JOBS='2')
    assert status == 0, err
    started = [call for call in calls() if call.startswith('begin')]
    assert len(started) == len(set(started)) == 9


def plan_of(script, **given):
    given = {'CALLER': '/home', 'LOGS': 'logs', 'DATAROOT': 'sets', 'EPOCHS': '2'} | given
    runs = table_list.read_script(ROOT / 'scripts' / f'{script}.sh')
    return table_list.Plan(runs, table_list.read_environment(given))


def test_the_data_that_extra_names_are_downloaded(monkeypatch):
    calls = []
    monkeypatch.setattr(run_list.Runner, 'call', lambda self, words: calls.append(words))
    monkeypatch.setattr(os, 'makedirs', lambda path, exist_ok: None)
    plan = plan_of('table2', EXTRA='--dataset CIFAR100', JOBS='2')
    run_list.Runner(plan).fetch_data()
    assert calls == [['-c', run_list.FETCH, 'CIFAR100', '/home/sets']]


def test_a_download_that_fails_ends_with_its_status(monkeypatch, capsys):
    def fail(dataset, root):
        raise UserError(f'{root}: no space for {dataset}', 3)

    monkeypatch.setattr(data, 'open_sets', fail)
    monkeypatch.setattr(sys, 'argv', ['-c', 'CIFAR10', '/sets'])
    with pytest.raises(SystemExit) as e:
        exec(run_list.FETCH)  # noqa: S102
    assert e.value.code == 3
    assert capsys.readouterr().err == 'cifar.py: error: /sets: no space for CIFAR10\n'


def test_a_stop_waits_for_all_runs_after_telling_all():
    """What the first still writes does not delay the second."""
    calls = []

    class Process:
        def __init__(self, name):
            self.terminate = lambda: calls.append(f'terminate {name}')
            self.wait = lambda: calls.append(f'wait {name}')

    runner = run_list.Runner(plan_of('table2', JOBS='2'))
    runner.running = {0: (None, Process('a')), 1: (None, Process('b'))}
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    runner.stop()
    assert calls == ['terminate a', 'terminate b', 'wait a', 'wait b']
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before


def test_extra_is_for_the_test_of_a_net_too():
    given = {'IMAGENET': 'photographs', 'TEACHER_PARAMS': '34.hkl'}
    plan = plan_of('table5', EXTRA='--image_size 112', **given)
    assert [run.is_test() for run in plan.runs] == [True, False, False]
    assert all(run.words[-2:] == ['--image_size', '112'] for run in plan.runs)


def test_a_net_that_another_process_trains_is_waited_for(fake):
    given, calls = fake
    folder = Path(given['LOGS']) / 'wrn_16_2_seed0'
    folder.mkdir(parents=True)
    lock = lock_folder(folder)
    process = start('table2', **given, SEEDS='0', ONLY='wrn_16_* at_wrn_*')
    until(lambda: 'end wrn_16_1_seed0' in calls())
    time.sleep(0.5)
    assert not [call for call in calls() if 'wrn_16_2_seed0' in call], 'nor is its student started'
    write_run(folder.parent, 'other', [9.0] * 2)
    for file in (folder.parent / 'other').iterdir():
        file.rename(folder / file.name)
    os.close(lock)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert out.count('== wrn_16_2_seed0: waiting for another process that trains it') == 1
    ended = [call.split()[1] for call in calls() if call.startswith('end')]
    assert ended == ['wrn_16_1_seed0', 'wrn_16_2_seed0', 'at_wrn_16_1_from_wrn_16_2_seed0']


def test_a_run_that_another_process_took_first_is_tried_again(fake, tmp_path):
    """Two scripts of a cluster start one net at the same moment: the second training is refused."""
    given, calls = fake
    folder = Path(given['LOGS']) / 'wrn_16_2_seed0'
    process = start(
        'table2', **given, SEEDS='0', ONLY='wrn_16_2_*', FAIL='wrn_16_2_seed0', PAUSE='2'
    )
    until(lambda: len(calls()) == 1)
    folder.mkdir(parents=True)
    lock = lock_folder(folder)
    until(lambda: len(process.stdout.readline()) and 'waiting' in process.stdout.readline())
    os.close(lock)
    _, err = process.communicate()
    assert process.returncode == 3, 'nobody holds it the second time: it has failed by itself'
    assert len([call for call in calls() if call.startswith('begin')]) == 2, err
