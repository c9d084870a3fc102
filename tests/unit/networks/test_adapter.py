"""The Adapter that the trainer sees, and the network module behind it."""

import sys
import types

import pytest
import torch

from networks.adapter import check_module, create
from networks.formats.files import kohya_state, peft_state
from networks.settings import NetworkSettings, read_arguments
from wan_train.errors import InputError


def randomise(adapter) -> None:
    generator = torch.Generator().manual_seed(5)
    for group in adapter.parameter_groups(1.0):
        for parameter in group["params"]:
            parameter.data.normal_(generator=generator)


def test_parameter_groups_hold_every_trainable_parameter_once(make_model) -> None:
    model = make_model()
    adapter = create(model, NetworkSettings(network_dim=3))
    (group,) = adapter.parameter_groups(2e-4)
    assert group["lr"] == 2e-4
    assert {id(p) for p in group["params"]} == {id(p) for p in model.parameters() if p.requires_grad}
    assert {p.dtype for p in group["params"]} == {torch.float32}


def test_weights_are_float32_beside_a_bf16_base(make_model) -> None:
    adapter = create(make_model().bfloat16(), NetworkSettings())
    assert {p.dtype for group in adapter.parameter_groups(1.0) for p in group["params"]} == {torch.float32}


def test_seed_keys_the_first_values(make_model) -> None:
    first, same, other = (create(make_model(), NetworkSettings(), seed=seed).export() for seed in (1, 1, 2))
    key = "lora_unet_blocks_1_ffn_2.lora_down.weight"
    assert torch.equal(first[key], same[key])
    assert not torch.equal(first[key], other[key])


def test_saved_names_and_shapes_are_kohyas(make_model) -> None:
    state = create(make_model(), NetworkSettings(network_dim=3, network_alpha=1.5)).export()
    assert len(state) == 20 * 3
    assert state["lora_unet_blocks_0_ffn_0.lora_down.weight"].shape == (3, 8)
    assert state["lora_unet_blocks_0_ffn_0.lora_up.weight"].shape == (12, 3)
    assert state["lora_unet_blocks_1_cross_attn_q.alpha"] == torch.tensor(1.5)
    assert not any(tensor.requires_grad for tensor in state.values())


def test_a_saved_network_computes_the_same_when_loaded(make_model, batch) -> None:
    settings = NetworkSettings(network_dim=3, network_alpha=1.3)
    model, twin = make_model(), make_model()
    adapter, other = create(model, settings, seed=1), create(twin, settings, seed=2)
    randomise(adapter)
    other.load(adapter.export())
    assert torch.equal(model(*batch), twin(*batch))


def test_loading_keeps_the_files_own_scale(make_model, make_deltas, batch) -> None:
    model = make_model()
    deltas = make_deltas(model, rank=3, alpha=6.0)
    outs = []
    for state in (kohya_state(deltas), peft_state(deltas, "diffusion_model")):
        fresh = make_model()
        create(fresh, NetworkSettings(network_dim=3, network_alpha=1.0)).load(state)
        outs.append(fresh(*batch))
    torch.testing.assert_close(outs[0], outs[1], rtol=0, atol=1e-5)
    same_scale = make_model()
    create(same_scale, NetworkSettings(network_dim=3, network_alpha=6.0)).load(kohya_state(deltas))
    torch.testing.assert_close(outs[0], same_scale(*batch), rtol=0, atol=1e-5)


