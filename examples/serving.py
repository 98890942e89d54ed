"""From a run to a ready-to-serve folder, and an answer from it.

python examples/serving.py RUN OUTPUT
"""

import sys
from pathlib import Path

import lpdeploy


def main(folder: str, output: str) -> None:
    """Package a compacted run for vLLM, transformers serve and SGLang, and ask the model."""
    run = lpdeploy.Run(folder)
    run.package("vllm", Path(output))
    print((Path(output) / "README.md").read_text(encoding="utf-8"))
    print(run.generate(["once upon a time"], max_new_tokens=20, temperature=0.7, seed=1)[0])


if __name__ == "__main__":
    main(*sys.argv[1:])
