"""A seeded part of torture.py, see there."""

from programs import run_script


def test_no_input_ends_badly(tmp_path):
    """In a process of its own, as one with threads cannot be forked safely."""
    done = run_script('tests/torture.py', '--rounds', '30', '--seed', '1', cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert '30 inputs, 0 ended badly' in done.stdout
