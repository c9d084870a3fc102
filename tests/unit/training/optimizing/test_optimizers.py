import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from wan_train.errors import InputError
from wan_train.packages import listed_in
from wan_train.training.optimizing.optimizers import OURS, SOURCES, check_optimizer, find_optimizer, make_optimizer
from wan_train.training.settings import OptimizerSettings

# A learning rate that suits each on the LoRA below.
RATES = {
    "AdamW": 1e-3,
    "AdamW8bitSR": 1e-3,
    "AdamW8bit": 1e-3,
    "PagedAdamW8bit": 1e-3,
    "Lion": 1e-3,
    "Lion8bit": 1e-3,
    "Adafactor": 1e-3,
    "Prodigy": 1.0,
    "CAME": 3e-4,
    "AdamWScheduleFree": 1e-3,
}


def chosen(name: str, *arguments: str, rate: float = 2e-6, **others: Any) -> OptimizerSettings:
    return OptimizerSettings(optimizer_type=name, optimizer_args=arguments, learning_rate=rate, **others)


def matrix() -> list[dict[str, Any]]:
    return [{"params": [torch.nn.Parameter(torch.ones(4, 4))], "lr": 2e-6}]


class Recording(torch.optim.AdamW):
    """AdamW whose fused kernel there is on every device but `without`."""

    without = ""

    def __init__(self, params: Any, **arguments: Any) -> None:
        groups = list(params)
        weights = groups[0]["params"] if isinstance(groups[0], dict) else groups
        super().__init__(groups, **{**arguments, "fused": None})
        self.asked = arguments.get("fused")
        if self.asked and weights[0].device.type == self.without:
            raise RuntimeError("`fused=True` requires all the params to be floating point Tensors of supported devices")


