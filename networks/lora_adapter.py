"""The LoRA branches of a model as an `Adapter`."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from networks.deltas.branch import Target, attach_branch, branch_targets, disabled, weight_shape
from networks.deltas.lora import LoraBranch, LoraDelta, initial_down
from networks.formats.files import kohya_state, read_lora, require_fit
from networks.lora_arguments import lora_arguments
from networks.norms import Norms, by_shape, delta_norms, limit_norms
from networks.settings import NetworkSettings, read_arguments
from wan_train.errors import InputError
from wan_train.storage import TensorSource

SMALL_SCALE = 0.25  # below this, the log explains how alpha may make the result weak


@dataclass(frozen=True)
class Size:
    """Rank and alpha of a pair; alpha is rounded to float32, so that a file stores exactly what was trained."""

    dim: int
    alpha: float

    @classmethod
    def of(cls, dim: int, alpha: float) -> "Size":
        """Return a size with alpha rounded to float32."""
        return cls(dim, float(torch.tensor(alpha, dtype=torch.float32)))

    @property
    def scale(self) -> float:
        """The effective scale, alpha/rank."""
        return self.alpha / self.dim


class Lora:
    """The branches of a model as an `Adapter`. Weights are float32 and are saved with kohya's names and alpha.

    `sizes` are those of the pairs by module name; default: those of the settings for all pairs.
    """

    def __init__(
        self,
        targets: Mapping[str, Target],
        settings: NetworkSettings,
        *,
        seed: int,
        sizes: Mapping[str, Size] | None = None,
    ) -> None:
        assert targets, "the model has no modules to adapt"
        self.settings, self.arguments = settings, lora_arguments(settings)
        self.sizes = sizes or dict.fromkeys(targets, Size.of(settings.dim, settings.network_alpha))
        self.branches: dict[str, LoraBranch] = {}
        for name, target in targets.items():
            size, device = self.sizes[name], target.weight.device
            num_outputs, num_inputs, *window = weight_shape(target)
            down = initial_down(name, (size.dim, num_inputs, *window), seed).to(device)
            up = torch.zeros(num_outputs, size.dim, *(1 for _ in window), device=device)
            branch = LoraBranch(
                down,
                up,
                scale=size.scale,
                dropout=settings.network_dropout or 0.0,
                rank_dropout=self.arguments.rank_dropout,
                module_dropout=self.arguments.module_dropout,
            )
            attach_branch(target, branch.train(target.training))
            self.branches[name] = branch
        self._groups = by_shape(self.branches.values())

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """Return one group of all pairs; with `loraplus_lr_ratio`, one of all `down` and one of all `up`, at the
        learning rate times the ratio (LoRA+, Hayou et al. 2024)."""
        ratio = self.arguments.loraplus_lr_ratio
        if ratio == 1:
            return [{"params": [parameter for _, parameter in self.named_parameters()], "lr": learning_rate}]
        branches = self.branches.values()
        return [
            {"params": [branch.down.weight for branch in branches], "lr": learning_rate},
            {"params": [branch.up.weight for branch in branches], "lr": learning_rate * ratio},
        ]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield each pair's `{module}.lora.down.weight` and `.up.weight`, in the model's order."""
        for name, branch in self.branches.items():
            yield f"{name}.lora.down.weight", branch.down.weight
            yield f"{name}.lora.up.weight", branch.up.weight

    def act_on(self, model: nn.Module) -> None:
        """Attach the same pairs to another model of the same geometry."""
        model.requires_grad_(False)
        targets = branch_targets(model)
        for name, branch in self.branches.items():
            attach_branch(targets[name], branch)

    def disabled(self) -> AbstractContextManager[None]:
        """Return a context in which the model computes without branches; see `networks.deltas.branch.disabled`."""
        return disabled(self.branches.values())

    def norm(self) -> float:
        """Return the Frobenius norm of the change of all weights together."""
        return float(delta_norms(self._groups).norm())

    def scale_norms(self, limit: float) -> Norms:
        """Limit each module's ||alpha/dim * up @ down|| to `limit`."""
        return limit_norms(self._groups, limit)

    def export(self, read: Callable[[nn.Parameter], Tensor] = Tensor.detach) -> dict[str, Tensor]:
        """Return `lora_unet_{module}.lora_down.weight` (r, in) or (r, in, k, k), `.lora_up.weight` (out, r) or (out, r,
        1, 1) and `.alpha`, in float32."""
        return kohya_state(
            {
                name: LoraDelta(read(branch.down.weight), read(branch.up.weight), branch.scale)
                for name, branch in self.branches.items()
            }
        )

    def metadata(self) -> dict[str, str]:
        """Return the module, dim, alpha and dropout that a loader needs to rebuild the network."""
        settings = self.settings
        common = self._common_size()
        rows = {
            "ss_network_module": settings.network_module,
            "ss_network_dim": str(common.dim) if common else "Dynamic",  # as in sd-scripts, for several ranks
            "ss_network_alpha": str(self._alpha(common)) if common else "Dynamic",
            "ss_network_dropout": str(settings.network_dropout),
        }
        if settings.network_args:
            rows["ss_network_args"] = json.dumps(read_arguments(settings))
        return rows

    def describe(self) -> str:
        """Return the number of modules and parameters and the effective scale; with `verbose`, also the size of each
        module."""
        count = sum(parameter.numel() for _, parameter in self.named_parameters())
        text = f"LoRA on {len(self.branches)} modules, {count:,} parameters, "
        common = self._common_size()
        if common is None:
            dims = [size.dim for size in self.sizes.values()]
            text += f"dims {min(dims)} to {max(dims)}, each with its own alpha"
        else:
            text += f"dim {common.dim}, alpha {self._alpha(common):g}, effective scale alpha/rank {common.scale:g}"
            text += "".join(
                f", convolutions dim {size.dim}, alpha {size.alpha:g}" for size in set(self.sizes.values()) - {common}
            )
            if common.scale < SMALL_SCALE:
                text += (
                    f"\neffective LoRA scale is alpha/rank = {common.scale:g} (--network_alpha defaults to 1): if the"
                    f" result is too weak, raise --network_alpha ({common.dim} gives scale 1) or --learning_rate"
                )
        if self.arguments.verbose:
            text += "".join(f"\n{name}: dim {size.dim}, alpha {size.alpha:g}" for name, size in self.sizes.items())
        return text

    @torch.no_grad()
    def load(self, tensors: TensorSource) -> None:
        """Load a LoRA in any known naming, with these dims and modules; its own alpha/dim is folded into `up`."""
        self.take(read_lora(tensors, self.branches))

    @torch.no_grad()
    def take(self, deltas: Mapping[str, LoraDelta]) -> None:
        """Load the pairs of a LoRA by official module name, as `load` does."""
        missing = [name for name in self.branches if name not in deltas]
        if missing:
            listed = ", ".join(missing[:10])
            raise InputError(
                f"the LoRA lacks {len(missing)} modules of the network: {listed}; use a LoRA with the same modules"
            )
        for name, branch in self.branches.items():
            _require_size(name, deltas[name], branch)
        for name, branch in self.branches.items():
            delta = deltas[name]
            branch.down.weight.copy_(delta.down)
            branch.up.weight.copy_(delta.up)
            if delta.scale != branch.scale:
                branch.up.weight.mul_(delta.scale / branch.scale)

    def _common_size(self) -> Size | None:
        """Return the size of all pairs, ignoring convolutions with conv_dim or conv_alpha; None if they differ."""
        if not self.settings.dim_from_weights:
            return Size.of(self.settings.dim, self.settings.network_alpha)
        sizes = set(self.sizes.values())
        return sizes.pop() if len(sizes) == 1 else None

    def _alpha(self, common: Size) -> float:
        """Return alpha as the user wrote it, if it comes from the settings."""
        return common.alpha if self.settings.dim_from_weights else self.settings.network_alpha


def _require_size(name: str, delta: LoraDelta, branch: LoraBranch) -> None:
    given, wanted = delta.down.shape[0], branch.down.weight.shape[0]
    if given != wanted:
        raise InputError(f"the LoRA's {name} has dim {given}, the network {wanted}: set --network_dim {given}")
    ours = (branch.up.weight.shape[0], *branch.down.weight.shape[1:])
    require_fit(name, delta.shape, ours, "the LoRA")
