import io
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from wan_train.training.optimizing.optimizer_state import (
    Portable,
    for_saving,
    for_training,
    learning_rates,
    load_portable_state,
    portable_state,
)
from wan_train.training.optimizing.optimizers import make_optimizer
from wan_train.training.optimizing.schedules import make_schedule
from wan_train.training.settings import SCHEDULES, OptimizerSettings

TOTAL = 12
CASES = {
    "AdamW": (),
    "AdamW8bit": (),
    "PagedAdamW8bit": (),
    "Lion": (),
    "Lion8bit": (),
    "Adafactor": (),
    "adafactor": ("relative_step=True", "beta1=0.9"),
    "Prodigy": ("use_bias_correction=True", "weight_decay=0.1"),
    "CAME": ("weight_decay=0.1",),
    "AdamWScheduleFree": ("warmup_steps=4", "weight_decay=0.1"),
    "SGD": ("momentum=0.9",),
    "RAdam": (),
    "Adamax": (),
}
# What each schedule needs beside its name.
SCHEDULE_OPTIONS: dict[str, dict[str, Any]] = {
    "cosine_with_min_lr": {"lr_scheduler_min_lr_ratio": 0.1},
    "warmup_stable_decay": {"lr_decay_steps": "25%"},
    "piecewise_constant": {"lr_scheduler_args": ("step_rules=1:3,0.5:6,0.1",)},
    "adafactor": {"optimizer_type": "Adafactor", "optimizer_args": ("relative_step=True",)},
}


def rate_of(name: str) -> float:
    return 1.0 if name == "Prodigy" else 1e-2


