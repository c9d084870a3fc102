"""Which expert of a Wan2.2 pair a LoRA file is of: written into its metadata, and compared with where it is put.

A file that was trained on one expert fits the other by every name and shape; only what it says tells them apart.
"""

from wan_train.errors import InputError
from wan_train.log import get_logger
from wan_train.models.dit.experts import ORDER
from wan_train.storage import read_header

log = get_logger(__name__)

KEY = "wan_train_expert"


def expert_of(path: str) -> str | None:
    """The expert that a file was trained on, if it says so."""
    try:
        said = read_header(path).metadata.get(KEY)
    except InputError:
        return None  # told with the file's other faults
    return said if said in ORDER else None


def warn_of_other_expert(path: str, expert: str) -> None:
    """A warning for a file of the other expert."""
    said = expert_of(path)
    if said is not None and said != expert:
        log.warning(
            "%s was trained for the %s expert and is applied to the %s expert",
            *(path, said.replace("_", " "), expert.replace("_", " ")),
        )
