"""Options that change a profile's model, step and GPU from the command line."""

import argparse
import dataclasses
import os
import re
from pathlib import Path
from typing import Any

from mtp_mem._util import format_bytes
from mtp_mem.config.gpus import GPU, load_gpu
from mtp_mem.config.other_models import factory_profile, huggingface_profile
from mtp_mem.config.profiles import load_profile, with_precision
from mtp_mem.config.schema import Profile, Training
from mtp_mem.config.toml import parse, type_hints
from mtp_mem.errors import BadInput
from mtp_mem.model.build import make_model

HF_KINDS = ("parallel", "causal", "anticausal", "deepseek", "medusa", "linear")
UNITS = {"": 1, "b": 1, "mib": 2**20, "gib": 2**30, "tib": 2**40, "mb": 10**6, "gb": 10**9, "tb": 10**12}


def model_options(sub: argparse.ArgumentParser, profile: str | None) -> None:
    """Add `--profile`, `--hf` and `--model`, which choose what is run, and `--kind`.

    Args:
        sub: the command's parser.
        profile: the default profile; None: there is none.
    """
    default = f"; default {profile}" if profile else ""
    group = sub.add_mutually_exclusive_group()
    group.add_argument("--profile", help=f"a shipped profile (see list) or a TOML file{default}")
    group.add_argument(
        "--hf", type=Path, metavar="CONFIG", help="a Hugging Face config.json, or a folder that holds one"
    )
    group.add_argument("--model", metavar="PACKAGE.MODULE:FUNCTION", help="your own model: what the function returns")
    sub.add_argument("--kind", choices=HF_KINDS, help="of the heads of --hf; default parallel, or deepseek for MTP")
    sub.set_defaults(default_profile=profile)


def chosen_profile(args: argparse.Namespace) -> Profile:
    """The profile of `--profile`, `--hf` or `--model`, with the command line's changes."""
    if args.kind and not args.hf:
        raise BadInput("--kind is an option of --hf; profiles have model.head, and your own function decides")
    if args.hf:
        profile = huggingface_profile(args.hf, args.kind)
    elif args.model:
        profile = factory_profile(args.model, make_model)
    else:
        profile = load_profile(args.profile or args.default_profile)
    return with_setup(profile, args)


def training_options(sub: argparse.ArgumentParser) -> None:
    """Add `--dtype` (or `--precision`), the shape of the step, and the training setup."""
    group = sub.add_argument_group("the step, instead of the profile's")
    group.add_argument(
        "--dtype",
        "--precision",
        dest="dtype",
        metavar="NAME",
        help="fp32, bf16, bf16-mixed, fp16 or 'bf16 + fp32 master'",
    )
    group.add_argument("--batch", type=count, metavar="B", help="sequences of a micro-batch")
    group.add_argument("--sequence", type=count, metavar="S", help="tokens of a sequence")
    group.add_argument("--layers", type=count, metavar="L", help="trunk and heads together")
    group.add_argument("--vocab", type=count, metavar="V", help="entries of the vocabulary")
    group.add_argument(
        "--trunk-checkpointing", metavar="HOW", help="none, full, or k: every k-th trunk layer runs again"
    )
    group.add_argument("--optimizer", metavar="NAME", help="adamw, adamw-foreach, adamw-loop, adamw-8bit or sgd")
    group.add_argument("--micro-batches", metavar="K", help="passes whose gradients one optimizer step sums")
    group.add_argument("--label-smoothing", metavar="E", help="of every head's loss, from 0 to below 1")
    group.add_argument("--z-loss", metavar="K", help="adds K times the squared logsumexp to every token's loss")
    group.add_argument("--loss-scale", metavar="X", help="the loss is multiplied by it; default 1, in fp16 1024")
    group.add_argument("--frozen", metavar="PARTS", help="trunk, 'all but heads', or parts like embedding,norm")
    group.add_argument(
        "--sharding",
        metavar="HOW",
        help="none, ddp, fsdp2 or hsdp: predict, plan and timeline then say a rank's bytes,"
        " compare and verify run it with --nproc",
    )
    group.add_argument("--world", metavar="W", help="GPUs to shard over; the batch is each one's own")
    group.add_argument("--set-to-none", metavar="true|false", help="whether gradients are freed between steps")


