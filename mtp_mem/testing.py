"""One call that holds a strategy to the protocol and to the right gradients."""

from collections.abc import Sequence

import torch

from mtp_mem.config.schema import ALL_DTYPES, Dtype
from mtp_mem.strategy import Strategy
from mtp_mem.verification.checks import Check
from mtp_mem.verification.scenarios import REAL_SIZES, SCENARIOS, Scenario
from mtp_mem.verification.verify import verify

SHOWN = 10


def check_strategy(
    strategy: Strategy | str,
    *,
    dtypes: Sequence[Dtype] = ALL_DTYPES,
    scenarios: Sequence[Scenario] = (*SCENARIOS, *REAL_SIZES),
    device: torch.device | str = "cpu",
) -> None:
    """Run a strategy through every scenario in every dtype at small size (some seconds on a CPU); raise if it fails.

    Args:
        strategy: an object or a spec string. Integer fields of its dataclass are set to what each scenario asks for.
        dtypes: of the model.
        scenarios: see mtp_mem/verification/scenarios.py.
        device: where the strategy runs.

    Raises:
        AssertionError: a check failed or had nothing to check; one line, with the numbers, for all that are alike.
        BadInput: the strategy takes none of `dtypes`.
    """
    result = verify([strategy], dtypes=dtypes, scenarios=scenarios, device=device)
    not_right = [*result.failures, *result.unchecked]
    if not_right:
        # Failures that are alike share a line: ten times the same exception would hide the others.
        alike: dict[str, list[Check]] = {}
        for check in not_right:
            alike.setdefault(check.broken or check.explain(), []).append(check)
        lines = [
            f"{same[0].explain()}{f' (and {len(same) - 1} more alike)' * (len(same) > 1)}" for same in alike.values()
        ]
        if len(lines) > SHOWN:
            lines[SHOWN:] = [f"... and {len(lines) - SHOWN} more"]
        raise AssertionError("\n".join([f"{len(not_right)} of {len(result.checks)} checks failed:", *lines]))
