"""A remembered result is the operator's own: shapes, strides, dtypes, and whose memory it lies in."""

from typing import Any

import torch
from small import tiny

from mtp_mem import Workload, load_strategy
from mtp_mem.prediction import simulated_step
from mtp_mem.prediction.meta_results import MetaResults

ATEN = torch.ops.aten


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def facts(tensor: torch.Tensor) -> tuple[Any, ...]:
    return (
        tuple(tensor.shape),
        tensor.stride(),
        tensor.dtype,
        tensor.storage_offset(),
        tensor.untyped_storage().nbytes(),
    )


def twice(func: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    results = MetaResults()
    return results.run(func, args, kwargs)[0], results.run(func, args, kwargs)[0]


def test_a_new_tensor() -> None:
    a, b = meta(3, 4).T, meta(3, 5, dtype=torch.bfloat16)
    for func, args in (
        (ATEN.mul.Tensor, (a, 2.0)),
        (ATEN.mm.default, (a, meta(3, 5))),
        (ATEN.sum.dim_IntList, (b, [0])),
        (ATEN._log_softmax.default, (a, 1, False)),
    ):
        first, second = twice(func, *args)
        assert facts(first) == facts(second)
        assert first.untyped_storage()._cdata != second.untyped_storage()._cdata


def test_several_tensors_and_none() -> None:
    q = meta(1, 2, 8, 16, dtype=torch.bfloat16)
    first, second = twice(ATEN._scaled_dot_product_flash_attention.default, q, q, q, 0.0, True)
    assert isinstance(second, tuple)
    assert [facts(t) if isinstance(t, torch.Tensor) else t for t in first] == [
        facts(t) if isinstance(t, torch.Tensor) else t for t in second
    ]


def test_what_an_operator_writes_into_is_returned_itself() -> None:
    a, out = meta(3, 4), meta(3, 4)
    assert twice(ATEN.mul_.Tensor, a, 2.0)[1] is a
    assert twice(ATEN.mul.out, a, a, out=out)[1] is out


def test_a_view_stays_a_view() -> None:
    a = meta(3, 4)
    for func, args in ((ATEN.view.default, (a, [12])), (ATEN.slice.Tensor, (a, 0, 1, 2)), (ATEN.t.default, (a,))):
        results = MetaResults()
        for _ in range(2):
            out, makes = results.run(func, (*args,), {})
            assert out.untyped_storage()._cdata == a.untyped_storage()._cdata
        assert not makes


def test_arguments_are_told_apart_by_type_shape_and_dtype() -> None:
    results = MetaResults()
    assert results.run(ATEN.add.Tensor, (meta(2), 1), {})[0].dtype == torch.float32
    ints = meta(2, dtype=torch.int64)
    assert results.run(ATEN.add.Tensor, (ints, 1), {})[0].dtype == torch.int64
    assert results.run(ATEN.add.Tensor, (ints, 1.0), {})[0].dtype == torch.float32
    assert results.run(ATEN.add.Tensor, (ints, True), {})[0].dtype == torch.int64


def test_tensors_with_data_are_worked_on() -> None:
    results, one = MetaResults(), torch.ones(2)
    for _ in range(2):
        assert torch.equal(results.run(ATEN.add.Tensor, (one, 1), {})[0], torch.full((2,), 2.0))


def test_a_step_is_the_same_event_for_event_without_it(monkeypatch: Any) -> None:
    config, workload = tiny(n_future=2, n_layers=4), Workload(batch=2, sequence=64, dtype="bf16")

    class Nothing(MetaResults):
        def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, bool]:
            return func(*args, **kwargs), True

    traces = []
    for kind in (MetaResults, Nothing):
        monkeypatch.setattr(simulated_step, "MetaResults", kind)
        traces.append(
            [simulated_step.simulate(config, workload, load_strategy(spec)) for spec in ("naive", "chunked_tokens")]
        )
    for one, other in zip(*traces, strict=True):
        assert one.events == other.events
        assert one.storages == other.storages
