"""What people wrote is shown as they wrote it."""

from __future__ import annotations

from html import unescape

from cryofleet.views.text import text


def test_markup_is_text() -> None:
    pane = text("<img src=x onerror=alert(1)> & more")
    model = pane.get_root()
    # Bokeh unescapes what Panel sends once, and takes the rest for HTML.
    assert unescape(model.text) == "<pre>&lt;img src=x onerror=alert(1)&gt; &amp; more</pre>"
    pane.object = "</pre><script>"
    assert unescape(model.text) == "<pre>&lt;/pre&gt;&lt;script&gt;</pre>"
