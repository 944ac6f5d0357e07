"""A decoder by path or hub name, and the model that ships."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from pathlib import Path
from typing import Any

from memory3.decoder import Decoder, attach
from memory3.identity import weights_fingerprint
from memory3.spec import Memory3Error, MemorySpec


class ModelError(Memory3Error):
    """A model that cannot be loaded."""


def default_model() -> Path:
    """Folder of the model that ships with the package."""
    return Path(__file__).parent / "model"


def load(model: str | os.PathLike[str] | None = None, spec: MemorySpec | None = None, **options: Any) -> Decoder:
    """Load a model and its tokenizer, and attach memory.

    Args:
        model: a folder of transformers files or a hub name; by default the model that ships.
        spec: overrules the model's own spec.
        options: go to `AutoModelForCausalLM.from_pretrained` (dtype, device_map, …). Remote code is never run, and only
            safetensors are read.

    Raises:
        ModelError: nothing can be loaded from there.
        UnsupportedModel: it cannot read memory.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    name = str(model if model is not None else default_model())
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        loaded = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=False, use_safetensors=True, **options).eval()
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"found no model at {name!r} ({reason}), expected a folder with config.json, tokenizer and *.safetensors, or a hub name"
        ) from None
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
    decoder = attach(loaded, tokenizer, spec)
    _remember(decoder, Path(name))
    return decoder


def _remember(decoder: Decoder, folder: Path) -> None:
    """Give the decoder the fingerprint that these very files had before, or compute and note it."""
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    if not files:
        return
    assert decoder.spec.layers is not None
    stamps = [(str(f.resolve()), s.st_size, s.st_mtime_ns, s.st_ino) for f in files for s in [f.stat()]]
    key = hashlib.blake2b(json.dumps([stamps, decoder.spec.layers[-1]]).encode(), digest_size=16).hexdigest()
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
            warnings.warn(f"the fingerprint of {folder} could not be kept ({error}); opening will hash it again", stacklevel=3)
    decoder.remember_fingerprint(known)
