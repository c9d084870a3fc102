"""A sampling step waits for the device once, for its velocity: none of its passes waits for the one before it."""

from dataclasses import replace

import pytest
import torch

from tests.unit.models.dit.test_dit import CONFIG
from tests.waits import META, counting_waits
from wan_train.conditions.conditions import Conditions
from wan_train.models.dit.dit import Dit
from wan_train.placement.transfers import fetch
from wan_train.sampling.guidance import Guidance, guide, plan_steps


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("layers", [(), (1,)])
def test_a_step_waits_once(merge: bool, layers: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    guidance = replace(Guidance(), merge=merge, slg_layers=layers, slg_start=0.0, slg_end=1.0)
    model = Dit(CONFIG).to(META)
    texts = [Conditions((torch.randn(length, 20),)) for length in (7, 3)]
    with counting_waits(monkeypatch) as waits, torch.no_grad():
        predict = guide(model, *texts, guidance, device=META)
        x = torch.randn(1, 16, 3, 4, 6)
        for plan in plan_steps(3, guidance):
            velocity = predict(x, torch.tensor(500.0), plan).float()
            assert not waits.found, "a pass waits"
            x = x - 0.1 * fetch(velocity)
            assert waits.found == {"event": 1}
            waits.found.clear()
