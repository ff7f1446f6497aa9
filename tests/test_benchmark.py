"""scripts/benchmark.py: what it counts, and that its table comes out, on a few images."""

import json
import sys
import weakref
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from programs import PROCESSES
from samples import make_photographs
from support import devices

SCRIPTS = Path(__file__).resolve().parent.parent / 'scripts'
sys.path.insert(0, str(SCRIPTS))

import benchmark
import step_parts


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


def record(dtype):
    """The calls of one step of ours."""
    return step_parts.record(benchmark.ours(options(), dtype, compiled=False))


def flops(run):
    """Floating-point operations of a step's convolutions and matrix products."""
    with FlopCounterMode(display=False) as counter:
        run(1)
    return counter.get_total_flops()


def test_bound_has_the_operations_of_the_step():
    calls = Counter(str(func.overloadpacket) for func, _, _ in record('float'))
    student, teacher = (len(list(convolutions(*net))) for net in ((16, 1), (16, 2)))
    assert calls['aten.convolution'] == student + teacher
    assert calls['aten.convolution_backward'] == student
    assert calls['aten.addmm'] == 2 and calls['aten.mm'] == 2
    assert flops(benchmark.bound(options(), 'float', False)) == expected_flops(4)


def test_bound_has_the_flops_of_the_step():
    step = benchmark.ours(options(), 'float', compiled=False)
    assert flops(benchmark.bound(options(), 'float', False)) == flops(step)


@pytest.mark.parametrize('keep', [False, True])
def test_second_bound_keeps_outputs_until_the_backward_call(keep):
    """Of the student's convolutions alone: the teacher's outputs serve no backward pass."""
    alive, outputs = [], {}

    def watched(call):
        func, args, kwargs = call

        def run(*args, **kwargs):
            output = func(*args, **kwargs)
            if step_parts.name(call) == 'aten.convolution':
                outputs[step_parts.weight(call)] = weakref.ref(output)
            elif step_parts.name(call) == 'aten.convolution_backward':
                alive.append(outputs[step_parts.weight(call)]() is not None)
            return output

        run.overloadpacket = func.overloadpacket
        return run, args, kwargs

    step_parts.make_replay([watched(call) for call in record('float')], keep)(1)
    student, teacher = (len(list(convolutions(*net))) for net in ((16, 1), (16, 2)))
    # Without keep, the output of the last call is still in a variable.
    assert alive == [keep] * student
    assert len(outputs) == student + teacher
    assert not any(output() is not None for output in outputs.values())


def test_bound_of_bfloat16_convolves_in_bfloat16():
    assert {
        args[0].dtype for func, args, _ in record('bfloat16') if 'convolution' in str(func)
    } == {torch.bfloat16}


def test_compiled_step_is_the_one_that_cifar_compiles(monkeypatch):
    """Each step calls what support.devices.compiled returned."""
    compiled, calls = [], []

    def fake(f, device):
        compiled.append((f, device))
        return lambda *args: calls.append(args) or f(*args)

    monkeypatch.setattr(devices, 'compiled', fake)
    benchmark.ours(options(), 'float', compiled=False)(2)
    assert not compiled
    benchmark.ours(options(), 'float', compiled=True)(2)
    ((f, device),) = compiled
    assert f.__qualname__.startswith('make_loss.') and device.type == 'cpu'
    assert len(calls) == 2


def test_table_has_a_row_for_each_variant(tmp_path, monkeypatch, capsys):
    """With processes that are forked, not spawned, to save the seconds of importing torch."""
    monkeypatch.setattr(benchmark.multiprocessing, 'get_context', lambda _: PROCESSES)
    monkeypatch.setenv('TORCHINDUCTOR_CACHE_DIR', str(tmp_path / 'cache'))
    monkeypatch.chdir(tmp_path)
    command = (
        '--rounds 1 --steps 1 --batch_size 4 --images 8 --nthread 1 --device cpu --only a,b,e32,f'
    )
    assert benchmark.program.call_main(benchmark.main, [*command.split(), '--json', 'b.json']) == 0
    out, err = capsys.readouterr()
    rows = {r['variant']: r for r in json.loads((tmp_path / 'b.json').read_text())['rows']}
    assert list(rows) == ['a', 'b', 'e32', 'f32', 'f16']
    # Only progress comes beside the table.
    assert {line.split()[0] for line in err.splitlines()} == {'starting', 'round'}
    for name, row in rows.items():
        assert f'{name:4}{row["what"]}' in out
        assert row['images_per_second'] > 0 and row['peak_memory'] > 5e7
    assert rows['e32']['share_of_bound'] == 1 and rows['f16']['share_of_bound'] is None
    assert rows['f32']['share_of_kept_bound'] == rows['f16']['share_of_kept_bound'] == 1
    assert rows['a']['ratio_to_a'] == 1


def test_error_of_a_variant_is_printed(capsys, monkeypatch):
    """The batch is too large for any memory."""
    monkeypatch.setattr(benchmark.multiprocessing, 'get_context', lambda _: PROCESSES)
    words = f'--rounds 1 --steps 1 --batch_size {10**9} --images {10**9} --device cpu --only b'
    assert benchmark.program.call_main(benchmark.main, words.split()) == 1
    error = capsys.readouterr().err
    assert "can't allocate memory" in error or 'not enough memory' in error
    assert error.rstrip().endswith('a variant ended early; its error is above')


def test_input_is_images_a_second_less_the_first_turn(tmp_path, monkeypatch, capsys):
    """By a clock on which a turn of the 12 photographs takes 1, 2 and 3 s, the first one a thousand
    times that."""
    turns = [1000, 2000, 3000] + 3 * [1, 2, 3]
    ticks = iter([t for i, turn in enumerate(turns) for t in (1e6 * i, 1e6 * i + turn)])
    monkeypatch.setattr(benchmark.time, 'process_time', lambda: next(ticks))
    photographs = make_photographs(tmp_path, ('a', 'b'), train=4, val=2)
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


@pytest.mark.parametrize(
    'argv',
    [
        ['--only', 'a,z'],
        ['--rounds', '0'],
        ['--images', '100', '--steps', '99'],
        ['--input', 'nowhere'],
        ['--json', f'{__file__}/b.json'],
    ],
)
def test_mistakes_name_their_option(argv, capsys):
    assert benchmark.program.call_main(benchmark.main, argv) == 2
    error = capsys.readouterr().err
    assert error.count('\n') == 1 and argv[0] in error
