"""One-frame inference: an image made from others as if it were a later, or a middle, frame of a video with them."""

import re
from dataclasses import dataclass

MAX_CONTROLS = 2


@dataclass(frozen=True)
class OneFrame:
    """Where in time, in latent frames, the given images are and the one that is made."""

    controls: tuple[int, ...]
    target: int

    def __post_init__(self) -> None:
        places = (*self.controls, self.target)
        if not 1 <= len(self.controls) <= MAX_CONTROLS or len(set(places)) < len(places) or min(places) < 0:
            raise ValueError("takes one or two indices of given images and another one for the target, all from 0")

    @property
    def positions(self) -> tuple[int, ...]:
        """Where each latent frame is, in the order in which the model has them."""
        return tuple(sorted((*self.controls, self.target)))

    @property
    def target_place(self) -> int:
        """Which of them is the one that is made."""
        return self.positions.index(self.target)

    def __str__(self) -> str:
        return f"control_index={';'.join(map(str, self.controls))},target_index={self.target}"


def read_one_frame(text: str) -> OneFrame:
    """`control_index=0;2,target_index=1`, as prompts and commands have it; ValueError for anything else."""
    found = re.fullmatch(r"control_index=(\d+(?:;\d+)*),target_index=(\d+)", text.replace(" ", ""))
    if not found:
        raise ValueError("takes control_index=0,target_index=1, or control_index=0;2,target_index=1")
    return OneFrame(tuple(map(int, found[1].split(";"))), int(found[2]))
