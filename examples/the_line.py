"""The whole line from Python: prune, compact, export, verify, evaluate.

python examples/the_line.py MODEL TRAIN_TEXT VALID_TEXT OUTPUT
"""

import logging
import sys

import lpdeploy


def main(model: str, train: str, valid: str, output: str) -> None:
    """Prune half of a model and export the result for ONNX Runtime."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config = lpdeploy.PruneConfig(
        ratio=0.5, steps=20, batch_size=4, micro_batch_size=4, seq_len=64, lr=1e-3, prune_every=2,
        calibration_samples=8,
    )  # fmt: skip
    run = lpdeploy.prune(model, data=train, output=output, config=config)
    run.compact()
    run.export("ort")
    for pair in run.verify(engine="ort").pairs:
        print(f"{pair.a} = {pair.b}: largest difference {pair.max_abs_diff:.1e}")
    run.evaluate(perplexity=[valid], seq_len=64, with_base=True)
    print(run.generate(["once upon a time"], max_new_tokens=20)[0])


if __name__ == "__main__":
    main(*sys.argv[1:])
