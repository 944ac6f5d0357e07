"""Fixtures: a tiny decoder of each family, made once per session."""

from __future__ import annotations

import os
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from families import FAMILIES, tiny_model, tiny_tokenizer

torch.set_num_threads(1)
_models: dict[str, Any] = {}


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    """Name of each family in turn."""
    name: str = request.param
    return name


@pytest.fixture
def model(family: str) -> Any:
    """The family's tiny model; detached again by whoever attached it."""
    if family not in _models:
        _models[family] = tiny_model(family)
    return _models[family]


@pytest.fixture
def tokenizer() -> Any:
    """A byte tokenizer."""
    return tiny_tokenizer()
