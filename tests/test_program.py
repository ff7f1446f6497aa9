"""support/program.py: how a program ends."""

from support import program
from support.program import UserError


def test_mistakes_are_one_line_and_exit_status_2(capsys):
    def main(argv):
        raise UserError('two\nlines')

    assert program.call_main(main) == 2
    assert capsys.readouterr().err.splitlines()[0].endswith('error: two lines')
    assert program.call_main(lambda argv: None) == 0
