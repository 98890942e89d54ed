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


def test_round_trip_through_json():
    plan = make_plan()
    again = PruningPlan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan


def test_a_spec_knows_its_kind_and_layer():
    assert (SPEC.kind, SPEC.layer) == ("heads", 3)


@pytest.mark.parametrize("kept", [[2, 0], [0, 0], [-1, 2], [1, 4]])
def test_impossible_indices_are_refused(kept):
    with pytest.raises(ValueError, match="must be ascending, unique and below 4"):
        check_kept(SPEC, kept)


def test_an_empty_layer_is_refused():
    with pytest.raises(ValueError, match="at least one must stay"):
        check_kept(SPEC, [])


def test_another_schema_version_is_refused():
    data = {**make_plan().to_json(), "schema_version": 99}
    with pytest.raises(ArtifactError, match="schema version 99; this lpdeploy reads 1"):
        PruningPlan.from_json(data)


def test_a_plan_without_a_field_is_refused():
    data = make_plan().to_json()
    del data["specs"]
    with pytest.raises(ArtifactError, match="not a plan that lpdeploy wrote"):
        PruningPlan.from_json(data)


def test_a_missing_plan_names_the_command(tmp_path):
    with pytest.raises(ArtifactError, match="Run 'lpdeploy prune"):
        load_plan(tmp_path / "plan.json")


def test_a_broken_plan_is_refused(tmp_path):
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(ArtifactError, match="not valid JSON"):
        load_plan(tmp_path / "plan.json")
