"""The model card: its figures are right, and its snippet runs as it stands."""

import json
import re
import shutil

import pytest
import torch
import yaml

from lpdeploy.manifest import record_stage
from lpdeploy.models.compact import compact
from lpdeploy.models.loading import load_model
from tests.models.families import (
    build_reference,
    choose_kept,
    compute_logits,
    make_base,
    make_run,
)

CLOSE = {"rtol": 0, "atol": 1e-5}  # float32 sums in another order; a wrong row changes 0.1 and more


def make_card(bases, tmp_path, family, *, keep_adapter=False, **counts):
    kept = choose_kept(bases(family), **counts)
    run = make_run(tmp_path / "run", bases(family), kept)
    result = compact(run, keep_adapter=keep_adapter)
    text = (tmp_path / "run" / ("unmerged" if keep_adapter else "model") / "README.md").read_text()
    return text, result, build_reference(bases(family), kept, run / "adapter")


def run_snippet(card):
    """Run the card's code as a reader would, and return what it names."""
    (snippet,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    scope = {}
    exec(snippet, scope)
    return scope


@pytest.mark.parametrize("keep_adapter", [False, True])
@pytest.mark.parametrize("heads", [2, 3])
def test_the_snippet_of_a_stock_model_runs(bases, tmp_path, heads, keep_adapter):
    card, _, reference = make_card(
        bases, tmp_path, "llama-mha", heads=heads, channels=20, keep_adapter=keep_adapter
    )
    assert "trust_remote_code" not in card
    scope = run_snippet(card)
    expected = compute_logits(reference)
    torch.testing.assert_close(compute_logits(scope["model"].eval()), expected, **CLOSE)
    assert scope["tokenizer"]("w0 w1")["input_ids"] == [3, 4]


def test_the_snippet_of_a_relative_folder_runs_where_it_was_made(bases, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kept = choose_kept(bases("llama-mha"), heads=2, channels=20)
    make_run("run", bases("llama-mha"), kept)
    compact(type(tmp_path)("run"))
    scope = run_snippet((tmp_path / "run" / "model" / "README.md").read_text())
    assert torch.equal(
        compute_logits(scope["model"]), compute_logits(load_model(tmp_path / "run" / "model"))
    )


# The snippet of a per-layer model runs in test_compact, where lpdeploy cannot be imported.


def test_it_says_how_groups_were_chosen(bases, tmp_path):
    kept = choose_kept(bases("llama-mha"), heads=2, channels=20)
    run = make_run(tmp_path / "run", bases("llama-mha"), kept)
    with record_stage(run, "prune", {"criterion": "wanda", "schedule": "one-shot"}):
        pass
    compact(run)
    card = " ".join((run / "model" / "README.md").read_text().split())
    assert (
        "channels removed by lpdeploy, after [LoRAPrune](https://arxiv.org/abs/2305.18403): chosen "
        "by the weights times the norms of their inputs, without fine-tuning. LoRA is merged"
    ) in card


def read_table(card):
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", card, re.MULTILINE)
    return {name: (before, after) for name, before, after in rows}


def test_the_figures_are_those_of_the_models(bases, tmp_path):
    card, result, _ = make_card(bases, tmp_path, "llama-gqa", heads=3, channels=20)
    before, after = (
        sum(parameter.numel() for parameter in load_model(folder).parameters())
        for folder in (bases("llama-gqa"), tmp_path / "run" / "model")
    )
    sizes = [
        (folder / "model.safetensors").stat().st_size
        for folder in (bases("llama-gqa"), tmp_path / "run" / "model")
    ]
    assert read_table(card) == {
        "layers": ("2", "2"),
        "parameters": (f"{before:,}", f"{after:,}"),
        "bytes of weights": (f"{sizes[0]:,}", f"{sizes[1]:,}"),
        "query heads": ("8", "6"),
        "KV heads": ("4", "3"),
        "FFN channels": ("48", "20"),
    }
    assert "with 25% of its attention heads and 58% of its FFN channels removed" in " ".join(
        card.split()
    )
    assert "LoRA is merged into the weights." in card
    assert f"It is a stock `{result.record.architecture}`" in card


def test_per_layer_widths_are_listed(bases, tmp_path):
    card, _, _ = make_card(bases, tmp_path, "llama-gqa", heads=[3, 1], channels=[20, 31])
    table = read_table(card)
    assert table["query heads"] == ("8", "2 to 6, layer by layer: 6, 2")
    assert table["KV heads"] == ("4", "1 to 3, layer by layer: 3, 1")
    assert table["FFN channels"] == ("48", "20 to 31, layer by layer: 20, 31")
    assert "No stock server loads this checkpoint" in card
    assert "--scope layer" in card


def test_uniform_widths_without_a_stock_class_are_explained(bases, tmp_path):
    """Pruning with --scope layer is what was done here: the advice must be another."""
    card, _, _ = make_card(bases, tmp_path, "llama-bias", heads=3, channels=20)
    assert "trust_remote_code=True" in card
    assert "its 6 heads do not divide its hidden size of 32" in card
    assert "--scope layer" not in card


def test_an_unmerged_card_says_so(bases, tmp_path):
    card, _, _ = make_card(bases, tmp_path, "llama-gqa", heads=2, channels=20, keep_adapter=True)
    assert "LoRA stands beside it, unmerged." in card
    assert "PeftModel.from_pretrained(model" in card


def test_the_front_matter_is_yaml(bases, tmp_path):
    base = shutil.copytree(bases("llama-mha"), tmp_path / "my: model {7B} #1")
    kept = choose_kept(base, heads=2, channels=20)
    compact(make_run(tmp_path / "run", base, kept))
    _, front, body = (tmp_path / "run" / "model" / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front) == {
        "base_model": "my: model {7B} #1",
        "library_name": "transformers",
        "tags": ["lpdeploy", "pruned"],
    }
    record = json.loads((tmp_path / "run" / "model" / "lpdeploy.json").read_text())
    removed = 1 - record["parameters"]["after"] / record["parameters"]["before"]
    title = f"# my: model {{7B}} #1 without {removed:.0%} of its parameters"
    assert body.lstrip().startswith(title)


def test_a_base_of_bf16_keeps_half_the_bytes(tmp_path):
    base = make_base(tmp_path / "base", "llama-mha", dtype=torch.bfloat16)
    result = compact(make_run(tmp_path / "run", base, choose_kept(base, heads=2, channels=20)))
    wide = make_base(tmp_path / "wide", "llama-mha")
    other = compact(make_run(tmp_path / "other", wide, choose_kept(wide, heads=2, channels=20)))
    assert result.record.parameters == other.record.parameters
    header = 4000  # of the file; names and offsets
    assert abs(2 * result.record.bytes["after"] - other.record.bytes["after"]) < header
