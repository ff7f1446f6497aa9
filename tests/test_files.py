"""support/files.py: a failed or interrupted write keeps the old file."""

import os

import pytest

from support import files
from support.program import UserError


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


def test_the_old_file_is_there_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / 'log.txt'
    files.write_text(path, 'old')
    files.write_atomically(
        path, lambda t: (t.write_text('new'), path.read_text() == 'old' or pytest.fail('gone'))
    )
    assert path.read_text() == 'new' and os.listdir(tmp_path) == ['log.txt']


def test_a_folder_that_is_gone_is_said(tmp_path):
    with pytest.raises(UserError, match='cannot write'):
        files.write_text(tmp_path / 'gone' / 'log.txt', 'x')


def test_a_folder_to_write_in_is_checked_without_making_it(tmp_path):
    files.check_writable(tmp_path / 'a' / 'b')
    assert not list(tmp_path.iterdir())
    (tmp_path / 'file').write_text('')
    (tmp_path / 'dangling').symlink_to(tmp_path / 'nowhere')
    with pytest.raises(UserError, match='too long'):
        files.check_writable(tmp_path / ('x' * 300))
    for path in tmp_path / 'file', tmp_path / 'file' / 'b', tmp_path / 'dangling':
        with pytest.raises(UserError, match='is not a folder'):
            files.check_writable(path)
