"""Checks of sharded weights and of frames that several processes decode together."""

from generate.settings import GenerateSettings
from wan_train.compile import CUDA_GRAPHS
from wan_train.errors import InputError


def check_split_models(settings: GenerateSettings) -> None:
    """Raise InputError for `--dit_fsdp` and `--t5_fsdp` with a single process, or with options that also move weights.

    The DiT is sharded over processes that run the same passes, so not over the halves of guidance.
    """
    parallel, compiling = settings.parallel, settings.compile
    _check_several("--t5_fsdp", given=parallel.t5_fsdp, settings=settings)
    if not parallel.dit_fsdp:
        return
    _check_several("--dit_fsdp", given=True, settings=settings)
    if parallel.ulysses_size * parallel.ring_size == 1:
        raise InputError(
            f"--dit_fsdp with --cfg_size {parallel.cfg_size} alone: each half of guidance runs its own passes and"
            " holds the whole DiT; give --ulysses_size 2 or more, with --cfg_size 1 or on twice as many processes"
        )
    if settings.stream.blocks_to_swap:
        raise InputError(
            f"--dit_fsdp shards the blocks and --blocks_to_swap {settings.stream.blocks_to_swap} streams them from CPU"
            " RAM: give one of them"
        )
    if compiling.compile and compiling.compile_mode in CUDA_GRAPHS:
        raise InputError(
            f"--compile_mode {compiling.compile_mode} records the addresses of weights, --dit_fsdp moves them: use"
            " --compile_mode default or max-autotune-no-cudagraphs"
        )


def check_split_frames(settings: GenerateSettings) -> None:
    """Raise InputError for `--vae_parallel` with a single process, or with `--vae_tiling`."""
    if not settings.parallel.vae_parallel:
        return
    _check_several("--vae_parallel", given=True, settings=settings)
    if settings.vae.vae_tiling:
        raise InputError(
            "--vae_parallel and --vae_tiling both split the frames: give one of them; --vae_parallel needs no blending"
        )


def _check_several(flag: str, *, given: bool, settings: GenerateSettings) -> None:
    parallel = settings.parallel
    if given and parallel.ulysses_size * parallel.ring_size * parallel.cfg_size == 1:
        raise InputError(
            f"{flag} requires several processes per video: start them with torchrun and give --ulysses_size or"
            " --cfg_size, or leave it out"
        )
