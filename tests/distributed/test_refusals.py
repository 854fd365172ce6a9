"""What more than one GPU is refused by name."""

import pytest
import torch
from small import tiny
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from mtp_mem import MTPModel, forward_backward, load_strategy, make_batch
from mtp_mem.config.schema import Training
from mtp_mem.errors import BadInput
from mtp_mem.prediction.fake_ranks import mesh


def test_tensor_parallelism() -> None:
    model = MTPModel(tiny())
    ranks = mesh(Training(sharding="fsdp2", world=2))
    weight = DTensor.from_local(model.unembedding.weight.detach(), ranks, [Shard(0)], run_check=False)
    model.unembedding.weight = nn.Parameter(weight)
    batch = make_batch(torch.randint(10, (1, 8)), model.n_future)
    with pytest.raises(BadInput, match=r"^unembedding\.weight is sharded by tensor parallelism \(parallelize_module\)"):
        forward_backward(model, batch, load_strategy("sequential"))
