"""Make the tables of docs/results.md with `lpdeploy paper`, or only those that are missing.

    python -m tools.measure.results MODEL [STUDY ...] --train train.txt --valid valid.txt
        --output DIR [--seeds 3] [--jobs 2] [-- PRUNE_OPTIONS ...]

Cells that are already in DIR are not run again, so you can stop the script at any time and start it
again. Then run `python tools/update_docs.py` to put the tables into the page.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

PRUNE = "--steps {steps} --batch-size {batch} --micro-batch-size {batch} --seq-len 256"
PRUNE_REST = "--lora-dropout 0 --checkpoint-every 50"
OWN_RATES = ("refit", "recovery", "rates", "recipe", "settings")  # their rows have learning rates
CRITERIA = "dense,lora,lora-groups,gradient,gate,magnitude,wanda,random,lora-8bit"
RAMPS = "early,separate,separate-hold"

# Name -> table, steps, folder below DIR ("" is DIR itself) and options of `lpdeploy paper`, the
# most wanted first. A table with another number of steps has its own folder.
STUDIES: dict[str, tuple[str, int, str, list[str]]] = {
    "criteria-50": ("2", 200, "", ["--ratios", "0.5", "--rows", CRITERIA]),
    "masks": ("figure-4", 200, "", []),
    "joint-50": ("7", 200, "", ["--ratios", "0.5"]),
    "ramps-50": ("ramps", 200, "", ["--ratios", "0.5", "--rows", f"authors,{RAMPS}"]),
    "forms": ("forms", 200, "", []),
    "criteria": ("2", 200, "", ["--ratios", "0.2,0.5", "--rows", CRITERIA]),
    "joint": ("7", 200, "", []),
    "ramps": ("ramps", 200, "", ["--rows", RAMPS]),
    "ramps-600": ("ramps", 600, "steps-600", ["--rows", RAMPS]),
    "every": ("8", 200, "", []),
    "average": ("figure-6", 200, "", []),
    "refit-50": ("refit", 200, "", ["--ratios", "0.5"]),
    "refit": ("refit", 200, "", []),
    "recovery": ("recovery", 200, "recovery", []),
    "rates": ("rates", 200, "recovery", []),
    "recipe": ("recipe", 200, "recovery", []),
    "settings": ("settings", 200, "recovery", []),
    "recipe-100": ("recipe", 100, "recovery/steps-100", ["--ratios", "0.5"]),
    "recipe-600": ("recipe", 600, "recovery/steps-600", ["--ratios", "0.5"]),
    "ramps-2000": ("ramps", 2000, "steps-2000", ["--rows", "early,separate"]),
    "cost": ("4", 30, "cost", []),
    "cost-offload": ("6", 30, "cost", []),
}


def list_words(name: str, options: argparse.Namespace) -> list[str]:
    """Return the words of one command."""
    table, steps, folder, own = STUDIES[name]
    words = [sys.executable, "-m", "lpdeploy", "paper", table, options.model]
    words += ["--data", options.train, "--output", str(options.output / folder), *own]
    words += ["--seeds", str(options.seeds)]
    if table != "figure-4":
        words += ["--perplexity", options.valid, "--eval-seq-len", "256"]
    if table not in ("4", "6"):  # these hold times, so their cells run alone
        words += ["--jobs", str(options.jobs)]
    prune = f"{PRUNE.format(steps=steps, batch=options.batch_size)} {PRUNE_REST}"
    own = [] if table in OWN_RATES else ["--lr", "1e-3"]
    own += ["--round-to", "16"] if folder.startswith("recovery") else []
    return [*words, "--", *prune.split(), *own, *options.prune_options]


def main() -> None:
    """Read the command line and run the studies in their order."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("studies", nargs="*", metavar="STUDY", help=", ".join(STUDIES))
    parser.add_argument("--train", required=True)
    parser.add_argument("--valid", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--jobs", type=int, default=1)
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    options = parser.parse_args(words[:end])
    options.prune_options = words[end + 1 :]
    unknown = set(options.studies) - STUDIES.keys()
    if unknown:
        parser.error(f"no study '{sorted(unknown)[0]}'; choose from {', '.join(STUDIES)}")
    # Cells that run side by side get one thread each, or they would compete for the cores.
    threads = {"OMP_NUM_THREADS": "1"} if options.jobs > 1 else {}
    for name in options.studies or STUDIES:
        print(f"== {name}", file=sys.stderr, flush=True)
        done = subprocess.run(list_words(name, options), env={**os.environ, **threads}, check=False)
        if done.returncode:
            sys.exit(done.returncode)


if __name__ == "__main__":
    main()
