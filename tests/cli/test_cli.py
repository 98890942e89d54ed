"""The command line as users and scripts meet it: results, recipes, errors, exit codes."""

import json
import re
import shutil
import signal
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from lpdeploy.cli.main import main
from tests.helpers import make_text, make_tiny_model

COMMANDS = [
    "check", "prune", "compact", "export", "package", "verify", "bench", "eval", "paper",
    "generate", "chat", "serve", "report", "compare", "sweep", "push", "doctor",
    "demo",
]  # fmt: skip
SMALL = [
    "--steps", "4", "--batch-size", "2", "--micro-batch-size", "2", "--seq-len", "16",
    "--prune-every", "1", "--round-to", "4", "--device", "cpu",
]  # fmt: skip


def invoke(*words):
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.fixture
def run(base, data, tmp_path):
    result = invoke("prune", base, "--data", data, "--output", tmp_path / "run", *SMALL)
    assert result.exit_code == 0, result.output
    return tmp_path / "run"


def last_json(result):
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)  # and nothing else, so that a script can read all of it


def check_refused(result, sentence, *, code=1):
    assert result.exit_code == code, result.output
    assert re.search(sentence, " ".join(result.stderr.split())), result.stderr
    assert "Traceback" not in result.output


def test_help_lists_the_commands_in_pipeline_order():
    result = invoke("-h")
    listed = [line.split()[0] for line in result.stdout.split("Commands:")[1].splitlines() if line]
    assert listed == COMMANDS


def test_every_command_has_help():
    for command in (*COMMANDS, "bench latency", "bench pruning"):
        result = invoke(*command.split(), "-h")
        assert result.exit_code == 0, f"{command}: {result.output}"
        assert "Usage: " in result.stdout, command


def test_prune_and_compact_print_the_json_of_the_contract(base, data, tmp_path):
    pruned = last_json(
        invoke("prune", base, "--data", data, "--output", tmp_path / "run", "--json", *SMALL)
    )
    assert pruned["run"] == str(tmp_path / "run")
    assert pruned["ratio"] == 0.5
    assert pruned["achieved"]["groups"] == 0.5
    assert 0 < pruned["achieved"]["parameters"] < 0.5
    assert pruned["steps"] == 4
    assert {"seconds", "peak_bytes", "loss"} <= pruned.keys()
    events = [
        line for line in map(json.loads, (tmp_path / "run" / "log.jsonl").open()) if line["removed"]
    ]
    last = {"before": events[-1]["loss_before"], "after": events[-1]["loss_after"]}
    assert pruned["last_event"] == last
    compacted = last_json(invoke("compact", tmp_path / "run", "--json"))
    assert compacted["model"] == str(tmp_path / "run" / "model")
    assert compacted["architecture"] == "LlamaForCausalLM"
    assert compacted["parameters"]["after"] < compacted["parameters"]["before"]
    assert compacted["heads"] == [2, 2]
    assert compacted["kv_heads"] == [1, 1]
    assert compacted["channels"] == [24, 24]


def test_progress_and_hints_stay_off_stdout(base, data, tmp_path):
    result = invoke("prune", base, "--data", data, "--output", tmp_path / "run", *SMALL)
    assert len(result.stdout.splitlines()) == 1
    assert "cpu, fp32 (checkpoint fp32)" in result.stderr
    assert "a layer keeps 1 of 2 KV heads, 24 of 48 channels" in result.stderr
    assert f"Next: lpdeploy compact {tmp_path / 'run'}" in result.stderr


def test_eval_and_verify_print_the_json_of_the_contract(run, data):
    invoke("compact", run)
    words = ("eval", run, "--perplexity", data, "--seq-len", "16", "--with-base", "--json")
    evaluated = last_json(invoke(*words))
    measured = evaluated["perplexity"][str(data)]
    assert measured["perplexity"] > 1
    assert {"bits_per_byte", "tokens"} <= measured.keys()
    assert evaluated["base"]["perplexity"][str(data)]["tokens"] == measured["tokens"]
    assert json.loads((run / "eval.json").read_text()) == evaluated
    verified = last_json(invoke("verify", run, "--engine", "torch", "--json"))
    assert verified["ok"] is True
    assert [(p["a"], p["b"]) for p in verified["pairs"]] == [
        ("masked/torch", "cut/torch"),
        ("cut/torch", "merged/torch"),
        ("merged/torch", "compact/torch"),
    ]
    assert {"max_abs_diff", "tolerance", "ok"} <= verified["pairs"][0].keys()


