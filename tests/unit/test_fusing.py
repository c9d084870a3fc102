"""Which blocks get compiled kernels, and that the kernels, compiled for the CPU, give what the plain functions give."""

import copy
import logging
import re
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code

from tests.parity.golden import relative_error
from tests.unit.test_compile import agree, model, step
from wan_train import fusing
from wan_train.models.dit.elementwise import PLAIN
from wan_train.models.dit.fused import PURE, Fused, Kernels
from wan_train.models.dit.norms import norm_rope
from wan_train.placement.settings import CompileSettings

CPU = torch.device("cpu")
COMPILER = pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler, g++, for the CPU")


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """What one test found about a device is not known to the next."""
    fusing.working_kernels.cache_clear()
    yield
    fusing.working_kernels.cache_clear()


@pytest.fixture
def with_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU counts as a device whose compiler works, at once."""
    monkeypatch.setattr(fusing, "WITH_COMPILER", ("cpu",))
    monkeypatch.setattr(fusing, "compiled", lambda function: function)


def is_fused(dit: torch.nn.Module) -> bool:
    block: Any = dit.blocks[0]  # type: ignore[index]
    fused = isinstance(block.elementwise, Fused)
    assert fused or (block.elementwise is PLAIN and block.self_attn.norm_k.norm_rope is norm_rope)
    return fused


def apply(settings: CompileSettings = CompileSettings()) -> bool:  # noqa: B008
    dit = model(1)
    fusing.apply_fusing(dit, settings, CPU)
    return is_fused(dit)


def test_a_device_with_a_compiler_gets_kernels_by_default(with_compiler: None) -> None:
    assert apply()


def test_they_can_be_turned_off(with_compiler: None) -> None:
    assert not apply(CompileSettings(no_fused_kernels=True))


def test_blocks_that_are_compiled_whole_need_none(with_compiler: None) -> None:
    assert not apply(CompileSettings(compile=True))


def test_the_cpu_keeps_torchs_operators() -> None:
    assert not apply()


def broken(function: Callable[..., Any]) -> Callable[..., Any]:
    def fail(*_: Any) -> Any:
        raise RuntimeError("Cannot find a working triton installation.\nMore information")

    return fail


def inexact(function: Callable[..., Any]) -> Callable[..., Any]:
    def off(*args: Any) -> Any:
        out = function(*args)
        return 1.2 * out if isinstance(out, Tensor) else [1.2 * part for part in out]

    return off


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [(broken, "Cannot find a working triton installation"), (inexact, "norm_and_rotate has a relative error of 0.2")],
)
def test_kernels_that_fail_are_left_with_a_word(
    with_compiler: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    compiler: Callable[..., Any],
    reason: str,
) -> None:
    monkeypatch.setattr(fusing, "compiled", compiler)
    with caplog.at_level(logging.WARNING):
        assert not apply()
        assert not apply()
    assert [reason in record.getMessage() for record in caplog.records] == [True]


def test_examples_are_there_for_every_kernel() -> None:
    assert set(fusing.examples(CPU, torch.float32)) == set(vars(Kernels()))


# The others are parts of these.
WHOLE = ("norm_and_rotate", "norm_and_rotate_backward", "add_normalise", "add_normalise_backward")


@COMPILER
@pytest.mark.parametrize(
    "name", [name if name in WHOLE else pytest.param(name, marks=pytest.mark.slow) for name in vars(PURE)]
)
def test_a_compiled_function_is_one_kernel_and_gives_the_same(name: str) -> None:
    """It is called once, and has no memory but that of its results and of one value per token: it reads its inputs and
    writes its results, as benchmarks/roofline.py counts."""
    torch._dynamo.reset()
    function, arguments = getattr(PURE, name), fusing.examples(CPU, torch.bfloat16)[name]
    result, codes = run_and_get_code(fusing.compiled(function), *arguments)
    results, expected = ([out] if isinstance(out, Tensor) else list(out) for out in (result, function(*arguments)))
    for ours, right in zip(results, expected, strict=True):
        assert ours.dtype is right.dtype
        assert relative_error(ours.float(), right.float()) < 5e-3
    (code,) = codes
    assert len(re.findall(r"^\s+cpp_fused\w*\(", code, re.MULTILINE)) == 1
    made = re.findall(r"= empty_strided_cpu\((\(.*?\)), ", code)
    wide = [shape for shape in made if not shape.endswith(" 1)")]
    assert len(wide) == sum(out.shape[-1] > 1 for out in results)


def test_one_graph_serves_all_numbers_of_tokens_with_and_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each function has its own, four of them two: with and without rope or gate. Above torch's limit of graphs for a
    function nothing more would be compiled."""
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(fusing.torch, "compile", partial(torch.compile, backend="eager"))
    dit = model(lora=True)
    fusing.set_kernels(dit.blocks, PURE.each(fusing.compiled))
    for size in ((2, 4, 6), (1, 8, 8)):
        step(dit, size)
        with torch.no_grad():
            step(dit, size)
    assert counters["stats"]["unique_graphs"] == len(vars(PURE)) + 4


@COMPILER
@pytest.mark.slow
def test_a_lora_step_with_compiled_kernels_for_several_sizes() -> None:
    torch._dynamo.reset()
    plain = model(lora=True)
    fused = copy.deepcopy(plain)
    fusing.set_kernels(fused.blocks, PURE.each(fusing.compiled))
    for size in ((2, 4, 6), (1, 8, 8), (3, 2, 4)):
        with torch._dynamo.config.patch(error_on_recompile=size != (2, 4, 6)):
            assert agree(step(fused, size), step(plain, size))
