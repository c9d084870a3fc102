"""Assemble a DiT in one fixed order: read, rename, merge, add, quantise, fill, attach; then wrap each block, from the
inside out: fuse, chunk, compile, shard or stream, recompute. Recomputation in the backward pass therefore streams
weights again. Sharding is configured on the empty model, so that no process ever holds all of it, and acts at its place
in this order."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch

from networks.adapter import Adapter, create
from networks.deltas.delta import Delta
from networks.formats.files import read_deltas
from networks.merge import merged
from networks.selection import choose_modules
from networks.settings import NetworkSettings
from wan_train.compile import Trial, apply_compile, apply_device_flags, check_compile
from wan_train.errors import InputError
from wan_train.fusing import apply_fusing
from wan_train.log import get_logger
from wan_train.models.additions import extended, extended_header
from wan_train.models.dit.attention import check_attention
from wan_train.models.dit.dit import Dit
from wan_train.models.loading import (
    Placement,
    build_dit,
    check_dit,
    linear_shapes,
    official_shapes,
    set_attention,
)
from wan_train.models.settings import DitSettings, InitSettings
from wan_train.models.stacks import all_blocks, block_matrices, block_names
from wan_train.models.variants import Variant
from wan_train.models.weights import dit_rename, renamed
from wan_train.placement.chunks import apply_chunks
from wan_train.placement.lanes import Lane, make_lane
from wan_train.placement.recompute import apply_recompute
from wan_train.placement.settings import (
    ActivationSettings,
    CompileSettings,
    RecomputeSettings,
    StreamSettings,
    check_recompute,
    check_stream,
)
from wan_train.placement.sharding import Sharding
from wan_train.placement.stream import Stream, apply_stream, streamed_blocks
from wan_train.precision import compute_dtype
from wan_train.quantization.schemes import SCALE, check_fp8_product, quantised, trial_linear
from wan_train.quantization.settings import FastWeightSettings, WeightSettings
from wan_train.quantization.stored import (
    check_storage,
    plan_storage,
    read_scales,
    scheme_names,
    storage_dtype,
    unscaled,
)
from wan_train.storage import read_header, read_tensors

log = get_logger(__name__)


@dataclass(frozen=True)
class ModelSettings:
    """All settings of how a DiT is assembled."""

    dit: DitSettings
    weights: WeightSettings = field(default_factory=WeightSettings)
    stream: StreamSettings = field(default_factory=StreamSettings)
    activations: ActivationSettings = field(default_factory=ActivationSettings)
    compile: CompileSettings = field(default_factory=CompileSettings)
    init: InitSettings = field(default_factory=InitSettings)

    @property
    def recompute(self) -> RecomputeSettings | None:
        """The settings of activation checkpointing; None if nothing is trained."""
        return self.activations if isinstance(self.activations, RecomputeSettings) else None


@dataclass(frozen=True)
class WeightedLora:
    """A LoRA file, its multiplier, and patterns that select its modules, see `networks.selection.choose_modules`."""

    path: str
    multiplier: float = 1.0
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def read(self, module_names: Iterable[str]) -> dict[str, Delta]:
        """Read the selected modules, by the model's own module names. Modules that are not selected need not fit the
        model."""
        return read_deltas(self.path, module_names, self.choose)

    def choose(self, modules: Iterable[str]) -> list[str]:
        """Return those of the file's modules that are selected."""
        return choose_modules(modules, self.include, self.exclude)


def check_model(
    settings: ModelSettings,
    variant: Variant,
    device: torch.device,
    *,
    computing: torch.dtype | None = None,
    flag: str = "--dit",
) -> str | None:
    """Raise InputError for a combination that cannot work, judging by the file's header and small trials on the device;
    return a warning if the model's size is not the task's. Matrix products use the data type `computing`, or the file's
    if None. `flag` is the option that names the file."""
    path, recompute = settings.dit.dit, settings.recompute
    if not path:
        raise InputError(f"{flag} is missing: give the DiT checkpoint")
    header = extended_header(settings.dit, settings.init, flag=flag)
    warning = check_dit(path, variant, flag=flag, header=header)
    check_storage(header, settings.weights, f"{flag} {path}")
    num_blocks = len(block_names(official_shapes(header.shapes)))
    check_stream(settings.stream, num_blocks, recompute=recompute.recompute if recompute else None)
    # In the data type that attention will compute in: older GPUs have kernels for float16 but not bfloat16.
    seen = compute_dtype(device, computing or storage_dtype(header))
    check_attention(settings.dit.attn_mode, device=device, dtype=seen, training=recompute is not None)
    if recompute is not None:
        check_recompute(recompute, settings.compile)
    names = scheme_names(settings.weights) if settings.compile.compile else ()
    linears = {name: trial_linear(name, device) for name in names}
    trial = Trial(linears, seen, training=recompute is not None)
    check_compile(settings.compile, device=device, blocks_to_swap=settings.stream.blocks_to_swap, trial=trial)
    if _multiplies_fp8(settings.weights):
        check_fp8_product(device)
    return warning


