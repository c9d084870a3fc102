"""Camera paths and their Pluecker maps, the input of camera models (VideoX-Fun's Control-Camera).

A camera entry is a line of RealEstate10K (Zhou et al. 2018): a time stamp; fx, fy, cx, cy as fractions of width and
height; two zeros; the 3x4 matrix from world to camera, row by row.

Legend: N pixel frames, X Y pixel height and width, F latent frames.
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

from wan_train.errors import InputError
from wan_train.models.variants import FRAME_STEP
from wan_train.placement.transfers import send

CPU = torch.device("cpu")
ENTRY_LENGTH = 19
# Default first entry and motion per frame of a path by direction (VideoX-Fun's and DiffSynth-Studio's).
ORIGIN = (0, 0.532139961, 0.946026558, 0.5, 0.5, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0)
SPEED = 1 / 54
# The element of an entry that a direction changes, and the sign; Left to Down change the rotation.
_STEPS = {"Left": (9, 1), "Right": (9, -1), "Up": (13, 1), "Down": (13, -1), "In": (18, -1), "Out": (18, 1)}
DIRECTIONS = ("Left", "Right", "Up", "Down", "LeftUp", "LeftDown", "RightUp", "RightDown", "In", "Out")
_DIRECTION = re.compile(f"(?:{'|'.join(_STEPS)})+")
_POSE_ASPECT = 1280 / 720  # of the videos to which fx and fy refer
_CENTRE_X, _FIRST_OF_MATRIX = 3, 7
_MIRRORED = (8, 9, 10, 11, 15)  # matrix elements whose sign changes in M [R t] diag(M, 1), M = diag(-1, 1, 1)


def plucker_embedding(
    direction: str,
    *,
    frames: int,
    height: int,
    width: int,
    speed: float = SPEED,
    origin: Sequence[float] | None = None,
) -> Tensor:
    """Return the Pluecker map (frames, height, width, 6), float32, of a camera that moves in a direction.

    The arguments are those of `camera_path`, `height` and `width` in pixels. Raises ValueError like `camera_path`.
    """
    return plucker(camera_path(direction, frames, speed, origin), height, width)


def camera_path(direction: str, frames: int, speed: float = SPEED, origin: Sequence[float] | None = None) -> Tensor:
    """Return the camera entries (frames, 19), float32, of a camera that moves by `speed` in each frame.

    `direction` is one of `DIRECTIONS` or a concatenation, such as "LeftUp"; `origin` is the entry of the first frame,
    default: `ORIGIN`. Raises ValueError for other directions, fewer than 1 frame, a speed that is NaN or Inf, and an
    origin that is not 19 numbers.
    """
    if not _DIRECTION.fullmatch(direction):
        raise ValueError(f"unknown camera direction {direction!r}: choose from {', '.join(DIRECTIONS)}")
    first = ORIGIN if origin is None else tuple(origin)
    if frames < 1 or not math.isfinite(speed) or len(first) != ENTRY_LENGTH:
        raise ValueError(
            f"a camera path needs at least 1 frame, a finite speed and an origin of {ENTRY_LENGTH} numbers, got"
            f" {frames}, {speed} and {len(first)}"
        )
    entries = torch.tensor(first, dtype=torch.float64).repeat(frames, 1)
    for word, (element, sign) in _STEPS.items():
        if word in direction:
            entries[:, element] += sign * speed * torch.arange(frames, dtype=torch.float64)
    return entries.float()


def read_camera_file(path: Path) -> Tensor:
    """Return the camera entries (N, 19), float32, of a file in RealEstate10K format, one line per video frame.

    A first line that is a URL or a heading is skipped. Raises InputError with file and line for an entry that is not
    19 finite numbers, or whose focal length is not positive or matrix not invertible, and for a file without entries.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as problem:
        raise InputError(f"cannot read the camera file {path}: {problem}") from None
    entries = []
    for number, line in enumerate(lines, 1):
        entry = _numbers(line)
        if not line.strip() or (number == 1 and entry is None):
            continue
        if entry is None or len(entry) != ENTRY_LENGTH:
            raise InputError(f"{path}, line {number}: expected {ENTRY_LENGTH} numbers, as in RealEstate10K format")
        rotation = rearrange(torch.tensor(entry[_FIRST_OF_MATRIX:]), "(row column) -> row column", column=4)[:, :3]
        if min(entry[1:3]) <= 0 or abs(float(torch.linalg.det(rotation))) < 1e-6:
            raise InputError(f"{path}, line {number}: the focal length must be positive and the matrix invertible")
        entries.append(entry)
    if not entries:
        raise InputError(f"{path} has no camera entries: write one line of {ENTRY_LENGTH} numbers per frame")
    return torch.tensor(entries, dtype=torch.float32)


