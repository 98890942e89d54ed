"""Give every reader files that were changed at random: it reads them, or refuses in one sentence.

    python -m tools.measure.fuzz --minutes 10 --output docs/measurements/fuzz.json

Hypothesis changes a whole file: some bytes of it, or some values of its JSON. Anything but a result
or an error of lpdeploy in one line is a fault, which hypothesis then shrinks to the smallest
change that shows it.
"""

import json
import random
import struct
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from datasets import Dataset
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from lpdeploy.artifacts import compute_sha256
from lpdeploy.data.sources import load_corpus
from lpdeploy.engines import get_engine
from lpdeploy.engines.contract import load_contract
from lpdeploy.errors import LpdeployError
from lpdeploy.evaluation.results import load_evaluation
from lpdeploy.evaluation.tasks import load_task_files
from lpdeploy.folders import load_folder_record
from lpdeploy.manifest import load_stages
from lpdeploy.models.adapters import load_adapter
from lpdeploy.models.generation import load_generation_settings
from lpdeploy.models.loading import load_config, load_tokenizer
from lpdeploy.models.record import load_model_record
from lpdeploy.models.run_weights import load_run_weights
from lpdeploy.models.shapes import count_parameters, list_widths
from lpdeploy.models.weight_files import index_weights
from lpdeploy.plan import load_plan
from lpdeploy.pruning.log import load_log
from lpdeploy.pruning.target import TargetRecord
from lpdeploy.recipe import load_sections
from lpdeploy.records import load_record
from lpdeploy.run_folder import RunFolder
from tools.measure.attacks import make
from tools.measure.common import build_parser, save_measurement

_LONGEST_SENTENCE = 1200


@dataclass(frozen=True)
class Reader:
    """A file, and what reads it."""

    file: str
    read: Callable[[Path], Any]


def _read_config(root: Path) -> None:
    config = load_config(root / "base")
    list_widths(config)
    count_parameters(config)


def _read_weights(root: Path) -> None:
    config = load_config(root / "base")
    for weight in index_weights(root / "base", config).values():
        weight.load()


def _read_target(root: Path) -> None:
    load_record(TargetRecord, root / "run/target.json", fix="Prune again.")


def _read_refit(root: Path) -> None:
    run = RunFolder(root / "run")
    # With its hash as it is: a changed file is refused before it is read.
    plan = replace(run.load_plan(), refit_sha256=compute_sha256(run.refit))
    load_run_weights(run, plan)


def _read_tokenizer(root: Path) -> None:
    load_tokenizer(root / "base", load_config(root / "base"))("once upon a time")


def _read_data(name: str) -> Reader:
    return Reader(name, lambda root: load_corpus(root / name))


READERS = (
    Reader("run/plan.json", lambda root: load_plan(root / "run/plan.json")),
    Reader("run/manifest.json", lambda root: load_stages(root / "run")),
    Reader("run/eval.json", lambda root: load_evaluation(root / "run/eval.json", fix="Delete it.")),
    Reader("run/target.json", _read_target),
    Reader("run/refit.safetensors", _read_refit),
    Reader("run/log.jsonl", lambda root: load_log(RunFolder(root / "run"))),
    Reader("run/.lpdeploy.json", lambda root: load_folder_record(root / "run")),
    Reader("run/model/lpdeploy.json", lambda root: load_model_record(root / "run/model")),
    Reader("run/ort/io.json", lambda root: load_contract(root / "run/ort", get_engine("ort"))),
    Reader("run/adapter/adapter_config.json", lambda root: load_adapter(root / "run/adapter")),
    Reader(
        "run/adapter/adapter_model.safetensors", lambda root: load_adapter(root / "run/adapter")
    ),
    Reader("base/config.json", _read_config),
    Reader("base/generation_config.json", lambda root: load_generation_settings(root / "base")),
    Reader("base/tokenizer.json", _read_tokenizer),
    Reader("base/tokenizer_config.json", _read_tokenizer),
    Reader("base/model.safetensors", _read_weights),
    Reader("run/recipe.yaml", lambda root: load_sections(root / "run/recipe.yaml")),
    Reader("tasks/piqa.jsonl", lambda root: load_task_files("piqa", root / "tasks")),
    *map(_read_data, ("text.txt", "rows.jsonl", "rows.json", "rows.parquet")),
)

_TEXT = st.text(st.characters(), max_size=20)  # surrogates and controls too
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(0, 64)
    | st.floats()
    | _TEXT
    | st.sampled_from(["", ".", "/", "..", "float16", "silu", "llama"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_TEXT, inner, max_size=4),
    max_leaves=8,
)


def prepare(root: Path) -> None:
    """Make a run with the results of all stages, and data in every format."""
    make(root, bench=False)
    rows = [
        {"instruction": f"count to {n}", "output": " ".join(map(str, range(n)))} for n in (3, 4)
    ]
    (root / "rows.json").write_text(json.dumps(rows))
    (root / "rows.jsonl").write_text("".join(f"{json.dumps({'text': 'a b'})}\n" for _ in range(3)))
    Dataset.from_list([{"text": "once upon a time"}] * 3).to_parquet(root / "rows.parquet")
    question = {"query": "Q", "choices": [" a", " b"], "gold": 1}
    (root / "tasks").mkdir()
    (root / "tasks" / "piqa.jsonl").write_text(f"{json.dumps(question)}\n" * 3)


