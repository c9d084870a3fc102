"""The identity of a run: recorded in its states and files; `NAME.run.json` records the latest run of a name.

A run keeps its identity when it is resumed. It gets a new one when it starts afresh, and when it is resumed from a
state although later ones of it exist.
"""

import json
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from wan_train.storage import replacing
from wan_train.training.saving.settings import SaveSettings

SUFFIX = ".run.json"
_VERSION = "1"


@dataclass(frozen=True)
class Identity:
    """A run: its number, `ss_session_id` in files, its start time in seconds since 1970, and the state folder that it
    was last resumed from."""

    session: int
    started_at: float
    resumed_from: str | None = None

    def row(self) -> dict[str, Any]:
        """Return the run's entry in a state's manifest."""
        return {"session": self.session, "started_at": self.started_at}


def new_identity(resumed_from: Path | None = None) -> Identity:
    """Return a new identity for a run that starts now."""
    return Identity(
        session=random.SystemRandom().randrange(2**32),
        started_at=time.time(),
        resumed_from=None if resumed_from is None else str(resumed_from.resolve()),
    )


def write_identity(save: SaveSettings, identity: Identity) -> None:
    """Record which run of this name started or was resumed last. Raise InputError if it cannot be written."""
    with replacing(identity_path(save)) as temporary:
        temporary.write_text(json.dumps({"version": _VERSION, **asdict(identity)}, indent=1), encoding="utf-8")


def read_identity(save: SaveSettings) -> Identity | None:
    """Return the run of this name that started or was resumed last; None if it is not recorded."""
    try:
        values = json.loads(identity_path(save).read_text(encoding="utf-8"))
        if values.pop("version") != _VERSION:
            return None
        return Identity(int(values["session"]), float(values["started_at"]), values["resumed_from"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def identity_path(save: SaveSettings) -> Path:
    """Return the file that records the latest run of this name."""
    return Path(save.output_dir) / f"{save.output_name}{SUFFIX}"
