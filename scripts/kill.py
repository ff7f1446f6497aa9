"""Kills a student's training at random moments, resumes it each time, and compares it with a run
that was left alone.

    # cifar.py on drawn shapes, in float32, eager; or with other options
    python scripts/kill.py --kills 50
    python scripts/kill.py --kills 10 --options "--dtype bfloat16 --compile"
    # imagenet.py on photographs, killed inside epochs
    python scripts/kill.py --kills 20 --imagenetpath DIR
    # on a small tmpfs that fills up; needs root, Linux
    python scripts/kill.py --full_disk

The student learns by attention transfer and distillation. Says where the checkpoint stood at each
kill, how many kills it took, and whether model.hkl and every line of log.txt, measured times aside,
are the same; exit status 1 if not. A checkpoint at 3+17 holds 3 epochs and 17 steps of the fourth.
"""

import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from support import program
from support.logs import read_log
from support.options import Parser, number
from support.photographs import scan_photographs
from support.program import UserError
from support.runs import load_checkpoint

SHAPES = '--dataset shapes --depth 10 --width 0.25 --batch_size 512 --resume'
# A checkpoint every 0.3 s: several inside an epoch of a thousand photographs.
PHOTOGRAPHS = (
    '--depth 18 --width 0.125 --image_size 64 --batch_size 32 --checkpoint_minutes 0.005 --resume'
)

parser = Parser(__doc__)
add = parser.add_argument
add(
    '--imagenetpath',
    metavar='DIR',
    help='kill imagenet.py on DIR/{train,val}/CLASS/* (default: cifar.py on drawn shapes)',
)
add('--kills', default=50, type=number(int, 1), help='how often to kill (default: 50)')
add(
    '--epochs',
    default=40,
    type=number(int, 1),
    help='length of a run; a new run begins if it ends before the last kill (default: 40)',
)
add('--seed', default=0, type=number(int, 0), help='seed of the random moments (default: 0)')
add('--options', default='', help='more options of the killed script, in one string')
add('--full_disk', action='store_true', help='fill the disk of cifar.py instead of killing')


def main(argv=None):
    opt, _ = parser.parse(argv)
    if opt.imagenetpath and opt.full_disk:
        raise UserError('--full_disk and --imagenetpath: give one of them')
    if opt.imagenetpath:
        scan_photographs(opt.imagenetpath)
    with tempfile.TemporaryDirectory() as folder:
        (full_disk if opt.full_disk else kill_and_compare)(Path(folder), opt)


def command(opt, folder, name, epochs):
    """The training in folder/name; all but the teacher have --options and learn from it."""
    if opt.imagenetpath:
        script, teacher = 'imagenet.py', '--teacher_params'
        words = ['--imagenetpath', opt.imagenetpath, *PHOTOGRAPHS.split()]
    else:
        script, teacher, words = 'cifar.py', '--teacher_id', SHAPES.split()
    words += ['--epochs', str(epochs), '--save', str(folder / name)]
    if name != 'teacher':
        words += [teacher, str(folder / 'teacher'), '--alpha', '0.5', '--beta', '100']
        words += opt.options.split()
    return [sys.executable, str(ROOT / script), *words]


def train(opt, *arguments):
    words = command(opt, *arguments)
    done = subprocess.run(words, check=False, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f'a run that was left alone failed: {done.stderr}', status=1)


def kill_and_compare(folder, opt):
    train(opt, folder, 'teacher', 1)
    start, epoch = time_whole(folder, opt)
    rng, kills, runs, inside = random.Random(opt.seed), 0, 0, 0
    while kills < opt.kills:
        stood, runs = [], runs + 1  # where the checkpoint stood at each kill
        words = command(opt, folder, 'killed', opt.epochs)
        while kills < opt.kills and kill_once(words, rng, start, epoch):
            stood.append(progress(folder / 'killed'))
            kills += 1
        train(opt, folder, 'killed', opt.epochs)
        compare(folder / 'whole', folder / 'killed')
        places = ', '.join(f'{epoch}+{step}' for epoch, step in stood)
        print(
            f'run {runs}: killed {len(stood)} times, '
            f'its checkpoint at epoch+step {places or "-"}: the same bits',
            flush=True,
        )
        inside += sum(step > 0 for _, step in stood)
        shutil.rmtree(folder / 'killed')
    where = f', {inside} resumed inside an epoch' if opt.imagenetpath else ''
    print(f'{kills} kills in {runs} runs of {opt.epochs} epochs{where}, none lost')


