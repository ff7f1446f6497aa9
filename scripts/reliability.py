"""Check that training survives kills and a full disk, and whether its memory grows.

    # kill cifar.py at random moments on drawn shapes, in float32, eager; or with other options
    python scripts/reliability.py kills --kills 50
    python scripts/reliability.py kills --kills 10 --options "--dtype bfloat16 --compile"
    # kill imagenet.py inside epochs
    python scripts/reliability.py kills --kills 20 --imagenetpath DIR
    # fill the disk of cifar.py, a small tmpfs; needs root, Linux
    python scripts/reliability.py full_disk
    # resident memory of imagenet.py after each epoch; Linux
    python scripts/reliability.py memory --imagenetpath DIR --epochs 20

kills resumes the run each time, starts another if it ends before the last kill, and compares it
with a run that was left alone: all but measured times must be the same, bit for bit. It prints
where the checkpoint stood at each kill: 3+17 means 3 epochs and 17 steps of the fourth.

The student learns by attention transfer, in kills and full_disk also by distillation.
"""

import json
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import resnet
from benchmark import machine
from support import program
from support.files import check_writable, write_text
from support.logs import read_log
from support.options import Parser, number
from support.photographs import scan_photographs
from support.program import UserError
from support.runs import load_checkpoint
from support.weights import save_params

# The options of each check, with their defaults.
CHECKS = {
    'kills': {'kills': 50, 'epochs': 40, 'seed': 0, 'imagenetpath': None, 'options': ''},
    'full_disk': {'options': ''},
    'memory': {'epochs': 20, 'imagenetpath': None, 'options': '', 'json': None},
}
SHAPES = '--dataset shapes --depth 10 --width 0.25 --batch_size 512 --resume'
# A checkpoint every 0.3 s: several inside an epoch of a thousand photographs.
PHOTOGRAPHS = (
    '--depth 18 --width 0.125 --image_size 64 --batch_size 32 --checkpoint_minutes 0.005 --resume'
)
WATCHED = '--depth 18 --width 0.25 --image_size 112 --beta 1e+3 --batch_size 128'  # of memory

parser = Parser(__doc__)
add = parser.add_argument
add('check', metavar='CHECK', choices=CHECKS, help='kills, full_disk or memory')
add('--imagenetpath', metavar='DIR', help='train imagenet.py on DIR/{train,val}/CLASS/*')
add('--kills', type=number(int, 1), help='how often to kill (default: 50)')
add('--epochs', type=number(int, 1), help='of a run (kills: 40), or to watch (memory: 20)')
add('--seed', type=number(int, 0), help='seed of the random moments of kills (default: 0)')
add('--options', help='more options of the training script, in one string')
add('--json', metavar='FILE', help='also write the memory of each epoch to FILE')


def main(argv=None):
    opt, given = parser.parse(argv)
    complete(opt, given)
    check = {'kills': kills, 'full_disk': full_disk, 'memory': memory}[opt.check]
    with tempfile.TemporaryDirectory() as folder:
        check(Path(folder), opt)


def complete(opt, given):
    """Fill in the defaults of the check; reject options that it does not use."""
    defaults = CHECKS[opt.check]
    for name in sorted(given - defaults.keys()):
        raise UserError(f'--{name}: has no effect with {opt.check}')
    for name in defaults.keys() - given:
        setattr(opt, name, defaults[name])
    if opt.check == 'memory':
        if not opt.imagenetpath:
            raise UserError('memory: give the photographs to train on, --imagenetpath')
        if opt.epochs < 20:
            raise UserError(f'--epochs {opt.epochs}: memory needs at least 20')
        if not Path('/proc/self').is_dir():
            raise UserError('memory: there is no /proc on this system to read it from')
    if opt.json:
        check_writable(Path(opt.json).absolute().parent, '--json')


# ------------------------ kills


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


def kills(folder, opt):
    """Kill a training at random moments, resume it each time, and compare it with a run that was
    left alone."""
    if opt.imagenetpath:
        scan_photographs(opt.imagenetpath)
    train(opt, folder, 'teacher', 1)
    start, epoch = time_whole(folder, opt)
    rng, done, runs, inside = random.Random(opt.seed), 0, 0, 0
    while done < opt.kills:
        stood, runs = [], runs + 1  # where the checkpoint stood at each kill
        words = command(opt, folder, 'killed', opt.epochs)
        while done < opt.kills and kill_once(words, rng, start, epoch):
            stood.append(progress(folder / 'killed'))
            done += 1
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
    print(f'{done} kills in {runs} runs of {opt.epochs} epochs{where}, none lost')


