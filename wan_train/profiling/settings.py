"""Settings of a profile of some steps."""

from dataclasses import dataclass

from wan_train.cli import option


@dataclass(frozen=True)
class ProfileSettings:
    """Profile."""

    profile: str | None = option(
        None,
        "Folder for a torch.profiler trace of three steps and a table of the most expensive operators: "
        "optimizer steps 3 to 5 in training, sampling steps 3 to 5 of the first video in generation.",
        metavar="FOLDER",
    )
