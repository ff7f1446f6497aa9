"""scripts/benchmark.py: what it counts, and that its table comes out, on a few images."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

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
    """(channels in, out, kernel, size of the output) of a Wide ResNet's convolutions, from the paper's table."""
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
    command = f'--rounds 1 --steps 1 --batch_size 4 --images 8 --nthread 1 --device cpu --only a,b,e --json {tmp_path / "b.json"}'
    done = subprocess.run(
        [sys.executable, SCRIPTS / 'benchmark.py', *command.split()],
        cwd=tmp_path,
        capture_output=True,
        text=True,
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


@pytest.mark.parametrize(
    'argv', [['--only', 'a,z'], ['--rounds', '0'], ['--images', '100', '--steps', '99']]
)
def test_mistakes_name_their_option(argv):
    with pytest.raises(benchmark.utils.UserError, match=argv[0]):
        benchmark.main(argv)
