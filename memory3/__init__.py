"""Explicit memory for language models: references encoded once, kept on disk, recalled and read by self-attention.

The public surface; everything is imported when it is first asked for, so that `import memory3` stays light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from memory3.bank import Bank as Bank
    from memory3.decoder import Decoder as Decoder
    from memory3.decoder import attach as attach
    from memory3.generation import Completion as Completion
    from memory3.generation import Prompt as Prompt
    from memory3.generation import Token as Token
    from memory3.generation import complete as complete
    from memory3.generation import generate as generate
    from memory3.generation import stream as stream
    from memory3.loading import default_model as default_model
    from memory3.loading import load as load
    from memory3.recall import Recall as Recall
    from memory3.spec import BankError as BankError
    from memory3.spec import BankMismatch as BankMismatch
    from memory3.spec import Memory as Memory
    from memory3.spec import Memory3Error as Memory3Error
    from memory3.spec import MemorySpec as MemorySpec
    from memory3.spec import Reference as Reference
    from memory3.spec import SourceError as SourceError
    from memory3.spec import SpecError as SpecError
    from memory3.spec import UnsupportedModel as UnsupportedModel
    from memory3.splitting import references as references
    from memory3.writing import write as write

_HOME = {
    "bank": ["Bank"],
    "decoder": ["Decoder", "attach"],
    "generation": ["Completion", "Prompt", "Token", "complete", "generate", "stream"],
    "loading": ["default_model", "load"],
    "recall": ["Recall"],
    "spec": [
        "BankError",
        "BankMismatch",
        "Memory",
        "Memory3Error",
        "MemorySpec",
        "Reference",
        "SourceError",
        "SpecError",
        "UnsupportedModel",
    ],
    "splitting": ["references"],
    "writing": ["write"],
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}
__all__ = ["__version__", *_MODULE_OF]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'memory3' has no attribute {name!r}")
    return getattr(import_module(f"memory3.{_MODULE_OF[name]}"), name)
