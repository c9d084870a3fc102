"""Camera paths and Pluecker maps: published maps, mirrors, files."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import wan_train
from tests.parity.golden import load_case, relative_error
from wan_train.conditions.camera import (
    DIRECTIONS,
    ORIGIN,
    camera_path,
    mirrored,
    packed,
    plucker,
    plucker_embedding,
    read_camera_file,
)
from wan_train.errors import InputError

OPPOSITE = {"Left": "Right", "Up": "Down", "In": "Out"}
# In the plane of the image a mirror changes left and right alone.
MIRRORED = {"Left": "Right", "LeftUp": "RightUp", "LeftDown": "RightDown", "Up": "Up", "Down": "Down", "In": "In"}
MIRRORED |= {"Out": "Out", "Right": "Left", "RightUp": "LeftUp", "RightDown": "LeftDown"}
LINE = "0 0.5 0.9 0.4 0.5 0 0 1 0 0 0.1 0 1 0 0.2 0 0 1 0.3"


@pytest.mark.parametrize("direction", ["Left", "RightUp"])
def test_published_maps(direction: str) -> None:
    theirs = load_case("camera_plucker").outputs[f"plucker.{direction}"]
    assert relative_error(wan_train.plucker_embedding(direction, frames=9, height=32, width=48), theirs) < 1e-6


def mirror(plucker_map: Tensor) -> Tensor:
    """The map of the mirrored scene: directions lose the sign of x, moments, as axial vectors, those of y and z."""
    signs = torch.tensor([1.0, -1.0, -1.0, -1.0, 1.0, 1.0])
    return plucker_map.flip(2) * signs


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_mirrored_path_makes_the_mirrored_map(direction: str) -> None:
    entries = camera_path(direction, 9, 0.1)
    entries[:, 3] = 0.4
    entries[:, 10] = torch.linspace(0, 2, 9)
    entries[:, 8] = torch.linspace(0, 0.3, 9)
    made = plucker(mirrored(entries), 24, 40)
    torch.testing.assert_close(made, mirror(plucker(entries, 24, 40)), atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(mirrored(mirrored(entries)), entries)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_mirrored_direction_is_its_opposite(direction: str) -> None:
    assert torch.equal(mirrored(camera_path(direction, 5)), camera_path(MIRRORED[direction], 5))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_directions(direction: str) -> None:
    made = plucker_embedding(direction, frames=5, height=16, width=32)
    assert made.shape == (5, 16, 32, 6) and made.dtype == torch.float32
    still = plucker_embedding(direction, frames=5, height=16, width=32, speed=0)
    assert torch.equal(still, still[:1].expand_as(still)) and torch.equal(made[0], still[0])
    assert (made[1:] != still[1:]).any(dim=(1, 2, 3)).all()


@pytest.mark.parametrize("direction", list(OPPOSITE))
def test_opposites(direction: str) -> None:
    origin = torch.tensor(ORIGIN, dtype=torch.float32)
    one, other = camera_path(direction, 9, 0.25), camera_path(OPPOSITE[direction], 9, 0.25)
    torch.testing.assert_close(one - origin, origin - other)


@pytest.mark.parametrize("across", ["Left", "Right"])
@pytest.mark.parametrize("along", ["Up", "Down"])
def test_diagonals_are_both_at_once(across: str, along: str) -> None:
    origin = torch.tensor(ORIGIN, dtype=torch.float32)
    both = sum(camera_path(word, 9, 0.25) - origin for word in (across, along))
    torch.testing.assert_close(camera_path(across + along, 9, 0.25) - origin, both)


def test_moving_in_has_no_moment_on_the_axis_and_goes_forward() -> None:
    """In moves the camera along its axis: of the ray through the middle the moment stays 0; a ray right of it turns."""
    made = plucker_embedding("In", frames=3, height=17, width=17, speed=0.5)
    torch.testing.assert_close(made[:, 8, 8, :3], torch.zeros(3, 3))
    # The centre of frame 2 is at z = 1: moment z x d = (-z d_y, z d_x, 0).
    directions = made[2, ..., 3:]
    expected = torch.stack([-directions[..., 1], directions[..., 0], torch.zeros(17, 17)], dim=-1)
    torch.testing.assert_close(made[2, ..., :3], expected)


def test_four_pixel_frames_are_channels_of_a_latent_frame() -> None:
    plucker_map = torch.randn(9, 2, 3, 6)
    made = packed(plucker_map)
    assert made.shape == (24, 3, 2, 3)
    for channel in range(6):
        for place in range(4):
            assert torch.equal(made[4 * channel + place, 0], plucker_map[0, :, :, channel])
            assert torch.equal(made[4 * channel + place, 2], plucker_map[5 + place, :, :, channel])


def test_an_aspect_that_is_not_the_poses() -> None:
    """A square video sees less of the width: fx is greater by 16/9; a wider one less of the height."""
    square, wide = (plucker_embedding("In", frames=1, height=height, width=64)[0, ..., 3:] for height in (64, 16))
    fx, fy = ORIGIN[1] * (1280 / 720), ORIGIN[2]
    corner = torch.tensor([(0.5 / 64 - 0.5) / fx, (0.5 / 64 - 0.5) / fy, 1.0])
    torch.testing.assert_close(square[0, 0], corner / corner.norm())
    fx, fy = ORIGIN[1], ORIGIN[2] * (64 / (1280 / 720) / 16)
    corner = torch.tensor([(0.5 / 64 - 0.5) / fx, (0.5 / 16 - 0.5) / fy, 1.0])
    torch.testing.assert_close(wide[0, 0], corner / corner.norm())


@pytest.mark.parametrize("direction", ["", "left", "Sideways", "Left Up", "LeftX"])
def test_unknown_directions_name_the_known(direction: str) -> None:
    with pytest.raises(ValueError, match=r"unknown camera direction .*: choose from Left, Right, .*In, Out"):
        camera_path(direction, 5)


@pytest.mark.parametrize(("frames", "speed", "origin"), [(0, 0.1, None), (5, float("nan"), None), (5, 0.1, [1.0] * 18)])
def test_paths_that_are_none(frames: int, speed: float, origin: list[float] | None) -> None:
    with pytest.raises(ValueError, match="a camera path needs at least 1 frame"):
        camera_path("Left", frames, speed, origin)


def test_files_with_and_without_a_heading(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    expected = torch.tensor([[float(word) for word in LINE.split()]] * 2)
    for text in (f"{LINE}\n{LINE}\n", f"https://example.org\n{LINE}\n\n{LINE}", f"\ufeff{LINE}\n{LINE}"):
        path.write_text(text, encoding="utf-8")
        assert torch.equal(read_camera_file(path), expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no camera entries"),
        (f"{LINE}\n{LINE} 1", "line 2: expected 19 numbers"),
        (f"{LINE}\n1 2 x", "line 2: expected 19 numbers"),
        (LINE.replace("0.9", "nan") + "\n" + LINE.replace("0.9", "inf"), "line 2: expected 19 numbers"),
        ("1 2 3", "line 1: expected 19 numbers"),
        (LINE.replace("0.5", "0", 1), "line 1: the focal length must be positive"),
        (LINE.replace("0 0 1 0.3", "0 0 0 0.3"), "line 1: .*matrix invertible"),
    ],
)
def test_files_that_are_none(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "a.txt"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_camera_file(path)
    with pytest.raises(InputError, match="cannot read the camera file"):
        read_camera_file(tmp_path / "none.txt")
