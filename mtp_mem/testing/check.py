"""One call that holds a strategy to the protocol and to the right gradients."""

from collections.abc import Sequence

import torch

from mtp_mem.config import Dtype
from mtp_mem.scenarios import ALL_DTYPES, SCENARIOS, Scenario
from mtp_mem.strategy import Strategy
from mtp_mem.verify import verify

SHOWN = 10


def check_strategy(
    strategy: Strategy | str,
    *,
    dtypes: Sequence[Dtype] = ALL_DTYPES,
    scenarios: Sequence[Scenario] = SCENARIOS,
    device: torch.device | str = "cpu",
) -> None:
    """Run the whole matrix at small size; some seconds on a CPU.

    Args:
        strategy: an object or a spec string. A dataclass field `chunk` is set to what each scenario asks for.
        dtypes: of the model.
        scenarios: see mtp_mem/scenarios.py.
        device: where the strategy runs.

    Raises:
        AssertionError: names each scenario that failed, the part of the model and the numbers.
    """
    found = verify([strategy], dtypes=dtypes, scenarios=scenarios, device=device)
    if found.failures:
        lines = [check.explain() for check in found.failures[:SHOWN]]
        if len(found.failures) > SHOWN:
            lines.append(f"... and {len(found.failures) - SHOWN} more")
        raise AssertionError("\n".join([f"{len(found.failures)} of {len(found.checks)} checks failed:", *lines]))
