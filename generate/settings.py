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

    offload_inactive_dit: bool = option(False, "Accepted for compatibility, no effect: see --lazy_loading.")
    lazy_loading: bool = option(
        False,
        "Accepted for compatibility, no effect: an expert is loaded when its steps begin and freed after "
        "them, or kept in CPU RAM with --interactive.",
    )


@dataclass(frozen=True)
class LoraSettings:
    """LoRA."""

    lora_weight: tuple[str, ...] = option((), "LoRA files, with kohya or PEFT (lora_A/lora_B) keys.")
    lora_multiplier: tuple[float, ...] = option((), "Multiplier of each LoRA, in order; default: 1.0.")
    lora_weight_high_noise: tuple[str, ...] = option((), "LoRA files for the high-noise expert.")
    lora_multiplier_high_noise: tuple[float, ...] = option(
        (), "Multiplier of each --lora_weight_high_noise file, in order; default: 1.0."
    )
    lora_mode: str = option(
        "merge",
        "merge adds LoRAs to the weights, with no cost per step; attach computes them as separate branches, "
        "as in training.",
        choices=LORA_MODES,
    )
    include_patterns: tuple[str, ...] = option(
        (), "Regular expressions: use only the LoRA modules whose names match one of them."
    )
    exclude_patterns: tuple[str, ...] = option(
        (), "Regular expressions: skip the LoRA modules whose names match one of them."
    )


@dataclass(frozen=True)
class BatchSettings(PromptSettings):
    """Many videos."""

    from_file: str | None = option(
        None,
        "Generate every prompt of a file: text with one prompt per line, .toml or .json. A line is `words --w"
        " 832 --h 480 --f 81 --d 1 --s 20 --l 5 --fs 5 --n negative` and may name any sampling option; the "
        "command line sets the defaults.",
    )
    interactive: bool = option(False, "Read prompt lines from the keyboard, in the same format; models stay loaded.")
    latent_path: tuple[str, ...] = option((), "Latent files, or folders of them, to decode; nothing is sampled.")
    from_metadata: str | None = option(
        None,
        "Generate a video, image or latent file again from the settings in its metadata; options on the "
        "command line take precedence.",
        expands="generate.record:with_recorded_options",
    )


@dataclass(frozen=True)
class CalibrationSettings:
    """Calibration of step caches."""

    calibrate_steps: int | None = option(
        None,
        "Number of sampling steps to calibrate a step cache with: sample --prompt, or each prompt of "
        "--from_file, without a cache, write the measured errors to --cache_profile, and exit.",
        minimum=1,
        maximum=1000,
    )


@dataclass(frozen=True)
class OutputSettings:
    """Output."""

    save_path: str = option(
        "",
        "Output file or folder, local or a URL that fsspec opens, such as gs://bucket/folder. {seed} and "
        "{index} are replaced by those of each video.",
        flags=("--save_file",),
        metavar="PATH",
    )
    local_output_dir: str | None = option(
        None,
        "With a remote --save_path, local folder for the results, which are kept; default: a folder in "
        "~/.cache/wan-train/remote, emptied once uploaded.",
        metavar="FOLDER",
    )
    output_pattern: str | None = option(
        None,
        "Name pattern of each output file, such as wan_output_{seed}_{index}.mp4, in the folder --save_path; "
        "default folder: the working directory.",
        metavar="NAME",
    )
    output_type: str = option(
        "video",
        "What to save; both is latent and video, latent_images is latent and images.",
        choices=OUTPUT_TYPES,
    )
    fps: int | None = option(None, "Frames per second of the video; default: the task's.", minimum=1, maximum=240)
    trim_tail_frames: int = option(0, "Number of frames to drop from the end of the video.", minimum=0)
    codec: str = option("h264", "Video codec; lossless is H.264 RGB without loss.", choices=CODEC_NAMES)
    video_quality: int | None = option(
        None,
        "Constant rate factor (CRF) of the codec, lower is better; default: 16 for h264, 24 for vp9.",
        minimum=0,
        maximum=63,
    )
    no_metadata: bool = option(False, "Write no prompt, settings or model hashes into the output files.")
    text_cache: str | None = option(
        None, "Folder that caches prompt embeddings, so that the text encoder is not loaded for known prompts."
    )
    save_merged_model: str | None = option(
        None, "Merge the LoRA files into the DiT, save it as a checkpoint at this path, and exit."
    )
    device: str | None = option(
        None, "Device to compute on, such as cuda:0 or cpu; default: the first accelerator, else the CPU."
    )

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
