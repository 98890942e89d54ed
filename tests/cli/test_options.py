"""Options that are made from PruneConfig: groups of the help, units, and former names."""

import dataclasses
import re

import click
import pytest
import yaml

from lpdeploy.cli import check, prune
from lpdeploy.cli.bench import command as bench
from lpdeploy.cli.options import (
    BYTES,
    MILLISECONDS,
    PARAMETERS,
    GroupedCommand,
    GroupedOption,
    config_options,
)
from lpdeploy.config import GROUPS, PruneConfig
from lpdeploy.fields import RENAMED, get_option
from tests.cli.test_cli import SMALL, check_refused, invoke, last_json
from tests.helpers import make_text, make_tiny_model


def read_help(*words):
    """Return the words under each heading of a command's help."""
    text = invoke(*words, "--help").stdout
    titles = "|".join((*GROUPS, "Options"))
    parts = re.split(rf"(?m)^({titles}):$", text)
    pairs = zip(parts[1::2], parts[2::2], strict=True)
    return {title: " ".join(body.split()) for title, body in pairs}


def test_the_help_lists_every_field_once_in_its_group():
    sections = read_help("prune")
    assert list(sections) == [*GROUPS, "Options"]
    for own in dataclasses.fields(PruneConfig):
        start = re.compile(rf"(?:^|(?<= ))--{own.name.replace('_', '-')}(?= (?:/ --no|[A-Z\[]))")
        own_section = sections[get_option(own).group]
        listed = [p for p in prune.command.params if p.name == own.name]
        assert len(listed) == 1
        assert listed[0].group == get_option(own).group
        assert start.search(own_section), own.name
        words = get_option(own).help.split("`")[0].split()[:4]
        assert " ".join(words) in own_section.replace("- ", "-"), own.name


def test_former_names_are_hidden():
    text = " ".join(read_help("prune").values())
    for former in RENAMED:
        assert f"--{former} " not in text


def test_shared_options_have_one_help_text():
    of_prune = {p.name: p for p in prune.command.params}
    for command in (check.command, bench.commands["pruning"]):
        shared = [p for p in command.params if isinstance(p, GroupedOption)]
        assert len(shared) >= 5
        for param in shared:
            other = of_prune[param.name]
            assert (param.help, param.group) == (other.help, other.group)
            assert param.type.to_info_dict() == other.type.to_info_dict()


@pytest.fixture
def ask():
    """Run a command of two options, one of which was renamed; return (result, values)."""
    values = {}

    @click.command(cls=GroupedCommand)
    @config_options("prune_warmup", "seed")
    def command(**given):
        values.update(given)

    def run(*words):
        values.clear()
        return click.testing.CliRunner().invoke(command, words), dict(values)

    return run


@pytest.mark.parametrize("words", [["--warmup", "0.25"], ["--warmup=0.25"]])
def test_a_former_name_works_and_warns_once(ask, words):
    result, values = ask(*words, "--seed", "3")
    assert (result.exit_code, values) == (0, {"prune_warmup": 0.25, "seed": 3})
    assert result.stderr.count("--warmup is now called --prune-warmup") == 1
    assert result.stdout == ""
    assert ask("--prune-warmup", "0.25")[0].stderr == ""
    assert ask()[1] == {"prune_warmup": None, "seed": 0}


def test_a_former_name_is_checked_as_the_new_one_and_not_both_are_taken(ask):
    result, _ = ask("--warmup", "2")
    assert result.exit_code == 2
    assert "Invalid value for '--prune-warmup'" in result.stderr
    for words in (["--warmup", "0", "--prune-warmup", "0"], ["--prune-warmup=0", "--warmup=0"]):
        result, _ = ask(*words)
        assert result.exit_code == 2
        assert "--warmup is the former name of --prune-warmup." in result.stderr


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("options") / "base", heads=4, kv_heads=2)


@pytest.fixture(scope="module")
def data(base):
    return make_text(base.parent / "text.txt")


def run_prune(base, data, output, *words):
    return invoke("prune", base, "--data", data, "--output", output, *SMALL, *words)


