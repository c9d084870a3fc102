"""What is made of the one declaration of a sampling option: its names, its reader, its place in requests and records.

Nothing here imports torch: the declarations are the command line's.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

from wan_train.cli import Option, is_single, options, value_type
from wan_train.errors import InputError
from wan_train.models.variants import Variant
from wan_train.sampling.values import Read, make_reader


@dataclass(frozen=True)
class Sampled:
    """What prompts, requests and records need to know of an option of a video: the `traits` of its `cli.option`.

    `letter` is its name in prompt lines, `table` in tables, `field` in requests; default: the option's name.
    `maximum` bounds it in prompts where the command line does not. `read` makes the request's value of a text such as
    `example`; default: by type, range and choices. `task` names the attribute of `Variant` that is its default.
    `not_in_previews` is the reason why previews refuse it. Of an option that `is_file` records keep the hashes.

    Records state an option where its value is not the request's default; with `always` in any case; with `beside`
    where they state that other option. They take the attribute `recorded` of the request; default: `field`.
    """

    letter: str = ""
    table: str = ""
    field: str = ""
    maximum: float | None = None
    read: Read | None = None
    example: str = ""
    task: str = ""
    not_in_previews: str = ""
    is_file: bool = False
    always: bool = False
    beside: str = ""
    recorded: str = ""


@dataclass(frozen=True)
class SamplingOption:
    """A sampling option as it is declared: its name on the command line, its annotation, description and traits."""

    name: str
    hint: Any
    described: Option
    traits: Sampled

    @property
    def letter(self) -> str:
        """Its name in a prompt line."""
        return self.traits.letter or self.name

    @property
    def table(self) -> str:
        """Its name in a table."""
        return self.traits.table or self.name

    @property
    def field(self) -> str:
        """Its name in a request."""
        return self.traits.field or self.name

    @property
    def is_repeated(self) -> bool:
        """Whether a prompt line may have it several times."""
        return value_type(self.hint) == (str, "*")

    @property
    def reader(self) -> Read:
        """From the text in a prompt to the request's value."""
        return self.traits.read or make_reader(self.hint, self.described, maximum=self.traits.maximum)


# The order in which records have had these; the others follow as they are declared.
_RECORDED_FIRST = (
    *("prompt", "negative_prompt", "video_size", "video_length", "infer_steps", "guidance_scale", "flow_shift", "seed"),
    *("sample_solver", "rand_device", "guidance_scale_high_noise", "timesteps", "video_path", "denoising_strength"),
    *("image_path", "end_image_path", "exact_size", "one_frame_inference", "control_image_path"),
)


@cache
def sampling_options(settings: type) -> tuple[SamplingOption, ...]:
    """List the options that a dataclass of sampling settings declares, in their order."""
    return tuple(
        SamplingOption(field.name, hint, described, field.metadata["traits"] or Sampled())
        for field, described, hint in options(settings)
    )


def requested_values(settings: Any, variant: Variant) -> dict[str, Any]:
    """Return what settings state, by field of a request, with the task's defaults; fields that stay None are left out.

    InputError for a text that cannot be read.
    """
    declaring: type = type(settings)
    values = {}
    for option in sampling_options(declaring):
        value = getattr(settings, option.name)
        if value is None and option.traits.task:
            value = getattr(variant, option.traits.task)
        elif isinstance(value, str) and option.traits.read:
            value = _read(option, option.traits.read, value)
        if value is not None:
            values[option.field] = value
    return values


def recorded_values(request: Any, settings: type) -> dict[str, Any]:
    """Return, by option, what states a request whatever the defaults are: the inverse of `requested_values`."""
    declared = {option.name: option for option in sampling_options(settings)}
    defaults = {field.name: field.default for field in fields(request)}

    def is_stated(option: SamplingOption) -> bool:
        if option.traits.beside:
            return is_stated(declared[option.traits.beside])
        value = _recorded(request, option)
        return option.traits.always or (value not in (None, "", ()) and value != defaults[option.field])

    return {option.name: _written(request, option) for option in _in_records(settings) if is_stated(option)}


def named_files(stated: Any, settings: type) -> dict[str, tuple[str, ...]]:
    """Return, by option of `settings`, the files that a request or an instance of that class names."""
    named = {}
    for option in _in_records(settings):
        if option.traits.is_file:
            value = getattr(stated, option.name if isinstance(stated, settings) else option.field)
            named[option.name] = (value,) if isinstance(value, str) else tuple(value or ())
    return {name: paths for name, paths in named.items() if any(paths)}


def first_of(names: Sequence[str], found: Sequence[str]) -> list[str]:
    """Sort those of `found` that are in `names` to the front, in the order of `names`; the others keep theirs."""
    return sorted(found, key=lambda name: names.index(name) if name in names else len(names))


def _in_records(settings: type) -> list[SamplingOption]:
    declared = {option.name: option for option in sampling_options(settings)}
    return [declared[name] for name in first_of(_RECORDED_FIRST, list(declared))]


def _recorded(request: Any, option: SamplingOption) -> Any:
    return getattr(request, option.traits.recorded or option.field)


def _written(request: Any, option: SamplingOption) -> Any:
    """The value as the command line, or JSON, has it."""
    value = _recorded(request, option)
    if isinstance(value, tuple):
        return ",".join(map(str, value)) if is_single(option.hint) else list(value)
    return str(value) if option.traits.read else value


def _read(option: SamplingOption, read: Read, text: str) -> Any:
    try:
        value = read(text)
    except ValueError as problem:
        if not option.traits.example:
            raise InputError(f"--{option.name} {text!r}: {problem}") from None
        value = None
    if not value and option.traits.example:
        raise InputError(f"--{option.name} {text!r} is not a list of numbers: write {option.traits.example}")
    return value
