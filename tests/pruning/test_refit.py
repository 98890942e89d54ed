"""The refit: against independent loops and solvers, through every stage, and what is refused."""

import dataclasses
import json
import re
import shutil
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lpdeploy.artifacts import compute_sha256
from lpdeploy.config import PruneConfig
from lpdeploy.engines.verify import verify
from lpdeploy.errors import ArtifactError, LpdeployError
from lpdeploy.families.groups import expand_index
from lpdeploy.models.adapters import attach_lora, get_base_linear
from lpdeploy.models.compact import compact
from lpdeploy.models.cutting import apply_masks
from lpdeploy.models.loading import load_model
from lpdeploy.models.run_weights import load_run_weights
from lpdeploy.models.shapes import list_prunable
from lpdeploy.plan import get_output
from lpdeploy.pruning.least_squares import RIDGES, Sums, solve, solve_ridge
from lpdeploy.pruning.pruner import LoRAPruner
from lpdeploy.pruning.ranks import Ranks
from lpdeploy.pruning.refit import check_refit_rows, count_refit_rows
from lpdeploy.pruning.state import build_state
from lpdeploy.pruning.walk import Calibration, hold_out
from lpdeploy.run_folder import RunFolder
from tests.helpers import make_lora_model, make_tiny_model
from tests.pruning.test_run import StoppedError, load_log, run, stop_after

REFIT = {"refit": True, "lora_dropout": 0.0}
ONE_SHOT = {**REFIT, "schedule": "one-shot", "calibration_samples": 8}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_example(tokens=60, kept=5, hidden=3, *, seed=0, noise=0.0):
    inputs = draw(tokens, kept, seed=seed)
    missing = inputs @ draw(kept, hidden, seed=9) + noise * draw(tokens, hidden, seed=seed + 1)
    return inputs.float(), missing.float()


def sum_up(inputs, missing):
    sums = Sums(torch.zeros(inputs.shape[1], inputs.shape[1]), torch.zeros(inputs.shape[1], 3))
    for part in range(0, len(inputs), 7):
        sums.add(inputs[part : part + 7], missing[part : part + 7])
    return sums


class TestLeastSquares:
    @pytest.mark.parametrize("ridge", [1e-3, 1e-2, 1.0])
    def test_it_is_what_lstsq_finds_with_the_ridge_as_more_rows(self, ridge):
        inputs, missing = make_example(noise=0.5)
        weight = (ridge * (inputs**2).sum(0).mean()).sqrt() * torch.eye(5)
        rows = torch.cat([inputs, weight]).double()
        expected = torch.linalg.lstsq(rows, torch.cat([missing, torch.zeros(5, 3)]).double())
        found = solve_ridge(sum_up(inputs, missing), ridge)
        torch.testing.assert_close(found.double(), expected.solution, rtol=1e-4, atol=1e-5)

    def test_the_loss_is_that_of_the_tokens(self):
        inputs, missing = make_example(noise=0.5)
        change = draw(5, 3, seed=4).float()
        expected = ((inputs @ change - missing) ** 2).sum() - (missing**2).sum()
        assert sum_up(inputs, missing).compute_loss(change) == pytest.approx(
            expected.item(), rel=1e-4
        )

    # Few tokens with much noise want a large ridge, many without noise a small one.
    @pytest.mark.parametrize(("tokens", "noise", "best"), [(60, 0.0, 1e-3), (7, 0.5, 1e-1)])
    def test_the_ridge_is_the_one_that_is_best_on_other_tokens(self, tokens, noise, best):
        fitted, held_out = make_example(tokens, noise=noise), make_example(40, seed=20)

        def measure(ridge):
            change = solve_ridge(sum_up(*fitted), ridge)
            return float(((held_out[0] @ change - held_out[1]) ** 2).sum())

        assert min(RIDGES, key=measure) == best
        assert measure(best) < float((held_out[1] ** 2).sum())
        found, ridge = solve(sum_up(*fitted), sum_up(*held_out))
        assert ridge == best
        both = [torch.cat(pair) for pair in zip(fitted, held_out, strict=True)]
        torch.testing.assert_close(found, solve_ridge(sum_up(*both), best), rtol=1e-3, atol=1e-4)

    def test_nothing_is_changed_where_every_ridge_does_harm(self):
        inputs, missing = make_example()
        change, ridge = solve(sum_up(inputs, missing), sum_up(inputs, -missing))
        assert not change.any()
        assert ridge is None

    def test_without_tokens_held_out_the_first_ridge_is_taken(self):
        sums = sum_up(*make_example(noise=0.5))
        none = Sums(torch.zeros(5, 5), torch.zeros(5, 3))
        change, ridge = solve(sums, none)
        assert ridge == RIDGES[0]
        torch.testing.assert_close(change, solve_ridge(sums, ridge))

    def test_the_ridge_grows_until_a_singular_matrix_can_be_solved(self):
        inputs, missing = make_example()
        inputs[:, 1:] = inputs[:, :1]  # rank 1
        found = solve_ridge(sum_up(1e4 * inputs, missing), 1e-12)
        assert found.isfinite().all()

    def test_columns_that_never_act_stay_as_they_are(self):
        inputs, missing = make_example()
        assert not solve_ridge(sum_up(0 * inputs, missing), 1e-2).any()

    def test_inputs_that_are_not_finite_are_refused(self):
        inputs, missing = make_example()
        inputs[3, 2] = float("nan")
        with pytest.raises(LpdeployError, match="not finite"):
            solve_ridge(sum_up(inputs, missing), 1e-2)


