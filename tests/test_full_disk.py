"""A disk that takes no more ends every command in one sentence, and what was there stays."""

import resource
from contextlib import contextmanager

import pytest

from lpdeploy.artifacts import atomic_file, compute_sha256
from lpdeploy.demo.run import _BASE
from lpdeploy.errors import DiskFullError, describe_os_error, is_disk_full, quote_error
from lpdeploy.folders import atomic_folder
from tests.test_integrity import BENCH, EVAL, SMALL, invoke, made, root  # noqa: F401 - fixtures

COMMANDS = {
    "prune": ("prune", "{base}", "--data", "{text}", "--output", "{out}", *SMALL, "--no-cache"),
    "compact": ("compact", "{run}", "--overwrite"),
    "export onnx": ("export", "{run}", "--engine", "onnx"),
    "export ort": ("export", "{run}", "--engine", "ort", "--overwrite"),
    "package vllm": ("package", "{run}", "--target", "vllm", "--output", "{out}"),
    "package llamacpp": ("package", str(_BASE), "--target", "llamacpp", "--output", "{out}"),
    "package triton": ("package", "{run}", "--target", "triton", "--engine", "ort",
                       "--output", "{out}"),
    "eval": EVAL,
    "bench": (*BENCH, "--merged"),
    "verify": ("verify", "{run}", "--engine", "torch"),
    "report": ("report", "{run}"),
}  # fmt: skip
# Bytes that a file may have: nothing fits; small files fit, and weights do not.
LIMITS = {
    "package vllm": 100, "package triton": 1000, "prune": 2000, "bench": 100, "eval": 100,
    "verify": 100, "report": 1000,
}  # fmt: skip
WEIGHTS_ONLY = 20_000


@contextmanager
def limited_files(size):
    """Let no file become larger than ``size`` bytes, which the system tells as a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def read(folder):
    return {
        str(path.relative_to(folder)): compute_sha256(path)
        for path in folder.rglob("*")
        if path.is_file() and not path.name.endswith(".lock")
    }


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_says_so_and_leaves_what_was_there(name, root):  # noqa: F811
    places = {
        "run": root / "run", "base": root / "base", "text": root / "text.txt", "out": root / "out",
    }  # fmt: skip
    before = read(root)
    with limited_files(LIMITS.get(name, WEIGHTS_ONLY)):
        result = invoke(*(word.format(**places) for word in COMMANDS[name]))
    assert result.exit_code == 1, result.output
    assert "There is no space left to write '" in result.stderr
    assert "Traceback" not in result.output
    after = read(root)
    if name == "prune":  # a run that was begun says how to go on
        after = {path: sha for path, sha in after.items() if not path.startswith("out/")}
    assert after == before


class TestTheSentence:
    def test_a_file(self, tmp_path):
        path = tmp_path / "a.bin"
        path.write_bytes(b"old")
        with (
            limited_files(10),
            pytest.raises(DiskFullError, match=f"left to write '{path}'. Free some, and run"),
            atomic_file(path) as temporary,
        ):
            temporary.write_bytes(bytes(100))
        assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]
        assert path.read_bytes() == b"old"

    def test_a_folder(self, tmp_path):
        with (
            limited_files(10),
            pytest.raises(DiskFullError, match=f"left to write '{tmp_path / 'new'}'. Free"),
            atomic_folder(tmp_path / "new", kind="model") as temporary,
        ):
            (temporary / "a.bin").write_bytes(bytes(100))
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("error", "full", "sentence"),
        [
            (OSError(28, "No space left on device", "/a/b"), True, "left to write '/a/b'. Free"),
            (OSError("65536 requested and 21232 written"), True, "no space left to write. Free"),
            (OSError(30, "Read-only file system", "/a"), False,
             "Cannot use '/a': Read-only file system. Use a folder that you may write to."),
            (PermissionError(13, "Permission denied", "/a"), False, "'/a': Permission denied. Use"),
            (OSError(5, "Input/output error", "/a"), False, "Cannot use '/a': Input/output error."),
            (OSError("Something else"), False, "Something else."),
        ],
    )  # fmt: skip
    def test_of_each_error(self, error, full, sentence):
        assert is_disk_full(error) is full
        assert sentence in describe_os_error(error)

    def test_a_library_without_a_number(self):
        assert is_disk_full(Exception("Error: IoError (os error 28)"))
        assert not is_disk_full(Exception("28"))


def test_a_library_is_quoted_in_one_line():
    assert quote_error(ValueError("a `b`\n more")) == "a 'b'"
    assert quote_error(ValueError("Class error:\n   it is 3.\n x")) == "Class error: it is 3"
    assert quote_error(KeyError()) == "KeyError"
    assert len(quote_error(ValueError("x" * 1000))) == 300