def change_bytes(content: bytes) -> st.SearchStrategy[bytes]:
    """Replace a part of a file by other bytes, or by none."""

    def change(start: int, length: int, new: bytes) -> bytes:
        return content[:start] + new + content[start + length :]

    near = st.integers(0, min(len(content), 400)) | st.integers(0, len(content))
    return st.builds(
        change, near, st.integers(0, 8) | st.just(len(content)), st.binary(max_size=40)
    )


def change_json(content: bytes) -> st.SearchStrategy[bytes]:
    """Replace, remove or add values of JSON, or of the first line of JSON lines."""
    line, newline, rest = (
        content.partition(b"\n") if content.count(b"}\n{") else (content, b"", b"")
    )
    document = json.loads(line)
    paths = list(_list_paths(document))

    @st.composite
    def build(draw: st.DrawFn) -> bytes:
        changed = json.loads(line)
        for _ in range(draw(st.integers(1, 3))):
            changed = _change_at(changed, draw(st.sampled_from(paths)), draw)
        return json.dumps(changed).encode() + newline + rest

    return build()


def change_header(content: bytes) -> st.SearchStrategy[bytes]:
    """Change the JSON header of a safetensors file, whose length stands before it."""
    (length,) = struct.unpack("<Q", content[:8])
    header, tensors = content[8 : 8 + length], content[8 + length :]
    return change_json(header).map(lambda new: struct.pack("<Q", len(new)) + new + tensors)


def list_changes(file: Path) -> st.SearchStrategy[bytes]:
    """Return the ways to change a file, by its kind."""
    content = file.read_bytes()
    ways = change_bytes(content)
    if file.suffix in (".json", ".jsonl"):
        return ways | change_json(content)
    return ways | change_header(content) if file.suffix == ".safetensors" else ways


def _list_paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    if len(path) < 5:
        items = value.items() if isinstance(value, dict) else ()
        items = enumerate(value[:20]) if isinstance(value, list) else items
        for key, inner in items:
            yield from _list_paths(inner, (*path, key))


def _change_at(document: Any, path: tuple[Any, ...], draw: st.DrawFn) -> Any:
    if not path:
        return draw(VALUES)
    parent = document
    for key in path[:-1]:
        try:
            parent = parent[key]
        except (KeyError, IndexError, TypeError):
            return document  # an earlier change took it away
    key, way = path[-1], draw(st.sampled_from(["replace", "remove", "add"]))
    if isinstance(parent, dict) and way == "add":
        parent[draw(_TEXT)] = draw(VALUES)
    elif isinstance(parent, dict) and way == "remove":
        parent.pop(key, None)
    elif isinstance(parent, dict) or (
        isinstance(parent, list) and isinstance(key, int) and key < len(parent)
    ):
        parent[key] = draw(VALUES)
    return document


def judge(reader: Reader, root: Path) -> None:
    """Check that a reader gives a result, or one sentence.

    Raises:
        AssertionError: It does neither.
    """
    try:
        with warnings.catch_warnings(action="ignore"):
            reader.read(root)
    except LpdeployError as error:
        said = str(error)
        if "\n" in said or not 0 < len(said) <= _LONGEST_SENTENCE:
            raise AssertionError(f"not one sentence: {said!r:.2000}") from error
        said.encode()  # a lone surrogate cannot be printed
    except MemoryError:
        raise
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise AssertionError(f"{type(error).__name__}: {error}") from error


def fuzz(reader: Reader, root: Path, *, examples: int, first_seed: int = 0) -> None:
    """Try a number of changes of one file, and put it back.

    Raises:
        AssertionError: A change was neither read nor refused in one sentence.
    """
    file = root / reader.file
    before = file.read_bytes()

    @seed(first_seed)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(list_changes(file))
    def try_one(content: bytes) -> None:
        file.write_bytes(content)
        judge(reader, root)

    try:
        try_one()
    finally:
        file.write_bytes(before)


def measure(root: Path, *, seconds: float) -> list[dict[str, Any]]:
    """Fuzz every reader for its share of the time."""
    rows = []
    for reader in READERS:
        start, done, fault = time.perf_counter(), 0, None
        rng = random.Random(0)
        while time.perf_counter() - start < seconds / len(READERS) and fault is None:
            try:
                fuzz(reader, root, examples=100, first_seed=rng.getrandbits(32))
            except Exception as error:  # noqa: BLE001 - it is what is looked for
                fault = "; ".join(map(str, getattr(error, "exceptions", (error,))))[:2000]
            done += 100
        rows.append(
            {
                "file": reader.file,
                "examples": done,
                "seconds": round(time.perf_counter() - start, 1),
                "fault": fault,
            }
        )
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


def main() -> None:
    """Make the files, fuzz, and write the JSON."""
    parser = build_parser(__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    arguments = parser.parse_args()
    with TemporaryDirectory() as scratch:
        prepare(Path(scratch))
        rows = measure(Path(scratch), seconds=60 * arguments.minutes)
    document = {
        "minutes": arguments.minutes,
        "examples": sum(row["examples"] for row in rows),
        "faults": sum(row["fault"] is not None for row in rows),
        "rows": rows,
    }
    save_measurement(arguments.output, document)


if __name__ == "__main__":
    main()
