"""Strategies whose work a dispatch mode does not see: refused with the reason, never shown with half their bytes."""

import json
from pathlib import Path

import pytest
from command_line import mtp_mem

PROFILE = """
[model]
vocab_size = 256
dim = 64
n_layers = 2
n_attention_heads = 2
[workload]
batch = 2
sequence = 64
tokenizer = "bytes"
[sweep]
n = [1]
strategies = ["naive"]
rounds = 1
"""
STRATEGIES = """
import threading
from concurrent.futures import ThreadPoolExecutor
import torch
from mtp_mem.model.losses import full
from mtp_mem.strategies.sequential import Sequential

class Thread(Sequential):
    def backward(self, *args):
        out = []
        thread = threading.Thread(target=lambda: out.append(super(Thread, self).backward(*args)))
        thread.start(); thread.join()
        return out[0]

POOL = ThreadPoolExecutor(1)
POOL.submit(int).result()

class Pool(Sequential):
    def backward(self, *args):
        return POOL.submit(super().backward, *args).result()

COMPILED = torch.compile(full, backend="eager")

class Compiled(Sequential):
    def loss_backward(self, heads, head, hidden, targets, weight):
        loss = heads.loss(head, hidden, targets, COMPILED)
        heads.backward([loss], [weight])
        return loss.detach()
"""
REASONS = {"Thread": "computes in a thread", "Pool": "computes in a thread", "Compiled": "runs code of torch.compile"}


@pytest.mark.parametrize("name", REASONS)
@pytest.mark.parametrize("command", ["compare", "predict"])
def test_what_cannot_be_counted_is_refused(tmp_path: Path, command: str, name: str) -> None:
    (tmp_path / "small.toml").write_text(PROFILE)
    (tmp_path / "hidden_work.py").write_text(STRATEGIES)
    gpu = ("--gpu", "h200", "--dtype", "bf16") if command == "predict" else ()
    shared = ("--profile", "small.toml", "--strategy", f"hidden_work:{name}", "--json", *gpu)
    ended = mtp_mem(tmp_path, command, *shared)
    assert ended.returncode == 1
    naive, other = json.loads(ended.stdout)["records"]
    assert naive["status"] == "ok"
    assert other["status"] == "error"
    assert other["error"].startswith(REASONS[name])
    assert other["peak_requested_bytes"] is None
