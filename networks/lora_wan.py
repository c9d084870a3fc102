"""LoRA on a Wan DiT: all or some Linears in its blocks and, on request, the convolutions of a control model."""

import re
from collections.abc import Iterable, Mapping

from torch import nn

from networks.deltas.branch import Target, branch_targets
from networks.deltas.lora import LoraDelta
from networks.formats.files import check_lora, read_lora
from networks.formats.kinds import Shape
from networks.lora_adapter import Lora, Size
from networks.lora_arguments import LoraArguments, lora_arguments
from networks.selection import compile_patterns, trained_modules, without_effect
from networks.settings import NetworkSettings
from wan_train.errors import InputError
from wan_train.log import get_logger
from wan_train.models.stacks import BASE, VACE, read_block_name

log = get_logger(__name__)

_NOT_OF_VACE = (rf"{BASE}\..*", r".*\.(before|after)_proj")
_CONVOLUTIONS = r"ref_conv|control_adapter\..*"


def check(settings: NetworkSettings) -> None:
    """Raise InputError for `--network_args` that this network does not accept."""
    arguments = lora_arguments(settings)
    compile_patterns(arguments.exclude_patterns, "exclude_patterns")
    compile_patterns(arguments.include_patterns, "include_patterns")
    if settings.dim_from_weights and (arguments.exclude_patterns or arguments.include_patterns):
        raise InputError(
            "--dim_from_weights trains the modules of its file and cannot be combined with exclude_patterns or "
            "include_patterns: remove one of them"
        )


def check_model(settings: NetworkSettings, linears: Mapping[str, Shape]) -> None:
    """Raise InputError for patterns and `--network_weights` that do not fit a model with these Linears, (out, in) by
    name; warn about arguments that have no effect on it."""
    arguments, path = lora_arguments(settings), settings.network_weights
    if settings.dim_from_weights:
        assert path is not None
        check_lora(path, linears)
        _warn_of_conv_sizes(arguments, "--dim_from_weights uses the ranks of the file")
        return
    sizes = _sizes(linears, settings)
    if not any(map(_is_convolution, sizes)):
        _warn_of_conv_sizes(arguments, "no convolutions are trained; select them with include_patterns")
    names = _selectable(linears)
    exclude = [*arguments.exclude_patterns, *not_by_default(names)]
    for pattern in without_effect(names, exclude, arguments.include_patterns):
        log.warning(
            "include_patterns: %r has no effect: it only re-includes modules matched by exclude_patterns; to train "
            "only these modules, add \"exclude_patterns=['.*']\"",
            pattern,
        )
    if path is not None:
        _require_same(check_lora(path, linears), sizes, settings)


def attach(model: nn.Module, settings: NetworkSettings, *, seed: int = 0) -> Lora:
    """Freeze `model` and give each target a trainable pair; until trained, the model computes as before, or as with the
    LoRA of `--network_weights`."""
    check(settings)
    model.requires_grad_(False)
    return attach_to(branch_targets(model), settings, seed=seed)


def attach_to(modules: Mapping[str, Target], settings: NetworkSettings, *, seed: int) -> Lora:
    """Give each of these modules, by name, a trainable pair, without freezing anything."""
    deltas = None if settings.network_weights is None else read_lora(settings.network_weights, modules)
    if settings.dim_from_weights:
        assert deltas is not None
        sizes = {name: _size(name, deltas[name]) for name in modules if name in deltas}
    else:
        sizes = _sizes(modules, settings)
        if deltas is not None:
            _require_same({name: len(delta.down) for name, delta in deltas.items()}, sizes, settings)
    adapter = Lora({name: modules[name] for name in sizes}, settings, seed=seed, sizes=sizes)
    if deltas is not None:
        adapter.take(deltas)
    return adapter


def targets(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the Linears inside `blocks` by dotted name, in the model's order."""
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {name: linears[name] for name in in_blocks(linears)}


def in_blocks(names: Iterable[str]) -> list[str]:
    """Return the names of modules inside `blocks`."""
    return [name for name in names if read_block_name(name) is not None]


def not_by_default(names: Iterable[str]) -> tuple[str, ...]:
    """Return patterns of modules that are only trained if `include_patterns` match: convolutions and, in a VACE model,
    the base's blocks and the projections between both stacks (as in DiffSynth-Studio)."""
    is_vace = any(part.stack == VACE for part in map(read_block_name, names) if part is not None)
    return (_CONVOLUTIONS, *(_NOT_OF_VACE if is_vace else ()))


def _selectable(names: Iterable[str]) -> list[str]:
    """Return the names that patterns can select."""
    return [name for name in names if read_block_name(name) is not None or _is_convolution(name)]


def _is_convolution(name: str) -> bool:
    return re.fullmatch(_CONVOLUTIONS, name) is not None


def _warn_of_conv_sizes(arguments: LoraArguments, reason: str) -> None:
    if arguments.conv_dim is not None or arguments.conv_alpha is not None:
        log.warning("conv_dim and conv_alpha have no effect: %s", reason)


def _sizes(modules: Iterable[str], settings: NetworkSettings) -> dict[str, Size]:
    """Return the size of each pair, for the modules selected by the settings."""
    arguments, names = lora_arguments(settings), _selectable(modules)
    plain = Size.of(settings.dim, settings.network_alpha)
    convolution = Size.of(arguments.conv_dim or settings.dim, arguments.conv_alpha or settings.network_alpha)
    chosen = trained_modules(names, arguments.exclude_patterns, arguments.include_patterns, not_by_default(names))
    return {name: convolution if _is_convolution(name) else plain for name in chosen}


def chosen_modules(settings: NetworkSettings, modules: Mapping[str, Shape]) -> list[str]:
    """Return the names of the modules of a model that get a pair. Raises InputError if the settings do not fit it."""
    if settings.dim_from_weights and settings.network_weights is not None:
        return list(check_lora(settings.network_weights, modules))
    return list(_sizes(modules, settings))


def _size(module: str, delta: LoraDelta) -> Size:
    rank = delta.down.shape[0]
    if delta.scale == 0:
        raise InputError(f"the LoRA's {module} has alpha 0, so it would learn nothing: remove --dim_from_weights")
    return Size.of(rank, delta.scale * rank)


def _require_same(ranks: Mapping[str, int], sizes: Mapping[str, Size], settings: NetworkSettings) -> None:
    """Raise InputError unless a file with these ranks by module has exactly the modules of these sizes."""
    label = f"--network_weights {settings.network_weights}"
    way = "select the same modules with exclude_patterns, or use --dim_from_weights"
    for few, many, text in ((ranks, sizes, "lacks"), (sizes, ranks, "has")):
        if odd := [name for name in many if name not in few]:
            whose = "that this network has" if text == "lacks" else "that this network does not train"
            listed = ", ".join(odd[:10])
            raise InputError(f"{label} {text} {len(odd)} modules {whose}: {listed}; {way}")
    if any(ranks[name] != size.dim for name, size in sizes.items()):
        dims, ours = set(ranks.values()), {size.dim for size in sizes.values()}
        shown, wanted = (", ".join(map(str, sorted(each))) for each in (dims, ours))
        one = f"set --network_dim {shown}, or " if len(dims) == len(ours) == 1 else ""
        raise InputError(f"{label} has dim {shown}, the network {wanted}: {one}use --dim_from_weights")
