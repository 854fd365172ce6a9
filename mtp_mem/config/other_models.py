"""Configs of models that are not this package's own: a Hugging Face config, or a factory function of the user's.

Both are `ModelConfig`s, so that sweeps, records, tables and charts take them like any other. Fields of their own say
which class or function makes the model; mtp_mem/model/build.py calls it.
"""

import dataclasses
import hashlib
import importlib
import inspect
import json
import operator
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtp_mem._util import importing_from_here
from mtp_mem.config.foreign import read_json
from mtp_mem.config.schema import MOST_MODULES, Dtype, HeadKind, ModelConfig, Profile, Sweep, Workload
from mtp_mem.config.toml import short
from mtp_mem.errors import BadInput, Missing, one_line

COUNTS = re.compile("^(num|n)_.*(layer|expert|block|depth|head)|layers?$")
"""Keys of a Hugging Face config that say how many modules of a kind there are."""
CONTEXT = 4096
"""Tokens of a sequence by default; fewer where the model has fewer positions."""


@dataclass(frozen=True, kw_only=True)
class HuggingFaceConfig(ModelConfig):
    """A transformers decoder with n heads (mtp_mem/model/huggingface.py); `n_layers` is the decoder's own number.

    Attributes:
        architecture: its class, a ...ForCausalLM.
        settings: its config as JSON; `n_layers` and `vocab_size` take precedence.
    """

    architecture: str
    settings: str

    def __post_init__(self) -> None:
        self.check_sizes()

    def facts(self) -> dict[str, Any]:
        """The fields as a record keeps them: a digest in the place of the settings."""
        facts = dataclasses.asdict(self)
        return facts | {"settings": hashlib.sha256(facts["settings"].encode()).hexdigest()[:16]}


@dataclass(frozen=True, kw_only=True)
class FactoryConfig(ModelConfig):
    """A user's own model (mtp_mem/model/own.py), made by calling `factory(n)`.

    Attributes:
        factory: package.module:function.
        source: a digest of the module's source.
    """

    factory: str
    source: str

    def __post_init__(self) -> None:
        self.check_sizes()


def huggingface_profile(path: Path, kind: HeadKind | None = None) -> Profile:
    """A profile of the model that a Hugging Face `config.json` describes.

    Args:
        path: the file, or a folder that holds one.
        kind: the kind of heads; by default deepseek where the config has `num_nextn_predict_layers`, else parallel.

    Raises:
        BadInput: it is no config of a decoder that transformers knows.
        Missing: transformers is not installed.
    """
    path = path / "config.json" if os.path.isdir(path) else path
    table = _read(path)
    config, architecture = _decoder_config(table, path)
    depths = getattr(config, "num_nextn_predict_layers", None) or 0
    if type(depths) is not int or not 0 <= depths < MOST_MODULES:
        raise BadInput(f"{path}: num_nextn_predict_layers = {short(depths)}: expected 0 to {MOST_MODULES - 1}")
    try:  # a config's fields may be methods of transformers, which raise what they like
        heads, width = getattr(config, "num_attention_heads", 1), getattr(config, "intermediate_size", None)
        model = HuggingFaceConfig(
            vocab_size=config.vocab_size,
            dim=config.hidden_size,
            n_layers=config.num_hidden_layers,
            n_attention_heads=heads,
            n_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            ffn_dim=width if type(width) is int and width else None,
            head=kind or ("deepseek" if depths else "parallel"),
            unembedding="tied" if getattr(config, "tie_word_embeddings", False) else "shared",
            match_layers=False,
            logit_softcap=getattr(config, "final_logit_softcapping", None),
            architecture=architecture,
            settings=json.dumps(config.to_dict(), sort_keys=True, default=str),
        )
    except Exception as e:
        raise BadInput(f"{path}: {one_line(e)}") from None
    positions = getattr(config, "max_position_embeddings", None)
    positions = positions if type(positions) is int and positions >= 1 else CONTEXT
    dtype: Dtype = "fp32" if "float32" in str(table.get("torch_dtype", table.get("dtype"))) else "bf16"
    return Profile(
        name=_name(path.resolve().parent.name if path.name == "config.json" else path.stem) or config.model_type,
        description=f"{architecture} of {path}",
        model=model,
        workload=Workload(batch=1, sequence=min(CONTEXT, positions), dtype=dtype, tokenizer="uniform"),
        sweep=Sweep(n=(1, 1 + depths) if depths else (1, 2, 4)),
    )


