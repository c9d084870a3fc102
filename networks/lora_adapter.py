"""The LoRA branches of a model as an `Adapter`."""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from networks.formats import LoraDelta, kohya_state, read_lora, require_fit
from networks.lora import Branch, attach_branch, initial_down
from networks.settings import NetworkSettings
from wan_train.cli import InputError

SMALL_SCALE = 0.25  # below this the log says where a weak result may come from


class Lora:
    """The branches of a model, as an `Adapter`. Weights are float32, saved under kohya's names with alpha."""

    def __init__(self, targets: Mapping[str, nn.Linear], settings: NetworkSettings, *, seed: int) -> None:
        assert targets, "the model has no Linear to adapt"
        self.settings = settings
        # Rounded as it will be saved, so that what a file holds is exactly what was trained.
        self.scale = float(torch.tensor(settings.network_alpha)) / settings.dim
        self.branches: dict[str, Branch] = {}
        for name, linear in targets.items():
            device = linear.weight.device
            down = initial_down(name, (settings.dim, linear.in_features), seed).to(device)
            up = torch.zeros(linear.out_features, settings.dim, device=device)
            branch = Branch(down, up, scale=self.scale, dropout=settings.network_dropout or 0.0)
            attach_branch(linear, branch.train(linear.training))
            self.branches[name] = branch

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """One group of all pairs."""
        return [{"params": self._parameters(), "lr": learning_rate}]

    def export(self) -> dict[str, Tensor]:
        """`lora_unet_{module}.lora_down.weight` (r, in), `.lora_up.weight` (out, r) and `.alpha`, float32."""
        return kohya_state(
            {
                name: LoraDelta(branch.down.weight.detach(), branch.up.weight.detach(), self.scale)
                for name, branch in self.branches.items()
            }
        )

    def metadata(self) -> dict[str, str]:
        """Module, dim, alpha and dropout, as a loader needs them to build the network again."""
        settings = self.settings
        rows = {
            "ss_network_module": settings.network_module,
            "ss_network_dim": str(settings.dim),
            "ss_network_alpha": str(settings.network_alpha),
            "ss_network_dropout": str(settings.network_dropout),
        }
        if settings.network_args:
            rows["ss_network_args"] = json.dumps(dict(text.split("=", 1) for text in settings.network_args))
        return rows

    def describe(self) -> str:
        """How many modules and parameters, and how strongly they count."""
        count = sum(parameter.numel() for parameter in self._parameters())
        text = (
            f"LoRA on {len(self.branches)} modules, {count:,} parameters, dim {self.settings.dim}, "
            f"alpha {self.settings.network_alpha:g}, alpha/dim {self.scale:g}"
        )
        if self.scale >= SMALL_SCALE:
            return text
        return (
            f"{text}\nwhat is learnt counts alpha/dim, and --network_alpha is 1 unless given: "
            f"if the result is too weak, raise it (with {self.settings.dim} the factor is 1) or the learning rate"
        )

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over a LoRA of any known naming, of this dim and these modules; its own alpha/dim is kept in `up`."""
        deltas = read_lora(tensors, self.branches)
        missing = [name for name in self.branches if name not in deltas]
        if missing:
            listed = ", ".join(missing[:10])
            raise InputError(
                f"the LoRA lacks {len(missing)} modules of the network: {listed}; give one of this network"
            )
        for name, branch in self.branches.items():
            _require_size(name, deltas[name], branch)
        for name, branch in self.branches.items():
            delta = deltas[name]
            branch.down.weight.copy_(delta.down)
            branch.up.weight.copy_(delta.up)
            if delta.scale != branch.scale:
                branch.up.weight.mul_(delta.scale / branch.scale)

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for branch in self.branches.values() for parameter in branch.parameters()]


def _require_size(name: str, delta: LoraDelta, branch: Branch) -> None:
    given, wanted = delta.down.shape[0], branch.down.weight.shape[0]
    if given != wanted:
        raise InputError(f"the LoRA's {name} has dim {given}, the network {wanted}: set --network_dim {given}")
    ours = (branch.up.weight.shape[0], branch.down.weight.shape[1])
    require_fit(name, (delta.up.shape[0], delta.down.shape[1]), ours, "the LoRA")
