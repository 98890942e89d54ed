"""What a command reads is what another one wrote: a file that was changed in between is refused."""

import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from click.testing import CliRunner

from lpdeploy.api import prune
from lpdeploy.benchmark.results import LatencyResult, LatencyRow
from lpdeploy.benchmark.stage import save_latency
from lpdeploy.cli.main import main
from lpdeploy.config import PruneConfig
from lpdeploy.engines.verify import verify
from lpdeploy.errors import ArtifactError, RunEndedError
from lpdeploy.folders import (
    FOLDER_RECORD,
    FolderRecord,
    atomic_folder,
    check_untouched,
    load_folder_record,
    recorded_files,
)
from lpdeploy.machine import describe_machine
from tests.helpers import make_text, make_tiny_model

SMALL = [
    "--steps", "2", "--batch-size", "2", "--micro-batch-size", "2", "--seq-len", "16",
    "--prune-every", "1", "--round-to", "4", "--calibration-samples", "2", "--device", "cpu",
]  # fmt: skip


ROW = LatencyRow(
    model="m", ratio=0.5, engine="torch", precision="fp32", merged=True, phase="decode",
    tokens=8, batch=1, median_ms=2, p10_ms=1, p90_ms=3, tokens_per_s=500, relative=1,
    limit_share=None, peak_bytes=None, repeats=3, parameters=10, bytes=40,
)  # fmt: skip


def invoke(*words):
    return CliRunner().invoke(main, [str(word) for word in words])


def change(path, *, keep_time=False):
    """Change one byte of a file; its size, and maybe its time, stay the same."""
    about, data = path.stat(), path.read_bytes()
    if path.suffix == ".json":
        path.write_bytes(data.replace(b" ", b"\t", 1))  # still the same JSON
    else:
        path.write_bytes(data[:-2] + bytes([data[-2] ^ 1]) + data[-1:])
    if keep_time:
        os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))


@contextmanager
def changed(path):
    before, about = path.read_bytes(), path.stat()
    change(path)
    yield
    path.write_bytes(before)
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("made")
    make_tiny_model(root / "base", head_dim=16, intermediate_size=64, num_hidden_layers=1)
    data, run = make_text(root / "text.txt"), root / "run"
    for words in (
        ("prune", root / "base", "--data", data, "--output", run, *SMALL),
        ("compact", run),
        ("compact", run, "--keep-adapter"),
        ("export", run, "--engine", "ort"),
        ("export", run, "--engine", "ort", "--unmerged"),
        ("verify", run, "--engine", "ort"),
        ("eval", run, "--perplexity", data, "--seq-len", 16, "--with-base"),
    ):
        result = invoke(*words)
        assert result.exit_code == 0, result.output
    save_latency(LatencyResult(describe_machine(), {}, (ROW,)), run / "bench.json")
    assert invoke("report", run).exit_code == 0
    return root


@pytest.fixture
def root(made, tmp_path):
    shutil.copytree(made, tmp_path / "copy")  # with the times of the files
    return tmp_path / "copy"


EVAL = ("eval", "{run}", "--perplexity", "{text}", "--seq-len", "16")
BENCH = ("bench", "latency", "{run}", "--tokens", "4", "--repeats", "1")
MODEL = {
    "export": ("export", "{run}", "--engine", "onnx"),
    "verify": ("verify", "{run}", "--engine", "torch"),
    "eval": EVAL,
    "bench": (*BENCH, "--merged"),
    "package": ("package", "{run}", "--target", "vllm", "--output", "{out}"),
    "push": ("push", "{run}", "--repo", "owner/name"),
    "report": ("report", "{run}"),
}
EXPORT = {
    "verify": ("verify", "{run}", "--engine", "ort"),
    "eval": (*EVAL, "--engine", "ort"),
    "bench": (*BENCH, "--engine", "ort", "--merged"),
    "package genai": ("package", "{run}", "--target", "genai", "--output", "{out}"),
    "package triton": ("package", "{run}", "--target", "triton", "--output", "{out}"),
    "push": ("push", "{run}", "--repo", "owner/name"),
}
UNMERGED = {
    "export": ("export", "{run}", "--engine", "onnx", "--unmerged"),
    "verify": ("verify", "{run}", "--engine", "torch"),
    "bench": (*BENCH, "--unmerged"),
}
CASES = [
    *((f"run/model/{file}", name, words) for name, words in MODEL.items()
      for file in ("model.safetensors", "config.json", "tokenizer.json")),
    *((f"run/ort/{file}", name, words) for name, words in EXPORT.items()
      for file in ("model.onnx", "model.onnx.data", "io.json")),
    *((f"run/unmerged/{file}", name, words) for name, words in UNMERGED.items()
      for file in ("model.safetensors", "adapter/adapter_model.safetensors",
                   "adapter/adapter_config.json")),
]  # fmt: skip


