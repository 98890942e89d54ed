"""Damage every file that a command reads in every way: one sentence, and nothing else happens.

    python -m tools.measure.attacks --output docs/measurements/attacks.json

The table below is file x damage x command. Each case must end with exit code 0, 1 or 2 and without
a traceback; with a failure, one sentence on stderr and no file changed. Exit code 0 is right only
where the damage does not matter to the command, such as a missing note of a library's version.
"""

import contextlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import psutil
import yaml
from click.testing import CliRunner, Result

from lpdeploy.artifacts import compute_sha256
from lpdeploy.cli import main as cli
from lpdeploy.folders import FOLDER_RECORD, recorded_files
from tools.measure.common import build_parser, save_measurement

_ASSETS = Path(str(resources.files("lpdeploy.demo"))) / "assets"
SMALL = [
    "--steps", "2", "--batch-size", "2", "--micro-batch-size", "2", "--seq-len", "16",
    "--prune-every", "1", "--round-to", "4", "--calibration-samples", "2", "--device", "cpu",
]  # fmt: skip
# A run that has every file: one with a target, dropped layers and refitted weights.
SHAPE = ("--target-params", "700K", "--drop-layers", "1", "--refit", "--refit-samples", "80")
EVAL = ("eval", "run", "--perplexity", "text.txt", "--seq-len", "16", "--engine", "ort")
COMMANDS = {
    "prune": ("prune", "base", "--data", "text.txt", "--output", "other", *SMALL),
    "prune recipe": ("prune", "--recipe", "recipe.yaml", "--output", "other", "--dry-run"),
    "compact": ("compact", "run", "--output", "other"),
    "export": ("export", "run", "--engine", "ort", "--output", "other"),
    "package": ("package", "run", "--target", "vllm", "--output", "other"),
    "verify": ("verify", "run", "--engine", "ort"),
    "eval": EVAL,
    "report": ("report", "run", "--output", "other.html"),
    "check": ("check", "run"),
    "check base": ("check", "base"),
    "push": ("push", "run", "--repo", "owner/name"),
}
_BENCH = ("bench", "latency", "run", "--tokens", "4", "--repeats", "1", "--merged")
_LONGEST_SENTENCE = 1200
WRITES = ("run/verify.json", "run/eval.json", "run/manifest.json", "run/.lpdeploy.json")
"""What commands may change when they succeed."""
READERS = {
    "run/plan.json": ("compact", "verify", "report", "check", "push"),
    "run/manifest.json": ("compact", "verify", "report", "push"),
    "run/eval.json": ("eval", "report", "push"),
    "run/verify.json": ("report",),
    "run/bench.json": ("report",),
    "run/log.jsonl": ("report",),
    "run/.lpdeploy.json": ("compact", "report"),
    "run/recipe.yaml": ("report",),
    "run/importance.safetensors": ("report",),
    "run/refit.safetensors": ("compact", "verify"),
    "run/target.json": ("report",),
    "run/adapter/adapter_config.json": ("compact", "verify"),
    "run/adapter/adapter_model.safetensors": ("compact", "verify"),
    "run/model/model.safetensors": ("export", "eval"),
    "run/model/lpdeploy.json": ("export", "eval", "report", "push"),
    "run/model/.lpdeploy.json": ("export", "verify"),
    "run/model/config.json": ("export", "package"),
    "run/ort/io.json": ("verify", "eval", "report", "push"),
    "run/ort/model.onnx": ("verify", "eval"),
    "base/config.json": ("prune", "compact", "check base"),
    "base/model.safetensors": ("prune", "compact"),
    "base/tokenizer.json": ("prune",),
    "base/tokenizer_config.json": ("prune",),
    "base/generation_config.json": ("prune", "compact"),
    "text.txt": ("prune", "eval"),
    "recipe.yaml": ("prune recipe",),
}
WHOLE = {
    "empty": b"",
    "not UTF-8": b"\xff\xfe{}",
    "a list": b"[]",
    "null": b"null",
    "a number": b"3",
    "a string": b'"x"',
    "an empty object": b"{}",
    "nested": b"[" * 100_000,
    "a long number": b'{"schema_version": ' + b"9" * 5000 + b"}",
    "NaN": b'{"a": NaN}',
    "half": b'{"a": ',
    "a lone surrogate": b'{"a": "\\ud83d"}',
    "zeros": bytes(64),
}
VALUES = {"null": None, "a list": [], "an object": {}, "a string": "x", "minus one": -1, "1.5": 1.5}


@dataclass(frozen=True)
class Damage:
    """A file as it is damaged: its new bytes, or None for something that is no file."""

    name: str
    content: bytes | None


def list_damages(path: Path, *, few: bool = False) -> Iterator[Damage]:
    """List what can happen to a file: as a whole, and to each of its keys.

    Args:
        path: The file, as it should be.
        few: Give each key two other values in turn, so that all keys together meet all values. A
            recipe, whose commands take longest, meets one each, and lacks every fourth key.
    """
    yield Damage("a folder", None)
    for name, content in WHOLE.items():
        yield Damage(name, content)
    data = _load_keys(path)
    for number, key in enumerate(data):
        slow, names = path.suffix == ".yaml", list(VALUES)
        if not (few and slow) or number % 4 == 0:
            left = {name: value for name, value in data.items() if name != key}
            yield Damage(f"no {key}", _write(path, left))
        some = (names[number % 6], names[(number + 3) % 6])[: 1 if slow else 2]
        for name in some if few else names:
            if type(VALUES[name]) is not type(data[key]):
                yield Damage(f"{key} is {name}", _write(path, data | {key: VALUES[name]}))


