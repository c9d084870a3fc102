"""Draw which frames each extraction mode takes (docs/extraction.svg), from the positions that caching uses.

python docs/draw_extraction.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset.reading.frames import clip_positions

IMAGE = Path(__file__).resolve().parent / "extraction.svg"
FRAMES = 30
# (mode, its keys in the TOML file, arguments of `clip_positions`)
ROWS: tuple[tuple[str, str, dict[str, int]], ...] = (
    ("head", "target_frames = [9]", {}),
    ("chunk", "target_frames = [9]", {}),
    ("slide", "target_frames = [9], frame_stride = 7", {"frame_stride": 7}),
    ("uniform", "target_frames = [9], frame_sample = 3", {"frame_sample": 3}),
    ("full", "max_frames = 20", {"max_frames": 20}),
)
CELL, BAR, LEFT, GAP = 16, 14, 20, 16


def draw() -> str:
    """Return the SVG: for each mode a row of frames, those taken in dark, and below it a bar for each clip."""
    parts, y = [], GAP
    for mode, keys, numbers in ROWS:
        clips = clip_positions(FRAMES, [9], mode, **numbers)
        taken = {frame for start, length in clips for frame in range(start, start + length)}
        parts.append(f'<text x="{LEFT}" y="{y + 12}"><tspan font-weight="bold">{mode}</tspan>  {keys}</text>')
        y += 20
        parts += [_box(frame, 1, y, CELL - 2, "#35507a" if frame in taken else "#d5d9e0") for frame in range(FRAMES)]
        y += CELL + 3
        for start, length in clips:
            parts.append(_box(start, length, y, BAR - 6, "#d9822b"))
            y += BAR - 2
        y += GAP
    size = (2 * LEFT + FRAMES * CELL, y)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size[0]} {size[1]}" width="{size[0]}"'
    ground = f'<rect width="{size[0]}" height="{size[1]}" fill="#ffffff"/>'
    return "\n".join([f'{head} font-family="sans-serif" font-size="12">', ground, *parts, "</svg>", ""])


def _box(first: int, num_frames: int, y: int, height: int, colour: str) -> str:
    x, width = LEFT + first * CELL, num_frames * CELL - 2
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="2" fill="{colour}"/>'


def main() -> None:
    IMAGE.write_text(draw(), encoding="utf-8")
    print(f"wrote {IMAGE}")


if __name__ == "__main__":
    main()
