import numpy as np
import pytest
from safetensors.numpy import save_file

from lpdeploy.errors import ArtifactError
from lpdeploy.plan import GroupSpec, PruningPlan, Slice
from lpdeploy.report.plot import describe_map, draw_map, embed
from lpdeploy.report.removed import MOST_CELLS, build_maps, load_importance
from tests.report.facts import make_plan

SCORES = np.array([1.0, 2.0, 3.0, 6.0], dtype=np.float32)


def test_heads_keep_their_order_and_channels_are_sorted():
    scores = {f"layers.{i}.{kind}": SCORES for i in (0, 1) for kind in ("heads", "channels")}
    heads, channels = build_maps(make_plan(kept=(0, 3)), scores)
    np.testing.assert_array_equal(heads.importance[0], SCORES / 3)
    np.testing.assert_array_equal(heads.removed, [[0, 1, 1, 0]] * 2)
    assert (heads.what, heads.is_sorted, heads.share) == ("KV heads", False, 0.5)
    np.testing.assert_array_equal(channels.importance[0], SCORES / 3)
    assert channels.is_sorted
    scores["layers.0.channels"] = SCORES[::-1].copy()
    _, channels = build_maps(make_plan(kept=(0, 1)), scores)
    np.testing.assert_array_equal(channels.importance[0], SCORES / 3)
    np.testing.assert_array_equal(channels.removed[0], [1, 1, 0, 0])


def test_groups_that_count_as_much_are_sorted_by_what_went():
    scores = {"layers.0.channels": np.ones(4, dtype=np.float32)}
    _, channels = build_maps(make_plan(kept=(0, 2)), scores)
    np.testing.assert_array_equal(channels.removed[0], [1, 1, 0, 0])


def test_what_was_not_scored_has_no_colour():
    scores = {"layers.0.heads": np.zeros(4, dtype=np.float32), "layers.1.heads": SCORES[:3]}
    heads, channels = build_maps(make_plan(), scores)
    assert np.isnan(heads.importance).all()
    for groups in (heads, channels):
        assert not groups.is_scored
        assert "important" not in draw_map(groups)
    scored, _ = build_maps(make_plan(), {"layers.0.heads": SCORES})
    assert scored.is_scored


def test_a_dropped_layer_is_shown_as_such():
    heads, _ = build_maps(make_plan(dropped=(1,)), {})
    assert heads.dropped == (1,)
    assert heads.kept == (2, 0)
    assert draw_map(heads).count("dropped") >= 1
    assert describe_map(heads) == (
        "Map of 2 layers by their 4 KV heads. 1 of them was dropped. Each of the others keeps 2."
    )
    assert "dropped" not in draw_map(build_maps(make_plan(), {})[0])


def test_many_channels_share_cells_so_that_a_7b_stays_small():
    layers, channels, keep = 32, 11008, 5504
    specs = tuple(
        GroupSpec(f"layers.{i}.channels", channels, (Slice(f"l.{i}", 1, 1),)) for i in range(layers)
    )
    kept = {spec.name: list(range(keep)) for spec in specs}
    plan = PruningPlan("b", "x", 0.5, specs, kept, {})
    scores = {
        spec.name: np.arange(channels, 0, -1, dtype=np.float32) for spec in specs
    }  # so that the kept are the important ones
    (groups,) = build_maps(plan, scores)
    assert groups.removed.shape == (layers, MOST_CELLS)
    assert groups.groups_a_cell == 172
    assert groups.removed.mean() == pytest.approx(0.5)
    np.testing.assert_array_equal(groups.removed[0], [1] * 32 + [0] * 32)
    picture = embed(draw_map(groups), title="t", label="l", name="n")
    assert len(picture.svg) < 300_000
    assert picture.svg.count("<image") == 2  # the cells, and the scale beside them


def test_layers_of_different_widths_have_no_map():
    specs = (
        GroupSpec("layers.0.heads", 4, (Slice("a", 1, 1),)),
        GroupSpec("layers.1.heads", 2, (Slice("b", 1, 1),)),
    )
    plan = PruningPlan("b", "x", 0.5, specs, {"layers.0.heads": [0], "layers.1.heads": [0]}, {})
    assert build_maps(plan, {}) == ()


def test_importance_is_read_from_the_run(tmp_path):
    assert load_importance(tmp_path / "importance.safetensors") == {}
    save_file({"layers.0.heads": SCORES}, tmp_path / "importance.safetensors")
    found = load_importance(tmp_path / "importance.safetensors")
    np.testing.assert_array_equal(found["layers.0.heads"], SCORES)
    (tmp_path / "importance.safetensors").write_bytes(b"broken")
    with pytest.raises(
        ArtifactError, match=r"importance.safetensors' cannot be read .* Restore it"
    ):
        load_importance(tmp_path / "importance.safetensors")
