"""Which modules are trained, and which of a LoRA file are used."""

import logging

import pytest

from networks.adapter import check_module, check_network, create
from networks.formats.files import check_lora, kohya_state, peft_state
from networks.selection import choose_modules
from networks.settings import NetworkSettings
from wan_train.assemble import WeightedLora
from wan_train.errors import InputError
from wan_train.storage import save_tensors


def modules(adapter) -> set[str]:
    return {
        name.removesuffix(".lora.up.weight") for name, _ in adapter.named_parameters() if name.endswith("up.weight")
    }


def shapes(model) -> dict[str, tuple[int, ...]]:
    return {
        name.removesuffix(".weight"): tuple(weight.shape)
        for name, weight in model.state_dict().items()
        if name.endswith(".weight") and weight.ndim == 2
    }


def arguments(*texts: str) -> NetworkSettings:
    return NetworkSettings(network_args=texts)


def test_a_module_is_skipped_if_it_is_excluded_and_not_included(make_model) -> None:
    model = make_model()
    settings = arguments(r"exclude_patterns=['.*attn.*', '.*ffn\.2']", r"include_patterns=['.*\.1\.cross_attn\.[kv]']")
    check_network(settings, shapes(model))
    adapter = create(model, settings)
    wanted = {"blocks.0.ffn.0", "blocks.1.ffn.0", "blocks.1.cross_attn.k", "blocks.1.cross_attn.v"}
    assert modules(adapter) == wanted
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {f"{name}.lora.{factor}.weight" for name in wanted for factor in ("down", "up")}
    assert len(adapter.export()) == 3 * len(wanted)


def test_including_alone_restricts_nothing_and_says_so(make_model, caplog, monkeypatch) -> None:
    settings = arguments("include_patterns=['.*self_attn.*']")
    monkeypatch.setattr(logging.getLogger("wan_train_log"), "propagate", True)
    check_network(settings, shapes(make_model()))
    assert "only re-includes modules matched by exclude_patterns" in caplog.text
    assert len(modules(create(make_model(), settings))) == 20


