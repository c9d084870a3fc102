"""Settings of training the two experts of Wan2.2 A14B."""

from dataclasses import dataclass

from wan_train.cli import option
from wan_train.models.settings import ExpertSettings


@dataclass(frozen=True)
class TrainExpertSettings(ExpertSettings):
    """Two experts (Wan2.2 A14B)."""

    expert_steps: int = option(
        10, "With both experts, number of optimizer steps on one expert before switching to the other.", minimum=1
    )
    shared_lora: bool = option(False, "Train one LoRA shared by both experts instead of one for each.")
    audit_timesteps: bool = option(
        False, "Print which timesteps each expert is trained on and which are used in generation, and exit."
    )
    convert_boundary: bool = option(False, "Print the boundary in the units of other trainers, and exit.")
    allow_unused_timesteps: bool = option(
        False, "Allow training an expert at timesteps that generation never uses it for."
    )
    network_weights_high_noise: str | None = option(
        None, "LoRA file to initialize the high-noise expert from; --network_weights is for the low-noise expert."
    )