def _multiplies_fp8(weights: WeightSettings) -> bool:
    return isinstance(weights, FastWeightSettings) and weights.fp8_fast


def assemble_dit(
    settings: ModelSettings,
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
    computing: torch.dtype | None = None,
    loras: Sequence[WeightedLora] = (),
    sharding: Sharding | None = None,
) -> Dit:
    """Build the DiT, merging LoRA files into its weights in float32 and quantising them as they are read.

    `dtype` None keeps the file's data type, and `computing` None computes in it too. With `sharding`, each process
    keeps its shard of each block matrix as it is read, and gathers the matrix for the block's passes. Call `finish_dit`
    afterwards, once an adapter is attached or none will be.
    """
    assert sharding is None or not settings.stream.blocks_to_swap, "blocks are sharded or streamed"
    path = settings.dit.dit
    header = extended_header(settings.dit, settings.init)
    rename, shapes = dit_rename(read_header(path).shapes), official_shapes(header.shapes)
    names = linear_shapes(path) if loras else {}
    deltas = [(lora.read(names), lora.multiplier) for lora in loras]
    scales = read_scales(path, header, rename, shapes)
    touched = {module for delta, _ in deltas for module in delta}
    plan = plan_storage(header, block_matrices(shapes), scales, settings.weights, touched)
    tensors = unscaled(renamed(read_tensors(path), rename), scales, plan.kept)
    if deltas:
        tensors = merged(tensors, deltas, unrounded=plan.schemes)
    tensors = extended(tensors, settings.dit, settings.init)
    place = Placement(device, dtype, streamed_names(settings.stream, shapes), sharding)
    stream = quantised(tensors, plan.schemes, device)
    model = build_dit(header, stream, source=path, placement=place, plan=plan)
    model.compute_dtype = computing or model.compute_dtype
    training = settings.recompute is not None
    set_attention(model, settings.dit.attn_mode, device=device, training=training, split=settings.dit.split_attn)
    return model


def streamed_names(stream: StreamSettings, shapes: dict[str, tuple[int, ...]]) -> Callable[[str], bool]:
    """Return a predicate of the tensor names that stay in CPU RAM because their block is streamed to the device."""
    blocks = block_names(shapes)
    prefixes = tuple(f"{blocks[index]}." for index in streamed_blocks(len(blocks), stream.blocks_to_swap))
    streamed = {f"{module}.{leaf}" for module in block_matrices(shapes) for leaf in ("weight", SCALE)}
    return lambda name: name.startswith(prefixes) and name in streamed


def attach_adapter(
    model: Dit,
    network: NetworkSettings,
    stream: StreamSettings = StreamSettings(),  # noqa: B008
    *,
    seed: int,
    device: torch.device,
) -> Adapter:
    """Make the model trainable through an adapter. Trained parameters are on `device`, wherever the model is, except
    the model's own streamed weights."""
    named = dict(model.named_parameters())
    stays = streamed_names(stream, {name: tuple(parameter.shape) for name, parameter in named.items()})
    adapter = create(model, network, seed=seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not (name in named and stays(name)):
            parameter.data = parameter.data.to(device)
    return adapter


def finish_dit(model: Dit, settings: ModelSettings, device: torch.device) -> Stream:
    """Apply the settings that save memory or time to the blocks, and return the stream of their weights."""
    apply_device_flags(settings.compile)
    blocks, stream = all_blocks(model), equip(model, settings, make_lane(device))
    if 0 < settings.stream.blocks_to_swap <= settings.stream.block_swap_ring_size:
        log.warning(
            "--blocks_to_swap %d saves no memory: --block_swap_ring_size keeps that number of blocks on the device",
            settings.stream.blocks_to_swap,
        )
    elif settings.stream.blocks_to_swap:
        log.info(
            "%d of %d blocks are kept in CPU RAM (%.2f GiB) and streamed to the device on demand (%.2f GiB)",
            *(settings.stream.blocks_to_swap, len(blocks), stream.host_bytes / 2**30, stream.device_bytes / 2**30),
        )
    return stream


def equip(model: Dit, settings: ModelSettings, lane: Lane) -> Stream:
    """Apply fusing, chunking, compilation, streaming and recomputation to the blocks, copying with `lane`."""
    blocks = all_blocks(model)
    apply_fusing(model, settings.compile, lane.device)
    apply_chunks(blocks, settings.activations.ffn_chunks)
    apply_compile(blocks, settings.compile)
    stream = apply_stream(blocks, settings.stream, lane)
    if settings.recompute is not None:
        apply_recompute(blocks, settings.recompute, lane.device, lane)
    return stream
