"""What is installed is named by its bytes, and the wheel repeats."""

import importlib.util

import pytest

from tests.helpers import ROOT

pytestmark = pytest.mark.slow


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


def test_two_builds_of_the_wheel_are_the_same_bytes(tool, tmp_path):
    if not (ROOT / ".git").exists():
        pytest.skip("no git checkout")
    (tmp_path / "one").mkdir()
    (tmp_path / "other").mkdir()
    one, other = (tool.build_wheel(tmp_path / name) for name in ("one", "other"))
    assert one.name == other.name
    assert one.read_bytes() == other.read_bytes()
