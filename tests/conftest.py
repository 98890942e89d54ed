"""Fixtures that many tests share, and the markers of tests/slow and tests/gpu."""

import logging
from pathlib import Path

import pytest
import torch

from tests.helpers import make_text, make_tiny_model
from tests.models.families import make_base

TESTS = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(items):
    """Mark the tests of tests/slow and tests/gpu; skip the latter where there is no GPU."""
    for item in items:
        room = item.path.relative_to(TESTS).parts[0]
        if room in ("slow", "gpu"):
            item.add_marker(room)
        if room == "gpu" and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory):
    """A cache of its own for each session, and nothing in the user's."""
    patch = pytest.MonkeyPatch()
    patch.setenv("LPDEPLOY_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


@pytest.fixture
def told():
    """Collect what the library logs."""
    lines, logger, handler = [], logging.getLogger("lpdeploy"), logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)
    logger.setLevel(level)


@pytest.fixture
def base(tmp_path):
    return make_tiny_model(tmp_path / "base", heads=4, kv_heads=2)


@pytest.fixture
def data(tmp_path):
    return make_text(tmp_path / "text.txt")


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """Return what makes (once) the base of a family; tests that change one make their own."""
    made = {}

    def get(family, dtype=torch.float32):
        key = (family, dtype)
        if key not in made:
            made[key] = make_base(tmp_path_factory.mktemp(family) / "base", family, dtype=dtype)
        return made[key]

    return get
