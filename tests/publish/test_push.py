"""What reaches a hub of our own, through the hub's own library, and what does not."""

import copy
import json
import re
import shutil
from dataclasses import replace

import huggingface_hub.constants
import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from lpdeploy.artifacts import compute_sha256, save_json
from lpdeploy.engines import ENGINES
from lpdeploy.errors import ArtifactError, LpdeployError
from lpdeploy.evaluation.results import Evaluation, Figures, Perplexity
from lpdeploy.folders import FOLDER_RECORD
from lpdeploy.models.compact import compact
from lpdeploy.models.loading import load_model
from lpdeploy.pruning.target import SizeFound, TargetRecord
from lpdeploy.publish.push import push
from lpdeploy.records import load_json
from lpdeploy.run_folder import RunFolder
from tests import fake_hub
from tests.benchmark.test_target import SMALL, prune
from tests.cli.test_cli import check_refused, invoke, last_json
from tests.engines.test_contract import WRITTEN
from tests.helpers import make_text, make_tiny_model

TARGET = TargetRecord(asked={"parameters": 5}, ratios={}, found=SizeFound(6, 5))
EXPORTS = ("onnx", "ort")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with a model, and beside it all that must stay at home."""
    root = tmp_path_factory.mktemp("push")
    base = make_tiny_model(root / "private-base", kv_heads=2)
    data = make_text(root / "text.txt")
    run = root / "run"
    prune(str(base), run, data=str(data), options=SMALL, target=TARGET)
    compact(run)
    record = load_json(run / "model" / "lpdeploy.json", fix="")
    for name in EXPORTS:
        contract = copy.deepcopy(WRITTEN[ENGINES[name]])
        contract["source"] |= {"model": str(run / "model"), "sha256": record["sha256"]}
        save_json(run / name / "io.json", contract)
        (run / name / "model.onnx").write_bytes(b"graph of " + name.encode())
    (run / "checkpoint").mkdir()
    (run / "checkpoint" / "state.safetensors").write_bytes(b"moments")
    (run / "model" / ".cache").write_bytes(b"cache")
    return run


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", fake_hub.FakeHub.token)
    with fake_hub.serve() as served:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", served.url)
        yield served


@pytest.fixture
def no_hub(monkeypatch):
    """Any request would fail: nothing listens there."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")


WANTED = {
    *("README.md", "config.json", "generation_config.json", "lpdeploy.json", "model.safetensors"),
    *("tokenizer.json", "tokenizer_config.json", "plan.json"),
    *(f"{name}/{file}" for name in EXPORTS for file in ("io.json", "model.onnx")),
}


def test_without_yes_it_is_shown_and_nothing_leaves(run, no_hub):
    result = invoke("push", run, "--repo", "me/small", "--private", "--json")
    shown = last_json(result)
    assert {file["path"] for file in shown["files"]} == WANTED
    assert shown["uploaded"] is False
    assert shown["visibility"] == "private"
    assert shown["bytes"] == sum(file["bytes"] for file in shown["files"])
    assert shown["command"] == f"lpdeploy push {run} --repo me/small --private --yes"
    assert f"To upload: {shown['command']}" in result.stderr
    assert "base model: private-base (a local folder" in result.stderr
    assert all(path in result.stderr for path in WANTED)
    weights = next(file for file in shown["files"] if file["path"] == "model.safetensors")
    assert weights["bytes"] == (run / "model" / "model.safetensors").stat().st_size
    assert weights["source"] == str(run / "model" / "model.safetensors")


