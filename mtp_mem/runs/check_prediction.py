"""Is the prediction right? `mtp-mem predict --check` holds it against a CUDA device, byte by byte.

Each case is measured in a process of its own, under the default allocator and under expandable segments, and predicted
with the cuBLAS workspaces that were found live there. Then each row of the kernel table is run alone. Without a CUDA
device the command says so and prints the predictions.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from mtp_mem._util import writable, write_json
from mtp_mem.config.foreign import read_json
from mtp_mem.config.gpus import GPU, load_gpu
from mtp_mem.config.schema import ModelConfig, Profile, Sweep, Workload
from mtp_mem.config.toml import from_table
from mtp_mem.environment import code_digest
from mtp_mem.errors import BadInput
from mtp_mem.prediction import simulated_step
from mtp_mem.prediction.cuda.allocator_settings import VARIABLES
from mtp_mem.prediction.cuda.cublas import workspaces
from mtp_mem.prediction.kernel_buffers import KERNELS
from mtp_mem.prediction.peaks import predicted
from mtp_mem.runs import isolated
from mtp_mem.strategy import load_strategy

STRATEGIES = ("naive", "sequential", "chunked_vocab")
N = (1, 4)
SHAPES = {
    "narrow": (
        ModelConfig(vocab_size=32000, dim=512, n_layers=8, n_attention_heads=8, n_kv_heads=2),
        Workload(batch=1, sequence=4096, dtype="bf16", tokenizer="uniform"),
    ),
    "wide": (
        ModelConfig(vocab_size=128256, dim=2048, n_layers=8, n_attention_heads=16, n_kv_heads=8),
        Workload(batch=2, sequence=2048, dtype="bf16", tokenizer="uniform"),
    ),
}
ALLOCATORS = {"default": "expandable_segments:False", "expandable": "expandable_segments:True"}
FILE = "check.json"
FIELDS = ("requested", "allocated", "reserved")


@dataclass(frozen=True)
class Row:
    """One case: predicted and, on a GPU, measured bytes."""

    shape: str
    n: int
    strategy: str
    allocator: str
    predicted: dict[str, int]
    measured: dict[str, int] | None = None
    unnamed: int | None = None  # bytes live before the step in no tensor of ours
    retries: int | None = None
    spread: int | None = None  # bytes, as in `CudaPeaks`
    error: str | None = None

    @property
    def difference(self) -> dict[str, int] | None:
        """Predicted minus measured bytes."""
        return None if self.measured is None else {key: self.predicted[key] - self.measured[key] for key in FIELDS}


def run(
    gpu_name: str, *, quick: bool, out: Path, budget_s: float | None, show: Callable[[str], None]
) -> tuple[dict[str, Any], bool]:
    """Predict every case and, where there is a CUDA device, measure it too.

    Args:
        gpu_name: predict for this one of gpus.toml where there is no CUDA device.
        quick: the narrow shape under the default allocator only.
        out: a folder; check.json is kept there after every case, and cases that it holds already are not run again.
        budget_s: seconds after which no further case is begun; at least one new case always is.
        show: called with each line for people.

    Returns:
        What check.json holds, and whether it is right: every case was reached, and on a CUDA device `is_right`.

    Raises:
        BadInput: no such GPU, or `out` cannot be written.
    """
    writable(out)
    measured = torch.cuda.is_available()
    gpu = device_here() if measured else load_gpu(gpu_name)
    if not measured:
        show(f"No CUDA device here: nothing is measured. Predictions for {gpu.name}, bytes:")
    about = {"gpu": asdict(gpu), "torch": torch.__version__, "code": code_digest(), "measured": measured}
    before = _before(out, about)
    document: dict[str, Any] = about | {"cases": [], "kernels": []}
    right, started = True, time.monotonic()
    total = len(N) * len(STRATEGIES) * (1 if quick else len(SHAPES) * len(ALLOCATORS))
    for row in check(gpu, before, quick=quick, measure=measured):
        show(_line(row))
        right = right and (is_right(row) or not measured)
        document["cases"].append(asdict(row))
        write_json(out / FILE, document)  # it is whole at any moment
        reached = len(document["cases"])
        if budget_s is not None and time.monotonic() - started >= budget_s and len(before) < reached < total:
            show(
                f"the budget of {budget_s / 60:g} min is spent: {reached} of {total} cases are in {out / FILE};"
                " the same command runs the others"
            )
            return document, False
    for name, seen, table, kernel_bytes in check_kernels("cuda" if measured else "cpu", gpu):
        comparison = f", {seen or 'not seen on CUDA'}"
        if kernel_bytes is not None:
            comparison = f", measured {kernel_bytes:,}, difference {table - kernel_bytes:+,}"
        show(f"kernel {name}: table {table:,}{comparison}")
        document["kernels"].append({"kernel": name, "table": table, "measured": kernel_bytes, "seen": seen})
    write_json(out / FILE, document)
    if measured:
        show("right: 0 B requested, 1 % allocated" if right else "NOT right: see the differences above")
    return document, right


def check(gpu: GPU, before: Sequence[Row] = (), *, quick: bool, measure: bool) -> Iterator[Row]:
    """Every case, predicted and where asked measured; those of an earlier run that was stopped are taken over."""
    known = {(row.shape, row.n, row.strategy, row.allocator): row for row in before}
    shapes = {"narrow": SHAPES["narrow"]} if quick else SHAPES
    for allocator in list(ALLOCATORS)[: 1 if quick else None]:
        target = replace(gpu, expandable_segments=allocator == "expandable")
        for shape, (model, workload) in shapes.items():
            for n in N:
                for spec in STRATEGIES:
                    if old := known.get((shape, n, spec, allocator)):
                        yield old
                        continue
                    profile = Profile(name=shape, model=model, workload=workload, sweep=Sweep(n=(n,)))
                    facts = None
                    if measure:
                        variables = dict.fromkeys(VARIABLES, ALLOCATORS[allocator])
                        facts = isolated.measure(profile, n, spec, "cuda", environment=variables)
                    yield compare(shape, spec, n, allocator, profile, target, facts)


def compare(
    shape: str, spec: str, n: int, allocator: str, profile: Profile, gpu: GPU, facts: dict[str, Any] | None
) -> Row:
    """Predict one case and set it beside `facts`, which `isolated.measure` returned, or None."""
    resident, error = None, None
    if facts is not None and facts["status"] != "ok":
        error, facts = facts["error"], None
    if facts is not None:
        nbytes = workspaces(gpu).nbytes
        count, rest = divmod(facts["live_unnamed_bytes"], nbytes) if nbytes else (0, facts["live_unnamed_bytes"])
        resident = (nbytes,) * count + ((rest,) if rest else ())
        gpu = replace(gpu, workspaces_kept=count > 0)
    trace = simulated_step.simulate(profile.model.with_n(n), profile.workload, load_strategy(spec), gpu=gpu)
    peaks = predicted(trace, gpu, resident)
    row = Row(shape, n, spec, allocator, {key: peaks[f"peak_{key}_bytes"] for key in FIELDS}, error=error)
    if facts is None:
        return row
    return replace(
        row,
        measured={key: facts[f"peak_{key}_bytes"] for key in FIELDS},
        unnamed=facts["live_unnamed_bytes"],
        retries=facts["alloc_retries"],
        spread=facts["peak_spread_bytes"],
    )


def is_right(row: Row) -> bool:
    """Requested to the byte, allocated within 1 % (to the byte with expandable segments), no retries."""
    if row.difference is None or row.measured is None:
        return False
    slack = 0 if row.allocator == "expandable" else row.measured["allocated"] / 100
    return row.difference["requested"] == 0 and abs(row.difference["allocated"]) <= slack and row.retries == 0


def check_kernels(device: str, gpu: GPU) -> Iterator[tuple[str, str, int, int | None]]:
    """Of each kernel case: name, where such sizes were seen, bytes by the table, bytes measured of the operator alone.

    Off CUDA nothing is measured, and the last one is None.
    """
    for name, operator, args in kernel_cases(device):
        measured = _inside(operator, args) if device == "cuda" else None
        kernel = KERNELS[operator]
        yield name, kernel.seen, sum(kernel.buffers(args, gpu)), measured


def device_here() -> GPU:
    """The CUDA device of this process as a target."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    query = getattr(torch.backends.cuda, "cublas_workspace_size", None)  # since torch 2.13
    return GPU(
        name=properties.name,
        total_bytes=properties.total_memory,
        capability=f"{properties.major}.{properties.minor}",
        workspace_bytes=query() if query else None,
        multiprocessors=properties.multi_processor_count,
        threads_per_multiprocessor=properties.max_threads_per_multi_processor,
        source="the device itself",
    )


