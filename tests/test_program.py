"""support/program.py: how a program ends, with or without its terminal."""

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from support import program
from support.program import Output, UserError, printable

ROOT = Path(__file__).resolve().parent.parent

# A program with a result on stdout, in a file, and an error of the user with --fail.
SCRIPT = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
from support import program
program.start(__name__)

def main(argv):
    for i in range(3):
        print('line', i, 'caf\\udce9 \\u732b \\x1b[31m', flush=True)
    sys.stdin.read()
    with open('written', 'w') as file:
        assert file.fileno() > 2
        file.write('x' * 100000)
    print('bar', end='\\r', file=sys.stderr)
    if '--fail' in argv:
        raise program.UserError('no such file: caf\\udce9 \\u732b \\x1b[31m\\r')

if __name__ == '__main__':
    sys.exit(program.call_main(main))
"""


@pytest.fixture
def shell(tmp_path):
    """shell(line, **environment): a line of bash with $P for the program."""
    (tmp_path / 'program.py').write_text(SCRIPT)

    def call(line, **environment):
        line = f'P="{sys.executable} program.py"; set -o pipefail; {line}'
        return subprocess.run(
            ['bash', '-c', line],
            check=False,
            cwd=tmp_path,
            env=os.environ | environment,
            capture_output=True,
            timeout=60,
        )

    return call


# ------------------------ errors


def test_mistakes_are_one_line_and_exit_status_2(capsys):
    def main(argv):
        raise UserError('two\nlines')

    assert program.call_main(main) == 2
    assert capsys.readouterr().err.splitlines()[0].endswith('error: two lines')
    assert program.call_main(lambda argv: None) == 0


def test_an_error_that_another_rank_prints_is_silent(capsys):
    def main(argv):
        raise UserError('', status=1)

    assert program.call_main(main, []) == 1
    assert capsys.readouterr() == ('', '')


def test_control_characters_and_foreign_bytes_are_printed_as_escapes():
    assert printable('a\x1b[2J\r\n\u202eb\udce9') == r'a\x1b[2J\r\n\u202eb\xe9'
    assert printable('猫 Café …') == '猫 Café …'
    assert str(UserError('cannot read \x1b[31m\udce9')) == r'cannot read \x1b[31m\xe9'


def test_a_warning_is_printed_once(capsys, monkeypatch):
    monkeypatch.setattr(program, 'printed', set())
    for text in 'one', 'two':
        program.warn_once('kind', text)
    assert capsys.readouterr().err == 'warning: one\n'


def test_call_main_leaves_the_streams_as_they_were():
    before = sys.stdout, sys.stderr
    program.call_main(lambda argv: None, [])
    assert (sys.stdout, sys.stderr) == before


@pytest.mark.parametrize('error', [None, UserError('x'), program.Stopped(signal.SIGTERM)])
def test_call_main_leaves_the_signals_as_they_were(error):
    def main(argv):
        if error:
            raise error

    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    program.call_main(main, [])
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before


# ------------------------ terminals


@pytest.mark.parametrize('closed', ['<&-', '>&-', '2>&-', '<&- >&- 2>&-', '>&- 2>/dev/full'])
@pytest.mark.parametrize('fail, status', [('', 0), ('--fail', 2)])
def test_a_closed_stream_stops_nothing(closed, fail, status, shell, tmp_path):
    done = shell(f'$P {fail} {closed}')
    assert done.returncode == status, done.stderr
    assert (tmp_path / 'written').read_text() == 'x' * 100000
    assert b'Traceback' not in done.stderr and b'Exception' not in done.stderr


@pytest.mark.parametrize('unbuffered', ['', '1'])
def test_a_reader_that_leaves_stops_nothing(unbuffered, shell, tmp_path):
    reader = '(read line; exec <&-; sleep 0.2; echo "$line" | cut -c1-6)'
    done = shell(f'(sleep 0.5 | $P) | {reader}', PYTHONUNBUFFERED=unbuffered)
    assert (done.returncode, done.stdout, done.stderr) == (0, b'line 0\n', b'bar\r')
    assert (tmp_path / 'written').exists()


def test_a_full_disk_behind_stdout_is_reported_and_stops_nothing(shell, tmp_path):
    done = shell('$P < /dev/null > /dev/full')
    assert done.returncode == 1 and (tmp_path / 'written').exists()
    error = done.stderr.removeprefix(b'bar\r').decode().splitlines()
    assert len(error) == 1 and 'standard output: No space left on device' in error[0]


@pytest.mark.parametrize('encoding', ['ascii', 'latin-1', 'utf-8'])
def test_what_an_encoding_lacks_is_printed_as_an_escape(encoding, shell):
    environment = {'LC_ALL': 'C', 'PYTHONIOENCODING': encoding, 'PYTHONUTF8': '0'}
    done = shell('$P --fail < /dev/null', **environment)
    assert done.returncode == 2
    cat = '猫' if encoding == 'utf-8' else r'\u732b'
    assert done.stdout.decode().splitlines()[0] == rf'line 0 caf\xe9 {cat} \x1b[31m'
    error = done.stderr.removeprefix(b'bar\r').decode()
    assert error == rf'program.py: error: no such file: caf\xe9 {cat} \x1b[31m\r' + '\n'


def test_lines_written_at_once_are_escaped_too():
    stream = io.StringIO()
    Output(stream, escape=True).writelines(['a\x1b', 'b\n'])
    assert stream.getvalue() == 'a\\x1bb\n'


def test_bars_may_move_the_cursor_and_printed_lines_may_not(tmp_path):
    with open(tmp_path / 'out', 'w', newline='') as file:
        Output(file).write('\r50 %')
        Output(file, escape=True).write('\ta\rb\n')
    assert (tmp_path / 'out').read_bytes() == b'\r50 %\ta\\rb\n'


# ------------------------ torchrun's variables


@pytest.mark.parametrize(
    'environment, status, error',
    [
        ({}, 0, ''),
        ({'WORLD_SIZE': '', 'RANK': ''}, 0, ''),
        ({'WORLD_SIZE': '1', 'RANK': '0'}, 0, ''),
        ({'WORLD_SIZE': '2'}, 2, 'tool.py: error: WORLD_SIZE=2: tool.py is a single process'),
        ({'WORLD_SIZE': '2', 'RANK': '0'}, 2, 'tool.py, rank 0: error: WORLD_SIZE=2'),
        ({'WORLD_SIZE': '2', 'RANK': '1'}, 2, ''),
        ({'WORLD_SIZE': '2', 'RANK': 'x'}, 2, 'tool.py, rank x: error: WORLD_SIZE=2'),
        ({'WORLD_SIZE': 'abc'}, 2, 'tool.py: error: WORLD_SIZE=abc: not a number'),
        ({'WORLD_SIZE': '0'}, 2, 'tool.py: error: WORLD_SIZE=0: not a number'),
        ({'WORLD_SIZE': '-2', 'RANK': 'x'}, 2, 'tool.py: error: WORLD_SIZE=-2: not a number'),
    ],
)
def test_a_single_process_refuses_to_be_one_of_several(
    environment, status, error, monkeypatch, capsys
):
    for name in 'WORLD_SIZE', 'RANK', 'TORCHELASTIC_RUN_ID':
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, 'argv', ['dir/tool.py'])
    assert program.call_main(program.expect_one_process, []) == status
    printed = capsys.readouterr().err
    assert printed.startswith(error) and printed.count('\n') == bool(error)
    assert program.call_main(program.expect_one_process, ['--help']) == 0


def test_the_word_that_torch_distributed_launch_adds_is_left_out(monkeypatch):
    words = []
    for word in '--local-rank=1', '--local_rank=0':
        monkeypatch.setattr(sys, 'argv', ['tool.py', word, '--save', 'x'])
        program.call_main(words.extend)
    assert words == ['--save', 'x'] * 2


@pytest.mark.parametrize(
    'given, expected',
    [({}, '10000'), ({'GOMP_SPINCOUNT': '7'}, '7'), ({'OMP_WAIT_POLICY': 'active'}, None)],
)
def test_waiting_threads_sleep_unless_the_user_has_chosen(given, expected, monkeypatch):
    for name in 'GOMP_SPINCOUNT', 'OMP_WAIT_POLICY':
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    program.limit_spinning()
    assert os.environ.get('GOMP_SPINCOUNT') == expected
    monkeypatch.delenv('GOMP_SPINCOUNT', raising=False)


def test_the_training_scripts_limit_spinning_before_torch_is_imported():
    for script in 'cifar.py', 'imagenet.py', 'scripts/benchmark.py':
        text = (ROOT / script).read_text()
        assert text.index('program.start(__name__') < text.index('import torch')


def test_what_the_disk_refuses_is_one_line_and_a_missing_file_a_bug(tmp_path, capsys):
    (tmp_path / 'file').touch()
    assert program.call_main(lambda argv: os.mkdir(tmp_path / 'file/x'), []) == 1
    error = capsys.readouterr().err
    assert error.endswith(f': error: {tmp_path}/file/x: Not a directory\n')
    with pytest.raises(FileNotFoundError):
        program.call_main(lambda argv: os.mkdir(tmp_path / 'no/x'), [])
    with pytest.raises(OSError, match='a socket'):
        program.call_main(lambda argv: exec("raise OSError(13, 'a socket')"), [])  # noqa: S102


@pytest.mark.parametrize(
    'error',
    [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried …")],
)
def test_too_little_memory_is_one_line_and_a_bug_keeps_its_traceback(error, capsys):
    def main(argv):
        raise error

    assert program.call_main(main, []) == 1
    assert capsys.readouterr().err.endswith('use a smaller batch, net or image\n')
    with pytest.raises(RuntimeError, match='a bug'):
        program.call_main(lambda argv: exec("raise RuntimeError('a bug')"), [])  # noqa: S102
