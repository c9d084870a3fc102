"""Two experts in one run: the model that is one of them at a time, and the adapter that is both of theirs."""

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
    """Two models of which one answers, at first the one for high noise; with `parkings` the other is parked in CPU RAM
    meanwhile, and at first already.

    `active` is the one that answers. With `exchanging` what is trained of the other still has a part in the result,
    nothing times it: processes that exchange gradients wait for all of them.
    """

    def __init__(self, models: Pair[Any], *, parkings: Pair[Parking] | None = None, exchanging: bool = False) -> None:
        super().__init__()
        self.high_noise, self.low_noise = models.high_noise, models.low_noise
        self._parkings, self._exchanging = parkings, exchanging
        self.active = ORDER[0]

    def of(self, expert: str) -> nn.Module:
        """That expert's model, which answers from now on."""
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
    """Park one model and bring the other; where that fails, for want of memory, the first is back."""
    there.park()
    try:
        parked.bring()
    except BaseException:
        parked.park()
        there.bring()
        raise


class PairAdapter:
    """The adapters of both experts as one `Adapter`; `parts` are what is saved apart."""

    def __init__(self, parts: Pair[Adapter]) -> None:
        self.parts = parts

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """The groups of one, then of the other: each learns by itself."""
        return [group for _, part in self.parts.items() for group in part.parameter_groups(learning_rate)]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Both, under the expert's name."""
        for expert, part in self.parts.items():
            yield from ((f"{expert}.{name}", parameter) for name, parameter in part.named_parameters())

    def parameters_of(self, expert: str) -> list[nn.Parameter]:
        """What is trained of one expert."""
        return [parameter for _, parameter in self.parts.of(expert).named_parameters()]

    def export(self, read: Callable[[nn.Parameter], Tensor] = Tensor.detach) -> dict[str, Tensor]:
        """Both, under the expert's name; files hold each part by itself."""
        return {f"{expert}.{key}": t for expert, part in self.parts.items() for key, t in part.export(read).items()}

    def metadata(self) -> dict[str, str]:
        """That of one: both are of the same settings."""
        return self.parts.low_noise.metadata()

    def describe(self) -> str:
        """One of them in words."""
        return f"of each expert: {self.parts.low_noise.describe()}"

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `export` gave."""
        for expert, part in self.parts.items():
            mine = {k.removeprefix(f"{expert}."): t for k, t in tensors.items() if k.startswith(f"{expert}.")}
            part.load(mine)

    def disabled(self) -> AbstractContextManager[None]:
        """While it lasts both models compute as if they had never been trained."""
        return _all_of(part.disabled() for _, part in self.parts.items())

    def norm(self) -> float:
        """The length of what both have learnt."""
        return float(sum(part.norm() ** 2 for _, part in self.parts.items()) ** 0.5)

    def scale_norms(self, limit: float) -> Norms:
        """Shrink each module's change of either to this norm at most."""
        each = [part.scale_norms(limit) for _, part in self.parts.items()]
        mean = sum(norms.mean for norms in each) / len(each)
        return Norms(sum(norms.num_scaled for norms in each), mean, max(norms.maximum for norms in each))


def parts_of(adapter: Adapter) -> list[tuple[str | None, Adapter]]:
    """The adapters of the experts, by expert; None for one that is of no pair."""
    return list(adapter.parts.items()) if isinstance(adapter, PairAdapter) else [(None, adapter)]


def saved_parts(adapter: Adapter) -> list[tuple[str | None, str | None, Adapter]]:
    """What is saved in a file of its own: what is added to the name, the expert, if there are two, and the adapter."""
    rows: list[tuple[str | None, str | None, Adapter]] = []
    for expert, part in parts_of(adapter):
        inner: Mapping[str | None, Adapter] = part.parts if isinstance(part, Both) else {None: part}
        rows += [("_".join(filter(None, (expert, kind))) or None, expert, own) for kind, own in inner.items()]
    return rows


class PairEma:
    """The averages of both experts' adapters; that of the one whose turn it is not rests with it."""

    def __init__(self, parts: Pair[Ema]) -> None:
        self.parts = parts

    def update(self, expert: str | None) -> None:
        """Take in what this expert has learnt in a step."""
        self.parts.of(str(expert)).update()

    @property
    def averages(self) -> dict[nn.Parameter, Tensor]:
        """The average of each parameter of either."""
        return self.parts.high_noise.averages | self.parts.low_noise.averages

    def applied(self, forget: Callable[[], None]) -> AbstractContextManager[None]:
        """While it lasts the parameters of both hold their averages."""
        return _all_of(part.applied(forget) for _, part in self.parts.items())

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` takes."""
        return {expert: part.state_dict() for expert, part in self.parts.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a saved state."""
        for expert, part in self.parts.items():
            part.load_state_dict(state[expert])


@contextmanager
def _all_of(contexts: Iterable[AbstractContextManager[None]]) -> Iterator[None]:
    """Enter each of them in turn, and leave them in reverse."""
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield
