"""What an operation's function gets: its inputs, its outputs, and how it reports and is stopped."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from cryofleet.artifacts import Blob, ResultWriter, manifest_for, open_blob
from cryofleet.errors import InvalidArgument
from cryofleet.particles import Particles
from cryofleet.progress import Progress
from cryofleet.server.checkpoints import Checkpoints
from cryofleet.server.limits import check_volume_bytes
from cryofleet.space import claim
from cryofleet.storage import Data, Store
from cryofleet.volumes import (
    Shard,
    Subtomograms,
    Volume,
    VolumeInfo,
    VolumeWriter,
    encoded_volume,
    open_subtomograms,
    open_volume,
    write_subtomograms,
    write_subtomograms_index,
)


class Reader:
    """Reads artifacts; every byte is checked against the manifest of the result that it belongs to.

    All methods raise NotFound, PermissionDenied (another project, outside the roots) and DataLoss.
    """

    def __init__(self, store: Store, project: str, new_scratch: Callable[[], Path], max_volume_bytes: int = 0) -> None:
        self.store = store
        """Closed to other projects."""
        self.project = project
        self.max_volume_bytes = max_volume_bytes
        """The largest volume that is taken; 0 for no limit."""
        self._new_scratch = new_scratch
        self._scratch: Path | None = None

    @property
    def scratch(self) -> Path:
        """A folder for temporary files, removed afterwards."""
        if self._scratch is None:
            self._scratch = self._new_scratch()
        return self._scratch

    def close(self) -> None:
        """Removes the temporary files."""
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)
            self._scratch = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def open_volume(self, uri: str) -> Volume:
        """A volume or a stack of them; its header is read at once, its voxels when asked for.

        Raises ResourceExhausted where the header says that it is larger than what is taken.
        """
        volume = open_volume(self.store, uri)
        check_volume_bytes(uri, volume.info.data_bytes, self.max_volume_bytes)
        return volume

    def open_subtomograms(self, uri: str) -> Subtomograms:
        """A set of subtomograms by the URI of its index."""
        return open_subtomograms(self.store, uri)

    def read_particles(self, uri: str) -> Particles:
        """A particle table."""
        return Particles.from_parquet(self.open_blob(uri), uri)

    def read_table(self, uri: str) -> dict[str, Any]:
        """A JSON table."""
        try:
            table = json.loads(self.read_file(uri))
        except ValueError as error:
            raise InvalidArgument(f"{uri} is not JSON: {error}") from None
        if not isinstance(table, dict):
            raise InvalidArgument(f"{uri} is no table: it must be a JSON object")
        return table

    def read_file(self, uri: str) -> bytes:
        """A whole object."""
        return self.open_blob(uri).read()

    def open_blob(self, uri: str) -> Blob:
        """An object, to be read in ranges."""
        return open_blob(self.store, uri)

    def local_copy(self, uri: str) -> Path:
        """A verified copy of an object in scratch, under its own name, for libraries that want a file.

        Of a folder (a model), a folder with all its objects.
        """
        uri = uri.rstrip("/")
        target = self.scratch / f"input-{len(list(self.scratch.iterdir()))}" / uri.rpartition("/")[2]
        manifest = manifest_for(self.store, uri)
        if manifest is not None:
            members = [f"{manifest.uri}/{blob['name']}" for blob in manifest.blobs]
        else:
            members = [found.uri for found in self.store.list(uri)]
        inside = [member for member in members if member.startswith(uri + "/")]
        for member in inside:
            self._copy(member, target / member.removeprefix(uri + "/"))
        if not inside:
            self._copy(uri, target)
        return target

    def _copy(self, uri: str, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        blob = self.open_blob(uri)
        with target.open("wb") as file:
            if blob.size_bytes:
                claim(file, blob.size_bytes, target.parent)
            for chunk in blob.stream():
                file.write(chunk)


class Task(Reader):
    """One running operation.

    What it writes belongs to its result and is seen by nobody before the operation has returned.
    """

    def __init__(
        self,
        *,
        store: Store,
        project: str,
        key: str,
        writer: ResultWriter,
        progress: Progress,
        device: str,
        threads: int,
        instance: str,
        new_scratch: Callable[[], Path],
        max_volume_bytes: int = 0,
    ) -> None:
        super().__init__(store, project, new_scratch, max_volume_bytes)
        self.progress = progress
        """To be called at least once a second; raises when the operation must stop."""
        self.device = device
        """cpu or cuda."""
        self.threads = threads
        """Cores that this operation may use."""
        self.instance = instance
        """Name of the instance that runs it."""
        self.checkpoints = Checkpoints(store, project, key)
        self._writer = writer

    def folder_uri(self, name: str) -> str:
        """URI of a folder of the result, for artifacts of several objects: a model's are `NAME/…`."""
        return f"{self._writer.uri}/{name}"

    def written(self, uri: str) -> dict[str, str]:
        """Name and digest of an object that this operation wrote, for tables that refer to others of its result."""
        name = uri.removeprefix(self._writer.uri + "/")
        return {"name": name, "digest": str(self._writer.entry(name)["digest"])}

    def write_bytes(self, name: str, data: Data) -> str:
        """Writes an object of bytes, or of pieces of them; its URI."""
        return self._writer.put(name, data)

    def write_table(self, name: str, table: Mapping[str, Any]) -> str:
        """Writes a JSON table; its URI. Raises InvalidArgument for NaN and infinity, which JSON has not."""
        try:
            text = json.dumps(table, indent=1, ensure_ascii=False, allow_nan=False)
        except ValueError as error:
            raise InvalidArgument(f"{name}: {error}; give None instead") from None
        return self._writer.put(name, (text + "\n").encode())

    def write_particles(self, name: str, particles: Particles) -> str:
        """Writes a particle table; its URI."""
        return self._writer.put(name, particles.to_parquet())

    def write_volume(self, name: str, array: NDArray[np.floating[Any]], info: VolumeInfo) -> str:
        """Writes a volume `[z, y, x]`, or a stack of them where the info has a count; its URI."""
        self._check_size(name, info)
        return self._writer.put(name, encoded_volume(array, info))

    def volume_writer(self, name: str, info: VolumeInfo) -> VolumeWriter:
        """Writes a volume slab by slab: a context manager with `write(slab)`, and `uri` once its block has ended."""
        self._check_size(name, info)
        return VolumeWriter(self._writer, name, info, self.scratch)

    def write_subtomograms(
        self, name_prefix: str, boxes: Iterable[NDArray[Any]], info: VolumeInfo, particles: Particles
    ) -> str:
        """Writes boxes, one for each row of `particles`, in shards with their index; the index's URI.

        `boxes` is an array (n, b, b, b) or gives boxes or batches of them; `info` is of one box.
        """
        self.store.check_space(len(particles) * info.data_bytes)
        return write_subtomograms(self._writer, self.store, name_prefix, boxes, info, particles)

    def write_subtomograms_index(
        self, name_prefix: str, shards: Sequence[Shard], info: VolumeInfo, particles: Particles
    ) -> str:
        """Makes a set of subtomograms of shards that are in the store already; the index's URI."""
        table = f"{name_prefix}-particles.parquet"
        uri = self._writer.put(table, particles.to_parquet())
        about = {"uri": uri, "digest": self._writer.entry(table)["digest"]}
        return write_subtomograms_index(self._writer, f"{name_prefix}.json", self.store, info, about, shards)

    def _check_size(self, name: str, info: VolumeInfo) -> None:
        check_volume_bytes(name, info.data_bytes, self.max_volume_bytes)
        self.store.check_space(info.data_bytes)

    def load_checkpoint(self) -> dict[str, bytes] | None:
        """What an earlier attempt at the same result saved last; None where there is nothing."""
        return self.checkpoints.load()

    def save_checkpoint(self, files: Mapping[str, bytes]) -> None:
        """Saves what the next attempt needs to go on from here: all files or none. Removed with the result's commit."""
        self.checkpoints.save(files)
