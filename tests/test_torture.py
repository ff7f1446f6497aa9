"""A seeded part of torture.py, see there."""

import subprocess
import sys
from pathlib import Path


def test_no_input_ends_badly(tmp_path):
    """In a process of its own, as one with threads cannot be forked safely."""
    script = Path(__file__).parent / 'torture.py'
    command = [sys.executable, script, '--rounds', '60', '--seed', '1']
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert '60 inputs, 0 ended badly' in done.stdout
