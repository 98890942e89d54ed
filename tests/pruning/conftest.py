import pytest

from tests.helpers import make_text, make_tiny_model


@pytest.fixture
def base(tmp_path):
    return make_tiny_model(tmp_path / "base", heads=4, kv_heads=2)


@pytest.fixture
def data(tmp_path):
    return make_text(tmp_path / "text.txt")
