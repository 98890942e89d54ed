"""What all commands share."""

import click
import pytest

from lpdeploy.cli.common import COUNT, ListOf, write_flags


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


@pytest.mark.parametrize("given", ["1, 8", [1, 8], ["1", "8"], (1, 8)])
def test_a_list_has_commas_or_is_one_in_a_recipe(given):
    assert ListOf(COUNT).convert(given, None, None) == (1, 8)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [(",", "',' is empty"), ([], r"\[\] is empty"), ("1,0", "0 is not in the range x>=1")],
)
def test_a_list_checks_each_of_its_values(given, sentence):
    with pytest.raises(click.BadParameter, match=sentence):
        ListOf(COUNT).convert(given, None, None)