def calibrate(ids, mask, columns):
    batches = [{"input_ids": i, "attention_mask": m} for i, m in zip(ids, mask, strict=True)]
    return Calibration(batches, hold_out(len(batches)), nullcontext, Ranks())


def make_batches(*, rows=6, batches=3, length=11, padding=0, seed=3):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 40, (batches, rows, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(rows):
        cut = length - row % (padding + 1)
        ids[:, row, cut:], mask[:, row, cut:] = 0, 0
    return list(ids), list(mask)


def prune_state(folder, *, removal, batches, head_ratio=0.5, **config):
    """Prune a model with trained LoRA once, by random scores, with a refit."""
    wrapped = make_lora_model(folder, **config)
    model = wrapped.get_base_model()
    options = PruneConfig(
        removal=removal, refit=True, head_ratio=head_ratio, channel_ratio=0.5, round_to=4,
        device="cpu",
    )  # fmt: skip
    specs = list_prunable(model.config, options.widths)
    stored = {get_output(spec).module: torch.float32 for spec in specs}
    state = build_state(model, specs, options, stored=stored)
    generator = torch.Generator().manual_seed(8)
    state.average = {s.name: torch.rand(s.num_groups, generator=generator) for s in specs}
    state.remove_groups(
        options.ratios, scope="layer", multiples=options.widths.multiples,
        calibrate=partial(calibrate, *batches),
    )  # fmt: skip
    return model.eval(), state


def refit_by_whole_passes(model, state, batches, *, ridge):
    """Refit a masked model by an independent loop: whole forward passes, hooks, and lstsq.

    ``model`` has the masks of all groups that go, and its weights are those before the refit.
    """
    ids, mask = batches
    with torch.no_grad():
        for layer in range(model.config.num_hidden_layers):
            for name in ("heads", "channels"):
                spec = next(s for s in state.specs if s.name == f"layers.{layer}.{name}")
                linear = model.get_submodule(get_output(spec).module)
                columns = expand_index(state.kept[spec.name], get_output(spec).block)
                rows, gaps = [], []
                for batch, real in zip(ids, mask, strict=True):
                    wanted = watch(model.before, layer, name, batch)[1]
                    inputs, stream = watch(model, layer, name, batch)
                    rows.append(inputs[real.bool()][:, columns])
                    gaps.append((wanted - stream)[real.bool()])
                x, r = torch.cat(rows).double(), torch.cat(gaps).double()
                scale = (ridge * (x**2).sum(0).mean()).sqrt()
                more = torch.zeros(len(columns), r.shape[1]).double()
                found = torch.linalg.lstsq(
                    torch.cat([x, scale * torch.eye(len(columns)).double()]), torch.cat([r, more])
                ).solution
                get_base_linear(linear).weight[:, columns] += found.T.float()


def watch(model, layer, name, ids):
    """Return the inputs of an output projection, and the residual stream right behind it."""
    seen = {}
    block = model.model.layers[layer]
    linear = block.self_attn.o_proj if name == "heads" else block.mlp.down_proj
    handles = [
        linear.register_forward_hook(lambda _, args, __: seen.update(inputs=args[0])),
        block.post_attention_layernorm.register_forward_pre_hook(
            lambda _, args: seen.update(heads=args[0])
        ),
        block.register_forward_hook(
            lambda _, __, out: seen.update(channels=out[0] if isinstance(out, tuple) else out)
        ),
    ]
    model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen["inputs"], seen[name]


FAMILIES = {
    "llama": {},
    "gqa": {"heads": 8, "kv_heads": 4},
    "qwen3": {"model_type": "qwen3"},
    "biases": {"mlp_bias": True, "attention_bias": True},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("removal", ["cut", "mask"])
def test_it_is_what_an_independent_loop_finds(tmp_path, monkeypatch, family, removal):
    monkeypatch.setattr(
        "lpdeploy.pruning.refit.solve", lambda *sums: (solve_ridge(sums[0] + sums[1], 1e-2), 1e-2)
    )
    config, batches = FAMILIES[family], make_batches(padding=3)
    model, state = prune_state(tmp_path / "a", removal=removal, batches=batches, **config)
    expected = make_lora_model(tmp_path / "b", **config).get_base_model().eval()
    object.__setattr__(
        expected, "before", make_lora_model(tmp_path / "c", **config).get_base_model().eval()
    )
    masks = {s.name: torch.zeros(s.num_groups, dtype=torch.bool) for s in state.specs}
    for spec in state.specs:
        masks[spec.name][state.kept[spec.name]] = True
    apply_masks(expected, state.specs, masks)
    refit_by_whole_passes(expected, state, batches, ridge=1e-2)
    ids, _ = make_batches(seed=5, batches=1)
    with torch.no_grad():
        wanted = expected(input_ids=ids[0]).logits
        torch.testing.assert_close(model(input_ids=ids[0]).logits, wanted, rtol=2e-3, atol=2e-3)
        before = expected.before(input_ids=ids[0]).logits
    assert (wanted - before).abs().max() > 0.1


def test_cut_and_masked_models_are_refitted_alike(tmp_path):
    batches = make_batches(padding=2)
    (cut, _), (masked, state) = (
        prune_state(tmp_path / removal, removal=removal, batches=batches)
        for removal in ("cut", "mask")
    )
    ids, _ = make_batches(seed=5, batches=1)
    with torch.no_grad():
        torch.testing.assert_close(
            cut(input_ids=ids[0]).logits, masked(input_ids=ids[0]).logits, rtol=1e-3, atol=1e-3
        )
    assert set(state.list_refit()) == {get_output(spec).module for spec in state.specs}


def test_what_others_can_give_is_given_by_them(tmp_path):
    """A channel that is another one's twin costs nothing: the twin takes its column over."""
    folder = make_tiny_model(tmp_path / "base", num_hidden_layers=1)
    weights = load_file(folder / "model.safetensors")
    for name in ("gate_proj", "up_proj"):
        weight = weights[f"model.layers.0.mlp.{name}.weight"]
        weight[24:] = weight[:24]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    ids, mask = make_batches(rows=8, batches=8)
    model = load_model(folder)
    before = model(input_ids=ids[0]).logits
    options = PruneConfig(refit=True, head_ratio=0.0, channel_ratio=0.5, round_to=4, device="cpu")
    specs = list_prunable(model.config, options.widths)
    stored = {get_output(spec).module: torch.float32 for spec in specs}
    state = build_state(model, specs, options, stored=stored)
    state.average = {s.name: torch.arange(s.num_groups, 0, -1).float() for s in specs}
    state.remove_groups(
        options.ratios, scope="layer", multiples=options.widths.multiples,
        calibrate=partial(calibrate, ids, mask),
    )  # fmt: skip
    with torch.no_grad():
        after = model(input_ids=ids[0]).logits
    assert len(state.kept["layers.0.channels"]) == 24
    assert (after - before).norm() < 0.02 * before.norm()


def test_padding_does_not_count(tmp_path):
    ids, mask = make_batches(padding=4)
    other = [
        torch.where(m.bool(), i, torch.full_like(i, 7)) for i, m in zip(ids, mask, strict=True)
    ]
    one, _ = prune_state(tmp_path / "a", removal="cut", batches=(ids, mask))
    two, _ = prune_state(tmp_path / "b", removal="cut", batches=(other, mask))
    for name, weight in one.state_dict().items():
        assert torch.equal(weight, two.state_dict()[name]), name


def test_layers_before_the_first_removal_and_whole_parts_stay(tmp_path):
    before = make_lora_model(tmp_path / "a", num_hidden_layers=3).get_base_model()
    model, state = prune_state(
        tmp_path / "b", removal="cut", batches=make_batches(), head_ratio=0.0, num_hidden_layers=3
    )
    for layer in range(3):
        name = f"model.layers.{layer}.self_attn.o_proj"
        old, new = (get_base_linear(m.get_submodule(name)).weight for m in (before, model))
        assert torch.equal(old, new)
    assert set(state.list_refit()) == {f"model.layers.{n}.mlp.down_proj" for n in range(3)}


class TestRuns:
    @pytest.mark.parametrize("options", [{}, {"removal": "mask"}, ONE_SHOT], ids=str)
    def test_every_stage_computes_the_same(self, base, data, tmp_path, options):
        run(base, tmp_path / "run", data, options={**REFIT, **options})
        compact(tmp_path / "run")
        compact(tmp_path / "run", keep_adapter=True)
        found = verify(tmp_path / "run", engine="torch")
        found.check()
        assert {pair.b for pair in found.pairs} >= {"unmerged/torch", "compact/torch"}

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_half_precision_checkpoints_too(self, base, data, tmp_path, dtype):
        half = tmp_path / "half"
        shutil.copytree(base, half)
        weights = load_file(half / "model.safetensors")
        save_file(
            {name: weight.to(dtype) for name, weight in weights.items()},
            half / "model.safetensors", metadata={"format": "pt"},
        )  # fmt: skip
        config = json.loads((half / "config.json").read_text())
        config["dtype"] = str(dtype).removeprefix("torch.")
        (half / "config.json").write_text(json.dumps(config))
        run(half, tmp_path / "run", data, options=REFIT)
        assert {t.dtype for t in load_file(tmp_path / "run" / "refit.safetensors").values()} == {
            dtype
        }
        compact(tmp_path / "run")
        compact(tmp_path / "run", keep_adapter=True)
        verify(tmp_path / "run", engine="torch").check()

    def test_it_says_what_it_was_fitted_to(self, base, data, tmp_path, told):
        run(base, tmp_path / "run", data, options={**ONE_SHOT, "refit_samples": 32})
        lines = [line for line in told if "weights refitted" in line]
        assert len(lines) == 1
        found = re.fullmatch(
            r"4 weights refitted over (\d+) rows \(([\d,]+) tokens\): (.*)", lines[0]
        )
        assert int(found[1]) <= 32
        assert int(found[2].replace(",", "")) == 24 * int(found[1])
        numbers = re.findall(r"ridge [\d.e-]+ for (\d+)|(\d+) left as they were", found[3])
        assert sum(int(a or b) for a, b in numbers) == 4

    def test_one_shot_loses_less_with_it(self, base, data, tmp_path):
        for name, options in {"plain": {**ONE_SHOT, "refit": False}, "refit": ONE_SHOT}.items():
            run(base, tmp_path / name, data, options=options)
            compact(tmp_path / name)
        ids = make_batches(seed=4)[0][0]
        with torch.no_grad():
            wanted = load_model(base)(input_ids=ids).logits
            lost = {
                name: (load_model(tmp_path / name / "model")(input_ids=ids).logits - wanted).norm()
                for name in ("plain", "refit")
            }
        assert lost["refit"] < 0.9 * lost["plain"]

    def test_the_plan_is_of_its_refit(self, base, data, tmp_path):
        run(base, tmp_path / "run", data, options=REFIT)
        plan = RunFolder(tmp_path / "run").load_plan()
        assert plan.refit_sha256
        weights = load_run_weights(RunFolder(tmp_path / "run"), plan)
        assert weights.refit["model.layers.0.mlp.down_proj"].shape == (32, 24)
        run(base, tmp_path / "plain", data)
        assert RunFolder(tmp_path / "plain").load_plan().refit_sha256 is None
        assert not (tmp_path / "plain" / "refit.safetensors").exists()

    @pytest.mark.parametrize("change", ["gone", "changed"])
    def test_without_its_refit_a_run_is_refused(self, base, data, tmp_path, change):
        run(base, tmp_path / "run", data, options=ONE_SHOT)
        path = tmp_path / "run" / "refit.safetensors"
        if change == "gone":
            path.unlink()
        else:
            tensors = {name: 2 * tensor for name, tensor in load_file(path).items()}
            save_file(tensors, path)
        with pytest.raises(ArtifactError, match=r"refit\.safetensors' (is missing|has changed)"):
            compact(tmp_path / "run")

    @pytest.mark.parametrize(
        ("change", "sentence"),
        [
            ("shape", "in shape [32, 20], and the plan leaves 24 columns of it"),
            ("name", "and the plan leaves 0 columns of it"),
            ("nan", "NaN"),
            ("text", "cannot be read"),
        ],
    )
    def test_a_refit_that_does_not_fit_is_refused(self, base, data, tmp_path, change, sentence):
        folder = RunFolder(tmp_path / "run")
        run(base, folder.path, data, options=ONE_SHOT)
        tensors, name = load_file(folder.refit), "model.layers.0.mlp.down_proj"
        if change == "shape":
            tensors[name] = tensors[name][:, :20].contiguous()
        elif change == "name":
            tensors["model.norm"] = tensors.pop(name)
        elif change == "nan":
            tensors[name][3, 4] = float("nan")
        save_file(tensors, folder.refit)
        if change == "text":
            folder.refit.write_text("no tensors")
        plan = dataclasses.replace(folder.load_plan(), refit_sha256=compute_sha256(folder.refit))
        with pytest.raises(ArtifactError, match=re.escape(sentence)):
            load_run_weights(folder, plan)

    @pytest.mark.parametrize("step", [4, 5])
    @pytest.mark.parametrize("removal", ["cut", "mask"])
    def test_a_resumed_run_is_the_same_to_the_bit(self, base, data, tmp_path, removal, step):
        options = {**REFIT, "removal": removal, "lora_dropout": 0.1}
        run(base, tmp_path / "whole", data, options=options)
        with pytest.raises(StoppedError):
            run(base, tmp_path / "run", data, options=options, on_step=stop_after(step))
        run(base, tmp_path / "run", data, options=options, resume=True)
        for name in ("refit.safetensors", "plan.json", "adapter/adapter_model.safetensors"):
            one, two = ((tmp_path / folder / name).read_bytes() for folder in ("run", "whole"))
            assert one == two, name
        losses = [[line["loss"] for line in load_log(tmp_path / name)] for name in ("run", "whole")]
        assert losses[0] == losses[1]

    @pytest.mark.parametrize("load_in", ["8bit", "4bit"])
    def test_a_quantized_base_keeps_what_is_solved_as_it_is(self, data, tmp_path, load_in):
        pytest.importorskip("bitsandbytes")
        base = make_tiny_model(
            tmp_path / "base", heads=8, kv_heads=4, hidden_size=64, intermediate_size=64
        )
        run(base, tmp_path / "run", data, options={**REFIT, "load_in": load_in, "round_to": 32})
        compact(tmp_path / "run")
        verify(tmp_path / "run", engine="torch").check()


def test_a_loop_of_ones_own_refits_too(base, tmp_path):
    ids, mask = make_batches(padding=3)
    batches = [{"input_ids": i, "attention_mask": m} for i, m in zip(ids, mask, strict=True)]
    lost = {}
    for refit in (False, True):
        options = PruneConfig(refit=refit, schedule="separate", round_to=4, device="cpu")
        wrapped = attach_lora(load_model(base), rank=4, alpha=8, dropout=0.0, seed=3)
        pruner = LoRAPruner(
            wrapped, options, total_steps=1, base=base, refit_batches=batches if refit else ()
        )
        pruner.calibrate({**batch, "labels": batch["input_ids"]} for batch in batches)
        run_folder = pruner.save(tmp_path / f"run-{refit}")
        compact(run_folder)
        compact(run_folder, keep_adapter=True)
        verify(run_folder, engine="torch").check()
        assert bool(run_folder.load_plan().refit_sha256) == refit
        with torch.no_grad():
            pruned, whole = (load_model(folder) for folder in (run_folder.model, base))
            lost[refit] = (pruned(ids[0]).logits - whole(ids[0]).logits)[mask[0].bool()].norm()
    assert lost[True] < 0.9 * lost[False]


class TestRows:
    def test_there_are_enough_tokens_for_each_column(self):
        lengths = np.full(1000, 50)
        assert count_refit_rows(PruneConfig(), lengths, columns=100) == 40
        assert count_refit_rows(PruneConfig(refit=True, refit_samples=7), lengths, columns=100) == 7
        assert count_refit_rows(PruneConfig(), lengths[:30], columns=100) == 30
        once = PruneConfig(schedule="one-shot")
        assert count_refit_rows(once, lengths, columns=100) == 128

    def test_little_data_is_said_and_too_little_refused(self, told):
        with pytest.raises(
            LpdeployError,
            match="A refit of 100 columns over 150 tokens .* At least 200 are",
        ):
            check_refit_rows(PruneConfig(refit=True), np.full(3, 50), columns=100)
        check_refit_rows(PruneConfig(refit=True), np.full(10, 50), columns=100)
        assert len(told) == 1
        assert "500 tokens for 100 columns, and may help little. At least 200" in told[0]
        check_refit_rows(PruneConfig(refit=True), np.full(60, 50), columns=100)
        assert len(told) == 1

    def test_too_little_data_ends_a_run_before_anything_is_written(self, base, tmp_path):
        (tmp_path / "text.txt").write_text("w1 w2 w3 " * 10)
        with pytest.raises(LpdeployError, match="would only fit these tokens"):
            run(base, tmp_path / "run", tmp_path / "text.txt", options=REFIT)
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize(
        ("number", "expected"),
        [(1, []), (2, [1]), (5, [4]), (8, [7]), (20, [7, 15])],
    )
    def test_every_eighth_batch_is_held_out_or_the_last(self, number, expected):
        found = hold_out(number)
        assert len(found) == number
        assert [place for place, held in enumerate(found) if held] == expected


def test_options_that_cannot_go_with_it_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`refit` needs whole weights, and `shard` divides them"):
        PruneConfig(refit=True, shard=True)
    with pytest.raises(ValueError, match="`refit_samples` belongs to `refit`"):
        PruneConfig(refit_samples=3)
    model = make_lora_model(tmp_path / "base")
    with pytest.raises(ValueError, match="runs batches of its own; give refit_batches"):
        LoRAPruner(model, PruneConfig(refit=True), total_steps=3)
    with pytest.raises(ValueError, match="refit_batches are for `refit=True` or `criterion='obs'`"):
        LoRAPruner(model, PruneConfig(), total_steps=3, refit_batches=make_batches()[0])