@pytest.mark.slow
def test_a_base_that_was_moved(run, data, base, tmp_path):
    other = make_tiny_model(tmp_path / "other", heads=4, kv_heads=2, seed=1)
    moved = Path(shutil.move(base, tmp_path / "moved"))
    seq_len = ("--seq-len", "16")
    for words in (
        ("compact", run),
        ("verify", run, "--engine", "torch"),
        ("eval", run, "--perplexity", data, *seq_len, "--with-base"),
        ("bench", "latency", run, "--engine", "torch", "--merged", "--tokens", 8, "--repeats", 2),
    ):
        check_refused(invoke(*words), "If the base model was moved, give its --base")
        check_refused(invoke(*words, "--base", other), "is not the one that was pruned")
        result = invoke(*words, "--base", moved)
        assert result.exit_code == 0, result.output
    check_refused(invoke("check", run), "If the base model was moved, give its --base")
    assert invoke("check", run, "--base", moved).exit_code == 0
    wider = make_tiny_model(tmp_path / "wider", heads=8)
    check_refused(invoke("check", run, "--base", wider), "lists other groups than")


@pytest.mark.slow
def test_verify_says_which_exports_it_left_out(run):
    invoke("compact", run)
    (run / "ort").mkdir()
    said = invoke("verify", run, "--engine", "onnx").stderr
    assert f"'{run / 'ort'}' was not compared. Use --engine ort" in said
    assert "not compared" not in invoke("verify", run, "--engine", "torch").stderr


@pytest.mark.slow
def test_verify_exits_1_where_a_pair_differs(run):
    invoke("compact", run)
    result = invoke("verify", run, "--engine", "torch", "--atol", "0", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout.splitlines()[-1])["ok"] is False
    assert re.search("differ by .*, more than", result.stderr)


def test_the_command_line_wins_over_the_recipe(base, data, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        yaml.safe_dump({"prune": {"model": str(base), "data": str(data), "ratio": 0.25, "seed": 3,
                                  "steps": 2, "batch_size": 2, "micro_batch_size": 2,
                                  "seq_len": 16, "round_to": 4}})
    )  # fmt: skip
    output = tmp_path / "run"
    result = last_json(
        invoke("prune", base, "--recipe", recipe, "--output", output, "--ratio", "0.5", "--json")
    )
    assert result["ratio"] == 0.5
    resolved = yaml.safe_load((output / "recipe.yaml").read_text())["prune"]
    assert resolved["seed"] == 3
    assert resolved["ratio"] == 0.5


@pytest.mark.slow
def test_a_runs_own_recipe_repeats_it(run, base, data, tmp_path):
    words = ("--recipe", run / "recipe.yaml", "--output", tmp_path / "again")
    result = invoke("prune", base, *words)
    assert result.exit_code == 0, result.output
    first = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    assert (tmp_path / "again" / "adapter" / "adapter_model.safetensors").read_bytes() == first


@pytest.mark.slow
@pytest.mark.parametrize(
    ("criterion", "schedule"),
    [
        ("lora", "one-shot"),
        ("gate", "separate"),
        ("gradient", "joint"),
        ("magnitude", "one-shot"),
        ("wanda", "separate"),
        ("random", "joint"),
    ],
)
def test_every_criterion_and_schedule_compacts(base, data, tmp_path, criterion, schedule):
    output = tmp_path / "run"
    words = ("--criterion", criterion, "--schedule", schedule, "--calibration-samples", "2")
    result = last_json(
        invoke("prune", base, "--data", data, "--output", output, *SMALL, *words, "--json")
    )
    assert result["steps"] == (0 if schedule == "one-shot" else 4)
    assert result["achieved"]["groups"] == 0.5
    compacted = last_json(invoke("compact", output, "--json"))
    assert compacted["kv_heads"] == [1, 1]
    assert compacted["channels"] == [24, 24]
    verified = last_json(invoke("verify", output, "--engine", "torch", "--json"))
    assert verified["ok"] is True


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ("--lr", "1e-3", "--steps", "4"),
            "Without effect, as there is no fine-tuning: --steps, --lr.",
        ),
        (("--batch-size", "2"), None),  # over which gradients are taken
        (("--drop-layers", "1"), None),
    ],
)
def test_a_run_without_fine_tuning_says_what_has_no_effect(base, data, tmp_path, words, sentence):
    sizes = ("--micro-batch-size", "2", "--seq-len", "16", "--round-to", "4")
    given = ("--schedule", "one-shot", "--calibration-samples", "2", *sizes, *words)
    result = invoke("prune", base, "--data", data, "--output", tmp_path / "run", *given)
    assert result.exit_code == 0, result.output
    said = r"[\d.]+ before the removal, [\d.]+ after"
    if "--drop-layers" in words:
        said = r"[\d.]+ once layers were dropped, [\d.]+ at the end"
    assert re.search(rf"loss of held-out rows {said}", result.stdout)
    found = [line for line in result.stderr.splitlines() if "Without effect" in line]
    assert found == ([sentence] if sentence else [])


def test_a_recipe_chooses_criterion_and_schedule(base, data, tmp_path):
    wanted = {
        "criterion": "gradient", "score_form": "absolute", "normalize": True,
        "offload_gradients": True, "schedule": "separate", "calibration_samples": 2,
    }  # fmt: skip
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"prune": wanted}))
    words = ("--data", data, "--output", tmp_path / "run", *SMALL)
    last_json(invoke("prune", base, "--recipe", recipe, *words, "--json"))
    resolved = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["prune"]
    assert wanted.items() <= resolved.items()
    recipe.write_text("prune: {schedule: later}")
    result = invoke("prune", base, "--recipe", recipe, *words)
    check_refused(result, "'later' is not one of", code=2)


@pytest.mark.parametrize(
    ("name", "missing"), [("model", "'MODEL'"), ("data", "'--data'"), ("output", "'--output'")]
)
def test_null_in_a_recipe_is_not_what_a_command_needs(base, data, tmp_path, name, missing):
    given = {"model": str(base), "data": str(data), "output": str(tmp_path / "run"), name: None}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"prune": given}))
    result = CliRunner().invoke(main, ["prune", "--recipe", str(tmp_path / "recipe.yaml")])
    assert result.exit_code == 2
    assert f"Missing {'argument' if name == 'model' else 'option'} {missing}" in result.stderr


def test_an_unknown_recipe_key_is_wrong_usage(base, data, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("prune: {ration: 0.5}")
    words = ("--data", data, "--output", tmp_path / "run")
    result = invoke("prune", base, "--recipe", recipe, *words)
    check_refused(result, "unknown option 'ration'. Did you mean 'ratio'", code=2)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--ratio", "1.0"], "1.0 is not in the range 0<=x<1"),
        (["--ratio", "-0.1"], "-0.1 is not in the range 0<=x<1"),
        (["--batch-size", "10", "--micro-batch-size", "4"], "--batch-size 10 is no multiple of"),
        (["--criterion", "guess"], "'guess' is not"),
        (["--schedule", "later"], "'later' is not"),
        (["--schedule", "separate", "--calibration-samples", "0"], "which cannot be 0; leave it"),
        (["--calibration-samples", "-1"], "-1 is not in the range from 0 to"),
        (["--seed", "-1"], "-1 is not in the range from 0 to"),
        (["--no-such-option"], "No such option"),
    ],
)
def test_wrong_usage_exits_2(base, data, tmp_path, words, sentence):
    output = tmp_path / "run"
    result = invoke("prune", base, "--data", data, "--output", output, *words)
    check_refused(result, sentence, code=2)
    assert not output.exists()


def test_bad_input_to_prune_exits_1_with_a_sentence(base, data, tmp_path):
    def prune(model, source=data, *words):
        output = tmp_path / "out"
        return invoke("prune", model, "--data", source, "--output", output, *SMALL, *words)

    empty = tmp_path / "empty"
    empty.mkdir()
    check_refused(prune(empty), "is no Hugging Face model: it has no config.json")
    (empty / "config.json").write_text('{"model_type": "gpt2", "architectures": ["GPT2LMHead"]}')
    check_refused(prune(empty), "no \\*.safetensors weights")
    (empty / "pytorch_model.bin").write_bytes(b"x")
    check_refused(prune(empty), "only pickled weights")
    (empty / "model.safetensors").write_bytes(b"x")
    check_refused(prune(empty), "is a GPT2LMHead, .* Use LlamaForCausalLM, MistralForCausalLM")
    check_refused(prune(base, tmp_path / "nothing.txt"), "nothing.txt")
    check_refused(prune(base, data, "--seq-len", "999"), "longer than the 128 positions")
    assert not (tmp_path / "out").exists()


def test_a_run_is_not_overwritten_unasked(run, base, data):
    result = invoke("prune", base, "--data", data, "--output", run, *SMALL)
    check_refused(result, "already holds a run. .* --overwrite")
    check_refused(invoke("compact", run.parent), "No plan.json in .* Run 'lpdeploy prune")
    check_refused(invoke("verify", run), "No model in .* Run 'lpdeploy compact")
    assert invoke("compact", run).exit_code == 0
    check_refused(invoke("compact", run), "already exists")
    assert invoke("compact", run, "--overwrite").exit_code == 0


