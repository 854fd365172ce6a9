"""Profile and verify head-backward strategies for multi-token prediction."""

from mtp_mem._util import without_collections
from mtp_mem._version import __version__

with without_collections():  # torch makes 400,000 objects that stay; looking through them again and again takes 0.4 s
    from mtp_mem.config.profiles import load_profile
    from mtp_mem.config.schema import ModelConfig, Profile, Sweep, Training, Workload
    from mtp_mem.data import Batch, future_targets, make_batch
    from mtp_mem.model.head_tree import no_phase
    from mtp_mem.model.huggingface import from_hf
    from mtp_mem.model.losses import IGNORE
    from mtp_mem.model.mtp_model import MTPModel
    from mtp_mem.model.optimizers import make_optimizer
    from mtp_mem.model.own import heads
    from mtp_mem.step import TrainingStep, forward_backward
    from mtp_mem.step.head_loss import MTPForCausalLM, head_loss
    from mtp_mem.strategy import Strategy, load_strategy
    from mtp_mem.verification.checks import Verification
    from mtp_mem.verification.verify import verify

__all__ = [
    "IGNORE",
    "Batch",
    "MTPForCausalLM",
    "MTPModel",
    "ModelConfig",
    "Profile",
    "Strategy",
    "Sweep",
    "Training",
    "TrainingStep",
    "Verification",
    "Workload",
    "__version__",
    "forward_backward",
    "from_hf",
    "future_targets",
    "head_loss",
    "heads",
    "load_profile",
    "load_strategy",
    "make_batch",
    "make_optimizer",
    "no_phase",
    "verify",
]
