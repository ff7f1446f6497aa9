"""Atomic writes, and messages for disk errors."""

import contextlib
import fcntl
import os
from pathlib import Path

from support.program import UserError


def write_atomically(path, write) -> None:
    """Call write(temporary path), flush that file to disk and rename it over `path`.

    At any moment `path` is the old file or the new one. Raises UserError, status 1, if the disk
    refuses (full, read-only); the old file is then untouched.
    """
    path = Path(path)
    temporary = path.with_name(f'.{path.name}.part')
    try:
        write(temporary)
        with open(temporary, 'rb') as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except (OSError, RuntimeError) as e:
        raise UserError(
            f'cannot write {path}: {_disk_error(temporary, e)}; what was there is kept', status=1
        ) from e
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _disk_error(path, error):
    # torch and HDF5 raise a RuntimeError of their own on a full disk: a second, plain write finds
    # the true reason.
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    try:
        with open(path, 'ab') as file:
            file.write(bytes(1 << 16))
            os.fsync(file.fileno())
    except OSError as e:
        return e.strerror
    return (str(error) or type(error).__name__).splitlines()[0]


def write_text(path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text))


def lock_folder(folder) -> int:
    """Lock a run folder, and return the descriptor that holds the lock until it is closed.

    Raises BlockingIOError if another process has the lock.
    """
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise
    return lock


def check_writable(folder, option: str = '--save') -> None:
    """Raise UserError if `folder` cannot be created or written in. Creates nothing."""
    folder = Path(folder).absolute()
    for part in (folder, *folder.parents):
        try:
            part.lstat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as e:
            raise UserError(f'{option} {folder}: {e.strerror}') from e
        if not part.is_dir():
            raise UserError(f'{option} {folder}: {part} is not a folder')
        if not os.access(part, os.W_OK | os.X_OK):
            raise UserError(f'{option} {folder}: {part} cannot be written in')
        return
