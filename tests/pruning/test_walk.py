"""What a long walk through the layers says of itself."""

import logging

import pytest
from torch import nn

from lpdeploy.models.cutting import DroppedLayer
from lpdeploy.pruning import walk
from lpdeploy.pruning.ranks import Ranks
from lpdeploy.pruning.walk import Pace, walk_layers


class Model:
    def __init__(self, *layers):
        self.model = self
        self.layers = layers


def test_it_skips_dropped_layers_and_speaks_once_a_minute(monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="lpdeploy")
    now = [0.0]
    monkeypatch.setattr(walk.time, "monotonic", lambda: now[0])
    layers = [nn.Linear(1, 1), DroppedLayer(), nn.Linear(1, 1), nn.Linear(1, 1)]
    seen = []
    for index, layer in walk_layers(Model(*layers), Pace("Refitting", Ranks())):
        assert layer is layers[index]
        seen.append(index)
        now[0] += 45
    assert seen == [0, 2, 3]
    assert [record.getMessage() for record in caplog.records] == ["Refitting: layer 4 of 4"]


@pytest.mark.parametrize("seconds", [0, 59])
def test_short_work_is_silent(monkeypatch, caplog, seconds):
    caplog.set_level(logging.INFO, logger="lpdeploy")
    times = iter([0.0, float(seconds)])
    monkeypatch.setattr(walk.time, "monotonic", lambda: next(times))
    Pace("Scoring", Ranks()).say("layer 1 of 2")
    assert not caplog.records
