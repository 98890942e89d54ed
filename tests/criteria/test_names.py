"""A criterion is named in its own file; everything else asks its record."""

import ast
import subprocess
import sys
from pathlib import Path

from lpdeploy.criteria import CRITERIA

ROOT = Path(__file__).parent.parent.parent / "lpdeploy"
# The tables of the paper are data whose rows name criteria.
DATA = ("criteria", "paper", "demo")
# Where a name stands for something else, or is the default of an option.
OTHER_MEANINGS = {
    ("config.py", "lora"): "the default",
    ("pruning/training.py", "gradient"): "the norm of all gradients",
    ("pruning/checkpoint.py", "lora"): "LoRA's factors in a checkpoint",
}


def test_no_other_module_names_a_criterion():
    named = {
        (str(path.relative_to(ROOT)), node.value)
        for path in ROOT.rglob("*.py")
        if path.relative_to(ROOT).parts[0] not in DATA
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value in list(CRITERIA)
    }
    assert named == set(OTHER_MEANINGS)


def test_the_records_load_nothing_heavy():
    code = "import sys, lpdeploy.criteria; print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
