"""The keys of LoRA files: which module of the model each belongs to, and which part of its change it is.

Supported are kohya's underscore names (`lora_unet_`, with one underscore or two), dotted names with or without the
prefix of a wrapper (`diffusion_model.`, `transformer.`, `base_model.model.`), and official or diffusers module names.
The names of the parts of a change depend on its kind: `networks.formats.kinds`.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from networks.formats.kinds import KINDS, LORA, Part, Shape, read_key
from wan_train.errors import InputError
from wan_train.models.weights import diffusers_name, identify, official_name, strip_prefix

Choose = Callable[[Iterable[str]], Iterable[str]]  # selects from the official names of a file's modules

_UNDERSCORED = re.compile(r"lora_(?:unet__?|prior_unet_)(.+)")
_WRAPPERS = ("base_model.model.", "pipe.dit.")

# The Linears and Conv2d layers of every published Wan model: outside its blocks, and in each block.
_OUTER = (
    *("text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2", "time_projection.1"),
    *("img_emb.proj.1", "img_emb.proj.3", "head.head"),
    *("ref_conv", "control_adapter.conv"),
    *(f"control_adapter.residual_blocks.0.{leaf}" for leaf in ("conv1", "conv2")),
)
_INNER = (
    *(f"{part}.{leaf}" for part in ("self_attn", "cross_attn") for leaf in "qkvo"),
    *("cross_attn.k_img", "cross_attn.v_img", "ffn.0", "ffn.2", "before_proj", "after_proj"),
)
_BLOCK = re.compile(r"(?:^|[._])((?:vace_)?blocks)[._](\d{1,4})[._]")

# Keys of formats that are not supported.
_FOREIGN = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"\.hada_\w+$", "LoHa"),
        (r"\.lokr_\w+$", "LoKr"),
        (r"\.(dora_scale$|lora_magnitude_vector\b)", "DoRA"),
        (r"\.(diff|diff_b|diff_m|set_weight|reshape_weight|w_norm|b_norm)$", "full differences (diff)"),
        (r"\.lora_mid\.", "LoRA of convolutions with a middle factor"),
        (r"\.lora_(B|up)(\.default)?\.bias$", "LoRA with biases"),
        (r"\.[ab][12]\.weight$", "GLoRA"),
    )
)


@dataclass(frozen=True)
class Group:
    """The keys of one module's change by part name; `kind` is a row of `KINDS`, `alpha` may be None."""

    kind: str
    keys: dict[str, str]
    alpha: str | None


@dataclass(frozen=True)
class Match:
    """The changes in a file by official module name, and its unmatched keys."""

    groups: dict[str, Group]
    unmatched: list[str]

    def only(self, choose: Choose) -> "Match":
        """Return the changes of the modules that `choose` selects, including modules that the model lacks."""
        lacked = {key: read_key(key).written for key in self.unmatched}
        table = _module_table(possible_modules(self.unmatched))
        official = {key: table.get(_bare(written), _bare(written)) for key, written in lacked.items()}
        chosen = set(choose([*self.groups, *dict.fromkeys(official.values())]))
        groups = {module: group for module, group in self.groups.items() if module in chosen}
        return Match(groups, [key for key in self.unmatched if official[key] in chosen])

    def require_all(self, label: str) -> None:
        """Raise InputError if there are unmatched keys."""
        if self.unmatched:
            more = f" and {len(self.unmatched) - 10} more" if len(self.unmatched) > 10 else ""
            raise InputError(
                f"{label} does not fit the model: {len(self.groups)} modules match, "
                f"{len(self.unmatched)} keys do not: {', '.join(self.unmatched[:10])}{more}; use a LoRA for this model"
            )


def possible_modules(names: Iterable[str]) -> list[str]:
    """Return the official names of the modules that a LoRA can change, in a Wan model with the blocks named in these
    keys."""
    blocks = sorted({(match[1], int(match[2])) for name in names if (match := _BLOCK.search(name))})
    return [*_OUTER, *(f"{stem}.{index}.{leaf}" for stem, index in blocks for leaf in _INNER)]


def match_keys(shapes: Mapping[str, Shape], module_names: Iterable[str], label: str) -> Match:
    """Return the changes in a file, matched to modules.

    `module_names` are the model's, dotted: they are needed to resolve underscore names. Raises InputError for a file
    without changes, with an unsupported kind of change, with several kinds for one module, or with an incomplete one.
    """
    parts = {key: read_key(key) for key in shapes}
    _refuse_foreign((key for key, part in parts.items() if part.kind is None), label)
    if not any(part.kind for part in parts.values()):
        kind = identify(shapes)
        raise InputError(
            f"{label} is {'not a LoRA' if kind == 'unknown' else f'a {kind}, not a LoRA'}: give a LoRA file"
        )
    table = _module_table(module_names)
    found: dict[str, dict[str, str]] = {}
    unmatched = []
    for key, part in parts.items():
        module = table.get(_bare(part.written)) if part.name else None
        if module is None:
            unmatched.append(key)
        elif part.name in found.setdefault(module, {}):
            there = found[module][part.name]
            raise InputError(f"{label} has two tensors for {module}: {there} and {key}; keep one of them")
        else:
            found[module][part.name] = key
    return Match({module: _group(module, keys, parts, label=label) for module, keys in found.items()}, unmatched)


def is_pair(key: str) -> bool:
    """Return whether a tensor of this name is one half of a LoRA pair."""
    return read_key(key).kind == LORA


def _group(module: str, keys: dict[str, str], parts: Mapping[str, Part], *, label: str) -> Group:
    kinds = {kind for key in keys.values() if (kind := parts[key].kind)}
    if len(kinds) > 1:
        raise InputError(
            f"{label} has several kinds of changes for {module}, {', '.join(sorted(kinds))}: keep one of them"
        )
    if not kinds or KINDS[next(iter(kinds))].required - keys.keys():
        raise InputError(
            f"{label} only has {', '.join(keys.values())} for {module}: the file is incomplete, download it again"
        )
    own = {name: key for name, key in keys.items() if name != "alpha"}
    return Group(kinds.pop(), own, keys.get("alpha"))


def _bare(written: str) -> str:
    """Return a module's name as written, without prefixes and, if it is dotted, in official naming."""
    if underscored := _UNDERSCORED.fullmatch(written):
        return underscored[1]
    while True:
        shorter = strip_prefix(written)
        for wrapper in _WRAPPERS:
            shorter = shorter.removeprefix(wrapper)
        if shorter == written:
            return official_name(written)
        written = shorter


def _module_table(names: Iterable[str]) -> dict[str, str]:
    """Return the official names by themselves, and by the underscore forms of their official and diffusers names."""
    table: dict[str, str] = {}
    for name in names:
        table |= dict.fromkeys((name, name.replace(".", "_"), diffusers_name(name).replace(".", "_")), name)
    return table


def _refuse_foreign(keys: Iterable[str], label: str) -> None:
    for key in keys:
        for pattern, kind in _FOREIGN:
            if pattern.search(key):
                raise InputError(f"{label} has an unsupported format, {kind} ({key}): use a plain LoRA")
