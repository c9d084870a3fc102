"""A LoRA on the convolutions of a control model: trained on request, written, read, merged, attached and converted."""

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from networks.adapter import check_network, create
from networks.attached import attach_loras
from networks.deltas.lora import LoraBranch, LoraDelta
from networks.formats.files import check_deltas, read_lora
from networks.merge import merged
from networks.settings import EXTRACT, TOOL, NetworkSettings
from tests.tiny.make import Shapes, dit_shapes, draw_weight
from wan_train.assemble import ModelSettings, WeightedLora, assemble_dit, attach_adapter, finish_dit
from wan_train.cli import run
from wan_train.errors import InputError
from wan_train.models.dit.dit import Dit
from wan_train.models.loading import linears_of, load_dit
from wan_train.models.settings import DitSettings
from wan_train.placement.settings import CompileSettings, RecomputeSettings, StreamSettings
from wan_train.precision import Conv2d
from wan_train.quantization.settings import WeightSettings
from wan_train.storage import read_tensors, save_tensors

CPU = torch.device("cpu")
DIM = 32
WINDOWS = {
    "ref_conv": (DIM, 16, 2, 2),
    "control_adapter.conv": (DIM, 24 * 64, 2, 2),
    "control_adapter.residual_blocks.0.conv1": (DIM, DIM, 3, 3),
    "control_adapter.residual_blocks.0.conv2": (DIM, DIM, 3, 3),
}
REQUEST = r"include_patterns=['ref_conv','control_adapter\..*']"
WAYS: dict[str, dict[str, Any]] = {
    "recomputed": {"activations": RecomputeSettings(recompute="full")},
    "streamed": {"stream": StreamSettings(blocks_to_swap=1), "activations": RecomputeSettings(recompute="full")},
    "compiled": {"compile": CompileSettings(compile=True, compile_backend="eager")},
}
ALONE = (REQUEST, r"exclude_patterns=['.*']")


def shapes() -> Shapes:
    beside: Shapes = {}
    for name, shape in WINDOWS.items():
        beside |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return dit_shapes(dim=DIM) | beside


def weights() -> dict[str, Tensor]:
    return {name: draw_weight(name, shape) for name, shape in shapes().items()}


def model() -> Dit:
    return load_dit(weights())