def time_whole(folder, opt):
    """(seconds before its first epoch, seconds of an epoch) of the run that is left alone,
    folder/whole, which is trained here."""
    began = time.time()
    train(opt, folder, 'whole', opt.epochs)
    took = time.time() - began
    records = read_log(folder / 'whole' / 'log.txt')
    epoch = statistics.median(r['train_time'] + r['test_time'] for r in records)
    return max(0, took - opt.epochs * epoch), epoch


def kill_once(words, rng, start, epoch):
    """Runs a command and kills it in its start, or in one of the epochs after the first few lines
    that it prints. False where it had ended by itself."""
    run = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        wanted, seen = rng.randrange(5), 0
        while seen < wanted and (line := run.stdout.readline()):
            seen += line.startswith('epoch ')
        time.sleep(rng.uniform(0, 2 * epoch if wanted else start))
    finally:
        run.kill()
        status = run.wait()
        run.stdout.close()
    if status not in (0, -signal.SIGKILL):
        raise UserError(f'a resumed run failed by itself, status {status}', status=1)
    return status != 0


def progress(run):
    """(epochs, steps of the next one) that are done in the checkpoint of a run folder; (0, 0)
    before there is one."""
    if not (run / 'checkpoint.pt').exists():
        return 0, 0
    checkpoint = load_checkpoint(run)
    return checkpoint['epoch'], checkpoint['step']


def compare(whole, killed):
    """Raises UserError, status 1, where the weights or the logs of two runs differ."""

    def lines(run):
        records = read_log(run / 'log.txt')
        return [{k: v for k, v in r.items() if 'time' not in k and k != 'save'} for r in records]

    same_weights = (whole / 'model.hkl').read_bytes() == (killed / 'model.hkl').read_bytes()
    if not same_weights or lines(whole) != lines(killed):
        raise UserError('the resumed run differs from the one left alone', status=1)


def full_disk(folder, opt):
    disk = folder / 'disk'
    disk.mkdir()
    mount = ['mount', '-t', 'tmpfs', '-o', 'size=4m', 'tmpfs', str(disk)]
    if subprocess.run(mount, check=False).returncode:
        raise UserError('--full_disk: cannot mount a tmpfs; it needs root, and Linux')
    try:
        run = disk / 'run'
        train(opt, folder, 'teacher', 1)
        shutil.move(folder / 'teacher', disk)
        train(opt, disk, 'run', 1)
        (disk / 'ballast').write_bytes(bytes(max(0, shutil.disk_usage(disk).free - 4096)))
        before = {f.name: f.read_bytes() for f in run.iterdir()}
        words = command(opt, disk, 'run', 3)
        failed = subprocess.run(words, check=False, capture_output=True, text=True)
        kept = before == {f.name: f.read_bytes() for f in run.iterdir()}
        print(
            f'full: exit status {failed.returncode}, {failed.stderr.strip()!r}; '
            f'the run folder is {"kept" if kept else "CHANGED"}'
        )
        (disk / 'ballast').unlink()
        train(opt, disk, 'run', 3)
        epochs = len(read_log(run / 'log.txt'))
        print(f'with room again: {epochs} epochs done')
        if failed.returncode != 1 or not kept or epochs != 3:
            raise UserError('a full disk lost something', status=1)
    finally:
        subprocess.run(['umount', str(disk)], check=True)


if __name__ == '__main__':
    sys.exit(program.call_main(main))
