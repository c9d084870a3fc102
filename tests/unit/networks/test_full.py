"""Full fine-tuning: the gradients of the reference cases, what patterns choose, and what is refused."""

import pytest
import torch

from networks.adapter import check_module, check_network, create
from networks.settings import NetworkSettings
from tests.parity.dit_cases import load, run
from tests.parity.golden import TOLERANCE, load_case, relative_error
from wan_train.errors import InputError
from wan_train.placement.recompute import apply_recompute
from wan_train.placement.settings import RecomputeSettings

FULL = "networks.full"


@pytest.mark.parametrize("recompute", ["none", "full", "keep_attention"])
@pytest.mark.parametrize("name", ["wan21_t2v", "wan21_i2v"])
def test_gradients_are_those_of_the_reference(name: str, recompute: str) -> None:
    case = load_case(name)
    model = load(case)
    adapter = create(model, NetworkSettings(network_module=FULL))
    apply_recompute(list(model.blocks), RecomputeSettings(recompute=recompute), torch.device("cpu"))
    out = run(model.train(), case)
    loss = (out - case.normal("target", out.shape)).square().mean()
    loss.backward()
    assert relative_error(loss.detach().view(1), case.outputs["loss"].view(1)) < TOLERANCE
    grads = {key: parameter.grad for key, parameter in adapter.named_parameters()}
    norms = torch.stack([grads[key].norm() for key in case.spec["grad_norm_keys"]])  # type: ignore[union-attr]
    assert ((norms - case.outputs["grad_norms"]).abs() < TOLERANCE * case.outputs["grad_norms"]).all()


def test_patterns_choose_and_masters_are_float32() -> None:
    case = load_case("wan21_t2v")
    model = load(case, {name: tensor.bfloat16() for name, tensor in case.state_dict().items()})
    patterns = ("blocks.*.self_attn.*", "head.*")
    adapter = create(model, NetworkSettings(network_module=FULL, trainable=patterns))
    trained = dict(adapter.named_parameters())
    wanted = [name for name in case.spec["shapes"] if ".self_attn." in name or name.startswith("head.")]
    assert set(trained) == set(wanted)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (name in trained)
        assert parameter.dtype == (torch.float32 if name in trained else torch.bfloat16)
    exported = adapter.export()
    assert exported.keys() == case.spec["shapes"].keys()
    for name, tensor in case.state_dict().items():
        assert torch.equal(exported[name].float(), tensor.bfloat16().float())


def test_matrices_in_bfloat16_and_the_rest_in_float32() -> None:
    model = load(load_case("wan21_t2v"))
    create(model, NetworkSettings(network_module=FULL, full_bf16=True))
    for name, parameter in model.named_parameters():
        is_matrix = name.endswith(".weight") and parameter.ndim > 1
        assert parameter.dtype == (torch.bfloat16 if is_matrix else torch.float32), name


def test_what_is_refused() -> None:
    names = list(load_case("wan21_t2v").spec["shapes"])
    with pytest.raises(InputError, match=r"--trainable blocks\.\*\.attn\.\* matches none"):
        check_network(NetworkSettings(network_module=FULL, trainable=("head.*", "blocks.*.attn.*")), {}, names)
    with pytest.raises(InputError, match="--trainable is only for"):
        check_network(NetworkSettings(trainable=("head.*",)), {"blocks.0.ffn.0": (8, 8)}, names)
    for changes in ({"network_dim": 4}, {"network_dropout": 0.1}, {"scale_weight_norms": 1.0}):
        with pytest.raises(InputError, match="is only for LoRA"):
            check_module(NetworkSettings(network_module=FULL, **changes))  # type: ignore[arg-type]
