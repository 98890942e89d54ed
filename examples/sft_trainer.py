"""Pruning while TRL's SFTTrainer fine-tunes: one callback.

python examples/sft_trainer.py MODEL TRAIN_TEXT OUTPUT
"""

import sys
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

import lpdeploy

STEPS = 20
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main(model: str, train: str, output: str) -> None:
    """Fine-tune and prune with a trainer, and write the dense result."""
    documents = Path(train).read_text(encoding="utf-8").split("<|endoftext|>")
    trainer = SFTTrainer(
        model=model,
        train_dataset=Dataset.from_dict({"text": documents}),
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules=LINEARS, task_type="CAUSAL_LM"),
        args=SFTConfig(
            output_dir=f"{output}-trainer", max_steps=STEPS, per_device_train_batch_size=4,
            max_length=64, learning_rate=1e-3, save_strategy="no", report_to="none",
            use_cpu=True, bf16=False, gradient_checkpointing=False,
        ),
    )  # fmt: skip
    lpdeploy.init_lora_by_groups(trainer.model)  # lets LoRA's gradients tell all groups apart
    config = lpdeploy.PruneConfig(ratio=0.5, prune_every=2, calibration_samples=8)
    pruner = lpdeploy.LoRAPruner(trainer.model, config, total_steps=STEPS, base=model)
    trainer.add_callback(lpdeploy.PruneCallback(pruner, output=output))
    trainer.train()
    print(lpdeploy.Run(output).compact().model)


if __name__ == "__main__":
    main(*sys.argv[1:])
