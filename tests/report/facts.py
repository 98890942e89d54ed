"""What is known of made-up runs."""

from lpdeploy.benchmark.results import LatencyResult, LatencyRow
from lpdeploy.evaluation.results import Evaluation, Figures, Perplexity
from lpdeploy.machine import describe_machine
from lpdeploy.models.record import ModelRecord
from lpdeploy.plan import GroupSpec, PruningPlan, Slice
from lpdeploy.report.facts import Facts
from lpdeploy.report.forms import list_forms
from lpdeploy.run_folder import RunFolder

BEFORE, AFTER = 1000, 600


def make_row(**changes):
    """A row of bench.json, of the dense model where nothing else is said."""
    values = {
        "model": "m", "ratio": 0.0, "engine": "torch", "precision": "fp32", "merged": True,
        "phase": "decode", "tokens": 8, "batch": 1, "median_ms": 2.1, "p10_ms": 2.0, "p90_ms": 2.2,
        "tokens_per_s": 500.0, "relative": 1.0, "limit_share": None, "peak_bytes": None,
        "repeats": 3, "parameters": 10, "bytes": 40,
    }  # fmt: skip
    return LatencyRow(**{**values, **changes})


def make_bench(*rows):
    return LatencyResult(describe_machine(), {}, rows)


def make_record():
    return ModelRecord(
        base_model="b", base_sha256="x", plan_sha256="p", ratio=0.5, achieved={}, merged=True,
        architecture="LlamaForCausalLM", parameters={"before": BEFORE, "after": AFTER},
        bytes={"before": 4000, "after": 2400}, heads=[2], kv_heads=[2], channels=[4], sha256="m",
    )  # fmt: skip


def make_figures(perplexity=None, *, accuracy=None, tokens=30):
    texts = {"t/v.txt": Perplexity(perplexity, 1.0, tokens)} if perplexity is not None else {}
    tasks = {"piqa": {"acc": accuracy, "n": 10.0}} if accuracy is not None else {}
    return Figures(texts, tasks)


def make_evaluation(figures, *, base=None, engine="torch", precision="fp32", seq_len=16):
    return Evaluation(
        model="m", model_sha256="m", engine=engine, precision=precision, seq_len=seq_len,
        figures=figures, base=base,
    )  # fmt: skip


def make_plan(*, kept=(0, 2), dropped=(), layers=2, base_sha256="x"):
    specs, keep = [], {}
    for layer in range(layers):
        for kind in ("heads", "channels"):
            piece = Slice(f"model.layers.{layer}.{kind}", 1, 1)
            specs.append(GroupSpec(f"layers.{layer}.{kind}", 4, (piece,)))
            keep[specs[-1].name] = [] if layer in dropped else list(kept)
    achieved = {"parameters": 0.4, "heads": 0.5, "channels": 0.5, "layers": 0.0, "groups": 0.5}
    return PruningPlan("b", base_sha256, 0.5, tuple(specs), keep, achieved)


def make_facts(
    *evaluations, folder="run", bench=None, verification=None, record=None, exports=None, plan=None
):
    record = record or make_record()
    return Facts(
        run=RunFolder(folder),
        plan=plan or make_plan(),
        method="chosen by chance, without fine-tuning",
        stages={},
        model=record,
        evaluations=evaluations,
        bench=bench,
        verification=verification,
        forms=list_forms(record, evaluations, bench, exports or {}),
    )
