"""What a page must not show: credentials in URIs, and values under keys that name a secret. Files keep them, a resume needs them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_SECRET = re.compile(r"(^|[_.])(secret|password|passwd|credential|credentials|api_key|access_key|auth_token|token)$", re.IGNORECASE)
_USERINFO = re.compile(r"(\w+://)[^/@\s]+@")


def masked(value: Any, key: str = "") -> Any:
    """Plain values as JSON and YAML have them, fit to be shown. `key`: under which they stand."""
    if isinstance(value, Mapping):
        return {name: masked(entry, str(name)) for name, entry in value.items()}
    if isinstance(value, list):
        return [masked(entry, key) for entry in value]
    if isinstance(value, str):
        return "***" if _SECRET.search(key) and value else _USERINFO.sub(r"\1***@", value)
    return value
