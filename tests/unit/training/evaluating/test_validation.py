import json
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dataset.batching.batches import CachedDataset, Sample
from dataset.batching.order import Pick, SampleKey
from dataset.config import DatasetConfig
from dataset.items import Clip, Item
from dataset.sources import ClipPlan
from wan_train.errors import InputError
from wan_train.models.variants import VARIANTS
from wan_train.training.evaluating import validation
from wan_train.training.evaluating.validation import (
    Data,
    Validator,
    check_validation,
    draw_stratum,
    evaluating,
    hold_out,
)
from wan_train.training.settings import LossSettings, TimestepSettings, ValidationSettings

ALONE = cast(
    Accelerator, SimpleNamespace(num_processes=1, process_index=0, is_main_process=True, device=torch.device("cpu"))
)


class Held(CachedDataset):
    """Two clips of each file, of two sizes, in memory; those of masked files have weights."""

    def __init__(self, num_files: int = 7, *, batch_size: int = 3, num_repeats: int = 1, masked: bool = False) -> None:
        folder = Path("held")
        config = DatasetConfig(
            folder,
            1,
            is_video=True,
            directory=folder,
            cache_directory=folder,
            batch_size=batch_size,
            num_repeats=num_repeats,
            drop_last=True,
        )
        items = [Item(config, folder / f"{number}.mp4", ("",)) for number in range(num_files)]
        clips = [Clip(item, start, (0,) * (start + 1), (16, 16), (16, 16)) for item in items for start in (0, 4)]
        super().__init__([ClipPlan(config, tuple(items), tuple(clips), ())])
        self._masked, self.asked = masked, list[int]()

    def __getitem__(self, index: int | SampleKey | Pick) -> Sample:
        assert isinstance(index, int)
        self.asked.append(index)
        key = self.keys[index]
        generator = torch.Generator().manual_seed(sum(key.item.encode()))
        latents = torch.randn(16, 2 if "-005" in key.item else 1, 2, 2, generator=generator)
        weights = torch.rand(latents.shape[1:], generator=generator) if self._masked else None
        return Sample(key, latents, torch.zeros(1, 1), None if weights is None else weights / weights.mean())


class Model(nn.Module):
    """Predicts a little wrong, and more so with dropout."""

    def __init__(self, scale: float = 0.3) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))
        self.dropout, self.frozen = nn.Dropout(0.5), nn.Dropout(0.5)
        self.frozen.eval()
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, noisy: Tensor, timestep: Tensor, context: list[Tensor]) -> Tensor:
        self.seen.append((noisy, timestep))
        return self.dropout(noisy) * self.scale


def make(dataset: CachedDataset | None = None, *, loss: LossSettings | None = None, **settings: Any) -> Validator:
    timesteps = TimestepSettings(timestep_sampling="shift", discrete_flow_shift=3.0)
    parts = ValidationSettings(**settings), timesteps, loss or LossSettings()
    return Validator(dataset or Held(), *parts, variant=VARIANTS["t2v-1.3B"])


def test_every_clip_is_measured_once_in_every_stratum_whatever_repeats_and_batches() -> None:
    tables = []
    for dataset in (Held(batch_size=1), Held(batch_size=3), Held(batch_size=100), Held(num_repeats=4)):
        tables.append(make(dataset).measure(Model(), ALONE))
        assert len(dataset.asked) == len(set(dataset.asked)) == 14
    assert tables[0].shape == (14, 8) and tables[0].dtype == np.float32
    for table in tables[1:]:
        np.testing.assert_allclose(table, tables[0], rtol=1e-6)


