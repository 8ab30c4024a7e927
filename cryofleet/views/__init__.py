"""Views of what is on the platform, for notebooks and for the page; they talk to it through the client alone.

They need the extra `views`: pip install cryofleet[views].
"""

from cryofleet.views.averages import AveragesView
from cryofleet.views.clusters import ClustersView
from cryofleet.views.page import Page
from cryofleet.views.painting import PaintingView
from cryofleet.views.picking import PickingView
from cryofleet.views.runs import RunsView
from cryofleet.views.tomogram import TomogramView

__all__ = ["AveragesView", "ClustersView", "Page", "PaintingView", "PickingView", "RunsView", "TomogramView"]
