"""Buttons, alone and in a row, alike in all views."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import panel as pn


def button(label: str, action: Callable[[Any], Any], kind: str = "default", **options: Any) -> pn.widgets.Button:
    """A button; `kind` is primary, success, danger or default, `action` hears of the click and may be awaited."""
    made = pn.widgets.Button(label=label, color=kind, **options)
    made.on_click(action)
    return made


def button_row(*items: Any) -> pn.FlexBox:
    """Side by side as near as looks well, in further lines where they need more."""
    for item in items:
        item.margin = 0
    return pn.FlexBox(*items, gap="6px", align_items="center", margin=(5, 10))
