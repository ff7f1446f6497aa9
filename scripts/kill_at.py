"""Run a script that kills itself by SIGKILL while it writes its n-th file.

    python scripts/kill_at.py MOMENT N SCRIPT [options of the script]

MOMENT: write (half of the file is written), rename (before it replaces the old file) or renamed
(after that). reliability.py kills training with it: a timer hardly ever hits a rename.
"""

import os
import runpy
import signal
import stat
import sys
from pathlib import Path

MOMENTS = ('write', 'rename', 'renamed')


def install(moment, n):
    """Make os.fsync and os.replace, with which each file is written, end this process."""
    fsync, replace, files = os.fsync, os.replace, 0

    def kill():
        os.kill(os.getpid(), signal.SIGKILL)

    def fsync_or_kill(descriptor):
        status = os.fstat(descriptor)
        is_file = stat.S_ISREG(status.st_mode)  # after each rename, the folder is flushed as well
        if moment == 'write' and files == n - 1 and is_file:
            os.ftruncate(descriptor, status.st_size // 2)
            kill()
        fsync(descriptor)

    def replace_or_kill(source, target):
        nonlocal files
        files += 1
        if moment == 'rename' and files == n:
            kill()
        replace(source, target)
        if moment == 'renamed' and files == n:
            kill()

    os.fsync, os.replace = fsync_or_kill, replace_or_kill


if __name__ == '__main__':
    install(sys.argv[1], int(sys.argv[2]))
    del sys.argv[:3]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name='__main__')
