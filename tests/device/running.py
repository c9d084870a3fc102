"""Run one case on the simulated device, and the same case on the CPU to compare with."""

import contextlib
import gc
import io
import json
import os
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import Tensor

from tests.device.cases import Case, caching
from tests.device.simulated.device import SimulatedCuda
from tests.device.simulated.runtime import Patch
from wan_train.cli import run
from wan_train.models.dit import rope
from wan_train.training import loop
from wan_train.training.optimizing import adamw8bit


@dataclass
class Result:
    """What a case showed; seconds are of CPU time.

    `waits` has the number of waits for the device in each training step, `difference` the largest difference to the
    CPU's losses, latents or caches, relative to their size.
    """

    code: int = -1
    error: str = ""
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    num_operators: int = 0
    peak: int = 0
    alive: dict[str, int] = field(default_factory=dict)
    findings: dict[str, int] = field(default_factory=dict)
    attention: dict[str, int] = field(default_factory=dict)
    waits: list[int] = field(default_factory=list)
    where_waited: dict[str, int] = field(default_factory=dict)
    compared: int = 0
    difference: float = 0.0
    output: str = ""


def run_case(case: Case, folder: Path, own: Path, *, patches: Sequence[Patch] = (), compare: bool = True) -> Result:
    """Run a case on the models in `folder`, writing to the folder `own`; with `compare`, on the CPU too."""
    result = Result()
    ours, theirs = own / "device", own / "cpu"
    ours.mkdir()
    theirs.mkdir()
    compare = compare and case.within is not None
    if case.reads:
        make_caches(case.reads, folder)
    for out in (ours, theirs) if case.before else ():
        run_on_cpu(case.before, folder, out)
    if compare:
        began = time.process_time()
        run_on_cpu(case, folder, theirs)
        result.cpu_seconds = time.process_time() - began
    _simulate(case, list(map(str, case.words(folder, ours))), result, patches)
    if compare and result.code == 0:
        result.compared, result.difference = compare_folders(ours, theirs)
    return result


def make_caches(task: str, folder: Path) -> None:
    """Encode the clips and captions of a task on the CPU, once."""
    cache = folder / f"cache_{task}"
    if not cache.exists():
        for case in (caching(task), caching(task, clips=False)):
            run_on_cpu(case, folder, cache)


def run_on_cpu(case: Case, folder: Path, out: Path) -> None:
    """Run a case without a device."""
    with _captured() as said:
        assert run(case.tool, list(map(str, case.words(folder, out)))) == 0, f"on the CPU: {said.getvalue()[-3000:]}"


def _simulate(case: Case, words: list[str], result: Result, patches: Sequence[Patch]) -> None:
    began = time.process_time()
    tables: OrderedDict[Any, Tensor] = OrderedDict()
    with SimulatedCuda() as cuda, ExitStack() as stack, _captured() as said:
        ours: list[Patch] = [
            (loop, "take_step", _counting(cuda, result)),
            (rope, "_tables", tables),  # kept from step to step, as without a dispatch mode
            (rope, "is_in_torch_dispatch_mode", lambda: False),
        ]
        for owner, name, value in (*patches, *ours):
            stack.enter_context(mock.patch.object(owner, name, value))
        try:
            result.code = run(case.tool, words)
        except Exception as problem:
            result.error = f"{type(problem).__name__}: {problem}"[:2000] + "\n" + traceback.format_exc()[-3000:]
            problem.__traceback__ = None
        _forget_runs()
        tables.clear()
        gc.collect()
        result.alive = cuda.memory.alive_by_place()
        result.peak, result.num_operators = cuda.memory.peak, cuda.num_operators
        result.attention, result.findings = dict(cuda.attention), dict(cuda.findings)
    result.output = said.getvalue()[-4000:]
    result.seconds = time.process_time() - began


def _counting(cuda: SimulatedCuda, result: Result) -> Callable[..., Any]:
    """Return the step of the training loop, which also counts its waits for the device."""
    take_step = loop.take_step

    def counted(*args: Any, **kwargs: Any) -> Any:
        before = cuda.queues.waits.copy()
        try:
            return take_step(*args, **kwargs)
        finally:
            waited = cuda.queues.waits - before
            result.waits.append(waited.total())
            result.where_waited = dict(waited)

    return counted


@contextlib.contextmanager
def _captured() -> Iterator[io.StringIO]:
    """Capture what a run says, and give it an accelerator and tables of its own."""
    _forget_runs()
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        with mock.patch.dict(os.environ, WAN_TRAIN_TRACEBACK="1"):
            yield said
    _forget_runs()


def _forget_runs() -> None:
    """Drop what lives as long as the process: accelerate's state, and tables on the device of a run."""
    AcceleratorState._reset_state(reset_partial_state=True)
    adamw8bit._table.cache_clear()


def compare_folders(ours: Path, theirs: Path) -> tuple[int, float]:
    """Return how many losses and tensors two runs have in common, and the largest relative difference."""
    pairs = list(zip(losses(ours), losses(theirs), strict=True))
    differences = [abs(one - other) / max(abs(other), 1e-12) for one, other in pairs]
    for path in sorted([*theirs.rglob("*_latent.safetensors"), *theirs.rglob("*_wan*.safetensors")]):
        differences += _tensor_differences(load_file(ours / path.relative_to(theirs)), load_file(path))
    return len(differences), max(differences, default=0.0)


def losses(folder: Path) -> list[float]:
    """Return the training and validation losses of the runs in a folder."""
    rows = [json.loads(line) for path in sorted(folder.rglob("*.metrics.jsonl")) for line in path.open()]
    return [row[name] for row in rows for name in ("loss", "validation_loss") if name in row]


def _tensor_differences(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> list[float]:
    assert ours.keys() == theirs.keys()
    return [
        float((ours[name].double() - theirs[name].double()).norm() / theirs[name].double().norm().clamp(min=1e-12))
        for name in theirs
        if theirs[name].is_floating_point()
    ]
