"""Damages small weights files of every format at random and reads each in a forked process.

    python tests/fuzz_weights.py --rounds 300 --seed 0 --keep /tmp/found

Prints how the reads ended, by format. Each must end in weights or in an error of one line; the
other files are kept and listed, and the exit status is 1.
"""

import argparse
import contextlib
import io
import os
import random
import re
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

os.environ['OMP_NUM_THREADS'], os.environ['CUDA_VISIBLE_DEVICES'] = '1', ''
sys.path.insert(0, str(Path(__file__).parent.parent))

import hickle
import numpy as np
import safetensors.torch
import torch

import forked
import resnet
import test_weights
from support import weights
from support.program import UserError

HUGE = [2**n - d for n in (15, 16, 24, 31, 32, 40, 48, 62, 63, 64) for d in (0, 1, 8)]


def whole_files(folder: Path) -> dict:
    """{format: bytes} of small, sound weights files."""
    torch.manual_seed(0)
    values = {'conv0': np.arange(6, dtype='f4').reshape(2, 3)}
    values |= {'bn.running_var': np.ones(2, 'f4'), 'fc.weight': np.ones((2, 2), 'f8')}
    tensors = {k: torch.from_numpy(v) for k, v in values.items()}
    net = resnet.wrn(10, 1 / 16, 2)[1]
    arrays = {k: v.detach().numpy() for k, v in net.items()}
    optimizer = torch.optim.Adam([p for p in net.values() if p.requires_grad])
    sum(p.sum() for p in net.values()).backward()
    optimizer.step()
    checkpoint = {
        'state_dict': {f'module.{k}': v for k, v in net.items()},
        'args': argparse.Namespace(arch='wrn', lr=0.1, folder=Path('data')),
        'best_acc1': np.float64(93.5),
        'optimizer': optimizer.state_dict(),
        'history': [{'epoch': i, 'loss': (0.5, None, 2**40)} for i in range(3)],
    }

    def compressed(kind):
        return lambda path: hickle.dump(arrays, str(path), mode='w', compression=kind)

    writers = {
        'torch zip': lambda path: torch.save(tensors, path),
        'torch legacy': lambda path: torch.save(net, path, _use_new_zipfile_serialization=False),
        'torch checkpoint': lambda path: torch.save(checkpoint, path),
        'torch legacy checkpoint': lambda path: torch.save(
            checkpoint, path, _use_new_zipfile_serialization=False
        ),
        'safetensors': lambda path: safetensors.torch.save_file(net, path),
        'hickle 5': lambda path: weights.save_params(path, net),
        'hickle 5 gzip': compressed('gzip'),
        'hickle 5 lzf': compressed('lzf'),
        'hickle 2': lambda path: test_weights.write_hickle_2(path, values),
        'hickle 3': lambda path: test_weights.write_hickle_3(path, arrays),
        'hickle 4': lambda path: test_weights.write_hickle_4(path, values),
        'hickle 5 by hand': lambda path: test_weights.write_hickle_5(path, values),
    }
    files = {}
    for kind, write in writers.items():
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            write(folder / 'whole')
        files[kind] = (folder / 'whole').read_bytes()
        (folder / 'whole').unlink()
    return files


def damaged(whole: bytes, rng: random.Random) -> bytes:
    """The file after one to four random changes."""
    raw = bytearray(whole)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at, length = _place(raw, rng), rng.choice((1, 2, 4, 8, 16, 100, 512))
        block = raw[at : at + length]
        action = rng.choice(('flip', 'flip', 'set', 'number', 'number') + RARE)
        if action == 'flip':
            raw[at] ^= 1 << rng.randrange(8)
        elif action == 'set':
            raw[at : at + len(block)] = rng.randbytes(len(block))
        elif action == 'number':
            size, order = rng.choice((4, 8)), rng.choice(('little', 'little', 'big'))
            number = rng.choice((rng.choice(HUGE) % 2 ** (8 * size), _place(raw, rng)))
            raw[at : at + size] = number.to_bytes(size, order)
        elif action == 'zero':
            raw[at : at + len(block)] = bytes(len(block))
        elif action == 'swap':
            other = _place(raw, rng)
            raw[at : at + length], raw[other : other + length] = raw[other : other + length], block
        elif action == 'repeat':
            raw[at:at] = block * rng.choice((1, 1, 3))
        elif action == 'insert':
            raw[at:at] = rng.randbytes(length)
        elif action == 'drop':
            del raw[at : at + length]
        else:
            del raw[at:]
        if not raw:
            break
    return bytes(raw)


MARKS = rb'TREE|SNOD|HEAP|GCOL|OHDR|PK\x03\x04|PK\x01\x02|PK\x05\x06|\x80\x02'
RARE = ('zero', 'swap', 'repeat', 'insert', 'drop', 'cut')


def _place(raw, rng) -> int:
    """A position in the file: anywhere, at its ends, or at or behind a mark of its format."""
    kind = rng.randrange(3)
    marks = [m.start() for m in re.finditer(MARKS, raw)] if kind == 0 else []
    if marks:
        return min(len(raw) - 1, rng.choice(marks) + rng.choice((0, rng.randrange(64))))
    at = rng.randrange(len(raw))
    if kind == 1:
        return min(at, rng.randrange(1024)) if rng.random() < 0.5 else max(at, len(raw) - 512)
    return at


def read(path) -> str:
    """How reading ends, a UserError included."""
    ends = []
    for load in weights.load_params, weights.load_net:
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                load(path)
            ends.append('loaded')
        except UserError as e:
            if str(path) not in str(e) or '\n' in str(e) or len(str(e)) > 3000:
                raise AssertionError(f'a strange message: {str(e)[:3000]}') from e
            if 'more memory' in str(e):
                raise AssertionError('refused only when memory runs out') from e
            ends.append('refused')
    return ' '.join(ends)


def outcome(path) -> tuple[str, str]:
    """(how reading that file ended, 'bad' behind it if it must not, what was said)."""
    end = forked.call(read, path)
    if end.how == 'value':
        return end.what, ''
    return f'{end.how}, bad', f'{end.what}, {end.seconds:.1f} s, {end.grown / 2**20:.0f} MiB'


def fuzz(rounds: int, seed: int, folder: Path, formats: str = '') -> tuple[dict, list]:
    """({(format, outcome): count}, [(file, format, outcome, what was said)] of bad ones). The bad
    files stay in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    counts, bad = Counter(), []
    for kind, whole in whole_files(folder).items():
        if formats not in kind:
            continue
        (folder / 'whole').write_bytes(whole)
        end, said = outcome(folder / 'whole')
        if not end.startswith('loaded'):
            bad.append((folder / 'whole', kind, end, said))
        for i in range(rounds):
            name = f'{kind.replace(" ", "_")}-{seed}-{i}'
            rng = random.Random(name)
            path = folder / name
            path.write_bytes(damaged(whole, rng))
            end, said = outcome(path)
            counts[kind, end] += 1
            if end.endswith('bad'):
                bad.append((path, kind, end, said))
                print(*bad[-1], sep=' | ', flush=True)
            else:
                path.unlink()
        (folder / 'whole').unlink()
    return counts, bad


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--rounds', type=int, default=300, help='files of each format')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--formats', default='', help='only those with this in their names')
    parser.add_argument('--keep', type=Path, help='folder for the files that end badly')
    opt = parser.parse_args()
    folder = opt.keep or Path(tempfile.mkdtemp())
    counts, bad = fuzz(opt.rounds, opt.seed, folder, opt.formats)
    ends = sorted({end for _, end in counts})
    print('format'.ljust(25), *(end.rjust(16) for end in ends))
    for kind in dict.fromkeys(kind for kind, _ in counts):
        print(kind.ljust(25), *(str(counts[kind, end]).rjust(16) for end in ends))
    print(
        'total'.ljust(25),
        *(str(sum(n for (_, e), n in counts.items() if e == end)).rjust(16) for end in ends),
    )
    return 1 if bad else 0


if __name__ == '__main__':
    sys.exit(main())
