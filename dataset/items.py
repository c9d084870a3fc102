"""What travels from a folder to the cache: source files with their captions, and the clips taken from them."""

from dataclasses import dataclass
from pathlib import Path

from dataset.config import DatasetConfig
from wan_train.conditions.camera import SPEED
from wan_train.models.variants import FRAME_STEP


@dataclass(frozen=True)
class CameraSource:
    """A camera path: a file of RealEstate10K's lines, or a direction and a speed."""

    path: Path | None = None
    direction: str = ""
    speed: float = SPEED


@dataclass(frozen=True)
class Item:
    """One image or video of a dataset, and its captions: one or more, of which training takes one each time.

    `controls` and `mask` are the images, videos or folders of frames that go with it: one control, or for an image
    that is trained as one frame of several those others. A mask that is the file itself is its alpha. `references` are
    images, `vace_mask` is like a mask and says what VACE makes anew.
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
        """The first control, of most tasks the only one."""
        return next(iter(self.controls), None)

    @property
    def caption(self) -> str:
        """The first caption, which is the one that musubi-tuner knows."""
        return self.captions[0]


@dataclass(frozen=True)
class Clip:
    """A run of frames of an item, as it is trained on; an image is a clip of one frame.

    `frames` are the indices to decode, `start` is the first frame's number among those that `source_fps` keeps, `size`
    the bucket and `source_size` the image before resizing, both (width, height) in pixels. `reading` is what is done
    to the pixels beyond decoding, in a recipe's words.
    """

    item: Item
    start: int
    frames: tuple[int, ...]
    size: tuple[int, int]
    source_size: tuple[int, int]
    reading: str = ""

    @property
    def num_frames(self) -> int:
        """Pixel frames, 4k+1."""
        return len(self.frames)

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """(C, F, H, W) of its latents; an image that is one frame of several has those of the others too."""
        width, height = self.size
        one_frame, space = self.item.config.one_frame, self.item.config.space
        frames = (self.num_frames - 1) // FRAME_STEP + 1 if one_frame is None else len(one_frame.positions)
        return space.channels, frames, height // space.stride, width // space.stride
