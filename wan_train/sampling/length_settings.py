"""Sampling options for videos longer than the model was trained for.

They are declared like those of `wan_train.sampling.settings`.
"""

from dataclasses import dataclass

from wan_train.cli import option
from wan_train.errors import InputError
from wan_train.sampling.options import Sampled

RIFLEX_INDEX = 6  # for Wan2.1, by the authors of RIFLEx: github.com/thu-ml/DiT-Extrapolation, issue 8
NUM_FREQUENCIES = 22  # of the temporal axis of every published Wan model: heads are 128 wide


@dataclass(frozen=True, kw_only=True)
class LengthOptions:
    """Sliding windows and RIFLEx; the same fields in a request and on the command line."""

    sliding_window_size: int | None = option(
        None,
        "Window size for temporal sliding-window sampling, in latent frames (four frames each); default: no windows.",
        minimum=1,
        traits=Sampled(maximum=4096),
    )
    sliding_window_stride: int | None = option(
        None,
        "Window stride, in latent frames, at most --sliding_window_size; default: half of it.",
        minimum=1,
        traits=Sampled(beside="sliding_window_size", recorded="window_stride", maximum=4096),
    )
    riflex: bool = option(
        False,
        "RIFLEx: lower one temporal RoPE frequency against repetition in videos longer than the model was trained for.",
    )
    riflex_freq_index: int = option(
        RIFLEX_INDEX,
        "Index of the temporal RoPE frequency that --riflex lowers; 1 is the highest. 6 has an effect from "
        "181 frames, 4 from 85.",
        minimum=1,
        maximum=NUM_FREQUENCIES,
        traits=Sampled(beside="riflex"),
    )

    @property
    def window_stride(self) -> int:
        """The window stride in latent frames, or its default; `sliding_window_size` must be set."""
        assert self.sliding_window_size is not None
        return self.sliding_window_stride or max(1, self.sliding_window_size // 2)


def check_length_options(given: LengthOptions) -> None:
    """Raise InputError for options of long videos that conflict."""
    size, stride = given.sliding_window_size, given.sliding_window_stride
    if size is None and stride is not None:
        raise InputError(
            f"--sliding_window_stride {stride} requires --sliding_window_size: give both, or leave out"
            " --sliding_window_stride"
        )
    if size is not None and stride is not None and stride > size:
        raise InputError(
            f"--sliding_window_stride {stride} must be at most --sliding_window_size {size}: a larger one skips frames"
        )
    if given.riflex_freq_index != RIFLEX_INDEX and not given.riflex:
        raise InputError(
            f"--riflex_freq_index {given.riflex_freq_index} requires --riflex: give both, or leave the index out"
        )
