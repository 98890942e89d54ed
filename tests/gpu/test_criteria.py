"""Scores on a GPU are those on a CPU."""

import pytest
import torch

from lpdeploy.criteria import CRITERIA
from lpdeploy.pruning.scoring import Scorer
from tests.pruning.independent import assert_scores, make_rows
from tests.pruning.test_criteria import make, score


@pytest.mark.parametrize("name", CRITERIA)
def test_scores_on_a_gpu_as_on_a_cpu(name, tmp_path):
    wrapped, causal_lm, specs = make(tmp_path)
    batch = make_rows((12, 9))
    form = {"offload_gradients": True}
    torch.manual_seed(0)
    expected = score(Scorer(CRITERIA[name], causal_lm, specs, **form), wrapped, batch)
    wrapped.cuda()
    batch.ids = batch.ids.cuda()
    batch_cpu_mask = batch.mask.cpu()
    scorer = Scorer(CRITERIA[name], causal_lm, specs, **form)
    torch.manual_seed(0)
    with scorer.observe():
        scorer.attention_mask = batch_cpu_mask
        batch.run(wrapped).backward()
    if name == "gradient":
        assert {g.device.type for g in scorer._observed.values()} == {"cpu"}
    scores = scorer.compute_importance()
    for spec in specs:
        assert scores[spec.name].device.type == "cuda"
        assert_scores(scores[spec.name].cpu(), expected[spec.name])
