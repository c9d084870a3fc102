"""Identify which published kind of DiT a checkpoint is, by its channels and submodules."""

from dataclasses import dataclass

from wan_train.errors import InputError
from wan_train.models.variants import VARIANTS, ControlInputs, Variant
from wan_train.models.weights import Shapes


@dataclass(frozen=True)
class ForeignKind:
    """An unsupported kind of model: its name, and a submodule that identifies it."""

    name: str
    submodule: str


_FOREIGN = (
    ForeignKind("Animate", "face_adapter"),
    ForeignKind("S2V (speech to video)", "casual_audio_encoder"),
)


# The submodule of a control model that its base does not have, the kind's name, and its field of `ControlInputs`.
# VACE comes first, because no other kind has its blocks.
_CONTROLS = (
    ("vace_patch_embedding", "a VACE model", "vace"),
    ("control_adapter", "a Fun Control-Camera model", "camera"),
    ("ref_conv", "a Fun-Control model with a reference image", "reference"),
)
_NAMES = {kind: name for _, name, kind in _CONTROLS}


@dataclass(frozen=True)
class Channels:
    """Properties that distinguish kinds of DiT.

    The numbers of input and output channels, whether it takes CLIP tokens of one image, or of a first and a last one,
    and the kind of control that it has layers for: "vace", "camera", "reference" or none.
    """

    in_dim: int
    out_dim: int
    clip: bool = False
    last: bool = False
    control: str = ""

    @property
    def images(self) -> str:
        """Return the images that it takes CLIP tokens of, in words."""
        return ("a first and a last image" if self.last else "one image") if self.clip else "no image"


def channels_of(shapes: Shapes) -> Channels | None:
    """Return the channels of a DiT (official names); None if the tensors that define them are missing or misshapen."""
    patch, head = shapes.get("patch_embedding.weight", ()), shapes.get("head.head.weight", ())
    if len(patch) != 5 or len(head) != 2:
        return None
    cells, submodules = patch[2] * patch[3] * patch[4], {name.partition(".")[0] for name in shapes}
    control = next((kind for submodule, _, kind in _CONTROLS if submodule in submodules), "")
    clip, last = "img_emb.proj.0.weight" in shapes, "img_emb.emb_pos" in shapes
    return Channels(patch[1], head[0] // cells, clip, last, control)


def channels_for(variant: Variant) -> tuple[Channels, ...]:
    """Return the channels of the models for a task; for Wan2.1's Fun-Control those of V1.0, and of V1.1 with a
    reference."""
    images, control = variant.images, variant.control or ControlInputs()
    clip = images is not None and images.clip
    last = clip and images is not None and images.last
    kinds: tuple[str, ...] = ("",)
    if control.vace or control.camera:
        kinds = ("vace" if control.vace else "camera",)
    elif control.reference:
        kinds = ("reference",) if variant.experts else ("", "reference")
    return tuple(Channels(variant.in_dim, variant.space.channels, clip, last, kind) for kind in kinds)


def refuse_foreign(shapes: Shapes, label: str) -> None:
    """Raise InputError, naming the kind, if a DiT (official names) is of a kind that no task supports."""
    submodules = {name.partition(".")[0] for name in shapes}
    for kind in _FOREIGN:
        if kind.submodule in submodules:
            raise InputError(
                f"{label} is a {kind.name} model, which is not supported: give a model of one of the tasks of --task"
            )


def require_task(shapes: Shapes, variant: Variant, label: str) -> None:
    """Raise InputError if a DiT (official names) does not fit a task.

    That is, if its channels differ, it has layers for a different kind of control, or takes CLIP tokens of different
    images.
    """
    found, fit = channels_of(shapes), channels_for(variant)
    if found is None or found in fit:
        return
    wanted = min(fit, key=lambda channels: channels.control != found.control)
    fitting = [row for row in VARIANTS.values() if found in channels_for(row)]
    fitting.sort(key=lambda row: row.dim != shapes["patch_embedding.weight"][0])
    if found.control != wanted.control:
        differs = f"is {_NAMES[found.control]}" if found.control else f"is not {_NAMES[wanted.control]}"
        differs += f", which --task {variant.name} {'does not support' if found.control else 'requires'}"
    elif found.in_dim != wanted.in_dim:
        differs = f"has {found.in_dim} input channels, but --task {variant.name} requires {wanted.in_dim}"
    elif found.out_dim != wanted.out_dim:
        differs = f"has {found.out_dim} output channels, but --task {variant.name} requires {wanted.out_dim}"
    else:
        differs = f"takes CLIP tokens of {found.images}, but --task {variant.name} provides {wanted.images}"
    raise InputError(f"{label} {differs}: {f'use --task {fitting[0].name}' if fitting else 'give another file'}")