def test_no_reader_takes_a_file_that_was_changed(root):
    places = {"run": root / "run", "text": root / "text.txt", "out": root / "out"}
    for file, name, words in CASES:
        with changed(root / file):
            result = invoke(*(word.format(**places) for word in words))
        assert result.exit_code == 1, (file, name, result.output)
        assert not (root / "out").exists(), (file, name)
        sentence = " ".join(result.stderr.split())
        assert f"'{root / file}' has changed since it was written." in sentence, (name, sentence)


def list_run_files(run):
    """List every file in a run, except records and locks and what people edit."""
    apart = {FOLDER_RECORD, ".lock", "README.md", "genai_config.json"}
    return [path for path in sorted(run.rglob("*")) if path.is_file() and path.name not in apart]


def test_every_file_of_a_run_is_checked(root):
    run = root / "run"
    files = list_run_files(run)
    assert {"plan.json", "log.jsonl", "recipe.yaml", "importance.safetensors", "manifest.json",
            "verify.json", "eval.json", "bench.json", "bench.md", "bench.svg", "report.html",
            } <= {path.name for path in files if path.parent == run}  # fmt: skip
    for path in files:
        with changed(path):
            result = invoke("verify", run, "--engine", "torch", "--integrity")
        sentence = " ".join(result.stderr.split())
        assert result.exit_code == 1, path
        assert f"'{path}' has changed since it was written." in sentence, (path, sentence)
    assert invoke("verify", run, "--engine", "torch", "--integrity").exit_code == 0


@pytest.mark.parametrize(
    "name",
    ["plan.json", "manifest.json", "log.jsonl", "recipe.yaml", "importance.safetensors",
     "verify.json", "eval.json", "bench.json"],
)  # fmt: skip
def test_a_report_shows_only_what_was_measured(root, name):
    page = (root / "run" / "report.html").read_bytes()
    with changed(root / "run" / name):
        result = invoke("report", root / "run")
    assert result.exit_code == 1
    assert "has changed since it was written." in " ".join(result.stderr.split())
    assert (root / "run" / "report.html").read_bytes() == page


def test_new_figures_do_not_join_old_ones_that_were_changed(root):
    words = [word.format(run=root / "run", text=root / "text.txt") for word in EVAL]
    with changed(root / "run" / "eval.json"):
        before = (root / "run" / "eval.json").read_bytes()
        result = invoke(*words)
        assert (root / "run" / "eval.json").read_bytes() == before
    assert result.exit_code == 1
    assert "Restore it, or delete it and run 'lpdeploy eval" in " ".join(result.stderr.split())
    (root / "run" / "eval.json").unlink()
    assert invoke(*words).exit_code == 0
    assert invoke("verify", root / "run", "--engine", "torch", "--integrity").exit_code == 0


def test_a_deleted_measurement_is_one_that_was_not_made(root):
    (root / "run" / "bench.json").unlink()
    assert invoke("verify", root / "run", "--engine", "torch", "--integrity").exit_code == 0
    assert invoke("report", root / "run").exit_code == 0


def test_a_resumed_run_takes_only_the_log_it_wrote(root, tmp_path):
    options = [*SMALL, "--steps", "4", "--checkpoint-every", "2"]
    run, begun = tmp_path / "again", threading.Event()
    words = ["prune", root / "base", "--data", root / "text.txt", "--output", run, *options]

    def stop_after(step):
        if step.step == 3:
            begun.set()

    config = PruneConfig(
        steps=4, batch_size=2, micro_batch_size=2, seq_len=16, prune_every=1, round_to=4,
        calibration_samples=2, device="cpu", checkpoint_every=2,
    )  # fmt: skip
    with pytest.raises(RunEndedError):
        prune(root / "base", root / "text.txt", run, config=config, stop=begun, on_step=stop_after)
    text = (run / "log.jsonl").read_text()
    (run / "log.jsonl").write_text(text.replace('"loss": ', '"loss": 1', 1))
    result = invoke(*words, "--resume")
    assert result.exit_code == 1
    assert "has changed since the checkpoint was saved" in " ".join(result.stderr.split())
    (run / "log.jsonl").write_text(text)
    result = invoke(*words, "--resume")
    assert result.exit_code == 0, result.output


