"""Change the code of the core one operator at a time, and see whether the tests notice.

    pip install mutmut
    python -m tools.measure.mutants --output docs/measurements/mutants.json

mutmut works in a clone of the last commit. A mutant that no test notices survives; each is written
down with what was changed.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from lpdeploy.errors import MissingDependencyError
from tools.measure.common import build_parser, save_measurement

ROOT = Path(__file__).resolve().parents[2]
MODULES = (
    "lpdeploy/pruning/importance.py",
    "lpdeploy/pruning/selection.py",
    "lpdeploy/models/cutting.py",
    "lpdeploy/models/checkpoint.py",
    "lpdeploy/engines/contract.py",
)
TESTS = (
    "tests/pruning/test_importance.py",
    "tests/pruning/test_selection.py",
    "tests/pruning/test_criteria.py",
    "tests/pruning/test_quantized.py",
    "tests/models/test_cutting.py",
    "tests/models/test_checkpoint.py",
    "tests/models/test_compact.py",
    "tests/models/test_compact_refusals.py",
    "tests/models/test_finite.py",
    "tests/engines/test_contract.py",
)
SETTINGS = {
    "source_paths": ("lpdeploy",),
    "only_mutate": MODULES,
    "also_copy": ("tools", "docs", "examples", "README.md", "constraints.txt"),
    "pytest_add_cli_args": ("-p", "no:cacheprovider", "-q", "-x"),
    "pytest_add_cli_args_test_selection": TESTS,
    "use_git_change_detection": ("false",),
}
_CAUGHT = ("killed", "timeout", "suspicious")


def write_settings(clone: Path) -> None:
    """Tell mutmut what to change and which tests to run."""
    lines = ["[mutmut]"]
    for name, values in SETTINGS.items():
        lines += [f"{name}=", *(f"    {value}" for value in values)]
    text = "\n".join(lines).replace("=\n    false", "=false")
    (clone / "setup.cfg").write_text(f"{text}\n", encoding="utf-8")


def mutmut(clone: Path, *words: str) -> str:
    """Run mutmut in a clone, and return what it prints."""
    done = subprocess.run(
        [Path(sys.executable).with_name("mutmut"), *words],
        cwd=clone, env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True, text=True, stdout=subprocess.PIPE,
    )  # fmt: skip
    return done.stdout


def describe_survivor(clone: Path, name: str) -> dict[str, Any]:
    """Return what a mutant changed."""
    diff = mutmut(clone, "show", name).splitlines()
    changed = [line for line in diff if re.match(r"[-+](?![-+])", line)]
    return {"mutant": name, "diff": changed}


def measure(clone: Path) -> dict[str, Any]:
    """Make every mutant and run the tests on it."""
    write_settings(clone)
    mutmut(clone, "run", "--max-children", str(os.cpu_count() or 1))
    found = {}
    for line in mutmut(clone, "results", "--all", "true").splitlines():
        name, _, status = line.strip().partition(": ")
        found[name] = status
    counts = Counter(found.values())
    caught = sum(counts[status] for status in _CAUGHT)
    left = [name for name, status in found.items() if status not in _CAUGHT]
    return {
        "modules": MODULES,
        "mutants": len(found),
        "caught": caught,
        "share": round(caught / len(found), 3),
        "by_result": dict(counts),
        "survivors": [describe_survivor(clone, name) for name in left],
    }


def main() -> None:
    """Clone, measure, and write the JSON."""
    parser = build_parser(__doc__)
    arguments = parser.parse_args()
    if not Path(sys.executable).with_name("mutmut").exists():
        raise MissingDependencyError("mutmut is not installed. Run 'pip install mutmut'.")
    with tempfile.TemporaryDirectory() as scratch:
        clone = Path(scratch) / "clone"
        git = shutil.which("git") or "git"
        subprocess.run([git, "clone", "--quiet", ROOT, clone], check=True)
        found = measure(clone)
    save_measurement(arguments.output, found)


if __name__ == "__main__":
    main()
