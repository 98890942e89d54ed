"""The recipe of the container image, as far as it can be checked without building it."""

import re
import subprocess
import tomllib

import pytest

from tests.helpers import ROOT
from tools import supply_chain

TEXT = (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8")
INSTRUCTIONS = re.sub(r"(?m)^#.*\n", "", TEXT).replace("\\\n", " ").splitlines()


def list_words(instruction):
    return [line.split()[1:] for line in INSTRUCTIONS if line.split()[:1] == [instruction]]


def test_the_last_stage_has_no_rights():
    assert INSTRUCTIONS.index("USER 1000") > max(
        index for index, line in enumerate(INSTRUCTIONS) if line.startswith(("FROM", "RUN", "COPY"))
    )


def test_what_is_copied_is_there_and_not_ignored():
    rules = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    allowed = {rule[1:] for rule in rules if rule.startswith("!")}
    copied = {name for *names, _ in list_words("COPY") for name in names if name[0] not in "-/."}
    assert {"pyproject.toml", "constraints.txt"} <= copied <= allowed
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {project["readme"], *project["license-files"], "lpdeploy"} <= allowed
    assert all((ROOT / name).exists() for name in allowed)


def test_the_default_extra_exists():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (default,) = [words[0] for words in list_words("ARG") if words[0].startswith("EXTRAS=")]
    assert default.removeprefix("EXTRAS=") in extras["optional-dependencies"]


def test_the_pins_are_those_of_constraints():
    """Without hashes, which pip would then want of lpdeploy itself."""
    script = re.search(r"sed -n '(.*?)' constraints.txt", TEXT)[1]
    try:
        done = subprocess.run(
            ["sed", "-n", script, ROOT / "constraints.txt"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    except FileNotFoundError:
        pytest.skip("there is no sed")
    pins = supply_chain.read_pins((ROOT / "constraints.txt").read_text())
    assert done.stdout.splitlines() == [f"{name}=={version}" for name, version in pins.items()]
