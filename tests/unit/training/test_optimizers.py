import pytest
import torch

from wan_train.cli import InputError
from wan_train.training.optimizers import check_optimizer, make_optimizer
from wan_train.training.schedules import make_schedule, warmup_steps
from wan_train.training.settings import SCHEDULES, OptimizerSettings


@pytest.mark.parametrize("name", ["AdamW", "adamw", "AdamW8bit", "adamw8bit", "SGD", "Adafactor", "RMSprop"])
def test_each_optimizer_lowers_a_loss(name: str) -> None:
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.ones(64, 128))
    target = torch.randn(64, 128)
    optimizer = make_optimizer([{"params": [weight]}], OptimizerSettings(optimizer_type=name, learning_rate=0.01))
    start = float((weight.detach() - target).square().mean())
    for _ in range(60):
        optimizer.zero_grad()
        (weight - target).square().sum().backward()
        optimizer.step()
    assert float((weight.detach() - target).square().mean()) < 0.95 * start


def test_arguments_reach_the_optimizer() -> None:
    settings = OptimizerSettings(optimizer_type="AdamW", optimizer_args=("weight_decay=0.5", "betas=(0.8, 0.9)"))
    group = make_optimizer([{"params": [torch.nn.Parameter(torch.zeros(1))]}], settings).param_groups[0]
    assert (group["weight_decay"], group["betas"], group["lr"]) == (0.5, (0.8, 0.9), 2e-6)


@pytest.mark.parametrize(
    ("name", "arguments", "told"),
    [
        ("AdamV", (), "did you mean Adam"),
        ("", (), "known are AdamW8bit"),
        ("AdamW", ("weight_decai=0.1",), "did you mean weight_decay"),
        ("AdamW", ("weight_decay",), "name=value"),
        ("AdamW", ("weight_decay=-1",), "weight_decay"),
        ("AdamW8bit", ("beta=1",), "betas"),
    ],
)
def test_what_an_optimizer_cannot_take_is_refused(name: str, arguments: tuple[str, ...], told: str) -> None:
    with pytest.raises(InputError, match=told):
        check_optimizer(OptimizerSettings(optimizer_type=name, optimizer_args=arguments))


@pytest.mark.parametrize(
    ("text", "steps"), [("0", 0), ("10", 10), ("0.05", 10), ("5%", 10), ("100%", 200), ("1", 1), ("1.0", 1)]
)
def test_warm_up_by_number_share_or_percentage(text: str, steps: int) -> None:
    assert warmup_steps(text, 200) == steps


@pytest.mark.parametrize("text", ["soon", "-1", "201", "2.5", "110%"])
def test_warm_ups_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="lr_warmup_steps"):
        warmup_steps(text, 200)


def rates(name: str, warmup: str) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = make_schedule(optimizer, OptimizerSettings(lr_scheduler=name, lr_warmup_steps=warmup), total=10)
    found = []
    for _ in range(10):
        found.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return found


def test_schedules_warm_up_and_then_go_their_way() -> None:
    for name in SCHEDULES:
        assert rates(name, "4")[:5] == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    assert rates("constant", "0") == [1.0] * 10
    assert rates("linear", "0") == pytest.approx([1 - i / 10 for i in range(10)])
    assert rates("cosine", "0")[5] == pytest.approx(0.5)
