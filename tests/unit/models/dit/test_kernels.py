"""torch's own attention kernels: one that does not work is not used, over stand-ins for broken ones."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from wan_train.models.dit import kernels
from wan_train.models.dit.attention import attention
from wan_train.models.dit.dit import Dit, DitConfig
from wan_train.models.dit.kernels import KERNELS, Attend, attend_by, attend_torch, disable_faulty, fault_of
from wan_train.models.loading import set_attention

CPU = torch.device("cpu")
FLASH = next(kernel for kernel in KERNELS["cuda"] if kernel.name == "flash")
MATH = attend_by(SDPBackend.MATH)


@pytest.fixture(autouse=True)
def switches(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the CPU be a device whose kernels are tested."""
    monkeypatch.setitem(KERNELS, "cpu", (FLASH,))
    disable_faulty.cache_clear()
    yield
    FLASH.switch(True)
    disable_faulty.cache_clear()


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    told: list[str] = []
    monkeypatch.setattr(kernels.log, "warning", lambda text, *parts: told.append(text % parts))
    return told


def pretend(monkeypatch: pytest.MonkeyPatch, broken: Attend) -> None:
    """Let torch's flash attention be this."""
    monkeypatch.setattr(kernels, "attend_by", lambda backend: broken if backend is SDPBackend.FLASH_ATTENTION else MATH)


def raises(*_: Tensor) -> Tensor:
    raise RuntimeError("cuDNN Frontend error: No valid execution plans built.\nmore")


def wrong(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return 1.5 * MATH(query, key, value)


def wrong_with_few_keys(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return MATH(query, key, value) * (1 if query.shape == key.shape else 0)


def wrong_with_keys(count: int) -> Attend:
    return lambda query, key, value: MATH(query, key, value) * (0 if key.shape[1] == count else 1)


def with_gradient(change: Callable[[Tensor], Tensor]) -> Attend:
    """Right forwards, with a gradient of the queries that `change` spoils."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        watched = query.view_as(query)
        if watched.requires_grad:
            watched.register_hook(change)
        return MATH(watched, key, value)

    return attend


def low_scores_give_nan(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    low = bool((query[..., 0] * key[:, :1, :, 0] < -100).all())
    return with_gradient(lambda grad: grad * float("nan") if low else grad)(query, key, value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_width", [12, 64, 128])
def test_kernels_that_work_are_used(dtype: torch.dtype, head_width: int, notes: list[str]) -> None:
    attend = attention("torch", dtype=dtype, training=True, head_width=head_width)
    assert attend is attend_torch
    assert FLASH.is_on() and notes == []


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (raises, "cuDNN Frontend error: No valid execution plans built"),
        (wrong, "relative error of 0.5"),
        (wrong_with_few_keys, "relative error of 1"),
        (wrong_with_keys(512), "relative error of 1"),  # of the text
        (wrong_with_keys(257), "relative error of 1"),  # of an image
        (with_gradient(lambda grad: grad * float("nan")), "NaN or Inf"),
        (with_gradient(torch.zeros_like), "relative error of 1"),
        (low_scores_give_nan, "NaN or Inf"),
    ],
)
def test_a_kernel_that_does_not_train_is_left_out(
    broken: Attend, reason: str, monkeypatch: pytest.MonkeyPatch, notes: list[str]
) -> None:
    pretend(monkeypatch, broken)
    with torch.no_grad():
        attention("torch", dtype=torch.bfloat16, training=True, head_width=32)
    assert not FLASH.is_on()
    (note,) = notes
    assert note.startswith("torch's flash attention is disabled on cpu for torch.bfloat16: ") and reason in note
    assert "\n" not in note


@pytest.mark.parametrize("training", [True, False])
def test_trainer_and_generator_leave_a_faulty_kernel_alike(
    training: bool, monkeypatch: pytest.MonkeyPatch, notes: list[str]
) -> None:
    pretend(monkeypatch, wrong)
    model = Dit(DitConfig(dim=24, ffn_dim=24, num_heads=2, num_layers=1))
    model.compute_dtype = torch.bfloat16
    set_attention(model, "torch", device=CPU, training=training, split=False)
    assert not FLASH.is_on()
    (note,) = notes
    assert note.startswith("torch's flash attention is disabled on cpu for torch.bfloat16: ")


def test_a_cpu_is_not_tested(monkeypatch: pytest.MonkeyPatch, notes: list[str]) -> None:
    monkeypatch.delitem(KERNELS, "cpu")
    pretend(monkeypatch, raises)
    attention("torch", training=True)
    assert FLASH.is_on() and notes == []


def test_where_nothing_trains_the_backward_pass_does_not_matter(
    monkeypatch: pytest.MonkeyPatch, notes: list[str]
) -> None:
    pretend(monkeypatch, with_gradient(torch.zeros_like))
    attention("torch", training=False)
    assert FLASH.is_on() and notes == []
    attention("torch", training=True)
    assert not FLASH.is_on()


def test_each_kernel_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[SDPBackend] = []

    def noting(backend: SDPBackend) -> Attend:
        tried.append(backend)
        return MATH

    monkeypatch.setattr(kernels, "attend_by", noting)
    for _ in range(3):
        attention("torch", training=True)
    assert tried.count(SDPBackend.FLASH_ATTENTION) == 1


def test_a_kernel_that_torch_would_not_take_is_no_fault(notes: list[str]) -> None:
    absent = next(kernel for kernel in KERNELS["cuda"] if kernel.name == "cuDNN")
    assert fault_of(absent, CPU, torch.float32, 32, training=True) is None


def test_a_kernel_that_is_off_stays_off(monkeypatch: pytest.MonkeyPatch, notes: list[str]) -> None:
    FLASH.switch(False)
    pretend(monkeypatch, raises)
    attention("torch", training=True)
    assert notes == [] and not FLASH.is_on()


def test_trying_draws_no_random_number() -> None:
    before = torch.get_rng_state()
    attention("torch", training=True)
    assert torch.equal(before, torch.get_rng_state())
