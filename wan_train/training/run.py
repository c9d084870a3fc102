"""The parts of a training run."""

import math
from dataclasses import dataclass, field

from torch.utils.data import DataLoader

from dataset.batching.batches import Batch
from dataset.batching.epochs import EpochBatches
from wan_train.profiling.profiler import Profiler
from wan_train.remote.mirror import Mirror
from wan_train.training.carried import Length
from wan_train.training.evaluating.validation import Validator
from wan_train.training.experts.models import TrainedModel
from wan_train.training.objective.objective import Objective
from wan_train.training.optimizing.optimization import Optimization
from wan_train.training.reporting.metrics import MetricsWriter
from wan_train.training.reporting.preview import Previewer
from wan_train.training.reporting.settings import PreviewSettings
from wan_train.training.saving.save import Saving
from wan_train.training.saving.state import Position
from wan_train.training.stopping import StopRequest


@dataclass(frozen=True)
class TrainingData:
    """The batches of a process, their loader, the number of batches per step, the length of the run and the position
    where training starts."""

    batches: EpochBatches
    loader: DataLoader[Batch]
    batches_per_step: int
    length: Length
    start: Position

    @property
    def epoch_steps(self) -> int:
        """Number of optimizer steps in an epoch; the last may have fewer batches."""
        return math.ceil(len(self.batches) / self.batches_per_step)


@dataclass(frozen=True)
class Reporting:
    """What reports on the run. `previewer` is None on processes without previews; `writer` and `mirror`, for a remote
    output folder, exist on the first process only."""

    preview: PreviewSettings
    previewer: Previewer | None
    writer: MetricsWriter | None
    mirror: Mirror | None = None


@dataclass(frozen=True)
class Run:
    """All parts of a run that the loop uses. `validator` is None if no clips are held out."""

    model: TrainedModel
    optimizing: Optimization
    objective: Objective
    data: TrainingData
    saving: Saving
    reporting: Reporting
    validator: Validator | None
    profiler: Profiler
    stop: StopRequest = field(default_factory=StopRequest)
