"""The demo's results: verdicts on its videos, and a self-contained page that shows them."""

import base64
import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import av
import numpy as np

from examples.nano.judge import Verdict, judge
from examples.nano.measure import shares
from examples.nano.world import Scene
from wan_train.media_out import write_video
from wan_train.storage import replacing
from wan_train.training.reporting.metrics import read_rows
from wan_train.training.reporting.report_curves import draw_charts
from wan_train.training.reporting.report_style import STYLE

if TYPE_CHECKING:
    from examples.nano.demo import Done

CLAIM = "8 of 10, none without, at most 10 points lost"
ENLARGED = 4  # times: 32 pixels are small on a page


@dataclass(frozen=True)
class Outcome:
    """Shares of correct videos: of the new word without and with the LoRA, and of old captions likewise."""

    new_scenes: Sequence[Scene]
    old_scenes: Sequence[Scene]
    before: Sequence[Verdict]
    after: Sequence[Verdict]

    def right(self, verdicts: Sequence[Verdict]) -> int:
        """Return the number of the new word's videos with one whole shape in its colour."""
        pairs = zip(self.new_scenes, verdicts, strict=False)
        return sum(verdict.whole and verdict.colour == scene.colour for scene, verdict in pairs)

    def kept(self, verdicts: Sequence[Verdict]) -> dict[str, float]:
        """Return the shares of old captions that are still correct."""
        return shares(verdicts[len(self.new_scenes) :], self.old_scenes)

    @property
    def lost_points(self) -> float:
        """Percentage points by which the colour of old captions got worse."""
        return 100 * (self.kept(self.before)["colour"] - self.kept(self.after)["colour"])

    @property
    def claim_holds(self) -> bool:
        """Whether the new word is correct in at least 8 of 10 and in none before, with at most 10 points lost."""
        enough = self.right(self.after) >= 0.8 * len(self.new_scenes)
        return enough and self.right(self.before) == 0 and self.lost_points <= 10

    def text(self, word: str) -> str:
        """Return the outcome as text."""
        count = len(self.new_scenes)
        before, after = self.kept(self.before), self.kept(self.after)
        return "\n".join(
            [
                f"'{word}' comes out right in {self.right(self.after)} of {count} videos with the LoRA,"
                f" in {self.right(self.before)} without",
                *(
                    f"old captions, {what}: {100 * before[name]:.0f}% before, {100 * after[name]:.0f}% after"
                    for name, what in (("whole", "one whole shape"), ("colour", "colour"), ("direction", "direction"))
                ),
                # The claim does not apply to few videos after a short training.
                *([f"the claim ({CLAIM}) {'holds' if self.claim_holds else 'fails'}"] if count >= 10 else []),
            ]
        )


def judge_all(folder: Path, new_scenes: Sequence[Scene], old_scenes: Sequence[Scene]) -> Outcome:
    """Return the verdicts on the videos generated before and after."""
    count = len(new_scenes) + len(old_scenes)
    before, after = (
        [judge(read(folder / side / f"{i:03d}.mp4")) for i in range(count)] for side in ("before", "after")
    )
    return Outcome(new_scenes, old_scenes, before, after)


def read(path: Path) -> np.ndarray:
    """Return the frames (F, H, W, 3) of a video."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def write_report(folder: Path, done: Sequence["Done"], outcome: Outcome) -> Path:
    """Write FOLDER/report.html and FOLDER/outcome.json."""
    scenes = [*outcome.new_scenes, *outcome.old_scenes]
    shown = [
        *range(len(outcome.new_scenes)),
        *range(len(outcome.new_scenes), min(len(scenes), len(outcome.new_scenes) + 8)),
    ]
    rows = "".join(
        f"<tr><td>{html.escape(scenes[i].caption)}</td>{_cell(folder, 'before', i)}{_cell(folder, 'after', i)}</tr>"
        for i in shown
    )
    times = "".join(
        f"<tr><td>{html.escape(one.title)}</td><td>{one.seconds:.0f} s</td><td>{one.memory_mib:.0f} MiB</td>"
        f"<td><code>{html.escape(one.command)}</code></td></tr>"
        for one in done
    )
    charts = "".join(draw_charts(read_rows(next((folder / "out").glob("*.metrics.jsonl")))))
    page = f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>wan-train demo</title>
<style>{STYLE} video {{ width: 128px; height: 128px; }} td {{ vertical-align: middle; }}</style></head><body>
<h1>A new word in a few minutes</h1><pre>{html.escape(outcome.text(outcome.new_scenes[0].colour))}</pre>
<table><tr><th>prompt</th><th>without the LoRA</th><th>with the LoRA</th></tr>{rows}</table>
<h2>Previews during training</h2>{_previews(folder)}
<h2>Curves</h2>{charts}
<h2>Commands</h2><table><tr><th>step</th><th>time</th><th>memory</th><th>command</th></tr>{times}</table>
</body></html>"""
    target = folder / "report.html"
    with replacing(target) as temporary:
        temporary.write_text(page, encoding="utf-8")
    numbers = {
        side: outcome.kept(verdicts) for side, verdicts in (("before", outcome.before), ("after", outcome.after))
    }
    new = {"new_before": outcome.right(outcome.before), "new_after": outcome.right(outcome.after)}
    (folder / "outcome.json").write_text(json.dumps(new | numbers, indent=1) + "\n", encoding="utf-8")
    return target


def _cell(folder: Path, side: str, index: int) -> str:
    return f"<td>{_playing(folder, folder / side / f'{index:03d}.mp4')}</td>"


def _playing(folder: Path, path: Path) -> str:
    """Return a video as HTML, enlarged and in a format that every browser plays."""
    frames = read(path).repeat(ENLARGED, axis=1).repeat(ENLARGED, axis=2)
    copy = folder / "shown.mp4"
    write_video(copy, frames, fps=16, quality=20)
    data = base64.b64encode(copy.read_bytes()).decode()
    copy.unlink()
    return f'<video autoplay loop muted playsinline src="data:video/mp4;base64,{data}"></video>'


def _previews(folder: Path) -> str:
    """Return a row for each preview time, with a video for each prompt."""
    moments: dict[str, list[Path]] = {}
    for path in sorted((folder / "out" / "sample").glob("*.mp4")):
        moments.setdefault(path.stem.split("_")[1], []).append(path)
    rows = (
        f"<tr><td>{html.escape(moment)}</td>{''.join(f'<td>{_playing(folder, path)}</td>' for path in paths)}</tr>"
        for moment, paths in moments.items()
    )
    return f"<table>{''.join(rows)}</table>"
