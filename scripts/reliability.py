"""Check that training survives kills and a full disk, and whether its memory grows.

    # kill cifar.py at random moments on drawn shapes, in float32, eager; or with other options
    python scripts/reliability.py kills --kills 50
    python scripts/reliability.py kills --kills 10 --options "--dtype bfloat16 --compile"
    # on a disk that is full half of the time, a small tmpfs; needs root, Linux
    python scripts/reliability.py kills --kills 50 --full_disk
    # kill imagenet.py inside epochs, one process or two ranks
    python scripts/reliability.py kills --kills 20 --imagenetpath DIR --ranks 2
    # resident memory of imagenet.py after each epoch; Linux
    python scripts/reliability.py memory --imagenetpath DIR --epochs 20

kills resumes the run each time, starts another if it ends before the last kill, and compares it
with a run that was not interrupted: all but measured times must be bit-identical. Half of the kills
come after a random time, the others while a file is written. It prints where the checkpoint was
after each kill or full disk: 3+17 means 3 epochs and 17 steps of the fourth.

The student learns by attention transfer, in kills also by distillation.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import kill_at
import resnet
from benchmark import machine
from support import program
from support.files import check_file, write_text
from support.logs import read_log
from support.options import Parser, number
from support.photographs import scan_photographs
from support.program import UserError
from support.runs import load_checkpoint
from support.weights import save_params

# The options of each check, with their defaults.
CHECKS = {
    'kills': {
        'kills': 50,
        'epochs': 40,
        'seed': 0,
        'ranks': 1,
        'full_disk': False,
        'imagenetpath': None,
        'options': '',
    },
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
add('check', metavar='CHECK', choices=CHECKS, help='kills or memory')
add('--imagenetpath', metavar='DIR', help='train imagenet.py on DIR/{train,val}/CLASS/*')
add('--kills', type=number(int, 1), help='how often to kill (default: 50)')
add('--epochs', type=number(int, 1), help='of a run (kills: 40), or to watch (memory: 20)')
add('--seed', type=number(int, 0), help='seed of the random moments of kills (default: 0)')
add('--ranks', type=number(int, 1), help='processes of imagenet.py, by torchrun (default: 1)')
add('--full_disk', action='store_true', help='kills on a disk that is full half of the time')
add('--options', help='more options of the training script, in one string')
add('--json', metavar='FILE', help='also write the memory of each epoch to FILE')


def main(argv=None):
    opt, given = parser.parse(argv)
    complete(opt, given)
    check = {'kills': kills, 'memory': memory}[opt.check]
    with tempfile.TemporaryDirectory() as folder:
        check(Path(folder), opt)


def complete(opt, given):
    """Fill in the defaults of the check; reject options that it does not use."""
    defaults = CHECKS[opt.check]
    for name in sorted(given - defaults.keys()):
        raise UserError(f'--{name}: has no effect with {opt.check}')
    for name in defaults.keys() - given:
        setattr(opt, name, defaults[name])
    several = opt.check == 'kills' and opt.ranks > 1
    if several and not opt.imagenetpath:
        raise UserError(f'--ranks {opt.ranks}: cifar.py has one process; give --imagenetpath')
    if (several or opt.check == 'memory') and not Path('/proc/self').is_dir():
        raise UserError(f'{opt.check}: needs /proc, which this system does not have')
    if opt.check == 'memory':
        if not opt.imagenetpath:
            raise UserError('memory: give the photographs to train on, --imagenetpath')
        if opt.epochs < 20:
            raise UserError(f'--epochs {opt.epochs}: memory needs at least 20')
    if opt.json:
        check_file(opt.json, '--json')


# ------------------------ kills


def command(opt, run, epochs, teacher):
    """The training in the folder `run`: of a student, with --options, or of a teacher if None."""
    if opt.imagenetpath:
        script, name = 'imagenet.py', '--teacher_params'
        words = ['--imagenetpath', opt.imagenetpath, *PHOTOGRAPHS.split()]
    else:
        script, name, words = 'cifar.py', '--teacher_id', SHAPES.split()
    words += ['--epochs', str(epochs), '--save', str(run)]
    if teacher:
        words += [name, str(teacher), '--alpha', '0.5', '--beta', '100', *opt.options.split()]
    return [str(ROOT / script), *words]


def launch(opt, words):
    """The command that starts a script, on --ranks processes."""
    if opt.ranks == 1:
        return [sys.executable, *words]
    torchrun = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', str(opt.ranks)]
    return [sys.executable, *torchrun, *words]


def train(opt, run, epochs, teacher=None):
    words = launch(opt, command(opt, run, epochs, teacher))
    done = subprocess.run(words, check=False, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f'a run that was not interrupted failed: {done.stderr}', status=1)


def kills(folder, opt):
    """Kill a training at random moments, resume it each time, and compare it with a run that was
    not interrupted."""
    if opt.imagenetpath:
        scan_photographs(opt.imagenetpath)
    teacher, whole = folder / 'teacher', folder / 'whole'
    train(opt, teacher, 1)
    seconds = time_run(opt, whole, teacher)
    rng, ends, inside, runs = random.Random(opt.seed), Counter(), 0, 0
    with disk_for(whole, opt) as disk:
        run = disk / 'killed'
        while ends['killed'] < opt.kills:
            stood, runs = [], runs + 1  # where the checkpoint stood at each end
            while ends['killed'] < opt.kills:
                end = stop_once(opt, run, teacher, rng, seconds)
                if end == 'finished':
                    break
                ends[end] += 1
                stood.append(progress(run))
                if stood != sorted(stood):
                    raise UserError(f'a checkpoint was lost: {stood}', status=1)
            train(opt, run, opt.epochs, teacher)
            compare(whole, run)
            places = ', '.join(f'{epoch}+{step}' for epoch, step in stood)
            print(
                f'run {runs}: stopped {len(stood)} times, '
                f'its checkpoint at epoch+step {places or "-"}: the same bits',
                flush=True,
            )
            inside += sum(step > 0 for _, step in stood)
            shutil.rmtree(run)
    full = f' and {ends["full"]} full disks' if opt.full_disk else ''
    where = f', {inside} resumed inside an epoch' if opt.imagenetpath else ''
    print(f'{ends["killed"]} kills{full} in {runs} runs of {opt.epochs} epochs{where}, none lost')


def time_run(opt, run, teacher):
    """Train a run without interruption; (seconds before its first epoch, seconds of an epoch)."""
    began = time.time()
    train(opt, run, opt.epochs, teacher)
    took = time.time() - began
    records = read_log(run / 'log.txt')
    epoch = statistics.median(r['train_time'] + r['test_time'] for r in records)
    return max(0, took - opt.epochs * epoch), epoch


@contextlib.contextmanager
def disk_for(whole, opt):
    """The folder of the run to kill. With --full_disk a tmpfs with room for three such runs."""
    disk = whole.parent / 'disk'
    disk.mkdir()
    if not opt.full_disk:
        yield disk
        return
    size = 3 * sum(f.stat().st_size for f in whole.iterdir()) + 2**20
    mount = ['mount', '-t', 'tmpfs', '-o', f'size={size}', 'tmpfs', str(disk)]
    if subprocess.run(mount, check=False).returncode:
        raise UserError('--full_disk: cannot mount a tmpfs; it needs root, and Linux')
    try:
        yield disk
    finally:
        subprocess.run(['umount', str(disk)], check=True)


def stop_once(opt, run, teacher, rng, seconds):
    """Start a run, kill it at a random moment, and return how it ended: 'killed', 'full' (it found
    its disk full) or 'finished'.

    Half of the kills come after a random time, the others while the run writes one of its files.
    The first kind ends every process, as a power cut does, or one rank. With --full_disk there is
    little room on the disk half of the time. seconds: what time_run returned.
    """
    words, files = command(opt, run, opt.epochs, teacher), rng.randrange(2)
    if files:
        moment, n = rng.choice(kill_at.MOMENTS), rng.randint(1, 12)
        words = [str(ROOT / 'scripts/kill_at.py'), moment, str(n), *words]
    ballast = run.parent / 'ballast'
    if opt.full_disk and rng.randrange(2):
        room = rng.randrange(2 * (teacher / 'checkpoint.pt').stat().st_size)
        ballast.write_bytes(bytes(max(0, shutil.disk_usage(run.parent).free - room)))
    with tempfile.TemporaryFile('w+') as errors:
        words = launch(opt, words)
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=errors, text=True)
        try:
            if not files:
                wait(process, rng, *seconds)
                ranks = ranks_of(opt, process)
                one = ranks and rng.randrange(2)
                kill([rng.choice(ranks)] if one else [process.pid, *ranks])
            process.communicate()
        finally:
            if process.poll() is None:
                kill([process.pid, *ranks_of(opt, process)])
                process.wait()
        errors.seek(0)
        error = errors.read()
    ballast.unlink(missing_ok=True)
    return end_of(process.returncode, error)


def end_of(status, error):
    """How a process ended, from its exit status and its stderr. Raises UserError, status 1, for any
    other end."""
    if status == 0:
        return 'finished'
    if status == 1 and ': error: cannot write' in error and 'No space left on device' in error:
        return 'full'
    if status == -signal.SIGKILL or 'SIGKILL' in error:  # torchrun names the signal
        return 'killed'
    raise UserError(f'a resumed run failed, status {status}: {error}', status=1)


def wait(process, rng, start, epoch):
    """Wait for a random moment in the start of a run, or in one of its next epochs."""
    wanted, seen = rng.randrange(5), 0
    while seen < wanted and (line := process.stdout.readline()):
        seen += line.startswith('epoch ')
    time.sleep(rng.uniform(0, 2 * epoch if wanted else start))


def kill(processes):
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def ranks_of(opt, process):
    """The processes that torchrun has started."""
    if opt.ranks == 1:
        return []
    children = Path(f'/proc/{process.pid}/task/{process.pid}/children')
    return [int(pid) for pid in children.read_text().split()]


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
        raise UserError('the resumed run differs from the uninterrupted one', status=1)


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
