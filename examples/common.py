"""What the examples share: a tiny model, real text as bytes, and the comparison of two runs' weights."""

from collections.abc import Callable
from pydoc_data.topics import topics
from typing import Any

import torch
import transformers
from torch import Tensor, nn

HEADS = 3
STRATEGY = "sequential"


def tiny_llama() -> Any:
    """A Llama of 3 layers over bytes, the same weights each time."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=128,
        max_position_embeddings=128,
    )
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def rows(count: int, length: int = 48) -> list[dict[str, Tensor]]:
    """Pieces of Python's help texts as examples; the first bytes of each are a prompt that is not learned."""
    text = "\n".join(topics[key] for key in sorted(topics)).encode()
    examples = []
    for i in range(count):
        ids = torch.tensor(list(text[i * length : (i + 1) * length]))
        labels = ids.clone()
        labels[: i % 5] = -100
        examples.append({"input_ids": ids, "labels": labels})
    return examples


def compare(train: Callable[[str], nn.Module]) -> None:
    """Train with one joint backward and with the strategy, and say how far the weights are apart."""
    joint, own = train("naive"), train(STRATEGY)
    pairs = zip(joint.named_parameters(), own.parameters(), strict=True)
    furthest = max(((a - b).abs().max().item(), name) for (name, a), b in pairs)
    print(f"weights after training, {STRATEGY} against one joint backward: ", end="")
    print("identical to the last bit" if furthest[0] == 0 else f"up to {furthest[0]:.1e} apart ({furthest[1]})")
