"""A rank of a process group of any size, in this process: torch's fake process group, which moves no bytes."""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy

from mtp_mem.config.schema import MOST_RANKS, NODE, Dtype, Training
from mtp_mem.distributed.fsdp2 import shard
from mtp_mem.errors import BadInput
from mtp_mem.model.own import Model


def mesh(training: Training) -> DeviceMesh:
    """The ranks of the setup: one row, or for HSDP rows of a node's GPUs.

    Makes the fake process group, unless it is there. Call it outside any dispatch mode: a mesh is real data.

    Raises:
        BadInput: this process is a rank of a real group.
    """
    if not dist.is_initialized():
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=MOST_RANKS)
    elif dist.get_backend() != "fake":
        raise BadInput("this process is a rank of a process group; predict a sharded step in one that is not")
    ranks = torch.arange(training.world)
    if training.sharding == "hsdp":
        return DeviceMesh("cpu", ranks.view(-1, NODE), mesh_dim_names=("replicate", "shard"))
    return DeviceMesh("cpu", ranks, mesh_dim_names=("shard",))


def shard_as(model: Model, dtype: Dtype, ranks: DeviceMesh) -> None:
    """Shard the model over the ranks; bf16-mixed is fp32 shards, bf16 products, and gradients reduced in fp32."""
    policy = MixedPrecisionPolicy()
    if dtype == "bf16-mixed":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    shard(model, mesh=ranks, mp_policy=policy)
