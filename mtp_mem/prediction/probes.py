"""What a step needs at one batch, sequence and n on a GPU that need not be here; every answer is kept on disk.

A probe is a prediction (mtp_mem/prediction/peaks.py) cut down to what a search asks for. It is deterministic, so it is
stored under everything it depends on and asked for only once.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from mtp_mem._util import Progress, fingerprint
from mtp_mem.config.schema import GPU, ModelConfig, Profile, Workload
from mtp_mem.environment import environment
from mtp_mem.errors import MtpMemError
from mtp_mem.prediction.peaks import predicted
from mtp_mem.prediction.simulated_step import Simulation
from mtp_mem.strategy import Strategy


@dataclass(frozen=True, kw_only=True)
class Point:
    """Where a step is probed: B sequences of S tokens, n heads."""

    batch: int
    sequence: int
    n: int


@dataclass(frozen=True, kw_only=True)
class ProbedBytes:
    """Predicted bytes of a steady step: the allocator's peaks, and what of the peak is there at any batch."""

    allocated: int
    reserved: int
    fixed: int  # parameters, gradients, optimizer state


class ProbeCache:
    """ProbedBytes by fingerprint in a file of JSON lines; a file or line that cannot be read is as good as absent.

    Args:
        path: by default in the user's cache folder.
        fresh: ignore what is there; what is probed now is still kept and counts from then on.
    """

    def __init__(self, path: Path | None = None, *, fresh: bool = False) -> None:
        self.path = path or Path(platformdirs.user_cache_dir("mtp_mem")) / "probes.jsonl"
        self._known = {} if fresh else dict(self._read())

    def get(self, key: str) -> ProbedBytes | None:
        """The figures under this fingerprint, if they are known."""
        return self._known.get(key)

    def put(self, key: str, figures: ProbedBytes) -> None:
        """Keep the figures. A folder that cannot be written costs the next run its time, not this one its answer."""
        self._known[key] = figures
        line = json.dumps({"probe": key, **dataclasses.asdict(figures)})
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.write(f"\n{line}\n".encode())  # the first line break ends a line that a kill cut off
        except OSError:
            pass

    def _read(self) -> Iterator[tuple[str, ProbedBytes]]:
        try:
            lines = self.path.read_bytes().splitlines()
        except OSError:
            return
        names = {field.name for field in dataclasses.fields(ProbedBytes)}
        for line in lines:
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if isinstance(entry, dict) and entry.keys() == names | {"probe"}:
                key = entry.pop("probe")
                if isinstance(key, str) and all(type(value) is int for value in entry.values()):
                    yield key, ProbedBytes(**entry)


class Prober:
    """Answers probes for one profile and GPU, from the cache or from a simulation.

    Args:
        profile: everything but batch, sequence and n is taken from it.
        gpu: the target.
        strategies: by spec; all that will be asked for.
        cache: where answers are kept.
        progress: told of each probe that has to be run.
    """

    def __init__(
        self, profile: Profile, gpu: GPU, strategies: Mapping[str, Strategy], cache: ProbeCache, progress: Progress
    ) -> None:
        self._profile, self._gpu, self._strategies = profile, gpu, strategies
        self._cache, self._progress = cache, progress
        self._rehearsal: tuple[Point, Simulation] | None = None
        self._answers: dict[tuple[str, Point], ProbedBytes | MtpMemError] = {}

    def probe(self, spec: str, point: Point) -> ProbedBytes | MtpMemError:
        """The strategy's figures at a point, or why they cannot be predicted.

        The last point's model is kept: ask for all strategies at one point in turn.
        """
        if (spec, point) not in self._answers:
            self._answers[spec, point] = self._cached(spec, point)
        return self._answers[spec, point]

    def _cached(self, spec: str, point: Point) -> ProbedBytes | MtpMemError:
        model, workload = self._shape(point)
        env = environment("cpu")
        parts = [dataclasses.asdict(part) for part in (model, workload, self._gpu)]
        key = fingerprint("probe", spec, *parts, env["code"], env["torch"])
        # `code` says nothing of a strategy from elsewhere, whose author may be changing it at this moment.
        ours = type(self._strategies[spec]).__module__.startswith("mtp_mem.")
        if ours and (known := self._cache.get(key)) is not None:
            return known
        self._progress(f"{spec}: batch {point.batch}, sequence {point.sequence}, n = {point.n}")
        try:
            if self._rehearsal is None or self._rehearsal[0] != point:
                self._rehearsal = point, Simulation(model, workload, gpu=self._gpu)
            facts = predicted(self._rehearsal[1].trace(self._strategies[spec]), self._gpu)
        except MtpMemError as e:
            return e
        at_peak: dict[str, int] = facts["bytes_at_peak"]
        figures = ProbedBytes(
            allocated=facts["peak_allocated_bytes"],
            reserved=facts["peak_reserved_bytes"],
            fixed=sum(at_peak.get(category, 0) for category in ("parameters", "gradients", "optimizer")),
        )
        if ours:
            self._cache.put(key, figures)
        return figures

    def _shape(self, point: Point) -> tuple[ModelConfig, Workload]:
        workload = dataclasses.replace(self._profile.workload, batch=point.batch, sequence=point.sequence)
        return self._profile.model.with_n(point.n), workload
