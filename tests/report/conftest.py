"""A small run to write pages about."""

import shutil

import pytest

from lpdeploy.config import PruneConfig
from lpdeploy.pruning.run import prune
from tests.helpers import make_text, make_tiny_model


@pytest.fixture(scope="package")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("made")
    base = make_tiny_model(root / "base")
    options = PruneConfig(
        steps=3, batch_size=2, micro_batch_size=2, seq_len=16, round_to=4, device="cpu"
    )
    prune(str(base), root / "run", data=str(make_text(root / "t.txt")), options=options)
    return root / "run"


@pytest.fixture
def run(made, tmp_path):
    shutil.copytree(made, tmp_path / "run")
    return tmp_path / "run"
