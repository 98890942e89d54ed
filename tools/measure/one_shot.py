"""Measure what pruning without any training costs: channels, layers, heads, with and without refit.

    python -m tools.measure.one_shot MODEL --train a.jsonl --valid b.jsonl --documents 100
        --output docs/measurements/one-shot-NAME.json [--study criteria] [--dtype bf16] [ROW ...]

The study `ways` has channels, layers and heads, with and without a refit; `criteria` has heads
alone and channels alone, by several scores. Perplexity is that of the last documents of the second
file, in segments of 256 tokens. Rows that are in the JSON already are not run again.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import lpdeploy
from lpdeploy.evaluation.evaluate import evaluate
from lpdeploy.evaluation.options import EvalOptions
from lpdeploy.models.loading import load_config
from lpdeploy.models.shapes import count_parameters
from tools.measure.common import build_parser, save_measurement

SEQ_LEN = 256
OPTIONS = {
    "schedule": "one-shot", "criterion": "gate", "seq_len": SEQ_LEN, "batch_size": 16,
    "lora_dropout": 0.0, "calibration_samples": 128,
}  # fmt: skip
REFIT = {"refit": True, "refit_samples": 128}
# About a fifth and a third of the weights of SmolLM2's layers.
CHANNELS, MORE_CHANNELS = ({"head_ratio": 0.0, "channel_ratio": share} for share in (0.29, 0.44))
LAYERS, MORE_LAYERS = ({"ratio": 0.0, "drop_layers": count} for count in (7, 10))
OBS = {"criterion": "obs", **REFIT}
# A third of the KV heads, or of the channels, by each criterion, and nothing else.
KINDS = {
    "heads": {"head_ratio": 0.33, "channel_ratio": 0.0},
    "channels": {"head_ratio": 0.0, "channel_ratio": 0.33},
}
SCORES: dict[str, dict[str, Any]] = {
    "lora-as-peft": {"criterion": "lora", "lora_init": "peft"},
    "lora": {"criterion": "lora"},
    "lora-normalized": {"criterion": "lora", "normalize": True},
    "gradient": {"criterion": "gradient"},
    "gradient-normalized": {"criterion": "gradient", "normalize": True},
    "wanda": {"criterion": "wanda"},
    "gate": {"criterion": "gate"},
    "magnitude": {"criterion": "magnitude"},
}
ROWS: dict[str, dict[str, Any]] = {
    "channels-refit": {**CHANNELS, **REFIT},
    "channels-obs-refit": {**CHANNELS, **OBS},
    "layers-refit": {**LAYERS, **REFIT},
    "channels": CHANNELS,
    "layers": LAYERS,
    "more-channels-refit": {**MORE_CHANNELS, **REFIT},
    "more-layers-refit": {**MORE_LAYERS, **REFIT},
    "heads-refit": {"ratio": 0.2, **REFIT},
    # Tries KV heads, query heads and channels alone, at as many parameters.
    "heads-auto-refit": {"ratio": 0.2, "heads": "auto", **REFIT},
    "auto-obs-refit": {"ratio": 0.2, "depth": "auto", **OBS},
    "more-channels-obs-refit": {**MORE_CHANNELS, **OBS},
    "more-auto-obs-refit": {"ratio": 0.33, "depth": "auto", **OBS},
}
CRITERIA_ROWS = {
    f"{kind}-by-{name}": {**ratios, **options}
    for kind, ratios in KINDS.items()
    for name, options in SCORES.items()
}
STUDIES = {"ways": ROWS, "criteria": CRITERIA_ROWS}


def take_last(source: Path, documents: int, folder: Path) -> Path:
    """Copy the last lines of a file."""
    lines = source.read_text(encoding="utf-8").splitlines()[-documents:]
    path = folder / source.name
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def measure_row(
    model: str, train: str, valid: Path, shared: dict[str, Any], options: dict[str, Any]
) -> dict[str, Any]:
    """Prune once, and measure what is left."""
    with tempfile.TemporaryDirectory() as scratch:
        config = lpdeploy.PruneConfig(**{**shared, **options})
        run = lpdeploy.prune(model, train, Path(scratch) / "run", config=config)
        record = run.compact().record
        plan = run.load_plan()
        stage = json.loads((run.path / "manifest.json").read_text())["stages"]["prune"]
        target = run.path / "target.json"
        found = run.evaluate(perplexity=[str(valid)], seq_len=SEQ_LEN).figures
        return {
            "options": options,
            "achieved": dict(plan.achieved),
            "parameters": dict(record.parameters),
            "perplexity": found.perplexity[str(valid)].perplexity,
            "tokens": found.perplexity[str(valid)].tokens,
            "seconds": stage["seconds"],
            "trials": json.loads(target.read_text()).get("trials") if target.exists() else None,
        }


def main() -> None:
    """Read the command line, and run the rows that are missing."""
    parser = build_parser(__doc__)
    parser.add_argument("model")
    parser.add_argument("rows", nargs="*", metavar="ROW")
    parser.add_argument("--study", choices=STUDIES, default="ways")
    parser.add_argument("--dtype", default="auto", help="what the scores are computed in")
    parser.add_argument("--train", required=True)
    parser.add_argument("--valid", type=Path, required=True)
    parser.add_argument("--documents", type=int, default=100)
    options = parser.parse_args()
    shared = OPTIONS if options.dtype == "auto" else {**OPTIONS, "dtype": options.dtype}
    rows = STUDIES[options.study]
    known = json.loads(options.output.read_text()) if options.output.exists() else {}
    document: dict[str, Any] = {
        "model": Path(options.model).name,
        "parameters": count_parameters(load_config(Path(options.model))),
        "shared_options": {**shared, "documents": options.documents},
        "dense": known.get("dense"),
        "rows": known.get("rows", {}),
    }
    with tempfile.TemporaryDirectory() as scratch:
        valid = take_last(options.valid, options.documents, Path(scratch))
        if document["dense"] is None:
            wanted = EvalOptions(perplexity=(str(valid),), seq_len=SEQ_LEN)
            found = evaluate(options.model, wanted).figures
            document["dense"] = found.perplexity[str(valid)].perplexity
        for name in options.rows or rows:
            if name not in document["rows"]:
                row = measure_row(options.model, options.train, valid, shared, rows[name])
                document["rows"][name] = row
                print(f"{name}: {row['perplexity']:.2f}", flush=True)
                save_measurement(options.output, document)


if __name__ == "__main__":
    main()
