"""The shape of the house: who may import whom, and how large a room may grow."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "lpdeploy"
BASE = {"errors", "plan", "artifacts", "environment"}

# Package -> packages it may import, besides itself. Data goes one way: nothing imports cli.
ALLOWED = {
    "errors": set(),
    "environment": set(),
    "plan": {"errors"},
    "artifacts": {"errors"},
    "recipe": {"errors"},
    "models": BASE,
    "data": BASE,
    "pruning": BASE | {"models", "data"},
    "runtime": BASE | {"models", "data"},
    "export": BASE | {"models", "runtime"},
    "packaging": BASE | {"models", "runtime", "export"},
    "serving": BASE | {"models", "runtime"},
    "publish": BASE | {"models"},
    "evaluation": BASE | {"models", "data", "runtime"},
    "plotting": set(),
    # What it measures: engines, and pruning itself.
    "benchmark": BASE | {"models", "data", "runtime", "export", "pruning", "plotting"},
    "paper": BASE | {"models", "pruning", "evaluation", "plotting"},
    "demo": BASE | {"models", "data", "runtime", "export", "evaluation", "benchmark", "pruning"},
}
HEAVY = {"torch", "transformers", "peft", "accelerate", "datasets", "onnx", "onnxruntime",
         "tensorrt", "tensorrt_rtx", "numpy", "matplotlib", "rich", "lm_eval"}  # fmt: skip
# A library that changes its interface is met in one module.
ONE_MODULE = {
    "onnxruntime": "runtime/ort_session.py",
    "torch.onnx": "export/onnx.py",
    "bitsandbytes": "models/quantized.py",
    "lm_eval": "evaluation/harness.py",
    "gguf": "packaging/gguf_file.py",
    "tensorrt": "runtime/tensorrt_library.py",
    "tensorrt_rtx": "runtime/tensorrt_library.py",
}

MODULES = sorted(ROOT.rglob("*.py"))


def list_imports(path, *, top_only=False):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def package_of(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_dependencies_point_one_way(path):
    package = package_of(path)
    if package in {"cli", "__init__", "__main__"}:
        return
    for name in list_imports(path):
        if name.startswith("lpdeploy."):
            target = name.split(".")[1]
            assert target in ALLOWED[package] | {package}, f"{path} imports {name}"


@pytest.mark.parametrize(
    "path",
    [*(ROOT / "cli").glob("*.py"), ROOT / "__init__.py", ROOT / "plan.py", ROOT / "artifacts.py"],
    ids=lambda p: p.name,
)
def test_no_heavy_import_at_the_top(path):
    tops = {name.split(".")[0] for name in list_imports(path, top_only=True)}
    assert not tops & HEAVY


@pytest.mark.parametrize(("library", "home"), ONE_MODULE.items())
def test_an_unstable_library_is_named_in_one_module(library, home):
    users = {
        str(path.relative_to(ROOT))
        for path in MODULES
        if any(name == library or name.startswith(f"{library}.") for name in list_imports(path))
        or f"{library}.export(" in path.read_text(encoding="utf-8")
    }
    assert users == {home}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_stay_small(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            if body:
                length = node.end_lineno - body[0].lineno + 1
                assert length <= 45, f"{node.name} has {length} lines"


def test_help_loads_nothing_heavy():
    code = (
        "import sys\n"
        "from lpdeploy.cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        f"print('loaded:', sorted(set(sys.modules) & {HEAVY!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "loaded: []"
