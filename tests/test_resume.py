"""Resumed runs: a moved teacher or run folder, the right learning rate, the total time."""

import os
import shutil
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import cifar
import imagenet
import resnet
import utils
from samples import make_folder_set, make_photographs, records_of, same_weights, words
from support import program, runs, weights

SMALL = '--dataset folder --depth 10 --width 0.25 --batch_size 4 --nthread 1'
PHOTOGRAPHS = '--image_size 40 --width 0.125 --batch_size 4 --nthread 1'


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A working directory with small images in set/, and a teacher in nets/teacher."""
    make_folder_set(tmp_path / 'set')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', ['cifar.py'])
    assert train('--epochs 1 --save nets/teacher') == 0
    return tmp_path


def train(*options, dataroot='set'):
    """The exit status of cifar.py."""
    return program.call_main(cifar.main, words(SMALL, '--dataroot', dataroot, *options))


def test_a_teacher_that_has_moved_is_given_again(home, capsys):
    assert train('--epochs 1 --save run --teacher_id nets/teacher') == 0
    assert train('--epochs 2 --save whole --teacher_id nets/teacher') == 0
    Path('nets').rename('other')
    capsys.readouterr()
    assert train('--epochs 2 --save run --resume') == 2
    error = capsys.readouterr().err
    assert error.count('\n') == 1 and 'nets/teacher' in error and '--teacher_id' in error
    # Another net at the path given, and at the stored path, does not count.
    assert train('--epochs 1 --save nets/teacher --seed 7') == 0
    assert train('--epochs 2 --save run --resume --teacher_id nets/teacher') == 2
    assert train('--epochs 2 --save run --resume --teacher_id other/teacher') == 0
    assert same_weights(Path('run'), Path('whole'))
    assert records_of(Path('run'))[-1]['teacher_id'] == 'other/teacher'
    assert train('--epochs 3 --save run --resume') == 0, 'the new path is stored'


def test_the_stored_teacher_counts_if_another_is_given(home):
    assert train('--epochs 1 --save run --teacher_id nets/teacher') == 0
    assert train('--epochs 2 --save run --resume --teacher_id elsewhere') == 0
    assert records_of(Path('run'))[-1]['teacher_id'] == 'nets/teacher'


def test_another_net_as_the_teacher_is_refused_by_name(home, capsys):
    assert train('--epochs 1 --save run --teacher_id nets/teacher') == 0
    assert train('--epochs 1 --save nets/other --seed 7') == 0
    capsys.readouterr()
    assert train('--epochs 2 --save run --resume --teacher_id nets/other') == 2
    error = capsys.readouterr().err
    assert error.count('\n') == 1 and '--teacher_id nets/other: has other weights' in error
    assert len(records_of(Path('run'))) == 1


def test_a_run_of_the_other_program_is_refused_by_name(home, capsys):
    assert train('--epochs 1 --save run') == 0
    resumed = words('--imagenetpath set --save run --resume')
    assert program.call_main(imagenet.main, resumed) == 2
    assert 'this is a run of cifar.py' in capsys.readouterr().err


def test_a_log_that_cannot_be_read_is_written_again(home, monkeypatch):
    assert train('--epochs 1 --save run') == 0
    log = Path('run/log.txt').read_bytes()
    read = Path.read_bytes

    def refuse(path):
        if path.name == 'log.txt':
            raise PermissionError(13, 'Permission denied', str(path))
        return read(path)

    monkeypatch.setattr(Path, 'read_bytes', refuse)
    assert train('--epochs 1 --save run --resume') == 0
    monkeypatch.undo()
    assert (home / 'run/log.txt').read_bytes() == log


def test_a_run_continues_from_another_working_directory(home, monkeypatch):
    Path('logs').mkdir()
    Path('nets/teacher').rename('logs/teacher')
    assert train('--epochs 1 --save run --teacher_id teacher') == 0
    (home / 'elsewhere').mkdir()
    monkeypatch.chdir(home / 'elsewhere')
    assert train('--epochs 2 --save ../run --resume', dataroot='../set') == 0
    assert records_of(Path('../run'))[-1]['epoch'] == 2


def test_all_of_logs_can_be_moved_or_copied(home, monkeypatch):
    assert train('--epochs 1 --save nets/run --teacher_id nets/teacher') == 0
    shutil.copytree('nets', 'copy/of/nets')
    shutil.rmtree('nets')
    assert train('--epochs 2 --save copy/of/nets/run --resume') == 0
    assert records_of(Path('copy/of/nets/run'))[-1]['epoch'] == 2


def test_a_run_without_a_teacher_cannot_get_one(home, capsys):
    assert train('--epochs 1 --save run') == 0
    assert train('--epochs 2 --save run --resume --teacher_id nets/teacher') == 2
    assert '--teacher_id nets/teacher differs from the run' in capsys.readouterr().err


def test_student_params_are_not_read_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_photographs(tmp_path / 'set')
    torch.manual_seed(0)
    weights.save_params('start.hkl', resnet.resnet(18, 0.125, 7)[1])

    def tune(*options):
        tuning = '--imagenetpath set --finetune --lr 0.001 --student_params'
        return program.call_main(imagenet.main, words(PHOTOGRAPHS, tuning, *options))

    assert tune('start.hkl --epochs 2 --save whole') == 0
    assert tune('start.hkl --epochs 1 --save run') == 0
    Path('start.hkl').unlink()
    assert tune('nowhere.hkl --epochs 2 --save run --resume') == 0
    # The drops of one epoch and of two are the same ones.
    assert same_weights(Path('run'), Path('whole'))


@pytest.mark.parametrize('change', ['moved', 'replaced', 'copied'])
def test_a_folder_that_is_replaced_while_a_run_trains_in_it_is_left_alone(home, change, capsys):
    def replace():
        while not Path('run/model.hkl').exists():
            time.sleep(0.01)
        if change == 'copied':
            shutil.copytree('run', 'copy')
        Path('run').rename('moved')
        if change == 'replaced':
            Path('run').mkdir()
        if change == 'copied':
            Path('copy').rename('run')

    thread = threading.Thread(target=replace)
    thread.start()
    assert train('--epochs 200 --save run') == 2
    thread.join()
    error = capsys.readouterr().err
    assert error.count('\n') == 1 and '--save run: was moved or replaced' in error
    done = runs.load_checkpoint('moved')['epoch']
    assert f'after epoch {done} of 200' in error
    if change == 'replaced':
        assert not list(Path('run').iterdir())
    if change == 'moved':
        assert not Path('run').exists()


def test_a_run_of_no_epochs_continues_at_the_full_rate(home, monkeypatch):
    rates = []
    step = torch.optim.SGD.step

    def spy(self, *arguments):
        rates.append(self.param_groups[0]['lr'])
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.SGD, 'step', spy)
    assert train('--epochs 4 --save whole') == 0
    expected, rates[:] = list(rates), []
    assert train('--epochs 0 --save run') == 0
    assert train('--epochs 4 --save run --resume') == 0
    assert rates == expected and rates[0] == 0.1 and min(rates) < 0.01
    assert same_weights(Path('run'), Path('whole'))
    for kept in 'lr', 'train_loss', 'test_acc':
        assert [r[kept] for r in records_of(Path('run'))[1:]] == [
            r[kept] for r in records_of(Path('whole'))
        ]


def test_drops_can_be_given_after_no_epochs(home):
    assert train('--epochs 0 --save run') == 0
    assert train('--epochs 2 --save run --resume --epoch_step [2]') == 0
    assert [r['lr'] for r in records_of(Path('run'))][1:] == pytest.approx([0.1, 0.02])


def test_a_run_of_one_epoch_trains_at_the_full_rate(home):
    assert records_of(Path('nets/teacher'))[0]['lr'] == 0.1
    for epochs in range(1, 30):
        assert 1 not in utils.scaled_steps([60, 120, 160], 200, epochs)
    assert utils.scaled_steps([60, 120, 160], 200, 10) == [4, 7, 9]


def test_the_log_says_what_trained_and_on_what(home):
    assert train('--epochs 1 --save run --teacher_id nets/teacher') == 0
    (alone,), (taught,) = records_of(Path('nets/teacher')), records_of(Path('run'))
    assert taught['device_name'] == 'cpu'
    capability = torch.backends.cpu.get_cpu_capability()  # AVX512 is written AVX-512
    assert capability in taught['machine'].replace('AVX-512', 'AVX512')
    _, params = weights.load_net('nets/teacher')[:2]
    assert taught['teacher_crc32'] == weights.checksum(params.values())
    assert alone['teacher_crc32'] is None and alone['data_crc32'] == taught['data_crc32'] > 0


def test_an_interrupted_epoch_counts_all_of_its_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_photographs(tmp_path / 'set')
    monkeypatch.setattr(sys, 'argv', ['imagenet.py'])
    options = words(PHOTOGRAPHS, '--imagenetpath set --epochs 1 --save run --resume')
    assert program.call_main(imagenet.main, options) == 0
    checkpoint = runs.load_checkpoint('run')
    assert checkpoint['train_time'] == 0.0
    # As if it had been stopped after the first step, a thousand seconds after the start.
    run = checkpoint | {'epoch': 0, 'step': 1, 'train_time': 1000.0, 'log': [], 'sums': [[0.0] * 4]}
    shutil.rmtree('run')
    Path('run').mkdir()
    runs.save_checkpoint('run', run)
    assert program.call_main(imagenet.main, options) == 0
    assert 1000 < records_of(Path('run'))[-1]['train_time'] < 1100


def test_evaluate_uses_only_folders_that_are_here(home, capsys, monkeypatch):
    shutil.copytree('nets/teacher', 'away')
    log = Path('away/log.txt')
    log.write_text(log.read_text().replace('"dataroot": "set"', '"dataroot": "/stranger/data"'))
    asked = []

    def open_sets(dataset, dataroot, nthread=0):
        asked.append((dataset, dataroot))
        raise program.UserError('as far as this')

    monkeypatch.setattr('data.open_sets', open_sets)
    for folder in 'away', 'nets/teacher':
        assert program.call_main(cifar.main, ['--evaluate', folder, '--dataset', 'CIFAR10']) == 2
    assert asked == [('CIFAR10', '.')] * 2, 'nor is CIFAR-10 downloaded into a folder of images'
    assert program.call_main(cifar.main, ['--evaluate', 'away']) == 2
    assert '/stranger/data' in capsys.readouterr().err and len(asked) == 2
    assert program.call_main(cifar.main, ['--evaluate', 'nets/teacher']) == 2
    assert asked[2:] == [('folder', 'set')]


def test_a_teacher_whose_training_stopped_is_warned_about(home, capsys):
    assert train('--epochs 3 --save nets/long') == 0
    log = Path('nets/long/log.txt')
    log.write_text(''.join(log.read_text().splitlines(keepends=True)[:2]))
    capsys.readouterr()
    assert train('--epochs 1 --save run --teacher_id nets/long') == 0
    warning = 'warning: teacher nets/long stopped at epoch 2 of 3'
    assert capsys.readouterr().err.count(warning) == 1
    assert train('--epochs 2 --save run --resume') == 0
    assert warning not in capsys.readouterr().err, 'once'


def test_a_teacher_of_images_of_another_size_is_warned_about(home, capsys):
    make_folder_set(home / 'large', side=24)
    for root, count in ('set', 0), ('large', 1):
        capsys.readouterr()
        run = f'--epochs 1 --save {root}_run --teacher_id nets/teacher'
        assert train(run, dataroot=root) == 0
        assert capsys.readouterr().err.count('trained on images of 32x32, not 24x24') == count


def test_a_teacher_that_has_seen_the_held_out_images_is_warned_about(home, capsys):
    assert train('--epochs 1 --save nets/honest --validate 2') == 0
    capsys.readouterr()
    assert train('--epochs 1 --save a --teacher_id nets/teacher --validate 2') == 0
    assert capsys.readouterr().err.count('was trained on images that --validate 2 holds') == 1
    assert train('--epochs 1 --save b --teacher_id nets/honest --validate 2') == 0
    assert train('--epochs 1 --save c --teacher_id nets/honest') == 0
    assert 'holds' not in capsys.readouterr().err
    assert os.path.isdir('c')
