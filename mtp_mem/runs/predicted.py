"""Predicted records of a profile's cases, on a GPU that need not be here: fake tensors and the allocator's model."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from mtp_mem._util import Progress, without_collections
from mtp_mem.config.gpus import GPU
from mtp_mem.config.schema import Profile
from mtp_mem.environment import environment
from mtp_mem.errors import contained, one_line
from mtp_mem.model.build import parameters
from mtp_mem.prediction import simulated_step
from mtp_mem.prediction.auto import resolve_auto
from mtp_mem.prediction.peaks import assumptions, predicted
from mtp_mem.runs.identity import case_id, implementation
from mtp_mem.runs.record import Record, new_record
from mtp_mem.strategy import load_strategy


def predict(profile: Profile, gpu: GPU, progress: Progress) -> Iterator[Record]:
    """Predicted records of all the profile's cases on `gpu`, n by n."""
    workload, named = profile.workload, {**dataclasses.asdict(profile.workload), "source": f"for {gpu.name}"}
    training = profile.training.facts(workload.dtype)
    env = {**environment("cpu"), "target": gpu.name, "target_bytes": gpu.total_bytes}
    env["assumptions"] = assumptions(gpu)
    with without_collections():
        for n in profile.sweep.n:
            config = profile.model.with_n(n)
            progress(f"n={n} floor")
            simulation = simulated_step.Simulation(config, workload, profile.training, gpu=gpu)
            floor = predicted(simulation.floor(), gpu)
            for spec in profile.sweep.strategies:
                progress(f"n={n} {spec}")
                facts: dict[str, Any] = {"status": "ok"}
                version = ""
                try:
                    strategy = load_strategy(spec)
                    version = implementation(strategy)
                    strategy, chosen = resolve_auto(strategy, config, workload, profile.training, cuda=True, gpu=gpu)
                    with contained():
                        traced = predicted(simulation.trace(strategy), gpu)
                    facts |= {"chosen": chosen, **traced, **simulation.collectives}
                except Exception as e:
                    facts |= {"status": "error", "error": one_line(e)}
                yield new_record(
                    case_id(spec, version, config.facts(), named, training, env),
                    spec,
                    version,
                    config,
                    named,
                    training=training,
                    backend="fake",
                    environment=env,
                    parameters=sum(parameters(config).values()),
                    floor=floor,
                    facts=facts,
                )
