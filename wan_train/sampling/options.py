"""What the declaration of a sampling option defines: its names, its reader, its field in requests and records.

Nothing here imports torch, because the command line imports the declarations.
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
    """What prompts, requests and records need to know about a sampling option: the `traits` of its `cli.option`.

    `letter` is its name in prompt lines, `table` in tables, `field` in requests; default: the option's name.
    `maximum` is its upper bound in prompts if the command line has none. `read` parses a text such as `example`;
    default: by type, range and choices. `task` names the attribute of `Variant` that is its default. `not_in_previews`
    is the reason why previews refuse it. `is_file`: records store the hashes of the files.

    Records contain an option if its value is not the request's default; with `always` in any case; with `beside` if
    they contain that other option. The recorded value is the request's attribute `recorded`; default: `field`.
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
    """A declared sampling option: its name on the command line, its annotation, description and traits."""

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
        """Whether a prompt line may repeat it."""
        return value_type(self.hint) == (str, "*")

    @property
    def reader(self) -> Read:
        """The function that parses its text in a prompt into the request's value."""
        return self.traits.read or make_reader(self.hint, self.described, maximum=self.traits.maximum)


# Records list these first, in this order; the others follow in order of declaration.
_RECORDED_FIRST = (
    *("prompt", "negative_prompt", "video_size", "video_length", "infer_steps", "guidance_scale", "flow_shift", "seed"),
    *("sample_solver", "rand_device", "guidance_scale_high_noise", "timesteps", "video_path", "denoising_strength"),
    *("image_path", "end_image_path", "exact_size", "one_frame_inference", "control_image_path"),
)


@cache
def sampling_options(settings: type) -> tuple[SamplingOption, ...]:
    """Return the options that a dataclass of sampling settings declares, in order."""
    return tuple(
        SamplingOption(field.name, hint, described, field.metadata["traits"] or Sampled())
        for field, described, hint in options(settings)
    )


def requested_values(settings: Any, variant: Variant) -> dict[str, Any]:
    """Return the values of settings by field of a request, with the task's defaults; fields that are None are omitted.

    Raises InputError for a text that cannot be parsed.
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
    """Return the options that fully specify a request, whatever the defaults: the inverse of `requested_values`."""
    declared = {option.name: option for option in sampling_options(settings)}
    defaults = {field.name: field.default for field in fields(request)}

    def is_stated(option: SamplingOption) -> bool:
        if option.traits.beside:
            return is_stated(declared[option.traits.beside])
        value = _recorded(request, option)
        return option.traits.always or (value not in (None, "", ()) and value != defaults[option.field])

    return {option.name: _written(request, option) for option in _in_records(settings) if is_stated(option)}


def named_files(stated: Any, settings: type) -> dict[str, tuple[str, ...]]:
    """Return the files that a request or an instance of `settings` names, by option."""
    named = {}
    for option in _in_records(settings):
        if option.traits.is_file:
            value = getattr(stated, option.name if isinstance(stated, settings) else option.field)
            named[option.name] = (value,) if isinstance(value, str) else tuple(value or ())
    return {name: paths for name, paths in named.items() if any(paths)}


def first_of(names: Sequence[str], found: Sequence[str]) -> list[str]:
    """Return `found` with the items of `names` first, in the order of `names`; the others keep their order."""
    return sorted(found, key=lambda name: names.index(name) if name in names else len(names))


def _in_records(settings: type) -> list[SamplingOption]:
    declared = {option.name: option for option in sampling_options(settings)}
    return [declared[name] for name in first_of(_RECORDED_FIRST, list(declared))]


def _recorded(request: Any, option: SamplingOption) -> Any:
    return getattr(request, option.traits.recorded or option.field)


def _written(request: Any, option: SamplingOption) -> Any:
    """Return the value in the form of the command line or JSON."""
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