def test_a_stage_that_dies_while_it_writes_accuses_nobody(tmp_path):
    FolderRecord("run").save(tmp_path)
    path = tmp_path / "eval.json"
    with recorded_files(tmp_path, path):
        path.write_text("1")
    with pytest.raises(KeyboardInterrupt), recorded_files(tmp_path, path):
        path.write_text("2")
        raise KeyboardInterrupt
    check_untouched(tmp_path, fix="")
    assert load_folder_record(tmp_path).files == {}


def test_stages_that_end_together_are_all_recorded(tmp_path):
    FolderRecord("run").save(tmp_path)
    names = [f"{number}.json" for number in range(40)]

    def write(name):
        with recorded_files(tmp_path, tmp_path / name):
            (tmp_path / name).write_text(name)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, names))
    assert sorted(load_folder_record(tmp_path).files) == sorted(names)


def test_a_stage_is_not_refused_because_another_one_writes(tmp_path):
    FolderRecord("run").save(tmp_path)
    path, done = tmp_path / "eval.json", threading.Event()

    def write(text):
        for number in range(150):
            with recorded_files(tmp_path, path):
                path.write_text(f"{text}{number}")

    def read():
        while not done.is_set():
            check_untouched(tmp_path, fix="")

    with ThreadPoolExecutor(3) as pool:
        reader = pool.submit(read)
        for writer in [pool.submit(write, text) for text in "ab"]:
            writer.result()
        done.set()
        reader.result()
    check_untouched(tmp_path, fix="")


def test_what_a_killed_stage_left_goes_when_the_next_one_writes(tmp_path):
    FolderRecord("run").save(tmp_path)
    for name in (f".{FOLDER_RECORD}.tmp-4000000", ".eval.json.tmp-4000000"):
        (tmp_path / name).write_text("half")
    with recorded_files(tmp_path, tmp_path / "eval.json"):
        (tmp_path / "eval.json").write_text("1")
    assert sorted(path.name for path in tmp_path.iterdir()) == [FOLDER_RECORD, "eval.json"]


def test_results_that_lie_elsewhere_are_checked_as_well(root):
    run, other, export = root / "run", root / "run" / "other", root / "run" / "deep" / "ort"
    for words in (
        ("compact", run, "--output", other),
        ("compact", run, "--output", root / "elsewhere"),
        ("export", run, "--engine", "ort", "--output", export),
    ):
        assert invoke(*words).exit_code == 0
    verify = ("verify", run, "--engine", "torch", "--integrity")
    assert invoke(*verify).exit_code == 0
    for path in (other / "model.safetensors", export / "model.onnx.data"):
        with changed(path):
            result = invoke(*verify)
        assert f"'{path}' has changed since it was written." in " ".join(result.stderr.split())
    for folder in (other, root / "elsewhere"):
        with changed(folder / "model.safetensors"):
            result = invoke("eval", folder, "--perplexity", root / "text.txt", "--seq-len", 16)
        assert result.exit_code == 1
        assert "has changed since it was written" in " ".join(result.stderr.split())


@pytest.mark.parametrize("folder", ["run", "run/adapter", "run/model", "run/ort"])
def test_a_record_that_cannot_be_read_is_no_pass(root, folder):
    (root / folder / FOLDER_RECORD).write_text("")
    result = invoke("verify", root / "run", "--engine", "torch", "--integrity")
    assert result.exit_code == 1
    assert f"'{root / folder / FOLDER_RECORD}'" in " ".join(result.stderr.split())


def test_a_folder_without_a_record_is_named(root, caplog):
    (root / "run" / "ort" / FOLDER_RECORD).unlink()
    verify(root / "run", engine="torch", integrity=True)  # exports without a record are no parts
    (root / "run" / "model" / FOLDER_RECORD).unlink()
    with caplog.at_level("WARNING"):
        verify(root / "run", engine="torch", integrity=True)
    assert f"'{root / 'run' / 'model'}' has no record of its files" in caplog.text
    (root / "run" / FOLDER_RECORD).unlink()
    with caplog.at_level("WARNING"):
        verify(root / "run", engine="torch", integrity=True)
    assert f"'{root / 'run'}' has no record of its files" in caplog.text


def test_a_check_says_how_many_files_it_hashed(root):
    result = invoke("verify", root / "run", "--engine", "torch", "--integrity")
    edited = ("README.md", "genai_config.json")
    files = [path for path in list_run_files(root / "run") if path.name not in edited]
    assert f"{len(files)} files have their recorded hashes." in result.stderr


