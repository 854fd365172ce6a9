"""Records with fixed figures for the charts and the report: round numbers, chosen so that every chart has its cases."""

from typing import Any

from mtp_mem._util import MiB
from mtp_mem.runs.record import Record

MODEL: dict[str, Any] = {
    "vocab_size": 8192,
    "dim": 64,
    "n_layers": 10,
    "n_attention_heads": 4,
    "n_kv_heads": 2,
    "ffn_dim": None,
    "head": "parallel",
    "unembedding": "shared",
    "match_layers": True,
    "rope_theta": 10000.0,
    "norm_eps": 1e-05,
}
WORKLOAD: dict[str, Any] = {
    "batch": 4,
    "sequence": 256,
    "dtype": "fp32",
    "tokenizer": "bpe",
    "seed": 0,
    "clip_norm": 1.0,
    "source": "a text",
    "digest": "0123",
}
ENVIRONMENT: dict[str, Any] = {
    "mtp_mem": "0.1.0",
    "code": "abc",
    "commit": "1234567",
    "python": "3.11.7",
    "platform": "Linux",
    "cores": 2,
    "cpu": "A CPU",
    "device": "cpu",
    "torch": "2.13.0",
    "threads": 2,
    "host_bytes": 2**34,
    "variables": {},
}
STRATEGIES = ("naive", "sequential", "chunked_vocab", "checkpointed")


def record(strategy: str = "naive", n: int = 1, **changes: Any) -> Record:
    """One finished case; naive grows by 32 MiB a head, the others do not."""
    over = {"naive": 100 + 32 * n, "chunked_vocab": 60 - 2 * n}.get(strategy, 135 - 4 * n) * MiB
    ms = {"naive": 100.0, "sequential": 90.0, "chunked_vocab": 115.0}.get(strategy, 130.0) * n
    fields: dict[str, Any] = {
        "case": f"{strategy}-{n}",
        "created_at": "2026-01-02T03:04:05+00:00",
        "backend": "cpu",
        "strategy": strategy,
        "exactness": "tracked",
        "n": n,
        "status": "ok",
        "baseline_bytes": 20 * MiB,
        "peak_phase": "head 1 loss",
        "peak_requested_bytes": 20 * MiB + over,
        "peak_over_baseline_bytes": over,
        "host_rss_bytes": 2**29,
        "bytes_at_peak": {"parameters": 6 * MiB, "optimizer": 14 * MiB, "trunk activations": over // 4}
        | {"logits": over - over // 4},
        "step_ms": ms,
        "step_ms_p20": 0.95 * ms,
        "step_ms_p80": 1.1 * ms,
        "tokens_per_s": 1024e3 / ms,
        "gradient": "bit-identical",
        "gradient_error": 0.0,
        "model": {**MODEL, "n_future": n},
        "workload": WORKLOAD,
        "environment": ENVIRONMENT,
    }
    if strategy.startswith("chunked"):
        fields |= {"gradient": "within bound", "gradient_error": 3e-7}
    return Record(**(fields | changes))


def records(**changes: Any) -> list[Record]:
    """Four strategies at n = 1, 2, 4, 8."""
    return [record(strategy, n, **changes) for n in (1, 2, 4, 8) for strategy in STRATEGIES]
