"""Which expert of a Wan2.2 pair a LoRA file belongs to: stored in its metadata and compared with where it is used.

A file trained on one expert fits the other by all names and shapes; only its metadata distinguishes them.
"""

from wan_train.errors import InputError
from wan_train.log import get_logger
from wan_train.models.dit.experts import ORDER
from wan_train.storage import read_header

log = get_logger(__name__)

KEY = "wan_train_expert"


def expert_of(path: str) -> str | None:
    """Return the expert that a file was trained on, if its metadata has it."""
    try:
        said = read_header(path).metadata.get(KEY)
    except InputError:
        return None  # reported with the file's other problems
    return said if said in ORDER else None


def warn_of_other_expert(path: str, expert: str) -> None:
    """Warn about a file of the other expert."""
    said = expert_of(path)
    if said is not None and said != expert:
        log.warning(
            "%s was trained on the expert for %s but is applied to the one for %s: the experts handle different"
            " noise levels",
            *(path, said.replace("_", " "), expert.replace("_", " ")),
        )