def kernel_cases(device: str) -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    """Name, operator and arguments of each call that `check_kernels` makes; off CUDA on tensors without data."""
    aten = torch.ops.aten
    place = torch.device(device if device == "cuda" else "meta")
    zeros = partial(torch.zeros, dtype=torch.bfloat16, device=place)
    for B, H, S, width, kv in (
        (1, 32, 8192, 128, 32),
        (1, 8, 1024, 64, 8),
        (1, 12, 1000, 64, 12),
        (1, 32, 4096, 128, 8),
    ):
        q, k, v = (zeros((B, h, S, width)) for h in (H, kv, kv))
        shape = f"B={B} H={H} kv={kv} S={S} width={width}"
        yield f"flash forward {shape}", aten._scaled_dot_product_flash_attention.default, (q, k, v, 0.0, True)
        out = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)
        saved = (out[0], q, k, v, *out[:6], 0.0, True, *out[6:8])
        yield f"flash backward {shape}", aten._scaled_dot_product_flash_attention_backward.default, saved
    for B, H, S, width in ((2, 16, 2048, 128), (1, 8, 4096, 64), (1, 12, 1000, 64)):
        q, k, v = (torch.zeros((B, S, H, width), device=place).transpose(1, 2) for _ in range(3))
        out = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, True)
        saved = (out[0], q, k, v, None, *out, 0.0, [True, True, True, False], True)
        name = f"efficient backward B={B} H={H} S={S} width={width}"
        yield name, aten._scaled_dot_product_efficient_attention_backward.default, saved
    for S, V, D in ((1024, 32000, 1024), (4096, 32000, 1024), (8192, 1000, 1024)):
        indices = torch.zeros((1, S), dtype=torch.long, device=place)
        args = (zeros((1, S, D)), indices, V, -1, False)
        yield f"embedding backward S={S} V={V} D={D}", aten.embedding_dense_backward.default, args
    yield "norms of gradients", aten._foreach_norm.Scalar, ([zeros((size,)) for size in (10, 1000, 10_000_000)],)
    for rows, columns in ((4096, 1024), (8192, 4096), (1000, 512)):
        matrix = torch.zeros((rows, columns), device=place)
        yield f"sum over {rows} rows of {columns}", aten.sum.dim_IntList, (matrix, [0])
    rows_and_columns = torch.zeros((8192, 4096), device=place)
    yield "mean along 8192 rows of 4096", aten.mean.dim, (rows_and_columns, [-1], True)
    yield "maximum along 8192 rows of 4096", aten.amax.default, (rows_and_columns, [1])
    yield "number of 262144 that hold", aten.sum.default, (torch.zeros((4, 65536), dtype=torch.bool, device=place),)
    yield "norm of 1000000 values", aten.linalg_vector_norm.default, (torch.zeros((1_000_000,), device=place),)


