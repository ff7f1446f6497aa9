"""Kills a student's training at random moments, resumes it each time, and compares it with a run that was left alone.

    python scripts/kill.py --kills 50                                             # float32, eager, on drawn shapes
    python scripts/kill.py --kills 10 --options "--dtype bfloat16 --compile"
    python scripts/kill.py --full_disk                                            # on a small tmpfs that fills up; needs root, Linux

The student learns by attention transfer and distillation. Says how many kills it took and whether model.hkl and every line of
log.txt, measured times aside, are the same; exit status 1 if not.
"""

import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import utils
from utils import UserError, number

NET = '--dataset shapes --depth 10 --width 0.25 --batch_size 512 --resume'

parser = utils.Parser(__doc__)
# fmt: off
parser.add_argument('--kills', default=50, type=number(int, 1), help='how often to kill (default: 50)')
parser.add_argument('--epochs', default=40, type=number(int, 1), help='length of a run; where it ends before the kills do, another begins (default: 40)')
parser.add_argument('--seed', default=0, type=number(int, 0), help='of the random moments (default: 0)')
parser.add_argument('--options', default='', help='further options of cifar.py, in one string')
parser.add_argument('--full_disk', action='store_true', help='fill the disk instead of killing')
# fmt: on


def main(argv=None):
    opt, _ = parser.parse(argv)
    with tempfile.TemporaryDirectory() as folder:
        (full_disk if opt.full_disk else kill_and_compare)(Path(folder), opt)


def command(folder, name, epochs, options=''):
    """cifar.py with the run folder folder/name; all but the teacher learn from it."""
    words = f'{NET} --epochs {epochs} {options}'.split() + ['--save', str(folder / name)]
    if name != 'teacher':
        words += ['--teacher_id', str(folder / 'teacher'), '--alpha', '0.5', '--beta', '100']
    return [sys.executable, str(ROOT / 'cifar.py'), *words]


def train(*arguments):
    done = subprocess.run(command(*arguments), check=False, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f'a run that was left alone failed: {done.stderr}', status=1)


def kill_and_compare(folder, opt):
    train(folder, 'teacher', 1)
    start = timed(train, folder, 'warm_up', 1, opt.options)
    epoch = timed(train, folder, 'whole', opt.epochs, opt.options) / opt.epochs
    rng, kills, runs = random.Random(opt.seed), 0, 0
    while kills < opt.kills:
        done_at, runs = [], runs + 1  # the epochs that were done at each kill
        words = command(folder, 'killed', opt.epochs, opt.options)
        while kills < opt.kills and kill_once(words, rng, start, epoch):
            log = folder / 'killed' / 'log.txt'
            done_at.append(len(log.read_text().splitlines()) if log.exists() else 0)
            kills += 1
        train(folder, 'killed', opt.epochs, opt.options)
        compare(folder / 'whole', folder / 'killed')
        print(
            f'run {runs}: killed {len(done_at)} times, after epochs {done_at}: the same bits',
            flush=True,
        )
        shutil.rmtree(folder / 'killed')
    print(f'{kills} kills in {runs} runs of {opt.epochs} epochs, none lost')


def timed(f, *arguments):
    began = time.time()
    f(*arguments)
    return time.time() - began


def kill_once(words, rng, start, epoch):
    """Runs a command and kills it in its start, or in one of the epochs after the first few lines that it prints. False where it
    had ended by itself."""
    run = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    wanted, seen = rng.randrange(5), 0
    while seen < wanted and (line := run.stdout.readline()):
        seen += line.startswith('epoch ')
    time.sleep(rng.uniform(0, 2 * epoch if wanted else start))
    ended = run.poll() is not None
    run.kill()
    status = run.wait()
    if ended and status:
        raise UserError(f'a resumed run failed by itself, status {status}', status=1)
    return not ended


def compare(whole, killed):
    """Raises UserError, status 1, where the weights or the logs of two runs differ."""

    def lines(run):
        records = utils.read_log(run / 'log.txt')
        return [{k: v for k, v in r.items() if 'time' not in k and k != 'save'} for r in records]

    if (whole / 'model.hkl').read_bytes() != (killed / 'model.hkl').read_bytes() or lines(
        whole
    ) != lines(killed):
        raise UserError('the resumed run differs from the one left alone', status=1)


def full_disk(folder, opt):
    disk = folder / 'disk'
    disk.mkdir()
    if subprocess.run(
        ['mount', '-t', 'tmpfs', '-o', 'size=4m', 'tmpfs', str(disk)], check=False
    ).returncode:
        raise UserError('--full_disk: cannot mount a tmpfs; it needs root, and Linux')
    try:
        run = disk / 'run'
        train(folder, 'teacher', 1)
        shutil.move(folder / 'teacher', disk)
        train(disk, 'run', 1, opt.options)
        (disk / 'ballast').write_bytes(bytes(max(0, shutil.disk_usage(disk).free - 4096)))
        before = {f.name: f.read_bytes() for f in run.iterdir()}
        words = command(disk, 'run', 3, opt.options)
        failed = subprocess.run(words, check=False, capture_output=True, text=True)
        kept = before == {f.name: f.read_bytes() for f in run.iterdir()}
        print(
            f'full: exit status {failed.returncode}, {failed.stderr.strip()!r}; the run folder is {"kept" if kept else "CHANGED"}'
        )
        (disk / 'ballast').unlink()
        train(disk, 'run', 3, opt.options)
        epochs = len(utils.read_log(run / 'log.txt'))
        print(f'with room again: {epochs} epochs done')
        if failed.returncode != 1 or not kept or epochs != 3:
            raise UserError('a full disk lost something', status=1)
    finally:
        subprocess.run(['umount', str(disk)], check=True)


if __name__ == '__main__':
    sys.exit(utils.call_main(main))