def factory_profile(spec: str, load: Any) -> Profile:
    """A profile of the model that a user's function makes.

    Args:
        spec: package.module:function; called with n, it returns the model.
        load: `mtp_mem.model.build.make_model`, which this module may not import; called for n = 1 on device meta.

    Raises:
        BadInput: there is no such function, or it returns no model.
    """
    module_name, colon, name = spec.partition(":")
    if not colon or not name:
        raise BadInput(f"--model {spec}: expected package.module:function")
    try:
        with importing_from_here():
            module = importlib.import_module(module_name)
    except ModuleNotFoundError as e:
        raise BadInput(f"--model {spec}: no module {e.name!r} (looked in the installed packages and here)") from None
    except (Exception, SystemExit) as e:
        raise BadInput(f"--model {spec}: importing {module_name!r}: {one_line(e)}") from None
    if not callable(getattr(module, name, None)):
        raise BadInput(f"--model {spec}: module {module_name!r} has no function {name!r}")
    try:
        source = hashlib.sha256(inspect.getsource(module).encode()).hexdigest()[:16]
    except (OSError, TypeError):
        raise BadInput(
            f"--model {spec}: module {module_name!r} has no source, of which records keep a digest"
        ) from None
    unknown = FactoryConfig(
        vocab_size=1, dim=1, n_layers=1, n_attention_heads=1, match_layers=False, factory=spec, source=source
    )
    model = load(unknown, device="meta")
    try:
        known = dataclasses.replace(unknown, vocab_size=operator.index(model.vocab_size), dim=operator.index(model.dim))
    except TypeError:
        sizes = f"vocab_size = {short(model.vocab_size)}, dim = {short(model.dim)}"
        raise BadInput(f"--model {spec}: {sizes}: expected whole numbers") from None
    workload = Workload(batch=1, sequence=CONTEXT, dtype="bf16", tokenizer="uniform")
    profile_name = _name(f"{module_name.rpartition('.')[2]}-{name}")
    return Profile(name=profile_name, model=known, workload=workload, sweep=Sweep(n=(1, 2, 4)))


def transformers() -> Any:
    """The transformers library.

    Raises:
        Missing: it is not installed.
    """
    try:
        return importlib.import_module("transformers")
    except ImportError as e:
        raise Missing(f"Hugging Face models need the package transformers: pip install 'mtp-mem[hf]' ({e})") from None


def _read(path: Path) -> dict[str, Any]:
    table = read_json(path, nan=True)  # `"time_step_limit": [0.0, Infinity]` stands in configs of Mamba
    expected = "expected the config.json of a transformers ...ForCausalLM"
    if not isinstance(table, dict):
        raise BadInput(f"{path}: {expected}, not a JSON {type(table).__name__}")
    if "peft_type" in table:
        base = table.get("base_model_name_or_path")
        raise BadInput(f"{path}: is an adapter's config; {expected}, here that of its base model {base!r}")
    _check_counts(table, path)
    if not isinstance(table.get("model_type"), str):
        raise BadInput(f"{path}: has no model_type; {expected}")
    return table


def _check_counts(table: dict[str, Any], path: Path) -> None:
    """Raises BadInput for more layers, experts or heads than any model has: transformers would make lists as long."""
    for key, value in table.items():
        if isinstance(value, dict):
            _check_counts(value, path)
        elif type(value) is int and value > MOST_MODULES and COUNTS.search(key):
            raise BadInput(f"{path}: {key} = {short(value)}: no machine has a model with more than {MOST_MODULES}")


def _decoder_config(table: dict[str, Any], path: Path) -> tuple[Any, str]:
    """The decoder's config object, taken out of another where nested, and the name of its ...ForCausalLM class."""
    library = transformers()
    kind = table["model_type"]
    listed = table.get("architectures")
    named = [name for name in listed if isinstance(name, str)] if isinstance(listed, list) else []
    expected = "expected a decoder's, of a ...ForCausalLM"
    if named and not any(name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")) for name in named):
        raise BadInput(f"{path}: is the config of a {named[0]}; {expected}")
    try:
        cls = library.CONFIG_MAPPING[kind]
    except KeyError:
        version = library.__version__
        raise BadInput(f"{path}: model_type {kind!r} is unknown to transformers {version}; {expected}") from None
    try:
        config = cls.from_dict(table)
        text = config.get_text_config(decoder=True)
    except Exception as e:
        raise BadInput(f"{path}: transformers cannot read it: {one_line(e)}") from None
    if getattr(config, "is_encoder_decoder", False):
        raise BadInput(f"{path}: is the config of an encoder with a decoder ({kind}); {expected}")
    try:
        model_class = library.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING[type(text)]
    except KeyError:
        raise BadInput(f"{path}: model_type {kind!r} has no ...ForCausalLM; {expected}") from None
    return text, model_class.__name__


def _name(text: str) -> str:
    """A profile's name, which is a folder's too: the text without what a name may not hold or begin with."""
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in text).lstrip("._-").rstrip(".-")[:100]
