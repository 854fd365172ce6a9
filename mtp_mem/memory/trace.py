"""What an instrument saw: the allocations and frees of one step, in order, and what follows from them.

A trace is data. Peaks, phases and categories are read from it afterwards, so that all views of a step agree.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

FORMAT = 1
"""Version of the format of timeline.json."""

Category = Literal[
    "parameters",
    "gradients",
    "optimizer",
    "trunk activations",
    "head activations",
    "hidden-state gradients",
    "logits",
    "gathered parameters",
    "communication buffers",
    "workspace",
    "live before the history",  # only in traces made from somebody else's recording
    "other",
]
CATEGORIES: tuple[Category, ...] = Category.__args__  # type: ignore[attr-defined]

Buffers = Callable[[tuple[Any, ...]], list[int]]
"""A rule for the buffers that a CUDA kernel takes from the allocator, which no dispatch mode sees.

The operator's arguments -> the buffers' sizes in bytes; all are live at once until the operator ends.
"""


@dataclass(slots=True)
class Storage:
    """One block of memory: its size, what it is for, and where it was made."""

    nbytes: int
    category: Category
    phase: str
    op: str  # the operator that made it; on CUDA file, line and function
    shape: tuple[int, ...]
    dtype: str
    name: str = ""  # where known: of parameters, gradients, optimizer state, the batch


class Event(NamedTuple):
    """`alloc` and `free` of the storage `key`; `move`: storage `key` takes over the block of storage `old`."""

    kind: Literal["alloc", "free", "move"]
    key: int
    old: int = -1


@dataclass(frozen=True)
class Peak:
    """The moment when most bytes were live."""

    nbytes: int
    event: int  # index into the trace's events; an index below the trace's `start`: before the step
    phase: str
    op: str
    by_category: dict[Category, int]  # sums to nbytes
    live: tuple[Storage, ...]  # what was live then, largest first


@dataclass
class Trace:
    """One step: the storages that were live before it, the events since, and every storage by its key."""

    storages: dict[int, Storage] = field(default_factory=dict)
    resident: list[int] = field(default_factory=list)  # keys live before the step
    events: list[Event] = field(default_factory=list)
    start: int = 0  # index of the step's first event; the events before it are of earlier steps
    made_by_first_step: list[int] | None = None  # keys in `resident` that a first step makes and keeps; None: unknown
    products: list[tuple[int, bool]] = field(default_factory=list)  # matrix products: (next event, whether in backward)

    @property
    def baseline(self) -> int:
        """Bytes live before the step: parameters, optimizer state, the batch."""
        return sum(storage.nbytes for storage in self.live_after(self.start - 1))

    def totals(self) -> list[int]:
        """Live bytes after each event, warm-up included."""
        live = sum(self.storages[key].nbytes for key in self.resident)
        totals = []
        for event in self.events:
            if event.kind == "alloc":
                live += self.storages[event.key].nbytes
            elif event.kind == "free":
                live -= self.storages[event.key].nbytes
            totals.append(live)
        return totals

    def peak(self) -> Peak:
        """The first moment at which the most bytes were live."""
        totals = self.totals()
        at = max(range(self.start, len(totals)), key=totals.__getitem__, default=-1)
        if at < 0 or totals[at] <= self.baseline:
            at = self.start - 1
        live = sorted(self.live_after(at), key=lambda s: -s.nbytes)
        by_category = {c: n for c in CATEGORIES if (n := sum(s.nbytes for s in live if s.category == c))}
        storage = self.storages[self.events[at].key] if at >= self.start else None
        return Peak(
            nbytes=sum(s.nbytes for s in live),
            event=at,
            phase=storage.phase if storage else "before the step",
            op=storage.op if storage else "",
            by_category=by_category,
            live=tuple(live),
        )

    def live_after(self, at: int) -> list[Storage]:
        """The storages that are live after event number `at`, in the order in which they were made."""
        return [self.storages[key] for key in self.keys_after(at)]

    def keys_after(self, at: int) -> list[int]:
        """The keys of the storages that are live after event number `at`, in the order in which they were made."""
        live = dict.fromkeys(self.resident)
        for event in self.events[: at + 1]:
            if event.kind == "free":
                del live[event.key]
            else:
                if event.kind == "move":
                    del live[event.old]
                live[event.key] = None
        return list(live)

    def phase_peaks(self) -> dict[str, int]:
        """The most bytes live in each phase, phases in the order of their first allocation."""
        peaks: dict[str, int] = {}
        since = slice(self.start, None)
        for event, total in zip(self.events[since], self.totals()[since], strict=True):
            if event.kind != "free":
                phase = self.storages[event.key].phase
                peaks[phase] = max(peaks.get(phase, 0), total)
        return peaks

    def step(self) -> "Trace":
        """The step alone: what was live before it counts as resident."""
        before, events = self.keys_after(self.start - 1), self.events[self.start :]
        products = [(at - self.start, backward) for at, backward in self.products if at >= self.start]
        return Trace(self.storages, before, events, 0, self.made_by_first_step, products)

    def to_json(self) -> dict[str, Any]:
        """The step alone: what was live before it, its events, and the storages of both, renumbered from 0."""
        step = self.step()
        before, events = step.resident, step.events
        keys = {key: i for i, key in enumerate([*before, *(e.key for e in events if e.kind != "free")])}
        return {
            "timeline": FORMAT,
            "storages": [dataclasses.asdict(self.storages[key]) for key in keys],
            "before": [keys[key] for key in before],
            "events": [[e.kind, keys[e.key], *([keys[e.old]] if e.kind == "move" else [])] for e in events],
        }

    @staticmethod
    def from_json(document: Any) -> "Trace":
        """The trace of a JSON document.

        Raises:
            ValueError: the document has another form, or no events, or frees a storage that is not live.
        """
        try:
            if document["timeline"] != FORMAT:
                raise ValueError(f"format {document['timeline']!r}; this version reads format {FORMAT}")
            storages = {i: Storage(**fields) for i, fields in enumerate(document["storages"])}
            trace = Trace(storages, list(document["before"]), [Event(*event) for event in document["events"]])
            trace.live_after(len(trace.events))
            made = [*trace.resident, *(event.key for event in trace.events if event.kind != "free")]
            unknown = set(made) - storages.keys()
            kinds = {event.kind for event in trace.events}
        except (TypeError, KeyError, AttributeError) as e:
            raise ValueError(f"not a step's storages and events: {e!r}") from None
        if unknown:
            raise ValueError(f"names storages that it does not list: {unknown}")
        for storage in storages.values():
            right_types = isinstance(storage.nbytes, int) and all(
                isinstance(text, str) for text in (storage.phase, storage.op, storage.name)
            )
            if not right_types or storage.category not in CATEGORIES or not 0 < storage.nbytes < 2**63:
                raise ValueError(f"not a storage: {storage!r:.200}")
        if not kinds <= {"alloc", "free", "move"} or len(set(made)) < len(made):
            raise ValueError("an event of an unknown kind, or a storage that is made twice")
        if not trace.events:
            raise ValueError("no events")
        return trace
