"""The tracker for a sharded model leaves torch as it was; its bytes are held by tests/distributed/test_bytes.py."""

import pytest
import torch
import torch.nn.functional as F
from small import build, tiny

from mtp_mem import forward_backward, load_strategy
from mtp_mem.config.schema import Training
from mtp_mem.distributed.fsdp2 import shard
from mtp_mem.memory.sharded_tracker import ShardedTracker
from mtp_mem.prediction.fake_ranks import mesh


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch before 2.13")
def test_storages_resize_as_before_after_an_operator_that_is_written_in_python() -> None:
    model, batch = build(tiny())
    shard(model, mesh=mesh(Training(sharding="fsdp2", world=2)))
    plain = torch.UntypedStorage.resize_
    try:
        with ShardedTracker(model.vocab_size, model.dim, []):
            forward_backward(model, batch, load_strategy("native"))
        assert torch.UntypedStorage.resize_ is plain
    finally:
        torch.UntypedStorage.resize_ = plain  # type: ignore[method-assign]
