"""Options of other trainers' commands that have no effect here."""

from dataclasses import dataclass

from wan_train.cli import option
from wan_train.errors import InputError


@dataclass(frozen=True)
class OldSettings:
    """Accepted for compatibility."""

    img_in_txt_in_offloading: bool = option(
        False, "No effect; Wan's input layers are too small to be worth offloading."
    )
    guidance_scale: float = option(
        1.0, "No effect; Wan has no embedded guidance. Previews take guidance from --l in their prompts."
    )
    dynamo_backend: str = option("NO", "Only NO is accepted; use --compile.")
    dynamo_mode: str | None = option(None, "Does nothing without a --dynamo_backend.")
    dynamo_fullgraph: bool = option(False, "Does nothing without a --dynamo_backend.")
    dynamo_dynamic: bool = option(False, "Does nothing without a --dynamo_backend.")

    def __post_init__(self) -> None:
        if self.dynamo_backend.lower() != "no":
            raise InputError(
                f"--dynamo_backend {self.dynamo_backend} would compile the whole model: use --compile "
                f"--compile_backend {self.dynamo_backend.lower()}, which compiles its blocks"
            )
