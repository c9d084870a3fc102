"""Settings of a profile of some steps."""

from dataclasses import dataclass

from wan_train.cli import option


@dataclass(frozen=True)
class ProfileSettings:
    """Profile."""

    profile: str | None = option(
        None,
        "Write a torch.profiler trace of three steps to this folder, and a table of the most expensive operators. In"
        " training they are optimizer steps 3 to 5, in generation sampling steps 3 to 5 of the first video.",
        metavar="FOLDER",
    )
