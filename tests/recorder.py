"""Snapshots in the form of torch.cuda.memory._snapshot(), made by our model of CUDA's caching allocator.

No CUDA device is needed. What the reader and the replay must get right is all there: history, segments, frames,
several devices and streams. Whether the model itself is right, only recordings of real GPUs can show.
"""

from typing import Any

from mtp_mem.prediction.caching_allocator import Block, CachingAllocator

FRAMES = [
    {"filename": "??", "line": 0, "name": "torch::unwind::unwind()"},
    {"filename": "/home/user/torch/nn/functional.py", "line": 2000, "name": "linear"},
    {"filename": "/home/user/secret/train.py", "line": 7, "name": "step"},
]


class Recorder(CachingAllocator):
    """The model of the allocator, which records its history as CUDA's allocator does."""

    def __init__(self, *, device: int = 0, stream: int = 0, base: int = 0x7F0000000000, **settings: Any) -> None:
        super().__init__(**settings)
        self.device, self.stream, self._next_address = device, stream, base
        self.history: list[dict[str, Any]] = []
        self.clock = 1_700_000_000_000_000

    def note(self, action: str, address: int, nbytes: int, frames: list[dict[str, Any]] = FRAMES) -> None:
        self.clock += 250
        event = {"action": action, "addr": address, "size": nbytes, "stream": self.stream, "time_us": self.clock}
        self.history.append({**event, "compile_context": "N/A", "user_metadata": "", "frames": frames})

    def allocate(self, key: int, nbytes: int) -> None:
        super().allocate(key, nbytes)
        self.note("alloc", self.taken[key][0].address, nbytes)

    def release(self, key: int) -> None:
        block, nbytes = self.taken[key]
        for action in ("free_requested", "free_completed"):
            self.note(action, block.address, nbytes, [])
        super().release(key)

    def empty_cache(self, only: Any = None) -> dict[int, int]:
        given = super().empty_cache(only)
        for address, nbytes in given.items():
            self.note("segment_unmap" if self.expandable else "segment_free", address, nbytes)
        return given

    def run_out(self, nbytes: int) -> None:
        self.empty_cache()
        self.history.append(
            {"action": "oom", "device_free": 0, "size": nbytes, "stream": self.stream, "frames": FRAMES}
        )
        self.history[-1]["time_us"] = self.clock

    def _new(self, size: int, small: bool) -> Block:
        block = super()._new(size, small)
        self.note("segment_alloc", block.address, block.nbytes)
        return block

    def _map(self, block: Block, nbytes: int) -> Block:
        address, reserved = block.address, self.reserved
        block = super()._map(block, nbytes)
        self.note("segment_map", address, self.reserved - reserved)
        return block

    def segments(self) -> list[dict[str, Any]]:
        """The snapshot's segments: runs of adjacent blocks that have memory behind them."""
        blocks = [block for block, _ in self.taken.values()]
        blocks += [block for free in self.free_blocks.values() for _, _, block in free]
        firsts = [b for b in blocks if b.before is None or not b.before.mapped]
        rows = []
        for block in sorted(firsts, key=lambda block: block.address):
            one: Block | None = block
            rows.append(self._segment(block))
            while one is not None and one.mapped:
                rows[-1]["total_size"] += one.nbytes
                row = {"address": one.address, "size": one.nbytes, "requested_size": 0, "state": "inactive"}
                if not one.free:
                    asked = next(nbytes for taken, nbytes in self.taken.values() if taken is one)
                    row |= {"requested_size": asked, "state": "active_allocated"}
                rows[-1]["blocks"].append({**row, "frames": FRAMES})
                one = one.after
        return rows

    def _segment(self, block: Block) -> dict[str, Any]:
        return {
            "device": self.device,
            "address": block.address,
            "total_size": 0,
            "stream": self.stream,
            "segment_type": "small" if block.small else "large",
            "segment_pool_id": (0, 0),
            "is_expandable": self.expandable,
            "frames": FRAMES,
            "blocks": [],
        }


def snapshot(*recorders: Recorder, conf: str = "", since: int = 0) -> dict[str, Any]:
    """One snapshot of all recorders, each device's history in the order of time, without its first `since` events."""
    devices = range(1 + max(recorder.device for recorder in recorders))
    histories = [[e for r in recorders if r.device == device for e in r.history] for device in devices]
    return {
        "segments": [segment for recorder in recorders for segment in recorder.segments()],
        "device_traces": [sorted(history, key=lambda event: event["time_us"])[since:] for history in histories],
        "allocator_settings": {
            "PYTORCH_CUDA_ALLOC_CONF": conf,
            "max_split_size": next((r.max_split for r in recorders if r.max_split), -1),
            "garbage_collection_threshold": 0.0,
            "expandable_segments": recorders[0].expandable,
            "roundup_power2_divisions": {str(2**i): 0 for i in range(16)},
        },
        "external_annotations": [],
    }
