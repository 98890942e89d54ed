"""What a run is fed: tokens of earlier runs, how they are counted, what is said of padding."""

import json
import re

import pytest
import yaml
from transformers import AutoTokenizer

from lpdeploy.config import PruneConfig
from lpdeploy.data.cache import find_cache
from lpdeploy.data.chat import INSTRUCTION_TEMPLATE
from lpdeploy.errors import ArtifactError
from lpdeploy.models.card import build_adapter_card
from lpdeploy.models.compact import compact
from lpdeploy.models.generation import list_stop_tokens
from lpdeploy.models.loading import load_config
from lpdeploy.pruning.setup import load_dataset, load_source
from tests.pruning.test_run import load_log, run

FEW = {"steps": 2, "checkpoint_every": 0}
OWN_TEMPLATE = "{% for message in messages %}{{ message['content'] + ' ' }}{% endfor %}"


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("LPDEPLOY_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def pairs(tmp_path):
    rows = [
        {"instruction": "w1 " * (1 + number % 3), "output": "w2 " * (1 + number % 7)}
        for number in range(40)
    ]
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps(rows))
    return path


def list_cached():
    return sorted(path.name for path in find_cache().rglob("*.safetensors"))


def read_result(folder):
    names = ("adapter/adapter_model.safetensors", "plan.json")
    return [(folder / name).read_bytes() for name in names]


def test_a_second_run_tokenizes_nothing(base, data, tmp_path, told):
    first, second = [], []
    run(base, tmp_path / "one", data, options=FEW,
        on_tokenize=lambda *now: first.append(now))  # fmt: skip
    assert first == [(40, 40)]
    assert not any("Using the cached tokens" in line for line in told)
    run(base, tmp_path / "two", data, options=FEW,
        on_tokenize=lambda *now: second.append(now))  # fmt: skip
    assert second == []
    assert sum("Using the cached tokens" in line for line in told) == 1
    run(base, tmp_path / "three", data, options=FEW, cache=False)
    assert read_result(tmp_path / "one") == read_result(tmp_path / "two")
    assert read_result(tmp_path / "one") == read_result(tmp_path / "three")
    assert len(list_cached()) == 1


def test_options_of_conversations_have_no_effect_on_plain_text(base, data, pairs, tmp_path, told):
    options = {**FEW, "train_on_prompt": True, "prompt_format": "instruction"}
    run(base, tmp_path / "text", data, options=options)
    line = "Without effect, as the data is plain text: `train_on_prompt`, `prompt_format`."
    assert told.count(line) == 1
    run(base, tmp_path / "chat", pairs, options=options)
    assert told.count(line) == 1


def test_without_a_cache_nothing_is_kept(base, data, tmp_path):
    run(base, tmp_path / "run", data, options=FEW, cache=False)
    assert list_cached() == []


def test_all_that_makes_rows_makes_another_file(base, pairs, tmp_path):
    options = FEW | {"seq_len": 80}
    run(base, tmp_path / "a", pairs, options=options)
    run(base, tmp_path / "b", pairs, options=options | {"train_on_prompt": True})
    run(base, tmp_path / "c", pairs, options=options | {"seq_len": 90})
    # The same tokens under other numbers: nothing but the tokenizer's file has changed.
    path = base / "tokenizer.json"
    path.write_text(path.read_text().replace('"w1"', '"w1 "'))
    run(base, tmp_path / "d", pairs, options=options)
    pairs.write_text(pairs.read_text().replace("w2", "w3"))
    run(base, tmp_path / "e", pairs, options=options)
    assert len(list_cached()) == 5


def test_the_share_of_padding_is_shown(base, pairs, tmp_path, told):
    run(base, tmp_path / "run", pairs, options=FEW | {"seq_len": 80})
    (line,) = [line for line in told if "rows of at most" in line]
    log = [step for step in load_log(tmp_path / "run") if step["step"]]
    # Of these two steps of four rows, as of the whole run.
    computed = sum(step["tokens_per_s"] * step["seconds"] for step in log)
    padded = sum(step["tokens_per_s"] * step["seconds"] * step["padding"] for step in log)
    assert padded > 0
    assert f"padding {padded / computed:.1%} of what is computed" in line


def test_packed_text_is_shown_without_padding(base, data, tmp_path, told):
    run(base, tmp_path / "run", data, options=FEW)
    assert any("rows of at most" in line for line in told)
    assert not any("padding" in line for line in told)


@pytest.mark.parametrize(
    ("own", "options", "shipped"),
    [
        (None, {}, INSTRUCTION_TEMPLATE),
        (None, {"prompt_format": "instruction"}, INSTRUCTION_TEMPLATE),
        (OWN_TEMPLATE, {}, OWN_TEMPLATE),
        (OWN_TEMPLATE, {"prompt_format": "chat-template"}, OWN_TEMPLATE),
        (OWN_TEMPLATE, {"prompt_format": "instruction"}, INSTRUCTION_TEMPLATE),
    ],
)
def test_what_is_tuned_on_chats_ships_their_template(base, pairs, tmp_path, own, options, shipped):
    if own:
        (base / "chat_template.jinja").write_text(own)
    run(base, tmp_path / "run", pairs, options=FEW | {"seq_len": 80, **options})
    for output, keep_adapter in (("model", False), ("unmerged", True)):
        compact(tmp_path / "run", keep_adapter=keep_adapter)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / output)
        assert tokenizer.get_chat_template() == shipped


