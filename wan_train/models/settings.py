"""Settings that name the models: shared by caching, training and generation."""

from dataclasses import dataclass

from wan_train.cli import option
from wan_train.errors import InputError
from wan_train.models.variants import VARIANTS

ATTENTION_MODES = ("torch", "sdpa", "xformers", "flash", "flash2", "flash3", "sageattn")
PRECISIONS = ("fp32", "float32", "fp16", "float16", "bf16", "bfloat16")


@dataclass(frozen=True)
class DitSettings:
    """Diffusion transformer."""

    task: str = option("t2v-14B", "What the model is and does.", choices=VARIANTS)
    dit: str = option("", "DiT checkpoint: a safetensors file, any shard or folder of a set, or a .pth.")
    attn_mode: str = option(
        "torch",
        "Attention backend; torch and sdpa are one, flash and flash2 too; sageattn cannot train.",
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
    split_attn: bool = option(False, "Attend for one sample of a batch at a time: less memory with some backends.")
    disable_numpy_memmap: bool = option(
        False, "Accepted for old commands and does nothing: checkpoints are read tensor by tensor."
    )
    force_v2_1_time_embedding: bool = option(
        False, "Accepted for old commands and does nothing: time is embedded once for each frame, never for each token."
    )


CKPT_FLAGS = ("--ckpt_dir", "--model_base")


@dataclass(frozen=True)
class CheckpointFolderSettings:
    """Folder of checkpoints."""

    ckpt_dir: str | None = option(
        None,
        "Folder of a whole model, as Wan-AI or diffusers publish it: its files are told by what they hold, and the log"
        " says which is taken for what. Options that name a file win.",
        flags=CKPT_FLAGS[1:],
        expands="wan_train.models.checkpoint_folder:with_found_files",
    )


@dataclass(frozen=True)
class InitSettings:
    """New control layers."""

    init_control: str | None = option(
        None,
        "Add the layers that --task needs to a T2V or I2V checkpoint given as --dit: auto all that its models have,"
        " reference those of a reference image too, motion a motion controller. They add nothing until they are"
        " trained, with networks.full; default: --dit has them.",
        choices=("auto", "reference", "motion"),
    )


@dataclass(frozen=True)
class ExpertSettings:
    """Two experts (Wan2.2 A14B)."""

    dit_high_noise: str = option(
        "", "DiT checkpoint of the expert for high noise; --dit is then that of the one for low noise."
    )
    timestep_boundary: float | None = option(
        None,
        "Where the experts meet: t from 0 to 1, or a timestep up to 1000; without it the task's, 0.875 or 0.9.",
        minimum=0,
        maximum=1000,
    )
    offload_inactive_dit: bool = option(False, "Keep the expert that has nothing to do in main memory.")


@dataclass(frozen=True)
class VaeSettings:
    """VAE."""

    vae: str = option("", "VAE checkpoint: Wan2.1_VAE.pth, for ti2v-5B Wan2.2_VAE.pth, or a safetensors file.")
    vae_dtype: str = option(
        "bf16", "Precision of the VAE and of cached latents; a CPU computes in float32.", choices=PRECISIONS
    )
    vae_cache_cpu: bool = option(False, "Keep the VAE's frame cache in main memory: less device memory, slower.")
    vae_tiling: bool = option(
        False, "Encode and decode in tiles that overlap and blend: much less device memory for big images, slower."
    )
    vae_tile_size: int = option(34, "Side of a tile with --vae_tiling, in latent cells.", minimum=2)
    vae_tile_overlap: int = option(8, "What two tiles have in common, in latent cells; 8 and more are safe.", minimum=0)

    def __post_init__(self) -> None:
        if self.vae_tile_overlap >= self.vae_tile_size:
            raise InputError(
                f"--vae_tile_overlap {self.vae_tile_overlap} leaves nothing of --vae_tile_size {self.vae_tile_size}:"
                " give less than the size"
            )


@dataclass(frozen=True)
class TextEncoderSettings:
    """Text encoder."""

    t5: str = option("", "UMT5-XXL encoder checkpoint (.pth or safetensors).")
    tokenizer: str = option(
        "",
        "Tokenizer folder; without it google/umt5-xxl beside the T5 file, then the one inside the file, then the hub.",
    )
    fp8_t5: bool = option(
        False,
        "Keep the text encoder's matrices in fp8 and its token table in main memory: 5 GB on the device in place of 11,"
        " embeddings a little off. Captions that are cached are not encoded again for it.",
    )


@dataclass(frozen=True)
class ImageEncoderSettings:
    """Image encoder."""

    clip: str = option(
        "",
        "CLIP image encoder of Wan2.1's tasks with images"
        " (models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth, or a safetensors file).",
    )
