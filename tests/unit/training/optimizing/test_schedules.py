import math
from typing import Any

import pytest
import torch

from wan_train.errors import InputError
from wan_train.training.optimizing.optimizers import make_optimizer
from wan_train.training.optimizing.schedules import KINDS, check_schedule, make_schedule, rex_factor, warmup_steps
from wan_train.training.settings import SCHEDULES, OptimizerSettings

TOTAL = 100
RATE = 1e-3
# What a schedule cannot do without.
NEEDED: dict[str, dict[str, Any]] = {
    "cosine_with_min_lr": {"lr_scheduler_min_lr_ratio": 0.1},
    "warmup_stable_decay": {"lr_decay_steps": "40%"},
    "piecewise_constant": {"lr_scheduler_args": ("step_rules=1:10,0.5:60,0.1",)},
    "adafactor": {"optimizer_type": "Adafactor", "optimizer_args": ("relative_step=True",)},
}


def chosen(name: str, **options: Any) -> OptimizerSettings:
    return OptimizerSettings(lr_scheduler=name, **({"learning_rate": RATE} | NEEDED.get(name, {}) | options))


def rates(settings: OptimizerSettings, *groups: float) -> list[list[float]]:
    """The learning rates of the groups at each step of a run of TOTAL, beginning with those given."""
    check_schedule(settings)
    check_schedule(settings, total=TOTAL)
    starts = groups or (settings.learning_rate,)
    optimizer = make_optimizer(
        [{"params": [torch.nn.Parameter(torch.ones(2, 2))], "lr": start} for start in starts], settings
    )
    schedule = make_schedule(optimizer, settings, total=TOTAL)
    found = []
    for _ in range(TOTAL):
        assert schedule.get_last_lr() == [group["lr"] for group in optimizer.param_groups]
        found.append(list(schedule.get_last_lr()))
        optimizer.step()
        schedule.step()
    return found


def factors(name: str, **options: Any) -> list[float]:
    return [rate / RATE for (rate,) in rates(chosen(name, **options))]


def half_wave(progress: float) -> float:
    return (1 + math.cos(math.pi * progress)) / 2


def test_every_schedule_has_a_row() -> None:
    assert KINDS.keys() == set(SCHEDULES)


@pytest.mark.parametrize("name", sorted(set(SCHEDULES) - {"piecewise_constant", "adafactor", "rex"}))
def test_a_warm_up_is_linear_from_nothing(name: str) -> None:
    assert factors(name, lr_warmup_steps="20")[:20] == pytest.approx([step / 20 for step in range(20)])
    assert factors(name, lr_warmup_steps="20")[20] == pytest.approx(1)
    assert factors(name)[0] == pytest.approx(1)


@pytest.mark.parametrize("name", ["constant", "constant_with_warmup"])
def test_constant(name: str) -> None:
    assert factors(name) == [1.0] * TOTAL
    assert factors(name, lr_warmup_steps="20%")[20:] == [1.0] * (TOTAL - 20)


def test_linear() -> None:
    found = factors("linear", lr_warmup_steps="20")
    assert [found[step] for step in (20, 60, 99)] == pytest.approx([1, 0.5, 1 / 80])


def test_cosine() -> None:
    found = factors("cosine", lr_warmup_steps="20")
    assert [found[step] for step in (30, 60, 99)] == pytest.approx([half_wave(p / 80) for p in (10, 40, 79)])


def test_cosine_with_restarts() -> None:
    found = factors("cosine_with_restarts", lr_scheduler_num_cycles=4)
    assert [found[step] for step in (0, 24, 25, 30, 50, 99)] == pytest.approx(
        [half_wave(p) for p in (0, 24 / 25, 0, 5 / 25, 0, 24 / 25)]
    )
    assert factors("cosine_with_restarts") == pytest.approx(factors("cosine"))


def test_polynomial() -> None:
    found = factors("polynomial", lr_scheduler_power=2.0, lr_warmup_steps="20")
    end = 1e-7 / RATE
    assert [found[step] for step in (20, 60, 99)] == pytest.approx([end + (1 - end) * p**2 for p in (1, 0.5, 1 / 80)])
    assert factors("polynomial", lr_scheduler_args=("lr_end=5e-4",))[50] == pytest.approx(0.75)


def test_inverse_sqrt() -> None:
    found = factors("inverse_sqrt", lr_warmup_steps="20")
    assert [found[step] for step in (20, 80)] == pytest.approx([1, math.sqrt(20 / 80)])
    scaled = factors("inverse_sqrt", lr_scheduler_timescale=10)
    assert [scaled[step] for step in (0, 30)] == pytest.approx([1, math.sqrt(10 / 40)])


