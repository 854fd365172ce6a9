"""Lightning with automatic optimisation: `training_step` returns the loss, Lightning does the rest."""

import lightning
import torch
from common import HEADS, compare, rows, tiny_llama
from torch import Tensor, nn

from mtp_mem import MTPForCausalLM


class Module(lightning.LightningModule):
    """The model with n heads."""

    def __init__(self, strategy: str) -> None:
        super().__init__()
        self.model = MTPForCausalLM(tiny_llama(), n=HEADS, strategy=strategy)

    def training_step(self, batch: dict[str, Tensor], _index: int) -> Tensor:
        """The loss of all heads."""
        return self.model(**batch)["loss"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def train(strategy: str) -> nn.Module:
    """Three optimizer steps over two batches each."""
    module = Module(strategy)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=3,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, torch.utils.data.DataLoader(rows(24), batch_size=4))
    return module


if __name__ == "__main__":
    compare(train)
