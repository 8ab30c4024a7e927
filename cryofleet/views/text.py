"""Plain text on the page: whatever a name holds is shown, and nothing of it run."""

from __future__ import annotations

from html import escape
from typing import Any

import panel as pn

_SHEET = "pre { white-space: pre-wrap; overflow-wrap: anywhere; font: inherit; margin: 0; }"


class Text(pn.pane.Str):
    """Shows its object as it is written; Panel's own pane of text would take markup in it for markup."""

    def _transform_object(self, obj: Any) -> dict[str, Any]:
        return super()._transform_object(escape(str(obj)))


def text(content: str = "", **styles: str) -> Any:
    """A pane of text that breaks its lines where the page ends, and takes no room while it is empty.

    `styles` are of CSS, with _ for -.
    """
    named = {name.replace("_", "-"): value for name, value in styles.items()}
    made = Text(content, styles=named, stylesheets=[_SHEET], sizing_mode="stretch_width", visible=bool(content))
    made.param.watch(lambda event: setattr(made, "visible", bool(event.new)), "object")
    return made
