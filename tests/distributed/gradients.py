"""Strategies under DDP and FSDP2 on two gloo ranks, and under HSDP on two groups of two, against one process.

Prints one JSON line for each case: how far the averaged gradient is from the single-process joint one, and collectives.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parents[1]))
import transformers
from distributed.ranks import on_ranks
from model.test_huggingface import TINY

from mtp_mem import Batch, ModelConfig, MTPModel, forward_backward, from_hf, future_targets, head_loss, load_strategy
from mtp_mem.distributed.collectives import Collectives
from mtp_mem.distributed.ddp import averaged_gradients, mean_items
from mtp_mem.distributed.fsdp2 import shard
from mtp_mem.errors import BadInput

N, VOCAB = 3, 131
SPECS = ("naive", "sequential", "checkpointed", "chunked_vocab:chunk=13", "chunked_tokens:chunk=7")
ALL = ("joint", *SPECS)
FEW = ("joint", "sequential", "chunked_tokens:chunk=7")
SIZES: dict[str, Any] = {"vocab_size": VOCAB, "dim": 64, "n_layers": 5, "n_attention_heads": 4, "n_future": N}


def build(model: str, tied: bool) -> Any:
    torch.manual_seed(0)
    if model == "own":
        return MTPModel(ModelConfig(**SIZES, unembedding="tied" if tied else "shared"))
    if model == "own, deepseek":
        return MTPModel(ModelConfig(**SIZES, head="deepseek", unembedding="tied" if tied else "shared"))
    sizes = TINY | {"num_hidden_layers": 4, "tie_word_embeddings": tied}
    lm = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**sizes), dtype=torch.float32)
    built = from_hf(lm, N).train()
    if model == "hf, checkpointed":
        built.checkpoint_trunk(1)
    return built


def batch_of(rank: int, *, uneven: bool = False) -> Batch:
    ids = torch.randint(1, VOCAB, (2, 12), generator=torch.Generator().manual_seed(10 + rank))
    labels = ids.clone()
    if uneven and rank:
        labels[:, : 9 if rank == 1 else 3] = -100
    return Batch(ids, future_targets(labels, N))


def joint_loss(model: Any, batch: Batch) -> Tensor:
    """Plain autograd on the logits of the model called as a module: the hooks of DDP and FSDP2 see all of it."""
    logits = model(batch.tokens)
    return sum(F.cross_entropy(own.flatten(0, 1), t.flatten()) for own, t in zip(logits, batch.targets, strict=True))  # type: ignore[return-value]


def reference(model: str, tied: bool, times: int) -> dict[str, Tensor]:
    """The ranks' gradients of `naive`, averaged, in one process."""
    one = build(model, tied)
    for _ in range(times):
        for rank in range(dist.get_world_size()):
            forward_backward(one, batch_of(rank), load_strategy("naive"))
    return {name: p.grad / dist.get_world_size() for name, p in one.named_parameters()}


def whole(model: nn.Module) -> dict[str, Tensor]:
    gradients = {}
    for name, parameter in model.named_parameters():
        gradient: Any = parameter.grad
        gradients[name.removeprefix("module.")] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    model.zero_grad(set_to_none=True)
    return gradients


def report(case: dict[str, Any], right: dict[str, Tensor], model: nn.Module, step: Callable[[], None]) -> None:
    """Two steps: the first one sets up lazily. The second's gradient and collectives."""
    step()
    model.zero_grad(set_to_none=True)
    with Collectives() as seen:
        step()
    own = whole(model)
    errors = {name: float((own[name] - g).norm() / g.norm()) for name, g in right.items()}
    if dist.get_rank() == 0:
        print(json.dumps(case | {"error": max(errors.values()), "collectives": dict(seen.count)}), flush=True)


class Wrapped(nn.Module):
    """A module whose forward returns the loss, as trainers wrap it in DDP."""

    def __init__(self, model: Any, spec: str) -> None:
        super().__init__()
        self.module_, self.spec = model, spec

    def forward(self, batch: Batch) -> Tensor:
        """The loss of all heads."""
        if self.spec == "joint":
            return joint_loss(self.module_, batch)
        return head_loss(self.module_, self.module_.trunk(batch.tokens), batch.targets, self.spec)[0]


