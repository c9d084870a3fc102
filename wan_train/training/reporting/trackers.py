"""Trackers of curves and previews: TensorBoard and Weights & Biases."""

import io
import netrc
import os
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import av
import numpy as np
from PIL import Image

from wan_train.errors import InputError
from wan_train.log import get_logger
from wan_train.packages import is_installed, missing, require
from wan_train.training.reporting.settings import LogSettings
from wan_train.training.saving.settings import SaveSettings

log = get_logger(__name__)

TABLES = ("wandb", "tensorboard")


class Tracker(Protocol):
    """Records numbers and media by name and step."""

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Record finite numbers."""
        ...

    def media(self, paths: Mapping[str, Path], step: int, *, fps: int) -> None:
        """Record videos (.mp4) and images (.png)."""
        ...

    def close(self) -> None:
        """Flush and close."""
        ...


class TensorBoard:
    """TensorBoard event files in a folder; a resumed run purges what was recorded after step `keep_until`."""

    def __init__(self, folder: Path, keep_until: int | None, arguments: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge = None if keep_until is None else keep_until + 1
        self._writer = SummaryWriter(str(folder), purge_step=purge, **arguments)

    def describe(self, config: Mapping[str, str]) -> None:
        """Add the settings as a text table."""
        rows = "\n".join(f"|{name}|{value}|" for name, value in config.items())
        self._writer.add_text("settings", f"|setting|value|\n|-|-|\n{rows}")

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Record finite numbers, one curve for each name."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def media(self, paths: Mapping[str, Path], step: int, *, fps: int) -> None:
        """Record images; a video becomes an animated GIF."""
        from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]

        for name, path in paths.items():
            frames = read_frames(path)
            image = Summary.Image(
                height=frames.shape[1],
                width=frames.shape[2],
                colorspace=3,
                encoded_image_string=encode_gif(frames, fps),
            )
            summary = Summary(value=[Summary.Value(tag=name, image=image)])
            self._writer._get_file_writer().add_summary(summary, step)

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


class Wandb:
    """A Weights & Biases run; WANDB_MODE=offline keeps it in a local folder."""

    def __init__(self, logs: LogSettings, save: SaveSettings, config: Mapping[str, str], run_id: str | None) -> None:
        import wandb

        arguments = {
            "project": logs.log_tracker_name,
            "name": logs.wandb_run_name or save.output_name,
            "dir": str(_log_folder(logs, save)),
            "config": dict(config),
        } | read_tracker_config(logs).get("wandb", {})
        # Its process metadata contain the command line, which may contain API keys.
        quiet = wandb.Settings(api_key=logs.wandb_api_key, x_disable_meta=True, console="off", silent=True)
        if run_id is not None:
            arguments |= {"id": run_id, "resume": "allow"}
        Path(arguments["dir"]).mkdir(parents=True, exist_ok=True)
        try:
            self._run: Any = wandb.init(**arguments, settings=quiet)
        except (wandb.errors.Error, TypeError) as problem:
            raise InputError(f"cannot start W&B: {problem}; or use --log_with tensorboard") from None
        self.run_id: str = self._run.id
        # W&B's own step counter only increases: steps that a resumed run repeats would be lost.
        self._run.define_metric("*", step_metric="step")

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Record finite numbers in one row."""
        self._run.log({"step": step, **values})

    def media(self, paths: Mapping[str, Path], step: int, *, fps: int) -> None:
        """Record videos and images."""
        import wandb

        made = {
            name: wandb.Video(str(path)) if path.suffix == ".mp4" else wandb.Image(str(path))
            for name, path in paths.items()
        }
        self._run.log({"step": step, **made})

    def close(self) -> None:
        """Finish the run."""
        self._run.finish(quiet=True)


