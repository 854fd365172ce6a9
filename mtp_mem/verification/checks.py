"""What a verification found: a part's error, a strategy's check in one scenario and dtype, all checks of a run."""

from dataclasses import dataclass, field

from mtp_mem.config.schema import Dtype


@dataclass(frozen=True)
class Part:
    """One part's gradient, or the losses: its error against the oracle, naive's own, and what was allowed."""

    name: str
    error: float
    naive_error: float
    allowed: float
    problem: str = ""  # what is wrong in words; empty where nothing is

    @property
    def passed(self) -> bool:
        """Inside the bound, and nothing else wrong."""
        return not self.problem and self.error <= self.allowed


@dataclass(frozen=True)
class Check:
    """One strategy in one scenario and dtype."""

    strategy: str
    scenario: str
    dtype: Dtype
    identical: bool  # every gradient torch.equal to naive's
    exact: bool  # whether identity was possible at all in this scenario
    parts: tuple[Part, ...] = ()
    broken: str = ""  # the contract broken, or what was raised; there are no parts then

    @property
    def passed(self) -> bool:
        """No contract broken and every part right."""
        return not self.broken and all(part.passed for part in self.parts)

    @property
    def worst(self) -> Part | None:
        """The part that failed worst, or has the largest error."""
        return max(
            self.parts, key=lambda p: (not p.passed, bool(p.problem), p.error / max(p.allowed, 1e-300)), default=None
        )

    def explain(self) -> str:
        """One line: where, which part, the numbers."""
        where = f"{self.strategy}: {self.scenario}, {self.dtype}"
        if self.broken:
            return f"{where}: {self.broken}"
        part = self.worst
        if part is None or self.passed:
            return f"{where}: right"
        if part.problem:
            return f"{where}: {part.name}: {part.problem}"
        return (
            f"{where}: {part.name}: error {part.error:.1e}, naive's {part.naive_error:.1e}, allowed {part.allowed:.1e}"
        )


@dataclass(frozen=True)
class Verification:
    """All checks of a run."""

    checks: tuple[Check, ...] = field(default_factory=tuple)
    remarks: tuple[str, ...] = ()  # what was left out or allowed for, a line each
    complete: bool = True  # False: stopped before the end

    @property
    def failures(self) -> tuple[Check, ...]:
        """What did not pass."""
        return tuple(check for check in self.checks if not check.passed)

    def of(self, strategy: str) -> tuple[Check, ...]:
        """One strategy's checks."""
        return tuple(check for check in self.checks if check.strategy == strategy)
