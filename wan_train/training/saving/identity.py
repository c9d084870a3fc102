"""Which run something is of: states and files say it, and `NAME.run.json` says which run of a name began last.

A run keeps its identity when it is resumed. It gets another one when it begins afresh, and when it leaves its own past:
when it is resumed from a state although later ones of it are there.
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
    """A run: its number, which files have as `ss_session_id`, the time at which it began, in seconds since 1970, and
    the state folder that it was last resumed from."""

    session: int
    started_at: float
    resumed_from: str | None = None

    def row(self) -> dict[str, Any]:
        """What a state's manifest says of the run."""
        return {"session": self.session, "started_at": self.started_at}


def new_identity(resumed_from: Path | None = None) -> Identity:
    """That of a run which begins now."""
    return Identity(
        session=random.SystemRandom().randrange(2**32),
        started_at=time.time(),
        resumed_from=None if resumed_from is None else str(resumed_from.resolve()),
    )


def write_identity(save: SaveSettings, identity: Identity) -> None:
    """Note which run of this name began, or was resumed, last. InputError for a full disk."""
    with replacing(identity_path(save)) as temporary:
        temporary.write_text(json.dumps({"version": _VERSION, **asdict(identity)}, indent=1), encoding="utf-8")


def read_identity(save: SaveSettings) -> Identity | None:
    """The run of this name that began, or was resumed, last; None where that is not known."""
    try:
        values = json.loads(identity_path(save).read_text(encoding="utf-8"))
        if values.pop("version") != _VERSION:
            return None
        return Identity(int(values["session"]), float(values["started_at"]), values["resumed_from"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def identity_path(save: SaveSettings) -> Path:
    """Where it is noted which run of this name began, or was resumed, last."""
    return Path(save.output_dir) / f"{save.output_name}{SUFFIX}"