@pytest.mark.parametrize(
    ("device", "without", "arguments", "fused"),
    [
        ("meta", "", (), True),
        ("meta", "meta", (), None),
        ("meta", "", ("foreach=true",), None),
        ("meta", "", ("fused=false",), False),
        ("cpu", "", (), None),
    ],
)
def test_adamw_is_fused_on_an_accelerator_that_can(
    device: str, without: str, arguments: tuple[str, ...], fused: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The meta device stands for an accelerator. On a CPU results must not change."""
    monkeypatch.setattr(torch.optim, "AdamW", Recording)
    monkeypatch.setattr(Recording, "without", without)
    made: Any = make_optimizer(matrix(), chosen("AdamW", *arguments), device=torch.device(device))
    assert made.asked is fused


def losses(settings: OptimizerSettings, steps: int = 25) -> list[float]:
    """The loss of a LoRA pair, zero at the start as a new LoRA is, that learns a change of its own rank."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    inputs, wanted = draw(64, 512), draw(64, 512) @ draw(512, 16) @ draw(16, 512) * 1e-3
    down, up = torch.nn.Parameter(draw(16, 512) / 512**0.5), torch.nn.Parameter(torch.zeros(512, 16))
    optimizer = make_optimizer([{"params": [down, up], "lr": settings.learning_rate}], settings)
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (inputs @ down.T @ up.T - wanted).square().mean()
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    return found


@pytest.mark.filterwarnings("ignore:Paged optimizers")
@pytest.mark.parametrize("name", [*RATES, "adamw8bit", "PRODIGY", "SGD", "RMSprop", "torch.optim.NAdam", "Muon"])
def test_each_optimizer_lowers_the_loss_of_a_lora(name: str) -> None:
    known = {known.lower(): rate for known, rate in RATES.items()}
    rate = {"sgd": 100.0, "muon": 1e-2}.get(name.lower(), known.get(name.lower(), 1e-3))
    found = losses(chosen(name, rate=rate))
    assert found[-1] < 0.5 * found[0]


def test_every_name_of_the_help_is_tried() -> None:
    assert RATES.keys() == {"AdamW", *OURS, *SOURCES}


@pytest.mark.parametrize("name", SOURCES)
def test_names_are_known_in_any_case_and_lead_to_their_package(name: str) -> None:
    for spelt in (name, name.lower(), name.upper()):
        kind = find_optimizer(spelt)
        assert (kind.__name__, kind.__module__.partition(".")[0]) == (name, SOURCES[name].module.partition(".")[0])


def test_without_a_choice_it_is_adamw_of_torch() -> None:
    assert type(make_optimizer(matrix(), OptimizerSettings())) is torch.optim.AdamW


def test_arguments_reach_the_optimizer() -> None:
    group = make_optimizer(matrix(), chosen("AdamW", "weight_decay=0.5", "betas=(0.8, 0.9)")).param_groups[0]
    assert (group["weight_decay"], group["betas"], group["lr"]) == (0.5, (0.8, 0.9), 2e-6)


def test_false_is_not_a_text_that_counts_as_true() -> None:
    for text in ("amsgrad=False", "amsgrad=false", "amsgrad = FALSE"):
        assert make_optimizer(matrix(), chosen("AdamW", text)).param_groups[0]["amsgrad"] is False
    assert make_optimizer(matrix(), chosen("AdamW", "foreach=none")).param_groups[0]["foreach"] is None


def test_a_class_of_any_package_with_arguments_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bought_optimizers.py").write_text(
        "import torch\n"
        "class Rule(torch.optim.SGD):\n"
        "    def __init__(self, params, lr, rule='', **more):\n"
        "        super().__init__(params, lr=lr, **more)\n"
        "        self.rule = rule\n"
        "class Closing(torch.optim.SGD):\n"
        "    def step(self, closure): ...\n"
        "Nothing = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    optimizer: Any = make_optimizer(matrix(), chosen("bought_optimizers.Rule", "rule=a=b=c", "momentum=0.5"))
    assert (optimizer.rule, optimizer.param_groups[0]["momentum"]) == ("a=b=c", 0.5)
    for name, told in (("Closing", "closure"), ("Nothing", "no Optimizer"), ("Missing", "no Optimizer")):
        with pytest.raises(InputError, match=told):
            check_optimizer(chosen(f"bought_optimizers.{name}"))


@pytest.mark.parametrize(
    ("name", "arguments", "told"),
    [
        ("AdamV", (), "did you mean Adam"),
        ("", (), "known are AdamW8bit"),
        ("Adam9bit", (), "known are AdamW8bit, PagedAdamW8bit, Lion, .*SGD.*package.Class"),
        ("LBFGS", (), "unknown --optimizer_type"),
        ("torch.optim.LBFGS", (), "closure"),
        ("torch.optim.lr_scheduler.StepLR", (), "no Optimizer"),
        ("no_such_package.Thing", (), "install"),
        (".Thing", (), "cannot import"),
        ("AdamW", ("weight_decai=0.1",), "did you mean weight_decay"),
        ("AdamW", ("weight_decay",), "name=value"),
        ("AdamW", ("weight_decay=-1",), "weight_decay"),
        ("AdamW", ("weight_decay=much",), "weight_decay=much"),
        ("AdamW", ("eps=1e-8", "eps=1e-7"), "twice"),
        ("AdamW", ("lr=1",), "--learning_rate"),
        ("AdamW8bit", ("beta=1",), "betas"),
        ("Prodigy", ("d_coeff=2",), "did you mean d_coef"),
        ("Adafactor", ("warmup_init=True",), "relative_step=True"),
    ],
)
def test_what_an_optimizer_cannot_take_is_refused(name: str, arguments: tuple[str, ...], told: str) -> None:
    with pytest.raises(InputError, match=told) as refused:
        check_optimizer(chosen(name, *arguments))
    assert "\n" not in str(refused.value)


def test_a_rate_of_zero_that_the_optimizer_asserts_against_is_explained() -> None:
    with pytest.raises(InputError, match="CAME with --learning_rate 0 "):
        check_optimizer(chosen("CAME", rate=0.0))


@pytest.mark.parametrize("name", SOURCES)
def test_requirements_name_the_package(name: str) -> None:
    assert listed_in(SOURCES[name].package) is not None


def first_step(settings: OptimizerSettings) -> float:
    """How far the first step moves a weight of size 1."""
    groups = matrix()
    groups[0]["lr"] = settings.learning_rate
    optimizer = make_optimizer(groups, settings)
    weight = groups[0]["params"][0]
    weight.sum().backward()
    optimizer.step()
    return float(1 - weight.detach()[0, 0])


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []

    def keep(self: logging.Handler, record: logging.LogRecord) -> None:
        lines.append(record.getMessage())

    handler = logging.getLogger("wan_train_log").handlers[0]
    monkeypatch.setattr(type(handler), "emit", keep)
    return lines


def test_adafactor_steps_by_the_learning_rate_unless_asked_otherwise(said: list[str]) -> None:
    assert first_step(chosen("Adafactor", rate=1e-3)) == pytest.approx(1e-3, rel=1e-3)
    assert said == []
    relative = first_step(chosen("Adafactor", "relative_step=True", rate=1e-3))
    assert relative == pytest.approx(1e-2, rel=1e-3)  # the paper's smallest relative step, of a weight of size 1
    assert "--learning_rate is ignored" in said[0]


def test_adafactor_says_that_it_scales_by_the_weight(said: list[str]) -> None:
    assert first_step(chosen("Adafactor", "scale_parameter=True", rate=1e-3)) == pytest.approx(1e-3, rel=1e-3)
    assert "scale_parameter" in said[0]


def test_prodigy_is_told_of_a_rate_that_was_meant_for_another(said: list[str]) -> None:
    make_optimizer(matrix(), chosen("Prodigy", rate=1e-4))
    assert "the usual value is 1" in said[0]
    said.clear()
    make_optimizer([{"params": matrix()[0]["params"], "lr": 1.0}], chosen("Prodigy", rate=1.0))
    assert said == []


@pytest.mark.parametrize("settings", [chosen("Prodigy", rate=1.0), chosen("Adafactor", "relative_step=True")])
def test_two_rates_are_refused_where_only_one_would_be_kept(settings: OptimizerSettings) -> None:
    check_optimizer(settings)
    with pytest.raises(InputError, match="loraplus_lr_ratio"):
        check_optimizer(settings, several_rates=True)
    with pytest.raises(InputError, match="loraplus_lr_ratio"):
        make_optimizer(
            [*matrix(), matrix()[0] | {"params": [torch.nn.Parameter(torch.ones(2, 2))], "lr": 1.0}], settings
        )


def test_two_groups_keep_their_rates() -> None:
    both = [matrix()[0] | {"lr": 1e-4}, matrix()[0] | {"lr": 16e-4}]
    assert [group["lr"] for group in make_optimizer(both, chosen("AdamW", rate=1e-4)).param_groups] == [1e-4, 16e-4]


def test_schedule_free_warms_up_by_itself() -> None:
    settings = chosen("AdamWScheduleFree", rate=1e-3, lr_warmup_steps="10")
    assert make_optimizer(matrix(), settings, warmup=10).param_groups[0]["warmup_steps"] == 10
    assert make_optimizer(matrix(), chosen("AdamW"), warmup=10).param_groups[0]["lr"] == 2e-6
    with pytest.raises(InputError, match="same value"):
        check_optimizer(chosen("AdamWScheduleFree", "warmup_steps=5", lr_warmup_steps="10"))
    assert make_optimizer(matrix(), chosen("AdamWScheduleFree", "warmup_steps=5")).param_groups[0]["warmup_steps"] == 5
