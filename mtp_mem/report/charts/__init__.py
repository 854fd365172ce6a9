"""Charts from records. Every chart is written as PNG and SVG together with the CSV it was drawn from."""

from mtp_mem.report.charts.batch import largest_batch
from mtp_mem.report.charts.collectives import collectives
from mtp_mem.report.charts.composition import composition
from mtp_mem.report.charts.memory import memory_of_setups, memory_small_multiples, memory_vs_n
from mtp_mem.report.charts.time import time_vs_n
from mtp_mem.report.charts.tradeoff import throughput_vs_memory
from mtp_mem.report.charts.world import peak_of_a_rank

__all__ = [
    "collectives",
    "composition",
    "largest_batch",
    "memory_of_setups",
    "memory_small_multiples",
    "memory_vs_n",
    "peak_of_a_rank",
    "throughput_vs_memory",
    "time_vs_n",
]
