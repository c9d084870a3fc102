"""Load the models of a run, attach adapters and apply the settings that save memory."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property

import torch
from accelerate import Accelerator
from torch import nn

from networks.adapter import Adapter
from wan_train.assemble import ModelSettings, WeightedLora, assemble_dit, attach_adapter, finish_dit
from wan_train.errors import InputError
from wan_train.log import get_logger
from wan_train.models.dit.dit import Dit
from wan_train.models.dit.experts import LOW, ORDER, pair_of
from wan_train.placement.lanes import lane_from_host
from wan_train.placement.parking import Parking
from wan_train.placement.stream import Stream
from wan_train.precision import dtype_of, name_of
from wan_train.training.experts.pair import PairAdapter, PairModel
from wan_train.training.experts.plan import ExpertPlan, only_expert, settings_of
from wan_train.training.optimizing.stepping import Streams
from wan_train.training.settings import TrainSettings

log = get_logger(__name__)


@dataclass(frozen=True)
class TrainedModel:
    """The model in training, or both experts as one.

    `dit` is the bare model, and `wrapped` is the model as wrapped by accelerate, which training passes go through.
    `adapter` holds the trained parameters, and `experts` says which expert each step trains.
    """

    accelerator: Accelerator
    dit: Dit | PairModel
    wrapped: nn.Module
    adapter: Adapter
    experts: ExpertPlan

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        return self.accelerator.device

    @property
    def num_processes(self) -> int:
        """Number of processes that train together."""
        return int(self.accelerator.num_processes)

    @cached_property
    def trained(self) -> dict[str, nn.Parameter]:
        """Trained parameters by name."""
        return dict(self.adapter.named_parameters())

    def exchange(self, *, now: bool) -> AbstractContextManager[None]:
        """Synchronise gradients between processes in the backward pass inside, or only accumulate them."""
        return nullcontext() if now else self.accelerator.no_sync(self.wrapped)


def make_models(
    settings: TrainSettings, experts: ExpertPlan, accelerator: Accelerator, seed: int
) -> tuple[Dit | PairModel, Adapter, Streams]:
    """Load the DiT, or both experts, each with its adapter and the stream of its weights."""
    if not experts.is_pair:
        model, adapter, stream = make_model(settings_of(settings, only_expert(experts)), accelerator, seed)
        return model, adapter, {None: stream}
    made: dict[str, tuple[Dit, Adapter, Stream]] = {}
    parkings = dict[str, Parking]()
    lane = lane_from_host(accelerator.device) if settings.experts.offload_inactive_dit else None
    for expert in reversed(experts.trained):
        shared = made[LOW][1] if settings.experts.shared_lora and made else None
        made[expert] = make_model(settings_of(settings, expert), accelerator, seed, shared=shared)
        if lane is not None:
            parkings[expert] = Parking(made[expert][0], lane)
            if expert != ORDER[0]:
                parkings[expert].park()  # before the other one is loaded
    models = pair_of({expert: model for expert, (model, _, _) in made.items()})
    parts = pair_of({expert: adapter for expert, (_, adapter, _) in made.items()})
    pair = PairModel(
        models,
        parkings=pair_of(parkings) if parkings else None,
        exchanging=accelerator.num_processes > 1 and not settings.optimizer.fused_backward_pass,
    )
    streams: Streams = {expert: stream for expert, (_, _, stream) in made.items()}
    return pair, parts.low_noise if settings.experts.shared_lora else PairAdapter(parts), streams


def make_model(
    settings: TrainSettings, accelerator: Accelerator, seed: int, *, shared: Adapter | None = None
) -> tuple[Dit, Adapter, Stream]:
    """Load the DiT and attach a new adapter, or one that is `shared` with another DiT; return both and the stream of
    its weights."""
    device = accelerator.device
    dtype = None if accelerator.mixed_precision == "no" else dtype_of(accelerator.mixed_precision)
    log.info("loading %s%s", settings.dit.dit, f" in {name_of(dtype)}" if dtype else "")
    model = assemble_dit(
        model_settings(settings),
        device=device,
        dtype=dtype,
        computing=None if dtype else torch.float32,
        loras=[WeightedLora(path, multiplier) for path, multiplier in settings.network.base_loras],
    )
    if shared is not None:
        share_adapter(shared, model)
    adapter = shared or attach_adapter(model, settings.network, settings.stream, seed=seed, device=device)
    stream = finish_dit(model, model_settings(settings), device)
    if shared is None:
        log.info(adapter.describe())
    return model, adapter, stream


def share_adapter(adapter: Adapter, model: Dit) -> None:
    """Attach an adapter to a second model. Raise InputError if the network does not support that."""
    act_on = getattr(adapter, "act_on", None)
    if not callable(act_on):
        raise InputError("--shared_lora: this --network_module does not support two models: leave it out")
    act_on(model)


def model_settings(settings: TrainSettings) -> ModelSettings:
    """Return the settings of how the DiT is assembled."""
    stream, activations = settings.stream, settings.activations
    return ModelSettings(settings.dit, settings.weights, stream, activations, settings.compile, settings.init)