def test_debug_shows_the_traceback(tmp_path):
    result = invoke("compact", tmp_path, "--debug")
    assert result.exit_code == 1
    assert result.exception is not None
    assert type(result.exception).__name__ == "ArtifactError"


def test_being_terminated_is_being_interrupted():
    # So that `paper` stops the processes it started, and scratch folders go.
    before = signal.getsignal(signal.SIGTERM)
    try:
        CliRunner().invoke(main, ["doctor"])
        assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--engine", "ort,tensorflow"], "'tensorflow' is not one of 'torch', 'onnx', 'ort',"),
        (["--engine", "tf:int4"], "'tf' is not one of 'torch', 'onnx', 'ort', 'trt'"),
        (["--batch", "1,none"], "Invalid value for '--batch': 'none' is not a valid integer"),
        (["--batch", ","], "',' is empty. Give values, separated by commas"),
    ],
)
def test_bench_refuses_what_it_does_not_know(tmp_path, words, sentence):
    result = CliRunner().invoke(main, ["bench", "latency", str(tmp_path), *words])
    assert result.exit_code == 2
    assert sentence in " ".join(result.output.split())


def test_a_model_goes_to_ort_and_is_measured_there(tmp_path):
    model = make_tiny_model(
        tmp_path / "model", num_hidden_layers=1, head_dim=16, intermediate_size=64
    )
    text = make_text(tmp_path / "text.txt")
    words = ["export", str(model), "--engine", "ort", "--precision", "int8", "--json"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert (document["engine"], document["precision"]) == ("ort", "int8")
    options = ["--perplexity", str(text), "--seq-len", "32", "--json"]
    values = {}
    for engine in ("torch", "ort"):
        words = ["eval", str(model), "--engine", engine, *options]
        result = CliRunner().invoke(main, words)
        assert result.exit_code == 0, result.output
        measured = json.loads(result.stdout)
        values[engine] = next(iter(measured["perplexity"].values()))["perplexity"]
    assert values["ort"] != values["torch"]  # weights of 8 bits
    assert values["ort"] == pytest.approx(values["torch"], rel=0.05)


def test_another_rank_speaks_only_of_what_the_first_does_not(base, data, tmp_path, monkeypatch):
    """It waits, for the launcher ends it where the first rank fails too, and then speaks."""
    waited, handlers = [], {}
    monkeypatch.setattr("lpdeploy.cli.signals.time.sleep", waited.append)
    monkeypatch.setattr("lpdeploy.cli.signals.signal.signal", handlers.__setitem__)
    monkeypatch.setenv("RANK", "1")
    output = tmp_path / "none"
    words = ("prune", base, "--data", data, "--output", output, *SMALL)
    refused = invoke(*words, "--seq-len", "4096")
    check_refused(refused, "--seq-len 4096 is longer")
    check_refused(invoke(*words, "--micro-batch-size", "3"), "is no multiple of", code=2)
    assert waited == [5.0, 5.0]
    assert handlers[signal.SIGTERM] == signal.SIG_DFL
    monkeypatch.setenv("RANK", "0")
    first = invoke(*words, "--seq-len", "4096").stderr.splitlines()
    assert first == [f"Loading '{base}'.", *refused.stderr.splitlines()]
    assert len(waited) == 2


def test_another_rank_is_quiet(base, data, tmp_path, monkeypatch):
    handlers = {}
    monkeypatch.setattr("lpdeploy.cli.signals.signal.signal", handlers.__setitem__)
    monkeypatch.setenv("RANK", "1")
    words = ("prune", base, "--data", data, "--output", tmp_path / "run", *SMALL, "--json")
    result = invoke(*words)
    assert (result.exit_code, result.output) == (0, "")
    # Also where it is told to end before the first step: not even a sentence.
    assert handlers == {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.SIG_DFL}


def test_a_sharded_base_is_masked_unless_asked_otherwise(base, data, tmp_path):
    words = ("prune", base, "--data", data, "--output", tmp_path / "run", *SMALL, "--shard")
    result = invoke(*words)
    check_refused(result, "Groups are masked until the end")
    check_refused(result, "--shard spreads the base over several ranks, and this is the only one")
    check_refused(invoke(*words, "--removal", "cut"), "--shard cannot go with --removal", code=2)
