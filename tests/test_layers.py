"""The shape of the house: who may import whom, and how large a room may grow."""

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent / "lpdeploy"
# These print what they say themselves, or run commands.
_SPEAKS_OF_OPTIONS = {"cli", "demo", "paper"}
BASE = {"criteria", "errors", "environment", "records", "machine", "plan", "artifacts"}
BASE |= {"folders", "manifest", "run_folder"}
CORE = BASE | {"families", "models", "data"}

# Package -> packages it may import, besides itself. Imports point one way; nothing imports cli.
ALLOWED = {
    "errors": set(),
    "environment": {"errors"},
    "extras": set(),
    "records": {"errors"},
    "plotting": set(),
    "criteria": set(),
    "plan": {"criteria", "errors", "records"},
    "fields": set(),
    "ramps": set(),
    "conflicts": {"criteria"},
    "presets": set(),
    "config": {"conflicts", "criteria", "fields", "plan", "presets", "ramps"},
    "machine": set(),
    "artifacts": {"errors", "records"},
    "recipe": {"errors", "records"},
    "folders": {"errors", "artifacts", "records"},
    "manifest": {"artifacts", "folders", "machine", "records"},
    "run_folder": {"errors", "plan", "artifacts", "folders", "manifest"},
    "families": BASE,
    "models": BASE | {"families"},
    "data": BASE,
    "pruning": CORE | {"config", "fields", "ramps", "recipe"},
    "engines": CORE,
    "evaluation": CORE | {"engines"},
    "generation": CORE | {"engines"},
    "servers": CORE | {"engines", "config"},
    "benchmark": CORE | {"engines", "config", "pruning", "plotting"},
    "report": CORE
    | {"config", "engines", "evaluation", "generation", "benchmark", "pruning", "plotting"},
    "paper": CORE | {"config", "fields", "presets", "ramps", "pruning", "evaluation", "plotting"},
    "sweep": CORE | {"paper", "report"},
    "publish": CORE | {"engines", "evaluation"},
    "api": CORE
    | {
        "engines",
        "evaluation",
        "generation",
        "servers",
        "benchmark",
        "config",
        "pruning",
        "report",
        "publish",
    },
    "demo": CORE | {"api", "engines", "evaluation", "generation", "benchmark", "config"},
}
HEAVY = {"torch", "transformers", "peft", "accelerate", "datasets", "onnx", "onnxruntime",
         "tensorrt", "tensorrt_rtx", "numpy", "matplotlib", "rich", "lm_eval"}  # fmt: skip
LIGHT = [
    *(ROOT / "cli").glob("*.py"),
    ROOT / "__init__.py",
    ROOT / "config.py",
    ROOT / "extras.py",
    ROOT / "fields.py",
    ROOT / "plan.py",
    ROOT / "artifacts.py",
    ROOT / "folders.py",
    ROOT / "machine.py",
    ROOT / "manifest.py",
]
# A library that changes its interface is met in one module.
ONE_MODULE = {
    "onnxruntime": "engines/ort_session.py",
    "torch.onnx": "engines/onnx/exporter.py",
    "bitsandbytes": "models/quantized.py",
    "lm_eval": "evaluation/harness.py",
    "gguf": "servers/gguf_file.py",
    "llama_cpp": "servers/llama_quantizer.py",
    "tensorrt": "engines/trt/library.py",
    "tensorrt_rtx": "engines/trt/library.py",
}
LARGEST_FILE, LONGEST_BODY = 400, 45

MODULES = sorted(ROOT.rglob("*.py"))


def list_imports(path, *, top_only=False):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def name(path):
    return str(path.relative_to(ROOT))


def find_package(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def test_dependencies_point_one_way():
    checked = [m for m in MODULES if find_package(m) not in {"cli", "__init__", "__main__"}]
    wrong = [
        f"{name(path)} imports {imported}"
        for path in checked
        for imported in list_imports(path)
        if imported.startswith("lpdeploy.")
        and imported.split(".")[1] not in ALLOWED[find_package(path)] | {find_package(path)}
    ]
    assert not wrong


def test_what_is_allowed_has_no_circle():
    order = list(ALLOWED)
    assert all(order.index(used) < order.index(user) for user in order for used in ALLOWED[user])


def test_no_heavy_import_at_the_top():
    heavy = {name(p): {i.split(".")[0] for i in list_imports(p, top_only=True)} for p in LIGHT}
    assert not {path: found & HEAVY for path, found in heavy.items() if found & HEAVY}


def test_an_unstable_library_is_named_in_one_module():
    for library, home in ONE_MODULE.items():
        users = {
            name(path)
            for path in MODULES
            if any(i == library or i.startswith(f"{library}.") for i in list_imports(path))
            or f"{library}.export(" in path.read_text(encoding="utf-8")
        }
        assert users == {home}, library


def test_files_and_functions_stay_small():
    large = [name(m) for m in MODULES if m.read_text(encoding="utf-8").count("\n") > LARGEST_FILE]
    assert not large
    long = [
        f"{name(module)}: {node.name}"
        for module in MODULES
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and measure_body(node) > LONGEST_BODY
    ]
    assert not long


def measure_body(function):
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return function.end_lineno - body[0].lineno + 1 if body else 0


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


def test_the_library_speaks_of_fields_and_not_of_options():
    """Options belong to the command line, which turns `field` into --field."""
    # Whole commands are fine: 'lpdeploy ...', or one that was written elsewhere.
    quoted = re.compile(r"'(?:X|lpdeploy|accelerate|python) [^']*'|`lpdeploy [^`]*`|pip install .*")
    found = []
    for path in (path for path in ROOT.rglob("*.py") if not _SPEAKS_OF_OPTIONS & {*path.parts}):
        for line, text in list_sentences(path):
            if re.search(r"(?<![\w-])--[a-z]", quoted.sub("", text)):
                found.append(f"{path.relative_to(ROOT)}:{line}: {text}")
    assert found == []


def list_sentences(path):
    """List the strings of a module that a person reads: not docstrings, not parts of commands."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inner, docs = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            inner |= {id(part) for part in ast.walk(node) if part is not node}
        if isinstance(node, ast.Expr):
            docs.add(id(node.value))
    for node in ast.walk(tree):
        if id(node) in inner | docs:
            continue
        if isinstance(node, ast.JoinedStr):
            parts = [p.value if isinstance(p, ast.Constant) else "X" for p in node.values]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            parts = [node.value]
        else:
            continue
        text = "".join(parts)
        if " " in text.strip() and not text.lstrip().startswith(("--", "lpdeploy ", "compact ")):
            yield node.lineno, text
