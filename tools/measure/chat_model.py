"""Make the tables of docs/smollm2.md with `lpdeploy paper`, or only the cells that are missing.

    python -m tools.measure.chat_model MODEL [STUDY ...] --c4 A.jsonl --held-out B.jsonl
        --wiki wiki.test.raw --tasks DIR --output docs/measurements/smollm2-135m
        [--rows ROWS] [--ratios RATIOS] [--seeds 1]

Without a STUDY, all are made. Quality is measured on the last 80 documents of B, on the beginning
of WikiText-2's test set and on the paper's seven tasks. A cell takes about 20 minutes of one core
that computes in bf16, and the recipe an hour. Cells that are in the output folder are not run
again. Then run `python tools/update_docs.py` to put the tables into the page.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from tools.measure.common import build_parser

HELD_OUT, SEGMENTS, SEGMENT, DOCUMENTS = 80, 60, 512, 100
TASKS = "boolq,piqa,hellaswag,winogrande,arc_easy,arc_challenge,openbookqa"
PRUNE = (
    "--steps 100 --batch-size 8 --micro-batch-size 4 --seq-len 256 --lora-dropout 0 "
    "--checkpoint-every 10 --lr 3e-3 --dtype bf16"
)
CRITERIA = "dense,magnitude,wanda,gradient,lora-8bit,lora,lora-groups,gate,recipe"
# Name -> table, rows and ratios.
STUDIES = {
    "criteria": ("5", CRITERIA, "0.33,0.5"),
    "joint": ("7", "joint,separate", "0.33,0.5"),
    "masks": ("figure-4", None, "0.1,0.2,0.3,0.4,0.5,0.6"),
}


def list_words(study: str, options: argparse.Namespace, *, held_out: Path) -> list[str]:
    """Return the words of one command."""
    table, rows, ratios = STUDIES[study]
    rows = options.rows or rows
    words = [sys.executable, "-m", "lpdeploy", "paper", table, options.model]
    words += ["--data", options.c4, "--output", str(options.output)]
    words += ["--seeds", str(options.seeds), "--ratios", options.ratios or ratios]
    words += ["--rows", rows] if rows else []
    if table != "figure-4":
        words += ["--perplexity", str(held_out), "--perplexity", options.wiki]
        words += ["--eval-seq-len", str(SEGMENT), "--max-segments", str(SEGMENTS)]
        words += ["--tasks", TASKS, "--task-data", options.tasks, "--limit", str(DOCUMENTS)]
    return [*words, "--", *PRUNE.split()]


def main() -> None:
    """Read the command line and run the studies in their order."""
    parser = build_parser(__doc__)
    parser.add_argument("model")
    parser.add_argument("studies", nargs="*", metavar="STUDY", help=", ".join(STUDIES))
    parser.add_argument("--c4", required=True, help="prune with this text")
    parser.add_argument("--held-out", required=True, type=Path, help="its end measures quality")
    parser.add_argument("--wiki", required=True)
    parser.add_argument("--tasks", required=True, help="folder with the data of the tasks")
    parser.add_argument("--rows")
    parser.add_argument("--ratios")
    parser.add_argument("--seeds", type=int, default=1)
    options = parser.parse_args()
    unknown = set(options.studies) - STUDIES.keys()
    if unknown:
        parser.error(f"no study '{sorted(unknown)[0]}'; choose from {', '.join(STUDIES)}")
    with tempfile.TemporaryDirectory() as scratch:
        held_out = Path(scratch) / "c4-held-out.jsonl"
        lines = options.held_out.read_text(encoding="utf-8").splitlines(keepends=True)
        held_out.write_text("".join(lines[-HELD_OUT:]), encoding="utf-8")
        for study in options.studies or STUDIES:
            done = subprocess.run(list_words(study, options, held_out=held_out), check=False)
            if done.returncode:
                sys.exit(done.returncode)


if __name__ == "__main__":
    main()
