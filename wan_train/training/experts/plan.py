"""Plan which experts a run trains, when, and at which noise levels."""

from dataclasses import dataclass, replace

from wan_train.errors import InputError, first_given
from wan_train.flow.timesteps import NUM_TIMESTEPS, Span
from wan_train.log import get_logger
from wan_train.models.dit.experts import HIGH, LOW, ORDER, read_boundary, span_of
from wan_train.models.variants import VARIANTS, Variant
from wan_train.training.settings import TimestepSettings, TrainSettings

log = get_logger(__name__)


@dataclass(frozen=True)
class ExpertPlan:
    """The experts to train, none for a task with a single model, and the boundary between them, t in [0, 1].

    Two experts alternate every `steps` optimizer steps, high noise first.
    """

    trained: tuple[str, ...] = ()
    boundary: float = 0.0
    steps: int = 1

    @property
    def is_pair(self) -> bool:
        """Whether both experts are trained."""
        return len(self.trained) > 1

    def at(self, step: int) -> str | None:
        """Return the expert of an optimizer step, counted from 1; None for a single model."""
        return self.trained[(step - 1) // self.steps % len(self.trained)] if self.trained else None

    def limits(self, expert: str | None, settings: TimestepSettings) -> Span | None:
        """Return the noise levels of an expert: its side of the boundary, within the range of the settings; None for
        that range alone. A single expert is trained on the range of --min_timestep and --max_timestep if they are
        given."""
        own_range = (settings.min_timestep, settings.max_timestep) != (0, NUM_TIMESTEPS)
        if expert is None or (own_range and not self.is_pair):
            return None
        low, high = span_of(expert, self.boundary)
        low, high = max(low, settings.min_timestep / NUM_TIMESTEPS), min(high, settings.max_timestep / NUM_TIMESTEPS)
        if low >= high:
            raise InputError(
                f"--min_timestep {settings.min_timestep} and --max_timestep {settings.max_timestep} leave no"
                f" timesteps for the {expert.replace('_', '-')} expert: the boundary is"
                f" {NUM_TIMESTEPS * self.boundary:g}"
            )
        return Span(low, high, keep_shape=True)


def with_named_experts(settings: TrainSettings) -> TrainSettings:
    """Move a single `--dit` to `--dit_high_noise` if its timesteps are mostly above the boundary: other trainers have
    one option for both files, and the range of timesteps decides which expert it is."""
    variant, timesteps, experts = VARIANTS[settings.dit.task], settings.timesteps, settings.experts
    if variant.experts is None or not settings.dit.dit or experts.dit_high_noise:
        return settings
    boundary = read_boundary(experts.timestep_boundary, variant)
    if not is_above(boundary, timesteps.min_timestep, timesteps.max_timestep):
        return settings
    log.info(
        "--min_timestep %d --max_timestep %d is the range of the high-noise expert, which starts at %g: training"
        " --dit %s as --dit_high_noise",
        *(timesteps.min_timestep, timesteps.max_timestep, NUM_TIMESTEPS * boundary, settings.dit.dit),
    )
    named = replace(experts, dit_high_noise=settings.dit.dit)
    return replace(settings, dit=replace(settings.dit, dit=""), experts=named)


def is_above(boundary: float, low: int, high: int) -> bool:
    """Return whether the larger part of a range of timesteps, 0 to 1000, is above the boundary, t in [0, 1]."""
    return low + high > 2 * NUM_TIMESTEPS * boundary


def plan_experts(settings: TrainSettings) -> ExpertPlan:
    """Plan the experts from the options. Raise InputError for options that conflict."""
    variant, experts = VARIANTS[settings.dit.task], settings.experts
    if variant.experts is None:
        _refuse_for_one_model(settings, variant)
        return ExpertPlan()
    given = {HIGH: experts.dit_high_noise, LOW: settings.dit.dit}
    trained = tuple(expert for expert in ORDER if given[expert])
    if not trained:
        raise InputError(
            f"--task {variant.name} has two experts: give --dit (low noise), --dit_high_noise (high noise), or both"
        )
    if len(trained) == 1:
        _refuse_without_pair(settings)
    else:
        _check_pair(settings)
    plan = ExpertPlan(trained, read_boundary(experts.timestep_boundary, variant), experts.expert_steps)
    for expert in trained:
        plan.limits(expert, settings.timesteps)
    return plan


def _check_pair(settings: TrainSettings) -> None:
    experts = settings.experts
    if experts.offload_inactive_dit and settings.stream.blocks_to_swap:
        raise InputError(
            f"--offload_inactive_dit and --blocks_to_swap {settings.stream.blocks_to_swap} both keep weights in CPU"
            " RAM: give only one of them"
        )
    if experts.shared_lora and experts.network_weights_high_noise:
        raise InputError(
            "--network_weights_high_noise: --shared_lora is initialized from --network_weights: leave it out"
        )
    if settings.network.base_weights:
        raise InputError(
            "--base_weights would be merged into both experts: merge it into one with"
            " --save_merged_model, and train that file"
        )


def _refuse_without_pair(settings: TrainSettings) -> None:
    experts = settings.experts
    given = {
        "--shared_lora": experts.shared_lora,
        "--offload_inactive_dit": experts.offload_inactive_dit,
        "--network_weights_high_noise": experts.network_weights_high_noise,
    }
    if flag := first_given(given):
        raise InputError(f"{flag} is for training both experts: give --dit and --dit_high_noise, or leave it out")


def _refuse_for_one_model(settings: TrainSettings, variant: Variant) -> None:
    experts = settings.experts
    if experts.timestep_boundary is not None:
        read_boundary(experts.timestep_boundary, variant)
    given = {
        "--dit_high_noise": experts.dit_high_noise,
        "--shared_lora": experts.shared_lora,
        "--offload_inactive_dit": experts.offload_inactive_dit,
        "--network_weights_high_noise": experts.network_weights_high_noise,
    }
    if flag := first_given(given):
        raise InputError(f"{flag}: --task {variant.name} has a single model: use an A14B task, or leave it out")


def settings_of(settings: TrainSettings, expert: str | None) -> TrainSettings:
    """Return the settings with the expert's own `--dit` and `--network_weights`; a single expert takes
    `--network_weights`."""
    if expert != HIGH:
        return settings
    alone = not settings.dit.dit
    weights = settings.network.network_weights if alone else settings.experts.network_weights_high_noise
    network = replace(settings.network, network_weights=weights)
    return replace(settings, dit=replace(settings.dit, dit=settings.experts.dit_high_noise), network=network)


def only_expert(plan: ExpertPlan) -> str | None:
    """Return the expert that a single saved file is of; None for a LoRA that both share."""
    return plan.trained[0] if len(plan.trained) == 1 else None
