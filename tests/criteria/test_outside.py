"""A criterion from outside the package: added to the table, it runs the whole line."""

import json

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from lpdeploy.benchmark.pruning import count_flops
from lpdeploy.cli.main import main
from lpdeploy.config import PruneConfig
from lpdeploy.criteria import CRITERIA, Criterion, ScoredLinear
from lpdeploy.engines.verify import verify
from lpdeploy.families.groups import list_group_specs
from lpdeploy.models.compact import compact
from lpdeploy.models.loading import load_config
from lpdeploy.pruning.memory import plan_memory
from lpdeploy.pruning.run import prune
from lpdeploy.pruning.scoring import Scorer
from lpdeploy.pruning.travel import compute_travel
from lpdeploy.report.page import save_report
from lpdeploy.run_folder import RunFolder
from tests import reference
from tests.helpers import make_lora_model, make_text, make_tiny_model
from tests.pruning.independent import Independent, assert_scores, make_rows


def score_weights(linear: ScoredLinear):
    """Multiply each weight by the sum of its input feature's absolute values."""
    return lambda _, weights: weights * linear.observed


MINE = Criterion(
    name="mine",
    words="the weights times the size of their inputs",
    help="from the weights times the size of their inputs",
    score_weights=score_weights,
    measure_inputs=torch.abs,
)


@pytest.fixture(autouse=True)
def mine(monkeypatch):
    monkeypatch.setitem(CRITERIA, "mine", MINE)


def test_it_scores_what_it_says(tmp_path):
    wrapped = make_lora_model(tmp_path, kv_heads=2)
    model, batch = wrapped.get_base_model(), make_rows((12, 9))
    specs = list_group_specs(model.config)
    scorer = Scorer(MINE, model, specs)
    with scorer.observe():
        scorer.attention_mask = batch.mask
        batch.run(wrapped).backward()
    scores = scorer.compute_importance()
    independent = Independent(tmp_path, model, specs, batch)
    inputs, _ = independent.record_inputs()
    for spec in (specs[0], specs[3]):
        expected = torch.zeros(spec.num_groups, dtype=torch.float64)
        for piece in spec.slices:
            real = inputs[piece.module][batch.mask.bool()].abs().sum(dim=0)
            numbers = (independent.weight(piece.module) * real).square().tolist()
            groups = reference.group_importance(numbers, piece.dim, piece.block)
            expected += torch.tensor(groups, dtype=torch.float64)
        assert_scores(scores[spec.name], expected)


def test_it_runs_the_line(tmp_path):
    base = make_tiny_model(tmp_path / "base", kv_heads=2)
    data = make_text(tmp_path / "t.txt")
    run = tmp_path / "run"
    words = (
        "--criterion mine --steps 2 --batch-size 2 --micro-batch-size 2 --seq-len 16 --round-to 4 "
        "--prune-every 1 --calibration-samples 2 --device cpu --json"
    )
    done = CliRunner().invoke(
        main, ["prune", str(base), "--data", str(data), "--output", str(run), *words.split()]
    )
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout.splitlines()[-1])["achieved"]["groups"] == 0.5
    assert (load_file(run / "importance.safetensors")["layers.0.channels"] > 0).all()
    compact(run)
    assert all(pair.ok for pair in verify(run, engine="torch").pairs)
    assert MINE.words in " ".join((run / "model" / "README.md").read_text().split())
    assert MINE.words in save_report(run).read_text()


def test_a_run_is_read_where_its_criterion_is_not_known(tmp_path, monkeypatch):
    base, data = make_tiny_model(tmp_path / "base"), make_text(tmp_path / "t.txt")
    options = PruneConfig(
        criterion="mine", steps=1, batch_size=2, micro_batch_size=2, seq_len=16, device="cpu"
    )
    prune(str(base), tmp_path / "run", data=str(data), options=options)
    monkeypatch.delitem(CRITERIA, "mine")
    compact(tmp_path / "run")
    assert RunFolder(tmp_path / "run").load_plan().ratio == 0.5
    assert "chosen by the criterion 'mine'" in save_report(tmp_path / "run").read_text().replace(
        "&#39;", "'"
    )


def test_its_costs_follow_from_what_it_needs(tmp_path):
    config = load_config(make_tiny_model(tmp_path / "base", kv_heads=2))
    mine, wanda = (PruneConfig(criterion=name, shard=False) for name in ("mine", "wanda"))
    assert compute_travel(config, mine, ranks=2, itemsize=4) == compute_travel(
        config, wanda, ranks=2, itemsize=4
    )
    memory = [plan_memory(config, own, dtype="fp32", device="cuda") for own in (mine, wanda)]
    assert memory[0] == memory[1]
    assert count_flops(config, mine) == count_flops(config, wanda)


def test_what_needs_gradients_of_the_weights_pays_for_them(tmp_path, monkeypatch):
    taylor = Criterion(
        name="mine",
        words="a Taylor expansion",
        help="from a Taylor expansion",
        score_weights=CRITERIA["gradient"].score_weights,
        weight_gradients=True,
    )
    monkeypatch.setitem(CRITERIA, "mine", taylor)
    config = load_config(make_tiny_model(tmp_path / "base"))
    for refused in ({"load_in": "8bit"}, {"shard": True, "removal": "mask"}):
        with pytest.raises(ValueError, match="mine"):
            PruneConfig(criterion="mine", **refused)
    memory = plan_memory(config, PruneConfig(criterion="mine"), dtype="fp32", device="cuda")
    assert memory.gradients > 0


@pytest.mark.parametrize("words", [["prune", "m", "--data", "d", "--output", "o"],
                                   ["bench", "pruning", "m"]])  # fmt: skip
def test_the_command_line_names_it_among_the_known(words):
    done = CliRunner().invoke(main, [*words, "--criterion", "yours"])
    assert done.exit_code == 2
    assert "mine" in done.stderr
