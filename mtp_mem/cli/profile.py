"""`mtp-mem profile new` and `mtp-mem profile check`: profiles without writing Python."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtp_mem.cli.common import AddCommand, note, numbers

if TYPE_CHECKING:
    from mtp_mem.config.schema import Profile


def add(command: AddCommand) -> None:
    """Register the command with its two actions."""
    help_ = "make a profile from a Hugging Face config.json, or check one"
    actions = command("profile", new, help_).add_subparsers(required=True, metavar="ACTION")
    make = actions.add_parser("new", help="a profile from a Hugging Face config.json", description=new.__doc__)
    make.set_defaults(run=new)
    make.add_argument("--from-hf", required=True, type=Path, metavar="CONFIG", help="the model's config.json")
    make.add_argument("-o", "--out", type=Path, metavar="FILE.toml", help="where to write; default: stdout")
    make.add_argument("--force", action="store_true", help="replace a file that is there")
    make.add_argument("--n", type=numbers, metavar="1,2,4", help="numbers of heads; default: 1,2,4,8, or MTP's own")
    make.add_argument("--batch", type=int, default=1, metavar="B", help="sequences; default 1")
    make.add_argument("--sequence", type=int, metavar="S", help="tokens of a sequence; default 4096")
    make.add_argument(
        "--approximate", action="store_true", help="the nearest model where this one cannot be represented"
    )
    look = actions.add_parser("check", help="is it valid, and how large is it?", description=check.__doc__)
    look.set_defaults(run=check)
    look.add_argument("profile", metavar="PROFILE", help="a TOML file, or a shipped profile (see list)")
    for action in (make, look):
        # Suppressed, so that it does not undo a --json that stands before the action.
        action.add_argument(
            "--json", action="store_true", default=argparse.SUPPRESS, help="one JSON document on stdout"
        )


def new(args: argparse.Namespace) -> int:
    """A profile from a Hugging Face config.json; what the model here does otherwise is noted, in the file too."""
    from mtp_mem.config.profiles import to_toml, write_new
    from mtp_mem.model.hf import convert

    conversion = convert(
        args.from_hf,
        name=args.out.stem if args.out else args.from_hf.stem,
        n=args.n,
        batch=args.batch,
        sequence=args.sequence,
        approximate=args.approximate,
    )
    own_count = (
        "as many here" if conversion.parameters == conversion.written else f"{conversion.written:,} here at n = 1"
    )
    size = f"{conversion.parameters:,} parameters by the config, {own_count}"
    texts = [difference.text for difference in conversion.differences]
    origin = f"From the config.json of a {conversion.model_type} by `mtp-mem profile new`: {size}."
    heading = ["What the model there has and the model here does otherwise:"] if texts else []
    toml = to_toml(conversion.profile, [origin, *heading, *(f"- {text}" for text in texts)])
    if args.out:
        write_new(args.out, toml, force=args.force)
    for text in [size, *texts]:
        note(f"note: {text}")
    if args.json:
        document = {
            "file": str(args.out) if args.out else None,
            "profile": dataclasses.asdict(conversion.profile),
            "parameters": {"config": conversion.parameters, "profile": conversion.written},
            "notes": texts,
            "toml": toml,
        }
        print(json.dumps(document, indent=1))
    elif args.out:
        print(f"{args.out}: a profile; `mtp-mem profile check {args.out}`, `mtp-mem predict --profile {args.out}`")
    else:
        print(toml, end="")
    return 0


def check(args: argparse.Namespace) -> int:
    """Is the profile valid, what shape is its model, how many parameters and logits has it, which n are possible?"""
    from mtp_mem.config.profiles import load_profile
    from mtp_mem.data import check_vocabulary
    from mtp_mem.errors import Missing
    from mtp_mem.model.layers import FLASH_CHANNELS
    from mtp_mem.strategy import load_strategy

    profile = load_profile(args.profile)
    check_vocabulary(profile.workload, profile.model.vocab_size)
    notes = []
    channels = profile.model.head_channels
    if profile.workload.dtype.startswith("bf16") and channels > FLASH_CHANNELS:
        notes.append(f"D / heads = {channels}: flash attention on CUDA takes at most {FLASH_CHANNELS}")
    for spec in profile.sweep.strategies:
        try:
            load_strategy(spec)
        except Missing as e:  # valid, only not here
            notes.append(f"{spec} cannot run here: {e}")
    facts = _facts(profile)
    for text in notes:
        note(f"note: {text}")
    if args.json:
        print(json.dumps({"profile": dataclasses.asdict(profile), **facts, "notes": notes}, indent=1))
        return 0
    _show(profile, facts)
    return 0


def _facts(profile: "Profile") -> dict[str, Any]:
    from mtp_mem.model.losses import loss_dtype
    from mtp_mem.model.mtp_model import PARAMETER_DTYPES
    from mtp_mem.model.parameters import parameters, weight_bytes

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


def _show(profile: "Profile", facts: dict[str, Any]) -> None:
    from mtp_mem._util import format_bytes

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