@pytest.mark.parametrize("name", ["plan.json", "adapter/adapter_model.safetensors"])
def test_a_run_without_its_manifest_is_checked_all_the_same(root, name):
    (root / "run" / "manifest.json").unlink()
    with changed(root / "run" / name):
        result = invoke("compact", root / "run", "--overwrite")
    assert result.exit_code == 1
    assert "has changed since it was written" in " ".join(result.stderr.split())


def test_figures_are_not_measured_for_a_file_that_is_refused(root, monkeypatch):
    monkeypatch.setattr("lpdeploy.evaluation.evaluate.load_place", lambda *_, **__: 1 / 0)
    words = [word.format(run=root / "run", text=root / "text.txt") for word in EVAL]
    with changed(root / "run" / "eval.json"):
        result = invoke(*words)
    assert "has changed since it was written" in " ".join(result.stderr.split())


def test_what_is_moved_into_a_folder_brings_no_record(tmp_path):
    with atomic_folder(tmp_path / "graph", kind="export") as folder:
        (folder / "config.json").write_text("{}")
    with atomic_folder(tmp_path / "engine", kind="export") as folder:
        shutil.copytree(tmp_path / "graph", folder, dirs_exist_ok=True)
        (folder / "model.engine").write_text("engine")
    assert check_untouched(tmp_path / "engine", fix="Make it again.", always_hash=True) == 2


def test_a_folder_of_others_gets_no_record(tmp_path):
    with recorded_files(tmp_path, tmp_path / "bench.json"):
        (tmp_path / "bench.json").write_text("1")
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]


def test_no_reader_takes_a_base_that_was_changed(made, root):
    run = root / "run"
    for words in (
        ("compact", run, "--overwrite"),
        ("verify", run, "--engine", "torch"),
        ("eval", run, "--perplexity", root / "text.txt", "--seq-len", 16, "--with-base"),
        ("bench", "latency", run, "--tokens", 4, "--repeats", 1),
    ):
        with changed(made / "base" / "model.safetensors"):  # which the plan of the copy names
            result = invoke(*words)
        assert result.exit_code == 1, result.output
        assert "is not the one that was pruned" in " ".join(result.stderr.split())


def test_a_change_that_keeps_size_and_time_is_found_by_its_hash(root):
    verify = ("verify", root / "run", "--engine", "torch")
    path = root / "run" / "model" / "tokenizer.json"
    record = load_folder_record(path.parent)
    old = record.written_ns - 10**10
    for name in record.files:  # as if all had been written long before the record
        os.utime(path.parent / name, ns=(old, old))
    text = (path.parent / FOLDER_RECORD).read_text()
    for stamp in record.files.values():
        text = text.replace(str(stamp.mtime_ns), str(old))
    (path.parent / FOLDER_RECORD).write_text(text)
    change(path, keep_time=True)
    assert invoke(*verify).exit_code == 0  # what it costs to be quick
    result = invoke(*verify, "--integrity")
    assert result.exit_code == 1
    assert f"'{path}' has changed since it was written" in " ".join(result.stderr.split())


def test_a_copied_run_is_as_good(made, tmp_path):
    shutil.copytree(made, tmp_path / "copy", copy_function=shutil.copyfile)  # with new times
    run = tmp_path / "copy" / "run"
    assert invoke("verify", run, "--engine", "torch", "--integrity").exit_code == 0


def test_what_people_edit_may_change(root):
    (root / "run" / "model" / "README.md").write_text("mine")
    (root / "run" / "ort" / "genai_config.json").write_text("{}")
    assert invoke("verify", root / "run", "--engine", "ort").exit_code == 0


def test_only_what_changed_is_hashed(tmp_path, monkeypatch):
    with atomic_folder(tmp_path / "model", kind="model") as folder:
        for name in ("a", "b"):
            (folder / name).write_text(name)
            old = time.time_ns() - 10**10
            os.utime(folder / name, ns=(old, old))
    hashed = []
    monkeypatch.setattr("lpdeploy.folders.compute_sha256", lambda path: hashed.append(path.name))
    check_untouched(tmp_path / "model", fix="")
    assert hashed == []
    os.utime(tmp_path / "model" / "b")
    with pytest.raises(ArtifactError, match="b' has changed since it was written"):
        check_untouched(tmp_path / "model", fix="")
    assert hashed == ["b"]


def test_a_record_of_an_earlier_version_names_files_only(tmp_path):
    (tmp_path / FOLDER_RECORD).write_text('{"kind": "model", "files": ["a"]}')
    assert load_folder_record(tmp_path).files == {"a": None}
    check_untouched(tmp_path, fix="")