def test_a_recipe_of_an_earlier_version_runs(base, data, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    old = {"warmup": 0.0, "cooldown": 0.25, "removal": "cut", "ratio": 0.25, "head_ratio": None}
    recipe.write_text(yaml.safe_dump({"prune": old}))
    result = run_prune(base, data, tmp_path / "run", "--recipe", recipe, "--json")
    assert last_json(result)["ratio"] == 0.25
    assert result.stderr.count("'cooldown' in recipe") == 1
    resolved = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["prune"]
    assert (resolved["prune_warmup"], resolved["prune_cooldown"]) == (0.0, 0.25)
    assert not RENAMED.keys() & resolved.keys()
    # What a run resolved is a recipe again, and says the same.
    again = tmp_path / "run" / "recipe.yaml"
    result = run_prune(base, data, tmp_path / "again", "--recipe", again)
    assert result.exit_code == 0, result.output
    assert "is now called" not in result.stderr
    assert yaml.safe_load((tmp_path / "again" / "recipe.yaml").read_text())["prune"] == resolved


def test_names_without_a_value_do_not_warn_and_both_are_refused(base, data, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"prune": {"warmup": None, "stepz": 4}}))
    result = run_prune(base, data, tmp_path / "run", "--recipe", recipe)
    check_refused(result, "unknown option 'stepz'. Did you mean 'steps'", code=2)
    assert "is now called" not in result.stderr
    recipe.write_text(yaml.safe_dump({"prune": {"warmup": 0.1, "prune_warmup": 0.1}}))
    result = run_prune(base, data, tmp_path / "run", "--recipe", recipe)
    check_refused(result, "gives 'prune_warmup' and its former name 'warmup'", code=2)


def test_what_is_masked_of_necessity_is_said(bases, data, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    base = bases("llama-64")
    result = run_prune(base, data, tmp_path / "run", "--load-in", "4bit")
    assert result.exit_code == 0, result.output
    assert "Groups are masked until the end" in result.stderr
    result = run_prune(base, data, tmp_path / "no", "--load-in", "4bit", "--removal", "cut")
    check_refused(result, "--removal cut cannot go with --load-in 4bit", code=2)


@pytest.mark.parametrize(
    ("kind", "text", "number"),
    [
        (PARAMETERS, "3.5B", 3_500_000_000), (PARAMETERS, "12 K", 12_000),
        (PARAMETERS, "7M", 7_000_000), (PARAMETERS, "1T", 10**12), (PARAMETERS, 5000, 5000),
        (BYTES, "7GiB", 7 * 2**30), (BYTES, "0.5MiB", 2**19), (BYTES, "1KiB", 1024),
        (BYTES, "2kB", 2000), (BYTES, "1.5MB", 1_500_000), (BYTES, "3GB", 3 * 10**9),
        (MILLISECONDS, "30ms", 30), (MILLISECONDS, "0.25s", 250),
        (PARAMETERS, "600k", 600_000), (PARAMETERS, "3.5b", 3_500_000_000),
        (BYTES, "7gib", 7 * 2**30), (BYTES, "2KB", 2000), (MILLISECONDS, "30MS", 30),
    ],
)  # fmt: skip
def test_units(kind, text, number):
    assert kind.convert(text, None, None) == number
    assert kind.convert(kind.convert(text, None, None), None, None) == number


def test_a_decimal_fraction_is_exact():
    assert int(PARAMETERS.convert("1.1B", None, None)) == 1_100_000_000
    assert float(MILLISECONDS.convert("1500us", None, None)) == 1.5


@pytest.mark.parametrize(
    ("kind", "text", "sentence"),
    [
        (
            PARAMETERS,
            "3.5G",
            "'3.5G' is not a number of .* units K, M, B, T, or no unit, ",
        ),
        (PARAMETERS, "many", "'many' is not a number of parameters"),
        (PARAMETERS, "-1B", "'-1B' is not a number"),
        (BYTES, "3", r"not a size\. .* B, kB, MB, GB, TB, KiB, MiB, GiB, TiB, such as 7GiB"),
        (MILLISECONDS, "30", r"'30' is not a time\. .* units us, ms, s, such as 30ms"),
        (MILLISECONDS, "1e3ms", "'1e3ms' is not a time"),
    ],
)
def test_a_wrong_unit_is_told_the_right_ones(kind, text, sentence):
    with pytest.raises(click.BadParameter, match=sentence):
        kind.convert(text, None, None)
