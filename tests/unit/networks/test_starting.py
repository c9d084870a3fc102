"""Beginning from files: weights of the network, its sizes, and LoRAs merged into the base."""

import dataclasses

import pytest
import torch

from networks.adapter import check_network, create
from networks.formats.files import kohya_state, peft_state
from networks.settings import NetworkSettings
from wan_train.errors import InputError
from wan_train.storage import save_tensors


def shapes(model) -> dict[str, tuple[int, ...]]:
    return {
        name.removesuffix(".weight"): tuple(weight.shape)
        for name, weight in model.state_dict().items()
        if name.endswith(".weight") and weight.ndim == 2
    }


@pytest.fixture
def lora(tmp_path, make_model, make_deltas):
    """Write a LoRA for the model and give its path."""

    def write(*, rank: int = 3, alpha: float = 2.0, without: str = "", peft: bool = False) -> str:
        deltas = make_deltas(make_model(), rank=rank, alpha=alpha)
        deltas = {name: delta for name, delta in deltas.items() if not without or without not in name}
        path = tmp_path / f"lora_{rank}_{without}_{peft}.safetensors"
        save_tensors(path, peft_state(deltas, "diffusion_model") if peft else kohya_state(deltas), {})
        return str(path)

    return write


def both_refuse(settings: NetworkSettings, model, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_network(settings, shapes(model))
    with pytest.raises(InputError, match=message):
        create(model, settings)


@pytest.mark.parametrize("peft", [False, True])
def test_training_starts_from_the_file(make_model, batch, lora, make_deltas, peft: bool) -> None:
    path = lora(peft=peft)
    model, plain = make_model(), make_model()
    settings = NetworkSettings(network_dim=3, network_alpha=2.0, network_weights=path)
    check_network(settings, shapes(model))
    adapter = create(model, settings)
    create(plain, NetworkSettings(network_dim=3, network_alpha=2.0)).load(kohya_state(make_deltas(plain, rank=3)))
    torch.testing.assert_close(model(*batch), plain(*batch), rtol=0, atol=1e-5)
    model(*batch).sum().backward()
    assert all(parameter.grad is not None for _, parameter in adapter.named_parameters())


def test_a_file_that_does_not_fit_is_never_a_fresh_start(make_model, lora) -> None:
    start = NetworkSettings(network_weights=lora())
    both_refuse(start, make_model(), r"has dim 3, the network 4: set --network_dim 3, or use --dim_from_weights")
    start = NetworkSettings(network_dim=3, network_weights=lora(without="blocks.1.ffn"))
    both_refuse(start, make_model(), r"lacks 2 modules that this network has: blocks\.1\.ffn\.0")
    start = NetworkSettings(network_dim=3, network_weights=lora(), network_args=("exclude_patterns=['.*ffn.*']",))
    both_refuse(start, make_model(), "has 4 modules that this network does not train")
    start = NetworkSettings(network_dim=3, network_weights=lora())
    with pytest.raises(InputError, match="different model"):
        check_network(start, shapes(make_model(dim=16)))
    missing = NetworkSettings(network_weights="nowhere.safetensors")
    both_refuse(missing, make_model(), "no such file")


def test_a_part_of_the_network_from_a_file_of_that_part(make_model, lora) -> None:
    settings = NetworkSettings(
        network_dim=3, network_weights=lora(without="ffn"), network_args=("exclude_patterns=['.*ffn.*']",)
    )
    check_network(settings, shapes(make_model()))
    assert len(create(make_model(), settings).branches) == 16


def test_dims_modules_and_alphas_of_the_file(make_model, make_deltas, tmp_path, batch) -> None:
    deltas = make_deltas(make_model(), rank=3, alpha=2.0)
    other = make_deltas(make_model(), rank=5, alpha=1.3)
    mixed = {name: (other if "ffn" in name else deltas)[name] for name in deltas if "cross" not in name}
    path = str(tmp_path / "mixed.safetensors")
    save_tensors(path, kohya_state(mixed), {})
    model = make_model()
    settings = NetworkSettings(network_weights=path, dim_from_weights=True)
    check_network(settings, shapes(model))
    adapter = create(model, settings)
    assert adapter.branches.keys() == mixed.keys()
    for name, delta in mixed.items():
        branch = adapter.branches[name]
        assert torch.equal(branch.down.weight, delta.down) and torch.equal(branch.up.weight, delta.up)
        assert branch.scale == pytest.approx(delta.scale)
    rows = adapter.metadata()
    assert (rows["ss_network_dim"], rows["ss_network_alpha"]) == ("Dynamic", "Dynamic")
    assert "dims 3 to 5" in adapter.describe()
    assert all(torch.equal(tensor, kohya_state(mixed)[name]) for name, tensor in adapter.export().items())


def test_the_common_dim_and_alpha_of_a_file_are_those_of_the_metadata(make_model, lora) -> None:
    settings = NetworkSettings(network_weights=lora(rank=6, alpha=3.0), dim_from_weights=True)
    rows = create(make_model(), settings).metadata()
    assert (rows["ss_network_dim"], rows["ss_network_alpha"]) == ("6", "3.0")


@pytest.mark.parametrize("alpha", [1.0, 1.3, 0.7, 32.0])
def test_export_and_load_restore_every_bit(make_model, alpha: float) -> None:
    settings = NetworkSettings(network_dim=7, network_alpha=alpha)
    adapter, twin = create(make_model(), settings, seed=1), create(make_model(), settings, seed=2)
    for _, parameter in adapter.named_parameters():
        parameter.data.normal_(generator=torch.Generator().manual_seed(3))
    twin.load(adapter.export())
    for (name, ours), (other, theirs) in zip(adapter.named_parameters(), twin.named_parameters(), strict=True):
        assert name == other and torch.equal(ours, theirs)


def test_names_are_those_of_the_model(make_model) -> None:
    model = make_model()
    adapter = create(model, NetworkSettings())
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    named = dict(adapter.named_parameters())
    assert named.keys() == trained.keys()
    assert all(named[name] is parameter for name, parameter in trained.items())


def test_base_weights_have_their_multipliers_and_must_fit(make_model, lora) -> None:
    path = lora()
    settings = NetworkSettings(base_weights=(path, path, path), base_weights_multiplier=(0.5, 2.0))
    assert settings.base_loras == ((path, 0.5), (path, 2.0), (path, 1.0))
    check_network(settings, shapes(make_model()))
    with pytest.raises(InputError, match="different model"):
        check_network(settings, shapes(make_model(dim=16)))
    with pytest.raises(InputError, match="no such file"):
        check_network(dataclasses.replace(settings, base_weights=("nowhere.safetensors",) * 3), {})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dim_from_weights": True}, "--dim_from_weights needs --network_weights"),
        (
            {"dim_from_weights": True, "network_weights": "a", "network_dim": 4},
            "cannot be combined with --network_dim 4",
        ),
        ({"base_weights_multiplier": (1.0,)}, "1 --base_weights_multiplier for 0 --base_weights"),
        ({"base_weights": ("a",), "base_weights_multiplier": (float("nan"),)}, "finite"),
    ],
)
def test_settings_that_contradict_each_other(given, message: str) -> None:
    with pytest.raises(InputError, match=message):
        NetworkSettings(**given)


def test_the_files_modules_and_patterns_exclude_each_other(make_model, lora) -> None:
    settings = NetworkSettings(
        network_weights=lora(), dim_from_weights=True, network_args=("exclude_patterns=['.*ffn.*']",)
    )
    both_refuse(settings, make_model(), "remove one of them")


def test_an_alpha_with_which_nothing_is_learnt(make_model, lora) -> None:
    settings = NetworkSettings(network_weights=lora(alpha=0.0), dim_from_weights=True)
    with pytest.raises(InputError, match="alpha 0"):
        create(make_model(), settings)
