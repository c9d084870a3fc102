"""LoRA on a Wan DiT: the Linears inside its blocks, all or some."""

from collections.abc import Iterable, Mapping

from torch import nn

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


def check(settings: NetworkSettings) -> None:
    """InputError for `--network_args` that this network does not take."""
    arguments = lora_arguments(settings)
    compile_patterns(arguments.exclude_patterns, "exclude_patterns")
    compile_patterns(arguments.include_patterns, "include_patterns")
    if settings.dim_from_weights and (arguments.exclude_patterns or arguments.include_patterns):
        raise InputError(
            "--dim_from_weights trains the modules of its file, exclude_patterns and include_patterns choose others: "
            "leave out one of them"
        )


def check_model(settings: NetworkSettings, linears: Mapping[str, Shape]) -> None:
    """InputError for patterns and `--network_weights` that do not fit a model with these Linears, (out, in) by name;
    a warning for arguments that change nothing on it."""
    arguments, path = lora_arguments(settings), settings.network_weights
    if arguments.conv_dim is not None or arguments.conv_alpha is not None:
        log.warning("conv_dim and conv_alpha change nothing: the blocks of Wan have no convolutions")
    if settings.dim_from_weights:
        assert path is not None
        check_lora(path, linears)
        return
    names = _chosen(linears, arguments)
    exclude = [*arguments.exclude_patterns, *not_by_default(in_blocks(linears))]
    for pattern in without_effect(in_blocks(linears), exclude, arguments.include_patterns):
        log.warning(
            "include_patterns: %r changes nothing, since it only brings back what exclude_patterns leave out; to train "
            "these modules alone add \"exclude_patterns=['.*']\"",
            pattern,
        )
    if path is not None:
        _require_same(check_lora(path, linears), names, settings)


def attach(model: nn.Module, settings: NetworkSettings, *, seed: int = 0) -> Lora:
    """Freeze `model` and give each target a trainable pair; the model computes as before until it is trained, or as
    with the LoRA of `--network_weights`."""
    check(settings)
    model.requires_grad_(False)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return attach_to(linears, settings, seed=seed)


def attach_to(linears: Mapping[str, nn.Linear], settings: NetworkSettings, *, seed: int) -> Lora:
    """The same for these Linears of a model, by their names, whoever froze what of it."""
    deltas = None if settings.network_weights is None else read_lora(settings.network_weights, linears)
    if settings.dim_from_weights:
        assert deltas is not None
        sizes = {name: _size(name, deltas[name]) for name in linears if name in deltas}
        chosen, lora_sizes = list(sizes), sizes
    else:
        chosen, lora_sizes = _chosen(linears, lora_arguments(settings)), None
        if deltas is not None:
            _require_same({name: len(delta.down) for name, delta in deltas.items()}, chosen, settings)
    adapter = Lora({name: linears[name] for name in chosen}, settings, seed=seed, sizes=lora_sizes)
    if deltas is not None:
        adapter.take(deltas)
    return adapter


def targets(model: nn.Module) -> dict[str, nn.Linear]:
    """The Linears inside `blocks` by dotted name, in the model's order."""
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {name: linears[name] for name in in_blocks(linears)}


def in_blocks(names: Iterable[str]) -> list[str]:
    """The names of what is inside `blocks`."""
    return [name for name in names if read_block_name(name) is not None]


def not_by_default(names: Iterable[str]) -> tuple[str, ...]:
    """Patterns of what `include_patterns` alone choose: of a VACE model the base's blocks and the projections between
    both stacks (DiffSynth-Studio's recipe)."""
    is_vace = any(part.stack == VACE for part in map(read_block_name, names) if part is not None)
    return _NOT_OF_VACE if is_vace else ()


def chosen_modules(settings: NetworkSettings, linears: Mapping[str, Shape]) -> list[str]:
    """The Linears that get a pair, of a model with these, (out, in) by name. InputError for what does not fit it."""
    if settings.dim_from_weights and settings.network_weights is not None:
        return list(check_lora(settings.network_weights, linears))
    return _chosen(linears, lora_arguments(settings))


def _chosen(linears: Iterable[str], arguments: LoraArguments) -> list[str]:
    names = in_blocks(linears)
    return trained_modules(names, arguments.exclude_patterns, arguments.include_patterns, not_by_default(names))


def _size(module: str, delta: LoraDelta) -> Size:
    rank = delta.down.shape[0]
    if delta.scale == 0:
        raise InputError(f"the LoRA's {module} has alpha 0, with which nothing is learnt: leave out --dim_from_weights")
    return Size.of(rank, delta.scale * rank)


def _require_same(ranks: Mapping[str, int], names: list[str], settings: NetworkSettings) -> None:
    """InputError unless a file with these ranks by module holds just the modules `names`, of the settings' dim."""
    what = f"--network_weights {settings.network_weights}"
    way = "choose the same with exclude_patterns, or give --dim_from_weights"
    for few, many, text in ((ranks, names, "lacks"), (names, ranks, "has")):
        if odd := [name for name in many if name not in few]:
            whose = "that this network has" if text == "lacks" else "that this network does not train"
            listed = ", ".join(odd[:10])
            raise InputError(f"{what} {text} {len(odd)} modules {whose}: {listed}; {way}")
    dims = sorted(set(ranks.values()))
    if dims != [settings.dim]:
        shown = ", ".join(map(str, dims))
        one = f"set --network_dim {dims[0]}, or " if len(dims) == 1 else ""
        raise InputError(f"{what} has dim {shown}, the network {settings.dim}: {one}give --dim_from_weights")
