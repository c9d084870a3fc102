"""What the model knew is kept: its own predictions without the adapter are what is compared with."""

from pathlib import Path

import pytest
import torch

from dataset.batching.order import SampleKey
from networks.adapter import create
from networks.settings import NetworkSettings
from wan_train.conditions.conditions import Conditions
from wan_train.errors import InputError
from wan_train.models.dit.dit import Dit, DitConfig
from wan_train.training.objective.loss import Draws
from wan_train.training.objective.prior import Prior, prior_loss, read_captions


def text(seed: int) -> torch.Tensor:
    return torch.randn(5, 16, generator=torch.Generator().manual_seed(seed))


def test_the_teacher_is_the_model_without_its_adapter() -> None:
    torch.manual_seed(0)
    model = Dit(DitConfig(dim=32, ffn_dim=48, num_heads=2, num_layers=2, text_dim=16))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    adapter = create(model, NetworkSettings(network_dim=4, network_alpha=4))
    latents, draws = torch.randn(1, 16, 1, 4, 4), Draws(torch.tensor([0.4]), torch.randn(1, 16, 1, 4, 4))
    conditions = Conditions((text(0),))
    assert float(prior_loss(model, model, adapter, latents, conditions, draws)) == 0  # nothing is learnt yet
    for name, parameter in adapter.named_parameters():
        if name.endswith("up.weight"):
            torch.nn.init.normal_(parameter, std=0.1)
    loss = prior_loss(model, model, adapter, latents, conditions, draws)
    noisy = 0.6 * latents + 0.4 * draws.noise
    with torch.no_grad():
        ours = model(noisy, torch.tensor([400.0]), [text(0)])
        with adapter.disabled():
            theirs = model(noisy, torch.tensor([400.0]), [text(0)])
    assert float(loss) == pytest.approx(float((ours - theirs).square().mean()), rel=1e-5) and float(loss) > 0
    loss.backward()
    assert all(parameter.grad is not None for _, parameter in adapter.named_parameters())


def test_captions_are_drawn_by_key() -> None:
    prior = Prior([text(i) for i in range(5)], 1.0)
    keys = [SampleKey(f"clip{i}", 0) for i in range(40)]
    together = prior.choose(keys, seed=1, epoch=2)
    alone = [prior.choose([key], seed=1, epoch=2)[0] for key in keys]
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))
    assert len({float(each[0, 0]) for each in together}) == 5
    other = prior.choose(keys, seed=1, epoch=3)
    assert any(not torch.equal(a, b) for a, b in zip(together, other, strict=True))


def test_captions_come_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "captions.txt"
    path.write_text("# kept\na man walks\n\n  a dog runs \n")
    assert read_captions(str(path)) == ["a man walks", "a dog runs"]
    path.write_text("# nothing\n")
    with pytest.raises(InputError, match="has no captions"):
        read_captions(str(path))
    with pytest.raises(InputError, match="cannot be read"):
        read_captions(str(tmp_path / "absent.txt"))
