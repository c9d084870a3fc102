"""Which processes make a video together, and how they split its passes.

Ranks are numbered with Ulysses innermost, then ring, then the halves of guidance, then data parallelism: neighbours,
most often on one machine, exchange the most.
"""

import os
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from wan_train.distributed.ranks import Place, find_place
from wan_train.distributed.settings import ParallelSettings
from wan_train.errors import InputError, RunError
from wan_train.packages import first_line

# Longer than any wait in good order: the first process of a group may decode for as long as it takes, and others wait
# for it. A process that has ended is noticed by `wan_train.distributed.watch`.
TIMEOUT = timedelta(hours=12)
RENDEZVOUS_TIMEOUT = timedelta(minutes=10)  # within which all processes have started


@dataclass(frozen=True)
class Split:
    """This process's place among those that share one thing out; `group` is None alone."""

    size: int = 1
    rank: int = 0
    group: ProcessGroup | None = None


ALONE = Split()


@dataclass(frozen=True)
class Groups:
    """The groups that this process is in.

    `all` are the processes of the run, `whole` those that make one video together, of which the `index`-th group of
    `num_groups` is this one; they are split into `cfg` halves of guidance, and each half splits tokens among `tokens`
    processes: `ulysses` inside of `ring`. `store` is what they told each other their addresses by, None alone.
    """

    place: Place = field(default_factory=Place)
    all: Split = ALONE
    whole: Split = ALONE
    cfg: Split = ALONE
    tokens: Split = ALONE
    ring: Split = ALONE
    ulysses: Split = ALONE
    index: int = 0
    num_groups: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    store: Store | None = None

    @property
    def num_in_video(self) -> int:
        """Number of processes that make one video together."""
        return self.whole.size

    @property
    def is_first(self) -> bool:
        """Whether this process writes, decodes and reports for its group."""
        return self.whole.rank == 0


def check_product(settings: ParallelSettings, num_processes: int) -> None:
    """InputError if the sizes do not multiply to the number of processes that run."""
    sizes = {
        "--ulysses_size": settings.ulysses_size,
        "--ring_size": settings.ring_size,
        "--cfg_size": settings.cfg_size,
        "--data_parallel": settings.data_parallel,
    }
    asked = 1
    for size in sizes.values():
        asked *= size
    if asked == 1 < num_processes:
        raise InputError(
            f"{num_processes} processes run, but no option shares the work: give --ulysses_size {num_processes} or"
            f" --data_parallel {num_processes}, or start one process"
        )
    if asked != num_processes:
        shown = " x ".join(f"{flag} {size}" for flag, size in sizes.items() if size > 1)
        run = "1 process runs" if num_processes == 1 else f"{num_processes} processes run"
        raise InputError(
            f"{shown} = {asked}, but {run}: start {asked} with torchrun --nproc_per_node {asked}, or give sizes whose"
            f" product is {num_processes}"
        )


def launched_device(device: torch.device) -> torch.device:
    """The device of this process: that of its rank on its machine, where several processes run on accelerators.

    InputError if the machine has fewer accelerators than processes.
    """
    place = find_place()
    if place.num_ranks == 1 or device.type == "cpu":
        return device
    if device.index is not None:
        raise InputError(
            f"--device {device} with {place.num_ranks} processes: each takes the device of its rank, leave --device out"
        )
    found = torch.accelerator.device_count()
    if place.local_rank >= found:
        raise InputError(
            f"process {place.local_rank} of this machine has no device, it has {found}: start at most that"
        )
    return torch.device(device.type, place.local_rank)


def join_store(place: Place) -> Store:
    """The store by which all processes meet. RunError if they do not."""
    try:
        store, _, _ = next(rendezvous("env://", place.rank, place.num_ranks, timeout=RENDEZVOUS_TIMEOUT))
    except (dist.DistError, ValueError) as problem:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise RunError(
            f"process {place.rank} of {place.num_ranks} does not meet the others at {address}: {first_line(problem)}"
        ) from None
    store.set_timeout(TIMEOUT)
    return store


def make_groups(settings: ParallelSettings, device: torch.device, store: Store | None = None) -> Groups:
    """Start torch.distributed where several processes run, NCCL on GPUs and gloo on CPUs, and return this one's groups.

    `device` is that of `launched_device`, `store` that of `join_store` where it has been called. InputError, before
    anything is started, from `check_product`.
    """
    place = find_place()
    check_product(settings, place.num_ranks)
    if place.num_ranks == 1:
        return Groups(device=device)
    store = store or join_store(place)
    backend, named = "gloo", None
    if device.type != "cpu":  # what is in host memory is exchanged too
        backend, named = f"cpu:gloo,{device.type}:{dist.get_default_backend_for_device(device)}", device
        torch.accelerator.set_device_index(device)
    prefixed = PrefixStore("groups", store)
    dist.init_process_group(
        backend, store=prefixed, rank=place.rank, world_size=place.num_ranks, timeout=TIMEOUT, device_id=named
    )
    return _arranged(settings, place, device, store)


def _arranged(settings: ParallelSettings, place: Place, device: torch.device, store: Store) -> Groups:
    sizes = (settings.data_parallel, settings.cfg_size, settings.ring_size, settings.ulysses_size)
    data = place.rank // (place.num_ranks // settings.data_parallel)
    ranks = torch.arange(place.num_ranks).view(sizes)
    made = {tuple(range(place.num_ranks)): dist.group.WORLD}  # each communicator takes memory of the device

    def split(rows: torch.Tensor) -> Split:
        """This process's group of `rows` (groups, processes); every process makes all of them, in the same order."""
        found = ALONE
        for row in map(tuple, rows.tolist()):
            if len(row) > 1 and row not in made:
                made[row] = dist.new_group(list(row), timeout=TIMEOUT)
            if len(row) > 1 and place.rank in row:
                found = Split(len(row), row.index(place.rank), made[row])
        return found

    return Groups(
        place=place,
        all=Split(place.num_ranks, place.rank, dist.group.WORLD),
        whole=split(ranks.flatten(1)),
        cfg=split(ranks.permute(0, 2, 3, 1).flatten(0, 2)),
        tokens=split(ranks.flatten(2).flatten(0, 1)),
        ring=split(ranks.permute(0, 1, 3, 2).flatten(0, 2)),
        ulysses=split(ranks.flatten(0, 2)),
        index=data,
        num_groups=settings.data_parallel,
        device=device,
        store=store,
    )
