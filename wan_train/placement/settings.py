"""Options that trade precision or time for memory."""

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
        "Number of transformer blocks to keep in CPU RAM and stream to the GPU on demand; at most all but one.",
        minimum=0,
    )
    block_swap_ring_size: int = option(2, "Number of streamed blocks held on the GPU at once, at least 2.", minimum=2)
    use_pinned_memory_for_block_swap: bool = option(
        False,
        "Accepted for compatibility, no effect: streamed blocks are always pinned in CPU RAM as far as possible.",
    )
    block_swap_h2d_only: bool = option(
        False,
        "Accepted for compatibility, no effect: frozen blocks are never copied back, trained ones always are.",
    )


@dataclass(frozen=True)
class ActivationSettings:
    """Activations."""

    ffn_chunks: int = option(
        1,
        "Number of chunks of tokens in which the feed-forward is computed, one after another: lower peak memory.",
        minimum=1,
    )


@dataclass(frozen=True)
class RecomputeSettings(ActivationSettings):
    """Activations."""

    recompute: str = option(
        "none",
        "Activation checkpointing: none, full (recompute each block in the backward pass), or keep_attention "
        "(recompute all but attention).",
        choices=RECOMPUTE_MODES,
    )
    gradient_checkpointing: bool = option(False, "Same as --recompute full, unless that is keep_attention.")
    gradient_checkpointing_cpu_offload: bool = option(
        False,
        "Offload the checkpointed activations to CPU RAM until the backward pass; needs --gradient_checkpointing.",
    )

    def __post_init__(self) -> None:
        if self.gradient_checkpointing and self.recompute == "none":
            object.__setattr__(self, "recompute", "full")
        if self.gradient_checkpointing_cpu_offload and self.recompute == "none":
            raise InputError("--gradient_checkpointing_cpu_offload requires --gradient_checkpointing")


@dataclass(frozen=True)
class CompileSettings:
    """Compilation."""

    compile: bool = option(False, "Compile the blocks with torch.compile: slower start, faster steps.")
    compile_backend: str = option("inductor", "Backend of torch.compile.")
    compile_mode: str = option("default", "Mode of torch.compile.", choices=COMPILE_MODES)
    compile_dynamic: str = option(
        "auto",
        "Whether to compile for dynamic shapes; auto makes only the number of tokens dynamic.",
        choices=COMPILE_DYNAMIC,
    )
    compile_fullgraph: bool = option(False, "Raise an error on graph breaks in a block.")
    compile_cache_size_limit: int | None = option(
        None, "Maximum number of recompilations per block; default: torch's limit.", minimum=1
    )
    compile_cache: str | None = option(
        None,
        "Folder in which inductor keeps what it has compiled for the next run; use one that only you can write to."
        " Default: torch's own folder for temporary files.",
        metavar="FOLDER",
    )
    no_fused_kernels: bool = option(
        False,
        "Compute norms, modulation and residual sums on a GPU with separate operators instead of compiled kernels:"
        " slower steps, no compilation at start.",
    )
    cuda_allow_tf32: bool = option(False, "Allow TF32 for float32 matrix products: faster, with a 10-bit mantissa.")
    cuda_cudnn_benchmark: bool = option(
        False, "Enable cuDNN's benchmark mode, which chooses the fastest kernel for each new size."
    )


def check_stream(settings: StreamSettings, num_blocks: int, *, recompute: str | None) -> None:
    """Raise InputError for a number of blocks that cannot be swapped; `recompute` is None without training."""
    count = settings.blocks_to_swap
    if count >= num_blocks:
        raise InputError(
            f"--blocks_to_swap {count} is too many for a model of {num_blocks} blocks: use at most {num_blocks - 1}"
        )
    if count and recompute == "none":
        raise InputError(f"--blocks_to_swap {count} requires activation checkpointing: add --gradient_checkpointing")


def check_recompute(recompute: RecomputeSettings, compile: CompileSettings) -> None:
    """Raise InputError for --compile_fullgraph with --recompute keep_attention, which breaks the graph."""
    if recompute.recompute == "keep_attention" and compile.compile and compile.compile_fullgraph:
        raise InputError(
            "--compile_fullgraph does not work with --recompute keep_attention, which breaks the graph at attention:"
            " use --recompute full, or omit --compile_fullgraph"
        )
