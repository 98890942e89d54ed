"""The pruner in a loop of one's own, in transformers' Trainer and in TRL's: as in our own loop."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import lpdeploy
from lpdeploy.data.batches import build_token_dataset, list_batch, split_batch
from lpdeploy.data.sources import load_corpus
from lpdeploy.errors import LpdeployError
from lpdeploy.families.groups import LINEARS
from lpdeploy.models.adapters import attach_lora
from lpdeploy.models.loading import load_config, load_tokenizer
from lpdeploy.pruning.schedule import compute_learning_rate

STEPS, BATCH, TOKENS, LR = 8, 4, 16, 1e-2
GIVEN = {
    "ratio": 0.5, "steps": STEPS, "batch_size": BATCH, "micro_batch_size": 2, "seq_len": TOKENS,
    "lr": LR, "prune_every": 2, "round_to": 4, "device": "cpu", "lora_dropout": 0.0, "seed": 3,
    "ramp": "paper", "lora_rank": 4, "lora_alpha": 8, "max_grad_norm": 0.5,
}  # fmt: skip


@pytest.fixture
def ours(base, data, tmp_path):
    config = lpdeploy.PruneConfig(**GIVEN)
    return config, lpdeploy.prune(base, data=data, output=tmp_path / "ours", config=config)


def build_model(base):
    model = AutoModelForCausalLM.from_pretrained(base)
    return attach_lora(model, rank=4, alpha=8, dropout=0.0, seed=3, init="groups")


def list_micros(base, data):
    """The micro-batches of our own loop, step by step."""
    tokenizer = load_tokenizer(base, load_config(base))
    rows = build_token_dataset(load_corpus(str(data)), tokenizer, seq_len=TOKENS)
    for step in range(STEPS):
        chosen = list_batch(len(rows), step=step, batch_size=BATCH, seed=3)
        yield [rows.collate(m) for m in split_batch(chosen, rows.lengths, micro_batch_size=2)]


def compute_rate(step):
    warmup = round(lpdeploy.PruneConfig(**GIVEN).lr_warmup * STEPS)
    return compute_learning_rate(step, steps=STEPS, peak=LR, warmup_steps=warmup)


def assert_same_groups(run, other):
    assert run.load_plan().kept == other.load_plan().kept
    run = lpdeploy.Run(run)
    run.compact()
    assert run.verify(engine="torch").ok


def test_a_loop_of_ones_own_keeps_the_same_groups(base, data, tmp_path, ours):
    config, expected = ours
    model = build_model(base)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=LR, weight_decay=0.0
    )
    pruner = lpdeploy.LoRAPruner(model, config, total_steps=STEPS)
    with pytest.raises(LpdeployError, match="still to be removed"):
        pruner.save(tmp_path / "early")
    for step, micros in enumerate(list_micros(base, data), start=1):
        targets = sum(int((micro["labels"][:, 1:] != -100).sum()) for micro in micros)
        with pruner.observe():
            for micro in micros:
                logits = model(**{k: micro[k] for k in ("input_ids", "attention_mask")}).logits
                loss = torch.nn.functional.cross_entropy(
                    logits[:, :-1].flatten(0, 1), micro["labels"][:, 1:].flatten(), reduction="sum"
                )
                (loss / targets).backward()
        pruner.score()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = compute_rate(step)
        optimizer.step()
        optimizer.zero_grad()
        assert pruner.prune(optimizer) == (step in pruner.schedule.list_events())
    assert pruner.is_complete
    assert pruner.ratio == 0.5
    run = pruner.save(tmp_path / "run")
    assert_same_groups(run, expected)


@pytest.mark.parametrize("criterion", ["lora", "gate", "wanda", "gradient", "magnitude"])
@pytest.mark.parametrize("schedule", ["joint", "separate"])
def test_step_does_it_all(base, data, tmp_path, criterion, schedule):
    config = lpdeploy.PruneConfig(**{**GIVEN, "criterion": criterion, "schedule": schedule})
    model = build_model(base)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR)
    pruner = lpdeploy.LoRAPruner(model, config, total_steps=STEPS)
    steps = list(list_micros(base, data))
    if schedule == "separate":
        with pytest.raises(LpdeployError, match="calibrate first"):
            pruner.save(tmp_path / "run")
        pruner.calibrate(micro for micros in steps[:2] for micro in micros)
        assert pruner.is_complete
    for micros in steps:
        with pruner.observe():
            for micro in micros:
                model(**micro).loss.backward()
        pruner.step(optimizer)
    run = lpdeploy.Run(pruner.save(tmp_path / "run"))
    assert run.load_plan().achieved["groups"] == 0.5
    run.compact()
    assert run.verify(engine="torch").ok
    run.report()  # a run without a log of steps has a page too


def make_trainer(base, data, trainer_class, arguments, **given):
    """A trainer over the rows of our own loop, in its order and with its rate."""
    rows = [
        {"input_ids": ids.tolist(), "labels": labels.tolist()}
        for micros in list_micros(base, data)
        for micro in micros
        for ids, labels in zip(micro["input_ids"], micro["labels"], strict=True)
    ]
    model = build_model(base)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=LR, weight_decay=0.0
    )
    rate = LambdaLR(optimizer, lambda done: compute_rate(done + 1) / LR)

    class InOrder(trainer_class):
        def _get_train_sampler(self, *_):
            return SequentialSampler(self.train_dataset)

    return InOrder(
        model=model, args=arguments, train_dataset=Dataset.from_list(rows),
        optimizers=(optimizer, rate), **given,
    )  # fmt: skip


def build_arguments(kind, folder, **more):
    return kind(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=2,
        gradient_accumulation_steps=BATCH // 2, max_grad_norm=0.5, save_strategy="no",
        report_to="none", use_cpu=True, disable_tqdm=True, **more,
    )  # fmt: skip


def test_in_a_trainer_the_same_groups_are_kept(base, data, tmp_path, ours):
    config, expected = ours
    arguments = build_arguments(TrainingArguments, tmp_path / "trainer")
    trainer = make_trainer(base, data, Trainer, arguments)
    pruner = lpdeploy.LoRAPruner(trainer.model, config, total_steps=STEPS)
    trainer.add_callback(lpdeploy.PruneCallback(pruner, output=tmp_path / "run"))
    trainer.train()
    assert arguments.max_grad_norm == 0.5  # given back
    assert_same_groups(lpdeploy.Run(tmp_path / "run"), expected)


@pytest.mark.slow
def test_in_trls_trainer_the_same_groups_are_kept(base, data, tmp_path, ours):
    trl = pytest.importorskip("trl")
    config, expected = ours
    arguments = build_arguments(
        trl.SFTConfig, tmp_path / "trainer", bf16=False, gradient_checkpointing=False,
        max_length=TOKENS, dataset_kwargs={"skip_prepare_dataset": True},
    )  # fmt: skip
    tokenizer = load_tokenizer(base, load_config(base))
    tokenizer.pad_token = tokenizer.eos_token
    trainer = make_trainer(base, data, trl.SFTTrainer, arguments, processing_class=tokenizer)
    pruner = lpdeploy.LoRAPruner(trainer.model, config, total_steps=STEPS)
    trainer.add_callback(lpdeploy.PruneCallback(pruner, output=tmp_path / "run"))
    trainer.train()
    assert_same_groups(lpdeploy.Run(tmp_path / "run"), expected)


def test_a_trainer_calibrates_where_the_schedule_asks(base, data, tmp_path):
    config = lpdeploy.PruneConfig(
        **{**GIVEN, "schedule": "separate", "ramp": "early"}, calibration_samples=6
    )
    arguments = build_arguments(TrainingArguments, tmp_path / "trainer")
    trainer = make_trainer(base, data, Trainer, arguments)
    pruner = lpdeploy.LoRAPruner(trainer.model, config, total_steps=STEPS)
    trainer.add_callback(lpdeploy.PruneCallback(pruner, output=tmp_path / "run"))
    trainer.train()
    assert lpdeploy.Run(tmp_path / "run").load_plan().achieved["groups"] == 0.5


def test_a_training_of_another_length_is_refused(base, data, tmp_path):
    arguments = build_arguments(TrainingArguments, tmp_path / "trainer")
    trainer = make_trainer(base, data, Trainer, arguments)
    pruner = lpdeploy.LoRAPruner(trainer.model, lpdeploy.PruneConfig(**GIVEN), total_steps=99)
    trainer.add_callback(lpdeploy.PruneCallback(pruner))
    with pytest.raises(LpdeployError, match="total_steps=8"):
        trainer.train()


@pytest.mark.parametrize(
    ("init", "options", "said"),
    [
        ("peft", {}, True),
        ("groups", {}, False),
        ("peft", {"lora_init": "peft"}, False),
        ("peft", {"criterion": "gate"}, False),
        ("peft", {"criterion": "gate", "lora_init": "groups"}, False),
        ("heads alone", {}, True),
    ],
)
def test_a_start_that_cannot_tell_groups_apart_is_named(base, caplog, init, options, said):
    model = attach_lora(
        AutoModelForCausalLM.from_pretrained(base), rank=4, alpha=8, dropout=0.0, seed=3, init=init
    )
    if init == "heads alone":
        lpdeploy.init_lora_by_groups(model)
        for name, parameter in model.named_parameters():
            if "down_proj.lora_B" in name:
                torch.nn.init.zeros_(parameter)
    lpdeploy.LoRAPruner(model, lpdeploy.PruneConfig(**{**GIVEN, **options}), total_steps=8)
    assert ("init_lora_by_groups" in caplog.text) == said


def test_what_cannot_be_pruned_is_refused(base):
    plain = AutoModelForCausalLM.from_pretrained(base)
    with pytest.raises(ValueError, match="no LoRA adapter"):
        lpdeploy.LoRAPruner(plain, total_steps=8)
    few = get_peft_model(plain, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="have no LoRA, first .*target_modules"):
        lpdeploy.LoRAPruner(few, total_steps=8)
    plain = AutoModelForCausalLM.from_pretrained(base)
    scaled = get_peft_model(plain, LoraConfig(target_modules=list(LINEARS), use_rslora=True))
    with pytest.raises(ValueError, match="plain LoRA"):
        lpdeploy.LoRAPruner(scaled, total_steps=8)
    with pytest.raises(ValueError, match="total_steps is 0"):
        lpdeploy.LoRAPruner(build_model(base), total_steps=0)