def test_what_is_uploaded_loads_and_names_no_path_of_this_machine(run, hub, tmp_path):
    uploaded = last_json(invoke("push", run, "--repo", "me/small", "--yes", "--json"))
    assert uploaded["uploaded"] is True
    assert uploaded["url"] == f"{hub.url}/me/small"
    assert uploaded["commit"] == f"{1:040x}"
    repo = hub.repos["me/small"]
    assert repo["visibility"] == "public"
    assert repo["files"].keys() == WANTED
    assert {f["path"]: f["bytes"] for f in uploaded["files"]} == {
        path: len(content) for path, content in repo["files"].items()
    }
    for path, content in repo["files"].items():
        target = tmp_path / "there" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
        for part in (str(run.parent), "/private-base", "pytest-of", str(run)):
            assert part.encode() not in content, path
    ids = torch.arange(3, 20).unsqueeze(0)
    logits = [
        load_model(folder)(input_ids=ids).logits for folder in (run / "model", tmp_path / "there")
    ]
    assert torch.equal(*logits)
    plan, own = (load_json(f / "plan.json", fix="") for f in (tmp_path / "there", run))
    assert plan == {**own, "base_model": "private-base"}
    contract = load_json(tmp_path / "there" / "ort" / "io.json", fix="")
    assert contract["source"]["model"] == "model"
    assert contract["precision"] == "fp32"


def test_the_card_loads_from_the_hub_and_says_what_is_beside(run, hub):
    push(run, "me/small", execute=True)
    card = hub.repos["me/small"]["files"]["README.md"].decode()
    assert re.findall(r'from_pretrained\("(.*?)"', card) == ["me/small", "me/small"]
    assert "base_model" not in yaml.safe_load(card.split("---")[1])  # a folder is no name there
    assert "named here by its last part" in card
    assert "`onnx/`" in card
    assert "`ort/`" in card


def forget_hashes(run):
    """Make a plan that was changed by hand the one of its run."""
    sha256 = compute_sha256(run / "plan.json")
    manifest = load_json(run / "manifest.json", fix="")
    manifest["stages"]["prune"]["outputs"]["plan.json"] = sha256
    with RunFolder(run).recorded(run / "manifest.json", run / "plan.json"):
        save_json(run / "manifest.json", manifest)
    record = load_json(run / "model" / "lpdeploy.json", fix="")
    save_json(run / "model" / "lpdeploy.json", {**record, "plan_sha256": sha256})
    (run / "model" / FOLDER_RECORD).unlink()


def test_a_base_of_the_hub_keeps_its_name(run, hub):
    plan = load_json(run / "plan.json", fix="")
    save_json(run / "plan.json", {**plan, "base_model": "huggyllama/llama-7b"})
    forget_hashes(run)
    shutil.rmtree(run / "ort")
    card = run / "model" / "README.md"
    card.write_text(card.read_text().replace('"private-base"', '"huggyllama/llama-7b"'))
    result = push(run, "me/small", execute=True)
    assert (result.base_model, result.base_is_local) == ("huggyllama/llama-7b", False)
    files = hub.repos["me/small"]["files"]
    assert json.loads(files["plan.json"])["base_model"] == "huggyllama/llama-7b"
    text = files["README.md"].decode()
    assert yaml.safe_load(text.split("---")[1])["base_model"] == "huggyllama/llama-7b"
    assert "`ort/`" not in text


def test_a_repository_that_exists_is_updated_not_wiped(run, hub):
    hub.repos["me/small"] = {
        "visibility": "private", "files": {"mine.txt": b"mine", "config.json": b"old"},
    }  # fmt: skip
    push(run, "me/small", execute=True)
    repo = hub.repos["me/small"]
    assert repo["files"]["mine.txt"] == b"mine"
    assert repo["files"]["config.json"] == (run / "model" / "config.json").read_bytes()
    assert repo["visibility"] == "private"
    assert hub.commits == 1


@pytest.mark.parametrize(
    ("repo", "sentence"),
    [("small", "'small' names no owner. Give owner/name"), ("a/b/c", "Repo id must be in the form"),
     ("me/sm all", "'me/sm all'.*Give owner/name"), ("me/a--b", "Cannot have -- or ..")],
)  # fmt: skip
def test_a_bad_name_is_refused_before_anything(run, no_hub, repo, sentence):
    check_refused(invoke("push", run, "--repo", repo), sentence, code=2)


def test_a_run_that_is_not_ready_is_refused(run, tmp_path):
    shutil.rmtree(run / "model")
    with pytest.raises(ArtifactError, match=f"No model in '{run}'. Run 'lpdeploy compact {run}' f"):
        push(run, "me/small")
    with pytest.raises(ArtifactError, match="No plan.json in"):
        push(tmp_path, "me/small")


def test_an_export_of_another_model_is_refused(run):
    contract = load_json(run / "ort" / "io.json", fix="")
    contract["source"]["sha256"] = "0" * 64
    save_json(run / "ort" / "io.json", contract)
    with pytest.raises(
        ArtifactError, match="from another model .* --engine ort --overwrite' first"
    ):
        push(run, "me/small")


def test_a_model_without_a_card_is_refused(run):
    (run / "model" / "README.md").unlink()
    with pytest.raises(ArtifactError, match="No README.md in .* Write one, or run 'lpdeploy comp"):
        push(run, "me/small")


def test_nobody_is_logged_in(run, no_hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    result = invoke("push", run, "--repo", "me/small", "--yes")
    check_refused(result, "Not logged in to the hub. Run 'hf auth login', or set HF_TOKEN")


def test_what_the_hub_refuses_is_told_in_its_words(run, hub, monkeypatch):
    with pytest.raises(
        LpdeployError, match="refuses 'stranger/x': .*rights to create a model unde"
    ):
        push(run, "stranger/x", execute=True)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(LpdeployError, match="refuses 'me/small': .*Check the name, and that 'hf"):
        push(run, "me/small", execute=True)
    assert hub.repos == {}


def test_the_hub_is_out_of_reach(run, no_hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    result = invoke("push", run, "--repo", "me/small", "--yes")
    check_refused(result, "http://127.0.0.1:9 cannot be reached .* Check the network and try again")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(LpdeployError, match="switched off by HF_HUB_OFFLINE. Unset it"):
        push(run, "me/small", execute=True)


def save_evaluation(run, **changes):
    record = load_json(run / "model" / "lpdeploy.json", fix="")
    figures = Figures(
        {"wikitext2": Perplexity(12.5, 1.1, 900), str(run / "mine.txt"): Perplexity(3.25, 0.5, 99)},
        {"piqa": {"acc": 0.61, "acc_stderr": 0.05, "n": 100.0, "num_fewshot": 0.0}},
    )
    found = Evaluation(
        model=str(run), model_sha256=record["sha256"], engine="torch", precision="fp32",
        seq_len=512, figures=figures, base=Figures({"wikitext2": Perplexity(10.0, 1.0, 900)}),
    )  # fmt: skip
    (run / "mine.txt").write_text("x")
    int4 = replace(found, engine="ort", precision="int4", base=None)
    with RunFolder(run).recorded(run / "eval.json"):
        save_json(run / "eval.json", replace(found, others=(int4,), **changes).to_json())


def test_what_was_measured_is_on_the_card(run, hub):
    save_evaluation(run)
    push(run, "me/small", execute=True)
    card = ModelCard(hub.repos["me/small"]["files"]["README.md"].decode())
    assert card.data.model_name == "small"
    found = {
        each.dataset_name: (each.task_type, each.metric_type, each.metric_value)
        for each in card.data.eval_results
    }
    assert found == {
        "wikitext2": ("text-generation", "perplexity", 12.5),
        "mine.txt": ("text-generation", "perplexity", 3.25),
        "piqa": ("multiple-choice", "acc", 0.61),
    }
    assert "| perplexity of wikitext2 in segments of 512 tokens | 12.50 | 10.00 |" in card.text
    assert "| perplexity of mine.txt in segments of 512 tokens | 3.25 |  |" in card.text
    assert "| piqa, acc, 100 documents | 0.610 ± 0.050 |  |" in card.text
    assert "On torch in fp32:" in card.text
    assert "On ort in int4:" in card.text
    assert card.data.tags == ["lpdeploy", "pruned"]
    assert re.findall(r'from_pretrained\("(.*?)"', card.text) == ["me/small", "me/small"]


def test_figures_of_another_model_stay_at_home(run, hub):
    save_evaluation(run, model_sha256="0" * 64)
    push(run, "me/small", execute=True)
    card = hub.repos["me/small"]["files"]["README.md"].decode()
    assert "Evaluation" not in card
    assert "model-index" not in card
