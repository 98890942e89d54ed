"""Any two options that are offered work together, or are refused together.

Every pair of values of two options occurs in at least one row. A row is pruned, compacted and
verified on the smallest model. Rows that the config refuses are no rows: what it refuses is a
sentence, which other tests hold.
"""

import dataclasses
import itertools
import json

import pytest
import torch
from allpairspy import AllPairs
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lpdeploy.config import PruneConfig
from lpdeploy.criteria import CRITERIA
from lpdeploy.engines.verify import verify
from lpdeploy.families import FAMILIES
from lpdeploy.fields import get_kind, get_option
from lpdeploy.models.compact import compact
from lpdeploy.plan import SCHEDULES
from lpdeploy.pruning import compilation
from lpdeploy.pruning.run import prune
from lpdeploy.ramps import RAMPS
from tests.helpers import make_text, make_tiny_model

pytestmark = pytest.mark.slow

OPTIONS = {
    "ratio": (0.5, 0.2),
    "head_ratio": (None, 0.0),
    "channel_ratio": (None, 0.6),
    "scope": ("layer", "global"),
    "protect_first": (0, 1),
    "drop_layers": (None, 1),
    "heads": ("kv-groups", "query-heads"),
    "round_to": (4, 16),
    "round_heads_to": (1, 2),
    "removal": (None, "cut", "mask"),
    "criterion": tuple(CRITERIA),
    "score_form": ("squared", "absolute"),
    "normalize": (False, True),
    "schedule": tuple(SCHEDULES),
    "refit": (False, True),
    "distill": (None, 0.5),
    "distill_live": (False, True),
    "calibration_samples": (None, 0, 3),
    "prune_every": (1, 2),
    "ramp": tuple(RAMPS),
    "batch_size": (2, 1),
    "lora_rank": (8, 2),
    "lora_dropout": (0.0, 0.05),
    "lora_init": (None, "peft", "groups"),
    "train_on_prompt": (False, True),
    "prompt_format": (None, "chat-template", "instruction"),
    "eval_every": (None, 2),
    "load_in": (None, "8bit", "4bit"),
    "offload_gradients": (False, True),
    "gradient_checkpointing": (False, True),
    "compile": (False, True),
    "checkpoint_every": (0, 1),
    "dtype": ("auto", "fp32", "bf16"),
}
MODELS = {
    "family": tuple(FAMILIES),
    "stored": (torch.float32, torch.bfloat16, torch.float16),
    "config says so": (True, False),
    "tied": (False, True),
    "data": ("text", "instructions"),
    "keep_adapter": (False, True),
}
LEFT_OUT = {
    "shard": "needs several ranks",
    "device": "is cpu here",
    "latency_phase": "belongs to a budget, which becomes ratios before anything else",
    "engine": "belongs to a budget",
    "depth": "becomes `drop_layers` before anything else, as a budget becomes ratios",
    "ignore_memory": "changes no computation",
}
FIXED = {"steps": 4, "micro_batch_size": 1, "seq_len": 128, "device": "cpu", "lr": 1e-2}
BYTES = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
NAMES = (*OPTIONS, *MODELS)


def build(values):
    given = {name: value for name, value in values.items() if name in OPTIONS}
    return PruneConfig(**given, **FIXED)


def is_offered(row):
    try:
        build(dict(zip(NAMES, row, strict=False)))
    except ValueError:
        return False
    return True


def list_rows():
    values = {**OPTIONS, **MODELS}
    rows = [
        dict(zip(NAMES, row, strict=True))
        for row in AllPairs(list(values.values()), filter_func=is_offered)
    ]
    # The library gives up on a pair that fits into none of the rows it has begun.
    missing = [
        {one: first, other: second}
        for one, other in itertools.combinations(NAMES, 2)
        for first, second in itertools.product(values[one], values[other])
        if all((row[one], row[other]) != (first, second) for row in rows)
    ]
    return rows + pack(missing, {name: choices[0] for name, choices in values.items()})


def pack(pairs, default):
    """Put pairs of values into few rows: each row takes every pair that it can."""
    rows, left = [], pairs
    while left:
        chosen, later = {}, []
        for pair in left:
            fits = all(chosen.get(name, value) == value for name, value in pair.items())
            if fits and is_offered({**default, **chosen, **pair}.values()):
                chosen |= pair
            elif chosen:
                later.append(pair)  # where nothing is chosen yet, the pair itself is refused
        rows += [{**default, **chosen}] if chosen else []
        left = later
    return rows


ROWS = list_rows()


def make_base(folder, row):
    make_tiny_model(
        folder, model_type=row["family"], vocab_size=len(BYTES) + 8, kv_heads=2, hidden_size=64,
        head_dim=16, intermediate_size=64, tie_word_embeddings=row["tied"], num_hidden_layers=3,
    )  # fmt: skip
    # For Qwen2, transformers makes bytes of text, whatever the files say; so all have bytes.
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(BYTES)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    if row["prompt_format"] == "chat-template":
        (folder / "chat_template.jinja").write_text(
            "{% for turn in messages %}{{ '<s>' + turn['content'] + '</s>' }}{% endfor %}"
        )
    path = folder / "model.safetensors"
    tensors = {name: tensor.to(row["stored"]) for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    if row["config says so"]:
        config = json.loads((folder / "config.json").read_text())
        config["dtype"] = str(row["stored"]).removeprefix("torch.")
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def make_data(folder, kind):
    if kind == "text":
        return make_text(folder / "text.txt")
    rows = [{"instruction": f"{n}", "response": "ok"} for n in range(40)]
    (folder / "data.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder / "data.jsonl"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["criterion"])
def test_a_row_of_options(row, tmp_path, monkeypatch):
    # It matters here what is compiled, not the C++ compiler, which takes most of the time.
    monkeypatch.setattr(compilation, "BACKEND", "aot_eager")
    base = make_base(tmp_path / "base", row)
    data = make_data(tmp_path, row["data"])
    valid = str(data) if row["eval_every"] else None
    prune(str(base), tmp_path / "run", data=str(data), valid=valid, options=build(row))
    compact(tmp_path / "run")
    if row["keep_adapter"]:
        compact(tmp_path / "run", keep_adapter=True)
    assert verify(tmp_path / "run", engine="torch").ok


def test_every_pair_that_is_offered_beside_the_defaults_is_in_a_row():
    values = {**OPTIONS, **MODELS}
    default = {name: choices[0] for name, choices in values.items()}
    for one, other in itertools.combinations(NAMES, 2):
        covered = {(row[one], row[other]) for row in ROWS}
        for pair in set(itertools.product(values[one], values[other])) - covered:
            assert not is_offered({**default, one: pair[0], other: pair[1]}.values())


def test_every_option_that_is_a_choice_is_in_the_table():
    fields = dataclasses.fields(PruneConfig)
    choices = {f.name for f in fields if get_kind(f) is bool or get_option(f).choices}
    assert choices - OPTIONS.keys() == LEFT_OUT.keys() - {"engine"}
    for field in fields:
        if field.name in OPTIONS and get_option(field).choices:
            assert set(get_option(field).choices) - {"auto"} <= set(OPTIONS[field.name])