def test_a_template_among_the_settings_of_a_tokenizer_is_replaced(base, pairs, tmp_path):
    settings = base / "tokenizer_config.json"
    settings.write_text(
        json.dumps(json.loads(settings.read_text()) | {"chat_template": OWN_TEMPLATE})
    )
    options = FEW | {"seq_len": 80, "prompt_format": "instruction"}
    run(base, tmp_path / "run", pairs, options=options)
    compact(tmp_path / "run")
    model = tmp_path / "run" / "model"
    assert AutoTokenizer.from_pretrained(model).chat_template == INSTRUCTION_TEMPLATE
    assert "chat_template" not in json.loads((model / "tokenizer_config.json").read_text())


def test_the_form_of_the_conversations_is_needed_and_must_not_change(base, pairs, tmp_path):
    run(base, tmp_path / "run", pairs, options=FEW | {"seq_len": 80})
    chat = tmp_path / "run" / "chat.json"
    kept = chat.read_text()
    chat.write_text(kept.replace("Answer it", "Answer that"))
    with pytest.raises(ArtifactError, match=r"chat\.json' has changed since it was written"):
        compact(tmp_path / "run")
    chat.unlink()
    with pytest.raises(ArtifactError, match=r"chat\.json' is missing: the run was tuned on conv"):
        compact(tmp_path / "run")
    chat.write_text(kept)
    compact(tmp_path / "run")


@pytest.mark.parametrize("own", [None, [2]])
def test_what_ends_a_turn_ends_an_answer(base, pairs, tmp_path, own):
    """Of a base model whose template ends turns with another token than its texts."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"additional_special_tokens": ["w47"]})  # a token of the model
    tokenizer.chat_template = (
        "{% for turn in messages %}{{ turn['role'] + ' ' + turn['content'] + ' w47 ' }}"
        "{% endfor %}{{ 'assistant ' if add_generation_prompt else '' }}"
    )
    tokenizer.save_pretrained(base)
    end = tokenizer.convert_tokens_to_ids("w47")
    settings = base / "generation_config.json"
    settings.write_text(json.dumps({"eos_token_id": own, "max_length": 77}))
    run(base, tmp_path / "run", pairs, options=FEW | {"seq_len": 80})
    compact(tmp_path / "run")
    model = tmp_path / "run" / "model"
    before = list_stop_tokens(base, load_config(base))
    assert list_stop_tokens(model, load_config(model)) == (*before, end)
    assert json.loads((model / "generation_config.json").read_text())["max_length"] == 77


def test_a_template_of_a_former_run_does_not_stay(base, data, pairs, tmp_path):
    run(base, tmp_path / "run", pairs, options=FEW | {"seq_len": 80})
    run(base, tmp_path / "run", data, options=FEW, overwrite=True)
    compact(tmp_path / "run")
    assert AutoTokenizer.from_pretrained(tmp_path / "run" / "model").chat_template is None


def test_another_template_makes_other_rows(base, pairs, tmp_path):
    run(base, tmp_path / "a", pairs, options=FEW | {"seq_len": 80})
    (base / "chat_template.jinja").write_text(OWN_TEMPLATE)
    run(base, tmp_path / "b", pairs, options=FEW | {"seq_len": 80})
    assert len(list_cached()) == 2


def test_only_answers_of_chats_are_trained_on(base, tmp_path):
    (base / "chat_template.jinja").write_text(OWN_TEMPLATE)
    turns = [("user", "w1 w2"), ("assistant", "w3"), ("user", "w4"), ("assistant", "w5 w6")]
    row = {"messages": [{"role": role, "content": said} for role, said in turns]}
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps(row) + "\n")
    options = PruneConfig(seq_len=24, device="cpu")
    source = load_source(str(base), options)
    dataset = load_dataset(source, str(path), options)
    labels = dataset.collate([0])["labels"][0]
    assert source.tokenizer.decode(labels[labels != -100]).split() == ["w3", "w5", "w6"]


def test_the_card_of_an_adapter_names_no_path(base, data, tmp_path, monkeypatch):
    """It loads where `compact --keep-adapter` has written the base that it fits."""
    run(base, tmp_path / "run", data, options=FEW)
    card = (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert str(tmp_path) not in card
    assert "base_model" not in yaml.safe_load(card.split("---")[1])  # a folder is no name
    compact(tmp_path / "run", keep_adapter=True)
    monkeypatch.chdir(tmp_path / "run")
    scope = {}
    exec(re.findall(r"```python\n(.*?)```", card, re.DOTALL)[0], scope)
    assert scope["model"].peft_config
    hub = build_adapter_card("owner/name")
    assert yaml.safe_load(hub.split("---")[1])["base_model"] == "owner/name"
