"""Interactive generation from prompt lines; models stay loaded between them."""

import contextlib
import importlib
from collections.abc import Callable

from generate.jobs import parse_job
from generate.models import Models
from generate.output import check_length, check_names, stem_of
from generate.preflight import fitted_jobs
from generate.runs import Delivery, run_jobs
from wan_train.errors import InputError
from wan_train.log import get_logger

log = get_logger(__name__)

WELCOME = "one prompt per line, for example: a cat in the rain --w 832 --h 480 --f 81 --s 20; Ctrl-D exits"


def run_interactive(models: Models, delivery: Delivery, *, read: Callable[[str], str] = input) -> int:
    """Generate a video per line until end of input; return the number of videos. An error only skips its line."""
    _edit_lines()
    print(WELCOME)
    begun = made = 0
    while (line := _next_line(read)) is not None:
        if not line.strip():
            continue
        try:
            (job,) = fitted_jobs([parse_job(line.strip(), models.settings, begun)], models.settings)
            check_length(models.settings.output, job.request.frames)
            check_names(models.settings.output, stem_of(models.settings.output, job, several=True))
            begun += 1  # a failure from here on may leave latents with this index
            run_jobs([job], models, delivery)
            made += 1
        except InputError as problem:
            log.warning("%s", problem)
        except KeyboardInterrupt:
            log.warning("interrupted; press Ctrl-D at the prompt to exit")
        except Exception as problem:
            log.warning("generation failed: %s", str(problem).strip().partition("\n")[0] or type(problem).__name__)
    return made


def _next_line(read: Callable[[str], str]) -> str | None:
    try:
        return read("> ")
    except EOFError:
        return None


def _edit_lines() -> None:
    """Enable line editing and history, if Python has readline."""
    with contextlib.suppress(ImportError):
        importlib.import_module("readline")
