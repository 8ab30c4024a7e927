"""Views of what is on the platform, for notebooks and for the page; they talk to it through the client alone.

They need the extra `views`: pip install cryofleet[views].
"""

from cryofleet.views.page import Page
from cryofleet.views.picking import PickingView
from cryofleet.views.runs import RunsView
from cryofleet.views.tomogram import TomogramView

__all__ = ["Page", "PickingView", "RunsView", "TomogramView"]