def test_the_loss_is_that_of_training_masks_and_kind_included() -> None:
    settings = LossSettings(loss_type="huber")
    plain, masked, huber = make(), make(Held(masked=True)), make(Held(masked=True), loss=settings)
    for validator, weighted, kind in ((plain, False, "mse"), (masked, True, "mse"), (huber, True, "huber")):
        found, model, row = validator.measure(Model(), ALONE), Model().requires_grad_(False), 0
        for batch in validation.cut_batches(Held()):
            for position in batch:
                sample = Held(masked=weighted)[position]
                for stratum in (0, 5):
                    drawn = draw_stratum(
                        [sample.key],
                        sample.latents.shape,
                        TimestepSettings(timestep_sampling="shift", discrete_flow_shift=3.0),
                        stratum=stratum,
                        num_strata=8,
                        seed=0,
                    )
                    t, noise = drawn.t.item(), drawn.noise[0]
                    predicted = model.scale * ((1 - t) * sample.latents + t * noise)
                    error = predicted - (noise - sample.latents)
                    each = (
                        error**2
                        if kind == "mse"
                        else nn.functional.huber_loss(
                            error, torch.zeros_like(error), reduction="none", delta=settings.huber_c
                        )
                    )
                    expected = (each * (1 if sample.weights is None else sample.weights)).mean()
                    assert found[row, stratum] == pytest.approx(float(expected), rel=1e-5)
                row += 1


