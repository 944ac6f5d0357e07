"""A decoder by path or hub name, and the model that ships."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memory3.decoder import Decoder, attach
from memory3.identity import weights_fingerprint
from memory3.precision import warn_of_slow_halves
from memory3.quiet import old_words, without_bars
from memory3.spec import Memory3Error, MemorySpec

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
DTYPES = ("float32", "bfloat16", "float16")


class ModelError(Memory3Error):
    """A model that cannot be loaded."""


def default_model() -> Path:
    """Folder of the model that ships with the package."""
    return Path(__file__).parent / "model"


def load(
    model: str | os.PathLike[str] | None = None,
    spec: MemorySpec | None = None,
    *,
    device: str | None = None,
    dtype: str | None = None,
    **options: Any,
) -> Decoder:
    """Load a model and its tokenizer, and attach memory.

    Args:
        model: a folder of transformers files or a hub name; by default the model that ships. The folder of a peft adapter is
            the model that it was made for, with the adapter merged into its weights.
        spec: overrules the model's own spec.
        device: where it runs, `cpu` or `cuda:1` for instance; by default the first GPU, or the CPU where there is none.
        dtype: `float32`, `bfloat16` or `float16`; by default the dtype of its files. A warning says where float32 would be faster by far.
        options: go to `AutoModelForCausalLM.from_pretrained` (device_map, …); those that say which files are meant (revision, subfolder,
            cache_dir, token) to the tokenizer too. Remote code is never run, and only
            safetensors are read.

    Raises:
        ModelError: nothing can be loaded from there, or there is no such device or dtype; an adapter that is no LoRA in
            safetensors, or of another model.
        UnsupportedModel: it cannot read memory.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ModelError(f"found dtype {dtype!r}, expected one of {', '.join(DTYPES)}")
    options |= {} if dtype is None else {"dtype": dtype}
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name, adapters = base_of(model)
    try:
        with without_bars():
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **_where(options))
            loaded = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=False, use_safetensors=True, **options).eval()
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"found no model at {name!r} ({reason}), expected a folder with config.json, tokenizer and *.safetensors, or a hub name"
        ) from None
    for adapter in adapters:
        loaded = _adapted(loaded, adapter)
    if "device_map" not in options:
        loaded = _placed(loaded, device)
    if dtype is None:
        warn_of_slow_halves(loaded)
    decoder = attach(loaded, tokenizer, spec)
    if _SAME_WEIGHTS.issuperset(options):
        _remember(decoder, [_folder_of(name, _where(options)), *adapters])
    decoder.adapters = [adapter_fingerprint(adapter) for adapter in adapters]
    return decoder


def adapter_fingerprint(folder: Path) -> str:
    """BLAKE2b (32 hex digits) over the weights of an adapter; `ModelError` where there are none."""
    try:
        return hashlib.blake2b((folder / ADAPTER_WEIGHTS).read_bytes(), digest_size=16).hexdigest()
    except OSError as error:
        raise ModelError(
            f"found no adapter at {str(folder)!r} ({error.strerror}), expected a folder with {ADAPTER_WEIGHTS}"
        ) from None


def base_of(model: str | os.PathLike[str] | None = None) -> tuple[str, list[Path]]:
    """Folder or hub name of a model, and the folders of the adapters on it, in the order in which they were made.

    An adapter names what it was made for in `base_model_name_or_path`, which may be an adapter itself; one that names nothing is
    of the model that ships.
    """
    name, adapters = str(model if model is not None else default_model()), list[Path]()
    while (Path(name) / ADAPTER_CONFIG).is_file():
        if Path(name) in adapters:
            raise ModelError(f"found an adapter at {name!r} that is its own base, expected one of a model")
        adapters.insert(0, Path(name))
        name = _base_named(Path(name) / ADAPTER_CONFIG) or str(default_model())
    return name, adapters


