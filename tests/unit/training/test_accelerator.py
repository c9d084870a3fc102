"""How accelerate is set up, and what of its configuration is refused."""

from collections.abc import Iterator
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import nn

from wan_train.errors import InputError
from wan_train.precision import dtype_of
from wan_train.training import accelerator as accelerators
from wan_train.training.accelerator import (
    UNSUPPORTED,
    check_launcher,
    launched_device,
    launched_dtype,
    make_accelerator,
    prepare_model,
)
from wan_train.training.settings import LoopSettings, ProcessSettings


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_options_of_several_processes_reach_accelerate() -> None:
    settings = ProcessSettings(ddp_timeout=3, ddp_gradient_as_bucket_view=True, ddp_static_graph=True)
    accelerator = make_accelerator(LoopSettings(mixed_precision="no"), settings)
    assert accelerator.ddp_handler.gradient_as_bucket_view and accelerator.ddp_handler.static_graph
    assert accelerator.init_handler.timeout == timedelta(minutes=3)
    assert not accelerator.autocast_handler.enabled


def test_others_are_waited_for_longer_than_a_preview_takes() -> None:
    accelerator = make_accelerator(LoopSettings(mixed_precision="no"), ProcessSettings())
    assert accelerator.init_handler.timeout >= timedelta(hours=2)


def test_compilation_is_ours_to_ask_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    with pytest.raises(InputError, match="set its dynamo_backend to no and use --compile"):
        make_accelerator(LoopSettings(mixed_precision="no"), ProcessSettings())


def test_the_launchers_word_for_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert launched_device() == torch.device("cpu")


@pytest.mark.parametrize(("given", "launched"), [("fp16", "bf16"), (None, "bf16"), (None, "no"), (None, None)])
def test_the_precision_is_known_before_the_launch(
    given: str | None, launched: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if launched:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    assert launched_dtype(LoopSettings(mixed_precision=given)) is dtype_of(given or launched or "no")


def test_what_is_frozen_is_not_exchanged() -> None:
    model = nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2))
    model.register_buffer("codes", torch.zeros(2, dtype=torch.float8_e4m3fn))
    accelerator = make_accelerator(LoopSettings(mixed_precision="no"), ProcessSettings())
    assert prepare_model(model, accelerator) is model
    assert model._ddp_params_and_buffers_to_ignore == ["0.weight", "0.bias", "codes"]


@pytest.mark.parametrize("variable", UNSUPPORTED)
def test_what_is_not_data_parallelism_is_refused_by_the_environment(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for each in UNSUPPORTED:
        monkeypatch.setenv(each, "false")
    check_launcher()
    monkeypatch.setenv(variable, "true")
    told = rf"accelerate is set to use {UNSUPPORTED[variable]} \({variable}\).*: launch with --multi_gpu"
    with pytest.raises(InputError, match=told) as refused:
        check_launcher()
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("kind", DistributedType)
def test_only_data_parallelism_trains(kind: DistributedType, monkeypatch: pytest.MonkeyPatch) -> None:
    no_compiling = SimpleNamespace(dynamo_plugin=SimpleNamespace(backend="NO"))
    made = SimpleNamespace(state=no_compiling, distributed_type=kind)
    monkeypatch.setattr(accelerators, "Accelerator", lambda **_: made)
    if kind.value in ("NO", "MULTI_CPU", "MULTI_GPU", "MULTI_XPU", "MULTI_NPU"):
        assert make_accelerator(LoopSettings(), ProcessSettings()) is made
    elif kind.value in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "XLA"):
        with pytest.raises(InputError, match=f"accelerate runs as {kind.value}, .*: launch with --multi_gpu"):
            make_accelerator(LoopSettings(), ProcessSettings())
