"""From kinds of conditions to what the DiT reads behind the noisy latents."""

import pytest
import torch
from torch import Tensor

from wan_train.conditions.camera import camera_path, packed, plucker
from wan_train.conditions.control import control_latents, dit_arguments, reference_latents, start_latents
from wan_train.models.variants import VARIANTS

SHAPE = (2, 16, 3, 4, 6)
FULL = torch.full(SHAPE, 2.0)
START = torch.full((2, 16, 1, 4, 6), 3.0)
IMAGE = torch.cat([torch.ones(2, 4, 3, 4, 6), torch.full(SHAPE, 4.0)], dim=1)
EXPANDED = torch.cat([START, torch.zeros(2, 16, 2, 4, 6)], dim=2)
NONE, NO_IMAGE = torch.zeros(SHAPE), torch.zeros(2, 20, 3, 4, 6)


@pytest.mark.parametrize(
    ("task", "extras", "parts"),
    [
        ("fun-control-1.3B", {"control_latents": FULL, "start_latents": START}, [FULL, EXPANDED]),
        ("fun-control-1.3B", {"control_latents": FULL}, [FULL, NONE]),
        ("fun-control-14B", {"start_latents": START}, [NONE, EXPANDED]),
        ("t2v-14B-FC", {}, [NONE, NONE]),
        ("i2v-14B-FC", {"control_latents": FULL, "start_latents": START}, [FULL, EXPANDED]),
        ("fun-camera-1.3B", {"start_latents": START}, [EXPANDED]),
        ("fun-control-A14B", {"control_latents": FULL, "image_latents": IMAGE}, [FULL, IMAGE]),
        ("fun-control-A14B", {"control_latents": FULL}, [FULL, NO_IMAGE]),
        ("fun-camera-A14B", {"image_latents": IMAGE}, [IMAGE]),
        ("fun-inp-A14B", {"image_latents": IMAGE}, [IMAGE]),
        ("i2v-14B", {"image_latents": IMAGE}, [IMAGE]),
    ],
)
def test_what_stands_behind_the_noise(task: str, extras: dict[str, Tensor], parts: list[Tensor]) -> None:
    arguments = dit_arguments(extras, VARIANTS[task], SHAPE)
    assert arguments.keys() == {"image_latents"}
    assert torch.equal(arguments["image_latents"], torch.cat(parts, dim=1))
    assert arguments["image_latents"].shape[1] == VARIANTS[task].in_dim - 16


def test_the_dtype_is_that_of_what_is_given() -> None:
    made = dit_arguments({"start_latents": START.bfloat16()}, VARIANTS["fun-control-1.3B"], SHAPE)
    assert made["image_latents"].dtype == torch.bfloat16


def test_cameras_become_packed_maps_and_the_rest_stays() -> None:
    entries = torch.stack([camera_path(direction, 9) for direction in ("Left", "In")])
    tokens = torch.randn(2, 5, 8)
    extras = {"start_latents": START, "camera": entries, "clip_features": tokens}
    arguments = dit_arguments(extras, VARIANTS["fun-camera-1.3B"], SHAPE)
    assert arguments.keys() == {"image_latents", "camera", "clip_features"}
    assert torch.equal(arguments["clip_features"], tokens)
    assert arguments["camera"].shape == (2, 24, 3, 32, 48)
    assert torch.equal(arguments["camera"][1], packed(plucker(entries[1], 32, 48)))


def test_vace_and_motion_are_arguments_as_they_are() -> None:
    extras = {"vace_context": torch.randn(2, 96, 4, 4, 6), "motion_bucket_id": torch.tensor([1, 2])}
    for task in ("vace-1.3B", "t2v-1.3B"):
        assert dit_arguments(extras, VARIANTS[task], SHAPE) == extras


def test_images_and_controls_are_encoded_as_they_lie() -> None:
    seen: list[Tensor] = []

    def encode(pixels: Tensor) -> Tensor:
        seen.append(pixels)
        return torch.ones(1, 16, 1 + (pixels.shape[2] - 1) // 4, 2, 3)

    image, video = torch.rand(16, 24, 3).permute(2, 0, 1), torch.rand(5, 16, 24, 3).permute(3, 0, 1, 2)
    assert start_latents(image, encode).shape == reference_latents(image, encode).shape == (16, 1, 2, 3)
    assert control_latents(video, encode).shape == (16, 2, 2, 3)
    for pixels, given in zip(seen, (image[:, None], image[:, None], video), strict=True):
        assert pixels.is_contiguous() and torch.equal(pixels[0], given)
