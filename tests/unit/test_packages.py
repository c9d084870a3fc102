"""A missing package ends in one line that names it, the way to install it and the file that lists it."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from networks.adapter import check_module
from networks.settings import NetworkSettings
from wan_train import packages
from wan_train.errors import InputError
from wan_train.flow.solvers import check_solver, make_solver
from wan_train.models.dit.attention import check_attention
from wan_train.training.optimizing.optimizers import check_optimizer
from wan_train.training.reporting.settings import LogSettings
from wan_train.training.reporting.trackers import check_trackers, uses_board
from wan_train.training.settings import OptimizerSettings


def block(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    """Make a package impossible to import, as if it were not installed."""
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)


def optimizer(name: str) -> Callable[[], object]:
    return lambda: check_optimizer(OptimizerSettings(optimizer_type=name, learning_rate=1.0))


def attend(name: str) -> Callable[[], object]:
    return lambda: check_attention(name, device="cpu", training=False)


def track(name: str) -> Callable[[], object]:
    return lambda: check_trackers(LogSettings(log_with=name, wandb_api_key="x"))


NEEDS: list[tuple[str, str, str, Callable[[], object]]] = [
    ("--optimizer_type AdamW8bit", "bitsandbytes", "bitsandbytes", optimizer("adamw8bit")),
    ("--optimizer_type Lion", "bitsandbytes", "bitsandbytes", optimizer("Lion")),
    ("--optimizer_type Prodigy", "prodigyopt", "prodigyopt", optimizer("Prodigy")),
    ("--optimizer_type CAME", "came_pytorch", "came-pytorch", optimizer("CAME")),
    ("--optimizer_type AdamWScheduleFree", "schedulefree", "schedulefree", optimizer("AdamWScheduleFree")),
    ("--attn_mode xformers", "xformers", "xformers", attend("xformers")),
    ("--attn_mode sageattn", "sageattention", "sageattention", attend("sageattn")),
    ("--log_with wandb", "wandb", "wandb", track("wandb")),
    ("--log_with all", "wandb", "wandb", track("all")),
    ("--log_with tensorboard", "tensorboard", "tensorboard", track("tensorboard")),
]


@pytest.mark.parametrize(("option", "module", "package", "check"), NEEDS, ids=[need[0] for need in NEEDS])
def test_an_option_without_its_package_is_refused_in_one_line(
    option: str, module: str, package: str, check: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    block(monkeypatch, module)
    with pytest.raises(InputError) as refused:
        check()
    told = f"{option} needs the package {package}: pip install {package} (listed in requirements.txt), or "
    assert str(refused.value).startswith(told)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("solver", ["unipc", "dpm++"])
def test_solvers_of_diffusers_name_it(solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    block(monkeypatch, "diffusers")
    told = r"{} needs the package diffusers: pip install diffusers \(listed in requirements-base.txt\), or use"
    with pytest.raises(InputError, match=told.format(rf"--sample_solver {solver}".replace("+", r"\+"))):
        check_solver(solver)
    with pytest.raises(InputError, match=told.format("--sample_solver")):
        make_solver(solver, steps=2)


@pytest.mark.parametrize("solver", ["euler", "vanilla", "lcm"])
def test_other_solvers_need_no_package(solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    block(monkeypatch, "diffusers")
    check_solver(solver)
    assert len(make_solver(solver, steps=2).timesteps) == 2


def test_by_default_curves_go_to_tensorboard_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert uses_board(LogSettings())
    block(monkeypatch, "tensorboard")
    check_trackers(LogSettings())
    assert not uses_board(LogSettings())
    assert uses_board(LogSettings(log_with="tensorboard")), "checked before, so that it is there"


def test_what_pip_does_not_know_has_instructions_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    block(monkeypatch, "flash_attn_interface")
    block(monkeypatch, "flash_attn")
    with pytest.raises(InputError, match=r"the package FlashAttention-3: build it from the folder hopper of .*, or"):
        check_attention("flash3", device="cpu", training=False)
    with pytest.raises(InputError, match=r"the package flash-attn: pip install flash-attn, or use --sdpa"):
        check_attention("flash", device="cpu", training=False)


def test_a_package_that_another_one_lacks_is_told_from_the_one_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "half_there.py").write_text("import nobody_has_this.part")
    (tmp_path / "whole.py").write_text("")
    (tmp_path / "plugin.py").write_text("import nobody_has_this")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=r"^--x needs the package nobody_has_this, which half-there needs: install"):
        packages.load("half_there", "thing", "--x", package="half-there")
    with pytest.raises(InputError, match=r"^--network_module plugin needs the package nobody_has_this: install it$"):
        check_module(NetworkSettings(network_module="plugin"))
    for module in ("whole", "whole.part"):
        with pytest.raises(InputError, match=r"^--x: the package whole cannot be loaded \(.*\): use y$"):
            packages.load(module, "thing", "--x", instead="use y")


def test_a_package_is_found_without_being_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "never_imported.py").write_text("raise RuntimeError")
    monkeypatch.syspath_prepend(tmp_path)
    packages.require("never_imported", "--x")
    assert packages.is_installed("never_imported.part")
    with pytest.raises(InputError, match=r"^--x needs the package nobody_has_this: pip install nobody_has_this$"):
        packages.require("nobody_has_this", "--x")


def test_without_the_lists_a_message_names_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert packages.listed_in("Pillow") == packages.listed_in("pillow") == "requirements-base.txt"
    assert packages.listed_in("came") is None
    monkeypatch.setattr(packages, "ROOT", tmp_path)
    assert packages.missing("--x", "wandb") == "--x needs the package wandb: pip install wandb"
