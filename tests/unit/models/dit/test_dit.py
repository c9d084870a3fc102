import math

import pytest
import torch

import wan_train
from wan_train.errors import InputError
from wan_train.models.dit.dit import Dit, DitConfig
from wan_train.models.dit.elementwise import modulate
from wan_train.models.dit.embedding import sinusoid
from wan_train.models.dit.rope import axis_widths, rope_table, rotate
from wan_train.models.loading import check_dit, load_dit
from wan_train.models.variants import VARIANTS
from wan_train.models.weights import diffusers_name, official_name

CONFIG = DitConfig(dim=48, ffn_dim=64, num_heads=2, num_layers=2, text_dim=20)


def state(config: DitConfig = CONFIG, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: value.shape for name, value in Dit(config).state_dict().items()}
    return {name: 0.2 * torch.randn(*shape, generator=generator) for name, shape in shapes.items()}


def inputs(batch: int = 2) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(batch, 16, 3, 4, 6, generator=generator)
    context = [torch.randn(5 + i, 20, generator=generator) for i in range(batch)]
    return latents, torch.linspace(100, 900, batch), context


def test_geometry_comes_from_the_tensors_and_heads_from_the_configuration() -> None:
    model = load_dit(state(), config={"num_heads": 2})
    assert model.config == CONFIG
    assert load_dit(state()).config.num_heads == 1


def test_a_batch_is_its_samples() -> None:
    model = load_dit(state(), config={"num_heads": 2})
    latents, timestep, context = inputs()
    whole = model(latents, timestep, context)
    for i in range(2):
        alone = model(latents[i : i + 1], timestep[i : i + 1], context[i : i + 1])
        torch.testing.assert_close(whole[i : i + 1], alone, atol=1e-5, rtol=1e-4)


def test_one_timestep_for_all_frames_is_one_for_the_sample() -> None:
    model = load_dit(state(), config={"num_heads": 2})
    latents, timestep, context = inputs()
    per_frame = timestep.unsqueeze(1).expand(2, 3).contiguous()
    expected = model(latents, timestep, context)
    torch.testing.assert_close(model(latents, per_frame, context), expected, atol=1e-4, rtol=1e-4)
    per_frame[:, 0] = 0
    assert not torch.allclose(model(latents, per_frame, context), expected, atol=1e-3)


def test_padded_context_equals_the_list() -> None:
    model = load_dit(state(), config={"num_heads": 2})
    latents, timestep, context = inputs()
    padded = torch.zeros(2, 512, 20)
    for row, text in zip(padded, context, strict=True):
        row[: len(text)] = text
    assert torch.equal(model(latents, timestep, padded), model(latents, timestep, context))


def test_inputs_without_weights_are_refused() -> None:
    model = load_dit(state(), config={"num_heads": 2})
    latents, timestep, context = inputs()
    for name in ("image_latents", "clip_features", "reference_latents", "camera", "vace_context", "motion_bucket_id"):
        with pytest.raises(ValueError, match=name):
            model(latents, timestep, context, **{name: torch.zeros(1)})


def test_latents_of_another_shape_are_refused() -> None:
    model = load_dit(state(), config={"num_heads": 2})
    _, timestep, context = inputs()
    for shape in ((2, 36, 1, 4, 4), (2, 16, 1, 3, 4)):
        with pytest.raises(ValueError):
            model(torch.zeros(shape), timestep, context)


def test_every_wrapping_of_a_checkpoint_loads_the_same() -> None:
    plain = state()
    latents, timestep, context = inputs()
    expected = load_dit(plain, config={"num_heads": 2})(latents, timestep, context)
    prefixes = ("model.diffusion_model.", "diffusion_model.", "model.", "module.", "transformer.")
    wrapped = [{prefix + name: value for name, value in plain.items()} for prefix in prefixes]
    wrapped.append({diffusers_name(name): value for name, value in plain.items()})
    for other in wrapped:
        model = load_dit(other, config={"num_heads": 2})
        assert torch.equal(model(latents, timestep, context), expected)
        assert set(dict(model.named_parameters())) == set(plain)


