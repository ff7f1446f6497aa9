"""Runs every program on random and mutated command lines, damaged files and odd folders, each in a
forked process.

    python tests/torture.py --rounds 2000 --seed 0

Each input must end in success, in one line with status 2, or in one line with status 1 for a limit
of the machine or a loss that is not finite. Files that were there before must be unchanged, except
the run folder of a run that succeeds. No process may take 60 s, or 2 GiB more than at its start.
The inputs that end otherwise are printed, and the exit status is 1.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

os.environ['OMP_NUM_THREADS'], os.environ['CUDA_VISIBLE_DEVICES'] = '1', ''
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / folder) for folder in ('', 'tests', 'scripts', 'examples')]

import classify
import cv2
import numpy as np
import torch
import transfer

import agreement
import attention
import cifar
import convert
import forked
import imagenet
import plot
import prepare_cub
import prepare_imagenet
import prepare_scenes
import resize_photographs
import summarize
from samples import make_folder_set, make_photographs, words
from support import devices, program
from test_prepare import make_cub, make_flat, make_scenes

SMALL = '--dataset folder --dataroot set --depth 10 --width 0.25 --epochs 1 --nthread 1'
PHOTOS = '--imagenetpath photos --image_size 40 --width 0.125 --epochs 1 --nthread 1'
# Sound commands, from which the others are made. `out` does not exist.
COMMANDS = [
    (cifar, f'{SMALL} --batch_size 5 --save out --seed 3'),
    (cifar, f'{SMALL} --save out --teacher_id nets/small --beta 1e+3 --at_groups 1,2 --at_p 1'),
    (cifar, f'{SMALL} --save out --teacher_id nets/small --alpha 0.9 --temperature 4 --validate 6'),
    (cifar, f'{SMALL} --save out --teacher_id nets/small --beta 1 --method factt'),
    (cifar, f'{SMALL} --save out --beta 1 --method minl2 --beta_decay linear'),
    (cifar, '--evaluate nets/small --dataset folder --dataroot set'),
    (cifar, f'{SMALL} --save nets/small --resume --epochs 1'),
    (cifar, '--resume nets/small --epochs 2'),
    (imagenet, f'{PHOTOS} --batch_size 6 --save out --lr 0.01 --epoch_step [2]'),
    (imagenet, f'{PHOTOS} --save out --teacher_params nets/large --beta 10 --at_groups 2,3'),
    (imagenet, f'{PHOTOS} --save out --student_params nets/large --finetune --skip_broken'),
    (imagenet, f'{PHOTOS} --save out --check_images --train_crop plain --at_start 1'),
    (imagenet, '--evaluate nets/large --imagenetpath photos'),
    (imagenet, '--resume nets/large --epochs 2'),
    (plot, 'nets/small nets/large --labels a b --save out.svg'),
    (summarize, 'table1 nets --save out.md'),
    (attention, '--weights nets/small --images set/test/cat --n 2 --save out.png'),
    (attention, '--weights nets/large --images photos/val/city --save out.png --gradient'),
    (agreement, '--weights nets/small nets/small --dataset folder --dataroot set --save out.md'),
    (convert, 'nets/small out.hkl'),
    (convert, 'nets/large out.pth --fold'),
    (convert, 'nets/large/model.hkl out.safetensors'),
    (prepare_cub, 'birds out'),
    (prepare_scenes, 'rooms out --skip_broken'),
    (prepare_imagenet, 'ilsvrc/val ilsvrc/LOC_val_solution.csv --links out'),
    (resize_photographs, 'photos out --side 48 --quality 80 --nthread 1'),
    (classify, 'nets/large photos/val/city/0.jpg --top 2'),
    (transfer, 'photos --student torchvision.models:squeezenet1_1 --image_size 64 --list'),
]
VALUES = ['0', '1', '-1', '2', '3.5', 'nan', 'inf', '1e400', '1e-30', '999999999999', '9', 'x']
VALUES += ['[]', '[1]', '[2,1]', '0,1', '-', '--', 'é', '☃', '\x1b[31m']
VALUES += ['', ' ', '.', '/', '..', 'set', 'photos', 'nets/small', 'nets/large', 'nets', 'none']
VALUES += ['/dev/null', '/proc/self/mem', 'a' * 300, 'nets/small/log.txt', 'nets/small/model.hkl']
VALUES += ['nets/small/checkpoint.pt', 'set/train/cat/0.png', 'nets/large/model.hkl:params', '*']


def make_sound(folder: Path) -> None:
    """The files that the sound commands read."""
    folder.mkdir()
    make_folder_set(folder / 'set', 4)
    make_photographs(folder / 'photos', train=4, val=2)
    for i, suffix in enumerate(('png', 'webp', 'bmp', 'tiff', 'ppm')):
        image = np.random.default_rng(i).integers(0, 256, (50 + i, 60, 3), np.uint8)
        cv2.imwrite(str(folder / f'photos/train/city/more.{suffix}'), image)
    make_cub(folder / 'birds')
    make_scenes(folder / 'rooms')
    make_flat(folder / 'ilsvrc')
    with inside(folder):
        for main, argv in (
            (cifar.main, f'{SMALL} --save nets/small --batch_size 5'),
            (imagenet.main, f'{PHOTOS} --save nets/large --batch_size 6 --lr 1e-3'),
        ):
            assert program.call_main(main, words(argv)) == 0


@contextlib.contextmanager
def inside(folder):
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


# ------------------------ inputs


def mutated(argv: list, rng: random.Random) -> list:
    """The command with up to three words removed, repeated, exchanged or replaced."""
    argv = list(argv)
    options = [word for _, command in COMMANDS for word in words(command) if word[:2] == '--']
    for _ in range(rng.randrange(4)):
        i = rng.randrange(len(argv)) if argv else 0
        kind = rng.randrange(6)
        if kind == 0 and argv:
            del argv[i]
        elif kind == 1 and argv:
            argv.insert(i, rng.choice(argv))
        elif kind == 2 and argv:
            j = rng.randrange(len(argv))
            argv[i], argv[j] = argv[j], argv[i]
        elif kind == 3:
            argv[i:i] = [rng.choice(options), rng.choice(VALUES)]
        elif argv:
            argv[i] = rng.choice(VALUES)
    return argv


def damage(folder: Path, rng: random.Random) -> str:
    """Damage or move something in the folder. Returns what."""
    files = sorted(p for p in folder.rglob('*') if p.is_file())
    path, kind = rng.choice(files), rng.randrange(9)
    raw = path.read_bytes()
    if kind == 0:
        path.write_bytes(raw[: rng.randrange(len(raw) + 1)])
    elif kind == 1:
        changed = bytearray(raw)
        for _ in range(rng.choice([1, 1, 4, 40])):
            changed[rng.randrange(len(raw))] = rng.randrange(256)
        path.write_bytes(changed)
    elif kind == 2:
        path.write_bytes(rng.choice(files).read_bytes())
    elif kind == 3:
        path.unlink()
    elif kind == 4:
        path.unlink(), path.mkdir()
    elif kind == 5:
        path.unlink(), path.symlink_to(rng.choice(['nowhere', path.name, '..', '/dev/zero']))
    elif kind == 6 and path.parent != folder:
        shutil.rmtree(path.parent)
    elif kind in (6, 7):
        (path.parent / rng.choice(['new', '.hidden', 'é\n', 'x.jpg'])).mkdir(exist_ok=True)
    else:
        path = rng.choice(sorted(folder.glob('nets/*/log.txt')) or [path])
        swap_fields(path, rng)
    return f'{path.relative_to(folder)}, kind {kind}'


def swap_fields(log: Path, rng: random.Random) -> None:
    """Give a field of the log's first line the value of another, or an invalid one."""
    with contextlib.suppress(ValueError, OSError, IndexError):
        first, *rest = log.read_text().splitlines()
        record = json.loads(first.removeprefix('json_stats: '))
        odd = [None, -1, 1e308, '', [], {}, 'é', True, *record.values()]
        record[rng.choice(list(record))] = rng.choice(odd)
        log.write_text('\n'.join([f'json_stats: {json.dumps(record)}', *rest]) + '\n')


