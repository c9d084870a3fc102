"""LoRA files that act as branches when a model generates."""

import pytest
import torch

from networks.adapter import create
from networks.attached import attach_loras
from networks.formats.files import read_lora
from networks.merge import merged
from networks.settings import NetworkSettings
from wan_train.errors import InputError
from wan_train.storage import save_tensors

CPU = torch.device("cpu")


def linears(model) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("dim", "alpha"), [(3, 1.3), (4, 1.0), (7, 5.1)])
def test_one_file_does_bit_for_bit_what_was_trained(make_model, batch, tmp_path, dtype, dim: int, alpha: float) -> None:
    trained, fresh = make_model().to(dtype), make_model().to(dtype)
    adapter = create(trained, NetworkSettings(network_dim=dim, network_alpha=alpha, network_dropout=0.5))
    generator = torch.Generator().manual_seed(5)
    for _, parameter in adapter.named_parameters():
        parameter.data.normal_(generator=generator)
    save_tensors(tmp_path / "lora.safetensors", adapter.export(), {})
    attach_loras(fresh, [(read_lora(tmp_path / "lora.safetensors", linears(fresh)), 1.0)], device=CPU)
    trained.eval()
    with torch.no_grad():
        assert torch.equal(fresh(*batch), trained(*batch))
    with torch.inference_mode():
        assert torch.equal(fresh(*batch), trained(*batch))
    assert not any(parameter.requires_grad for name, parameter in fresh.named_parameters() if ".lora." in name)


def test_several_files_do_what_merging_them_does(make_model, make_deltas, batch) -> None:
    attached, plain = make_model(), make_model()
    first, second = make_deltas(plain, rank=3), make_deltas(plain, rank=5, alpha=1.3, seed=1)
    third = make_deltas(plain, rank=2, seed=2)
    del second["blocks.1.ffn.0"]
    third = {name: third[name] for name in ("blocks.0.self_attn.q", "blocks.1.ffn.0")}
    loras = [(first, 0.7), (second, -1.2), (third, 0.5)]
    branches = attach_loras(attached, loras, device=CPU)
    assert [
        len(branches[name].down.weight) for name in ("blocks.0.self_attn.q", "blocks.1.ffn.0", "blocks.1.ffn.2")
    ] == [
        10,
        5,
        8,
    ]
    untouched = plain(*batch)
    plain.load_state_dict(dict(merged(plain.state_dict().items(), loras)))
    torch.testing.assert_close(attached(*batch), plain(*batch), rtol=0, atol=1e-5)
    assert (untouched - plain(*batch)).abs().max() > 1e-2


def test_modules_outside_the_blocks(make_model, make_deltas, batch) -> None:
    attached, plain = make_model(), make_model()
    delta = make_deltas(plain)["blocks.0.self_attn.q"]
    attach_loras(attached, [({"head.head": delta}, 2.0)], device=CPU)
    plain.head["head"].weight.data += 2.0 * delta.scale * delta.up @ delta.down
    torch.testing.assert_close(attached(*batch), plain(*batch), rtol=0, atol=1e-5)


def test_what_does_not_fit_is_refused_and_changes_nothing(make_model, make_deltas, batch) -> None:
    model = make_model()
    before = model(*batch)
    with pytest.raises(InputError, match="16 x 16, but this model's is 8 x 8"):
        attach_loras(model, [(make_deltas(make_model(dim=16)), 1.0)], device=CPU)
    with pytest.raises(InputError, match=r"4 of its modules are not in this one.*k_img"):
        attach_loras(model, [(make_deltas(make_model(image=True)), 1.0)], device=CPU)
    assert torch.equal(model(*batch), before)
