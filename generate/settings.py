"""Settings of `wan_generate_video.py`."""

from dataclasses import dataclass

from wan_train.cli import Tool, option
from wan_train.memory.settings import ActivationSettings, CompileSettings, FastWeightSettings, StreamSettings
from wan_train.models.settings import DitSettings, TextEncoderSettings, VaeSettings
from wan_train.sampling.settings import SamplingSettings

LORA_MODES = ("merge", "attach")
OUTPUT_TYPES = ("video", "images", "latent", "both")


@dataclass(frozen=True)
class LoraSettings:
    """LoRA."""

    lora_weight: tuple[str, ...] = option((), "LoRA files, kohya or lora_A/lora_B keys.")
    lora_multiplier: tuple[float, ...] = option((), "Strength of each LoRA, in their order; 1.0 where none is given.")
    lora_mode: str = option(
        "merge",
        "merge adds LoRAs to the weights, which costs no time per step; attach computes them beside, as in training.",
        choices=LORA_MODES,
    )
    include_patterns: tuple[str, ...] = option(
        (), "Take of every LoRA only the modules in whose names one of these regular expressions is found."
    )
    exclude_patterns: tuple[str, ...] = option((), "Leave out the modules in whose names one of these is found.")


@dataclass(frozen=True)
class OutputSettings:
    """Output."""

    save_path: str = option("", "Where to write: a .mp4 file, or a folder.", required=True)
    output_type: str = option("video", "What to write; both is video and latent.", choices=OUTPUT_TYPES)
    fps: int | None = option(None, "Frames per second of the video; without it the task's.", minimum=1, maximum=240)
    device: str | None = option(None, "Where to compute; without it the first accelerator, else the CPU.")


@dataclass(frozen=True)
class GenerateSettings:
    """All settings of the generator."""

    dit: DitSettings
    weights: FastWeightSettings
    stream: StreamSettings
    activations: ActivationSettings
    compile: CompileSettings
    vae: VaeSettings
    text: TextEncoderSettings
    lora: LoraSettings
    sampling: SamplingSettings
    output: OutputSettings


TOOL = Tool(
    "wan_generate_video.py",
    "Generate a video or a picture from a prompt with a Wan model.",
    GenerateSettings,
    "generate.main:main",
)
