"""Convert the boundary between two experts, a t in [0, 1] where 1 is noise, to the units of other trainers."""

from collections.abc import Callable

DIFFSYNTH_SHIFT = 5.0  # of its training schedule, whatever the model


def index_fraction(boundary: float, shift: float) -> float:
    """Return the position of a boundary in a list of shifted noise levels, noisiest first: 1 - b / (s - (s-1) b)."""
    return 1 - boundary / (shift - (shift - 1) * boundary)


def from_index_fraction(fraction: float, shift: float) -> float:
    """Return the boundary at a position in the list: the inverse of `index_fraction`."""
    before = 1 - fraction
    return shift * before / (1 + (shift - 1) * before)


def _diffsynth(b: float) -> str:
    fraction = index_fraction(b, DIFFSYNTH_SHIFT)
    return f"--max_timestep_boundary {fraction:.4f} (high noise), --min_timestep_boundary {fraction:.4f} (low noise)"


# Tool -> how its users write the boundary.
UNITS: dict[str, Callable[[float], str]] = {
    "wan-train": lambda b: f"--timestep_boundary {b:g}",
    "musubi-tuner": lambda b: f"--timestep_boundary {1000 * b:g}; --min_timestep and --max_timestep in 0..1000",
    "diffusion-pipe": lambda b: f"min_t = {b:g} (high noise), max_t = {b:g} (low noise)",
    "DiffSynth-Studio": _diffsynth,
    "ai-toolkit": lambda b: f"a timestep of {1000 * b:g}, of its own (no option)",
    "SimpleTuner, diffusers": lambda b: f"boundary_ratio {b:g}",
}


def describe_boundary(boundary: float) -> str:
    """Return the boundary in the notation of each tool, one per line."""
    width = max(map(len, UNITS))
    return "\n".join(f"{tool:<{width}}  {write(boundary)}" for tool, write in UNITS.items())
