"""The tasks of `--task` as rows of a table (published Wan2.1 and Wan2.2 configurations)."""

from dataclasses import dataclass

SIZE_STEP = 16  # pixels: VAE stride 8 times patch 2
FRAME_STEP = 4  # pixel frames per latent frame after the first
LATENT_CHANNELS = 16
_WAN21_FRAMES = 81  # pixel frames of Wan2.1's training, also of its image tasks
VAE_STRIDE = 8
TEXT_LENGTH = 512

# Negative prompt of the official Wan2.1 T2V configuration (sample_neg_prompt).
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"
    "杂乱的背景，三条腿，背景人很多，倒着走"
)


# The official I2V and FLF2V configurations prepend "shaking camera" and "shot change".
I2V_NEGATIVE_PROMPT = "镜头晃动，" + NEGATIVE_PROMPT
FLF2V_NEGATIVE_PROMPT = "镜头切换，" + I2V_NEGATIVE_PROMPT

SMALL_AREA = 832 * 480  # pixels: up to this area a task may use `small_shift`


@dataclass(frozen=True)
class LatentSpace:
    """A latent space: number of channels, pixels per latent cell side, frame rate, and the published VAE file."""

    channels: int = LATENT_CHANNELS
    stride: int = VAE_STRIDE
    fps: int = 16
    vae_file: str = "Wan2.1_VAE.pth"

    @property
    def size_step(self) -> int:
        """Return the step of video width and height in pixels: two latent cells, one token of the DiT."""
        return 2 * self.stride


WAN21, WAN22 = LatentSpace(), LatentSpace(48, 16, 24, "Wan2.2_VAE.pth")


@dataclass(frozen=True)
class ImageInputs:
    """The images that a model takes besides text: the first frame and, with `last`, also the last one.

    `clip`: each image is also encoded with CLIP. `fused`: the first frame replaces the noisy one; the image is
    optional. `optional`: the image may be absent. `alone`: the model takes the latents of the first frame followed by
    zeros, without a mask, as in VideoX-Fun's Wan2.1 control models; other models take a mask and the latents of a video
    that is grey where no image is given.
    """

    last: bool = False
    clip: bool = True
    fused: bool = False
    optional: bool = False
    alone: bool = False

    @property
    def num_clip_images(self) -> int:
        """Return the number of images encoded with CLIP."""
        return (1 + self.last) * self.clip


@dataclass(frozen=True)
class ControlInputs:
    """The inputs that a control model takes besides text and images.

    `video`: latents of a control video, in additional channels. `reference`: an image whose tokens precede those of the
    video. `camera`: a camera path. `vace`: a video, a mask and reference images, all in the VACE context.
    """

    video: bool = False
    reference: bool = False
    camera: bool = False
    vace: bool = False


@dataclass(frozen=True)
class ExpertDefaults:
    """Defaults of a task with two experts: `boundary`, the t from which on the high-noise expert is used, and its
    guidance."""

    boundary: float
    guidance: float


@dataclass(frozen=True)
class Variant:
    """A task: the geometry of its published checkpoint and the defaults of its sampler.

    `size` is (width, height) in pixels, `frames` counts pixel frames, `shift` and `guidance` are those of the official
    sampler, and `small_shift` is used up to SMALL_AREA if set. With `experts` the guidance is that of the low-noise
    expert.
    """

    name: str
    in_dim: int
    dim: int
    num_layers: int
    size: tuple[int, int]
    frames: int
    steps: int
    shift: float
    guidance: float
    small_shift: float | None = None
    images: ImageInputs | None = None
    negative_prompt: str = NEGATIVE_PROMPT
    experts: ExpertDefaults | None = None
    space: LatentSpace = WAN21
    control: ControlInputs | None = None

    @property
    def fps(self) -> int:
        """Return the frames per second of its videos."""
        return self.space.fps

    @property
    def trained_frames(self) -> int:
        """Return the number of latent frames that its published model was trained with."""
        return 1 + (max(self.frames, _WAN21_FRAMES) - 1) // FRAME_STEP

    @property
    def reads_clip(self) -> bool:
        """Return whether it takes CLIP image tokens."""
        return self.images is not None and self.images.clip

    @property
    def is_fused(self) -> bool:
        """Return whether a given first frame replaces the noisy one."""
        return self.images is not None and self.images.fused

    @property
    def family(self) -> str:
        """Return the model family's name in model managers."""
        return "wan2.1" if self.experts is None and self.space == WAN21 else "wan2.2"

    def shift_at(self, width: int, height: int) -> float:
        """Return the official sampler's shift for a video size in pixels."""
        return self.small_shift if self.small_shift and width * height <= SMALL_AREA else self.shift


