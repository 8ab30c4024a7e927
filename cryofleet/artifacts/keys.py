"""A result's key follows from what its content follows from."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from cryofleet.errors import InvalidArgument


def canonical_json(value: Any) -> bytes:
    """JSON with sorted keys, no white space and floats by repr. Raises InvalidArgument for NaN and non-JSON."""
    _check_json(value, "value")
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def _check_json(value: Any, where: str) -> None:
    if value is None or isinstance(value, (bool, int, str)):
        return
    if isinstance(value, float):
        if not math.isfinite(value):
            raise InvalidArgument(f"{where} is {value}; it must be a finite number")
    elif isinstance(value, Mapping):
        for name, item in value.items():
            if not isinstance(name, str):
                raise InvalidArgument(f"{where} has the key {name!r}; keys must be strings")
            _check_json(item, f"{where}.{name}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            _check_json(item, f"{where}[{index}]")
    else:
        raise InvalidArgument(f"{where} is of type {type(value).__name__}, which JSON does not have")


def identity(operation: str, version: int, parameters: Mapping[str, Any], inputs: Mapping[str, Sequence[str]]) -> str:
    """A result's key: SHA-256, as hex, over what its content follows from.

    `parameters` are the resolved ones, without URIs; `inputs` the content digests of each input field.
    """
    what = {
        "operation": operation,
        "version": version,
        "parameters": dict(parameters),
        "inputs": {name: list(digests) for name, digests in inputs.items()},
    }
    return hashlib.sha256(canonical_json(what)).hexdigest()
