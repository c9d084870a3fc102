"""Storages of the simulated device and of the host beside it: who wrote and read them last, and how much is alive."""

import weakref
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from tests.device.simulated.places import Place, here, told
from tests.device.simulated.streams import Queues, Stream


class Access(NamedTuple):
    """An operator that read or wrote a storage: its queue, its number there, its name and place."""

    queue: str
    count: int
    operator: str
    place: Place

    def __str__(self) -> str:
        return f"{self.operator} @ {told(self.place, 4)}"


@dataclass(slots=True, eq=False)
class Storage:
    """A storage, its last write, the reads since, and the streams that the allocator was told of."""

    on_device: bool
    owner: Stream
    num_bytes: int
    made: Place
    written: Access | None = None
    read: dict[str, Access] = field(default_factory=dict)
    recorded: set[str] = field(default_factory=set)
    pinned: bool = False

    def accesses(self) -> list[Access]:
        """Return the last accesses."""
        return [*self.read.values(), *([self.written] if self.written else [])]


class Memory:
    """All storages that are alive, by the address of their C++ object."""

    def __init__(self, queues: Queues, findings: Counter[str]) -> None:
        self.queues, self.findings = queues, findings
        self.storages: dict[int, Storage] = {}
        self.numbers: dict[int, Tensor] = {}  # the numbers of each storage, flat bytes on the CPU
        self.locked: list[tuple[int, int]] = []  # pinned memory outside of torch's allocator: address and size
        self.alive = self.peak = 0  # bytes on the device
        self.peak_at = ""

    def find(self, fault: str) -> None:
        """Report a fault at this place of the product."""
        self.findings[f"{fault} @ {told(here())}"] += 1

    def watch(self, tensor: Tensor) -> Storage:
        """Return what is known of a tensor's storage, from now until it is freed."""
        storage, key = tensor.untyped_storage(), key_of(tensor)
        if key in self.storages:
            return self.storages[key]
        on_device = tensor.device.type == "cuda"
        owner = self.queues.current if on_device else self.queues.host
        known = Storage(on_device, owner, storage.nbytes(), here(6))
        self.storages[key] = known
        weakref.finalize(storage, self._freed, key)
        if on_device:
            self.alive += known.num_bytes
            self.note_peak("allocation", 0)
        return known

    def note_peak(self, operator: str, workspace: int) -> None:
        """Update the most memory so far, with the bytes that a kernel needs meanwhile."""
        if self.alive + workspace > self.peak:
            self.peak, self.peak_at = self.alive + workspace, f"{operator} @ {told(here(3))}"

    def resize(self, key: int, num_bytes: int) -> None:
        """Note the new size of a storage."""
        known = self.storages[key]
        if known.on_device:
            self.alive += num_bytes - known.num_bytes
            self.note_peak("resize", 0)
        known.num_bytes = num_bytes

    def alive_by_place(self) -> dict[str, int]:
        """Return the bytes on the device by the place that allocated them."""
        found: Counter[str] = Counter()
        for storage in self.storages.values():
            if storage.on_device and storage.num_bytes:
                found[told(storage.made)] += storage.num_bytes
        return dict(found)

    def is_pinned(self, tensor: Tensor) -> bool:
        """Return whether a storage is pinned."""
        known = self.storages.get(key_of(tensor))
        return known is not None and known.pinned

    def is_locked(self, address: int) -> bool:
        """Return whether an address is in memory that was pinned by cudaHostRegister."""
        return any(start <= address < start + size for start, size in self.locked)

    def _freed(self, key: int) -> None:
        known = self.storages.pop(key, None)
        self.numbers.pop(key, None)
        if known is None or not known.on_device:
            return
        self.alive -= known.num_bytes
        # The allocator gives the memory to the next one who asks on the owner's stream.
        for access in known.accesses():
            late = access.queue != "host" and not known.owner.knows(access.queue, access.count)
            if late and access.queue not in known.recorded:
                self.findings[
                    f"freed early: memory of {known.owner.name} while {access.queue} may still use it (no"
                    f" record_stream, no wait): {access}; allocated @ {told(known.made)}"
                ] += 1

    # accesses, in the order in which they are queued

    def read(self, tensor: Tensor, queue: Stream, operator: str, place: Place) -> None:
        """Note that an operator of a queue reads, and report a race with the last write."""
        known = self.storages.get(key_of(tensor)) or self.watch(tensor)
        access = Access(queue.name, queue.count, operator, place)
        if known.written is not None:
            self._check_order(queue, access, known.written, "reads what", "wrote")
        known.read[queue.name] = access

    def write(self, tensor: Tensor, queue: Stream, operator: str, place: Place) -> None:
        """Note that an operator of a queue writes, and report races with the last accesses."""
        known = self.storages.get(key_of(tensor)) or self.watch(tensor)
        access = Access(queue.name, queue.count, operator, place)
        if known.written is not None:
            self._check_order(queue, access, known.written, "overwrites what", "wrote")
        for earlier in known.read.values():
            self._check_order(queue, access, earlier, "overwrites what", "reads")
        known.read = {}
        known.written = access

    def forget_read(self, tensor: Tensor, queue: Stream) -> None:
        """Drop the read of a queue: the driver had copied the memory before it returned."""
        known = self.storages.get(key_of(tensor))
        if known is not None:
            known.read.pop(queue.name, None)

    def _check_order(self, queue: Stream, access: Access, earlier: Access, does: str, did: str) -> None:
        if not queue.knows(earlier.queue, earlier.count):
            self.findings[
                f"race: {access.operator} on {queue.name} {does} {earlier.queue} {did} without waiting for it:"
                f" {earlier} | {told(access.place)}"
            ] += 1


def key_of(tensor: Tensor) -> int:
    """Return the key of a tensor's storage."""
    return int(tensor.untyped_storage()._cdata)
