"""What a run is made of."""

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
    """What a process trains on: its batches in their order and what loads them, `batches_per_step` of them for a step,
    from `start` on for the length of the run."""

    batches: EpochBatches
    loader: DataLoader[Batch]
    batches_per_step: int
    length: Length
    start: Position

    @property
    def epoch_steps(self) -> int:
        """Number of optimizer steps in an epoch, the last perhaps of fewer batches."""
        return math.ceil(len(self.batches) / self.batches_per_step)


@dataclass(frozen=True)
class Reporting:
    """What a run shows of itself: `previewer` is there on processes with a share of the previews, `writer` and
    `mirror`, of a remote output folder, on the first process only."""

    preview: PreviewSettings
    previewer: Previewer | None
    writer: MetricsWriter | None
    mirror: Mirror | None = None


@dataclass(frozen=True)
class Run:
    """Everything that the loop works with, in the parts that functions take. `validator` is there where clips are held
    out."""

    model: TrainedModel
    optimizing: Optimization
    objective: Objective
    data: TrainingData
    saving: Saving
    reporting: Reporting
    validator: Validator | None
    profiler: Profiler
    stop: StopRequest = field(default_factory=StopRequest)
