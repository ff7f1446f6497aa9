"""support/files.py: a failed or interrupted write keeps the old file; disks without fsync or locks
are warned of."""

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import h5py
import pytest
import torch

import cifar
import data
from samples import words
from support import files, program, readers, runs, weights
from support.program import UserError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def no_warning_yet(monkeypatch):
    monkeypatch.setattr(program, 'printed', set())


def failing_fsync(monkeypatch, number, folders):
    """Let fsync of folders, or of files, fail with that errno."""
    fsync = os.fsync

    def fail(fd):
        if stat.S_ISDIR(os.fstat(fd).st_mode) == folders:
            raise OSError(number, os.strerror(number))
        fsync(fd)

    monkeypatch.setattr(os, 'fsync', fail)


def failing_flock(monkeypatch, number):
    def fail(fd, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.fcntl, 'flock', fail)


# ------------------------ the old file is kept


@pytest.mark.parametrize(
    'error',
    [OSError(28, 'No space left on device'), RuntimeError('unexpected pos'), RuntimeError()],
)
def test_a_failed_write_keeps_the_old_file(error, tmp_path):
    path = tmp_path / 'log.txt'
    path.write_text('old')

    def write(temporary):
        temporary.write_text('half')
        raise error

    with pytest.raises(UserError, match=r'cannot write .*log\.txt') as e:
        files.write_atomically(path, write)
    assert e.value.status == 1
    assert path.read_text() == 'old' and os.listdir(tmp_path) == ['log.txt']


def test_an_interrupted_write_keeps_the_old_file(tmp_path):
    path = tmp_path / 'log.txt'
    path.write_text('old')

    def write(temporary):
        temporary.write_text('half')
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.write_atomically(path, write)
    assert path.read_text() == 'old' and os.listdir(tmp_path) == ['log.txt']


def test_the_old_file_is_there_until_the_new_one_is_complete(tmp_path):
    path = tmp_path / 'log.txt'
    files.write_text(path, 'old')
    files.write_atomically(
        path, lambda t: (t.write_text('new'), path.read_text() == 'old' or pytest.fail('gone'))
    )
    assert path.read_text() == 'new' and os.listdir(tmp_path) == ['log.txt']


def test_a_folder_that_is_gone_is_said(tmp_path):
    with pytest.raises(UserError, match='cannot write'):
        files.write_text(tmp_path / 'gone' / 'log.txt', 'x')


def test_text_is_utf_8_in_any_locale(tmp_path):
    files.write_text(tmp_path / 'log.txt', '猫\udce9\n')
    assert (tmp_path / 'log.txt').read_bytes() == '猫'.encode() + b'\xe9\n'


def test_a_folder_that_is_moved_during_a_write_takes_the_file_along(tmp_path, monkeypatch, capsys):
    (tmp_path / 'run').mkdir()
    replace = os.replace

    def replace_and_move(source, target):
        replace(source, target)
        os.rename(tmp_path / 'run', tmp_path / 'moved')

    monkeypatch.setattr(os, 'replace', replace_and_move)
    files.write_text(tmp_path / 'run/log.txt', 'one line')
    assert (tmp_path / 'moved/log.txt').read_text() == 'one line'
    assert not capsys.readouterr().err


# ------------------------ disks without fsync


@pytest.mark.parametrize('folders', [True, False])
@pytest.mark.parametrize('number', sorted(files.NO_FSYNC))
def test_without_fsync_files_are_written_with_one_warning(
    number, folders, tmp_path, monkeypatch, capsys
):
    failing_fsync(monkeypatch, number, folders)
    for text in 'old', 'new':
        files.write_text(tmp_path / 'log.txt', text)
    assert (tmp_path / 'log.txt').read_text() == 'new'
    (warning,) = capsys.readouterr().err.splitlines()
    assert os.strerror(number) in warning and 'a power cut may lose' in warning


