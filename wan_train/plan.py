"""Estimate the memory of a run before loading weights: run the real code on the meta device and count every tensor."""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import psutil
import torch
from torch import Tensor, nn

from networks.adapter import Adapter
from networks.formats.files import changed_modules
from networks.settings import NetworkSettings
from wan_train.assemble import ModelSettings, attach_adapter, equip
from wan_train.errors import InputError
from wan_train.models.additions import extended_header
from wan_train.models.dit.dit import Dit
from wan_train.models.loading import linears_of, official_shapes, outline_dit
from wan_train.models.stacks import block_matrices
from wan_train.models.weights import dit_rename
from wan_train.placement.ledger import GRADIENTS, HOST, WORK, Ledger, OutlineLane
from wan_train.placement.settings import CompileSettings
from wan_train.placement.stream import Stream
from wan_train.quantization.stored import StoragePlan, plan_storage, read_scales
from wan_train.storage import Header

META = torch.device("meta")
_CGROUP = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True)
class Bytes:
    """Numbers of bytes on the device and in CPU RAM."""

    device: int = 0
    host: int = 0

    def __add__(self, other: "Bytes") -> "Bytes":
        return Bytes(self.device + other.device, self.host + other.host)


@dataclass(frozen=True)
class Needs:
    """Memory of each part of a run, in bytes. `weights` are the model's, without an `adapter`. `peak` is the maximum on
    the device of gradients, activations and the temporary memory of an optimizer step together, which do not peak at
    the same time."""

    weights: Bytes
    gradients: Bytes
    states: Bytes
    ema: Bytes
    activations: Bytes
    peak: int
    adapter: Bytes = Bytes()

    @property
    def total(self) -> Bytes:
        """Peak memory of the whole run."""
        kept = self.weights + self.adapter + self.states + self.ema
        return Bytes(kept.device + self.peak, kept.host + self.activations.host)

    def describe(self) -> str:
        """Describe the needs in one line, in GiB, with CPU RAM listed separately."""
        rows = {
            "weights": self.weights,
            "LoRA": self.adapter,
            "gradients": self.gradients,
            "optimizer states": self.states,
            "EMA": self.ema,
            "activations": self.activations,
        }
        told = ", ".join(f"{gib(part.device)} GiB of {name}" for name, part in rows.items() if part.device)
        away = ", ".join(f"{gib(part.host)} GiB of {name}" for name, part in rows.items() if part.host)
        beside = f"; in CPU RAM {away}, {gib(self.total.host)} GiB in total" if away else ""
        return f"needs {told}: at most {gib(self.total.device)} GiB at a time{beside}"

    def alternating_with(self, other: "Needs") -> "Needs":
        """Combine the needs of two models of which only one is trained at a time."""
        return Needs(
            self.weights + other.weights,
            _larger(self.gradients, other.gradients),
            self.states + other.states,
            self.ema + other.ema,
            _larger(self.activations, other.activations),
            max(self.peak, other.peak),
            self.adapter + other.adapter,
        )


def gib(count: int) -> str:
    """Format bytes as GiB with two decimals."""
    return f"{count / 2**30:.2f}"


def _larger(one: Bytes, other: Bytes) -> Bytes:
    return Bytes(max(one.device, other.device), max(one.host, other.host))


class Estimate(Protocol):
    """An estimate of the memory of a run."""

    @property
    def total(self) -> Bytes:
        """Peak memory of the whole run."""
        ...

    def describe(self) -> str:
        """Describe the parts of the estimate in one line."""
        ...


@dataclass(frozen=True)
class Way:
    """A way to save memory: an option, the part of the run that it reduces, and whether it is used already."""

    option: str
    part: Bytes
    is_used: bool = False


def largest_first(ways: Iterable[Way]) -> list[str]:
    """Return the options that are not used yet, those that reduce the largest part on the device first."""
    unused = [way for way in ways if not way.is_used]
    return [way.option for way in sorted(unused, key=lambda way: -way.part.device)]


