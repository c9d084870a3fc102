"""Streams and events without a device: vector clocks say which work is known to precede which.

A stream is a queue. Its clock has, for each queue, the number of operators of it that are known to be done before the
next operator of this stream starts. The host is one more queue, which every kernel follows, since it is launched from
there; the host knows what a stream has done only when it waits for it. This is the model of torch.cuda._sanitizer.
"""

from collections import Counter
from typing import Any

import torch

from tests.device.simulated.places import here, told

Clock = dict[str, int]


class Queues:
    """The queues of a device: the host, the default stream and those that the product makes."""

    def __init__(self) -> None:
        self.all: list[Stream] = []
        self.waits: Counter[str] = Counter()  # of the host for the device, by reason and place
        self.host = Stream(queues=self, name="host")
        self.default = self.current = Stream(queues=self, name="default")

    def wait_for_all(self) -> None:
        """Let the host wait for all streams."""
        for stream in self.all:
            self.host.join(stream.at())

    def note_wait(self, reason: str) -> None:
        """Count a wait of the host for the device."""
        self.waits[f"{reason} @ {told(here(3))}"] += 1


class Active:
    """The queues of the device that is simulated now: product code makes streams without naming a device."""

    queues: Queues


class Stream:
    """The interface of torch.cuda.Stream."""

    def __init__(self, device: Any = None, priority: int = 0, *, queues: Queues | None = None, name: str = "") -> None:
        self._queues = queues or Active.queues
        self.device = torch.device("cuda", 0)
        self.stream_id = self.cuda_stream = len(self._queues.all)
        self.name = name or f"stream{self.stream_id}"
        self.count = 0  # operators queued so far
        self.seen: Clock = {}
        self._queues.all.append(self)

    def at(self) -> Clock:
        """Return the clock of the point after the last operator of this stream."""
        return self.seen | {self.name: self.count}

    def join(self, clock: Clock) -> None:
        """Make all further operators follow those of a clock."""
        for name, count in clock.items():
            self.seen[name] = max(self.seen.get(name, 0), count)

    def knows(self, name: str, count: int) -> bool:
        """Return whether an operator of a queue precedes the next one of this stream."""
        return name == self.name or self.seen.get(name, 0) >= count

    def wait_event(self, event: "Event") -> None:
        self.join(self._queues.host.at())
        self.join(event.clock)

    def wait_stream(self, stream: "Stream") -> None:
        self.join(self._queues.host.at())
        self.join(stream.at())

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = event or Event()
        self.join(self._queues.host.at())
        event.clock = self.at()
        return event

    def synchronize(self) -> None:
        self._queues.host.join(self.at())
        self._queues.note_wait("stream.synchronize")

    def query(self) -> bool:
        return True

    def __enter__(self) -> "Stream":
        self._before, self._queues.current = self._queues.current, self
        return self

    def __exit__(self, *_: object) -> None:
        self._queues.current = self._before


class Event:
    """The interface of torch.cuda.Event: the clock of a point in a stream."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.clock: Clock = {}

    def record(self, stream: Stream | None = None) -> None:
        (stream or Active.queues.current).record_event(self)

    def wait(self, stream: Stream | None = None) -> None:
        (stream or Active.queues.current).wait_event(self)

    def synchronize(self) -> None:
        Active.queues.host.join(self.clock)
        Active.queues.note_wait("event.synchronize")

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: "Event") -> float:
        return 1.0