class Training:
    """A LoRA pair with its optimizer and schedule; a step's gradient depends on the parameters and the step alone."""

    def __init__(self, settings: OptimizerSettings, *, ratio: float = 1.0, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(1)
        self.down = torch.nn.Parameter((torch.randn(16, 512, generator=generator) / 22).to(dtype))
        self.up = torch.nn.Parameter(torch.zeros(512, 16, dtype=dtype))
        groups = [{"params": [self.down, self.up], "lr": settings.learning_rate}]
        if ratio != 1:
            groups = [
                {"params": [self.down], "lr": settings.learning_rate},
                {"params": [self.up], "lr": settings.learning_rate * ratio},
            ]
        self.optimizer: Any = make_optimizer(groups, settings)
        self.schedule = make_schedule(self.optimizer, settings, total=TOTAL)

    def step(self, index: int) -> None:
        generator = torch.Generator().manual_seed(100 + index)
        inputs = torch.randn(32, 512, generator=generator, dtype=torch.float32)
        self.optimizer.zero_grad()
        out = inputs @ self.down.float().T @ self.up.float().T
        (out - inputs.roll(1, 1)).square().mean().backward()
        self.optimizer.step()
        self.schedule.step()

    def weights(self) -> list[torch.Tensor]:
        return [self.down.detach().clone(), self.up.detach().clone()]


def kept(state: dict[str, Any]) -> dict[str, Any]:
    """As a file keeps it."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def flattened(value: Any, place: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {k: v for key, part in value.items() for k, v in flattened(part, f"{place}.{key}").items()}
    if isinstance(value, list | tuple):
        return {k: v for i, part in enumerate(value) for k, v in flattened(part, f"{place}.{i}").items()}
    return {place: value}


def assert_same_bits(one: Any, other: Any) -> None:
    first, second = flattened(one), flattened(other)
    assert first.keys() == second.keys()
    for place, value in first.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == second[place].dtype, place
            assert torch.equal(value.flatten().view(torch.uint8), second[place].flatten().view(torch.uint8)), place
        else:
            assert (type(value), value) == (type(second[place]), second[place]), place


def resume_in_the_middle(settings: OptimizerSettings, *, dtype: torch.dtype = torch.float32) -> None:
    """Assert that a run broken off and taken up again by a new one is the unbroken run, to the bit."""
    whole, broken = Training(settings, dtype=dtype), Training(settings, dtype=dtype)
    for index in range(6):
        whole.step(index)
        broken.step(index)
    state = kept(
        {
            "weights": broken.weights(),
            "optimizer": Portable(broken.optimizer).state_dict(),
            "schedule": Portable(broken.schedule).state_dict(),
        }
    )
    resumed = Training(settings, dtype=dtype)
    with torch.no_grad():
        resumed.down.copy_(state["weights"][0])
        resumed.up.copy_(state["weights"][1])
    Portable(resumed.optimizer).load_state_dict(state["optimizer"])
    Portable(resumed.schedule).load_state_dict(state["schedule"])
    assert_same_bits(portable_state(whole.optimizer), portable_state(resumed.optimizer))
    for index in range(6, TOTAL):
        whole.step(index)
        resumed.step(index)
        assert_same_bits(whole.weights(), resumed.weights())
    assert_same_bits(portable_state(whole.optimizer), portable_state(resumed.optimizer))
    assert_same_bits(portable_state(whole.schedule), portable_state(resumed.schedule))


@pytest.mark.filterwarnings("ignore:Paged optimizers")
@pytest.mark.parametrize("name", CASES)
def test_a_resumed_optimizer_is_the_unbroken_one_to_the_bit(name: str) -> None:
    settings = OptimizerSettings(optimizer_type=name, optimizer_args=CASES[name], learning_rate=rate_of(name))
    resume_in_the_middle(settings)


def training(settings: OptimizerSettings, *, one_by_one: bool) -> Training:
    made = Training(settings)
    if one_by_one:
        groups = [{"params": [made.down, made.up], "lr": settings.learning_rate}]
        made.optimizer = make_optimizer(groups, settings, step_contexts=())
        made.schedule = make_schedule(made.optimizer, settings, total=TOTAL)
    return made


@pytest.mark.parametrize("one_by_one", [False, True])
@pytest.mark.parametrize(("saved", "resumed"), [("none", "true"), ("true", "none")])
def test_a_state_is_resumed_with_the_kernels_of_the_run(saved: str, resumed: str, one_by_one: bool) -> None:
    """A state may come from another device, or from a run before its optimizer had a fused kernel."""
    settings = [
        OptimizerSettings(optimizer_type="AdamW", optimizer_args=(f"fused={fused}",), learning_rate=1e-2)
        for fused in (saved, resumed)
    ]
    broken, whole = (training(settings[0], one_by_one=one_by_one) for _ in range(2))
    for index in range(6):
        broken.step(index)
        whole.step(index)
    state = kept(Portable(broken.optimizer).state_dict())
    after = training(settings[1], one_by_one=one_by_one)
    with torch.no_grad():
        after.down.copy_(broken.down)
        after.up.copy_(broken.up)
    Portable(after.optimizer).load_state_dict(state)
    assert after.optimizer.param_groups[0]["fused"] is (True if resumed == "true" else None)
    assert after.optimizer.param_groups[0]["lr"] == state["param_groups"][0]["lr"]
    for index in range(6, TOTAL):
        whole.step(index)
        after.step(index)
    for one, other in zip(whole.weights(), after.weights(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert float(after.optimizer.state[after.down]["step"]) == TOTAL


def test_where_the_step_count_of_a_fused_optimizer_is() -> None:
    """Its kernel reads the count on the device of the weights, even while these are in CPU RAM."""
    weight = torch.nn.Parameter(torch.ones(2, 2))
    settings = OptimizerSettings(optimizer_type="AdamW", optimizer_args=("fused=true",))
    optimizer: Any = make_optimizer([{"params": [weight]}], settings, step_contexts=())
    weight.grad = torch.ones(2, 2)
    optimizer.step()
    state = portable_state(optimizer)
    optimizer.stepped_on = torch.device("meta")
    load_portable_state(optimizer, state)
    assert optimizer.state[weight]["step"].device.type == "meta"
    assert optimizer.state[weight]["exp_avg"].device.type == "cpu"


@pytest.mark.gpu
def test_a_resumed_paged_optimizer_is_paged_again() -> None:
    settings = OptimizerSettings(optimizer_type="PagedAdamW8bit", learning_rate=1e-2)
    weights = [torch.nn.Parameter(torch.ones(512, 512, device="cuda")) for _ in range(2)]
    first, second = (make_optimizer([{"params": [weight], "lr": 1e-2}], settings) for weight in weights)
    weights[0].grad = torch.linspace(-1, 1, 512 * 512, device="cuda").view(512, 512)
    first.step()
    load_portable_state(second, kept(portable_state(first)))
    assert all(second.state[weights[1]][name].is_paged for name in ("state1", "state2"))
    assert_same_bits(portable_state(first), portable_state(second))


@pytest.mark.parametrize("name", ["CAME", "Adafactor"])
def test_states_wider_than_their_weights_are_not_rounded(name: str) -> None:
    """torch would load them in the dtype of the weight."""
    settings = OptimizerSettings(optimizer_type=name, learning_rate=1e-2)
    resume_in_the_middle(settings, dtype=torch.bfloat16)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_resumed_schedule_is_the_unbroken_one(name: str) -> None:
    own_pace = name in ("piecewise_constant", "adafactor")
    options = {"lr_warmup_steps": "0" if own_pace else "25%"} | SCHEDULE_OPTIONS.get(name, {})
    resume_in_the_middle(OptimizerSettings(lr_scheduler=name, learning_rate=1e-2, **options))


@pytest.mark.parametrize(("name", "schedule"), [("Prodigy", "cosine"), ("AdamW8bit", "rex"), ("CAME", "linear")])
def test_pairs_of_optimizer_and_schedule_resume_too(name: str, schedule: str) -> None:
    """The first rate of a warm-up is 0, at which Prodigy does not begin."""
    options = {"lr_scheduler": schedule, "lr_warmup_steps": "3"}
    resume_in_the_middle(OptimizerSettings(optimizer_type=name, learning_rate=rate_of(name), **options))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("OneCycleLR", ("max_lr=0.1", f"total_steps={TOTAL + 1}")),
        ("CosineAnnealingLR", (f"T_max={TOTAL}",)),
        ("torch.optim.lr_scheduler.CyclicLR", ("base_lr=1e-4", "max_lr=1e-2")),
    ],
)
def test_schedules_of_torch_resume_too(name: str, arguments: tuple[str, ...]) -> None:
    settings = OptimizerSettings(lr_scheduler_type=name, lr_scheduler_args=arguments, learning_rate=1e-2)
    if "Cyclic" in name:
        settings = OptimizerSettings(
            lr_scheduler_type=name,
            lr_scheduler_args=arguments,
            learning_rate=1e-2,
            optimizer_type="SGD",
            optimizer_args=("momentum=0.9",),
        )
    resume_in_the_middle(settings)


def test_a_state_that_no_file_could_hold_is_named() -> None:
    class Holder:
        def state_dict(self) -> dict[str, Any]:
            return {"good": {1, 2}, "groups": [{"bad": object()}]}

    with pytest.raises(TypeError, match=r"state\.groups\.bad is a object"):
        portable_state(Holder())


def test_numbers_of_other_libraries_become_plain() -> None:
    import collections

    import numpy

    class Holder:
        def state_dict(self) -> dict[str, Any]:
            ordered = collections.OrderedDict(a=numpy.float32(0.5), b=numpy.float64(0.25), c=numpy.int64(3))
            return {"state": collections.defaultdict(dict, {0: ordered}), "flag": numpy.bool_(True)}

    state = portable_state(Holder())
    assert kept(state) == {"state": {0: {"a": 0.5, "b": 0.25, "c": 3}}, "flag": True}
    assert [type(value) for value in state["state"][0].values()] == [float, float, int]


@pytest.fixture
def free() -> Training:
    training = Training(OptimizerSettings(optimizer_type="AdamWScheduleFree", learning_rate=1e-2))
    for index in range(4):
        training.step(index)
    return training


@pytest.mark.parametrize("wrapped", [False, True])
def test_schedule_free_hands_out_its_average_and_takes_back_the_exact_bits(free: Training, wrapped: bool) -> None:
    optimizer = Accelerator(cpu=True).prepare_optimizer(free.optimizer) if wrapped else free.optimizer
    before, state = free.weights(), kept(portable_state(optimizer))
    beta = free.optimizer.param_groups[0]["betas"][0]
    with for_saving(optimizer):
        for parameter, held in zip([free.down, free.up], before, strict=True):
            z = free.optimizer.state[parameter]["z"]
            torch.testing.assert_close(parameter.detach() * beta + z * (1 - beta), held)  # y = beta x + (1 - beta) z
            assert not torch.equal(parameter, held)
    assert_same_bits(free.weights(), before)
    assert_same_bits(portable_state(optimizer), state)
    free.step(4)  # which it refuses in the other mode


def test_an_error_within_leaves_schedule_free_in_training(free: Training) -> None:
    before = free.weights()
    with pytest.raises(OSError, match="full"), for_saving(free.optimizer):
        raise OSError("disk full")
    assert_same_bits(free.weights(), before)
    assert free.optimizer.param_groups[0]["train_mode"]


def test_a_nested_use_stays_in_the_mode_of_the_outer(free: Training) -> None:
    with for_saving(free.optimizer):
        outer = free.weights()
        with for_saving(free.optimizer):
            assert_same_bits(free.weights(), outer)
        assert_same_bits(free.weights(), outer)
        assert not free.optimizer.param_groups[0]["train_mode"]


def test_other_optimizers_are_left_alone() -> None:
    training = Training(OptimizerSettings(learning_rate=1e-2))
    training.step(0)
    before = training.weights()
    for_training(training.optimizer)
    with for_saving(training.optimizer):
        assert_same_bits(training.weights(), before)


def test_the_rates_of_the_log() -> None:
    training = Training(OptimizerSettings(learning_rate=1e-2))
    assert learning_rates(training.optimizer) == {"lr": 1e-2}
    plus = Training(OptimizerSettings(learning_rate=1e-2), ratio=16)
    assert learning_rates(plus.optimizer) == {"lr/0": 1e-2, "lr/1": 0.16}
    plus.optimizer.param_groups[1]["name"] = "up"
    assert learning_rates(Accelerator(cpu=True).prepare_optimizer(plus.optimizer)) == {"lr/0": 1e-2, "lr/up": 0.16}


def test_the_rate_that_prodigy_finds_is_in_the_log() -> None:
    training = Training(OptimizerSettings(optimizer_type="Prodigy", learning_rate=0.5))
    assert learning_rates(training.optimizer) == {"lr": 0.5, "lr/d*lr": 0.5e-6}
    for index in range(10):
        training.step(index)
    assert learning_rates(training.optimizer)["lr/d*lr"] > 2 * 0.5e-6
    assert learning_rates(training.optimizer)["lr/d*lr"] == 0.5 * training.optimizer.param_groups[0]["d"]


def test_the_rate_of_a_schedule_free_warm_up_and_of_a_relative_step() -> None:
    settings = OptimizerSettings(
        optimizer_type="AdamWScheduleFree", learning_rate=1e-2, optimizer_args=("warmup_steps=4",)
    )
    training = Training(settings)
    found = []
    for index in range(6):
        training.step(index)
        found.append(learning_rates(training.optimizer)["lr"])
    assert found == pytest.approx([0.25e-2, 0.5e-2, 0.75e-2, 1e-2, 1e-2, 1e-2])
    arguments = ("relative_step=True", "scale_parameter=False", "warmup_init=True")
    relative = Training(OptimizerSettings(optimizer_type="Adafactor", optimizer_args=arguments, learning_rate=5.0))
    for index in range(3):
        relative.step(index)
    assert learning_rates(relative.optimizer)["lr"] == pytest.approx(3e-6)  # 1e-6 times the step
