"""The viewer: serves the page. It holds no data; what it shows, the platform gives each visitor by their own token."""

# Importing it registers its method.
from services.viewer.service import page  # noqa: F401
from services.viewer.service.registry import service

__all__ = ["service"]
