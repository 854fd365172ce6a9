"""`mtp-mem list` and `mtp-mem env`: what can be chosen, and the machine."""

import argparse
import json

import torch
from rich.table import Table

from mtp_mem.cli.common import AddCommand, console
from mtp_mem.config.gpus import load_gpus
from mtp_mem.config.profiles import builtin_profiles, load_profile
from mtp_mem.environment import environment
from mtp_mem.errors import MtpMemError
from mtp_mem.strategy import available, summary


def add(command: AddCommand) -> None:
    """Register the commands."""
    command("list", list_, "strategies and profiles, a line each")
    command("env", env, "the machine, as every record describes it")


def list_(args: argparse.Namespace) -> int:
    """Print strategies, profiles and GPUs, a line each."""
    strategies: dict[str, str] = {}
    for name in available():
        try:
            strategies[name] = summary(name)
        except MtpMemError as e:
            strategies[name] = f"not available: {e}"
    profiles = {name: load_profile(name).description for name in builtin_profiles()}
    gpus = {name: gpu.name for name, gpu in load_gpus().items()}
    if args.json:
        print(json.dumps({"strategies": strategies, "profiles": profiles, "gpus": gpus}, indent=1))
        return 0
    screen = console()
    for title, entries in (("Strategies", strategies), ("Profiles", profiles), ("GPUs", gpus)):
        screen.print(title)
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(no_wrap=True)
        for name, line in entries.items():
            table.add_row(f"  {name}", line)
        screen.print(table)
    return 0


def env(args: argparse.Namespace) -> int:
    """Print the machine, as every record describes it."""
    facts = environment("cuda" if torch.cuda.is_available() else "cpu")
    if args.json:
        print(json.dumps(facts, indent=1))
    else:
        for key, value in facts.items():
            print(f"{key:18} {value}")
    return 0