def under_ddp(model: str, tied: bool, micro: int) -> None:
    own, right = batch_of(dist.get_rank()), reference(model, tied, micro)
    for spec in ALL:
        wrapped = DistributedDataParallel(Wrapped(build(model, tied), spec), bucket_cap_mb=0.02)

        def in_forward(wrapped: Any = wrapped) -> None:
            for i in range(micro):
                wrapped.require_backward_grad_sync = i == micro - 1
                wrapped(own).backward()

        case = {"how": "ddp, head_loss", "model": model, "tied": tied, "micro": micro, "spec": spec}
        report(case, {f"module_.{k}": v for k, v in right.items()}, wrapped, in_forward)
        if spec == "joint":
            continue
        ddp = DistributedDataParallel(build(model, tied))

        def explicit(ddp: Any = ddp, spec: str = spec) -> None:
            with averaged_gradients(ddp) as inner:
                for _ in range(micro):
                    forward_backward(inner, own, load_strategy(spec))

        report(case | {"how": "ddp, explicit"}, right, ddp, explicit)


def under_fsdp2(model: str, tied: bool, micro: int, mesh: Any, specs: tuple[str, ...] = ALL) -> None:
    own, right = batch_of(dist.get_rank()), reference(model, tied, micro)
    for spec in specs:
        sharded: Any = shard(build(model, tied), mesh=mesh)

        def step(sharded: Any = sharded, spec: str = spec) -> None:
            for i in range(micro):
                last = i == micro - 1
                sharded.set_requires_gradient_sync(last)
                if spec == "joint":
                    joint_loss(sharded, own).backward()
                else:
                    forward_backward(sharded, own, load_strategy(spec), sync=last)

        how = "hsdp" if mesh is not None and mesh.ndim == 2 else "fsdp2"
        report({"how": how, "model": model, "tied": tied, "micro": micro, "spec": spec}, right, sharded, step)


def in_mixed_precision(tied: bool) -> None:
    """fp32 shards, bf16 products, fp32 reduction: held against naive under the same policy, in fp32 sums."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    share, right = batch_of(dist.get_rank()), None
    for spec in SPECS:
        sharded: Any = shard(build("hf", tied), mp_policy=policy)
        forward_backward(sharded, share, load_strategy(spec))
        own = whole(sharded)
        right = right or own
        errors = [float((own[name] - g).norm() / g.norm()) for name, g in right.items()]
        if dist.get_rank() == 0:
            case = {"how": "fsdp2, mixed", "model": "hf", "tied": tied, "micro": 1, "spec": spec}
            print(json.dumps(case | {"error": max(errors), "collectives": {}}), flush=True)


def uneven() -> None:
    """Targets that lie unevenly over ranks: the mean over all of them is what one process would train on."""
    world = dist.get_world_size()
    batches = [batch_of(rank, uneven=True) for rank in range(world)]
    one = build("hf", False)
    everything = Batch(torch.cat([b.tokens for b in batches]), torch.cat([b.targets for b in batches], dim=1))
    forward_backward(one, everything, load_strategy("naive"))
    right = {name: p.grad for name, p in one.named_parameters()}
    share, model = batches[dist.get_rank()], build("hf", False)
    with averaged_gradients(model) as inner:
        items = mean_items(share.targets)
        head_loss(inner, inner.trunk(share.tokens), share.targets, "sequential", num_items=items)[0].backward()
    own = whole(model)
    errors = [float((own[name] - g).norm() / g.norm()) for name, g in right.items()]
    if dist.get_rank() == 0:
        print(json.dumps({"how": "uneven targets", "spec": "sequential", "error": max(errors)}), flush=True)


def refused() -> None:
    try:
        forward_backward(DistributedDataParallel(build("own", False)), batch_of(0), load_strategy("naive"))  # type: ignore[arg-type]
    except BadInput as e:
        if dist.get_rank() == 0:
            print(json.dumps({"how": "refused", "spec": "naive", "words": str(e)}), flush=True)


def on_four() -> None:
    both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    under_fsdp2("hf", False, 1, both, FEW)


def on_two() -> None:
    for tied, micro in ((False, 1), (True, 2)):  # one without the other: `verify --nproc` in test_on_ranks.py
        under_ddp("own", tied, micro)
        under_fsdp2("hf", tied, micro, None)
        in_mixed_precision(tied)
    under_fsdp2("own", False, 1, None)
    under_fsdp2("own, deepseek", False, 1, None, FEW)
    under_fsdp2("hf, checkpointed", False, 1, None, FEW)
    uneven()
    refused()


if __name__ == "__main__":
    on_ranks(2, on_two)
    on_ranks(4, on_four)
