"""Where in the product an operator was called."""

import sys
from functools import cache
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parents[3]
PRODUCT = ("wan_train", "networks", "dataset", "cache_tools", "generate", "tests")
OURS = Path(__file__).resolve().parents[1]  # the simulator and what runs it

Place = tuple[tuple[str, int], ...]  # files and lines, innermost first


def here(limit: int = 8) -> Place:
    """Return the innermost frames that are in the product's files."""
    frame: FrameType | None = sys._getframe(1)
    found: list[tuple[str, int]] = []
    while frame is not None and len(found) < limit:
        name = _product_file(frame.f_code.co_filename)
        if name:
            found.append((name, frame.f_lineno))
        frame = frame.f_back
    return tuple(found)


def told(place: Place, limit: int = 8) -> str:
    """Return a place as text."""
    return " < ".join(f"{name}:{line}" for name, line in place[:limit]) or "outside of the product"


@cache
def _product_file(name: str) -> str:
    """Return the path below the root of a file of the product or of its tests, else an empty string."""
    path = Path(name)
    if not path.is_relative_to(ROOT) or (path.is_relative_to(OURS) and not path.name.startswith("test_")):
        return ""
    relative = path.relative_to(ROOT)
    return relative.as_posix() if relative.parts[0] in PRODUCT else ""
