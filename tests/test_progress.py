"""What a long run prints: progress, time left, where it resumes, warnings, what to do next."""

import argparse
import io
import itertools
import re
import shlex
import time

import pytest

import cifar
import data
import imagenet
from programs import run_script
from samples import (
    evaluated,
    make_folder_set,
    make_photographs,
    records_of,
    weights_of,
    words,
)
from support import logs, program, runs

SMALL = '--dataset folder --dataroot set --depth 10 --width 0.25 --batch_size 5 --nthread 1'
PHOTOS = '--imagenetpath photos --image_size 40 --width 0.25 --batch_size 12 --nthread 1'
BETTER = 'is better than its teacher'


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A folder set of two classes, dark and light, photographs, and an untrained teacher."""
    folder = tmp_path_factory.mktemp('progress')
    make_folder_set(folder / 'set', n=12)
    make_photographs(folder / 'photos', train=6, val=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        argv = words(SMALL, '--epochs 0 --save logs/teacher')
        assert program.call_main(cifar.main, argv) == 0
    return folder


@pytest.fixture
def home(folder, monkeypatch):
    monkeypatch.chdir(folder)
    return folder


def printed(capsys, *options, main=cifar.main, small=SMALL, status=0):
    """(lines on stdout, lines on stderr) of a run in this process."""
    capsys.readouterr()
    assert program.call_main(main, words(small, *options)) == status
    out, err = capsys.readouterr()
    assert '\r' not in out + err, 'no bar without a terminal'
    return out.splitlines(), err.splitlines()


class Clock:
    """A monotonic clock that a test sets."""

    def __init__(self, monkeypatch):
        self.now = 1e6
        monkeypatch.setattr(time, 'monotonic', lambda: self.now)
        monkeypatch.setattr(data.Progress, 'last_line', self.now)


class Terminal(io.StringIO):
    def isatty(self):
        return True


# ------------------------ the bar, or a line every few minutes


def test_without_a_terminal_a_line_comes_after_minutes_of_silence(monkeypatch, capsys):
    clock, lines = Clock(monkeypatch), []
    with data.Progress(4000, 'epoch 1/9') as progress:
        for seconds in (100, 139, 2, 100, 100, 100):
            clock.now += seconds
            due = progress.is_due()
            progress.update(500, 'loss 2.000')
            lines.append(capsys.readouterr().out)
            assert due == bool(lines[-1])
    expected = 'epoch 1/9: 38 % of 4,000 images, loss 2.000\n'
    assert lines == ['', '', expected, '', '', expected.replace('38', '75')]


def test_steps_of_less_than_a_minute_leave_no_silence_of_five_minutes(monkeypatch, capsys):
    """Also if one loop follows another, such as a test an epoch."""
    clock, times = Clock(monkeypatch), [1e6]
    for doing in 'epoch 1/9', 'testing', 'epoch 2/9':
        with data.Progress(20, doing) as progress:
            for _ in range(20):
                clock.now += 55
                progress.update(1)
                if capsys.readouterr().out:
                    times.append(clock.now)
    assert len(times) > 10 and max(b - a for a, b in itertools.pairwise(times)) <= 300


def test_on_a_terminal_there_is_a_bar_and_a_hidden_one_prints_nothing(monkeypatch, capsys):
    clock, terminal = Clock(monkeypatch), Terminal()
    for hidden in False, True:
        with data.Progress(10, 'testing', hidden=hidden, file=terminal) as progress:
            for _ in range(10):
                clock.now += 1000
                assert not progress.is_due()
                progress.update(1, 'loss 2.000')
        assert bool(terminal.getvalue()) != hidden
        assert hidden or 'loss 2.000' in terminal.getvalue()
        terminal.seek(0), terminal.truncate()
    assert capsys.readouterr().out == ''


@pytest.mark.parametrize('main, small', [(cifar.main, SMALL), (imagenet.main, PHOTOS)])
def test_the_loss_is_shown_from_the_first_step_on_and_then_the_time_left(
    main, small, home, capsys, monkeypatch, tmp_path
):
    notes, update = [], data.Progress.update

    def noted(self, images, note=''):
        if self.doing.startswith('epoch'):
            notes.append(note)
        update(self, images, note)

    monkeypatch.setattr(data.Progress, 'update', noted)
    monkeypatch.setattr(data.Progress, 'SILENCE', -1)
    out, _ = printed(capsys, '--epochs 2 --save', tmp_path / 'run', main=main, small=small)
    assert len(notes) == (10 if main is cifar.main else 4)
    pattern = r'loss \d+\.\d{3}, (accuracy|top-1) \d+\.\d %, (time left unknown|\d\d:\d\d left)'
    assert all(re.fullmatch(pattern, note) for note in notes), notes
    assert ['unknown' in note for note in notes] == [True] + [False] * (len(notes) - 1)
    lines = [line for line in out if re.match(r'epoch \d/2: \d+ % of', line)]
    assert len(lines) == len(notes) and lines[-1].endswith(notes[-1])
    assert lines[-1].startswith('epoch 2/2: 100 % of ')


def test_the_time_left_is_that_of_the_whole_run(monkeypatch):
    clock = Clock(monkeypatch)
    run = runs.Run(argparse.Namespace(epochs=10), None, here=False, epoch=2)
    assert run.time_left(0.5) == 'time left unknown'
    clock.now += 60
    assert run.time_left(0.75) == '29:00 left', '7.25 epochs of 4 minutes'
    clock.now += 60
    run.epoch = 3
    assert run.time_left(0.0) == '28:00 left', 'over an epoch'
    clock.now += 7200
    assert run.time_left(0.5) == '13:13:00 left', 'the speed is the mean of all steps'
    run.epoch = 9
    assert run.time_left(1.0) == '00:00 left'


# ------------------------ the lines before the first epoch


@pytest.mark.parametrize(
    'options, main, small',
    [
        ('--randomcrop_pad 50', cifar.main, SMALL),
        ('--dataroot nowhere', cifar.main, SMALL),
        ('--teacher_id nobody', cifar.main, SMALL),
        ('--batch_size 23 --randomcrop_pad 32', cifar.main, SMALL),
        ('--imagenetpath nowhere', imagenet.main, PHOTOS),
        ('--teacher_params nobody.hkl', imagenet.main, PHOTOS),
        ('--validate 17', imagenet.main, PHOTOS),
        ('--student_params logs/teacher', imagenet.main, PHOTOS),
    ],
)
def test_a_run_folder_is_not_announced_if_something_is_refused(options, main, small, home, capsys):
    out, err = printed(
        capsys, options, '--epochs 1 --save logs/refused', main=main, small=small, status=2
    )
    assert len(err) == 1 and not any('run folder' in line for line in out)
    assert not (home / 'logs/refused').exists()


@pytest.mark.parametrize('main, small', [(cifar.main, SMALL), (imagenet.main, PHOTOS)])
def test_a_resumed_run_says_from_which_epoch(main, small, home, capsys, tmp_path):
    save = ['--save', str(tmp_path / 'run'), '--resume']
    out, _ = printed(capsys, '--epochs 1', *save, main=main, small=small)
    assert f'run folder: {tmp_path}/run' in out and not any('resuming' in line for line in out)
    out, _ = printed(capsys, '--epochs 2', *save, main=main, small=small)
    at = out.index(f'run folder: {tmp_path}/run')
    assert out[at + 1] == 'resuming after epoch 1 of 2'
    assert [line[:9] for line in out if line.startswith('epoch ')] == ['epoch 2/2']
    out, _ = printed(capsys, '--epochs 2', *save, main=main, small=small)
    assert out == [f'{tmp_path}/run: already trained for 2 epochs: nothing to do']


@pytest.mark.parametrize(
    'drops, expected',
    [
        ('[2,5]', 'lr 0.1, times 0.2 at the start of epoch 2'),
        ('[1,2,7]', 'lr 0.1, times 0.2 at the start of epochs 1, 2'),
        ('[3]', 'lr 0.1'),
    ],
)
def test_rate_drops_are_printed_if_they_are_within_the_run(drops, expected, home, capsys, tmp_path):
    out, _ = printed(capsys, f'--epochs 2 --epoch_step {drops} --save', tmp_path / 'run')
    (line,) = [line for line in out if 'parameters; ' in line]
    assert line.endswith(f'; {expected}')


# ------------------------ the line of an epoch


def test_top_5_is_printed_if_there_are_more_than_5_classes():
    record = {'epoch': 4, 'epochs': 9, 'lr': 0.1, 'at_losses': [], 'beta': 0}
    record |= {'train_loss': 1, 'test_loss': 2, 'train_time': 3, 'test_time': 4}
    record |= {'train_acc': [50.0, 80.0], 'test_acc': [40.0, 70.0]}
    line = logs.epoch_line(record | {'num_classes': 6})
    assert 'acc 50.00 % (top-5 80.00 %)' in line and 'acc 40.00 % (top-5 70.00 %)' in line
    line = logs.epoch_line(record | {'num_classes': 5})
    assert 'acc 40.00 %, ' in line and 'top-5' not in line
    for broken, said in (0, False), (3, True):
        line = logs.epoch_line(record | {'num_classes': 5, 'broken_images': broken})
        assert ('broken images: 3' in line) == said


def share_of(line):
    found = re.search(r'transfer (\d+) ?% of the loss', line)
    return found and int(found[1])


@pytest.mark.parametrize('decay', ['none', 'linear'])
def test_the_share_of_the_transfer_is_printed_for_three_epochs(decay, home, capsys, tmp_path):
    options = f'--teacher_id teacher --beta 500 --beta_decay {decay} --epoch_step [9]'
    out, _ = printed(capsys, options, '--epochs 5 --save', tmp_path / 'run')
    lines = [line for line in out if line.startswith('epoch ')]
    records = records_of(tmp_path / 'run')
    assert len(lines) == len(records) == 5
    for line, record in zip(lines[:3], records):
        beta = 500 * (1 - (record['epoch'] - 1) / 4) if decay == 'linear' else 500
        share = 100 * beta * sum(record['at_losses']) / record['train_loss']
        assert share_of(line) == pytest.approx(share, abs=0.51) and 1 < share < 99
        assert f'at {" ".join(f"{v:.2e}" for v in record["at_losses"])}, ' in line
    assert [share_of(line) for line in lines[3:]] == [None, None]
    assert all(' at ' in line for line in lines[3:])


def test_a_kd_run_prints_no_at_numbers(home, capsys, tmp_path):
    out, _ = printed(capsys, '--teacher_id teacher --alpha 0.9 --epochs 1 --save', tmp_path / 'run')
    (line,) = [line for line in out if line.startswith('epoch ')]
    assert ' at ' not in line and share_of(line) is None and 'test loss' in line
    assert len(records_of(tmp_path / 'run')[0]['at_losses']) == 3, 'the log has them'


def test_before_at_start_the_transfer_is_no_part_of_the_loss(home, capsys, tmp_path):
    weak = '--depth 18 --epochs 0 --save logs/weak'
    if not (home / 'logs/weak').exists():
        printed(capsys, weak, main=imagenet.main, small=PHOTOS)
    options = '--teacher_params logs/weak --beta 100 --at_start 2 --epochs 2 --save'
    out, _ = printed(capsys, options, tmp_path / 'run', main=imagenet.main, small=PHOTOS)
    shares = [share_of(line) for line in out if line.startswith('epoch ')]
    assert shares[0] in (None, 0) and shares[1] > 0


# ------------------------ a student that passes its teacher


def test_a_student_that_passes_its_teacher_is_warned_of_once(home, capsys, tmp_path):
    """The untrained teacher has 50 %, and the classes are easy. Each run is stopped and resumed."""
    options = '--teacher_id teacher --beta 1 --epoch_step [99] --resume --save'
    found = []
    for epochs in range(1, 9):
        _, err = printed(capsys, options, tmp_path / 'run', f'--epochs {epochs}')
        record = records_of(tmp_path / 'run')[-1]
        found += [(epochs, line) for line in err if BETTER in line]
        passed = [r['epoch'] for r in records_of(tmp_path / 'run') if r['test_acc'] > 50]
        assert [epoch for epoch, _ in found] == passed[:1]
    assert record['teacher_test_acc'] == 50 and len(passed) > 2, 'otherwise nothing is tested'
    (epoch, line), acc = found[0], records_of(tmp_path / 'run')[passed[0] - 1]['test_acc']
    assert line.startswith(
        f'warning: after epoch {epoch} the student ({acc:.2f} %) {BETTER} (50.00 %)'
    )


def test_in_one_go_the_warning_comes_once_too(home, capsys, tmp_path):
    options = '--teacher_id teacher --beta 1 --epoch_step [99] --epochs 8 --save'
    _, err = printed(capsys, options, tmp_path / 'run')
    assert sum(BETTER in line for line in err) == 1


# ------------------------ the last line


@pytest.mark.parametrize('script, small', [('cifar.py', SMALL), ('imagenet.py', PHOTOS)])
def test_the_last_line_says_what_to_do_next(script, small, home):
    save = f'logs/its {script[:-3]}'
    done = run_script(script, *words(small, '--epochs 1 --save'), save, cwd=home)
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    pattern = r'weights: (.+)\. Test them: (python .+)\. Convert them: (python .+)'
    file, *commands = re.fullmatch(pattern, last).groups()
    assert (home / file).samefile(home / save / 'model.hkl') and weights_of(home / save)
    test, convert = (shlex.split(command)[1:] for command in commands)
    done = run_script(*test, cwd=home)
    assert done.returncode == 0, done.stderr
    tested, logged = evaluated(done.stdout), records_of(home / save)[-1]
    assert all(tested[k] == logged[k] for k in ('test_loss', 'test_acc'))
    pytest.importorskip('onnx')
    convert[convert.index('net.onnx')] = f'{script}.onnx'
    done = run_script(*convert, cwd=home)
    assert done.returncode == 0, done.stderr
    assert (home / f'{script}.onnx').stat().st_size > 1000
