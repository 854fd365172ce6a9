"""`verify --nproc`: strategies on two gloo ranks against one process; a wrong one is caught."""

import json
from collections import Counter
from pathlib import Path

import pytest
from command_line import mtp_mem

OUTSIDE = '''
import torch.distributed as dist
from mtp_mem.strategies.sequential import Sequential

class OnRankOne(Sequential):
    """Forgets the weight of the loss, on one rank alone."""

    def loss_backward(self, heads, head, hidden, targets, weight):
        if dist.is_initialized() and dist.get_rank() == 1:
            weight = weight * 1.01
        return super().loss_backward(heads, head, hidden, targets, weight)

class Raises(Sequential):
    """Raises where a head has no weight, on one rank alone."""

    def loss_backward(self, heads, head, hidden, targets, weight):
        if dist.is_initialized() and dist.get_rank() == 1 and float(weight) == 0:
            raise ValueError("no weight")
        return super().loss_backward(heads, head, hidden, targets, weight)
'''


def test_every_scenario_on_two_ranks(tmp_path: Path) -> None:
    (tmp_path / "outside.py").write_text(OUTSIDE)
    specs = "sequential,chunked_tokens,outside:OnRankOne,outside:Raises"
    ended = mtp_mem(tmp_path, "verify", "--nproc", "2", "--strategies", specs, "--json")
    assert ended.returncode == 1
    checks = json.loads(ended.stdout)["checks"]
    assert Counter(check["strategy"] for check in checks) == dict.fromkeys(specs.split(","), 27)
    for check in checks:
        weightless = any(words in check["scenario"] for words in ("scale 0.37", "mean over all"))
        raises = check["strategy"] == "outside:Raises" and weightless
        if raises:
            assert check["broken"] == "rank 1: ValueError: no weight (outside.py:18)", check
        else:
            assert check["status"] == ("wrong" if check["strategy"] == "outside:OnRankOne" else "right"), check
        if check["strategy"] == "sequential" and "mean over all" not in check["scenario"]:
            assert check["bit_identical"] or "micro-batches" in check["scenario"], check


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--nproc", "1"), "--nproc 1: expected at least 2 ranks"),
        (("--nproc", "2", "--sharding", "hsdp"), "--sharding hsdp: expected ddp, fsdp2; hsdp needs 4 ranks"),
        (("--nproc", "2", "--dtype", "bf16"), "--dtype bf16: with --nproc fp32 or fp64"),
        (("--nproc", "2", "--profile", "quick"), "--nproc runs scenarios of its own"),
        (("--nproc", "2", "--prove"), "--prove runs in one process"),
    ],
)
def test_what_ranks_cannot_do(tmp_path: Path, options: tuple[str, ...], words: str) -> None:
    ended = mtp_mem(tmp_path, "verify", *options)
    assert ended.returncode == 2
    assert words in ended.stderr
