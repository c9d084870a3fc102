"""Train two experts in one run: a model of which one expert is active at a time, and an adapter of both."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from networks.adapter import Adapter
from networks.both import Both
from networks.norms import Norms
from wan_train.models.dit.experts import ORDER, Pair
from wan_train.placement.parking import Parking
from wan_train.training.optimizing.ema import Ema


class PairModel(nn.Module):
    """Two models of which one is active, initially the high-noise one. With `parkings` the inactive model is parked in
    CPU RAM from the start.

    With `exchanging` the inactive expert's trained parameters are added to the result times 0, since processes that
    synchronise gradients wait for all parameters.
    """

    def __init__(self, models: Pair[Any], *, parkings: Pair[Parking] | None = None, exchanging: bool = False) -> None:
        super().__init__()
        self.high_noise, self.low_noise = models.high_noise, models.low_noise
        self._parkings, self._exchanging = parkings, exchanging
        self.active = ORDER[0]

    def of(self, expert: str) -> nn.Module:
        """Activate an expert and return its model."""
        if expert != self.active:
            if self._parkings is not None:
                _change_places(self._parkings.of(self.active), self._parkings.of(expert))
            self.active = expert
        return getattr(self, expert)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        (idle,) = (expert for expert in ORDER if expert != self.active)
        velocity: Tensor = getattr(self, self.active)(*args, **kwargs)
        if not (self._exchanging and torch.is_grad_enabled()):
            return velocity
        waiting = [parameter for parameter in getattr(self, idle).parameters() if parameter.requires_grad]
        return velocity + 0 * torch.stack([parameter.sum() for parameter in waiting]).sum() if waiting else velocity


def _change_places(there: Parking, parked: Parking) -> None:
    """Park one model and bring the other to the device; if that fails, for example out of memory, bring the first
    back."""
    there.park()
    try:
        parked.bring()
    except BaseException:
        parked.park()
        there.bring()
        raise


class PairAdapter:
    """The adapters of both experts as one `Adapter`; `parts` are saved in separate files."""

    def __init__(self, parts: Pair[Adapter]) -> None:
        self.parts = parts

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """Return the parameter groups of both experts, separately."""
        return [group for _, part in self.parts.items() for group in part.parameter_groups(learning_rate)]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Return the parameters of both, prefixed with the expert's name."""
        for expert, part in self.parts.items():
            yield from ((f"{expert}.{name}", parameter) for name, parameter in part.named_parameters())

    def parameters_of(self, expert: str) -> list[nn.Parameter]:
        """Return the trained parameters of one expert."""
        return [parameter for _, parameter in self.parts.of(expert).named_parameters()]

    def export(self, read: Callable[[nn.Parameter], Tensor] = Tensor.detach) -> dict[str, Tensor]:
        """Return the tensors of both, prefixed with the expert's name; files hold each expert separately."""
        return {f"{expert}.{key}": t for expert, part in self.parts.items() for key, t in part.export(read).items()}

    def metadata(self) -> dict[str, str]:
        """Return the metadata of one expert; both have the same settings."""
        return self.parts.low_noise.metadata()

    def describe(self) -> str:
        """Describe one of the two adapters."""
        return f"of each expert: {self.parts.low_noise.describe()}"

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Load what `export` returned."""
        for expert, part in self.parts.items():
            mine = {k.removeprefix(f"{expert}."): t for k, t in tensors.items() if k.startswith(f"{expert}.")}
            part.load(mine)

    def disabled(self) -> AbstractContextManager[None]:
        """Disable both adapters inside."""
        return _all_of(part.disabled() for _, part in self.parts.items())

    def norm(self) -> float:
        """Return the norm of both adapters together."""
        return float(sum(part.norm() ** 2 for _, part in self.parts.items()) ** 0.5)

    def scale_norms(self, limit: float) -> Norms:
        """Scale down each module's change in both adapters to at most this norm."""
        each = [part.scale_norms(limit) for _, part in self.parts.items()]
        mean = sum(norms.mean for norms in each) / len(each)
        return Norms(sum(norms.num_scaled for norms in each), mean, max(norms.maximum for norms in each))


def parts_of(adapter: Adapter) -> list[tuple[str | None, Adapter]]:
    """Return the adapters by expert; the key is None for an adapter that is not of a pair."""
    return list(adapter.parts.items()) if isinstance(adapter, PairAdapter) else [(None, adapter)]


def saved_parts(adapter: Adapter) -> list[tuple[str | None, str | None, Adapter]]:
    """Return what is saved in separate files: the suffix of the name, the expert, if there are two, and the adapter."""
    rows: list[tuple[str | None, str | None, Adapter]] = []
    for expert, part in parts_of(adapter):
        inner: Mapping[str | None, Adapter] = part.parts if isinstance(part, Both) else {None: part}
        rows += [("_".join(filter(None, (expert, kind))) or None, expert, own) for kind, own in inner.items()]
    return rows


class PairEma:
    """The EMA of both experts' adapters; the inactive expert's is not updated."""

    def __init__(self, parts: Pair[Ema]) -> None:
        self.parts = parts

    def update(self, expert: str | None) -> None:
        """Update this expert's EMA after a step."""
        self.parts.of(str(expert)).update()

    @property
    def averages(self) -> dict[nn.Parameter, Tensor]:
        """EMA of each parameter of both experts."""
        return self.parts.high_noise.averages | self.parts.low_noise.averages

    def applied(self, forget: Callable[[], None]) -> AbstractContextManager[None]:
        """Replace the parameters of both with their EMA inside."""
        return _all_of(part.applied(forget) for _, part in self.parts.items())

    def state_dict(self) -> dict[str, Any]:
        """Return the state of both."""
        return {expert: part.state_dict() for expert, part in self.parts.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a saved state."""
        for expert, part in self.parts.items():
            part.load_state_dict(state[expert])


@contextmanager
def _all_of(contexts: Iterable[AbstractContextManager[None]]) -> Iterator[None]:
    """Enter several contexts in order, and exit in reverse order."""
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield
