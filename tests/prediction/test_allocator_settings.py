"""Settings of the caching allocator: which the model follows, which it names, which are nonsense."""

import pytest

from mtp_mem._util import MiB
from mtp_mem.errors import BadInput
from mtp_mem.prediction.cuda.allocator_settings import AllocatorSettings, allocator_settings, from_environment


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        ("", AllocatorSettings()),
        ("expandable_segments:True", AllocatorSettings(expandable=True)),
        (" large_segment_size_mb : 64 , expandable_segments:False", AllocatorSettings(False, 64 * MiB)),
        ("max_split_size_mb:128", AllocatorSettings(max_split=128 * MiB)),
        ("pinned_use_background_threads:True,per_process_memory_fraction:0.9,backend:native", AllocatorSettings()),
        (
            "roundup_power2_divisions:[256:1,512:2,>:8],garbage_collection_threshold:0.8,backend:cudaMallocAsync",
            AllocatorSettings(
                not_modelled=(
                    "roundup_power2_divisions:[256:1,512:2,>:8]",
                    "garbage_collection_threshold:0.8",
                    "backend:cudaMallocAsync",
                )
            ),
        ),
    ],
)
def test_settings(text: str, settings: AllocatorSettings) -> None:
    assert allocator_settings(text) == settings


@pytest.mark.parametrize("text", ["expandable_segments:yes", "large_segment_size_mb:0", "max_split_size_mb:20MB"])
def test_nonsense_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match=r"PYTORCH_ALLOC_CONF = .*: expected "):
        from_environment({"PYTORCH_ALLOC_CONF": text})


def test_the_newer_variable_counts() -> None:
    old, new = "expandable_segments:False", "expandable_segments:True"
    assert from_environment({}) == ""
    assert from_environment({"PYTORCH_CUDA_ALLOC_CONF": old}) == old
    assert from_environment({"PYTORCH_CUDA_ALLOC_CONF": old, "PYTORCH_ALLOC_CONF": new}) == new
