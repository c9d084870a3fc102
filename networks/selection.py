"""Select the modules that a network acts on, by regular expressions on their dotted names."""

import re
from collections.abc import Iterable, Sequence

from wan_train.errors import InputError

# Always excluded by kohya's networks for Wan; matches none of the Linears inside blocks.
ALWAYS_EXCLUDED = r".*(patch_embedding|text_embedding|time_embedding|time_projection|norm|head).*"


def compile_patterns(patterns: Iterable[str], label: str) -> list[re.Pattern[str]]:
    """Return the compiled regular expressions of the option `label`. Raises InputError for an invalid one."""
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
    """Return the names to train: all except those that fully match a pattern of `exclude` and none of `include`.

    `include` alone restricts nothing. `by_default` are further patterns to exclude, which need not match. Raises
    Raises InputError for a pattern that matches no name, and if no name is left.
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
        raise InputError(f"exclude_patterns exclude all {len(names)} modules: exclude fewer")
    return kept


def without_effect(names: Iterable[str], exclude: Sequence[str], include: Sequence[str]) -> list[str]:
    """Return the patterns of `include` that re-include nothing, because `exclude` did not exclude it."""
    excluding = compile_patterns([*exclude, ALWAYS_EXCLUDED], "exclude_patterns")
    away = [name for name in names if _is_any(excluding, name)]
    return [pattern for pattern in include if not any(re.fullmatch(pattern, name) for name in away)]


def choose_modules(modules: Iterable[str], include: Sequence[str] = (), exclude: Sequence[str] = ()) -> list[str]:
    """Return the dotted names in which a pattern of `include` (none: all) and none of `exclude` is found.

    A pattern may be found in `blocks.0.self_attn.q` or in `lora_unet_blocks_0_self_attn_q`, the name in files. Raises
    Raises InputError for a pattern that is found nowhere, and if no name is left.
    """
    modules = list(modules)
    including = compile_patterns(include, "--include_patterns")
    excluding = compile_patterns(exclude, "--exclude_patterns")
    spellings = {name: (name, f"lora_unet_{name.replace('.', '_')}") for name in modules}
    for label, patterns in (("--include_patterns", including), ("--exclude_patterns", excluding)):
        for pattern in patterns:
            if not any(_is_found([pattern], names) for names in spellings.values()):
                raise InputError(
                    f"{label}: {pattern.pattern!r} matches none of {len(modules)} modules, which have names such as "
                    f"{next(iter(modules), 'nothing')}: correct or remove it"
                )
    kept = [
        name
        for name in modules
        if (not including or _is_found(including, spellings[name])) and not _is_found(excluding, spellings[name])
    ]
    if not kept:
        raise InputError(f"--include_patterns and --exclude_patterns select none of {len(modules)} modules: relax them")
    return kept


def _is_any(patterns: Iterable[re.Pattern[str]], name: str) -> bool:
    return any(pattern.fullmatch(name) for pattern in patterns)


def _is_found(patterns: Iterable[re.Pattern[str]], spellings: Iterable[str]) -> bool:
    return any(pattern.search(name) for pattern in patterns for name in spellings)


def _require_use(pattern: re.Pattern[str], names: Sequence[str], label: str) -> None:
    if any(pattern.fullmatch(name) for name in names):
        return
    inside = any(pattern.search(name) for name in names)
    way = f"use .*{pattern.pattern}.* to match part of a name" if inside else "correct or remove it"
    example = names[0] if names else "nothing"
    raise InputError(
        f"{label}: {pattern.pattern!r} fully matches none of {len(names)} modules, which have names such as "
        f"{example}: {way}"
    )
