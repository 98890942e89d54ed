"""Every reader gives a result or one sentence, whatever stands in the file."""

import pytest

from lpdeploy.errors import LpdeployError
from tools.measure.fuzz import READERS, Reader, fuzz, prepare

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("fuzz")
    prepare(root)
    return root


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.file)
def test_a_file_that_was_changed_at_random(root, reader):
    before = (root / reader.file).read_bytes()
    fuzz(reader, root, examples=150)
    assert (root / reader.file).read_bytes() == before


@pytest.mark.parametrize(
    "error", [KeyError("x"), LpdeployError(""), LpdeployError("x" * 5000), SystemError("panic")]
)
def test_the_fuzzer_finds_what_is_no_sentence(root, error):
    def read(root):
        if (root / "text.txt").read_bytes().startswith(b"\0"):
            raise error

    with pytest.raises(AssertionError):
        fuzz(Reader("text.txt", read), root, examples=2000)
