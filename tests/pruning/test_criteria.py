"""Each criterion over whole specs, against plain loops and against autograd itself."""

import pytest
import torch

from lpdeploy.models.adapters import get_base_linear, get_lora_weights
from lpdeploy.models.groups import list_group_specs
from lpdeploy.pruning.criteria import build_criterion
from tests import reference
from tests.helpers import make_lora_model

RTOL = 1e-4  # float32 sums in another order; the loops run in float64


def score_batch(criterion, model):
    ids = torch.arange(24).view(2, 12) % 50
    with criterion.observe():
        model(input_ids=ids, labels=ids).loss.backward()
    return criterion.compute_importance()


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_lora_sums_over_all_linears_of_a_spec(kv_heads, tmp_path):
    model = make_lora_model(tmp_path, kv_heads=kv_heads)
    causal_lm = model.get_base_model()
    specs = list_group_specs(causal_lm.config)
    scores = score_batch(build_criterion("lora", causal_lm, specs), model)
    for spec in (specs[0], specs[3]):
        expected = torch.zeros(spec.num_groups, dtype=torch.float64)
        for piece in spec.slices:
            linear = causal_lm.get_submodule(piece.module)
            lora = get_lora_weights(linear)
            parts = [get_base_linear(linear).weight, lora.lora_a, lora.lora_b]
            parts += [lora.lora_a.grad, lora.lora_b.grad]
            every = reference.weight_importance(
                *[p.detach().double().tolist() for p in parts], lora.scaling
            )
            groups = reference.group_importance(every, piece.dim, piece.block)
            expected += torch.tensor(groups, dtype=torch.float64)
        torch.testing.assert_close(
            scores[spec.name], expected, rtol=RTOL, atol=0, check_dtype=False
        )


def test_lora_needs_gradients(tmp_path):
    causal_lm = make_lora_model(tmp_path).get_base_model()
    criterion = build_criterion("lora", causal_lm, list_group_specs(causal_lm.config))
    with pytest.raises(ValueError, match="call backward first"):
        criterion.compute_importance()