def free_memory(device: torch.device) -> Bytes:
    """Return the free memory of a device, and this process's share of the free CPU RAM."""
    host = psutil.virtual_memory().available
    try:
        limit = _CGROUP.read_text().strip()
    except OSError:
        limit = "max"
    if limit.isdigit():
        host = min(host, int(limit) - psutil.Process().memory_info().rss)
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return Bytes(torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0, host // sharing)


def check_fits(needs: Estimate, free: Bytes, ways: Iterable[str], *, device_name: str) -> None:
    """Raise InputError if more memory is needed than is `free`. On a CPU, device and host share memory, and
    `free.device` is 0."""
    total = needs.total if free.device else Bytes(0, needs.total.device + needs.total.host)
    for need, there, where in ((total.device, free.device, device_name), (total.host, free.host, "the host")):
        if need > there:
            out = ", ".join(ways) or "a smaller model or smaller clips"
            raise InputError(
                f"not enough memory on {where}: needs {gib(need)} GiB, {gib(there)} GiB free ({needs.describe()}). "
                f"To reduce it: {out}"
            )


@dataclass(frozen=True)
class Outline:
    """A model on the meta device, prepared for training, and the ledger that counts the memory of its passes."""

    model: Dit
    adapter: Adapter
    stream: Stream
    ledger: Ledger

    @property
    def weights(self) -> Bytes:
        """Bytes of all parameters and buffers, including adapters."""
        return weights_of(self.model, self.stream)

    def passes(self, loss: Callable[[nn.Module], Tensor], parts: Iterable[Iterable[nn.Parameter]]) -> None:
        """Count the memory of one forward and backward pass. The gradients of a part are freed once all of them are
        computed."""
        hooks = [handle for part in parts for handle in self._watch(list(part))]
        # The slots are already counted as weights, and must not be counted again when they are filled.
        self.ledger.leave_out(iter((*self.model.parameters(), *self.model.buffers(), *self.stream.slots)))
        with self.ledger:
            loss(self.model.train()).backward()
        for handle in hooks:
            handle.remove()
        self.model.zero_grad()

    def _watch(self, part: list[nn.Parameter]) -> list[torch.utils.hooks.RemovableHandle]:
        missing = [len(part)]
        return [p.register_post_accumulate_grad_hook(partial(self._arrived, part, missing)) for p in part]

    def _arrived(self, part: list[nn.Parameter], missing: list[int], parameter: Tensor) -> None:
        assert parameter.grad is not None
        self.ledger.move(parameter.grad, GRADIENTS)
        missing[0] -= 1
        if missing[0] == 0:
            for member in part:
                member.grad = None

    @property
    def activations(self) -> Bytes:
        """Peak bytes besides weights and gradients."""
        return Bytes(self.ledger.most[WORK], self.ledger.most[HOST])


def outlined(
    settings: ModelSettings, network: NetworkSettings, *, dtype: torch.dtype | None, computing: torch.dtype | None
) -> Outline:
    """Build the model of a checkpoint and its trained parameters on the meta device, as `assemble_dit` and `finish_dit`
    would."""
    model = outlined_dit(settings, dtype=dtype, loras=[path for path, _ in network.base_loras])
    model.compute_dtype = computing or model.compute_dtype
    adapter = attach_adapter(model, network, settings.stream, seed=0, device=META)
    ledger = Ledger()
    stream = equip(model, replace(settings, compile=CompileSettings()), OutlineLane(ledger))
    return Outline(model, adapter, stream, ledger)


def outlined_dit(settings: ModelSettings, *, dtype: torch.dtype | None, loras: Iterable[str] = ()) -> Dit:
    """Build the model of a checkpoint, with these LoRA files merged, on the meta device."""
    header = extended_header(settings.dit, settings.init)
    model = outline_dit(settings.dit.dit, dtype=dtype, header=header, plan=storage_of(settings, header, loras))
    for module in model.modules():
        if hasattr(module, "attend"):
            module.attend = attend_like_a_kernel  # type: ignore[assignment]
    return model


def storage_of(settings: ModelSettings, header: Header, loras: Iterable[str] = ()) -> StoragePlan:
    """Plan from headers alone how matrices are quantised, as `assemble_dit` plans it when it merges these LoRA
    files."""
    shapes = official_shapes(header.shapes)
    touched = {module for path in loras for module in changed_modules(path, linears_of(shapes))}
    empty = {name: torch.empty(shape, dtype=header.dtypes[name], device=META) for name, shape in header.shapes.items()}
    scales = read_scales(empty, header, dit_rename(header.shapes), shapes)
    return plan_storage(header, block_matrices(shapes), scales, settings.weights, touched)


def weights_of(model: nn.Module, stream: Stream) -> Bytes:
    """Return the bytes of all parameters and buffers of a model, some of them streamed."""
    every = sum(size(tensor) for tensor in (*model.parameters(), *model.buffers()))
    return Bytes(every - stream.host_bytes + stream.device_bytes, stream.host_bytes)


def attend_like_a_kernel(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Compute attention, (B, L, N, D) and twice (B, S, N, D) to (B, L, N, D), keeping what fused kernels save for the
    backward pass: the inputs, the result and one value for each token and head. CPU and GPU kernels save the same."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    kernel = torch.ops.aten._scaled_dot_product_flash_attention
    if query.device.type == "cpu" or query.dtype == torch.float32:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    result: Tensor = kernel(q, k, v)[0]
    return result.transpose(1, 2)


def size(tensor: Tensor) -> int:
    """Return the bytes of a tensor's elements."""
    return tensor.numel() * tensor.element_size()
