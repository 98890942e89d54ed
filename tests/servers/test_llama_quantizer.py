"""K-quants without llama.cpp: names, what is refused, and how a library that fails is told.

tests/slow/servers/test_servers.py makes them with the real one.
"""

import ctypes
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

from lpdeploy.cli.main import main
from lpdeploy.errors import ArtifactError, LpdeployError, MissingDependencyError
from lpdeploy.models.loading import load_config
from lpdeploy.servers.gguf_types import K_QUANTS, SMALL_BLOCKS, list_precisions
from lpdeploy.servers.llamacpp import _describe_types
from lpdeploy.servers.package import package
from tests.helpers import make_tiny_model
from tests.servers.models import DEMO

gguf = pytest.importorskip("gguf", reason="lpdeploy[gguf] is not installed")


class Settings(ctypes.Structure):
    _fields_ = [("nthread", ctypes.c_int), ("ftype", ctypes.c_int)]


@pytest.fixture
def library(monkeypatch):
    """Stand in for llama_cpp; it copies the file instead of quantizing it."""
    callback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
    fake = SimpleNamespace(
        llama_log_callback=callback,
        llama_log_get=lambda *_: None,
        llama_model_quantize_default_params=Settings,
        LLAMA_FTYPE_MOSTLY_Q4_K_M=15,
        logs=[],
        asked=[],
    )
    fake.llama_log_set = lambda log, _: fake.logs.append(log)

    def quantize(source, target, settings):
        fake.asked.append((source, target, settings._obj.ftype, settings._obj.nthread))
        shutil.copyfile(source, target)
        return 0

    fake.llama_model_quantize = quantize
    monkeypatch.setitem(sys.modules, "llama_cpp", fake)
    return fake


def test_the_command_offers_every_name():
    result = CliRunner().invoke(main, ["package", "--help"])
    for name in (*K_QUANTS, *SMALL_BLOCKS, "q8_0", "int4"):
        assert name in result.output
    assert {"q3_k_m", "q4_k_m", "q5_k_m", "q6_k", "q8_0"} < set(list_precisions())


def test_q8_0_is_int8(tmp_path):
    files = []
    for precision in ("int8", "q8_0"):
        result = package(str(DEMO), kind="llamacpp", output=tmp_path / "out", precision=precision,
                         overwrite=True).to_json()  # fmt: skip
        files.append((tmp_path / "out" / result["file"]).read_bytes())
    assert files[0] == files[1]
    assert result["precision"] == "q8_0"
    assert result["types"] == {"Q8_0": 1.0}


def test_without_the_library_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(
        MissingDependencyError,
        match="llama-cpp-python is not installed; `precision=q4_k_m` needs its quantizer. Install "
        "with: pip install 'lpdeploy.llamacpp.'",
    ):
        package(str(DEMO), kind="llamacpp", output=tmp_path / "out", precision="q4_k_m")
    assert not (tmp_path / "out").exists()


def test_the_names_of_llamacpp_are_for_llamacpp(tmp_path):
    with pytest.raises(LpdeployError, match="`precision` q4_k_m is not supported by engine ort"):
        package(str(DEMO), kind="genai", output=tmp_path / "out", precision="q4_k_m")
    assert not (tmp_path / "out").exists()


def test_what_the_quantizer_gets_and_leaves(tmp_path, library):
    result = package(
        str(DEMO), kind="llamacpp", output=tmp_path / "out", precision="q4_k_m"
    ).to_json()
    ((source, target, kind, threads),) = library.asked
    assert Path(target.decode()).name == result["file"] == "out-q4_k_m.gguf"
    assert source != target
    assert (kind, threads) == (15, torch.get_num_threads())
    assert [name for name in result["files"] if name.endswith(".gguf")] == [result["file"]]
    # The log of llama.cpp is caught, and then what it was.
    assert len(library.logs) == 2
    readme = (tmp_path / "out" / "README.md").read_text()
    assert "weights in q4_k_m" in readme
    assert "llama-quantize" not in readme


def test_a_failure_of_the_quantizer(tmp_path, library):
    def fail(*_):
        library.logs[-1](4, b"llama_model_quantize: failed to quantize: no such layer\n", None)
        return 1

    library.llama_model_quantize = fail
    with pytest.raises(
        LpdeployError,
        match="llama.cpp cannot write `precision=q4_k_m` of this model: no such layer. Use `prec",
    ):
        package(str(DEMO), kind="llamacpp", output=tmp_path / "out", precision="q4_k_m")
    library.llama_model_quantize = lambda *_: 1
    with pytest.raises(LpdeployError, match="of this model: it does not say why. Use"):
        package(str(DEMO), kind="llamacpp", output=tmp_path / "out", precision="q4_k_m")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kept", [0, 3000, 0.5, 0.999])
def test_half_a_file(kept, tmp_path, library):
    """On a full disk llama.cpp returns as if all were well."""

    def cut(source, target, _):
        whole = Path(source.decode()).read_bytes()
        size = int(kept * len(whole)) if isinstance(kept, float) else kept
        Path(target.decode()).write_bytes(whole[:size])
        return 0

    library.llama_model_quantize = cut
    with pytest.raises(ArtifactError, match="'out-q4_k_m.gguf' is incomplete .* the disk has room"):
        package(str(DEMO), kind="llamacpp", output=tmp_path / "out", precision="q4_k_m")
    assert not (tmp_path / "out").exists()


def test_zeros_in_place_of_a_header(tmp_path, library):
    def blank(source, target, _):
        whole = Path(source.decode()).read_bytes()
        Path(target.decode()).write_bytes(bytes(len(whole)))
        return 0

    library.llama_model_quantize = blank
    with pytest.raises(ArtifactError, match="'out-q4_k_m.gguf' is incomplete"):
        package(str(DEMO), kind="llamacpp", output=tmp_path / "out", precision="q4_k_m")


@pytest.mark.parametrize(
    ("types", "channels", "end"),
    [
        ({"Q4_K": 0.75, "Q6_K": 0.25}, 256, "matrices, 75.0% in Q4_K, 25.0% in Q6_K."),
        ({"Q4_K": 0.5, "Q5_0": 0.3, "Q8_0": 0.2}, 512, "llama.cpp gave them types of more bits."),
        ({"Q4_K": 0.9, "Q5_0": 0.1}, 288, "`round_to=256`, and the channels are not among them."),
    ],
)
def test_the_package_says_which_types_it_has(types, channels, end, tmp_path):
    config = load_config(make_tiny_model(tmp_path / "model"))
    config.intermediate_size = channels
    text = _describe_types(types, config)
    assert text.endswith(end)
    assert ("50.0% lie in rows of no multiple of 256" in text) is (0.5 in types.values())
