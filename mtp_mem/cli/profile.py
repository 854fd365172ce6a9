"""`mtp-mem profile check`: is a profile valid, and how large is it?"""

import argparse
import dataclasses
import json
from typing import Any

from mtp_mem._util import format_bytes
from mtp_mem.cli.common import AddCommand, note
from mtp_mem.config.profiles import load_profile
from mtp_mem.config.schema import Profile
from mtp_mem.data import check_vocabulary
from mtp_mem.model.build import parameters, weight_bytes
from mtp_mem.model.layers import FLASH_CHANNELS, PARAMETER_DTYPES
from mtp_mem.model.losses import loss_dtype
from mtp_mem.strategy import load_present


def add(command: AddCommand) -> None:
    """Register the command with its action."""
    actions = command("profile", check, "check a profile").add_subparsers(required=True, metavar="ACTION")
    look = actions.add_parser("check", help="is it valid, and how large is it?", description=check.__doc__)
    look.set_defaults(run=check)
    look.add_argument("profile", metavar="PROFILE", help="a TOML file, or a shipped profile (see list)")
    # Suppressed, so that it does not undo a --json that stands before the action.
    look.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="one JSON document on stdout")


def check(args: argparse.Namespace) -> int:
    """Is the profile valid, what shape is its model, how many parameters and logits has it, which n are possible?"""
    profile = load_profile(args.profile)
    check_vocabulary(profile.workload, profile.model.vocab_size)
    notes = []
    channels = profile.model.head_channels
    if profile.workload.dtype in ("bf16", "bf16-mixed", "fp16") and channels > FLASH_CHANNELS:
        notes.append(f"D / heads = {channels}: flash attention on CUDA takes at most {FLASH_CHANNELS}")
    _, missing = load_present(profile.sweep.strategies)
    notes += [f"{spec} cannot run here: {why}" for spec, why in missing.items()]  # valid, only not here
    facts = _facts(profile)
    for text in notes:
        note(f"note: {text}")
    if args.json:
        print(
            json.dumps(
                {"profile": {**dataclasses.asdict(profile), "model": profile.model.facts()}, **facts, "notes": notes},
                indent=1,
            )
        )
        return 0
    _show(profile, facts)
    return 0


def _facts(profile: Profile) -> dict[str, Any]:
    dtype, values = profile.workload.dtype, profile.workload.tokens * profile.model.vocab_size
    rows = []
    for n in profile.sweep.n:
        parts = parameters(profile.model.with_n(n))
        total = sum(parts.values())
        rows.append({"n": n, "parameters": total, "weight_bytes": weight_bytes(total, dtype), "parts": parts})
    return {
        "largest_n": profile.model.largest_n,
        "logits": {
            "shape": [profile.workload.tokens, profile.model.vocab_size],
            "values": values,
            "bytes": values * loss_dtype(PARAMETER_DTYPES[dtype]).itemsize,
        },
        "cases": rows,
    }


def _show(profile: Profile, facts: dict[str, Any]) -> None:
    model, work, logits = profile.model, profile.workload, facts["logits"]
    largest = facts["largest_n"]
    shape = (
        f"V = {model.vocab_size}, D = {model.dim}, {model.n_layers} layers, {model.n_attention_heads} attention heads"
        f" ({model.kv_heads} for keys and values), feed-forward {model.hidden_dim}"
    )
    lines = {
        "profile": f"{profile.name}: {profile.description}" if profile.description else profile.name,
        "model": shape,
        "heads": f"{model.head}, unembedding {model.unembedding}",
        "possible n": f"1 to {largest}" if largest else f"1 or more (from n = {work.sequence} on a head has no target)",
        "step": f"B = {work.batch}, S = {work.sequence}, N = {work.tokens}, {work.dtype}, tokens: {work.tokenizer}",
        "logits": f"{logits['values']:,} a head (N V), {format_bytes(logits['bytes'])} in the loss's dtype",
        "strategies": ", ".join(profile.sweep.strategies),
    }
    for name, text in lines.items():
        print(f"{name:10}  {text}")
    print(f"\n{'n':>4} {'parameters':>18} {'weights':>10}")
    for case in facts["cases"]:
        print(f"{case['n']:>4} {case['parameters']:>18,} {format_bytes(case['weight_bytes']):>10}")
