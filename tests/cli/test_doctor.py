"""What `lpdeploy doctor` says of this machine, and of every extra."""

import dataclasses
import importlib.metadata
import tomllib

import pytest

from lpdeploy.extras import EXTRAS, Extra
from lpdeploy.machine import describe_machine
from tests.cli.test_cli import invoke, last_json
from tests.helpers import ROOT

THERE = Extra("there", ("click",), "be there")
MISSING = Extra("nothing", ("no-such-package",), "be missing")


@pytest.fixture
def one_of_two(monkeypatch):
    """Let there be two extras, one of which is installed."""
    monkeypatch.setattr("lpdeploy.cli.doctor.EXTRAS", (THERE, MISSING))


def test_it_names_versions():
    machine = last_json(invoke("doctor", "--json"))["machine"]
    assert machine["versions"]["torch"]
    assert machine["cuda"] in {True, False}


def test_it_knows_every_extra_and_what_that_installs():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = project["optional-dependencies"]
    assert {extra.name for extra in EXTRAS} == declared.keys() - {"dev"}
    for extra in EXTRAS:
        *beside, requirement = declared[extra.name]
        assert not beside or beside == declared["gguf"]  # which is an extra of its own
        if extra.name == "serve":  # an extra of transformers
            requires = importlib.metadata.requires("transformers")
            own = {line.split(";")[0].split(">")[0] for line in requires if '"serving"' in line}
            assert requirement.startswith("transformers[serving]")
            assert set(extra.packages) <= own
        else:
            assert extra.packages == (requirement.split(">=")[0],)


def test_an_extra_needs_all_its_packages():
    assert Extra("both", ("click", "no-such-package"), "").find_version() is None
    assert Extra("one", ("click",), "").find_version() == importlib.metadata.version("click")


def test_it_says_what_is_there_and_how_to_install_the_rest(one_of_two):
    found = last_json(invoke("doctor", "--json"))
    version, install = importlib.metadata.version("click"), "pip install 'lpdeploy[nothing]'"
    assert found["missing"] == {"no-such-package": install}
    assert found["extras"] == [
        {"name": "there", "packages": ["click"], "purpose": "be there",
         "needs_gpu": False, "version": version, "install": "pip install 'lpdeploy[there]'"},
        {"name": "nothing", "packages": ["no-such-package"], "purpose": "be missing",
         "needs_gpu": False, "version": None, "install": install},
    ]  # fmt: skip
    lines = invoke("doctor").stdout.splitlines()
    rows = [line.split() for line in lines]
    assert ["there", "click", version, "be", "there"] in rows
    assert ["nothing", "no-such-package", "missing", "be", "missing"] in rows
    assert lines[-1] == install


@pytest.mark.parametrize("gpu", [None, "NVIDIA H200"])
def test_it_advises_what_needs_a_gpu_only_where_there_is_one(monkeypatch, gpu):
    wants_gpu = dataclasses.replace(MISSING, needs_gpu=True)
    monkeypatch.setattr("lpdeploy.cli.doctor.EXTRAS", (THERE, wants_gpu))
    machine = dataclasses.replace(describe_machine(), gpu=gpu)
    monkeypatch.setattr("lpdeploy.machine.describe_machine", lambda: machine)
    found = invoke("doctor").stdout
    assert ("To install what is missing" in found) == (gpu is not None)
    assert "no-such-package    missing" in found