def _load_keys(path: Path) -> dict[str, Any]:
    match path.suffix:
        case ".json":
            return json.loads(path.read_text())
        case ".jsonl":
            return json.loads(path.read_text().splitlines()[0])
        case ".yaml":
            return yaml.safe_load(path.read_text())["prune"]
        case _:
            return {}


def _write(path: Path, data: dict[str, Any]) -> bytes:
    whole = {"prune": data} if path.suffix == ".yaml" else data
    return json.dumps(whole).encode() + b"\n"  # which is YAML as well


def make(root: Path, *, bench: bool = True) -> None:
    """Make a base, a text, and a run with the results of all stages, or of all but the slow one."""
    shutil.copytree(_ASSETS / "story-llama-1M", root / "base")
    text = (_ASSETS / "valid.txt").read_text(encoding="utf-8")[:20_000]
    (root / "text.txt").write_text(text, encoding="utf-8")
    with contextlib.chdir(root):
        for words in (
            ("prune", "base", "--data", "text.txt", "--output", "run", *SMALL, *SHAPE),
            ("compact", "run"),
            ("export", "run", "--engine", "ort"),
            ("verify", "run", "--engine", "ort"),
            EVAL,
            *([_BENCH] if bench else []),
        ):
            result = invoke(*words)
            if result.exit_code:
                raise RuntimeError(f"{words[0]} failed: {result.output}")
        shutil.copy("run/recipe.yaml", ".")


def invoke(*words: str) -> Result:
    """Run a command in this process."""
    return CliRunner().invoke(cli.main, list(words))


def read(root: Path) -> dict[str, str]:
    """Hash every file."""
    return {
        str(path.relative_to(root)): compute_sha256(path)
        for path in root.rglob("*")
        if path.is_file() and not path.name.endswith(".lock")
    }


def attack(root: Path, file: str, damage: Damage, command: str) -> str | None:
    """Run a command on a damaged file, and say what is wrong with what it does; None if nothing."""
    path, whole = root / file, read(root)
    running = psutil.Process().children(recursive=True)
    with _damaged(path, damage), contextlib.chdir(root):
        result = invoke(*COMMANDS[command])
    others = [path for path in (root / "other", root / "other.html") if path.exists()]
    for other in others:
        shutil.rmtree(other) if other.is_dir() else other.unlink()
    after = read(root)
    changed = {name for name in whole.keys() | after.keys() if whole.get(name) != after.get(name)}
    if set(psutil.Process().children(recursive=True)) - set(running):
        return "a process is left"
    return judge(result, changed=changed - {file}, left=[path.name for path in others])


@contextlib.contextmanager
def _damaged(path: Path, damage: Damage) -> Iterator[None]:
    """Damage a file, and record it so: readers must meet the damage, not the hash alone."""
    before, about = path.read_bytes(), path.stat()
    with _recorded(path):
        if damage.content is None:
            path.unlink()
            path.mkdir()
        else:
            path.write_bytes(damage.content)
    try:
        yield
    finally:
        with _recorded(path):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            path.write_bytes(before)
            os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))


def _recorded(path: Path) -> contextlib.AbstractContextManager[None]:
    itself = path.name == FOLDER_RECORD
    return contextlib.nullcontext() if itself else recorded_files(path.parent, path)


def judge(result: Result, *, changed: set[str], left: list[str]) -> str | None:
    """Say what is wrong with the end of a command; None if nothing."""
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        return f"a traceback: {result.exception!r}"
    if result.exit_code == 0:
        return f"changed {sorted(changed)}" if changed - set(WRITES) else None
    if changed or left:
        return f"failed, and left {sorted(changed) or left}"
    lines = [line for line in result.stderr.splitlines() if line]
    if result.exit_code not in (1, 2) or not lines or not lines[-1].startswith("Error: "):
        return f"exit {result.exit_code}: {result.stderr[-200:]}"
    long = len(lines[-1]) > _LONGEST_SENTENCE
    return f"a sentence of {len(lines[-1])} characters" if long else None


CASES = [(file, command) for file, commands in READERS.items() for command in commands]


def run(root: Path) -> dict[str, Any]:
    """Try every case."""
    counts: Counter[str] = Counter()
    wrong = []
    for file, command in CASES:
        for damage in list_damages(root / file):
            counts[file] += 1
            found = attack(root, file, damage, command)
            if found is not None:
                wrong.append({"file": file, "damage": damage.name, "command": command, "is": found})
        print(f"{counts.total()} cases, {len(wrong)} wrong", file=sys.stderr, flush=True)
    return {"cases": counts.total(), "by_file": dict(counts), "wrong": wrong}


def main() -> None:
    """Make a run, attack it, and write the JSON."""
    parser = build_parser(__doc__)
    arguments = parser.parse_args()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        make(Path(scratch))
        result = run(Path(scratch))
    save_measurement(arguments.output, {**result, "seconds": round(time.perf_counter() - start, 1)})


if __name__ == "__main__":
    main()