def test_cosine_with_min_lr() -> None:
    found = factors("cosine_with_min_lr", lr_scheduler_min_lr_ratio=0.2, lr_warmup_steps="20")
    assert [found[step] for step in (20, 60, 99)] == pytest.approx([0.2 + 0.8 * half_wave(p / 80) for p in (0, 40, 79)])
    assert factors("cosine_with_min_lr", lr_scheduler_num_cycles=3)[50] == pytest.approx(0.1 + 0.9 * half_wave(1.5))


def test_warmup_stable_decay() -> None:
    found = factors("warmup_stable_decay", lr_warmup_steps="10%", lr_decay_steps="0.4", lr_scheduler_min_lr_ratio=0.1)
    assert found[:10] == pytest.approx([0.1 + 0.9 * step / 10 for step in range(10)])
    assert found[10:60] == [1.0] * 50
    assert [found[step] for step in (70, 99)] == pytest.approx([0.1 + 0.9 * half_wave(p / 40) for p in (10, 39)])
    straight = factors("warmup_stable_decay", lr_decay_steps="40", lr_scheduler_args=("decay_type=linear",))
    assert straight[80] == pytest.approx(0.5)
    assert factors("warmup_stable_decay", lr_scheduler_num_cycles=3)[80] == pytest.approx(half_wave(1.5))


def test_piecewise_constant() -> None:
    assert factors("piecewise_constant") == pytest.approx([1.0] * 10 + [0.5] * 50 + [0.1] * 40)


def test_rex_is_the_formula_over_its_floor() -> None:
    found = factors("rex", lr_warmup_steps="20")
    for step in (20, 40, 60, 99):
        z = (80 - (step - 20)) / 80
        assert found[step] == pytest.approx(0.01 + 0.99 * z / (0.1 + 0.9 * z))
    assert found[:20] == pytest.approx([0.01 + 0.99 * step / 20 for step in range(20)])
    assert factors("rex", lr_scheduler_min_lr_ratio=0.5)[50] == pytest.approx(0.5 + 0.5 * 0.5 / 0.55)
    assert factors("rex", lr_scheduler_args=("rex_alpha=0.5", "rex_beta=0.5"))[50] == pytest.approx(0.01 + 0.99 * 2 / 3)
    assert rex_factor(100, warmup=20, total=100, floor=0.01) == 0.01
    assert rex_factor(5, warmup=5, total=5, floor=0.01) == 0.01


@pytest.mark.parametrize("name", sorted(set(SCHEDULES) - {"adafactor"}))
def test_groups_keep_the_ratio_of_their_rates(name: str) -> None:
    warmup = "0" if name == "piecewise_constant" else "20"
    found = rates(chosen(name, lr_warmup_steps=warmup), RATE, 16 * RATE)
    assert [plus for _, plus in found] == pytest.approx([16 * plain for plain, _ in found])
    assert found[-1][0] > 0


def test_optimizers_with_a_pace_of_their_own_get_a_schedule_that_does_nothing() -> None:
    assert factors("adafactor") == [1.0] * TOTAL
    free = OptimizerSettings(optimizer_type="AdamWScheduleFree", learning_rate=RATE, lr_warmup_steps="20")
    assert rates(free) == [[RATE]] * TOTAL  # and warms up by itself: see test_optimizers


def test_a_schedule_of_torch_by_its_name_or_in_full() -> None:
    for name in ("StepLR", "torch.optim.lr_scheduler.StepLR"):
        settings = OptimizerSettings(
            lr_scheduler_type=name, lr_scheduler_args=("step_size=50", "gamma=0.5"), learning_rate=RATE
        )
        assert rates(settings) == [[RATE]] * 50 + [[RATE / 2]] * 50


def test_the_most_of_a_run_may_be_warm_up() -> None:
    for name in sorted(set(SCHEDULES) - {"piecewise_constant", "adafactor", "polynomial", "warmup_stable_decay"}):
        assert len(factors(name, lr_warmup_steps="100%")) == TOTAL


@pytest.mark.parametrize(
    ("text", "steps"),
    [("0", 0), ("10", 10), ("0.05", 10), ("5%", 10), ("100%", 200), ("1", 1), ("1.0", 1), (" 5% ", 10)],
)
def test_steps_by_number_share_or_percentage(text: str, steps: int) -> None:
    assert warmup_steps(text, 200) == steps
    assert warmup_steps(text, 200, "--lr_decay_steps") == steps