# ------------------------ one input


def contents(folder: Path) -> dict:
    """{path: bytes, or what it is} of everything in the folder."""
    found = {}
    for path in sorted(folder.rglob('*')):
        kind = os.readlink(path) if path.is_symlink() else 'folder'
        found[str(path.relative_to(folder))] = path.read_bytes() if path.is_file() else kind
    return found


def run(module: ModuleType, argv: list, folder: Path) -> tuple:
    """(exit status, stderr) of a program in the folder. Runs in the child."""
    os.chdir(folder)
    sys.argv = [str(ROOT / f'{module.__name__}.py'), *argv]
    devices.compiled = lambda f, device: f  # compiling takes a minute
    with open('/dev/null', 'rb') as null, open(folder.parent / 'out', 'wb') as out:
        os.dup2(null.fileno(), 0), os.dup2(out.fileno(), 1)
    with open(folder.parent / 'err', 'wb') as err:
        os.dup2(err.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, 'w', closefd=False), os.fdopen(2, 'w', closefd=False)
    program.printed.clear()
    try:
        status = program.call_main(module.main, argv)
    except SystemExit as e:
        status = e.code or 0
    sys.stderr.flush()
    return status, (folder.parent / 'err').read_text(errors='replace')


def judged(end: forked.End, before: dict, after: dict) -> tuple[str, str]:
    """(how it ended, what is wrong with it or '')."""
    if end.how != 'value':
        return end.how, f'{end.how}: {str(end.what)[-1500:]}'
    status, error = end.what
    lines = [line for line in error.splitlines() if not line.startswith('warning: ')]
    lost = sorted(path for path, value in before.items() if after.get(path) != value)
    if status == 0:
        # prepare_imagenet moves the photographs unless it has --links.
        may_change = 'nets/small', 'nets/large', 'out', 'ilsvrc/val'
        lost = [p for p in lost if not p.startswith(may_change)]
        return 'success', f'changed {lost}' if lost else ''
    wrong = f'changed {lost}. ' if lost else ''
    if status not in (1, 2) or not lines or 'Traceback' in error:
        wrong += f'status {status}: {error[-1500:]}'
    elif ': error: ' not in lines[-1]:
        wrong += f'no error: {error[-1500:]}'
    return f'status {status}', wrong


