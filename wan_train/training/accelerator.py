"""Set up accelerate for launching, device placement and synchronisation; precision is handled by the model."""

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
from wan_train.precision import accumulate_in_float32, default_device, dtype_of
from wan_train.training.settings import LoopSettings, ProcessSettings

Value = TypeVar("Value")

# Without a GPU, importing bitsandbytes (accelerate does) warns of a 4-bit kernel that is not used here.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

# Variables that accelerate launch sets for anything but data parallelism, and the name of each.
UNSUPPORTED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
}
WAY_OUT = (
    "launch with --multi_gpu (distributed_type: MULTI_GPU in its configuration file), and use --blocks_to_swap or "
    "--optimizer_cpu_offload if memory is short"
)


def make_accelerator(loop: LoopSettings, processes: ProcessSettings) -> Accelerator:
    """Create the accelerator of this process. Autocast is disabled: the model controls its own data type."""
    handlers: list[KwargsHandler] = [
        AutocastKwargs(enabled=False),
        DistributedDataParallelKwargs(
            gradient_as_bucket_view=processes.ddp_gradient_as_bucket_view, static_graph=processes.ddp_static_graph
        ),
        InitProcessGroupKwargs(timeout=timedelta(minutes=processes.ddp_timeout)),
    ]
    accumulate_in_float32()
    accelerator = Accelerator(mixed_precision=loop.mixed_precision, kwargs_handlers=handlers)
    dynamo = accelerator.state.dynamo_plugin.backend
    if dynamo != DynamoBackend.NO:
        raise InputError(
            f"accelerate is set to compile with {dynamo.value}: set its dynamo_backend to no and use --compile"
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
    """Raise InputError if accelerate set up several processes as anything but plain data parallelism."""
    if distributed_type != DistributedType.NO and not distributed_type.value.startswith("MULTI_"):
        raise InputError(f"accelerate runs as {distributed_type.value}, which training does not support: {WAY_OUT}")


def agree_on_seed(seed: int | None) -> int:
    """Return the given seed, or one that the first process draws for all."""
    if seed is not None:
        return seed
    return from_first(random.SystemRandom().randrange(2**32))


def from_first(value: Value | None) -> Value:
    """Return the first process's value on all processes; the others' values are ignored."""
    box = [value]
    broadcast_object_list(box)
    given = box[0]
    assert given is not None
    return given


def from_all(value: Value) -> list[Value]:
    """Gather the values of all processes, by rank. Blocks until all have called it."""
    gathered: list[Value] = gather_object([value])
    return gathered


def launched_device() -> torch.device:
    """Return the device that `make_accelerator` will use, before it is called."""
    if _is_set("ACCELERATE_USE_CPU"):
        return torch.device("cpu")
    device = default_device()
    return device if device.type == "cpu" else torch.device(device.type, int(os.environ.get("LOCAL_RANK", "0")))


def launched_dtype(loop: LoopSettings) -> torch.dtype:
    """Return the data type that `make_accelerator` will have the model compute in, before it is called."""
    return dtype_of(loop.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower())


def prepare_model(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Return the model wrapped by accelerate. It is not moved, since some weights may be in CPU RAM on purpose.

    Frozen tensors are left out of the initial broadcast: they are equal on all processes already, and may be in a data
    type that cannot be sent.
    """
    named = chain(model.named_parameters(), model.named_buffers())
    frozen = [name for name, tensor in named if not tensor.requires_grad]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)
    return accelerator.prepare_model(model, device_placement=False)


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes")
