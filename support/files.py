"""Atomic writes, the lock of a run folder, and checks of paths before work begins."""

import contextlib
import errno
import os
from pathlib import Path

from support.program import UserError, warn_once

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# A file system without fsync, or one that refuses it here. Others are errors of the disk.
NO_FSYNC = {
    errno.EINVAL,
    errno.ENOSYS,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
    errno.EACCES,
    errno.EPERM,
    errno.EBADF,
    errno.EROFS,
}


def write_atomically(path, write) -> None:
    """Call write(temporary path), flush that file to disk and rename it over `path`.

    At any moment `path` is the old file or the new one. Raises UserError, status 1, if the disk
    refuses (full, read-only); the old file is then untouched. Warns once if the disk cannot flush:
    a power cut may then lose the new file.
    """
    path = Path(path)
    temporary = _temporary(path)
    try:
        write(temporary)
        _flush_file(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:
        kept = '; the old file is kept' if os.path.lexists(path) else ''
        raise UserError(f'cannot write {path}: {_disk_error(temporary, e)}{kept}', status=1) from e
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    _flush_folder(path)


def _temporary(path: Path) -> Path:
    return path.with_name(f'.{path.name}.part')


def _flush_file(path):
    try:
        # Some network file systems refuse to flush through a descriptor that is read-only.
        with open(path, 'r+b') as file:
            os.fsync(file.fileno())
    except OSError as e:
        if e.errno not in NO_FSYNC:
            raise
        _warn_of_fsync(e)


def _flush_folder(path):
    # The file has its new name: whatever happens from here on, the old one is gone.
    try:
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except FileNotFoundError:
        pass  # somebody has moved the folder, with the file: its run says so
    except OSError as e:
        if e.errno in NO_FSYNC:
            _warn_of_fsync(e)
        else:
            warn_once('folder', f'{path}: written, but a power cut may lose it: {e.strerror}')


def _warn_of_fsync(error):
    warn_once(
        'fsync',
        f'this disk cannot flush files on demand ({error.strerror}); '
        'a power cut may lose or damage the last files',
    )


def _disk_error(path, error):
    # torch raises a RuntimeError of its own on a full disk: a second, plain write finds the true
    # reason.
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    try:
        with open(path, 'ab') as file:
            file.write(bytes(1 << 16))
            os.fsync(file.fileno())
    except OSError as e:
        if e.errno not in NO_FSYNC:
            return e.strerror
    return (str(error) or type(error).__name__).splitlines()[0]


def write_text(path, text: str) -> None:
    """Write UTF-8, whatever the locale; bytes of names that are not UTF-8 stay as they are."""
    raw = text.encode(errors='surrogateescape')
    write_atomically(path, lambda temporary: temporary.write_bytes(raw))


def lock_folder(folder) -> int:
    """Lock a run folder, and return the descriptor that holds the lock until it is closed.

    Raises BlockingIOError if another process has the lock. Warns once if the disk has no locks.
    """
    # Not the package filelock: its lock file stays, cannot be created on a read-only disk, and the
    # package is not installed when a table script starts.
    lock = os.open(os.devnull if os.name == 'nt' else folder, os.O_RDONLY)
    try:
        if not fcntl:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise
    except OSError as e:
        warn_once(
            'lock',
            f'this disk does not support locks ({e.strerror}); '
            'make sure that no second process trains in the same folder',
        )
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
            what = 'a link that leads nowhere' if part.is_symlink() and not part.exists() else ''
            raise UserError(f'{option} {folder}: {part} is {what or "not a folder"}')
        if not os.access(part, os.W_OK | os.X_OK):
            raise UserError(f'{option} {folder}: {part} is not writable')
        return


def check_new_file(path, option: str = '--save') -> None:
    """Raise UserError if `path` exists, or no file can be written there. Creates nothing."""
    check_file(path, option)
    if os.path.lexists(path):
        raise UserError(f'{option} {path}: already exists; give another name')


def check_file(path, option: str = '--save') -> None:
    """Raise UserError if `path` is a folder, or no file can be written there. Creates nothing."""
    if os.path.isdir(path):
        raise UserError(f'{option} {path}: is a folder; give the name of a file')
    check_writable(Path(path).absolute().parent, option)
    if len(os.fsencode(_temporary(Path(path)).name)) > 255:
        raise UserError(f'{option} {path}: the name is too long')
