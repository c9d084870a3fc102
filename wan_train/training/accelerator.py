"""accelerate, set up so that precision is ours: it launches, places and synchronises."""

import logging
import os
import random
from datetime import timedelta
from itertools import chain
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import (
    AutocastKwargs,
    DistributedDataParallelKwargs,
    DistributedType,
    DynamoBackend,
    InitProcessGroupKwargs,
    KwargsHandler,
    broadcast_object_list,
    gather_object,
)
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from wan_train.errors import InputError
from wan_train.precision import default_device, dtype_of
from wan_train.training.settings import LoopSettings, ProcessSettings

Value = TypeVar("Value")

# Whoever imports bitsandbytes without a GPU, accelerate too, is warned of a 4-bit kernel that nobody here asks for.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

# What accelerate launch sets for what is not data parallelism, and its name.
UNSUPPORTED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
}
WAY_OUT = (
    "launch with --multi_gpu (distributed_type: MULTI_GPU in its configuration file), and give --blocks_to_swap or "
    "--optimizer_cpu_offload where memory is short"
)


def make_accelerator(loop: LoopSettings, processes: ProcessSettings) -> Accelerator:
    """The accelerator of this process. Autocast stays off: the model itself says what it computes in."""
    handlers: list[KwargsHandler] = [
        AutocastKwargs(enabled=False),
        DistributedDataParallelKwargs(
            gradient_as_bucket_view=processes.ddp_gradient_as_bucket_view, static_graph=processes.ddp_static_graph
        ),
        InitProcessGroupKwargs(timeout=timedelta(minutes=processes.ddp_timeout)),
    ]
    accelerator = Accelerator(mixed_precision=loop.mixed_precision, kwargs_handlers=handlers)
    dynamo = accelerator.state.dynamo_plugin.backend
    if dynamo != DynamoBackend.NO:
        raise InputError(
            f"accelerate is set to compile with {dynamo.value}: set its dynamo_backend to no, give --compile"
        )
    check_distributed(accelerator.distributed_type)
    return accelerator


def check_launcher() -> None:
    """Raise InputError if the launcher's environment asks for anything but one process or data parallelism."""
    for variable, name in UNSUPPORTED.items():
        if _is_set(variable):
            raise InputError(
                f"accelerate is set to use {name} ({variable}), which training does not support: {WAY_OUT}"
            )


def check_distributed(distributed_type: DistributedType) -> None:
    """Raise InputError for what accelerate has made of several processes if it is not plain data parallelism."""
    if distributed_type != DistributedType.NO and not distributed_type.value.startswith("MULTI_"):
        raise InputError(f"accelerate runs as {distributed_type.value}, which training does not support: {WAY_OUT}")


def agree_on_seed(seed: int | None) -> int:
    """The given seed, or one drawn by the first process for all of them."""
    if seed is not None:
        return seed
    return from_first(random.SystemRandom().randrange(2**32))


def from_first(value: Value | None) -> Value:
    """What the first process gives; the others' own values are not looked at."""
    box = [value]
    broadcast_object_list(box)
    given = box[0]
    assert given is not None
    return given


def from_all(value: Value) -> list[Value]:
    """The values of all processes, in the order of their ranks; it waits for all of them."""
    gathered: list[Value] = gather_object([value])
    return gathered


def launched_device() -> torch.device:
    """The kind of device that `make_accelerator` will find, before it is called."""
    if _is_set("ACCELERATE_USE_CPU"):
        return torch.device("cpu")
    device = default_device()
    return device if device.type == "cpu" else torch.device(device.type, int(os.environ.get("LOCAL_RANK", "0")))


def launched_dtype(loop: LoopSettings) -> torch.dtype:
    """What `make_accelerator` will have the model compute in, before it is called."""
    return dtype_of(loop.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower())


def prepare_model(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """The model as accelerate runs it. It stays where it is: some of it may live in CPU RAM on purpose.

    What is frozen is the same on every process already, and may be in a dtype that cannot be sent, so it is not.
    """
    named = chain(model.named_parameters(), model.named_buffers())
    frozen = [name for name, tensor in named if not tensor.requires_grad]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)
    return accelerator.prepare_model(model, device_placement=False)


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes")
