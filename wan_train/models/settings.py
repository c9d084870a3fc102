"""Options that select models, shared by caching, training and generation."""

from dataclasses import dataclass

from wan_train.cli import option
from wan_train.errors import InputError
from wan_train.models.variants import VARIANTS

ATTENTION_MODES = ("torch", "sdpa", "xformers", "flash", "flash2", "flash3", "sageattn")
PRECISIONS = ("fp32", "float32", "fp16", "float16", "bf16", "bfloat16")


@dataclass(frozen=True)
class DitSettings:
    """Diffusion transformer."""

    task: str = option("t2v-14B", "Model family and task, such as t2v-1.3B.", choices=VARIANTS)
    dit: str = option(
        "", "DiT checkpoint: a safetensors file, any shard or the folder of a sharded checkpoint, or a .pth file."
    )
    attn_mode: str = option(
        "torch",
        "Attention backend; torch is sdpa, flash is flash2; sageattn cannot be used for training.",
        choices=ATTENTION_MODES,
        shortcuts={
            "--sdpa": "torch",
            "--xformers": "xformers",
            "--flash_attn": "flash",
            "--flash3": "flash3",
            "--sage_attn": "sageattn",
        },
    )
    motion_controller: str = option(
        "", "Motion controller checkpoint (DiffSynth-Studio's speedcontrol), for data and prompts with a motion bucket."
    )
    split_attn: bool = option(False, "Compute attention one sample at a time: less memory with some backends.")
    disable_numpy_memmap: bool = option(
        False, "Accepted for compatibility, no effect: checkpoints are read tensor by tensor."
    )
    force_v2_1_time_embedding: bool = option(
        False, "Accepted for compatibility, no effect: the time embedding is computed per frame, never per token."
    )


CKPT_FLAGS = ("--ckpt_dir", "--model_base")


@dataclass(frozen=True)
class CheckpointFolderSettings:
    """Folder of checkpoints."""

    ckpt_dir: str | None = option(
        None,
        "Folder of a complete model as published by Wan-AI or in diffusers format; files are identified by their"
        " contents, and the choices are logged. Options that name a file take precedence.",
        flags=CKPT_FLAGS[1:],
        expands="wan_train.models.checkpoint_folder:with_found_files",
    )


@dataclass(frozen=True)
class InitSettings:
    """New control layers."""

    init_control: str | None = option(
        None,
        "Add the layers that --task needs to a T2V or I2V checkpoint given as --dit: auto adds all of them, "
        "reference also those for a reference image, motion only a motion controller. They are initialized to"
        " have no effect and trained with networks.full; default: --dit has them already.",
        choices=("auto", "reference", "motion"),
    )


@dataclass(frozen=True)
class ExpertSettings:
    """Two experts (Wan2.2 A14B)."""

    dit_high_noise: str = option("", "DiT checkpoint of the high-noise expert; --dit is then the low-noise expert.")
    timestep_boundary: float | None = option(
        None,
        "Boundary between the experts: t from 0 to 1, or a timestep up to 1000; default: the task's, 0.875 or 0.9.",
        minimum=0,
        maximum=1000,
    )
    offload_inactive_dit: bool = option(False, "Keep the inactive expert in CPU RAM.")


@dataclass(frozen=True)
class VaeSettings:
    """VAE."""

    vae: str = option("", "VAE checkpoint: Wan2.1_VAE.pth, for ti2v-5B Wan2.2_VAE.pth, or a safetensors file.")
    vae_dtype: str = option(
        "bf16", "Data type of the VAE and of cached latents; the CPU always computes in float32.", choices=PRECISIONS
    )
    vae_cache_cpu: bool = option(False, "Keep the VAE's temporal feature cache in CPU RAM: less GPU memory, slower.")
    vae_tiling: bool = option(
        False, "Encode and decode in overlapping, blended tiles: much less GPU memory for large frames, slower."
    )
    vae_tile_size: int = option(34, "Tile size for --vae_tiling, in latent pixels.", minimum=2)
    vae_tile_overlap: int = option(
        8, "Overlap of neighboring tiles, in latent pixels; at least 8 is recommended.", minimum=0
    )

    def __post_init__(self) -> None:
        if self.vae_tile_overlap >= self.vae_tile_size:
            raise InputError(
                f"--vae_tile_overlap {self.vae_tile_overlap} must be less than --vae_tile_size {self.vae_tile_size}:"
                " reduce the overlap"
            )


@dataclass(frozen=True)
class TextEncoderSettings:
    """Text encoder."""

    t5: str = option("", "UMT5-XXL encoder checkpoint (.pth or safetensors).")
    tokenizer: str = option(
        "",
        "Tokenizer folder; default: google/umt5-xxl next to the T5 file, then the tokenizer inside the file, "
        "then the hub.",
    )
    fp8_t5: bool = option(
        False,
        "Store the text encoder's matrices in fp8 and its token embedding in CPU RAM: 5 GB of GPU memory "
        "instead of 11, with slightly different embeddings. Cached captions are not encoded again.",
    )


@dataclass(frozen=True)
class ImageEncoderSettings:
    """Image encoder."""

    clip: str = option(
        "",
        "CLIP image encoder for Wan2.1 image tasks (models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth, "
        "or a safetensors file).",
    )
