"""Models of other kinds are told by what they have, and refused by name; others lead to the task that they are for."""

import json

import pytest
import torch
from torch import Tensor

from tests.parity.golden import DATA, load_manifest
from wan_train.errors import InputError
from wan_train.models.loading import check_dit, load_dit
from wan_train.models.variants import VARIANTS
from wan_train.models.weights import diffusers_name

# Names and shapes of published files, of the first block alone.
OTHERS: dict[str, dict[str, list[int]]] = json.loads((DATA / "checkpoints" / "not-supported.json").read_text())
KINDS = {
    "wan2.1-fun-control-1.3B": "Fun-Control",
    "wan2.1-fun-control-14B": "Fun-Control",
    "wan2.1-fun-v1.1-control-1.3B": "Fun-V1.1-Control",
    "wan2.1-fun-v1.1-control-14B": "Fun-V1.1-Control",
    "wan2.1-fun-v1.1-control-camera-1.3B": "Fun Control-Camera",
    "wan2.1-fun-v1.1-control-camera-14B": "Fun Control-Camera",
    "wan2.1-vace-1.3B": "VACE",
    "wan2.1-vace-14B": "VACE",
    "wan2.2-fun-A14B-control": "Wan2.2 Fun-Control",
}


def empty(shapes: dict[str, list[int]] | dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    with torch.device("meta"):
        return {name: torch.empty(tuple(shape), dtype=torch.bfloat16) for name, shape in shapes.items()}


@pytest.mark.parametrize("task", list(VARIANTS))
@pytest.mark.parametrize("name", list(KINDS))
def test_a_model_of_another_kind_is_refused_by_name_for_every_task(name: str, task: str) -> None:
    with pytest.raises(InputError, match=f"--dit the state dict is a {KINDS[name]} model, which is not supported yet"):
        check_dit(empty(OTHERS[name]), VARIANTS[task])


def test_no_published_file_is_missing() -> None:
    assert set(OTHERS) == set(KINDS)


@pytest.mark.parametrize(
    ("submodule", "kind"),
    [
        ("casual_audio_encoder.encoder.final_linear.weight", "S2V"),
        ("face_adapter.fuser_blocks.0.k_norm.weight", "Animate"),
    ],
)
def test_models_that_are_driven_by_sound_or_a_face_are_told_by_their_submodules(submodule: str, kind: str) -> None:
    base = load_manifest("wan2.1-t2v-1.3B") | {submodule: (8, 8)}
    with pytest.raises(InputError, match=f"is a {kind}"):
        check_dit(empty(base), VARIANTS["t2v-1.3B"])


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_other_names_and_loading_without_a_task_make_no_difference(prefix: str) -> None:
    vace = empty(OTHERS["wan2.1-vace-1.3B"])
    with pytest.raises(InputError, match="VACE"):
        load_dit({prefix + name: tensor for name, tensor in vace.items()}, device="meta")
    with pytest.raises(InputError, match="VACE"):
        load_dit({diffusers_name(name): tensor for name, tensor in vace.items()}, device="meta")


@pytest.mark.parametrize(
    ("name", "task", "told"),
    [
        ("wan2.1-t2v-14B", "i2v-14B", "reads 16 channels, but --task i2v-14B is for 36: use --task t2v-14B"),
        ("wan2.1-i2v-14B", "t2v-14B", "reads 36 channels, but --task t2v-14B is for 16: use --task i2v-14B"),
        ("wan2.2-i2v-A14B", "t2v-14B", "reads 36 channels, but --task t2v-14B is for 16: use --task i2v-A14B"),
        ("wan2.2-i2v-A14B", "i2v-14B", "reads no picture through CLIP, .* gives it one picture: use --task i2v-A14B"),
        ("wan2.1-flf2v-14B", "i2v-14B", "reads a first and a last picture through CLIP, .* use --task flf2v-14B"),
        ("wan2.2-ti2v-5B", "t2v-1.3B", "reads 48 channels, but --task t2v-1.3B is for 16: use --task ti2v-5B"),
    ],
)
def test_a_model_of_another_task_leads_to_that_task(name: str, task: str, told: str) -> None:
    with pytest.raises(InputError, match=told):
        check_dit(empty(load_manifest(name)), VARIANTS[task])


def test_a_model_that_makes_other_channels_than_it_reads_is_not_of_the_task_for_those() -> None:
    shapes = load_manifest("wan2.2-ti2v-5B") | {"head.head.weight": (64, 3072), "head.head.bias": (64,)}
    with pytest.raises(InputError, match="makes 16 channels, but --task ti2v-5B is for 48: give another file"):
        check_dit(empty(shapes), VARIANTS["ti2v-5B"])
