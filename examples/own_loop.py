"""Pruning inside a training loop of one's own: three lines of lpdeploy in plain PyTorch.

python examples/own_loop.py MODEL TRAIN_TEXT OUTPUT
"""

import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import lpdeploy

STEPS, ROWS, TOKENS = 20, 4, 64
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main(model_folder: str, train: str, output: str) -> None:
    """Fine-tune with LoRA, prune while doing so, and write the dense result."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=LINEARS))
    lpdeploy.init_lora_by_groups(model)  # lets LoRA's gradients tell all groups apart
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    tokens = torch.tensor(tokenizer(Path(train).read_text(encoding="utf-8"))["input_ids"])
    batches = tokens[: STEPS * ROWS * TOKENS].view(STEPS, ROWS, TOKENS)

    config = lpdeploy.PruneConfig(ratio=0.5, ramp="paper", prune_every=2)
    pruner = lpdeploy.LoRAPruner(model, config, total_steps=STEPS)
    for ids in batches:
        with pruner.observe():
            model(input_ids=ids, labels=ids).loss.backward()
        pruner.step(optimizer)  # scores, steps the optimizer, and removes groups when it is time

    pruner.save(output)
    print(lpdeploy.Run(output).compact().model)


if __name__ == "__main__":
    main(*sys.argv[1:])