def test_loading_what_does_not_fit_is_refused_and_changes_nothing(make_model, make_deltas) -> None:
    adapter = create(make_model(), NetworkSettings(network_dim=3))
    before = adapter.export()["lora_unet_blocks_0_self_attn_q.lora_down.weight"].clone()
    deltas = make_deltas(make_model(), rank=3)
    partial = {name: delta for name, delta in deltas.items() if name != "blocks.1.ffn.2"}
    with pytest.raises(InputError, match=r"lacks 1 modules.*blocks\.1\.ffn\.2"):
        adapter.load(kohya_state(partial))
    with pytest.raises(InputError, match="dim 2, the network 3"):
        adapter.load(kohya_state(make_deltas(make_model(), rank=2)))
    with pytest.raises(InputError, match=r"different model.*16 x 16.*8 x 8"):
        adapter.load(kohya_state(make_deltas(make_model(dim=16), rank=3)))
    with pytest.raises(InputError, match="k_img"):
        adapter.load(kohya_state(make_deltas(make_model(image=True), rank=3)))
    assert torch.equal(before, adapter.export()["lora_unet_blocks_0_self_attn_q.lora_down.weight"])


def test_metadata_is_text_that_rebuilds_the_network(make_model) -> None:
    rows = create(make_model(), NetworkSettings(network_dropout=0.1)).metadata()
    assert rows == {
        "ss_network_module": "networks.lora_wan",
        "ss_network_dim": "4",
        "ss_network_alpha": "1.0",
        "ss_network_dropout": "0.1",
    }


def test_the_log_names_a_weak_scale_and_the_way_out(make_model) -> None:
    weak = create(make_model(), NetworkSettings(network_dim=8)).describe()
    assert "20 modules" in weak and "effective scale alpha/rank 0.125" in weak and "--network_alpha" in weak
    plain = create(make_model(), NetworkSettings(network_dim=8, network_alpha=8.0)).describe()
    assert plain.endswith("effective scale alpha/rank 1")


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("networks.lora_wam", "did you mean networks.lora_wan"),
        ("nowhere.at.all", "built-in modules are networks.lora_wan"),
        ("json", "has no attach"),
        ("", "not a module name"),
        (".lora_wan", "not a module name"),
        ("networks.lora_wan.x", "no --network_module"),
    ],
)
def test_unknown_modules(module: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_module(NetworkSettings(network_module=module))


def test_a_module_of_the_users_own(make_model, monkeypatch) -> None:
    module = types.ModuleType("my_network")
    module.attach = lambda model, settings, *, seed: (model, settings.dim, seed)
    monkeypatch.setitem(sys.modules, "my_network", module)
    model = make_model()
    assert create(model, NetworkSettings(network_module="my_network", network_dim=7), seed=3) == (model, 7, 3)


def test_a_module_that_lacks_a_package_says_which(monkeypatch, tmp_path) -> None:
    (tmp_path / "their_network.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(InputError, match="needs the package a_package_that_is_not_there"):
        check_module(NetworkSettings(network_module="their_network"))


def test_unknown_network_args_are_refused_without_a_model() -> None:
    with pytest.raises(InputError, match=r"unknown key 'rank_dropuot'.*accepts exclude_patterns.*mean rank_dropout"):
        check_module(NetworkSettings(network_args=("rank_dropuot=0.1",)))


def test_network_args_split_at_the_first_equals_sign() -> None:
    settings = NetworkSettings(network_args=("pattern=a=b",))
    assert read_arguments(settings, ("pattern",)) == {"pattern": "a=b"}
    with pytest.raises(InputError, match="did you mean pattern"):
        read_arguments(NetworkSettings(network_args=("patern=a",)), ("pattern",))
    with pytest.raises(InputError, match="use key=value"):
        read_arguments(NetworkSettings(network_args=("pattern",)), ("pattern",))
    with pytest.raises(InputError, match="twice"):
        read_arguments(NetworkSettings(network_args=("pattern=a", "pattern=b")), ("pattern",))


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_alpha_out_of_range(value: float) -> None:
    with pytest.raises(InputError, match="--network_alpha"):
        NetworkSettings(network_alpha=value)


@pytest.mark.parametrize("value", [-0.1, 1.0, float("nan")])
def test_dropout_out_of_range(value: float) -> None:
    with pytest.raises(InputError, match="--network_dropout"):
        NetworkSettings(network_dropout=value)
