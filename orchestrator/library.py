"""The pipelines that an orchestrator offers by name: those that ship with it, and those in the settings' folders."""

from __future__ import annotations

import logging
from pathlib import Path

from cryofleet.errors import InvalidArgument, NotFound
from cryofleet.operations import suggestion
from cryofleet.settings import Settings
from orchestrator.pipeline import Pipeline
from orchestrator.pipeline_reading import load

logger = logging.getLogger(__name__)

SHIPPED = Path(__file__).parent / "pipelines"


class Library:
    """Reads the folders anew each time: a new file needs no restart. Blocks."""

    def __init__(self, settings: Settings) -> None:
        self._folders = (SHIPPED, *settings.pipelines)

    def _files(self) -> dict[str, Path]:
        """Files by the pipeline's name, which is the file's; a later folder's file goes before an earlier one's."""
        return {path.stem: path for folder in self._folders for path in sorted(folder.glob("*.yaml"))}

    def names(self) -> list[str]:
        return sorted(self._files())

    def get(self, name: str) -> Pipeline:
        """Raises NotFound with the nearest name, InvalidArgument where the file is not sound."""
        files = self._files()
        if name not in files:
            raise NotFound(f"there is no pipeline {name!r}{suggestion(name, sorted(files))}")
        file = files[name]
        pipeline = load(file.read_text(encoding="utf-8"), file.name)
        if pipeline.name != name:
            raise InvalidArgument(f"{file.name}:1: the pipeline is named {pipeline.name!r}, its file {name!r}")
        return pipeline

    def all(self) -> list[Pipeline]:
        """All pipelines that are sound, by name."""
        found = []
        for name in self.names():
            try:
                found.append(self.get(name))
            except InvalidArgument as error:
                logger.error("pipeline %s is left out: %s", name, error)
        return found
