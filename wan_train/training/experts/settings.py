"""Settings of training the two experts of Wan2.2 A14B."""

from dataclasses import dataclass

from wan_train.cli import option
from wan_train.models.settings import ExpertSettings


@dataclass(frozen=True)
class TrainExpertSettings(ExpertSettings):
    """Two experts (Wan2.2 A14B)."""

    expert_steps: int = option(
        10, "With both experts given, train one for so many optimizer steps, then the other.", minimum=1
    )
    shared_lora: bool = option(False, "Train one LoRA on both experts, in place of one for each.")
    audit_timesteps: bool = option(
        False, "Tell which noise levels each expert will be trained on, and which generation will ask for, and stop."
    )
    convert_boundary: bool = option(False, "Tell the boundary in the units of other trainers, and stop.")
    allow_unused_timesteps: bool = option(
        False, "Train an expert at noise levels for which generation never asks it, all the same."
    )
    network_weights_high_noise: str | None = option(
        None, "LoRA file that the expert for high noise starts from; --network_weights is the other's."
    )
