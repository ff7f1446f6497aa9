"""scripts/benchmark.py: what it counts, and that its table comes out, on a few images."""

import json
import mmap
import os
import re
import statistics
import subprocess
import sys
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

SCRIPTS = Path(__file__).resolve().parent.parent / 'scripts'
sys.path.insert(0, str(SCRIPTS))

import benchmark


def options(*argv):
    return benchmark.parser.parse(
        ['--batch_size', '4', '--images', '8', '--nthread', '1', '--device', 'cpu', *argv]
    )[0]


def convolutions(depth, width):
    """(channels in, out, kernel, size of the output) of a Wide ResNet's convolutions, from the
    paper's table."""
    yield 3, 16, 3, 32
    ni = 16
    for group, channels in enumerate((16, 32, 64)):
        no, size = channels * width, 32 >> group
        for _ in range((depth - 4) // 6):
            yield ni, no, 3, size
            yield no, no, 3, size
            if ni != no:
                yield ni, no, 1, size
            ni = no


def expected_flops(batch):
    def forward(net):
        return [2 * batch * ni * no * k * k * size * size for ni, no, k, size in convolutions(*net)]

    student, teacher = forward((16, 1)), forward((16, 2))
    fc = (
        2 * batch * 10 * (3 * 64 + 128)
    )  # the student's forward and two gradients, the teacher's forward
    return 3 * sum(student) - student[0] + sum(teacher) + fc  # the images need no gradient


def test_bound_has_the_operations_of_the_step():
    opt = options()
    calls = Counter(str(func.overloadpacket) for func, _, _ in benchmark.record_step(opt, 'float'))
    student, teacher = (len(list(convolutions(*net))) for net in ((16, 1), (16, 2)))
    assert calls['aten.convolution'] == student + teacher
    assert calls['aten.convolution_backward'] == student
    assert calls['aten.addmm'] == 2 and calls['aten.mm'] == 2
    assert benchmark.flops(opt) == expected_flops(4)


def test_bound_has_the_flops_of_the_step():
    opt = options()
    with FlopCounterMode(display=False) as counter:
        benchmark.ours(opt, 'float', compiled=False)(1)
    assert benchmark.flops(opt) == counter.get_total_flops()


def test_bound_of_bfloat16_convolves_in_bfloat16():
    calls = benchmark.record_step(options(), 'bfloat16')
    assert {args[0].dtype for func, args, _ in calls if 'convolution' in str(func)} == {
        torch.bfloat16
    }


def test_table_has_a_row_for_each_variant(tmp_path):
    command = '--rounds 1 --steps 1 --batch_size 4 --images 8 --nthread 1 --device cpu --only a,b,e'
    done = subprocess.run(
        [sys.executable, SCRIPTS / 'benchmark.py', *command.split(), '--json', 'b.json'],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = {r['variant']: r for r in json.loads((tmp_path / 'b.json').read_text())['rows']}
    assert list(rows) == ['a', 'b', 'e32', 'e16']
    for name, row in rows.items():
        assert f'{name:4}{row["what"]}' in done.stdout
        assert row['images_per_second'] > 0 and row['peak_memory'] > 5e7
    assert (
        rows['e32']['share_of_bound']
        == rows['e16']['share_of_bound']
        == rows['a']['ratio_to_a']
        == 1
    )


def make_photographs(root):
    """JPEGs of noise: two classes in root/train and root/val, four images each and two."""
    rng = np.random.default_rng(0)
    for split, n in ('train', 4), ('val', 2):
        for name in 'a', 'b':
            (root / split / name).mkdir(parents=True)
            for i in range(n):
                image = rng.integers(0, 256, (60, 80, 3), np.uint8)
                cv2.imwrite(str(root / split / name / f'{i}.jpg'), image)
    return root


def test_input_is_images_a_second_less_the_first_turn(tmp_path, monkeypatch, capsys):
    """By a clock on which a turn of the 12 photographs takes 1, 2 and 3 s, the first one a thousand
    times that."""
    turns = [1000, 2000, 3000] + 3 * [1, 2, 3]
    ticks = iter([t for i, turn in enumerate(turns) for t in (1e6 * i, 1e6 * i + turn)])
    monkeypatch.setattr(benchmark.time, 'process_time', lambda: next(ticks))
    photographs = make_photographs(tmp_path)
    # Fewer images than a turn of training takes do not matter here.
    words = ['--input', str(photographs), '--rounds', '3', '--device', 'cpu', '--images', '12']
    benchmark.main(words)
    _, *rows = capsys.readouterr().out.splitlines()
    assert [row.split() for row in rows] == [
        f'{name} {rate} img/s a core, {ratio} times torchvision, {share}% of decoding alone'.split()
        for name, rate, ratio, share in (
            ('decode_alone', 12, '3.00', 100),
            ('ours', 6, '1.50', 50),
            ('torchvisions', 4, '1.00', 33),
        )
    ]
    assert next(ticks, None) is None


def test_memory_after_each_epoch_is_told(tmp_path):
    words = ['--memory', '--imagenetpath', make_photographs(tmp_path / 'set'), '--epochs', '20']
    words += ['--batch_size', '8', '--nthread', '1', '--device', 'cpu', '--json', 'memory.json']
    done = subprocess.run(
        [
            sys.executable,
            SCRIPTS / 'benchmark.py',
            *words,
            '--options',
            '--image_size 33 --width 0.1',
        ],
        check=False,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    _, *epochs, verdict = done.stdout.splitlines()
    sizes = json.loads((tmp_path / 'memory.json').read_text())['resident_bytes']
    assert epochs == [f'epoch {i:<4}{size / 1e6:8.1f} MB' for i, size in enumerate(sizes, 1)]
    assert len(sizes) == 20 and min(sizes) > 1e8  # torch alone is more
    early, middle, late = (statistics.median(sizes[i : i + 5]) / 1e6 for i in (2, 10, 15))
    assert [float(v) for v in re.findall(r'([-+.\d]+) MB', verdict)] == [
        round(v, 1) for v in (early, middle, late, late - middle)
    ]
    assert verdict.endswith('it grows' if benchmark.grows(sizes) else 'it does not grow')


def test_resident_memory_is_that_of_the_process():
    before = benchmark.resident(os.getpid())
    with mmap.mmap(-1, 80_000_000) as held:  # fresh pages, whatever malloc has kept
        for i in range(0, len(held), 4096):
            held[i] = 1
        grown = benchmark.resident(os.getpid()) - before
    assert abs(grown - 80e6) < 8e6


def test_memory_that_leaks_is_told_from_memory_that_settles():
    settles = [600, 700] + 4 * [710] + 14 * [720]
    assert not benchmark.grows(settles)
    assert not benchmark.grows([size + 3 * (i % 2) for i, size in enumerate(settles)])
    assert benchmark.grows([size + i for i, size in enumerate(settles)])
    assert benchmark.grows([720] * 16 + [730] * 4)
    assert not benchmark.grows(settles[::-1])


def test_a_run_that_ends_early_is_told(tmp_path):
    words = [sys.executable, '-c', 'print("epoch 1/2", flush=True)']
    with pytest.raises(benchmark.UserError, match='ended early'):
        benchmark.watch(words, 2)


@pytest.mark.parametrize(
    'argv',
    [
        ['--only', 'a,z'],
        ['--rounds', '0'],
        ['--images', '100', '--steps', '99'],
        ['--input', 'nowhere'],
        ['--memory'],
        ['--imagenetpath', 'nowhere', '--memory'],
        ['--epochs', '19'],
    ],
)
def test_mistakes_name_their_option(argv, capsys):
    assert benchmark.program.call_main(benchmark.main, argv) == 2
    error = capsys.readouterr().err
    assert error.count('\n') == 1 and argv[0] in error