def test_renaming_is_a_bijection_on_every_name() -> None:
    names = list(state())
    assert [official_name(diffusers_name(name)) for name in names] == names
    assert len({diffusers_name(name) for name in names}) == len(names)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_weights_stay_half_in_memory_and_compute_in_float32_on_a_cpu(dtype: torch.dtype) -> None:
    half = {name: value.to(dtype) for name, value in state().items()}
    model = load_dit(half, config={"num_heads": 2})
    assert {p.dtype for p in model.parameters()} == {dtype}
    twin = load_dit({name: value.float() for name, value in half.items()}, config={"num_heads": 2})
    assert torch.equal(model(*inputs()), twin(*inputs()))


def test_faults_are_listed() -> None:
    broken = state()
    del broken["blocks.1.ffn.2.bias"]
    broken["blocks.0.extra"] = torch.zeros(1)
    broken["head.modulation"] = torch.zeros(1, 3, 48)
    with pytest.raises(InputError) as caught:
        load_dit(broken)
    for part in ("missing blocks.1.ffn.2.bias", "unexpected blocks.0.extra", "misshapen head.modulation"):
        assert part in str(caught.value)


def test_the_kind_of_a_file_is_checked_against_the_task() -> None:
    wide = DitConfig(dim=48, ffn_dim=64, num_heads=2, num_layers=2, text_dim=20, in_dim=36)
    with pytest.raises(InputError, match=r"36 input channels.*t2v-14B"):
        check_dit(state(wide), VARIANTS["t2v-14B"])
    with pytest.raises(InputError, match="not a DiT"):
        check_dit({"decoder.upsamples.0.residual.2.weight": torch.zeros(1)}, VARIANTS["t2v-14B"])
    assert "has width 48 and 2 blocks" in (check_dit(state(), VARIANTS["t2v-14B"]) or "")


def test_rotation_turns_by_position_and_keeps_lengths() -> None:
    assert axis_widths(128) == (44, 42, 42)
    rope = rope_table((2, 2, 3), 24, device=torch.device("cpu"))
    x = torch.randn(1, 12, 2, 24)
    turned = rotate(x, *rope)
    torch.testing.assert_close(turned[:, 0], x[:, 0])
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    # Relative positions alone matter: the same offset gives the same product.
    query, key = torch.randn(1, 1, 1, 24).expand(1, 12, 1, 24), torch.randn(1, 1, 1, 24).expand(1, 12, 1, 24)
    products = torch.einsum("bind,bjnd->ij", rotate(query, *rope), rotate(key, *rope))
    torch.testing.assert_close(products[0, 1], products[1, 2])
    torch.testing.assert_close(products[0, 3], products[1, 4])


def test_rotation_equals_a_hand_written_pair() -> None:
    rope = rope_table((1, 1, 4), 12, device=torch.device("cpu"))
    x = torch.zeros(1, 4, 1, 12)
    x[..., 8] = 1.0  # the first pair of the column axis, which turns by one radian a column
    turned = rotate(x, *rope)[0, :, 0]
    for column in range(4):
        assert turned[column, 8].item() == pytest.approx(math.cos(column), abs=1e-6)
        assert turned[column, 9].item() == pytest.approx(math.sin(column), abs=1e-6)


def test_sinusoid_and_modulation() -> None:
    value = sinusoid(torch.tensor([250.0]), 8)[0]
    for i in range(4):
        assert value[i].item() == pytest.approx(math.cos(250 * 10000 ** (-i / 4)), abs=1e-6)
        assert value[4 + i].item() == pytest.approx(math.sin(250 * 10000 ** (-i / 4)), abs=1e-6)
    x, by_frame = torch.randn(1, 6, 2), torch.randn(1, 3, 2)
    expected = x * (1 + by_frame.repeat_interleave(2, 1)) + by_frame.repeat_interleave(2, 1)
    torch.testing.assert_close(modulate(x, by_frame, by_frame), expected)


def test_the_door_is_lazy_and_names_what_it_lacks() -> None:
    assert wan_train.load_dit is load_dit
    with pytest.raises(AttributeError, match="load_cat"):
        _ = wan_train.load_cat
