"""A value that is wrong for any model exits 2, with a sentence that names the option."""

import click
import pytest

from lpdeploy.cli.main import main
from lpdeploy.cli.options import Quantity
from lpdeploy.cli.types import Count, ListOf, NumberOrWord
from tests.cli.test_cli import check_refused, invoke

# What a command needs beside the value that is wrong.
NEEDED = {
    "check": ["."],
    "prune": [".", "--data", "text", "--output", "run"],
    "compact": ["."],
    "export": [".", "--engine", "onnx"],
    "package": [".", "--target", "vllm", "--output", "out"],
    "verify": ["."],
    "bench latency": ["."],
    "bench pruning": ["."],
    "eval": ["."],
    "paper": ["2", ".", "--data", "text", "--output", "tables"],
    "compare": [".", ".."],
    "sweep": [".", "--ratio", "0.2,0.5", "--data", "text", "--output", "runs"],
    "generate": [".", "prompt"],
    "chat": ["."],
    "serve": ["."],
    "report": ["."],
    "push": [".", "--repo", "owner/name"],
    "doctor": [],
    "demo": [],
}


def walk(group, name=""):
    for own in group.list_commands(None):
        command = group.get_command(None, own)
        full = f"{name} {own}".strip()
        if isinstance(command, click.Group):
            yield from walk(command, full)
        else:
            yield full, command


NUMBERS = ["x", "-1", "nan", "inf"]


def list_wrong(kind):
    """List values that no option of a type takes; none for what is a name or a text."""
    wrong = []
    match kind:
        case ListOf():
            wrong = [",", *list_wrong(kind._kind)]
        case NumberOrWord():
            wrong = ["no-such-word", *NUMBERS]
        case Quantity():
            wrong = ["many", "-1", "1 furlong"]
        case Count():
            wrong = ["x", "1.5", "-1", "9" * 30]
        case click.FloatRange() | click.types.FloatParamType():
            wrong = NUMBERS
        case click.Choice():
            wrong = ["no-such-name"]
        case click.Path():
            wrong += ["no-such-path"] if kind.exists else []
            wrong += [] if kind.file_okay else ["file"]
            wrong += [] if kind.dir_okay else ["."]
    return wrong


VALUES = [
    (name, param, value)
    for name, command in walk(main)
    for param in command.params
    if isinstance(param, click.Option) and not param.is_flag
    for value in list_wrong(param.type)
]  # fmt: skip


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()


def test_every_typed_option_is_tried():
    assert {name for name, _ in walk(main)} == NEEDED.keys()
    assert len(VALUES) > 300


def test_a_wrong_value_exits_2_and_names_the_option(here):
    for name, param, value in VALUES:
        result = invoke(*name.split(), *NEEDED[name], f"{param.opts[0]}={value}")
        said = f"{name} {param.opts[0]}={value}: {result.output}"
        assert result.exit_code == 2, said
        assert param.opts[0] in result.stderr, said


def test_a_missing_run_exits_2(here):
    for name in ("compact", "verify", "report", "push"):
        needed = ["no-such-path", *NEEDED[name][1:]]
        check_refused(invoke(name, *needed), "'no-such-path' does not exist", code=2)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("export base --engine onnx --precision int4", "--precision int4 is not supported by"),
        ("export base --engine onnx --block-size 32", "--block-size is no option of engine onnx"),
        ("export base --engine onnx --opset 3", "--opset 3 is not supported; it must be 18 to"),
        ("export base --engine ort --precision int4 --block-size 33", "--block-size 33 is not a"),
        ("export base --engine ort --activations bf16", "--activations bf16 goes with int8 or"),
        ("export base --engine onnx --max-batch 9999999", "--max-batch is 9999999; it must be"),
        ("package base --target vllm --output out --gpu 0", "--gpu is not an option of --target"),
        ("package base --target triton --output out --name 1/2", "'1/2' is not a valid model name"),
        ("bench latency base --engine onnx:int4", "onnx has no precision 'int4'. Use fp32, fp16"),
        ("bench latency base --engine ort:", "ort has no precision ''. Use fp32, fp16, bf16"),
        ("bench latency base --engine torch:fp16", "torch has no precision 'fp16'. It takes that"),
        ("push base --repo owner", "--repo 'owner' names no owner"),
        ("push base --repo owner/-x-", "--repo 'owner/-x-': Repo id must"),
        ("paper 2 base --data text.txt --output o --perplexity text.txt --rows LORA", "no row 'LO"),
        ("paper 2 base --data text.txt --output o", "Table 2 has nothing to show"),
        ("paper 6 base --data text.txt --output o --jobs 2", "--jobs 2: Table 6 measures time"),
        ("generate base hello --top-p 0", "--top-p is 0.0; it must be above 0"),
    ],
)  # fmt: skip
def test_what_the_library_refuses_of_any_model_exits_2(base, data, here, words, sentence):
    check_refused(invoke(*words.split()), sentence, code=2)
