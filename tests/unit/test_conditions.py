"""What the DiT reads beside the noisy latents: masks by hand, and what is encoded."""

import pytest
import torch
from torch import Tensor

from wan_train.conditions.conditions import Conditions, ImageConditions
from wan_train.conditions.images import clip_tokens, given_latents, given_mask, one_frame_latents
from wan_train.models.one_frame import OneFrame

HEIGHT, WIDTH = 16, 32

# Of each latent frame its four channels, written down by hand: a latent frame after the first holds four pixel frames,
# the first holds one four times.
MASKS = {
    (1, (0,)): ["1111"],
    (5, (0,)): ["1111", "0000"],
    (13, (0,)): ["1111", "0000", "0000", "0000"],
    (13, (0, 12)): ["1111", "0000", "0000", "0001"],
    (81, (0, 80)): ["1111", *["0000"] * 19, "0001"],
    (5, (0, 2)): ["1111", "0100"],
    (5, ()): ["0000", "0000"],
}


@pytest.mark.parametrize(("video", "wanted"), MASKS.items())
def test_mask(video: tuple[int, tuple[int, ...]], wanted: list[str]) -> None:
    num_frames, given = video
    mask = given_mask(given, num_frames, HEIGHT, WIDTH)
    assert mask.shape == (4, len(wanted), HEIGHT // 8, WIDTH // 8)
    for row in range(HEIGHT // 8):
        for column in range(WIDTH // 8):
            found = ["".join(str(int(v)) for v in frame) for frame in mask[:, :, row, column].T]
            assert found == wanted


def image(value: float) -> Tensor:
    return torch.full((3, HEIGHT, WIDTH), value)


def encode(video: Tensor) -> Tensor:
    """Latents that tell the first channel of the pixel frames they hold."""
    seen.append(video)
    frames = 1 + (video.shape[2] - 1) // 4
    return torch.ones(1, 16, frames, HEIGHT // 8, WIDTH // 8) * 7


seen: list[Tensor] = []


@pytest.mark.parametrize("num_frames", [1, 5, 13, 81])
@pytest.mark.parametrize("values", [(0.5,), (0.5, -0.25)])
def test_one_video_of_the_images_and_grey(num_frames: int, values: tuple[float, ...]) -> None:
    seen.clear()
    made = given_latents([image(value) for value in values], num_frames, encode)
    (video,) = seen
    expected = [0.0] * num_frames
    if len(values) == 2:
        expected[-1] = values[1]
    expected[0] = values[0]  # of a single frame it is the beginning
    assert video[0, :, :, 3, 5].tolist() == [expected] * 3
    assert made.shape == (20, 1 + (num_frames - 1) // 4, HEIGHT // 8, WIDTH // 8)
    given = [0, num_frames - 1][: len(values)]
    assert torch.equal(made[:4], given_mask(given, num_frames, HEIGHT, WIDTH))
    assert (made[4:] == 7).all()


def tokens(images: Tensor) -> Tensor:
    return images.mean((1, 2, 3)).view(-1, 1, 1).expand(-1, 3, 2)


def test_tokens_of_images_follow_one_another() -> None:
    both = clip_tokens([image(0.5), image(-0.25)], tokens)
    assert both.tolist() == [[0.5, 0.5]] * 3 + [[-0.25, -0.25]] * 3


def test_one_frame_has_each_image_in_its_place() -> None:
    def mean(video: Tensor) -> Tensor:
        return video.mean().expand(1, 16, 1, HEIGHT // 8, WIDTH // 8)

    made = one_frame_latents([image(0.75), image(0.25)], OneFrame((9, 0), 4), mean)
    assert made.shape == (20, 3, HEIGHT // 8, WIDTH // 8)
    assert made[:4, :, 0, 0].tolist() == [[1.0, 0.0, 1.0]] * 4
    assert made[4:, :, 1, 1].tolist() == [[0.25, 0.0, 0.75]] * 16


def images(latents: Tensor, clip: Tensor) -> ImageConditions:
    return ImageConditions({"image_latents": latents, "clip_features": clip})


def test_batches_of_conditions() -> None:
    one = Conditions((torch.zeros(2, 4),)).with_images(images(torch.ones(20, 1, 2, 2), torch.ones(3, 2)))
    other = Conditions((torch.ones(5, 4),)).with_images(images(torch.zeros(20, 1, 2, 2), torch.zeros(3, 2)))
    inputs = one.joined(other).inputs()
    assert [len(rows) for rows in inputs["context"]] == [2, 5]
    assert isinstance(inputs["image_latents"], Tensor)
    assert inputs["image_latents"].flatten(1).mean(1).tolist() == [1.0, 0.0]
    assert isinstance(inputs["clip_features"], Tensor)
    assert inputs["clip_features"].shape == (2, 3, 2)
    assert "frame_positions" not in inputs
    assert set(Conditions((torch.zeros(1, 4),)).inputs()) == {"context"}


def test_a_first_frame_that_is_given_is_at_time_0_and_the_others_are_not() -> None:
    """Of two videos one has a first frame (official Wan2.2 TI2V: its tokens are those of timestep 0)."""
    noisy, given = torch.randn(2, 48, 3, 4, 6), torch.randn(2, 48, 1, 4, 6)
    conditions = Conditions((), first_frame=given, has_first=torch.tensor([True, False]))
    latents, timesteps = conditions.fuse(noisy, torch.tensor([700.0, 300.0]))
    assert torch.equal(latents[0, :, :1], given[0]) and torch.equal(latents[0, :, 1:], noisy[0, :, 1:])
    assert torch.equal(latents[1], noisy[1])
    assert timesteps.tolist() == [[0, 700, 700], [300, 300, 300]]
    plain, time = Conditions(()).fuse(noisy, torch.tensor([700.0, 300.0]))
    assert plain is noisy and time.tolist() == [700, 300]