def torture(rounds: Iterable[int], seed: int, folder: Path) -> tuple[Counter, list]:
    """({(program, how it ended): count}, [(program, argv, damage, what is wrong)])."""
    torch.set_num_threads(1)
    make_sound(folder / 'sound')
    counts, bad = Counter(), []
    for i in rounds:
        rng = random.Random(f'{seed} {i}')
        module, command = rng.choice(COMMANDS)
        argv, done = words(command), 'nothing'
        shutil.rmtree(folder / 'work', ignore_errors=True)
        shutil.copytree(folder / 'sound', folder / 'work', symlinks=True)
        if rng.random() < 0.6:
            argv = mutated(argv, rng)
        if rng.random() < 0.6:
            done = damage(folder / 'work', rng)
        argv = bounded(module, argv)
        before = contents(folder / 'work')
        end = forked.call(run, module, argv, folder / 'work', seconds=60, memory=2**31)
        how, wrong = judged(end, before, contents(folder / 'work'))
        counts[module.__name__, how] += 1
        if wrong:
            bad.append((module.__name__, argv, done, wrong))
            print(f'{i}: {module.__name__} {argv}, damaged: {done}\n    {wrong}', flush=True)
    return counts, bad


def bounded(module: ModuleType, argv: list) -> list:
    """Without what takes long: more epochs, and downloads."""
    if module in (cifar, imagenet) and not {'--epochs', '--evaluate', '--resume'} & set(argv):
        argv = [*argv, '--epochs', '1']
    for i, word in enumerate(argv[:-1]):
        if word == '--epochs' and argv[i + 1] not in ('0', '1', '2', '-1', 'x', ''):
            argv[i + 1] = '1'
    return [word for word in argv if word not in ('CIFAR10', 'CIFAR100')]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--rounds', type=int, default=2000, help='inputs')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--only', type=int, metavar='I', help='only the input with this number')
    opt = parser.parse_args()
    rounds = range(opt.rounds) if opt.only is None else [opt.only]
    with tempfile.TemporaryDirectory() as folder:
        counts, bad = torture(rounds, opt.seed, Path(folder))
    for name in sorted({name for name, _ in counts}):
        ends = ', '.join(f'{n} {end}' for (of, end), n in sorted(counts.items()) if of == name)
        print(f'{name}: {ends}')
    print(f'{sum(counts.values())} inputs, {len(bad)} ended badly')
    return 1 if bad else 0


if __name__ == '__main__':
    sys.exit(main())
