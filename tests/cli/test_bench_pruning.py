"""`lpdeploy bench pruning`: what it hands on, and wrong usage."""

import json

import pytest
from click.testing import CliRunner

from lpdeploy.benchmark import pruning_stage
from lpdeploy.benchmark.results import PruningResult
from lpdeploy.cli.main import main
from lpdeploy.machine import describe_machine
from lpdeploy.records import read_record

ROW = {
    "criterion": "lora", "load_in": None, "offload_gradients": False, "step_ms": 2000.0,
    "p10_ms": 1900.0, "p90_ms": 2100.0, "scoring_ms": 20.0, "cutting_ms": 5.0, "after_ms": 900.0,
    "relative_time": 0.7, "relative_memory": None, "relative_beside": None, "peak_bytes": 10**9,
    "beside_bytes": 10**8, "planned_bytes": 10**9, "flops": 1e12, "after_flops": 6e11,
    "precision": "fp32", "tokens_per_s": 1024.0, "after_bytes": 10**8, "weight_bytes": 10**8,
    "steps": 3, "total_s": {"training": 2.0, "scoring": 0.2, "cutting": 0.1},
}  # fmt: skip
SETTING = {
    "layers": 2, "hidden_size": 32, "batch_size": 6, "micro_batch_size": 3, "seq_len": 32,
    "gradient_checkpointing": True, "ratio": 0.2, "interleaved": True,
}  # fmt: skip
RESULT = {"machine": describe_machine().to_json(), "workload": SETTING, "rows": [ROW]}


def invoke(*words):
    return CliRunner().invoke(main, ["bench", "pruning", *words])


def test_options_reach_the_workload_and_json_is_all_of_stdout(tmp_path, monkeypatch):
    seen = {}

    def bench(model, workload, **arguments):
        seen.update(model=model, workload=workload, **arguments)
        return read_record(PruningResult, RESULT)

    monkeypatch.setattr(pruning_stage, "bench_pruning", bench)
    done = invoke(
        "m", "--criterion", "lora,gate", "--load-in", "8bit", "--steps", "4", "--batch-size", "6",
        "--micro-batch-size", "3", "--seq-len", "32", "--ratio", "0.2", "--gradient-checkpointing",
        "--data", "d.txt", "--output", str(tmp_path), "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == RESULT
    assert "0.70" in done.stderr
    assert (seen["model"], seen["data"], seen["output"]) == ("m", "d.txt", tmp_path)
    assert (seen["criteria"], seen["load_in"]) == (("lora", "gate"), ("8bit",))
    options = seen["workload"].options
    assert seen["workload"].steps == 4
    assert (options.batch_size, options.micro_batch_size, options.seq_len) == (6, 3, 32)
    assert (options.ratio, options.gradient_checkpointing) == (0.2, True)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--criterion", "loa"], "'--criterion': 'loa' is not one of 'lora', 'gate', "),
        (
            ["--criterion", ","],
            "Invalid value for '--criterion': ',' is empty. Give values",
        ),
        (["--batch-size", "4", "--micro-batch-size", "3"], "no multiple of --micro-batch-size 3"),
        (["--ratio", "1"], "Invalid value for '--ratio'"),
    ],
)
def test_wrong_usage_is_named(words, sentence):
    done = invoke("m", *words)
    assert done.exit_code == 2
    assert sentence in done.stderr
