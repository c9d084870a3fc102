"""Average the files saved by one run, after training (post-hoc EMA)."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from networks.formats.hashes import add_hashes
from networks.settings import AverageLoraSettings, AverageSettings
from networks.tools.saved_files import files_to_average
from wan_train.errors import InputError
from wan_train.log import get_logger
from wan_train.storage import check_writable, read_tensors, save_tensors

log = get_logger(__name__)


def main(settings: AverageLoraSettings) -> None:
    """Read, average and write. Raises InputError for files of different runs, and if the output cannot be written."""
    average = settings.average
    _check_paths(average)
    files = files_to_average(average)
    paths, headers = [str(saved.path) for saved in files], [saved.header for saved in files]
    for path, header in zip(paths[1:], headers[1:], strict=True):
        if header.shapes != headers[0].shapes or header.dtypes != headers[0].dtypes:
            raise InputError(f"{path} does not have the same tensors as {paths[0]}: use files of the same run")
    tensors: dict[str, Tensor] = {}
    for path, share in zip(paths, shares(average, len(paths)), strict=True):
        log.info("%s: decay %.3f", path, share)
        _take_in(tensors, dict(read_tensors(path)), share, path)
    dtypes = headers[-1].dtypes
    rounded = {name: tensor.to(dtypes[name]) for name, tensor in tensors.items()}
    save_tensors(average.output_file, rounded, add_hashes(rounded, headers[-1].metadata))
    log.info("wrote %s: average of %d files", average.output_file, len(paths))


def shares(settings: AverageSettings, num_files: int) -> Iterator[float]:
    """Yield, for each file, the share of the running average that is kept; 0 for the first.

    With `sigma_rel` it is (1 - 1/t)^(gamma + 1), where t is the number of files so far (Karras et al. 2024, equation
    127).
    """
    yield 0.0
    power = None if settings.sigma_rel is None else gamma(settings.sigma_rel) + 1
    last = settings.beta if settings.beta2 is None else settings.beta2
    for index in range(1, num_files):
        along = (index - 1) / max(num_files - 2, 1)
        yield settings.beta + (last - settings.beta) * along if power is None else (1 - 1 / (index + 1)) ** power


def gamma(sigma_rel: float) -> float:
    """Return the exponent of the power function EMA profile with relative standard deviation `sigma_rel`.

    sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) (Karras et al. 2024, equation 123), a cubic in gamma.
    """
    inverse = sigma_rel**-2
    roots = np.roots([1, 7, 16 - inverse, 12 - inverse])
    return float(max(roots.real[np.abs(roots.imag) < 1e-9]))


def _take_in(average: dict[str, Tensor], tensors: Mapping[str, Tensor], share: float, path: str) -> None:
    """Set average = share * average + (1 - share) * tensors, in float32; alpha tensors are not averaged."""
    for name, tensor in tensors.items():
        if name not in average:
            average[name] = tensor.float()
        elif not name.endswith(".alpha"):
            average[name] = average[name].lerp(tensor.float(), 1 - share)
        elif not torch.equal(average[name], tensor.float()):
            raise InputError(f"{path} has a different {name}: use files of the same run")


def _check_paths(settings: AverageSettings) -> None:
    if len(settings.path) < 2:
        raise InputError("only one file to average: give two or more")
    missing = [path for path in settings.path if not Path(path).is_file()]
    if missing:
        raise InputError(f"no such file: {missing[0]}")
    if settings.sigma_rel is not None and settings.beta2 is not None:
        raise InputError("--sigma_rel replaces --beta and --beta2: remove --beta2")
    output = Path(settings.output_file)
    if output.suffix != ".safetensors" or output.is_dir():
        raise InputError(f"--output_file {output} must be a file that ends in .safetensors")
    if output.exists() and any(output.samefile(path) for path in settings.path):
        raise InputError(f"--output_file {output} is one of the files to average: give another name")
    check_writable(output.parent)