def velocity(dit: Dit, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    beside: dict[str, Any] = {"reference_latents": draw(2, 16, 1, 4, 6), "camera": draw(2, 24, 2, 32, 48)}
    latents, context = draw(2, 16, 2, 4, 6), draw(2, 5, dit.config.text_dim)
    dit.compute_dtype = dtype
    return dit(latents, torch.tensor([300.0, 700.0]), list(context), **beside)


def settings(*arguments: str, **more: Any) -> NetworkSettings:
    return NetworkSettings(network_dim=3, network_alpha=1.5, network_args=arguments, **more)


def trained(dit: Dit, *arguments: str) -> Any:
    """An adapter with something learnt."""
    adapter = create(dit, settings(*arguments))
    generator = torch.Generator().manual_seed(5)
    for _, parameter in adapter.named_parameters():
        parameter.data.normal_(generator=generator).mul_(0.1)
    return adapter


def test_on_request_alone() -> None:
    default = list(create(model(), settings()).branches)
    asked = list(create(model(), settings(REQUEST)).branches)
    assert set(asked) - set(default) == WINDOWS.keys() and len(default) == 20
    assert all(name.startswith("blocks.") for name in default)
    assert list(create(model(), settings(*ALONE)).branches) == list(WINDOWS)


def test_a_fresh_pair_changes_nothing_and_a_trained_one_learns_from_all_inputs() -> None:
    dit = model()
    untouched = velocity(dit)
    adapter = create(dit, settings(*ALONE))
    assert torch.equal(velocity(dit), untouched)
    for branch in adapter.branches.values():
        branch.up.weight.data.fill_(0.1)
    velocity(dit).square().mean().backward()
    assert all(float(parameter.grad.abs().sum()) > 0 for _, parameter in adapter.named_parameters())
    assert all(p.grad is None for name, p in dit.named_parameters() if ".lora." not in name)
    with adapter.disabled():
        assert torch.equal(velocity(dit), untouched)


def test_it_is_written_under_kohyas_names_and_merged_equals_attached_and_trained(tmp_path) -> None:
    dit, path = model(), tmp_path / "lora.safetensors"
    save_tensors(path, trained(dit, *ALONE).export())
    written = {name: tuple(tensor.shape) for name, tensor in read_tensors(path)}
    wanted = {}
    for name, (out, *window) in WINDOWS.items():
        key = f"lora_unet_{name.replace('.', '_')}"
        wanted |= {f"{key}.lora_down.weight": (3, *window), f"{key}.lora_up.weight": (out, 3, 1, 1), f"{key}.alpha": ()}
    assert written == wanted
    check_deltas(path, linears_of(shapes()))
    loras = [(read_lora(path, linears_of(shapes())), 1.0)]
    attached = model()
    attach_loras(attached, loras, device=CPU)
    assert torch.equal(velocity(attached), velocity(dit))
    summed = load_dit(dict(merged(weights().items(), loras)))
    assert (velocity(dit) - velocity(model())).abs().max() > 1e-2
    torch.testing.assert_close(velocity(attached), velocity(summed), rtol=0, atol=1e-4)


def test_several_files_do_what_merging_them_does() -> None:
    first, second = trained(model(), REQUEST).export(), trained(model(), *ALONE, "conv_dim=5").export()
    loras = [(read_lora(file, linears_of(shapes())), times) for file, times in ((first, 0.7), (second, -1.2))]
    attached = model()
    branches = attach_loras(attached, loras, device=CPU)
    assert isinstance(branches["ref_conv"], LoraBranch) and len(branches["ref_conv"].down.weight) == 8
    summed = load_dit(dict(merged(weights().items(), loras)))
    torch.testing.assert_close(velocity(attached), velocity(summed), rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", list(WINDOWS.values())[1:3])
def test_the_change_is_the_product_of_the_factors_flattened_from_dimension_1(shape) -> None:
    out, *window = shape
    delta = LoraDelta(torch.randn(3, *window), torch.randn(out, 3, 1, 1), 0.5)
    total = torch.zeros(shape)
    delta.add_to(total, 2.0)
    torch.testing.assert_close(total, torch.einsum("or,rikl->oikl", delta.up[:, :, 0, 0], delta.down))
    assert delta.shape == shape


def test_dropouts_norms_and_half_precision() -> None:
    dit = model()
    adapter = create(dit, settings(*ALONE, "rank_dropout=0.5", "module_dropout=0.1", network_dropout=0.3))
    for _, parameter in adapter.named_parameters():
        parameter.data.normal_()
    assert not torch.equal(velocity(dit.train()), velocity(dit))
    assert torch.equal(velocity(dit.eval()), velocity(dit))
    assert velocity(dit, torch.bfloat16).isfinite().all()
    squares = 0.0
    for name, branch in adapter.branches.items():
        total = torch.zeros(WINDOWS[name])
        LoraDelta(branch.down.weight.detach(), branch.up.weight.detach(), branch.scale).add_to(total, 1.0)
        squares += float(total.square().sum())
    assert adapter.norm() == pytest.approx(squares**0.5, rel=1e-4)
    assert adapter.scale_norms(0.5).maximum == pytest.approx(0.5)


def test_conv_dim_and_conv_alpha_are_theirs_alone(caplog, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(logging.getLogger("wan_train_log"), "propagate", True)
    sized = settings(REQUEST, "conv_dim=5", "conv_alpha=2")
    check_network(sized, linears_of(shapes()))
    assert "have no effect" not in caplog.text
    adapter = create(model(), sized)
    assert (adapter.sizes["ref_conv"].dim, adapter.sizes["ref_conv"].alpha) == (5, 2)
    assert (adapter.sizes["blocks.0.ffn.0"].dim, adapter.sizes["blocks.0.ffn.0"].alpha) == (3, 1.5)
    assert adapter.metadata()["ss_network_dim"] == "3" and '"conv_dim": "5"' in adapter.metadata()["ss_network_args"]
    assert "dim 3, alpha 1.5, effective scale alpha/rank 0.5, convolutions dim 5, alpha 2" in adapter.describe()
    path = tmp_path / "start.safetensors"
    save_tensors(path, adapter.export())
    again = settings(REQUEST, "conv_dim=5", "conv_alpha=2", network_weights=str(path))
    check_network(again, linears_of(shapes()))
    create(model(), again)
    other = settings(REQUEST, network_weights=str(path))
    with pytest.raises(InputError, match=r"has dim 3, 5, the network 3: use --dim_from_weights"):
        check_network(other, linears_of(shapes()))
    sizes = create(model(), NetworkSettings(network_weights=str(path), dim_from_weights=True)).sizes
    assert sizes == adapter.sizes


def test_there_and_back_without_loss(tmp_path) -> None:
    path, other, back = (tmp_path / f"{name}.safetensors" for name in ("kohya", "other", "back"))
    save_tensors(path, trained(model(), REQUEST).export())
    for source, target, result in ((path, "other", other), (other, "default", back)):
        assert run(TOOL, ["--input", str(source), "--output", str(result), "--target", target]) == 0
    assert "diffusion_model.control_adapter.residual_blocks.0.conv1.lora_A.weight" in dict(read_tensors(other))
    assert dict(read_tensors(back)).keys() == dict(read_tensors(path)).keys()
    ours, theirs, again = (read_lora(file, linears_of(shapes())) for file in (path, other, back))
    for name, delta in ours.items():
        for read in (theirs, again):
            total = torch.zeros(delta.shape)
            delta.add_to(total, 1.0)
            read[name].add_to(total, -1.0)
            assert total.abs().max() < 1e-6


def test_extracted_from_two_checkpoints(tmp_path) -> None:
    base, tuned, path = (tmp_path / f"{name}.safetensors" for name in ("base", "tuned", "lora"))
    loras = [(read_lora(trained(model(), *ALONE).export(), linears_of(shapes())), 1.0)]
    save_tensors(base, weights())
    save_tensors(tuned, dict(merged(weights().items(), loras)))
    arguments = ["--base", str(base), "--tuned", str(tuned), "--output", str(path), "--rank", "3"]
    assert run(EXTRACT, [*arguments, "--save_precision", "fp32"]) == 0
    found = read_lora(path, linears_of(shapes()))
    assert found.keys() == WINDOWS.keys()
    after = dict(merged(weights().items(), [(found, 1.0)]))
    for name, tensor in read_tensors(tuned):
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("down", "up", "message"),
    [
        ((3, 16, 2, 2), (DIM, 2, 1, 1), "cannot be multiplied"),
        ((3, 16, 2, 2), (DIM, 3, 2, 2), "not supported"),
        ((3, 16, 2, 2), (DIM, 3), "not supported"),
        ((3, 16, 1, 2, 2), (DIM, 3, 1, 1, 1), "not supported"),
        ((3, 16), (DIM, 3), r"32 x 16, but this model's is 32 x 16 x 2 x 2"),
        ((3, 16, 3, 3), (DIM, 3, 1, 1), r"32 x 16 x 3 x 3, but this model's is 32 x 16 x 2 x 2"),
    ],
)
def test_what_does_not_fit_is_refused(down, up, message: str) -> None:
    file = {
        "lora_unet_ref_conv.lora_down.weight": torch.ones(down),
        "lora_unet_ref_conv.lora_up.weight": torch.ones(up),
    }
    with pytest.raises(InputError, match=message):
        check_deltas(file, linears_of(shapes()))


def test_the_convolution_computes_in_its_inputs_dtype() -> None:
    conv, x = Conv2d(3, 4, 3, stride=2, padding=1), torch.randn(2, 3, 6, 6)
    wanted = torch.nn.functional.conv2d(x, conv.weight, conv.bias, 2, 1)
    assert torch.equal(conv(x), wanted)
    torch.testing.assert_close(conv.double()(x), wanted, rtol=0, atol=1e-6)
    assert conv.bfloat16()(x).dtype == torch.float32


def kept(dit: Dit) -> list[Tensor]:
    """The output and the gradients of a LoRA on everything."""
    out = velocity(dit.train())
    out.square().mean().backward()
    return [out.detach(), *(p.grad for _, p in dit.named_parameters() if p.grad is not None)]


@pytest.mark.parametrize("way", WAYS)
def test_memory_options_change_nothing(tmp_path, way: str) -> None:
    path = tmp_path / "dit.safetensors"
    save_tensors(path, weights())

    def learnt(parts: dict[str, Any]) -> list[Tensor]:
        given: dict[str, Any] = {"activations": RecomputeSettings()} | parts
        made = ModelSettings(DitSettings(dit=str(path), task="fun-camera-1.3B"), **given)
        dit = assemble_dit(made, device=CPU)
        adapter = attach_adapter(dit, settings(REQUEST), made.stream, seed=0, device=CPU)
        generator = torch.Generator().manual_seed(3)
        for _, parameter in adapter.named_parameters():
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)
        finish_dit(dit, made, CPU)
        return kept(dit)

    plain, saved = learnt({}), learnt(WAYS[way])
    assert len(plain) == 1 + 2 * 24
    for ours, theirs in zip(plain, saved, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("precision", [WeightSettings(fp8_base=True, fp8_scaled=True), WeightSettings(int8_base=True)])
def test_a_file_is_merged_into_a_quantised_model(tmp_path, precision: WeightSettings) -> None:
    path, lora = tmp_path / "dit.safetensors", tmp_path / "lora.safetensors"
    save_tensors(path, weights())
    save_tensors(lora, trained(model(), *ALONE).export())
    made = ModelSettings(DitSettings(dit=str(path), task="fun-camera-1.3B"), weights=precision)
    summed = assemble_dit(made, device=CPU, loras=[WeightedLora(str(lora))])
    wanted = dict(merged(weights().items(), [(read_lora(lora, linears_of(shapes())), 1.0)]))
    assert all(torch.equal(summed.state_dict()[f"{name}.weight"], wanted[f"{name}.weight"]) for name in WINDOWS)
