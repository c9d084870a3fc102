"""A wish for one video: everything that decides it but the weights."""

from dataclasses import dataclass, replace

from wan_train.cli import InputError
from wan_train.flow.solvers import explicit_levels
from wan_train.log import get_logger
from wan_train.models.variants import FRAME_STEP, LATENT_CHANNELS, SIZE_STEP, VAE_STRIDE, Variant
from wan_train.sampling.guidance import Guidance, plan_steps

log = get_logger(__name__)

MAX_STEPS = 1000
STRENGTH = 0.7  # of video to video where nobody says


@dataclass(frozen=True)
class SampleRequest:
    """Everything that decides a video but the weights. Sizes in pixels, `frames` 4n+1, `seed` None draws one.

    `timesteps`, 0..1000 before the shift, take the place of `steps` even ones. `video_path` is what the run begins
    with, at `denoising_strength`; without it that is pure noise.
    """

    prompt: str
    negative_prompt: str
    width: int
    height: int
    frames: int
    steps: int
    guidance: float
    shift: float
    seed: int | None = None
    solver: str = "unipc"
    timesteps: tuple[float, ...] = ()
    rand_device: str = "cpu"
    video_path: str | None = None
    denoising_strength: float = STRENGTH
    cfg_skip_mode: str = "none"
    cfg_apply_ratio: float | None = None
    cfg_merge: bool = False
    slg_layers: tuple[int, ...] = ()
    slg_mode: str = "original"
    slg_scale: float = 3.0
    slg_start: float = 0.0
    slg_end: float = 0.3

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """(C, F, H, W) of the latents."""
        frames = 1 + (self.frames - 1) // FRAME_STEP
        return LATENT_CHANNELS, frames, self.height // VAE_STRIDE, self.width // VAE_STRIDE

    @property
    def guided(self) -> Guidance:
        """How its steps are guided."""
        return Guidance(
            self.guidance,
            self.cfg_skip_mode,
            self.cfg_apply_ratio,
            self.cfg_merge,
            self.slg_layers,
            self.slg_mode,
            self.slg_scale,
            self.slg_start,
            self.slg_end,
        )


def read_numbers(text: str) -> tuple[float, ...]:
    """Numbers with commas between them; ValueError for what is none."""
    return tuple(float(part) for part in text.replace(",", " ").split())


def read_layers(text: str) -> tuple[int, ...]:
    """Numbers of blocks with commas between them, as in 9,10; ValueError for what is none."""
    layers = tuple(sorted({int(part) for part in text.replace(",", " ").split()}))
    if any(layer < 0 for layer in layers):
        raise ValueError("takes numbers of blocks from 0, as in 9,10")
    return layers


def checked(request: SampleRequest) -> SampleRequest:
    """The request, if its values agree with each other; InputError names the two that do not."""
    if (request.cfg_skip_mode == "none") != (request.cfg_apply_ratio is None):
        raise InputError("--cfg_skip_mode and --cfg_apply_ratio go together: give both or neither")
    if request.slg_layers and request.slg_start >= request.slg_end:
        raise InputError(
            f"--slg_start {request.slg_start:g} leaves nothing before --slg_end {request.slg_end:g}: give less than it"
        )
    if request.slg_layers and request.guidance == 1:
        raise InputError("--slg_layers acts on guided steps, and --guidance_scale 1 has none: give more, or no layers")
    if request.timesteps:
        explicit_levels(request.timesteps)
        if request.video_path:
            raise InputError("--timesteps says where a run begins, and so does --video_path: give one of them")
        request = replace(request, steps=len(request.timesteps))
    if request.slg_layers and not any(plan.skipping for plan in plan_steps(request.steps, request.guided)):
        log.warning(
            "--slg_layers acts on none of %d steps: give a larger --slg_end, or more --infer_steps", request.steps
        )
    return request


def fitted(request: SampleRequest) -> SampleRequest:
    """The request at a size and length that the model can make, with a warning where that is another."""
    width, height = (max(SIZE_STEP, side // SIZE_STEP * SIZE_STEP) for side in (request.width, request.height))
    frames = max(1, (request.frames - 1) // FRAME_STEP * FRAME_STEP + 1)
    if (width, height) != (request.width, request.height):
        asked = f"{request.width} wide, {request.height} high"
        log.warning("sizes go in steps of %d: %s becomes %d wide, %d high", SIZE_STEP, asked, width, height)
    if frames != request.frames:
        log.warning("frames are 4n+1: %d becomes %d", request.frames, frames)
    return replace(request, width=width, height=height, frames=frames)


def preview_defaults(variant: Variant) -> SampleRequest:
    """What a line of a prompt file means where it says nothing: small and short, but the task's shift and guidance."""
    return SampleRequest(
        prompt="",
        negative_prompt=variant.negative_prompt,
        width=256,
        height=256,
        frames=1,
        steps=20,
        guidance=variant.guidance,
        shift=variant.shift,
    )
