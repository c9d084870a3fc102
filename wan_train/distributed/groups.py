"""Process groups that generate a video together, and how they split its passes.

Ranks are ordered with Ulysses innermost, then ring, CFG and data parallelism, so that neighbours, which are usually on
one machine, exchange the most.
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

# Longer than any legitimate wait: others wait while the first process of a group decodes. A process that has ended is
# detected by `wan_train.distributed.watch`.
TIMEOUT = timedelta(hours=12)
RENDEZVOUS_TIMEOUT = timedelta(minutes=10)  # for all processes to start


@dataclass(frozen=True)
class Split:
    """This process's rank in a group that splits one kind of work; `group` is None for a single process."""

    size: int = 1
    rank: int = 0
    group: ProcessGroup | None = None


ALONE = Split()


@dataclass(frozen=True)
class Groups:
    """The groups of this process.

    `all` has all processes of the run, `whole` those that generate one video together, which are group `index` of
    `num_groups`; they are split into `cfg` halves, and each half splits tokens over `tokens` processes: `ulysses`
    inside of `ring`. `store` is the rendezvous store, None for a single process.
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
        """Return the number of processes that generate one video together."""
        return self.whole.size

    @property
    def is_first(self) -> bool:
        """Return whether this process decodes, writes and reports for its group."""
        return self.whole.rank == 0


def check_product(settings: ParallelSettings, num_processes: int) -> None:
    """Raise InputError if the product of the sizes is not the number of processes."""
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
            f"{num_processes} processes are running, but no option splits the work: give --ulysses_size {num_processes}"
            f" or --data_parallel {num_processes}, or start one process"
        )
    if asked != num_processes:
        shown = " x ".join(f"{flag} {size}" for flag, size in sizes.items() if size > 1)
        run = "1 process is running" if num_processes == 1 else f"{num_processes} processes are running"
        raise InputError(
            f"{shown} = {asked}, but {run}: start {asked} with torchrun --nproc_per_node {asked}, or give sizes whose"
            f" product is {num_processes}"
        )


def launched_device(device: torch.device) -> torch.device:
    """Return the device of this process: on accelerators, with several processes, that of its local rank.

    Raises InputError if the machine has fewer accelerators than processes.
    """
    place = find_place()
    if place.num_ranks == 1 or device.type == "cpu":
        return device
    if device.index is not None:
        raise InputError(
            f"--device {device} with {place.num_ranks} processes: each uses the device of its local rank, omit --device"
        )
    found = torch.accelerator.device_count()
    if place.local_rank >= found:
        raise InputError(
            f"no device for local rank {place.local_rank}, this machine has {found}: start at most {found} processes"
        )
    return torch.device(device.type, place.local_rank)


def join_store(place: Place) -> Store:
    """Join the rendezvous store of all processes. Raises RunError if that fails."""
    try:
        store, _, _ = next(rendezvous("env://", place.rank, place.num_ranks, timeout=RENDEZVOUS_TIMEOUT))
    except (dist.DistError, ValueError) as problem:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise RunError(
            f"process {place.rank} of {place.num_ranks} cannot join the others at {address}: {first_line(problem)}"
        ) from None
    store.set_timeout(TIMEOUT)
    return store


def make_groups(settings: ParallelSettings, device: torch.device, store: Store | None = None) -> Groups:
    """Initialise torch.distributed if several processes run (NCCL on GPUs, gloo on CPUs), and return the groups.

    `device` comes from `launched_device`, `store` from `join_store` if it has been called. Raises InputError from
    `check_product` before anything is initialised.
    """
    place = find_place()
    check_product(settings, place.num_ranks)
    if place.num_ranks == 1:
        return Groups(device=device)
    store = store or join_store(place)
    backend, named = "gloo", None
    if device.type != "cpu":  # tensors in host memory are exchanged too
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
    made = {tuple(range(place.num_ranks)): dist.group.WORLD}  # reuse groups: each communicator takes device memory

    def split(rows: torch.Tensor) -> Split:
        """Return this process's group of `rows` (groups, processes); every process creates all of them in the same
        order."""
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