def test_noise_and_t_are_the_same_at_every_evaluation_and_of_their_stratum() -> None:
    model, validator = Model(), make(validation_timesteps=4)
    for _ in range(2):
        validator.measure(model, ALONE)
    first, again = model.seen[: len(model.seen) // 2], model.seen[len(model.seen) // 2 :]
    for (x, t), (y, u) in zip(first, again, strict=True):
        assert torch.equal(x, y) and torch.equal(t, u)
    # The strata are equal shares of the distribution that is trained on: a shifted logit-normal.
    edges = [0, *(1000 * (3 * q / (1 + 2 * q)) for q in torch.special.ndtri(torch.tensor([0.25, 0.5, 0.75])).sigmoid())]
    for number, (_, t) in enumerate(first):
        stratum = number % 4
        assert (t >= edges[stratum] - 0.01).all()
        assert stratum == 3 or (t <= edges[stratum + 1] + 0.01).all()
    levels = torch.cat([t for _, t in first])
    assert len(levels.unique()) == len(levels)
    other = Model()
    make(validation_timesteps=4, validation_seed=1).measure(other, ALONE)
    assert not torch.equal(other.seen[0][0], model.seen[0][0])


def test_training_is_not_disturbed() -> None:
    model = Model()
    model.scale.grad = torch.tensor(5.0)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    make().evaluate(model, ALONE, step=0)
    assert torch.equal(torch_state, torch.get_rng_state())
    assert (numpy_state == np.random.get_state()[1]).all()
    assert (model.training, model.dropout.training, model.frozen.training) == (True, True, False)
    assert model.scale.grad == 5.0
    with pytest.raises(RuntimeError, match="lost"), evaluating(model):
        assert not torch.is_grad_enabled() and not model.dropout.training
        raise RuntimeError("lost")
    assert torch.is_grad_enabled() and model.dropout.training


@contextmanager
def listening() -> Iterator[list[logging.LogRecord]]:
    """What the module logs; its logger does not hand on to pytest's."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    validation.log.addHandler(handler)
    try:
        yield records
    finally:
        validation.log.removeHandler(handler)


def test_a_rise_is_announced_and_patience_ends() -> None:
    validator, stops = make(early_stop=2), []
    with listening() as records:
        for step, scale in ((0, 0.0), (10, 0.4), (20, -0.3), (30, -0.2), (40, 0.6)):
            validator.evaluate(Model(scale), ALONE, step=step)
            stops.append(validator.should_stop)
    assert stops == [False, False, False, True, False]
    told = [(record.levelname, record.getMessage()) for record in records]
    assert [level for level, _ in told] == ["INFO", "INFO", "WARNING", "WARNING", "INFO"]
    assert "at step 20: worse" in told[2][1]
    assert validator.history.best_step == 40
    assert validator.has_evaluated(40) and not validator.has_evaluated(30)
    assert not make().should_stop


def test_it_goes_on_from_a_state_unless_other_clips_are_held_out() -> None:
    first, second = make(), make()
    for step, scale in enumerate((0.0, -0.2)):
        first.evaluate(Model(scale), ALONE, step=step)
    kept = BytesIO()
    torch.save(first.state_dict(), kept)
    kept.seek(0)
    state = torch.load(kept, weights_only=True)
    second.load_state_dict(state)
    assert second.has_evaluated(1)
    assert second.evaluate(Model(0.1), ALONE, step=2) == first.evaluate(Model(0.1), ALONE, step=2)
    for other in (make(Held(num_files=6)), make(validation_timesteps=4), make(validation_seed=3)):
        with listening() as records:
            other.load_state_dict(state)
        assert "have changed" in records[0].getMessage()
        assert not other.history.means


def test_the_split_is_what_the_settings_say() -> None:
    whole = Held(num_files=10)

    def read(path: str) -> CachedDataset:
        assert path == "val.toml"
        return Held(num_files=3)

    assert hold_out(whole, ValidationSettings(), read) == Data(whole, None)
    data = hold_out(whole, ValidationSettings(validation_split=0.2), read)
    assert data.held_out and (len(data.training), len(data.held_out)) == (16, 4)
    with listening() as records:
        data = hold_out(whole, ValidationSettings(validation_config="val.toml"), read)
    assert data.training is whole and data.held_out and len(data.held_out) == 6
    assert "3 validation files are also in the training set" in records[0].getMessage()
    assert records[1].getMessage() == "validation: 6 clips of 3 files, too few for narrow confidence intervals"
    patient = ValidationSettings(validation_config="val.toml", validate_every_n_steps=1, early_stop=2)
    assert hold_out(whole, patient, read).held_out
    with pytest.raises(InputError, match="hold out two or more"):
        hold_out(whole, patient, lambda path: Held(num_files=1))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"validation_config": "v.toml", "validation_split": 0.1}, "leave out one"),
        ({"validation_split": 0.1, "early_stop": 3}, "--early_stop 3 needs evaluations"),
        ({"validate_every_n_steps": 3}, "need a validation set"),
        ({"validate_every_n_epochs": 3}, "need a validation set"),
    ],
)
def test_options_that_make_no_sense_together_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        check_validation(ValidationSettings(**settings))
    check_validation(ValidationSettings(validation_split=0.1, early_stop=2, validate_every_n_epochs=1))
    check_validation(ValidationSettings(validation_config="v.toml"))


PROCESS = """
import json, sys
from accelerate import Accelerator
from tests.unit.training.evaluating.test_validation import Held, Model, make
accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == 2
model = accelerator.prepare_model(Model())
found = make(Held(num_files=5)).evaluate(model, accelerator, step=0)
with open(sys.argv[1] + str(accelerator.process_index), "w") as file:
    json.dump({"row": found.row(), "passes": len(model.module.seen)}, file)
"""


def test_two_processes_measure_what_one_does(root: Path, tmp_path: Path) -> None:
    """Three batches over two processes: each makes as many passes, as a sharded model needs it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    places = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    places |= {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(root)}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(tmp_path / "row")],
            cwd=root,
            env=os.environ | places | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    told = [process.communicate(timeout=120)[1] for process in running]
    assert all((tmp_path / f"row{rank}").is_file() for rank in range(2)), told
    rows = [json.loads((tmp_path / f"row{rank}").read_text()) for rank in range(2)]
    assert rows[0] == rows[1]
    assert rows[0]["passes"] == 2 * 8
    alone = make(Held(num_files=5)).evaluate(Model(), ALONE, step=0).row()["validation"]
    assert rows[0]["row"]["validation"]["loss"] == pytest.approx(alone["loss"], rel=1e-6)
    assert rows[0]["row"]["validation"]["strata"] == pytest.approx(alone["strata"], rel=1e-6)