def part_option(sub: argparse.ArgumentParser) -> None:
    """Add `--part`."""
    sub.add_argument(
        "--part",
        metavar="WHAT",
        help="step, or heads: what is above the cut alone, on given hidden states: no trunk, clipping and optimizer",
    )


def ranks_option(sub: argparse.ArgumentParser, what: str) -> None:
    """Add `--nproc`; `what` says in its help what runs on the ranks."""
    sub.add_argument(
        "--nproc",
        type=count,
        metavar="N",
        help=f"{what} on N ranks, processes of this machine: gloo on CPUs, a device each and NCCL on CUDA; sharded as"
        " --sharding says, default fsdp2. Under torchrun the ranks are torchrun's",
    )


def gpu_options(sub: argparse.ArgumentParser, *, several: bool) -> None:
    """Add `--gpu`, for one GPU or for several, and `--gpu-memory`."""
    one = "a GPU of the catalogue (see list), or FILE.toml:NAME"
    if several:
        sub.add_argument("--gpu", type=names, metavar="A,B", help=f"each {one}; instead of the profile's")
    else:
        sub.add_argument("--gpu", help=f"{one}; default the first of the profile's")
    sub.add_argument(
        "--gpu-memory",
        type=size,
        metavar="24GiB",
        help="the GPU's memory, instead of the catalogue's",
    )


def changes_given(args: argparse.Namespace) -> list[str]:
    """The given options that would change a profile's model, step or GPU, in the order of `--help`."""
    fields = (field.name for field in dataclasses.fields(Training))
    names = ("kind", "n", "dtype", "batch", "sequence", "layers", "vocab", *fields, "gpu_memory")
    return [f"--{name.replace('_', '-')}" for name in names if getattr(args, name, None) is not None]


def with_setup(profile: Profile, args: argparse.Namespace) -> Profile:
    """The profile with the command line's changes of model, step and training."""

    def given(**options: str) -> dict[str, Any]:
        return {name: value for name, option in options.items() if (value := getattr(args, option, None)) is not None}

    model = given(vocab_size="vocab", n_layers="layers")
    workload = given(batch="batch", sequence="sequence")
    hints = type_hints(Training)
    asked = given(**{field.name: field.name for field in dataclasses.fields(Training)})
    training = {name: parse(hints[name], text, f"training.{name}") for name, text in asked.items()}
    if ranks := getattr(args, "nproc", None):
        if training.get("world", ranks) != ranks:
            raise BadInput(f"--world {training['world']} with {ranks} ranks: leave --world out")
        training["world"] = ranks
        if training.get("sharding", profile.training.sharding) == "none":
            training["sharding"] = "fsdp2"
    if args.dtype is not None:
        profile = with_precision(profile, args.dtype)
    return dataclasses.replace(
        profile,
        model=dataclasses.replace(profile.model, **model),
        workload=dataclasses.replace(profile.workload, **workload),
        training=dataclasses.replace(profile.training, **training),
    )


def gpu_of(name: str, args: argparse.Namespace) -> GPU:
    """The GPU of this name; `--gpu-memory` replaces its bytes, PYTORCH_ALLOC_CONF its allocator settings."""
    from mtp_mem.prediction.cuda.allocator_settings import allocator_settings, from_environment

    gpu = load_gpu(name)
    allocator_settings(gpu.allocator, f"{name}: allocator")
    nbytes: int | None = args.gpu_memory
    if nbytes is not None:
        gpu = dataclasses.replace(gpu, name=f"{gpu.name} with {format_bytes(nbytes)}", total_bytes=nbytes)
    if text := from_environment(os.environ):
        gpu = dataclasses.replace(gpu, name=f"{gpu.name}, {text}", allocator=text)
    return gpu


def names(text: str) -> tuple[str, ...]:
    """The names of an argument like `a,b`."""
    parts = tuple(name.strip() for name in text.split(",") if name.strip())
    if not parts:
        raise argparse.ArgumentTypeError(f"{text!r}: expected at least one name")
    return parts


def count(text: str) -> int:
    """The number of an argument that must be a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of at least 1")
    return int(text)


def size(text: str) -> int:
    """The bytes of an argument like `24GiB`."""
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if not match or match[2].lower() not in UNITS:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a size like 24GiB or 24GB")
    nbytes = int(float(match[1]) * UNITS[match[2].lower()])
    if not 2**20 <= nbytes < 2**50:
        raise argparse.ArgumentTypeError(f"{text!r}: expected 1MiB to 1024TiB")
    return nbytes