def test_only_what_is_included_of_nothing(make_model) -> None:
    settings = arguments("exclude_patterns=['.*']", "include_patterns=['.*self_attn.q']")
    assert modules(create(make_model(), settings)) == {"blocks.0.self_attn.q", "blocks.1.self_attn.q"}


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["exclude_patterns=['ffn']"], r"'ffn' fully matches none of 20 modules.*use \.\*ffn\.\*"),
        (["exclude_patterns=['.*fnf.*']"], r"names such as blocks\.0\.self_attn\.q: correct"),
        (["include_patterns=['head.head']", "exclude_patterns=['.*']"], "include_patterns: 'head.head'"),
        (["exclude_patterns=['.*']"], "exclude all 20 modules"),
    ],
)
def test_patterns_that_match_nothing_or_leave_nothing(make_model, texts, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_network(arguments(*texts), shapes(make_model()))
    with pytest.raises(InputError, match=message):
        create(make_model(), arguments(*texts))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("exclude_patterns=['.*(ffn']", "not a valid regular expression"),
        ("include_patterns=['*']", "not a valid regular expression"),
        ("exclude_patterns=.*ffn.*", "not a list of patterns"),
        ("exclude_patterns='.*ffn.*'", "not a list of patterns"),
        ("exclude_patterns=[1]", "not a list of patterns"),
        ("rank_dropout=1", "rank_dropout=1 is out of range"),
        ("module_dropout=-0.1", "out of range"),
        ("module_dropout=nan", "not a finite number"),
        ("loraplus_lr_ratio=0", "out of range"),
        ("loraplus_lr_ratio=True", "not a finite number"),
        ("verbose=perhaps", "True or False"),
        ("conv_dim=1.5", "integer"),
    ],
)
def test_arguments_that_cannot_be(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_module(arguments(text))


def test_an_equals_sign_in_a_pattern(make_model) -> None:
    adapter = create(make_model(), arguments(r"exclude_patterns=['.*(?=ffn)ffn\.\d+']"))
    assert len(modules(adapter)) == 16


def test_arguments_for_convolutions_are_taken_and_said_to_do_nothing(make_model, caplog, monkeypatch) -> None:
    settings = arguments("conv_dim=4", "conv_alpha=1")
    monkeypatch.setattr(logging.getLogger("wan_train_log"), "propagate", True)
    check_network(settings, shapes(make_model()))
    assert "no convolutions" in caplog.text
    assert len(modules(create(make_model(), settings))) == 20


def test_verbose_lists_the_modules(make_model) -> None:
    loud = create(make_model(), arguments("verbose=True")).describe()
    assert "blocks.1.ffn.2: dim 4, alpha 1" in loud
    assert "blocks.1.ffn.2" not in create(make_model(), arguments("verbose=False")).describe()


def test_metadata_holds_the_arguments(make_model) -> None:
    rows = create(make_model(), arguments("rank_dropout=0.1", "exclude_patterns=['.*(?=ffn).*']")).metadata()
    assert rows["ss_network_args"] == '{"rank_dropout": "0.1", "exclude_patterns": "[\'.*(?=ffn).*\']"}'


NAMES = dict.fromkeys((f"blocks.{i}.{m}" for i in (1, 12) for m in ("self_attn.q", "cross_attn.k", "ffn.0")), 0)


@pytest.mark.parametrize(
    ("include", "exclude", "wanted"),
    [
        ([], [], set(NAMES)),
        (["cross_attn"], [], {"blocks.1.cross_attn.k", "blocks.12.cross_attn.k"}),
        (["attn"], ["self", "blocks_12_"], {"blocks.1.cross_attn.k"}),
        ([r"blocks\.1\.", r"ffn\.0$"], ["cross"], {"blocks.1.self_attn.q", "blocks.1.ffn.0", "blocks.12.ffn.0"}),
    ],
)
def test_filtering_a_file(include, exclude, wanted) -> None:
    assert set(choose_modules(NAMES, include, exclude)) == wanted


def test_filtering_by_what_is_not_there() -> None:
    deltas = ["blocks.0.ffn.0"]
    assert choose_modules(deltas, ["ffn"]) == deltas
    with pytest.raises(InputError, match=r"--include_patterns: 'attn' matches none of 1 modules.*blocks\.0\.ffn\.0"):
        choose_modules(deltas, ["attn"])
    with pytest.raises(InputError, match="select none"):
        choose_modules(deltas, ["ffn"], ["blocks"])
    with pytest.raises(InputError, match="not a valid regular expression"):
        choose_modules(deltas, [], ["("])


@pytest.mark.parametrize("written", [kohya_state, lambda deltas: peft_state(deltas, "diffusion_model")])
@pytest.mark.parametrize("pattern", ["k_img|v_img", r"cross_attn\.[kv]_img", "lora_unet_blocks_._cross_attn_._img"])
def test_what_is_excluded_need_not_fit_the_model(make_model, make_deltas, tmp_path, written, pattern: str) -> None:
    """A LoRA of a model with images on one without, as Wan2.1's I2V on T2V or Wan2.2."""
    path, sizes = tmp_path / "i2v.safetensors", shapes(make_model())
    wanted = {name for name in make_deltas(make_model(image=True)) if not name.endswith("_img")}
    save_tensors(path, written(make_deltas(make_model(image=True))))
    lora = WeightedLora(str(path), exclude=(pattern,))
    assert set(lora.read(sizes)) == set(check_lora(path, sizes, lora.choose)) == wanted
    chosen = WeightedLora(str(path), include=("self_attn",))
    assert set(chosen.read(sizes)) == {name for name in wanted if "self_attn" in name}
    for other in (WeightedLora(str(path)), WeightedLora(str(path), exclude=("k_img",))):
        with pytest.raises(InputError, match=r"keys do not: .*v_img"):
            other.read(sizes)
        with pytest.raises(InputError, match=r"keys do not: .*v_img"):
            check_lora(path, sizes, other.choose)
    with pytest.raises(InputError, match="'q_img' matches none of 24 modules"):
        WeightedLora(str(path), exclude=("q_img",)).read(sizes)