I2V, FLF2V, LATENTS_ONLY = ImageInputs(), ImageInputs(last=True), ImageInputs(clip=False)
FUSED = ImageInputs(clip=False, fused=True)
# VideoX-Fun's: Wan2.1's control models, and Wan2.2's, which read no CLIP and have the mask of I2V.
START, MAY_START = ImageInputs(alone=True), ImageInputs(alone=True, optional=True)
MAY_START22 = ImageInputs(clip=False, optional=True)
VIDEO, CAMERA, VACE = ControlInputs(video=True, reference=True), ControlInputs(camera=True), ControlInputs(vace=True)
HD, SD = (1280, 720), (832, 480)
T2V_EXPERTS, FUN_EXPERTS = ExpertDefaults(0.875, 5.0), ExpertDefaults(0.9, 6.0)  # VideoX-Fun's configurations

_ROWS = (
    Variant("t2v-1.3B", 16, 1536, 30, SD, 81, 50, 5.0, 5.0),
    Variant("t2v-14B", 16, 5120, 40, HD, 81, 50, 5.0, 5.0),
    Variant("t2i-14B", 16, 5120, 40, (1024, 1024), 1, 50, 5.0, 5.0),
    Variant("i2v-14B", 36, 5120, 40, HD, 81, 40, 5.0, 5.0, 3.0, I2V, I2V_NEGATIVE_PROMPT),
    Variant("flf2v-14B", 36, 5120, 40, HD, 81, 50, 16.0, 5.0, None, FLF2V, FLF2V_NEGATIVE_PROMPT),
    Variant("t2v-A14B", 16, 5120, 40, HD, 81, 40, 12.0, 3.0, experts=ExpertDefaults(0.875, 4.0)),
    Variant("i2v-A14B", 36, 5120, 40, HD, 81, 40, 5.0, 3.5, images=LATENTS_ONLY, experts=ExpertDefaults(0.9, 3.5)),
    Variant("ti2v-5B", 48, 3072, 30, (1280, 704), 121, 50, 5.0, 5.0, images=FUSED, space=WAN22),
    Variant("fun-control-1.3B", 48, 1536, 30, SD, 81, 50, 5.0, 5.0, images=MAY_START, control=VIDEO),
    Variant("fun-control-14B", 48, 5120, 40, SD, 81, 50, 5.0, 5.0, images=MAY_START, control=VIDEO),
    Variant("i2v-14B-FC", 48, 5120, 40, SD, 81, 40, 5.0, 5.0, images=START, control=VIDEO),
    Variant("fun-camera-1.3B", 32, 1536, 30, SD, 81, 50, 5.0, 5.0, images=START, control=CAMERA),
    Variant("fun-camera-14B", 32, 5120, 40, SD, 81, 50, 5.0, 5.0, images=START, control=CAMERA),
    Variant("vace-1.3B", 16, 1536, 30, SD, 81, 50, 16.0, 5.0, control=VACE),
    Variant("vace-14B", 16, 5120, 40, HD, 81, 50, 16.0, 5.0, control=VACE),
    Variant(
        *("fun-control-A14B", 52, 5120, 40, SD, 81, 50, 5.0, 6.0),
        images=MAY_START22,
        experts=FUN_EXPERTS,
        control=VIDEO,
    ),
    Variant(
        *("fun-camera-A14B", 36, 5120, 40, SD, 81, 50, 5.0, 6.0),
        images=LATENTS_ONLY,
        experts=FUN_EXPERTS,
        control=CAMERA,
    ),
    Variant("fun-inp-A14B", 36, 5120, 40, SD, 81, 50, 5.0, 6.0, images=LATENTS_ONLY, experts=FUN_EXPERTS),
    Variant("vace-fun-A14B", 16, 5120, 40, SD, 81, 50, 12.0, 5.0, experts=T2V_EXPERTS, control=VACE),
)
# Names in musubi-tuner.
_ALIASES = {"t2v-1.3B-FC": "fun-control-1.3B", "t2v-14B-FC": "fun-control-14B"}
VARIANTS: dict[str, Variant] = {row.name: row for row in _ROWS}
VARIANTS |= {alias: VARIANTS[name] for alias, name in _ALIASES.items()}