def time_whole(folder, opt):
    """(seconds before its first epoch, seconds of an epoch) of the run that is left alone,
    folder/whole, which it trains."""
    began = time.time()
    train(opt, folder, 'whole', opt.epochs)
    took = time.time() - began
    records = read_log(folder / 'whole' / 'log.txt')
    epoch = statistics.median(r['train_time'] + r['test_time'] for r in records)
    return max(0, took - opt.epochs * epoch), epoch


def kill_once(words, rng, start, epoch):
    """Run a command and kill it in its start, or in one of the epochs after the first few lines
    that it prints. False if it ended before the kill."""
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
        raise UserError(f'a resumed run failed, status {status}', status=1)
    return status != 0


def progress(run):
    """(epochs, steps of the next one) that are done in the checkpoint of a run folder; (0, 0)
    before there is one."""
    if not (run / 'checkpoint.pt').exists():
        return 0, 0
    checkpoint = load_checkpoint(run)
    return checkpoint['epoch'], checkpoint['step']


def compare(whole, killed):
    """Raises UserError, status 1, if the weights or the logs of two runs differ."""

    def lines(run):
        records = read_log(run / 'log.txt')
        return [{k: v for k, v in r.items() if 'time' not in k and k != 'save'} for r in records]

    same_weights = (whole / 'model.hkl').read_bytes() == (killed / 'model.hkl').read_bytes()
    if not same_weights or lines(whole) != lines(killed):
        raise UserError('the resumed run differs from the one left alone', status=1)


# ------------------------ full_disk


def full_disk(folder, opt):
    """Fill the disk of a run. Check that the run folder is kept, and that the run continues when
    there is room again."""
    disk = folder / 'disk'
    disk.mkdir()
    mount = ['mount', '-t', 'tmpfs', '-o', 'size=4m', 'tmpfs', str(disk)]
    if subprocess.run(mount, check=False).returncode:
        raise UserError('full_disk: cannot mount a tmpfs; it needs root, and Linux')
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


# ------------------------ memory


def memory(folder, opt):
    """Print the resident memory of imagenet.py at the end of each epoch, and whether it grows."""
    train_set, _ = scan_photographs(opt.imagenetpath)
    print(machine())
    teacher = folder / 'teacher.hkl'
    torch.manual_seed(0)
    save_params(teacher, resnet.resnet(34, 0.25, len(train_set))[1])
    # One epoch more: the process still runs when the last epoch to watch has ended.
    words = [*WATCHED.split(), '--epochs', str(opt.epochs + 1)]
    words += ['--imagenetpath', opt.imagenetpath, *opt.options.split()]
    words += ['--teacher_params', str(teacher), '--save', str(folder / 'run')]
    sizes = watch([sys.executable, str(ROOT / 'imagenet.py'), *words], opt.epochs)
    early, middle, late = (v / 1e6 for v in medians(sizes))
    print(
        f'medians of five epochs: {early:.1f} MB from the third on, '
        f'{middle:.1f} MB from the middle on, {late:.1f} MB at the end; '
        f'{late - middle:+.1f} MB in the second half: '
        f'it {"grows" if grows(sizes) else "does not grow"}'
    )
    if opt.json:
        record = {'machine': machine(), 'options': vars(opt), 'resident_bytes': sizes}
        write_text(opt.json, json.dumps(record, indent=1) + '\n')


def watch(words, epochs):
    """[bytes] that a training command holds after each of its first epochs; then it is killed."""
    sizes = []
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as run:
        try:
            while len(sizes) < epochs and (line := run.stdout.readline()):
                if line.startswith('epoch '):
                    sizes.append(resident(run.pid))
                    print(f'epoch {len(sizes):<4}{sizes[-1] / 1e6:8.1f} MB', flush=True)
        finally:
            run.kill()
    if len(sizes) < epochs:
        raise UserError('imagenet.py ended early; its error is above', status=1)
    return sizes


def resident(pid):
    """Bytes of memory that a process holds, VmRSS; 0 for one that has ended."""
    lines = Path(f'/proc/{pid}/status').read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith('VmRSS:'))


def grows(sizes):
    """Whether memory is more than 0.5 % larger at the end than in the middle.

    Freed memory is kept, and some early steps find it in pieces and take more.
    """
    _, middle, late = medians(sizes)
    return late > 1.005 * middle


def medians(sizes):
    """Medians of `sizes` [epochs] over the third to seventh epoch, the first five of the second
    half, and the last five."""
    half = len(sizes) // 2
    return [statistics.median(v) for v in (sizes[2:7], sizes[half : half + 5], sizes[-5:])]


if __name__ == '__main__':
    sys.exit(program.call_main(main))
