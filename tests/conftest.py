"""What every test needs."""

import pytest


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory):
    """A cache of its own for each session, and nothing in the user's."""
    patch = pytest.MonkeyPatch()
    patch.setenv("LPDEPLOY_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()
