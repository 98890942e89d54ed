"""What is installed is named by its bytes, and the wheel repeats."""

import importlib.util
import subprocess
import zipfile
import zlib

import pytest
import torch
from transformers import LlamaForCausalLM

from tests.helpers import ROOT
from tools.demo_model import make

pytestmark = pytest.mark.slow
LARGEST_WHEEL = 2_000_000  # bytes
MODEL = ROOT / "lpdeploy" / "demo" / "assets" / "story-llama-1M"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("supply", ROOT / "tools" / "supply_chain.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_version_has_hashes(tool):
    text = tool.CONSTRAINTS.read_text()
    pins = tool.read_pins(text)
    assert len(pins) > 100
    for block in text.replace("\\\n", "").splitlines()[1:]:
        name, *hashes = block.split()
        assert "==" in name
        assert hashes
        assert all(digest.startswith("--hash=sha256:") for digest in hashes)


@pytest.fixture(scope="module")
def wheels(tool, tmp_path_factory):
    """Build the wheel in two places."""
    if not (ROOT / ".git").exists():
        pytest.skip("no git checkout")
    return [tool.build_wheel(tmp_path_factory.mktemp(name)) for name in ("one", "other")]


def test_two_builds_of_the_wheel_are_the_same_bytes(wheels):
    one, other = wheels
    assert one.name == other.name
    assert one.read_bytes() == other.read_bytes()


def test_the_wheel_is_small_and_whole(wheels):
    """It has every file of the package, the demo's included, and no tests or tools."""
    assert wheels[0].stat().st_size < LARGEST_WHEEL
    with zipfile.ZipFile(wheels[0]) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    command = ["git", "ls-tree", "-r", "--name-only", "HEAD", "lpdeploy"]
    known = subprocess.run(command, cwd=ROOT, check=True, text=True, capture_output=True).stdout
    assert names == set(known.splitlines())


def test_the_weights_of_the_demo_are_rounded():
    """Without that the wheel has twice the size."""
    model = LlamaForCausalLM.from_pretrained(MODEL)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    make.apply_rounding(model)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    packed = zlib.compress((MODEL / "model.safetensors").read_bytes())
    assert len(packed) < model.num_parameters() * 1.2


def test_rounding_keeps_weights_near():
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 64)
    before = layer.weight.detach().clone()
    make.apply_rounding(layer)
    spread = float(before.std())
    # The step is within a factor of sqrt(2) of a tenth of the spread; a weight moves by half of it.
    largest = 0.5 * 0.1 * 2**0.5 * spread
    assert 0 < (layer.weight.detach() - before).abs().max() <= largest * (1 + 1e-6)
