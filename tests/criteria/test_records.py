"""The records of criteria are light: the command line reads their help."""

import subprocess
import sys


def test_the_records_load_nothing_heavy():
    code = "import sys, lpdeploy.criteria; print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
