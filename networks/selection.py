"""Which modules a network acts on, by regular expressions on their dotted names."""

import re
from collections.abc import Iterable, Sequence

from wan_train.errors import InputError

# What kohya's networks for Wan leave out whatever they are told; of a block's own Linears it names none.
ALWAYS_EXCLUDED = r".*(patch_embedding|text_embedding|time_embedding|time_projection|norm|head).*"


def compile_patterns(patterns: Iterable[str], label: str) -> list[re.Pattern[str]]:
    """The regular expressions that `label`, an option, holds; InputError for one that is none."""
    compiled = []
    for pattern in patterns:
        try:
            compiled.append(re.compile(pattern))
        except re.error as problem:
            raise InputError(f"{label}: {pattern!r} is not a valid regular expression ({problem})") from None
    return compiled


def trained_modules(
    names: Iterable[str], exclude: Sequence[str], include: Sequence[str], by_default: Sequence[str] = ()
) -> list[str]:
    """The names to train: all but those that a pattern of `exclude` and none of `include` is fully equal to.

    `include` alone restricts nothing. `by_default` are further patterns of what is excluded, which need not fit.
    InputError for a pattern that is equal to no name, and if nothing is left.
    """
    names = list(names)
    excluding = compile_patterns(exclude, "exclude_patterns")
    including = compile_patterns(include, "include_patterns")
    for label, patterns in (("exclude_patterns", excluding), ("include_patterns", including)):
        for pattern in patterns:
            _require_use(pattern, names, label)
    excluding += [re.compile(pattern) for pattern in (ALWAYS_EXCLUDED, *by_default)]
    kept = [name for name in names if not _is_any(excluding, name) or _is_any(including, name)]
    if not kept:
        raise InputError(f"exclude_patterns leave none of {len(names)} modules to train: exclude less")
    return kept


def without_effect(names: Iterable[str], exclude: Sequence[str], include: Sequence[str]) -> list[str]:
    """The patterns of `include` that bring nothing back, since `exclude` did not take it away."""
    excluding = compile_patterns([*exclude, ALWAYS_EXCLUDED], "exclude_patterns")
    away = [name for name in names if _is_any(excluding, name)]
    return [pattern for pattern in include if not any(re.fullmatch(pattern, name) for name in away)]


def choose_modules(modules: Iterable[str], include: Sequence[str] = (), exclude: Sequence[str] = ()) -> list[str]:
    """The dotted names that a pattern of `include` (none: all) and none of `exclude` is found in.

    A pattern may be found in `blocks.0.self_attn.q` or in `lora_unet_blocks_0_self_attn_q`, as a file calls it.
    InputError for a pattern that is found nowhere, and if nothing is left.
    """
    modules = list(modules)
    including = compile_patterns(include, "--include_patterns")
    excluding = compile_patterns(exclude, "--exclude_patterns")
    spellings = {name: (name, f"lora_unet_{name.replace('.', '_')}") for name in modules}
    for label, patterns in (("--include_patterns", including), ("--exclude_patterns", excluding)):
        for pattern in patterns:
            if not any(_is_found([pattern], names) for names in spellings.values()):
                raise InputError(
                    f"{label}: {pattern.pattern!r} is found in none of {len(modules)} modules, which are named like "
                    f"{next(iter(modules), 'nothing')}: correct it or leave it out"
                )
    kept = [
        name
        for name in modules
        if (not including or _is_found(including, spellings[name])) and not _is_found(excluding, spellings[name])
    ]
    if not kept:
        raise InputError(f"--include_patterns and --exclude_patterns leave none of {len(modules)} modules: loosen them")
    return kept


def _is_any(patterns: Iterable[re.Pattern[str]], name: str) -> bool:
    return any(pattern.fullmatch(name) for pattern in patterns)


def _is_found(patterns: Iterable[re.Pattern[str]], spellings: Iterable[str]) -> bool:
    return any(pattern.search(name) for pattern in patterns for name in spellings)


def _require_use(pattern: re.Pattern[str], names: Sequence[str], label: str) -> None:
    if any(pattern.fullmatch(name) for name in names):
        return
    inside = any(pattern.search(name) for name in names)
    way = f"write .*{pattern.pattern}.* for a part of it" if inside else "correct it or leave it out"
    example = names[0] if names else "nothing"
    raise InputError(
        f"{label}: {pattern.pattern!r} is the whole name of none of {len(names)} modules, which are named like "
        f"{example}: {way}"
    )