def _base_named(config: Path) -> str | None:
    try:
        fields = json.loads(config.read_text("utf-8"))
        kind, base = fields["peft_type"], fields.get("base_model_name_or_path")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(f"{config} cannot be read ({error}), expected that of a peft adapter: make it again") from None
    if kind != "LORA" or not (config.parent / ADAPTER_WEIGHTS).is_file():
        raise ModelError(
            f"found an adapter of type {kind} at {str(config.parent)!r}, expected a LORA with its weights in {ADAPTER_WEIGHTS}: "
            "save it with peft's save_pretrained"
        )
    return None if base is None else str(base)


def _adapted(model: Any, adapter: Path) -> Any:
    """A model with a LoRA merged into its weights."""
    try:
        from peft import PeftModel
    except ImportError:
        raise ModelError("found no peft, expected it for an adapter: pip install 'memory3[train]'") from None
    try:
        with old_words(), warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            merged = PeftModel.from_pretrained(model, str(adapter), local_files_only=True).merge_and_unload()
    except (RuntimeError, ValueError, KeyError, TypeError, UserWarning) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"the adapter at {str(adapter)!r} does not fit {model.config.name_or_path!r} ({reason}), expected one of this model: "
            f"correct base_model_name_or_path in its {ADAPTER_CONFIG}"
        ) from None
    return merged.requires_grad_(True)


def _placed(model: Any, device: str | None) -> Any:
    import torch

    wanted = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return model.to(wanted)
    except (RuntimeError, AssertionError) as error:  # AssertionError: a torch that was built without CUDA
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"found no device {wanted!r} ({reason}), expected cpu, or cuda where there is a GPU") from None


_WHERE = frozenset({"revision", "subfolder", "cache_dir", "token", "local_files_only"})
_SAME_WEIGHTS = _WHERE | {
    "dtype",
    "torch_dtype",
    "device_map",
    "max_memory",
    "attn_implementation",
    "quantization_config",
}
"""Options of a load behind which the files, the dtype and the quantisation say what the weights are; with any other their fingerprint is
made anew."""


def _where(options: dict[str, Any]) -> dict[str, Any]:
    """The options that say which files of a name are meant."""
    return {name: options[name] for name in _WHERE if name in options}


def _folder_of(name: str, where: dict[str, Any]) -> Path:
    """Where the files of a model lie: the folder itself, or the hub's snapshot on this machine."""
    from transformers.utils import cached_file

    if Path(name).is_dir():
        return Path(name, str(where.get("subfolder", "")))
    return Path(cached_file(name, "config.json", **(where | {"local_files_only": True}))).parent


def _remember(decoder: Decoder, folders: Sequence[Path]) -> None:
    """Give the decoder the fingerprint that these very files had before, or compute and note it.

    Files that are the same give the same weights only in the same dtype and quantisation.
    """
    files = [file for folder in folders for file in sorted([*folder.glob("*.safetensors"), *folder.glob(ADAPTER_CONFIG)])]
    if not files:
        return
    assert decoder.spec.layers is not None
    stamps = [(str(f.resolve()), s.st_size, s.st_mtime_ns, s.st_ino) for f in files for s in [f.stat()]]
    form = [str(decoder.dtype), str(getattr(decoder.model.config, "quantization_config", None)), decoder.spec.layers[-1]]
    key = hashlib.blake2b(json.dumps([stamps, form]).encode(), digest_size=16).hexdigest()
    store = Path(os.environ.get("MEMORY3_CACHE", Path.home() / ".cache" / "memory3")) / "fingerprints" / key
    try:
        known = store.read_text("ascii").strip()
    except (OSError, UnicodeDecodeError):
        known = ""
    if len(known) != 32:
        known = weights_fingerprint(decoder.model, decoder.spec.layers[-1])
        try:
            store.parent.mkdir(parents=True, exist_ok=True)
            fresh = store.with_suffix(f".{os.getpid()}")
            fresh.write_text(known, "ascii")
            os.replace(fresh, store)
        except OSError as error:
            warnings.warn(
                f"the fingerprint of {folders[-1]} could not be kept ({error}); opening will hash it again", stacklevel=3
            )
    decoder.remember_fingerprint(known)
