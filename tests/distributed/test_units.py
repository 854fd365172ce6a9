"""Which units of a sharded model are whole while its heads run; on torch's fake process group."""

import pytest
import torch
from model.test_huggingface import language_model
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mtp_mem import forward_backward, from_hf, load_strategy, make_batch
from mtp_mem.config.schema import Training
from mtp_mem.distributed.fsdp2 import shard
from mtp_mem.errors import BadInput
from mtp_mem.model.head_tree import Heads
from mtp_mem.prediction.fake_ranks import mesh

N = 4


@pytest.mark.parametrize("kind", ["parallel", "medusa"])  # medusa: the first head has no parameters
def test_each_head_is_freed_by_its_own_backward(kind: str) -> None:
    model = from_hf(language_model("llama"), N, kind)  # type: ignore[arg-type]
    shard(model, mesh=mesh(Training(sharding="fsdp2", world=2)))
    whole: dict[str, list[int]] = {}

    def phase(name: str) -> None:
        if name.endswith(" forward") and name != "trunk forward":
            layers = [list(layer.parameters()) for layer in model.head_layers]
            whole[name] = [i for i, own in enumerate(layers, 1) if own and not any(isinstance(p, DTensor) for p in own)]

    batch = make_batch(torch.randint(10, (1, 8)), N)
    for _ in range(2):  # the first step makes what FSDP2 makes lazily
        forward_backward(model, batch, load_strategy("sequential"), phase=phase)
    assert whole == {f"head {i} forward": [] for i in range(N, 0, -1)}


def test_parts_that_a_model_of_your_own_lacks_are_named() -> None:
    class Own(nn.Module):
        n_future, vocab_size, dim = 1, 10, 8

        def __init__(self) -> None:
            super().__init__()
            self.head_layers, self.norm = nn.ModuleList([nn.Linear(8, 8)]), nn.Identity()
            self.trunk_layers, self.lm_head = nn.ModuleList([nn.Linear(8, 8)]), nn.Linear(8, 10)

        def trunk(self, tokens: Tensor) -> Tensor:
            raise NotImplementedError

        def heads(self, z: Tensor) -> Heads:
            raise NotImplementedError

    with pytest.raises(BadInput, match="Own has no unembedding and no embedding: name its units to sharded_heads"):
        shard(Own())  # type: ignore[type-var]
