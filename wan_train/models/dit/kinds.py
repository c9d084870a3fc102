"""Which of the published kinds of DiT a checkpoint is: by its channels and by the submodules that it has."""

from dataclasses import dataclass

from wan_train.errors import InputError
from wan_train.models.variants import VARIANTS, Variant
from wan_train.models.weights import Shapes


@dataclass(frozen=True)
class ForeignKind:
    """A kind that no task is for yet: what its models are called, a submodule that no kind before it in the table has
    ("" for any), and the channels that it reads beside that, None for any."""

    name: str
    submodule: str
    in_dim: int | None = None


# The most telling first: models for a camera and those of V1.1 read pictures through CLIP (img_emb), too. Submodules
# and channels are those of the published files.
_FOREIGN = (
    ForeignKind("VACE", "vace_patch_embedding"),
    ForeignKind("Animate", "face_adapter"),
    ForeignKind("S2V (speech to video)", "casual_audio_encoder"),
    ForeignKind("Fun Control-Camera", "control_adapter"),
    ForeignKind("Wan2.2 Fun-Control", "ref_conv", 52),
    ForeignKind("Fun-V1.1-Control", "ref_conv"),
    ForeignKind("Fun-Control", "img_emb", 48),
)


@dataclass(frozen=True)
class Channels:
    """What tells kinds with the usual submodules apart: the channels that a DiT reads and makes, and whether it reads
    one picture through CLIP, or a first and a last."""

    in_dim: int
    out_dim: int
    clip: bool = False
    last: bool = False

    @property
    def pictures(self) -> str:
        """What it reads through CLIP, in words."""
        return ("a first and a last picture" if self.last else "one picture") if self.clip else "no picture"


def channels_of(shapes: Shapes) -> Channels | None:
    """The channels of a DiT, official names; None where the tensors that tell them are missing or misshapen."""
    patch, head = shapes.get("patch_embedding.weight", ()), shapes.get("head.head.weight", ())
    if len(patch) != 5 or len(head) != 2:
        return None
    cells = patch[2] * patch[3] * patch[4]
    return Channels(patch[1], head[0] // cells, "img_emb.proj.0.weight" in shapes, "img_emb.emb_pos" in shapes)


def channels_for(variant: Variant) -> Channels:
    """The channels of the models that a task is for."""
    images = variant.images
    clip = images is not None and images.clip
    return Channels(variant.in_dim, variant.space.channels, clip, clip and images is not None and images.last)


def refuse_foreign(shapes: Shapes, what: str) -> None:
    """InputError that names the kind of a DiT, official names, if no task is for it yet."""
    channels, submodules = channels_of(shapes), {name.partition(".")[0] for name in shapes}
    for kind in _FOREIGN:
        reads = kind.in_dim is None or (channels is not None and channels.in_dim == kind.in_dim)
        if reads and kind.submodule in submodules:
            raise InputError(
                f"{what} is a {kind.name} model, which is not supported yet:"
                " give a T2V, I2V, FLF2V, Fun-InP or TI2V model"
            )


def require_task(shapes: Shapes, variant: Variant, what: str) -> None:
    """InputError for a DiT, official names, of other channels than the task's, or that reads other pictures through
    CLIP."""
    found, wanted = channels_of(shapes), channels_for(variant)
    if found is None or found == wanted:
        return
    fitting = [row for row in VARIANTS.values() if channels_for(row) == found]
    fitting.sort(key=lambda row: row.dim != shapes["patch_embedding.weight"][0])
    if found.in_dim != wanted.in_dim:
        differs = f"reads {found.in_dim} channels, but --task {variant.name} is for {wanted.in_dim}"
    elif found.out_dim != wanted.out_dim:
        differs = f"makes {found.out_dim} channels, but --task {variant.name} is for {wanted.out_dim}"
    else:
        differs = f"reads {found.pictures} through CLIP, but --task {variant.name} gives it {wanted.pictures}"
    raise InputError(f"{what} {differs}: {f'use --task {fitting[0].name}' if fitting else 'give another file'}")
