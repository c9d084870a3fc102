"""Options of the step caches and their checks. Nothing here imports torch.

They are declared like those of `wan_train.sampling.settings`.
"""

from dataclasses import dataclass, fields

from wan_train.cli import option
from wan_train.errors import InputError
from wan_train.models.variants import SMALL_AREA, Variant
from wan_train.sampling.options import Sampled

OFF, TEACACHE, MAGCACHE, ATTENTION, AUTO = "none", "teacache", "magcache", "attention", "auto"
STEP_CACHES = (OFF, TEACACHE, MAGCACHE, ATTENTION, AUTO)
PROFILED = (MAGCACHE, AUTO)  # those that read --cache_profile
TEACACHE_MODELS = ("Wan2.1-T2V-1.3B", "Wan2.1-T2V-14B", "Wan2.1-I2V-14B-480P", "Wan2.1-I2V-14B-720P")
SHORTCUT = "--use_attentioncache"  # MindIE's name of --step_cache attention
CALIBRATE = "--calibrate_steps N --cache_profile FILE creates one"
COMPILED = (
    "--step_cache attention does not work with --compile, which compiles each block as one graph: leave out --compile,"
    " or use --step_cache teacache, magcache or auto"
)

_SMALL_DIM = 1536  # width of the 1.3B models


@dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """Step caches; the same fields in a request and on the command line."""

    step_cache: str = option(
        OFF,
        "Reuse results of earlier steps, for speed at some loss of quality: teacache and magcache by "
        "published rules, attention for self-attention only, auto by errors measured with --calibrate_steps.",
        choices=STEP_CACHES,
        shortcuts={SHORTCUT: ATTENTION},
    )
    tea_cache_l1_thresh: float = option(
        0.05,
        "TeaCache threshold of the accumulated relative L1 change; higher reuses more steps, 0 none.",
        minimum=0,
        maximum=100,
    )
    tea_cache_model_id: str | None = option(
        None,
        "Model whose published TeaCache coefficients are used; default: by task and size.",
        choices=TEACACHE_MODELS,
    )
    magcache_thresh: float = option(
        0.12,
        "MagCache threshold of the accumulated magnitude error; higher reuses more steps, 0 none.",
        minimum=0,
        maximum=100,
    )
    magcache_k: int = option(2, "MagCache: maximum number of consecutive reused steps.", minimum=1, maximum=1000)
    magcache_retention: float = option(
        0.2, "MagCache: ratio of initial steps of each model that are always computed.", minimum=0, maximum=1
    )
    start_step: int | None = option(
        None,
        "Attention cache: first step, counted from 0, at which outputs may be reused; default: a quarter of the steps.",
        minimum=0,
        maximum=1000,
    )
    attentioncache_interval: int = option(
        4, "Attention cache: compute every Nth step in the range, reuse the others.", minimum=1, maximum=1000
    )
    end_step: int | None = option(
        None,
        "Attention cache: end of the range of steps, exclusive; default: three quarters of the steps.",
        minimum=1,
        maximum=1000,
    )
    cache_profile: str | None = option(
        None,
        "JSON file of measured errors, read by auto and magcache and written by --calibrate_steps.",
        metavar="FILE",
        traits=Sampled(is_file=True),
    )
    error_budget: float = option(
        0.05,
        "auto: maximum predicted relative L2 error of the final latents against the run without a cache; 0 "
        "reuses nothing.",
        minimum=0,
        maximum=10,
    )


_READ_BY = {
    "tea_cache_l1_thresh": (TEACACHE,),
    "tea_cache_model_id": (TEACACHE,),
    "magcache_thresh": (MAGCACHE,),
    "magcache_k": (MAGCACHE,),
    "magcache_retention": (MAGCACHE,),
    "start_step": (ATTENTION,),
    "attentioncache_interval": (ATTENTION,),
    "end_step": (ATTENTION,),
    "cache_profile": PROFILED,
    "error_budget": (AUTO,),
}


def replaced_by(step_cache: str) -> frozenset[str]:
    """Return the options that a chosen cache does not read: where they are given earlier, in a record or for all
    lines, the choice takes their place."""
    return frozenset(name for name, owners in _READ_BY.items() if step_cache not in owners)


def check_cache_options(given: CacheOptions, steps: int) -> None:
    """Raise InputError for options that conflict in a request with `steps` steps."""
    for field in fields(CacheOptions):
        owners = _READ_BY.get(field.name, (given.step_cache,))
        if given.step_cache not in owners and getattr(given, field.name) != field.default:
            raise InputError(
                f"--{field.name} applies to --step_cache {' and '.join(owners)} only, and --step_cache is"
                f" {given.step_cache}: choose that cache, or leave out --{field.name}"
            )
    if given.step_cache in PROFILED and not given.cache_profile:
        raise InputError(
            f"--step_cache {given.step_cache} requires --cache_profile, a file of measured errors: {CALIBRATE}"
        )
    if given.step_cache == ATTENTION:
        start, end = attention_range(given, steps)
        if end > steps or (start >= end and (given.start_step is not None or given.end_step is not None)):
            raise InputError(
                f"--start_step {start} and --end_step {end} are not a range of {steps} steps: --start_step must be less"
                f" than --end_step, and --end_step at most {steps}"
            )


def attention_range(given: CacheOptions, steps: int) -> tuple[int, int]:
    """Return the range of the attention cache, end exclusive; by default 12 to 37 of 50 steps, as in MindIE."""
    start = steps // 4 if given.start_step is None else given.start_step
    return start, (3 * steps // 4 if given.end_step is None else given.end_step)


def teacache_model(variant: Variant, width: int, height: int) -> str:
    """Return the model whose TeaCache coefficients a task uses at a size in pixels, as in VideoX-Fun.

    Wan2.2 and 14B control models use those of I2V-14B-720P, because no others are published.
    """
    if variant.dim == _SMALL_DIM:
        return "Wan2.1-T2V-1.3B"
    if variant.family != "wan2.1" or variant.control is not None:
        return "Wan2.1-I2V-14B-720P"
    if variant.images is None:
        return "Wan2.1-T2V-14B"
    return "Wan2.1-I2V-14B-480P" if width * height <= SMALL_AREA else "Wan2.1-I2V-14B-720P"
