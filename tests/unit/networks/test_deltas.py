"""A kind of change that the product does not know, through everything that takes changes, beside LoRA."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.attached import attach_loras
from networks.deltas.branch import Chain, disabled
from networks.deltas.lora import LoraBranch, LoraDelta
from networks.formats.files import check_deltas, check_lora, kohya_state, read_deltas, read_lora
from networks.formats.kinds import KINDS, DeltaKind
from networks.merge import merged
from wan_train.assemble import WeightedLora
from wan_train.errors import InputError
from wan_train.storage import save_tensors

CPU = torch.device("cpu")


class DifferenceBranch(nn.Module):
    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.matrix, self.enabled = nn.Parameter(matrix), True

    def before(self, x: Tensor) -> Tensor:
        return x

    def after(self, x: Tensor, output: Tensor) -> Tensor:
        return output + F.linear(x, self.matrix.to(x.dtype))


@dataclass(frozen=True)
class Difference:
    matrix: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.matrix.shape)

    def add_to(self, total: Tensor, multiplier: float) -> None:
        total.add_(self.matrix.to(total), alpha=multiplier)

    @classmethod
    def branch(cls, changes) -> DifferenceBranch:
        return DifferenceBranch(sum(multiplier * delta.matrix.float() for delta, multiplier in changes))


DIFFERENCE = DeltaKind(
    split=lambda key: (key.removesuffix(".diff"), "diff") if key.endswith(".diff") else None,
    required=frozenset({"diff"}),
    measure=lambda module, shapes, source: shapes["diff"],
    parse=lambda parts, scale: Difference(parts["diff"] * scale(1)),
)


@pytest.fixture
def with_differences(monkeypatch) -> None:
    monkeypatch.setitem(KINDS, "difference", DIFFERENCE)


def sizes(model) -> dict[str, tuple[int, ...]]:
    return {name: tuple(m.weight.shape) for name, m in model.named_modules() if isinstance(m, nn.Linear)}


def differences(model, *, alpha: float | None = None) -> dict[str, Tensor]:
    """A file's tensors: a difference of every Linear of the blocks, under kohya's names."""
    generator, state = torch.Generator().manual_seed(7), {}
    for name, shape in sizes(model).items():
        if name.startswith("blocks."):
            key = f"lora_unet_{name.replace('.', '_')}"
            state[f"{key}.diff"] = torch.randn(shape, generator=generator) / 10
            if alpha is not None:
                state[f"{key}.alpha"] = torch.tensor(alpha)
    return state


@pytest.mark.parametrize("alpha", [None, 0.5])
def test_a_new_kind_is_read_merged_and_attached(with_differences, make_model, batch, tmp_path, alpha) -> None:
    attached, plain = make_model(), make_model()
    path, state = tmp_path / "differences.safetensors", differences(plain, alpha=alpha)
    save_tensors(path, state)
    check_deltas(path, sizes(plain))
    loras = [(WeightedLora(str(path)).read(sizes(plain)), 0.7)]
    untouched, before = plain(*batch), plain.state_dict()
    result = dict(merged(before.items(), loras))
    wanted = before["blocks.0.ffn.0.weight"] + 0.7 * (alpha or 1.0) * state["lora_unet_blocks_0_ffn_0.diff"]
    torch.testing.assert_close(result["blocks.0.ffn.0.weight"], wanted, rtol=0, atol=1e-6)
    branches = attach_loras(attached, loras, device=CPU)
    plain.load_state_dict(result)
    torch.testing.assert_close(attached(*batch), plain(*batch), rtol=0, atol=1e-5)
    assert (untouched - plain(*batch)).abs().max() > 1e-2
    with disabled(branches.values()):
        assert torch.equal(attached(*batch), untouched)


def test_kinds_go_together_on_one_linear(with_differences, make_model, make_deltas, batch) -> None:
    attached, plain = make_model(), make_model()
    differing = read_deltas(differences(plain), sizes(plain))
    first, second = make_deltas(plain, rank=3), make_deltas(plain, rank=5, seed=1)
    del first["blocks.1.ffn.0"], second["blocks.1.ffn.0"]
    loras = [(first, 0.7), (differing, -0.4), (second, -1.2), (differing, 0.9)]
    branches = attach_loras(attached, loras, device=CPU)
    both = branches["blocks.0.self_attn.q"]
    assert isinstance(both, Chain) and [type(part) for part in both.branches] == [LoraBranch, DifferenceBranch]
    assert isinstance(branches["blocks.1.ffn.0"], DifferenceBranch)
    untouched = plain(*batch)
    plain.load_state_dict(dict(merged(plain.state_dict().items(), loras)))
    torch.testing.assert_close(attached(*batch), plain(*batch), rtol=0, atol=1e-5)
    with disabled(branches.values()):
        assert torch.equal(attached(*batch), untouched)
    assert not any(parameter.requires_grad for parameter in both.parameters())


def test_kinds_together_compile_whole(with_differences, make_model, make_deltas) -> None:
    model = make_model()
    attach_loras(model, [(make_deltas(model), 0.7), (read_deltas(differences(model), sizes(model)), 1.0)], device=CPU)
    linear, x = model.blocks[0].ffn[0], torch.randn(2, 5, 8)
    wanted = linear(x)
    torch.testing.assert_close(torch.compile(linear, backend="eager", fullgraph=True)(x), wanted)


def test_one_file_may_hold_several_kinds_but_not_for_one_module(with_differences, make_model, make_deltas) -> None:
    model = make_model()
    state = {key: tensor for key, tensor in differences(model).items() if "ffn" in key}
    pairs = {name: delta for name, delta in make_deltas(model).items() if "attn" in name}
    deltas = read_deltas(kohya_state(pairs) | state, sizes(model))
    assert {name: type(delta) for name, delta in deltas.items()} == {
        name: Difference if "ffn" in name else LoraDelta for name in deltas
    }
    assert len(deltas) == 20
    with pytest.raises(InputError, match=r"several kinds of changes for blocks\.0\.ffn\.0, LoRA, difference"):
        check_deltas(kohya_state(make_deltas(model)) | state, sizes(model))


def test_what_takes_a_lora_alone_refuses_other_kinds(with_differences, make_model) -> None:
    model = make_model()
    for read in (read_lora, check_lora):
        with pytest.raises(InputError, match=r"20 modules have other kinds of changes: blocks\.0\.self_attn\.q"):
            read(differences(model), sizes(model))


def test_a_new_kind_of_another_size_is_refused_with_both_sizes(with_differences, make_model) -> None:
    model, state = make_model(), differences(make_model(dim=16))
    with pytest.raises(InputError, match="16 x 16, but this model's is 8 x 8"):
        check_deltas(state, sizes(model))
    deltas = read_deltas(state, sizes(model))
    with pytest.raises(InputError, match="16 x 16, but this model's is 8 x 8"):
        attach_loras(model, [(deltas, 1.0)], device=CPU)
    with pytest.raises(InputError, match="16 x 16, but this model's is 8 x 8"):
        list(merged(model.state_dict().items(), [(deltas, 1.0)]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lora_is_merged_to_the_bit_by_its_formula(make_model, make_deltas, dtype: torch.dtype) -> None:
    state = {name: tensor.to(dtype) for name, tensor in make_model().state_dict().items()}
    first, second = make_deltas(make_model(), rank=3), make_deltas(make_model(), rank=5, seed=1)
    result = dict(merged(state.items(), [(first, 0.7), (second, -1.2)]))
    for module in first:
        wanted = state[f"{module}.weight"].float()
        for delta, multiplier in ((first[module], 0.7), (second[module], -1.2)):
            wanted = torch.addmm(wanted, delta.up, delta.down, alpha=multiplier * delta.scale)
        assert torch.equal(result[f"{module}.weight"], wanted.to(dtype))