@pytest.mark.parametrize("text", ["soon", "-1", "201", "2.5", "110%", "nan", "inf", "-5%", "", "%"])
@pytest.mark.parametrize("flag", ["--lr_warmup_steps", "--lr_decay_steps"])
def test_steps_that_make_no_sense_are_refused(text: str, flag: str) -> None:
    with pytest.raises(InputError, match=flag):
        warmup_steps(text, 200, flag)


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("cosine_with_min_lr", {"lr_scheduler_min_lr_ratio": None}, "needs --lr_scheduler_min_lr_ratio"),
        ("warmup_stable_decay", {"lr_decay_steps": "0"}, "needs --lr_decay_steps"),
        ("warmup_stable_decay", {"lr_decay_steps": "much"}, "--lr_decay_steps takes a number"),
        ("warmup_stable_decay", {"lr_decay_steps": "60%", "lr_warmup_steps": "50%"}, "exceed the run's"),
        ("warmup_stable_decay", {"lr_scheduler_args": ("decay_type=slow",)}, "slow"),
        ("cosine", {"lr_warmup_steps": "150%"}, "--lr_warmup_steps"),
        ("cosine", {"lr_scheduler_num_cycles": 3}, "does not read --lr_scheduler_num_cycles.*cosine_with_restarts"),
        ("linear", {"lr_scheduler_power": 2.0}, "does not read --lr_scheduler_power.*polynomial"),
        ("linear", {"lr_decay_steps": "10"}, "does not read --lr_decay_steps.*warmup_stable_decay"),
        ("rex", {"lr_scheduler_timescale": 5}, "does not read --lr_scheduler_timescale"),
        ("constant", {"lr_scheduler_min_lr_ratio": 0.1}, "does not read --lr_scheduler_min_lr_ratio"),
        ("cosine", {"lr_scheduler_args": ("gamma=1",)}, "cosine has no argument gamma; there are none"),
        ("polynomial", {"lr_scheduler_args": ("lr_ends=1",)}, "did you mean lr_end"),
        ("polynomial", {"lr_scheduler_args": ("lr_end=1",)}, "must be smaller than initial lr"),
        ("polynomial", {"lr_scheduler_args": ("lr_end",)}, "name=value"),
        ("polynomial", {"lr_warmup_steps": "100%"}, "does not work over"),
        ("rex", {"lr_scheduler_args": ("rex_alpha=0", "rex_beta=0")}, "--lr_scheduler rex: .*zero"),
        ("rex", {"lr_scheduler_args": ("rex_alpha=big",)}, "--lr_scheduler_args"),
        ("piecewise_constant", {"lr_scheduler_args": ()}, "needs --lr_scheduler_args step_rules"),
        ("piecewise_constant", {"lr_scheduler_args": ("step_rules=1:10",)}, "1:10"),
        ("piecewise_constant", {"lr_warmup_steps": "5"}, "no warm-up"),
        ("adafactor", {"lr_warmup_steps": "5"}, "no warm-up"),
        ("adafactor", {"optimizer_args": ()}, "relative_step=True"),
        ("adafactor", {"optimizer_type": "AdamW", "optimizer_args": ()}, "relative_step=True"),
        ("cosine", {"optimizer_type": "AdamWScheduleFree"}, "own schedule.*--lr_scheduler cosine"),
        ("cosine", NEEDED["adafactor"], "own schedule"),
        ("constant", NEEDED["adafactor"] | {"lr_warmup_steps": "5"}, "warmup_init=True"),
        ("adafactor", {"lr_scheduler_args": ("initial_lr=1",)}, "leave out --lr_scheduler_args"),
        ("constant", {"optimizer_type": "AdamWScheduleFree", "lr_scheduler_type": "StepLR"}, "_type StepLR"),
        ("cosine", {"lr_scheduler_type": "StepLR", "lr_scheduler_args": ("step_size=5",)}, "exclude each other"),
        ("constant", {"lr_scheduler_type": "StepLR"}, "step_size"),
        ("constant", {"lr_scheduler_type": "StepLR", "lr_scheduler_args": ("step_sice=5",)}, "did you mean step_size"),
        ("constant", {"lr_scheduler_type": "StepLR", "lr_warmup_steps": "5"}, "no warm-up"),
        ("constant", {"lr_scheduler_type": "StepLr"}, "did you mean StepLR"),
        ("constant", {"lr_scheduler_type": "torch.optim.SGD"}, "no LRScheduler"),
        ("constant", {"lr_scheduler_type": "no_such_package.Thing"}, "install"),
        ("constant", {"lr_scheduler_type": "ReduceLROnPlateau"}, "metrics"),
    ],
)
@pytest.mark.parametrize("total", [None, TOTAL])
def test_what_a_schedule_cannot_do_is_refused(name: str, options: dict[str, Any], told: str, total: int | None) -> None:
    with pytest.raises(InputError, match=told) as refused:
        check_schedule(chosen(name, **options), total=total)
    assert "\n" not in str(refused.value)


def test_what_only_the_length_can_tell_waits_for_it() -> None:
    settings = chosen("cosine", lr_warmup_steps="200")
    check_schedule(settings)
    with pytest.raises(InputError, match="outside the run's 100 steps"):
        check_schedule(settings, total=TOTAL)