def check_trackers(logs: LogSettings) -> None:
    """Raise InputError for a tracker that is not installed, a bad configuration, or a missing API key."""
    read_tracker_config(logs)
    asking = f"--log_with {logs.log_with}"
    if logs.log_with in ("tensorboard", "all"):
        require("tensorboard", asking, instead="use --log_with auto")
    if logs.log_with not in ("wandb", "all"):
        return
    require("wandb", asking, instead="use --log_with auto")
    if not (_needs_no_key() or logs.wandb_api_key or os.environ.get("WANDB_API_KEY") or _logged_in()):
        raise InputError(
            "W&B needs a key: set WANDB_API_KEY, give --wandb_api_key, run wandb login, or set WANDB_MODE=offline"
        )


def read_tracker_config(logs: LogSettings) -> dict[str, dict[str, Any]]:
    """Return the tables of `--log_tracker_config`."""
    path = logs.log_tracker_config
    if path is None:
        return {}
    try:
        tables = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise InputError(f"cannot read --log_tracker_config {path}: {problem}") from None
    odd = [name for name, table in tables.items() if name not in TABLES or not isinstance(table, dict)]
    if odd:
        raise InputError(
            f"--log_tracker_config {path} has {', '.join(odd)}: only the tables [wandb] and [tensorboard] are allowed"
        )
    return tables


def uses_board(logs: LogSettings) -> bool:
    """Return whether metrics go to TensorBoard."""
    if logs.log_with == "auto" and not is_installed("tensorboard"):
        log.info("metrics are written to NAME.metrics.jsonl; %s", missing("TensorBoard", "tensorboard"))
        return False
    return logs.log_with in ("auto", "tensorboard", "all")


def open_board(logs: LogSettings, save: SaveSettings, keep_until: int | None) -> TensorBoard:
    """Open TensorBoard. Raise InputError if it does not start."""
    folder = _log_folder(logs, save) / f"{logs.log_prefix or ''}{save.output_name}"
    try:
        return TensorBoard(folder, keep_until, read_tracker_config(logs).get("tensorboard", {}))
    except (OSError, TypeError) as problem:
        raise InputError(f"cannot start TensorBoard in {folder}: {problem}") from None


def read_frames(path: Path) -> np.ndarray:
    """Return the frames (F, H, W, 3) uint8 of a video; an image is one frame."""
    if path.suffix == ".png":
        return np.asarray(Image.open(path).convert("RGB"))[None]
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def encode_gif(frames: np.ndarray, fps: int) -> bytes:
    """Encode frames (F, H, W, 3) uint8 as a looping GIF; a single frame as PNG."""
    images, buffer = [Image.fromarray(frame) for frame in frames], io.BytesIO()
    if len(images) == 1:
        images[0].save(buffer, format="PNG")
    else:
        images[0].save(
            buffer, format="GIF", save_all=True, append_images=images[1:], duration=round(1000 / fps), loop=0
        )
    return buffer.getvalue()


class Guarded:
    """A tracker that is disabled with one warning when it fails, so that a run does not stop for its curves."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker: Tracker | None = tracker

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Record finite numbers."""
        self._try(lambda tracker: tracker.scalars(values, step))

    def media(self, paths: Mapping[str, Path], step: int, *, fps: int) -> None:
        """Record videos and images."""
        self._try(lambda tracker: tracker.media(paths, step, fps=fps))

    def close(self) -> None:
        """Flush and close."""
        self._try(lambda tracker: tracker.close())

    def _try(self, call: Callable[[Tracker], None]) -> None:
        if self._tracker is None:
            return
        try:
            call(self._tracker)
        except Exception as problem:  # anything that a third-party package raises
            log.warning("%s failed and is disabled: %s", type(self._tracker).__name__, problem)
            self._tracker = None


def _log_folder(logs: LogSettings, save: SaveSettings) -> Path:
    return Path(logs.logging_dir or Path(save.output_dir) / "logs")


def _needs_no_key() -> bool:
    """Return whether W&B is offline, disabled, or self-hosted."""
    return os.environ.get("WANDB_MODE", "") in ("offline", "disabled", "dryrun") or "WANDB_BASE_URL" in os.environ


def _logged_in() -> bool:
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False