@pytest.mark.parametrize('number', [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_a_file_that_cannot_be_flushed_is_an_error_and_the_old_one_is_kept(
    number, tmp_path, monkeypatch
):
    files.write_text(tmp_path / 'log.txt', 'old')
    failing_fsync(monkeypatch, number, folders=False)
    with pytest.raises(UserError, match=f'{os.strerror(number)}; the old file is kept') as e:
        files.write_text(tmp_path / 'log.txt', 'new')
    assert e.value.status == 1
    assert (tmp_path / 'log.txt').read_text() == 'old' and os.listdir(tmp_path) == ['log.txt']


@pytest.mark.parametrize('number', [errno.EIO, errno.ENOSPC])
def test_a_folder_that_cannot_be_flushed_holds_the_new_file(number, tmp_path, monkeypatch, capsys):
    files.write_text(tmp_path / 'log.txt', 'old')
    failing_fsync(monkeypatch, number, folders=True)
    files.write_text(tmp_path / 'log.txt', 'new')
    assert (tmp_path / 'log.txt').read_text() == 'new'
    warning = capsys.readouterr().err
    assert 'log.txt: written, but a power cut may lose it' in warning and 'kept' not in warning


def test_a_write_leaves_no_descriptor_open(tmp_path, monkeypatch):
    def lowest_free():
        descriptor = os.open(os.devnull, os.O_RDONLY)
        os.close(descriptor)
        return descriptor

    before = lowest_free()
    files.write_text(tmp_path / 'log.txt', 'x')
    assert lowest_free() == before
    failing_fsync(monkeypatch, errno.EIO, folders=True)
    files.write_text(tmp_path / 'log.txt', 'y')
    assert lowest_free() == before


def test_files_are_flushed_through_a_descriptor_that_can_write(tmp_path, monkeypatch):
    modes = []

    def fsync(fd):
        if not stat.S_ISDIR(os.fstat(fd).st_mode):
            modes.append(files.fcntl.fcntl(fd, files.fcntl.F_GETFL) & os.O_ACCMODE)

    monkeypatch.setattr(os, 'fsync', fsync)
    files.write_text(tmp_path / 'log.txt', 'x')
    assert modes == [os.O_RDWR]


# ------------------------ locks and folders


def test_a_folder_is_locked_until_its_descriptor_is_closed(tmp_path):
    lock = files.lock_folder(tmp_path)
    with pytest.raises(BlockingIOError):
        files.lock_folder(tmp_path)
    os.close(lock)
    os.close(files.lock_folder(tmp_path))
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    'number', [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL, errno.EBADF]
)
def test_without_locks_the_run_continues_with_one_warning(number, tmp_path, monkeypatch, capsys):
    failing_flock(monkeypatch, number)
    for _ in range(2):
        os.close(files.lock_folder(tmp_path))
    (warning,) = capsys.readouterr().err.splitlines()
    assert os.strerror(number) in warning and 'no second process' in warning


def test_without_the_module_of_locks_the_run_continues_too(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(files, 'fcntl', None)  # as on Windows
    os.close(files.lock_folder(tmp_path))
    assert 'does not support locks' in capsys.readouterr().err


def test_a_folder_to_write_in_is_checked_without_making_it(tmp_path):
    files.check_writable(tmp_path / 'a' / 'b')
    assert not list(tmp_path.iterdir())
    (tmp_path / 'file').write_text('')
    (tmp_path / 'dangling').symlink_to(tmp_path / 'nowhere')
    with pytest.raises(UserError, match='too long'):
        files.check_writable(tmp_path / ('x' * 300))
    for path in tmp_path / 'file', tmp_path / 'file' / 'b':
        with pytest.raises(UserError, match='is not a folder'):
            files.check_writable(path)
    with pytest.raises(UserError, match='dangling is a link that leads nowhere'):
        files.check_writable(tmp_path / 'dangling')


def test_a_file_to_write_is_checked_with_its_temporary_name(tmp_path):
    """`.NAME.part` is six bytes longer, and a disk takes 255."""
    files.check_file(tmp_path / ('x' * 245 + '.png'))
    files.write_text(tmp_path / ('x' * 245 + '.png'), 'x')
    with pytest.raises(UserError, match='--save .*: the name is too long'):
        files.check_file(tmp_path / ('x' * 246 + '.png'))
    with pytest.raises(UserError, match='is a folder'):
        files.check_file(tmp_path)


def test_a_pipe_is_refused_at_once(tmp_path):
    """To open it would wait for its other end for ever."""
    os.mkfifo(tmp_path / 'pipe')
    with pytest.raises(UserError, match='pipe: not a regular file'):
        readers.read_values(tmp_path / 'pipe')


def test_what_lies_in_a_closed_folder_is_not_called_missing(tmp_path, monkeypatch):
    program.check_reachable(tmp_path / 'missing')
    stat = os.stat

    def refuse(path, *arguments, **options):
        if str(path).startswith(f'{tmp_path}/closed'):
            raise PermissionError(errno.EACCES, 'Permission denied', path)
        return stat(path, *arguments, **options)

    monkeypatch.setattr(os, 'stat', refuse)
    (tmp_path / 'photos').mkdir()
    calls = [
        lambda: weights.load_net(tmp_path / 'closed/run'),
        lambda: runs.load_checkpoint(tmp_path / 'closed/run'),
        lambda: data.scan_folder(tmp_path / 'closed'),
    ]
    for call in calls:
        with pytest.raises(UserError, match='closed/?.*: Permission denied'):
            call()


# ------------------------ whole runs


RUN = words('--dataset shapes --epochs 0 --depth 10 --nthread 1 --save')


@pytest.fixture
def train(tmp_path, monkeypatch):
    """train(*options): the exit status of a run of cifar.py in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('sys.argv', ['cifar.py'])
    return lambda *options: program.call_main(cifar.main, options)


def test_a_run_on_a_disk_without_fsync_and_locks_writes_its_files(
    tmp_path, train, monkeypatch, capsys
):
    failing_fsync(monkeypatch, errno.EINVAL, folders=True)
    failing_flock(monkeypatch, errno.ENOTSUP)
    assert train(*RUN, 'run') == 0
    assert sorted(os.listdir(tmp_path / 'run')) == ['checkpoint.pt', 'log.txt', 'model.hkl']
    warnings = [v for v in capsys.readouterr().err.splitlines() if 'this disk' in v]
    assert len(warnings) == 2


def test_hdf5_needs_no_locks_either(tmp_path, monkeypatch):
    """HDF5 refuses to open a file whose disk has none, unless told not to lock."""
    locking, start = [], h5py.File.__init__

    def record(file, name, *arguments, **options):
        if isinstance(name, os.PathLike):  # not in memory
            locking.append(options.get('locking'))
        start(file, name, *arguments, **options)

    monkeypatch.setattr(h5py.File, '__init__', record)
    weights.save_params(tmp_path / 'a.hkl', {'conv0': torch.ones(2)})
    weights.load_params(tmp_path / 'a.hkl')
    assert locking == [False]


def test_weights_on_a_full_disk_are_an_error_of_one_line(tmp_path):
    """HDF5 itself, writing to a full disk, ends the process with a segmentation fault."""
    script = tmp_path / 'full.py'
    script.write_text(
        f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import resource, signal, torch
from support import program
from support.weights import save_params

def main(argv):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond the limit is then an error
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    params = {{f'conv{{i}}': torch.ones(64, 64) for i in range(50)}}
    save_params({str(tmp_path / 'a.hkl')!r}, params)

sys.exit(program.call_main(main))
"""
    )
    done = subprocess.run([sys.executable, script], check=False, capture_output=True, text=True)
    assert done.returncode == 1, done
    assert done.stderr == f'full.py: error: cannot write {tmp_path}/a.hkl: File too large\n'
    assert os.listdir(tmp_path) == ['full.py']


def test_a_finished_run_on_a_read_only_disk_is_finished(tmp_path, train, monkeypatch, capsys):
    assert train(*RUN, 'run') == 0
    (tmp_path / 'run/.log.txt.part').touch()

    def read_only(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    for name in 'unlink', 'replace', 'rename':
        monkeypatch.setattr(os, name, read_only)
    access = os.access
    monkeypatch.setattr(os, 'access', lambda p, mode: not mode & os.W_OK and access(p, mode))
    assert train(*RUN, 'run', '--resume') == 0
    assert 'already trained for 0 epochs: nothing to do' in capsys.readouterr().out
    assert train('--save', 'run', '--resume', '--epochs', '1') == 2
    assert 'is not writable' in capsys.readouterr().err
