"""What all commands share."""

import pytest

from lpdeploy.cli.common import write_flags


@pytest.mark.parametrize(
    ("sentence", "written"),
    [
        ("`micro_batch_size` 3 does not divide", "--micro-batch-size 3 does not divide"),
        ("use `removal='mask'` or `round_to=4`", "use --removal mask or --round-to 4"),
        ("leave `shard=True` out", "leave --shard out"),
        ("the `model` has no config", "the MODEL has no config"),
        ("it's 'lpdeploy compact run'", "it's 'lpdeploy compact run'"),
    ],
)
def test_fields_become_options(sentence, written):
    assert write_flags(sentence) == written
