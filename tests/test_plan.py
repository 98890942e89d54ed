import json

import pytest

from lpdeploy.errors import ArtifactError
from lpdeploy.plan import GroupSpec, PruningPlan, Slice, check_kept, load_plan

SPEC = GroupSpec("layers.3.heads", 4, (Slice("model.layers.3.self_attn.q_proj", 0, 8),))


def make_plan(kept=(0, 2)):
    return PruningPlan(
        base_model="base",
        base_sha256="abc",
        ratio=0.5,
        specs=(SPEC,),
        kept={SPEC.name: list(kept)},
        achieved={"groups": 0.5},
    )


def save(path, data):
    path.write_text(json.dumps(data))
    return path


def test_round_trip_through_json(tmp_path):
    plan = make_plan()
    assert load_plan(save(tmp_path / "plan.json", plan.to_json())) == plan


def test_a_spec_knows_its_kind_and_layer():
    assert (SPEC.kind, SPEC.layer) == ("heads", 3)


@pytest.mark.parametrize("kept", [[2, 0], [0, 0], [-1, 2], [1, 4]])
def test_impossible_indices_are_refused(kept):
    with pytest.raises(ValueError, match="must be ascending, unique and below 4"):
        check_kept(SPEC, kept)


def test_kv_heads_must_keep_as_many_query_heads():
    spec = GroupSpec("layers.0.heads", 6, (), clusters=2)
    check_kept(spec, [0, 2, 3, 4])
    with pytest.raises(ValueError, match="as many query heads of each KV head"):
        check_kept(spec, [0, 1, 2, 3])


@pytest.mark.parametrize("clusters", [0, -1, 3, 100])
def test_clusters_must_share_the_groups_evenly(tmp_path, clusters):
    plan = make_plan().to_json()
    plan["specs"] = [{**plan["specs"][0], "clusters": clusters}]
    path = save(tmp_path / "plan.json", plan)
    with pytest.raises(ArtifactError, match="clusters do not share evenly"):
        load_plan(path)


def test_an_empty_layer_is_refused():
    with pytest.raises(ValueError, match="at least one must stay"):
        check_kept(SPEC, [])


def test_another_schema_version_is_refused(tmp_path):
    data = {**make_plan().to_json(), "schema_version": 99}
    with pytest.raises(ArtifactError, match="schema version 99; this lpdeploy reads 1"):
        load_plan(save(tmp_path / "plan.json", data))


def test_a_plan_without_a_field_is_refused(tmp_path):
    data = make_plan().to_json()
    del data["specs"]
    with pytest.raises(ArtifactError, match="specs is missing. Use the lpdeploy"):
        load_plan(save(tmp_path / "plan.json", data))


@pytest.mark.parametrize(
    "kept", [None, [], "x", {"layers.3.heads": [0.5]}, {"layers.9.heads": [0]}]
)
def test_a_plan_that_keeps_no_groups_is_refused(kept, tmp_path):
    with pytest.raises(ArtifactError, match="plan.json' cannot be used: "):
        load_plan(save(tmp_path / "plan.json", make_plan().to_json() | {"kept": kept}))


def test_a_missing_plan_names_the_command(tmp_path):
    with pytest.raises(ArtifactError, match="Run 'lpdeploy prune"):
        load_plan(tmp_path / "plan.json")


def test_a_broken_plan_is_refused(tmp_path):
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(ArtifactError, match="not valid JSON"):
        load_plan(tmp_path / "plan.json")