def mirrored(entries: Tensor) -> Tensor:
    """Return the entries (N, 19) of the horizontally mirrored video."""
    turned = entries.clone()
    turned[:, list(_MIRRORED)] *= -1
    turned[:, _CENTRE_X] = 1 - turned[:, _CENTRE_X]
    return turned


def plucker(entries: Tensor, height: int, width: int, *, device: torch.device = CPU) -> Tensor:
    """Return the Pluecker map (N, X, Y, 6), float32, of entries (N, 19), which are in CPU RAM.

    It has the moment and the direction of each pixel's ray, in the first frame's camera coordinates (Sitzmann et al.
    2021, Light Field Networks, eq. 2). It is computed on `device`; `height` and `width` are in pixels.
    """
    entries = entries.to("cpu", torch.float64)
    poses = send(_poses_from_first(entries).float(), device)
    fx, fy, cx, cy = send(_intrinsics(entries, height, width).float(), device)[..., None, None].unbind(1)
    x = torch.arange(width, device=device) + 0.5
    y = torch.arange(height, device=device)[:, None] + 0.5
    rays = torch.stack(torch.broadcast_tensors((x - cx) / fx, (y - cy) / fy, torch.ones((), device=device)), dim=-1)
    rays = rays / rays.norm(dim=-1, keepdim=True)
    rotation, centre = poses[:, :3, :3], poses[:, None, None, :3, 3]
    directions = torch.einsum("n a b, n x y b -> n x y a", rotation, rays)
    return torch.cat([torch.linalg.cross(centre.expand_as(directions), directions), directions], dim=-1)


def packed(plucker_map: Tensor) -> Tensor:
    """Pack a Pluecker map (N, X, Y, 6), N = 4k+1, into the DiT's input (24, F, X, Y).

    The four pixel frames of a latent frame become channels; the first latent frame repeats its only pixel frame.
    """
    repeated = torch.cat([plucker_map[:1].expand(FRAME_STEP, -1, -1, -1), plucker_map[1:]])
    return rearrange(repeated, "(F k) X Y c -> (c k) F X Y", k=FRAME_STEP)


def _poses_from_first(entries: Tensor) -> Tensor:
    """Return the matrices (N, 4, 4) from each camera to the first one."""
    matrices = rearrange(entries[:, _FIRST_OF_MATRIX:], "N (row column) -> N row column", column=4)
    below = torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=entries.dtype).expand(len(entries), 1, 4)
    to_camera = torch.cat([matrices, below], dim=1)
    poses = to_camera[:1] @ torch.linalg.inv(to_camera)
    poses[0] = torch.eye(4, dtype=entries.dtype)
    return poses


def _intrinsics(entries: Tensor, height: int, width: int) -> Tensor:
    """Return fx, fy, cx, cy (N, 4) in pixels, corrected for a video whose aspect ratio is not that of the poses."""
    fx, fy, cx, cy = entries[:, 1:5].unbind(1)
    if width / height < _POSE_ASPECT:
        fx = fx * (height * _POSE_ASPECT / width)
    else:
        fy = fy * (width / _POSE_ASPECT / height)
    return torch.stack([fx * width, fy * height, cx * width, cy * height], dim=1)


def _numbers(line: str) -> list[float] | None:
    """Return the finite numbers of a line; None if it contains anything else."""
    try:
        found = [float(word) for word in line.split()]
    except ValueError:
        return None
    return found if all(map(math.isfinite, found)) else None
