"""The objects passed from reading to caching: source files with their captions, and the clips cut from them."""

from dataclasses import dataclass
from pathlib import Path

from dataset.config import DatasetConfig
from wan_train.conditions.camera import SPEED
from wan_train.models.variants import FRAME_STEP


@dataclass(frozen=True)
class CameraSource:
    """A camera path: a file in RealEstate10K's format, or a direction and a speed."""

    path: Path | None = None
    direction: str = ""
    speed: float = SPEED


@dataclass(frozen=True)
class Item:
    """One image or video of a dataset, with one or more captions, one of which is used per training sample.

    `controls` and `mask` are images, videos or folders of frames: one control, or several for an image that is trained
    as one frame of several. If the mask is the file itself, its alpha channel is used. `references` are images.
    `vace_mask` has the format of a mask and marks what VACE generates.
    """

    config: DatasetConfig
    path: Path
    captions: tuple[str, ...]
    controls: tuple[Path, ...] = ()
    mask: Path | None = None
    references: tuple[Path, ...] = ()
    vace_mask: Path | None = None
    camera: CameraSource | None = None
    motion_bucket_id: int | None = None

    @property
    def control(self) -> Path | None:
        """The first control; most tasks have only one."""
        return next(iter(self.controls), None)

    @property
    def caption(self) -> str:
        """The first caption, the only one that musubi-tuner reads."""
        return self.captions[0]


@dataclass(frozen=True)
class Clip:
    """A sequence of frames of an item to train on; an image is a clip of one frame.

    `frames` are the indices to decode and `start` is the first frame's index among the frames kept by `source_fps`.
    `size` is the bucket and `source_size` the size before resizing, both (width, height) in pixels. `reading` describes
    the pixel processing beyond decoding, as stored in a recipe.
    """

    item: Item
    start: int
    frames: tuple[int, ...]
    size: tuple[int, int]
    source_size: tuple[int, int]
    reading: str = ""

    @property
    def num_frames(self) -> int:
        """Number of pixel frames, 4k+1."""
        return len(self.frames)

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """Shape (C, F, H, W) of the latents; for an image trained as one frame of several, F includes the others."""
        width, height = self.size
        one_frame, space = self.item.config.one_frame, self.item.config.space
        frames = (self.num_frames - 1) // FRAME_STEP + 1 if one_frame is None else len(one_frame.positions)
        return space.channels, frames, height // space.stride, width // space.stride
