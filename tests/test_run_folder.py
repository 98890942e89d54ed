"""A run folder: its lock, what may be replaced in it, and where no command writes."""

import json
import shutil
import subprocess
import sys

import pytest
from click.testing import CliRunner

from lpdeploy.cli.main import main
from lpdeploy.errors import ArtifactError, RunInUseError
from lpdeploy.run_folder import RunFolder, check_output
from tests.helpers import make_text, make_tiny_model

SMALL = [
    "--steps", "2", "--batch-size", "2", "--micro-batch-size", "2", "--seq-len", "16",
    "--prune-every", "1", "--round-to", "4", "--calibration-samples", "2", "--device", "cpu",
]  # fmt: skip


def invoke(*words):
    return CliRunner().invoke(main, [str(word) for word in words])


def succeed(*words):
    result = invoke(*words)
    assert result.exit_code == 0, result.output
    return result


def prune(root, output, *words):
    return invoke(
        "prune", root / "base", "--data", root / "text.txt", "--output", output, *SMALL, *words
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base, data, and a run that was compacted both ways and exported."""
    root = tmp_path_factory.mktemp("made")
    make_tiny_model(root / "base", head_dim=16, intermediate_size=64, num_hidden_layers=1)
    make_text(root / "text.txt")
    assert prune(root, root / "run").exit_code == 0
    for words in (["compact"], ["compact", "--keep-adapter"], ["export", "--engine", "ort"]):
        succeed(words[0], root / "run", *words[1:])
    return root


@pytest.fixture
def root(made, tmp_path):
    """A copy of it, to be damaged. Its plan still names the first base, which is the same."""
    shutil.copytree(made, tmp_path / "root")
    return tmp_path / "root"


def list_files(folder):
    """Return the content of every file but locks."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# What may be replaced.


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
@pytest.mark.parametrize(
    "name", ["model/thesis.txt", "adapter/thesis.txt", "log.jsonl", "plan.json"]
)
def test_a_folder_that_is_no_run_loses_nothing(root, name, overwrite):
    file = root / "proj" / name
    file.parent.mkdir(parents=True)
    file.write_text("work")
    before = list_files(root)
    result = prune(root, root / "proj", *overwrite)
    assert result.exit_code == 1
    assert "lpdeploy did not make this folder" in " ".join(result.stderr.split())
    assert list_files(root) == before


@pytest.mark.parametrize("part", ["model", "unmerged", "adapter", "ort"])
def test_a_file_that_was_put_into_a_part_of_a_run_is_not_lost(root, part):
    (root / "run" / part / "thesis.txt").write_text("work")
    before = list_files(root)
    result = prune(root, root / "run", "--overwrite")
    assert result.exit_code == 1
    assert "thesis.txt" in result.stderr
    assert list_files(root) == before


def test_overwriting_a_run_removes_what_was_made_of_the_old_one_and_nothing_else(root):
    run = RunFolder(root / "run")
    succeed("package", run, "--target", "vllm", "--output", run.path / "package")
    (run.path / "notes.txt").write_text("mine")
    assert prune(root, run, "--overwrite", "--ratio", "0.25").exit_code == 0
    left = {path.name for path in run.path.iterdir()}
    assert left >= {"notes.txt", "package", "plan.json", "adapter"}
    assert not left & {"model", "unmerged", "ort", "checkpoint"}


def test_a_run_beside_other_files_is_allowed(root):
    (root / "proj").mkdir()
    (root / "proj" / "notes.txt").write_text("mine")
    assert prune(root, root / "proj").exit_code == 0
    assert (root / "proj" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("case", ["data", "model"])
def test_a_refused_run_leaves_no_folder_behind(root, case):
    words = {"data": ["--data", root / "none.txt"], "model": ["--seq-len", "4000"]}[case]
    assert prune(root, root / "new" / "run", *words).exit_code == 1
    assert not (root / "new").exists()
    (root / "there").mkdir()
    assert prune(root, root / "there", *words).exit_code == 1
    assert list((root / "there").iterdir()) == []


# Where no command writes.

OUTPUTS = {
    "compact": ["compact", "RUN"],
    "compact --keep-adapter": ["compact", "RUN", "--keep-adapter"],
    "export": ["export", "RUN", "--engine", "ort"],
    "export MODEL": ["export", "RUN/model", "--engine", "ort"],
    "package": ["package", "RUN", "--target", "vllm"],
    "package genai": ["package", "RUN", "--target", "genai"],
    "prune": ["prune", "BASE", "--data", "TEXT", *SMALL],
}
PARTS = ["adapter", "model", "unmerged", "ort", "checkpoint", "model/inside", "ort/inside", ""]
DEFAULTS = {
    ("compact", "model"), ("compact --keep-adapter", "unmerged"), ("export", "ort"),
    ("export MODEL", "ort"), ("prune", ""),
}  # fmt: skip


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("command", OUTPUTS)
def test_no_command_writes_over_a_part_of_a_run(root, command, part):
    run = root / "run"
    names = {
        "RUN": run,
        "RUN/model": run / "model",
        "BASE": root / "base",
        "TEXT": root / "text.txt",
    }
    words = [names.get(word, word) for word in OUTPUTS[command]]
    before = list_files(root)
    result = invoke(*words, "--output", run / part, "--overwrite")
    if (command, part) in DEFAULTS:
        assert result.exit_code == 0, result.output
        return
    assert result.exit_code == 1, result.output
    assert "--output" in result.stderr
    assert "Traceback" not in result.output
    assert list_files(root) == before


@pytest.mark.parametrize("command", OUTPUTS)
def test_no_command_replaces_its_input(root, command):
    names = {"RUN": root / "run", "RUN/model": root / "run" / "model", "BASE": root / "base"}
    words = [names.get(word, word) for word in OUTPUTS[command]]
    words = [root / "text.txt" if word == "TEXT" else word for word in words]
    before = list_files(root)
    for output in (root, root / "base"):
        result = invoke(*words, "--output", output, "--overwrite")
        assert result.exit_code == 1, result.output
        assert list_files(root) == before


@pytest.mark.parametrize("name", ["run/model/model.safetensors", "base/config.json", "notes.html"])
def test_a_report_replaces_only_a_page_of_ours(root, name):
    (root / "notes.html").write_text("<html>mine</html>")
    before = list_files(root)
    result = invoke("report", root / "run", "--output", root / name)
    assert result.exit_code == 1
    assert list_files(root) == before
    for _ in range(2):
        succeed("report", root / "run")
        succeed("report", root / "run", "--output", root / "page.html")


def test_a_benchmark_replaces_only_results_of_ours(root, monkeypatch):
    (root / "out").mkdir()
    (root / "out" / "bench.json").write_text('{"mine": 1}')
    words = ("bench", "latency", root / "base", "--engine", "torch", "--tokens", "4")
    result = invoke(*words, "--repeats", "1", "--output", root / "out")
    assert result.exit_code == 1
    assert "not a result of lpdeploy" in result.stderr
    assert (root / "out" / "bench.json").read_text() == '{"mine": 1}'


def test_an_output_inside_a_result_is_refused(root):
    with pytest.raises(ArtifactError, match="replaces as a whole"):
        succeed("compact", root / "run", "--output", root / "elsewhere")
        check_output(root / "elsewhere" / "more", inputs=())


# Who holds it.

HOLD = """
import sys
from lpdeploy.run_folder import RunFolder
with RunFolder(sys.argv[1]).hold(shared=sys.argv[2] == "shared"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(request, root):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(root / "run"), request.param],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


WRITERS = {
    "prune": lambda root: prune(root, root / "run", "--overwrite"),
    "prune --resume": lambda root: prune(root, root / "run", "--resume"),
    "compact": lambda root: invoke("compact", root / "run", "--overwrite"),
    "export": lambda root: invoke("export", root / "run", "--engine", "ort", "--overwrite"),
    "export model": lambda root: invoke(
        "export", root / "run" / "model", "--engine", "ort", "--overwrite"
    ),
}
READERS = {
    "verify": lambda root: invoke("verify", root / "run", "--engine", "torch"),
    "eval": lambda root: invoke(
        "eval", root / "run", "--perplexity", root / "text.txt", "--seq-len", "16"
    ),
    "report": lambda root: invoke("report", root / "run"),
}


@pytest.mark.parametrize("holder", ["shared", "alone"], indirect=True)
@pytest.mark.parametrize("command", [*WRITERS, *READERS])
def test_a_second_process_is_refused_in_a_sentence(root, holder, command):
    shared = holder.args[-1] == "shared"
    before = list_files(root)
    result = {**WRITERS, **READERS}[command](root)
    if shared and command in READERS:
        assert result.exit_code == 0, result.output
        return
    assert result.exit_code == 1
    assert "is in use by another lpdeploy process" in " ".join(result.stderr.split())
    assert list_files(root) == before


@pytest.mark.parametrize("holder", ["alone"], indirect=True)
def test_a_crash_releases_the_lock(root, holder):
    run = RunFolder(root / "run")
    with pytest.raises(RunInUseError), run.hold():
        pass
    holder.kill()
    holder.wait()
    with run.hold():
        pass


def test_a_folder_that_cannot_be_written_can_be_read(root, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", refuse)
    with RunFolder(root / "run").hold(shared=True):
        pass
    with pytest.raises(PermissionError), RunFolder(root / "run").hold():
        pass


# What state it is in.


def test_a_plan_that_was_changed_is_refused_by_every_stage(root):
    run = RunFolder(root / "run")
    plan = json.loads(run.plan.read_text())
    kept = plan["kept"]["layers.0.heads"]
    plan["kept"]["layers.0.heads"] = [3 - index for index in reversed(kept)]
    run.plan.write_text(json.dumps(plan))
    for command in (
        ["compact", "--overwrite"], ["verify", "--engine", "torch"], ["report"],
        ["export", "--engine", "onnx"], ["check"], ["eval", "--perplexity", root / "text.txt"],
        ["bench", "latency"], ["package", "--target", "vllm", "--output", root / "p"],
        ["push", "--repo", "a/b"],
    ):  # fmt: skip
        words = (
            ["bench", "latency", run] if command[0] == "bench" else [command[0], run, *command[1:]]
        )
        result = invoke(*words)
        assert result.exit_code == 1, command
        assert "has changed since it was written" in " ".join(result.stderr.split()), command


def test_an_incomplete_run_says_how_to_go_on(root):
    run = RunFolder(root / "half")
    run.claim(clear=True)
    run.checkpoint.parent.mkdir()
    run.checkpoint.write_bytes(b"x")
    result = invoke("compact", run)
    assert result.exit_code == 1
    assert "not complete" in result.stderr
    assert "--resume" in result.stderr
