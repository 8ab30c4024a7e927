"""Prints what pyproject.toml says an image needs: `python requirements.py [EXTRA ...]`, the folder being the project's.

The dependencies of all, and those of the extras that are named. pip itself takes them only together with the project,
whose code would then lie in one layer with its packages and be shipped with them at each change.
"""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
extras = project["optional-dependencies"]
print("\n".join(sorted({*project["dependencies"], *(needed for extra in sys.argv[1:] for needed in extras[extra])})))
