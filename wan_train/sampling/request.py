"""A request for one video: everything that determines it except the weights."""

from dataclasses import KW_ONLY, dataclass, replace

from wan_train.errors import InputError, first_given
from wan_train.flow.solvers import check_solver, explicit_levels
from wan_train.log import get_logger
from wan_train.models.dit.experts import HIGH, experts_of, read_boundary
from wan_train.models.one_frame import OneFrame
from wan_train.models.variants import FRAME_STEP, VARIANTS, Variant
from wan_train.sampling.control_settings import ControlOptions
from wan_train.sampling.controls import check_inputs, check_options, fit_frames
from wan_train.sampling.guidance import ControlSchedule, Guidance, plan_steps
from wan_train.sampling.images import check_controls, check_images, size_like
from wan_train.sampling.length_settings import LengthOptions, check_length_options
from wan_train.sampling.settings import SampleOptions, StartOptions
from wan_train.sampling.step_cache.settings import CacheOptions, check_cache_options

log = get_logger(__name__)

STRENGTH = 0.7  # default of video-to-video


@dataclass(frozen=True)
class SampleRequest(CacheOptions, LengthOptions, ControlOptions, SampleOptions, StartOptions):
    """Everything that determines a video except the weights.

    Sizes are in pixels, `frames` is 4n+1, a `seed` of None is drawn at random. `shift` None: the variant's for the
    size. `timesteps`, 0..1000 before the shift, replace `steps` evenly spaced ones. `video_path` is the source of
    video-to-video, with `denoising_strength`; default: pure noise. `image_path` is the first frame and
    `end_image_path` the last; the video has the aspect ratio of the first at the area of width and height, unless
    `exact_size`. With `one_frame` the result is an image, a latent frame next to `control_images`. With two experts
    `guidance` is that of the low-noise expert; `guidance_high_noise` and `boundary`, a t in [0, 1], default to the
    variant's. `ControlOptions` has the inputs of control models, `LengthOptions` the options for long videos,
    `CacheOptions` those of step caches; `vace_pad` is (left, top, right, bottom), `camera_origin` 19 numbers or empty.
    """

    prompt: str
    negative_prompt: str
    width: int
    height: int
    frames: int
    steps: int
    guidance: float
    shift: float | None = None
    _: KW_ONLY
    variant: Variant = VARIANTS["t2v-14B"]
    solver: str = "unipc"
    timesteps: tuple[float, ...] = ()
    one_frame: OneFrame | None = None
    control_images: tuple[str, ...] = ()
    guidance_high_noise: float | None = None
    boundary: float | None = None
    # On the command line these have no default, or are text.
    denoising_strength: float = STRENGTH
    slg_layers: tuple[int, ...] = ()
    slg_mode: str = "original"
    vace_pad: tuple[int, ...] = ()
    camera_origin: tuple[float, ...] = ()

    @property
    def size(self) -> tuple[int, int]:
        """(width, height)."""
        return self.width, self.height

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """(C, F, H, W) of the video's latents."""
        frames = 1 + (self.frames - 1) // FRAME_STEP if self.one_frame is None else len(self.one_frame.positions)
        space = self.variant.space
        return space.channels, frames, self.height // space.stride, self.width // space.stride

    @property
    def noise_shift(self) -> float:
        """The shift of the sigma schedule."""
        return self.variant.shift_at(self.width, self.height) if self.shift is None else self.shift

    @property
    def image_paths(self) -> tuple[str, ...]:
        """The control images, or the first-frame and last-frame images."""
        return self.control_images or tuple(path for path in (self.image_path, self.end_image_path) if path)

    @property
    def clip_paths(self) -> tuple[str, ...]:
        """The images that CLIP encodes; VideoX-Fun's models use a reference image in place of the first frame."""
        images = self.variant.images
        if images is None or not images.clip:
            return ()
        if self.reference_image:
            return (self.reference_image,)
        return self.image_paths if self.one_frame else self.image_paths[: images.num_clip_images]

    @property
    def reads_vace(self) -> bool:
        """Whether VACE is used: also without inputs, which are grey then, but not with scale 0."""
        return self.variant.control is not None and self.variant.control.vace and self.vace_scale != 0

    @property
    def is_from_pixels(self) -> bool:
        """Whether the VAE encodes any of its inputs, apart from `video_path`."""
        return bool(self.image_paths or self.control_path or self.reference_image or self.reads_vace)

    @property
    def is_fitted(self) -> bool:
        """Whether the size is final because it has been fitted to the aspect ratio of an image."""
        return bool(self.image_paths)

    @property
    def expert_boundary(self) -> float:
        """The t in [0, 1] from which the high-noise expert is used."""
        return read_boundary(self.boundary, self.variant)

    @property
    def short_prompt(self) -> str:
        """The prompt, cut to 40 characters, for messages."""
        return self.prompt if len(self.prompt) <= 40 else self.prompt[:39] + "…"

    @property
    def settings_summary(self) -> str:
        """Size, length, steps, solver, shift and guidance scale, for messages."""
        guidance = " and then ".join(f"{self.guided(expert).scale:g}" for expert in experts_of(self.variant))
        levels = f" at timesteps {','.join(f'{value:g}' for value in self.timesteps)}" if self.timesteps else ""
        return (
            f"{self.width}x{self.height}, {self.frames} frames, {self.steps} steps{levels}, solver {self.solver},"
            f" shift {self.noise_shift:g}, guidance scale {guidance}"
        )

    @property
    def control_schedule(self) -> ControlSchedule:
        """The steps at which controls apply, and the scale of VACE."""
        control = self.variant.control
        channels = self.variant.space.channels if control is not None and control.video else 0
        return ControlSchedule(self.control_start, self.control_end, channels, self.vace_scale)

    def guided(self, expert: str | None = None) -> Guidance:
        """Return the guidance settings, with two experts those of `expert`."""
        scale = self.guidance
        if expert == HIGH and self.variant.experts is not None:
            scale = self.variant.experts.guidance if self.guidance_high_noise is None else self.guidance_high_noise
        return Guidance(
            scale,
            self.cfg_skip_mode,
            self.cfg_apply_ratio,
            self.cfg_merge,
            self.slg_layers,
            self.slg_mode,
            self.slg_scale,
            self.slg_start,
            self.slg_end,
        )