def _inside(operator: Any, args: tuple[Any, ...]) -> int:
    """Bytes the operator takes at its peak besides its results."""
    operator(*args)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    out = operator(*args)
    torch.cuda.synchronize()
    peak = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
    tensors = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor) and leaf.is_cuda]
    results = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return int(peak) - sum(results.values())


def _before(out: Path, about: dict[str, Any]) -> list[Row]:
    """The cases in check.json that this code found on this device, without the failed ones."""
    try:
        document = read_json(out / FILE)
        if any(document.get(key) != value for key, value in about.items()):
            return []
        rows = [from_table(Row, row) for row in document["cases"] if not row["error"]]
        for row in rows:
            _line(row)  # raises where a figure is missing
        return rows
    except (BadInput, KeyError, TypeError, AttributeError):
        return []


def _line(row: Row) -> str:
    head = f"{row.shape} n={row.n} {row.strategy} {row.allocator}"
    if row.error:
        return f"{head}: {row.error}"
    if row.difference is None:
        return f"{head}: " + ", ".join(f"{key} {row.predicted[key]:,}" for key in FIELDS)
    parts = (f"{key} {row.measured[key]:,} ({row.difference[key]:+,})" for key in FIELDS if row.measured)
    return f"{head}: measured (predicted minus measured) " + ", ".join(parts) + f", unnamed {row.unnamed:,}"
