"""Attention backends over stand-ins for their packages: what they are given, and what is refused."""

import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from tests.unit.models.dit.test_dit import CONFIG, inputs, state
from wan_train.cli import parse
from wan_train.errors import InputError
from wan_train.models.dit import attention as backends
from wan_train.models.dit.attention import BACKENDS, attend_torch, attention, check_attention
from wan_train.models.dit.dit import Dit
from wan_train.models.dit.kernels import prefer_cudnn
from wan_train.models.loading import load_dit, set_attention
from wan_train.models.settings import ATTENTION_MODES

FOREIGN = ("xformers", "flash", "flash2", "flash3", "sageattn")
Calls = list[tuple[tuple[int, ...], tuple[int, ...], torch.dtype]]


def pretend(monkeypatch: pytest.MonkeyPatch, name: str, operator: Callable[..., Any]) -> None:
    """Put a package that has `operator` where the backend looks for its own."""
    backend = BACKENDS[name]
    parent = ""
    for part in backend.module.split("."):
        module = ModuleType(parent + part)
        monkeypatch.setitem(sys.modules, parent + part, module)
        parent += part + "."
    setattr(module, backend.function, operator)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """What the operators were called with; all of them compute by torch."""
    made: Calls = []

    def operator(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        made.append((tuple(query.shape), tuple(key.shape), query.dtype))
        return attend_torch(query, key, value)

    def sage(query: Tensor, key: Tensor, value: Tensor, *, tensor_layout: str) -> Tensor:
        assert tensor_layout == "NHD"
        assert query.shape == key.shape, "Sage is not to be trusted with other lengths"
        return operator(query, key, value)

    def flash3(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return operator(query, key, value), torch.zeros(1)

    for name in FOREIGN:
        pretend(monkeypatch, name, {"sageattn": sage, "flash3": flash3}.get(name, operator))
    return made


@pytest.fixture
def priorities() -> Iterator[list[int]]:
    before = torch._C._get_sdp_priority_order()
    yield before
    torch._C._set_sdp_priority_order(before)


def tensors(dtype: torch.dtype = torch.float32, num_keys: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    shapes = [(3, count, 4, 16) for count in (12, num_keys, num_keys)]
    query, key, value = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return query, key, value


def test_the_settings_name_every_backend() -> None:
    assert tuple(BACKENDS) == ATTENTION_MODES


@pytest.mark.parametrize(
    ("flag", "name"),
    [("--sdpa", "torch"), ("--xformers", "xformers"), ("--flash_attn", "flash"), ("--flash3", "flash3")],
)
def test_the_flags_of_old_commands_choose_the_mode(flag: str, name: str) -> None:
    from generate.settings import GenerateSettings

    line = ["--dit", "a", "--vae", "b", "--t5", "c", "--prompt", "d", "--save_path", "e", flag, "--split_attn"]
    settings = parse(GenerateSettings, line)
    assert (settings.dit.attn_mode, settings.dit.split_attn) == (name, True)


def test_two_flags_of_old_commands_are_refused_together() -> None:
    from generate.settings import GenerateSettings
    from wan_train.training.settings import TrainSettings

    for settings in (GenerateSettings, TrainSettings):
        with pytest.raises(InputError, match="--sdpa and --xformers both set --attn_mode: give one of them"):
            parse(settings, ["--xformers", "--dit", "x", "--sdpa"])


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_operators_get_tokens_before_heads_in_half_precision(name: str, dtype: torch.dtype, calls: Calls) -> None:
    attend = attention(name, dtype=dtype)
    calls.clear()
    query, key, value = tensors(dtype)
    out = attend(query, key, value)
    assert calls == [((3, 12, 4, 16), (3, 12, 4, 16), torch.bfloat16 if dtype == torch.float32 else dtype)]
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), attend_torch(*tensors()), atol=0.02, rtol=0.02)


@pytest.mark.parametrize("name", ["xformers", "flash", "flash3"])
def test_operators_are_tried_backwards_before_they_train(name: str, calls: Calls) -> None:
    attend = attention(name, training=True)
    assert {keys[1] for _, keys, _ in calls} == {200, 512, 257}, "tokens with themselves, with a text, with an image"
    query, key, value = tensors()
    attend(query.requires_grad_(), key, value).sum().backward()
    assert query.grad is not None and query.grad.dtype == torch.float32


def test_a_note_says_once_that_float32_is_narrowed(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    monkeypatch.setattr(backends.log, "info", lambda text, *parts: notes.append(text % parts))
    attend = attention("flash", dtype=torch.float32)
    for _ in range(3):
        attend(*tensors())
    attention("flash", dtype=torch.bfloat16)
    attention("torch", dtype=torch.float32)
    assert len(notes) == 1 and "--attn_mode flash" in notes[0] and "bfloat16" in notes[0]


def test_sage_leaves_unequal_lengths_to_torch(calls: Calls) -> None:
    attend = attention("sageattn")
    calls.clear()
    query, key, value = tensors(num_keys=5)
    torch.testing.assert_close(attend(query, key, value), attend_torch(query, key, value), atol=0.02, rtol=0.02)
    assert calls == []


def test_sage_cannot_train(calls: Calls) -> None:
    with pytest.raises(InputError, match=r"--attn_mode sageattn does not support training.*no backward pass.*--sdpa"):
        check_attention("sageattn", device="cpu", training=True)
    assert calls == []


def test_what_a_package_lacks_itself_is_named(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sageattention.py").write_text("import tritonn_that_nobody_has")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        InputError,
        match="needs the package tritonn_that_nobody_has, which sageattention needs: ",
    ):
        check_attention("sageattn", device="cpu", training=False)


def test_a_package_for_another_torch_is_told_from_an_absent_one(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "flash_attn.py").write_text("raise ImportError('undefined symbol: _ZN3c10')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=r"flash-attn cannot be loaded \(undefined symbol: _ZN3c10\): use --sdpa"):
        check_attention("flash", device="cpu", training=False)


def fail(*_: Tensor, **__: Any) -> Tensor:
    raise NotImplementedError("No operator found for `memory_efficient_attention_forward`:\n  query : shape=...")


def no_gradient(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
    return attend_torch(query.detach(), key.detach(), value.detach())


def nonsense(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
    return torch.full_like(query, float("nan")) if query.shape != key.shape else attend_torch(query, key, value)


@pytest.mark.parametrize(
    ("operator", "training", "reason"),
    [(fail, False, "No operator found"), (no_gradient, True, "does not require grad"), (nonsense, False, "NaN or Inf")],
)
def test_a_package_that_imports_but_does_not_work_is_refused_in_one_line(
    operator: Callable[..., Tensor], training: bool, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, "xformers", operator)
    with pytest.raises(
        InputError, match=rf"--attn_mode xformers does not run on cpu \(.*{reason}.*\): use --sdpa"
    ) as e:
        check_attention("xformers", device="cpu", training=training)
    assert "\n" not in str(e.value)


def test_trying_an_operator_draws_no_random_number(calls: Calls) -> None:
    before = torch.get_rng_state()
    check_attention("flash", device="cpu", training=True)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("num_keys", [12, 5])
def test_a_split_batch_is_the_whole_to_the_bit(num_keys: int) -> None:
    whole, split = attention("torch"), attention("torch", split=True)
    results = []
    for attend in (whole, split):
        given = [part.requires_grad_() for part in tensors(num_keys=num_keys)]
        out = attend(*given)
        results.append([out, *torch.autograd.grad(out.square().sum(), given)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_split_batch_goes_to_the_operator_one_by_one(calls: Calls) -> None:
    attend = attention("flash", split=True)
    calls.clear()
    attend(*tensors())
    assert [query[0] for query, _, _ in calls] == [1, 1, 1]


def test_every_block_attends_by_what_is_set(calls: Calls) -> None:
    model: Dit = load_dit(state(), config={"num_heads": 2})
    expected = model(*inputs())
    set_attention(model, "flash", device="cpu", split=True)
    calls.clear()
    out = model(*inputs())
    assert len(calls) == 2 * 2 * CONFIG.num_layers  # samples, attentions of a block
    assert float((out - expected).norm() / expected.norm()) < 0.02


@pytest.mark.parametrize(("capability", "first"), [((9, 0), True), ((8, 9), False), ((10, 0), False)])
def test_cudnn_comes_first_on_hopper_only(
    capability: tuple[int, int], first: bool, priorities: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    prefer_cudnn(torch.device("cuda"))
    order = torch._C._get_sdp_priority_order()
    assert (order[0] == int(SDPBackend.CUDNN_ATTENTION)) == first
    assert sorted(order) == sorted(priorities)
    prefer_cudnn(torch.device("cpu"))
    assert torch._C._get_sdp_priority_order() == order


@pytest.mark.parametrize("name", ["flash3", "sageattn"])
def test_a_compiler_sees_through_to_the_operator(name: str, calls: Calls) -> None:
    attend = torch.compile(attention(name, split=True), backend="eager", fullgraph=True)
    for num_keys in (12, 5):
        given = tensors(num_keys=num_keys)
        torch.testing.assert_close(attend(*given), attend_torch(*given), atol=0.02, rtol=0.02)
    torch._dynamo.reset()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ATTENTION_MODES)
def test_backends_on_a_device(name: str, priorities: list[int]) -> None:
    """Each backend that is installed works forwards and, but for Sage, backwards; one that is not is refused."""
    for training in (False, name != "sageattn"):
        try:
            attend = attention(name, device="cuda", dtype=torch.bfloat16, training=training, head_width=16)
        except InputError as problem:
            assert "--sdpa" in str(problem)
            continue
        query, key, value = (part.cuda() for part in tensors(torch.bfloat16))
        torch.testing.assert_close(
            attend(query, key, value).cpu().float(), attend_torch(*tensors()), atol=0.05, rtol=0.05
        )