def checked(request: SampleRequest) -> SampleRequest:
    """Return the request, its options checked; raises InputError for two that conflict."""
    check_solver(request.solver)
    check_options(request)
    check_length_options(request)
    if (request.cfg_skip_mode == "none") != (request.cfg_apply_ratio is None):
        raise InputError("--cfg_skip_mode and --cfg_apply_ratio require each other: give both or neither")
    if request.slg_layers and request.slg_start >= request.slg_end:
        raise InputError(f"--slg_start {request.slg_start:g} must be less than --slg_end {request.slg_end:g}")
    experts = experts_of(request.variant)
    if request.variant.experts is None and request.guidance_high_noise is not None:
        raise InputError(f"--guidance_scale_high_noise: --task {request.variant.name} has one model: leave it out")
    if request.slg_layers and all(request.guided(expert).scale == 1 for expert in experts):
        raise InputError(
            "--slg_layers has no effect with --guidance_scale 1, which disables guidance: leave out one of them"
        )
    if request.timesteps:
        explicit_levels(request.timesteps)
        if request.video_path:
            raise InputError("--timesteps and --video_path both set the initial noise level: give one of them")
        request = replace(request, steps=len(request.timesteps))
    check_cache_options(request, request.steps)
    plans = [
        plan
        for expert in experts
        for plan in plan_steps(request.steps, request.guided(expert), request.control_schedule)
    ]
    if (request.control_path or request.vace_video) and not any(plan.controlled for plan in plans):
        log.warning(
            "--control_start and --control_end include none of %d steps: widen the range, or increase --infer_steps",
            request.steps,
        )
    if request.slg_layers and not any(plan.skipping for plan in plans):
        log.warning("--slg_layers applies to none of %d steps: increase --slg_end or --infer_steps", request.steps)
    return request


def fitted(request: SampleRequest) -> SampleRequest:
    """Return the request with a size and length that the model supports; warns if they change.

    Raises InputError for images that are missing, cannot be read, or are not taken by the task.
    """
    check_inputs(request, request.variant)
    if request.one_frame is None:
        if request.control_images:
            raise InputError(
                "--control_image_path (--ci) requires --one_frame_inference (--of): give both, or leave it out"
            )
        check_images(request.variant, request.image_path, request.end_image_path)
        if request.variant.is_fused and request.image_path and request.frames < 1 + FRAME_STEP:
            raise InputError(
                f"--image_path (--i): a single frame of --task {request.variant.name} would be the image itself: use at"
                f" least {1 + FRAME_STEP} frames (--video_length, --f)"
            )
    else:
        if request.control_images and (request.image_path or request.end_image_path):
            raise InputError(
                "--image_path and --control_image_path both give images of --one_frame_inference: give the latter only"
            )
        check_controls(request.variant, request.one_frame, request.image_paths)
        if given := first_given({"--sliding_window_size": request.sliding_window_size, "--riflex": request.riflex}):
            raise InputError(
                f"--one_frame_inference generates an image, {given} is for long videos: leave out one of them"
            )
        if request.video_path:
            raise InputError(
                "--one_frame_inference generates an image, --video_path starts from a video: leave out one of them"
            )
        request = replace(request, frames=1)
    if request.image_paths and not request.exact_size:
        width, height = size_like(request.image_paths[0], (request.width, request.height), request.variant)
        request = replace(request, width=width, height=height)
    step = request.variant.space.size_step
    width, height = (max(step, side // step * step) for side in (request.width, request.height))
    frames = max(1, (request.frames - 1) // FRAME_STEP * FRAME_STEP + 1)
    if (width, height) != (request.width, request.height):
        given = f"{request.width}x{request.height}"
        log.warning("width and height must be multiples of %d: using %dx%d, not %s", step, width, height, given)
    if frames != request.frames:
        log.warning("the number of frames must be 4n+1: using %d, not %d", frames, request.frames)
    frames = fit_frames(request, request.variant, size=(width, height), frames=frames)
    return replace(request, width=width, height=height, frames=frames)


def preview_defaults(variant: Variant) -> SampleRequest:
    """Return the defaults of previews: a small image, with the task's shift and guidance scale."""
    return SampleRequest(
        prompt="",
        negative_prompt=variant.negative_prompt,
        width=256,
        height=256,
        frames=1,
        steps=20,
        guidance=variant.guidance,
        shift=None,
        variant=variant,
    )
