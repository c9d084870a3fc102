"""One-frame inference: generate an image as a later or middle frame of a video that contains the control images."""

import re
from dataclasses import dataclass

MAX_CONTROLS = 2


@dataclass(frozen=True)
class OneFrame:
    """Time indices, in latent frames, of the control images and of the generated target image."""

    controls: tuple[int, ...]
    target: int

    def __post_init__(self) -> None:
        places = (*self.controls, self.target)
        if not 1 <= len(self.controls) <= MAX_CONTROLS or len(set(places)) < len(places) or min(places) < 0:
            raise ValueError(
                "must be one or two indices of control images and a different one of the target, all from 0"
            )

    @property
    def positions(self) -> tuple[int, ...]:
        """Return the time index of each latent frame, in the model's order."""
        return tuple(sorted((*self.controls, self.target)))

    @property
    def target_place(self) -> int:
        """Return the index of the target in `positions`."""
        return self.positions.index(self.target)

    def __str__(self) -> str:
        return f"control_index={';'.join(map(str, self.controls))},target_index={self.target}"


def read_one_frame(text: str) -> OneFrame:
    """Parse `control_index=0;2,target_index=1`, the form in prompts and commands. Raises ValueError otherwise."""
    found = re.fullmatch(r"control_index=(\d+(?:;\d+)*),target_index=(\d+)", text.replace(" ", ""))
    if not found:
        raise ValueError("must be written as control_index=0,target_index=1 or control_index=0;2,target_index=1")
    return OneFrame(tuple(map(int, found[1].split(";"))), int(found[2]))
