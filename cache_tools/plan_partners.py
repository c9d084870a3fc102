"""What accompanies each media file, for the plan: controls, references, masks, camera path and motion bucket."""

from dataclasses import dataclass

from dataset.items import Item

_OWN_ALPHA = "its own alpha"


@dataclass(frozen=True)
class CameraPlan:
    """A camera path: a file, or a direction and the camera's movement per frame."""

    path: str | None
    direction: str
    speed: float

    def __str__(self) -> str:
        return self.path or f"{self.direction} at {self.speed:.3g}"


@dataclass(frozen=True)
class PartnersPlan:
    """What accompanies a media file: paths of other files (`mask` is the loss mask), the camera path, and the motion
    bucket.

    `str()` gives one line of text, empty if there is nothing.
    """

    controls: tuple[str, ...] = ()
    references: tuple[str, ...] = ()
    mask: str | None = None
    vace_mask: str | None = None
    camera: CameraPlan | None = None
    motion_bucket_id: int | None = None

    def __str__(self) -> str:
        told = {
            "control": ", ".join(self.controls),
            "reference": ", ".join(self.references),
            "loss mask": self.mask or "",
            "VACE mask": self.vace_mask or "",
            "camera": str(self.camera or ""),
            "motion bucket": "" if self.motion_bucket_id is None else str(self.motion_bucket_id),
        }
        return "; ".join(f"{name} {partner}" for name, partner in told.items() if partner)


def describe_partners(item: Item) -> PartnersPlan:
    """Return what accompanies an item."""
    camera, mask, planned = item.camera, item.mask, None
    if camera is not None:
        planned = CameraPlan(str(camera.path) if camera.path else None, camera.direction, camera.speed)
    return PartnersPlan(
        controls=tuple(map(str, item.controls)),
        references=tuple(map(str, item.references)),
        mask=None if mask is None else _OWN_ALPHA if mask == item.path else str(mask),
        vace_mask=str(item.vace_mask) if item.vace_mask else None,
        camera=planned,
        motion_bucket_id=item.motion_bucket_id,
    )
