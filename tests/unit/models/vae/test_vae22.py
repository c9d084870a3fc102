"""The Wan2.2 VAE: its layers by formula, its published widths, and which of the two VAEs a file is."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.parity.golden import load_case, load_manifest
from tests.tiny.make import save, vae_shapes
from tests.tiny.vae22 import VAE22, vae22_shapes
from tests.unit.models.vae.vaes import draw_latents
from wan_train.errors import InputError
from wan_train.models.vae.coders import fold_patches, unfold_patches
from wan_train.models.vae.geometry import GEOMETRIES, KIND22
from wan_train.models.vae.layers import FeatureCache
from wan_train.models.vae.names import diffusers_name
from wan_train.models.vae.vae import WanVAE, check_vae, load_vae
from wan_train.models.vae.wan22 import add_repeated, average_neighbours


def test_patches_are_folded_columns_first() -> None:
    pixels = torch.arange(2 * 3 * 4 * 6.0).view(1, 2, 3, 4, 6)
    folded = fold_patches(pixels, 2)
    assert folded.shape == (1, 8, 3, 2, 3)
    for channel, column, row in ((c, r, q) for c in range(2) for r in range(2) for q in range(2)):
        expected = pixels[:, channel, :, row::2, column::2]
        assert torch.equal(folded[:, channel * 4 + column * 2 + row], expected)
    assert torch.equal(unfold_patches(folded, 2), pixels)
    assert torch.equal(fold_patches(pixels, 1), pixels) and torch.equal(unfold_patches(pixels, 1), pixels)


@pytest.mark.parametrize(("out_channels", "factors", "group"), [(3, (1, 2), 4), (6, (2, 2), 4), (3, (2, 2), 8)])
def test_going_down_neighbours_are_averaged_in_groups(out_channels: int, factors: tuple[int, int], group: int) -> None:
    """Position by position: the channel of a neighbour is ((c * t + time) * s + row) * s + column."""
    t, s = factors
    x = draw_latents(2, 3, 4, 4, 6)
    neighbours = [
        x[:, c, time::t, row::s, column::s]
        for c in range(3)
        for time in range(t)
        for row in range(s)
        for column in range(s)
    ]
    expected = [torch.stack(neighbours[i : i + group]).mean(0) for i in range(0, len(neighbours), group)]
    torch.testing.assert_close(average_neighbours(x, out_channels, factors), torch.stack(expected, dim=1))


def test_before_the_first_frame_lie_zeros() -> None:
    x = draw_latents(1, 2, 1, 2, 2)
    padded = torch.cat([torch.zeros_like(x), x], dim=2)
    torch.testing.assert_close(average_neighbours(x, 4, (2, 2)), average_neighbours(padded, 4, (2, 2)))


@pytest.mark.parametrize(("out_channels", "factors"), [(4, (2, 2)), (2, (2, 2)), (4, (1, 2)), (2, (1, 2))])
def test_going_up_channels_are_repeated_and_unfolded(out_channels: int, factors: tuple[int, int]) -> None:
    t, s = factors
    x = draw_latents(1, 4, 3, 2, 3)
    repeated = x.repeat_interleave(out_channels * t * s * s // 4, dim=1)
    whole = repeated.view(1, out_channels, t, s, s, 3, 2, 3).permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(1, -1, 3 * t, 4, 6)
    y = draw_latents(*whole.shape)
    torch.testing.assert_close(add_repeated(y.clone(), x, factors, first=False), y + whole)
    first = add_repeated(y[:, :, :1].clone(), x[:, :, :1], factors, first=True)
    torch.testing.assert_close(first, y[:, :, :1] + whole[:, :, t - 1 : t])


def test_the_tiny_vae_has_the_official_names_and_shapes() -> None:
    assert vae22_shapes(160, decoder_dim=256) == load_manifest("wan2.2-vae")
    assert {name: list(shape) for name, shape in vae22_shapes().items()} == load_case("wan22_vae").spec["shapes"]


def test_the_published_widths_go_through() -> None:
    with torch.device("meta"):
        vae = WanVAE(GEOMETRIES[KIND22])
        for network, chunks, shapes in (
            (vae.encoder, [(1, 3, 1, 32, 48), (1, 3, 4, 32, 48)], [(1, 96, 1, 2, 3)] * 2),
            (vae.decoder, [(1, 48, 1, 2, 3)] * 3, [(1, 3, 1, 32, 48), (1, 3, 4, 32, 48), (1, 3, 4, 32, 48)]),
        ):
            cache = FeatureCache()
            with torch.no_grad():
                assert [tuple(network(torch.empty(chunk), cache).shape) for chunk in chunks] == shapes


def test_a_vae_of_the_other_kind_is_refused(tmp_path: Path) -> None:
    old, new = tmp_path / "Wan2.1_VAE.safetensors", tmp_path / VAE22
    save(old, vae_shapes(), torch.float32)
    save(new, vae22_shapes(), torch.float32)
    with pytest.raises(InputError) as caught:
        check_vae(new)
    line = (
        f"--vae {new} is a Wan2.2 VAE with 48 latent channels, but the model has 16: give Wan2.1_VAE.pth,"
        " or --task ti2v-5B"
    )
    assert str(caught.value) == line
    with pytest.raises(InputError) as caught:
        check_vae(old, "--other", latent_channels=48)
    line = f"--other {old} is a Wan2.1 VAE with 16 latent channels, but the model has 48: give Wan2.2_VAE.pth"
    assert str(caught.value) == line
    check_vae(old)
    check_vae(new, latent_channels=48)
    assert [load_vae(path).latent_channels for path in (old, new)] == [16, 48]


def test_other_numbers_of_latent_channels_are_refused() -> None:
    state = {name: torch.empty(shape, device="meta") for name, shape in vae22_shapes(latents=24).items()}
    for look in (lambda: load_vae(state), lambda: check_vae(state, latent_channels=48)):
        with pytest.raises(InputError, match=r"is another VAE with 24 latent channels, .* 48: give Wan2\.2_VAE\.pth"):
            look()


CHANGED = "decoder.upsamples.1.upsamples.3.time_conv.weight"
BELOW = "encoder.downsamples.2.downsamples."


@pytest.mark.parametrize("naming", [str, diffusers_name])
@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda state, name: state.pop(name), f"missing {CHANGED}"),
        (lambda state, name: state.update({name: state[name][1:]}), f"misshapen {CHANGED}"),
        (lambda state, name: state.update({"x": state[name]}), "unexpected x "),
        (
            lambda state, name: [state.pop(n) for n in list(state) if re.match(r"encoder\.down\w+\.2\.", n)],
            f"missing {BELOW}0.residual",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_refused(change, complaint: str, naming: Callable[[str], str]) -> None:
    manifest = load_manifest("wan2.2-vae")
    state = {naming(name): torch.empty(shape, device="meta") for name, shape in manifest.items()}
    change(state, naming(CHANGED))
    for look in (lambda: check_vae(state, latent_channels=48), lambda: load_vae(state)):
        with pytest.raises(InputError, match=complaint):
            look()
