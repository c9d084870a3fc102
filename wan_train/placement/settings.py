"""Settings that trade precision or time for memory: how weights are stored, where they live, what is computed twice."""

from dataclasses import dataclass

from wan_train.cli import option
from wan_train.errors import InputError

RECOMPUTE_MODES = ("none", "full", "keep_attention")
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
COMPILE_DYNAMIC = ("true", "false", "auto")


@dataclass(frozen=True)
class StreamSettings:
    """Block swap."""

    blocks_to_swap: int = option(
        0,
        "Keep so many blocks in main memory and bring each to the device for its turn; all but one at most.",
        minimum=0,
    )
    block_swap_ring_size: int = option(2, "Blocks that are on the device at once for that, at least 2.", minimum=2)
    use_pinned_memory_for_block_swap: bool = option(
        False,
        "Accepted for old commands and does nothing: host copies of these blocks are pinned as far as memory can be.",
    )
    block_swap_h2d_only: bool = option(
        False,
        "Accepted for old commands and does nothing: frozen blocks are never copied back, trained ones always are.",
    )


@dataclass(frozen=True)
class ActivationSettings:
    """Activations."""

    ffn_chunks: int = option(
        1, "Take the tokens through the feed-forward in so many parts, one after another: a lower peak.", minimum=1
    )


@dataclass(frozen=True)
class RecomputeSettings(ActivationSettings):
    """Activations."""

    recompute: str = option(
        "none",
        "What the backward pass computes again: nothing, each block, or each block but its attention.",
        choices=RECOMPUTE_MODES,
    )
    gradient_checkpointing: bool = option(False, "The same as --recompute full, unless that says keep_attention.")
    gradient_checkpointing_cpu_offload: bool = option(
        False, "Keep the blocks' inputs in main memory until the backward pass; needs --gradient_checkpointing."
    )

    def __post_init__(self) -> None:
        if self.gradient_checkpointing and self.recompute == "none":
            object.__setattr__(self, "recompute", "full")
        if self.gradient_checkpointing_cpu_offload and self.recompute == "none":
            raise InputError(
                "--gradient_checkpointing_cpu_offload moves what --gradient_checkpointing keeps: give that too"
            )


@dataclass(frozen=True)
class CompileSettings:
    """Compilation."""

    compile: bool = option(False, "Compile the blocks with torch.compile: a slower start, faster steps.")
    compile_backend: str = option("inductor", "Backend of torch.compile.")
    compile_mode: str = option("default", "Mode of torch.compile.", choices=COMPILE_MODES)
    compile_dynamic: str = option(
        "auto",
        "Whether one compilation serves all sizes; auto lets the number of tokens vary.",
        choices=COMPILE_DYNAMIC,
    )
    compile_fullgraph: bool = option(False, "Fail rather than compile a block in pieces.")
    compile_cache_size_limit: int | None = option(
        None, "Compilations kept for each block; without it torch's own limit.", minimum=1
    )
    compile_cache: str | None = option(
        None,
        "Folder in which inductor keeps what it has compiled for the next run; use one that only you can write to."
        " Default: torch's own folder for temporary files.",
        metavar="FOLDER",
    )
    cuda_allow_tf32: bool = option(False, "Let products of float32 numbers be taken in TF32: faster, 10 bits exact.")
    cuda_cudnn_benchmark: bool = option(False, "Let cuDNN try its kernels for each new size and keep the fastest.")


def check_stream(settings: StreamSettings, num_blocks: int, *, recompute: str | None) -> None:
    """InputError for a number of blocks that cannot be swapped; `recompute` is None where nothing is trained."""
    count = settings.blocks_to_swap
    if count >= num_blocks:
        raise InputError(
            f"--blocks_to_swap {count} is too many for a model of {num_blocks} blocks: give at most {num_blocks - 1}"
        )
    if count and recompute == "none":
        raise InputError(
            f"--blocks_to_swap {count} needs the blocks computed again in the backward pass:"
            " add --gradient_checkpointing"
        )


def check_recompute(recompute: RecomputeSettings, compile: CompileSettings) -> None:
    """InputError for blocks that must be compiled whole and yet leave their attention out of the compilation."""
    if recompute.recompute == "keep_attention" and compile.compile and compile.compile_fullgraph:
        raise InputError(
            "--compile_fullgraph wants each block in one piece, --recompute keep_attention leaves attention out of it:"
            " give --recompute full, or leave out --compile_fullgraph"
        )
