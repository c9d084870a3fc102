"""Report on a run as one self-contained page: curves, previews by step, settings.

python -m wan_train.training.reporting.report RUN_DIR
"""

import base64
import html
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from networks.moments import is_saved_as
from wan_train.cli import Tool, option, run
from wan_train.errors import InputError
from wan_train.log import get_logger
from wan_train.storage import read_header, replacing
from wan_train.training.reporting.metrics import read_rows
from wan_train.training.reporting.report_curves import Row, compare, draw_charts, list_facts
from wan_train.training.reporting.report_style import STYLE

log = get_logger(__name__)

METRICS = ".metrics.jsonl"


@dataclass(frozen=True)
class ReportSettings:
    """Report."""

    run_dir: str = option("", "Output folder of the run (its --output_dir).", required=True)
    output_name: str | None = option(
        None, "Report only on the run of this --output_name; default: all runs in the folder."
    )
    save_path: str | None = option(None, "HTML file to write; default: RUN_DIR/report.html.")
    max_preview_mib: int = option(
        60, "Maximum total size of embedded previews, in MiB; if they exceed it, some moments are left out.", minimum=0
    )


@dataclass(frozen=True)
class ReportOptions:
    """All settings of the report."""

    report: ReportSettings


@dataclass(frozen=True)
class Preview:
    """A preview file: NAME_MOMENT_INDEX_TIME_SEED."""

    path: Path
    moment: str
    index: int


def main(options: ReportOptions) -> None:
    """Write the page."""
    settings = options.report
    folder = Path(settings.run_dir)
    names = find_runs(folder, settings.output_name)
    target = Path(settings.save_path or folder / "report.html")
    page = make_page(folder, names, max_bytes=settings.max_preview_mib * 2**20)
    with replacing(target) as temporary:
        temporary.write_text(page, encoding="utf-8")
    log.info("wrote %s, %.1f MiB", target, target.stat().st_size / 2**20)


def find_runs(folder: Path, wanted: str | None) -> list[str]:
    """Return the names of the runs in a folder, by their metrics files. Raise InputError if there is none, or not the
    requested one."""
    names = sorted(path.name.removesuffix(METRICS) for path in folder.glob(f"*{METRICS}"))
    if not names:
        raise InputError(f"{folder} has no NAME{METRICS}: give the --output_dir of a run")
    if wanted is not None and wanted not in names:
        raise InputError(f"{folder} has no run {wanted}: it has {', '.join(names)}")
    return names if wanted is None else [wanted]


def make_page(folder: Path, names: Sequence[str], *, max_bytes: int) -> str:
    """Return the page of runs in a folder. Previews take at most `max_bytes` before base64 encoding."""
    runs = {name: read_rows(folder / f"{name}{METRICS}") for name in names}
    together = ""
    if len(names) > 1:
        together = f'<section><h2>All runs</h2><div class="charts">{compare(runs)}</div></section>'
    sections = "".join(_section(folder, name, rows, max_bytes // len(runs)) for name, rows in runs.items())
    title = html.escape(", ".join(names))
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style></head>"
        f"<body><main><h1>{title}</h1>{together}{sections}</main></body></html>\n"
    )


def _section(folder: Path, name: str, rows: list[Row], max_bytes: int) -> str:
    return (
        f"<section><h2>{html.escape(name)}</h2>{list_facts(rows)}"
        f'<div class="charts">{"".join(draw_charts(rows))}</div>'
        f"{_previews(folder, name, max_bytes)}{_settings(folder, name)}</section>"
    )


def find_previews(folder: Path, name: str) -> list[Preview]:
    """Return the previews of a run by creation time, the newest of each moment and prompt."""
    pattern = re.compile(rf"{re.escape(name)}_(e?\d{{6,}})_(\d{{2,}})_\d+(?:_\d+)?\.(?:mp4|png)")
    found: dict[tuple[str, int], Path] = {}
    for path in sorted((folder / "sample").glob("*")):
        if match := pattern.fullmatch(path.name):
            found[match[1], int(match[2])] = path
    previews = [Preview(path, moment, index) for (moment, index), path in found.items()]
    return sorted(previews, key=lambda one: (one.path.stat().st_mtime, one.index))


def thin_out(previews: Sequence[Preview], max_bytes: int) -> list[Preview]:
    """Keep as many moments as fit, evenly spaced and including the first."""
    moments = list(dict.fromkeys(preview.moment for preview in previews))
    for count in range(len(moments), 0, -1):
        chosen = {moments[round(i * (len(moments) - 1) / max(1, count - 1))] for i in range(count)}
        kept = [preview for preview in previews if preview.moment in chosen]
        if sum(preview.path.stat().st_size for preview in kept) <= max_bytes:
            return kept
    return []


def _previews(folder: Path, name: str, max_bytes: int) -> str:
    found = find_previews(folder, name)
    kept = thin_out(found, max_bytes)
    if not found:
        return ""
    rows = []
    for index in sorted({preview.index for preview in kept}):
        cells = "".join(_cell(preview) for preview in kept if preview.index == index)
        rows.append(f'<h4>prompt {index}</h4><div class="strip">{cells}</div>')
    left = len(found) - len(kept)
    note = f"<p>{left} of {len(found)} are left out: raise --max_preview_mib to include more.</p>" if left else ""
    return f"<h3>Previews</h3>{note}{''.join(rows)}"


def _cell(preview: Preview) -> str:
    data = base64.b64encode(preview.path.read_bytes()).decode()
    when = f"epoch {int(preview.moment[1:])}" if preview.moment.startswith("e") else f"step {int(preview.moment)}"
    if preview.path.suffix == ".mp4":
        shown = f'<video src="data:video/mp4;base64,{data}" controls loop muted playsinline></video>'
    else:
        shown = f'<img src="data:image/png;base64,{data}" alt="{when}">'
    return f"<figure>{shown}<figcaption>{when}</figcaption></figure>"


def _settings(folder: Path, name: str) -> str:
    """Return the run's configuration and the metadata of its newest file."""
    parts = []
    configuration = folder / f"{name}.config.toml"
    if configuration.is_file():
        text = html.escape(configuration.read_text(encoding="utf-8"))
        parts.append(f"<details open><summary>Settings</summary><pre>{text}</pre></details>")
    saved = [path for path in folder.glob("*.safetensors") if is_saved_as(path.stem, name)]
    if saved:
        newest = max(saved, key=lambda path: path.stat().st_mtime)
        rows = sorted(read_header(newest).metadata.items())
        cells = "".join(
            f"<tr><th>{html.escape(key)}</th><td>{html.escape(_readable(value))}</td></tr>" for key, value in rows
        )
        parts.append(
            f"<details><summary>Metadata of {html.escape(newest.name)}</summary><table>{cells}</table></details>"
        )
    return "".join(parts)


def _readable(value: str) -> str:
    try:
        found = json.loads(value)
    except ValueError:
        return value
    return json.dumps(found, indent=1, ensure_ascii=False) if isinstance(found, dict | list) else value


TOOL = Tool(
    "python -m wan_train.training.reporting.report RUN_DIR",
    "Create a self-contained HTML page of a run: curves, previews and settings.",
    ReportOptions,
    "wan_train.training.reporting.report:main",
)


def start(argv: Sequence[str]) -> int:
    """Run from the command line; RUN_DIR may be given as the first argument."""
    words = list(argv)
    if words and not words[0].startswith("-"):
        words[0:1] = ["--run_dir", words[0]]
    return run(TOOL, words)


if __name__ == "__main__":
    sys.exit(start(sys.argv[1:]))
