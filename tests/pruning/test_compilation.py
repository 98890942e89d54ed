"""torch.compile after the last event: the same training, and a clear word where it cannot be."""

import pytest
import torch

from lpdeploy.errors import LpdeployError
from lpdeploy.pruning import compilation
from lpdeploy.pruning.compilation import check_compile
from lpdeploy.pruning.training import run_steps
from tests.pruning.test_training import make_training

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def traced_only(monkeypatch):
    """Trace the graphs as every backend does, and run them without a C++ compiler."""
    monkeypatch.setattr(compilation, "BACKEND", "aot_eager")
    torch.compiler.reset()


def list_compiled(training):
    return [layer._compiled_call_impl is not None for layer in training.state.model.model.layers]


@pytest.mark.parametrize("removal", ["cut", "mask"])
def test_compiled_layers_train_alike(tmp_path, removal):
    options = {"steps": 8, "prune_cooldown": 0.5, "prune_warmup": 0.0, "removal": removal}
    plain = make_training(tmp_path, **options)
    compiled = make_training(tmp_path, compile=True, **options)
    last = compiled.schedule.list_events()[-1]
    assert last < 8
    losses = [[], []]
    for info, other in zip(run_steps(plain), run_steps(compiled), strict=True):
        losses[0].append(info.loss)
        losses[1].append(other.loss)
        assert list_compiled(compiled) == [other.step > last] * 2
    # The same operations, some decomposed: float32 rounding, through AdamW.
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert not any(list_compiled(plain))


def test_a_resumed_run_compiles_at_once(tmp_path):
    training = make_training(tmp_path, steps=8, prune_cooldown=0.5, prune_warmup=0.0, compile=True)
    next(run_steps(training, start=6))
    assert all(list_compiled(training))


def test_where_nothing_can_be_compiled(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("No working C++ compiler found\nand more")

    monkeypatch.setattr(torch, "compile", fail)
    sentence = r"cannot compile for cpu here: No working C\+\+ compiler found. Install .* `compile`"
    with pytest.raises(LpdeployError, match=sentence):
        check_compile(torch.device("cpu"))


def test_where_it_can():
    check_compile(torch.device("cpu"))
