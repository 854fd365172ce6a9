"""What a verification says: one strategy's check in one scenario and dtype, and all checks of a run."""

from dataclasses import dataclass

from mtp_mem.config.schema import Dtype
from mtp_mem.verification.gradient_error import Part, Status


@dataclass(frozen=True, kw_only=True)
class Check:
    """One strategy in one scenario and dtype.

    Attributes:
        strategy: its spec.
        scenario: its name.
        dtype: of the model.
        parts: the verdict on each part of the gradient, the losses or clause of the protocol.
        identical: whether every gradient and loss equals naive's bit for bit.
        exact: whether bit identity can be asked for in this scenario.
        broken: the clause of the protocol that it broke, or what it raised; there are no parts then.
    """

    strategy: str
    scenario: str
    dtype: Dtype
    parts: tuple[Part, ...] = ()
    identical: bool = False
    exact: bool = False
    broken: str = ""

    @property
    def status(self) -> Status:
        """wrong: broken, or a part is. right: nothing is wrong or overflows, a part is right. unchecked: all else."""
        if self.broken or any(part.status == "wrong" for part in self.parts):
            return "wrong"
        if any(part.overflows for part in self.parts):
            return "unchecked"
        return "right" if any(part.status == "right" for part in self.parts) else "unchecked"

    @property
    def worst(self) -> Part | None:
        """The part that is most wrong, or else has the largest error relative to what is allowed."""
        return max(
            self.parts,
            key=lambda p: (p.status == "wrong", bool(p.problem), p.error / max(p.allowed, 1e-300)),
            default=None,
        )

    def explain(self) -> str:
        """One line: where, which part, the numbers."""
        where = f"{self.strategy}: {self.scenario}, {self.dtype}"
        if self.broken:
            return f"{where}: {self.broken}"
        part = self.worst
        if overflowed := next((part for part in self.parts if part.overflows), None):
            return f"{where}: {overflowed.name}: {overflowed.problem}"
        if part is None or self.status == "unchecked":
            return f"{where}: nothing to check"
        if self.status == "right":
            return f"{where}: right"
        if part.problem:
            return f"{where}: {part.name}: {part.problem}"
        naive = "" if part.naive_error is None else f"naive's {part.naive_error:.1e}, "
        return f"{where}: {part.name}: error {part.error:.1e}, {naive}allowed {part.allowed:.1e}"


@dataclass(frozen=True)
class Verification:
    """All checks of a run."""

    checks: tuple[Check, ...]
    remarks: tuple[str, ...] = ()  # what was left out or allowed for, a line each
    complete: bool = True  # False: stopped before the end

    @property
    def failures(self) -> tuple[Check, ...]:
        """The checks that are wrong."""
        return tuple(check for check in self.checks if check.status == "wrong")

    @property
    def unchecked(self) -> tuple[Check, ...]:
        """The checks that had nothing to check."""
        return tuple(check for check in self.checks if check.status == "unchecked")

    @property
    def passed(self) -> bool:
        """Whether everything that was asked for was run, checked and right."""
        return self.complete and bool(self.checks) and all(check.status == "right" for check in self.checks)

    def of(self, strategy: str) -> tuple[Check, ...]:
        """One strategy's checks."""
        return tuple(check for check in self.checks if check.strategy == strategy)
