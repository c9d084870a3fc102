"""Settings of `wan_generate_video.py`."""

from dataclasses import dataclass
from pathlib import PurePath

from wan_train.cli import Tool, option
from wan_train.distributed.settings import ParallelSettings
from wan_train.models.settings import (
    CheckpointFolderSettings,
    DitSettings,
    ExpertSettings,
    ImageEncoderSettings,
    TextEncoderSettings,
    VaeSettings,
)
from wan_train.placement.settings import ActivationSettings, CompileSettings, StreamSettings
from wan_train.profiling.settings import ProfileSettings
from wan_train.quantization.settings import FastWeightSettings
from wan_train.sampling.settings import PromptSettings, SamplingSettings

LORA_MODES = ("merge", "attach")
OUTPUT_TYPES = ("video", "images", "latent", "both", "latent_images")
CODEC_NAMES = ("h264", "vp9", "lossless")


@dataclass(frozen=True)
class GenerateExpertSettings(ExpertSettings):
    """Two experts (Wan2.2 A14B)."""

    offload_inactive_dit: bool = option(False, "Accepted for old commands and does nothing: see --lazy_loading.")
    lazy_loading: bool = option(
        False,
        "Accepted for old commands and does nothing: an expert is always read when its steps come and freed after them,"
        " with --interactive kept in host memory meanwhile.",
    )


@dataclass(frozen=True)
class LoraSettings:
    """LoRA."""

    lora_weight: tuple[str, ...] = option((), "LoRA files, kohya or lora_A/lora_B keys.")
    lora_multiplier: tuple[float, ...] = option((), "Strength of each LoRA, in their order; 1.0 where none is given.")
    lora_weight_high_noise: tuple[str, ...] = option((), "LoRA files of the expert for high noise.")
    lora_multiplier_high_noise: tuple[float, ...] = option((), "Strength of each of them, as --lora_multiplier.")
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
class BatchSettings(PromptSettings):
    """Many videos."""

    from_file: str | None = option(
        None,
        "Make every prompt of a file: text with one to a line, .toml or .json. A line is `words --w 832 --h 480 --f 81"
        " --d 1 --s 20 --l 5 --fs 5 --n negative` and takes any sampling option by its name; the command line's hold"
        " where it says nothing.",
    )
    interactive: bool = option(False, "Read prompt lines, in the same grammar, from the keyboard; models stay loaded.")
    latent_path: tuple[str, ...] = option((), "Decode saved latents, files or folders of them, and nothing else.")
    from_metadata: str | None = option(
        None,
        "Make a video, image or latent file again from what it says of itself; options given beside it win.",
        expands="generate.record:with_recorded_options",
    )


@dataclass(frozen=True)
class CalibrationSettings:
    """Calibration of step caches."""

    calibrate_steps: int | None = option(
        None,
        "Make --prompt, or every prompt of --from_file, with this number of steps in full, measure what reusing would"
        " cost, write that to --cache_profile, and nothing else.",
        minimum=1,
        maximum=1000,
    )


@dataclass(frozen=True)
class OutputSettings:
    """Output."""

    save_path: str = option(
        "",
        "Where to write: a file or a folder, also by a URL that fsspec takes, such as gs://bucket/folder. {seed} and"
        " {index} stand for those of each video.",
        flags=("--save_file",),
        metavar="PATH",
    )
    local_output_dir: str | None = option(
        None,
        "With a remote --save_path, local folder in which the results are written first, and stay; default: a folder"
        " in ~/.cache/wan-train/remote from which they are removed once uploaded.",
        metavar="FOLDER",
    )
    output_pattern: str | None = option(
        None,
        "Name of each file, as in wan_output_{seed}_{index}.mp4, in the folder --save_path; default folder: the current"
        " one.",
        metavar="NAME",
    )
    output_type: str = option(
        "video",
        "What to write; both is latent and video, latent_images latent and images.",
        choices=OUTPUT_TYPES,
    )
    fps: int | None = option(None, "Frames per second of the video; without it the task's.", minimum=1, maximum=240)
    trim_tail_frames: int = option(0, "Leave out so many frames at the end.", minimum=0)
    codec: str = option("h264", "How the video is encoded; lossless keeps every pixel.", choices=CODEC_NAMES)
    video_quality: int | None = option(
        None,
        "Constant rate factor of the codec, lower is better; without it 16 for h264, 24 for vp9.",
        minimum=0,
        maximum=63,
    )
    no_metadata: bool = option(False, "Write nothing about prompt, settings and models into the files.")
    text_cache: str | None = option(None, "Folder that keeps embeddings of prompts, to do without the text encoder.")
    save_merged_model: str | None = option(
        None, "Write the DiT with the LoRA files merged in as a checkpoint to this path, and nothing else."
    )
    device: str | None = option(None, "Where to compute; without it the first accelerator, else the CPU.")

    @property
    def target(self) -> str:
        """Where to write: `save_path`, or the files that `output_pattern` names in that folder."""
        return self.save_path if self.output_pattern is None else str(PurePath(self.save_path, self.output_pattern))

    @property
    def target_flag(self) -> str:
        """The option that names the files, for messages."""
        return "--save_path" if self.output_pattern is None else "--output_pattern"


@dataclass(frozen=True)
class GenerateSettings:
    """All settings of the generator."""

    dit: DitSettings
    folder: CheckpointFolderSettings
    experts: GenerateExpertSettings
    weights: FastWeightSettings
    stream: StreamSettings
    activations: ActivationSettings
    compile: CompileSettings
    vae: VaeSettings
    text: TextEncoderSettings
    image: ImageEncoderSettings
    lora: LoraSettings
    sampling: SamplingSettings
    calibration: CalibrationSettings
    batch: BatchSettings
    parallel: ParallelSettings
    output: OutputSettings
    profile: ProfileSettings


TOOL = Tool(
    "wan_generate_video.py",
    "Generate a video or an image with a Wan model from a prompt and, for tasks that take them, images.",
    GenerateSettings,
    "generate.main:main",
)
