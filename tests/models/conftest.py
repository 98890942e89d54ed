import pytest
import torch

from tests.models.families import make_base


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
