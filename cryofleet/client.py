"""The Python client: runs pipelines, calls operations, brings results home.

from cryofleet import Client

run = Client().run("discover", tomogram="t.mrc").wait()
picks = run.outputs["particles"].to_dataframe()
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import grpc
import yaml
from google.protobuf import json_format
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import Struct

from cryofleet import local, tracing
from cryofleet.access.client_token import token_source
from cryofleet.channels import failure_from_rpc, open_blocking_channel
from cryofleet.errors import Failure, InvalidArgument, NotFound, Unavailable
from cryofleet.operations import (
    ARTIFACT_KINDS,
    Operation,
    find_operation,
    operations,
    request_from_mapping,
    result_to_mapping,
)
from cryofleet.settings import DEFAULT_PROJECT, Settings
from cryofleet.v1 import (
    common_pb2,
    io_pb2,
    io_pb2_grpc,
    orchestrator_pb2,
    orchestrator_pb2_grpc,
    runtime_pb2,
    runtime_pb2_grpc,
)

if TYPE_CHECKING:
    # Loaded where they are needed, for they take a second and the command line should answer at once.
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

_CHUNK_BYTES = 2 * 1024**2
_RECONNECT_SECONDS = 0.5
ENDED = (
    orchestrator_pb2.RUN_STATE_SUCCEEDED,
    orchestrator_pb2.RUN_STATE_PARTIAL,
    orchestrator_pb2.RUN_STATE_FAILED,
    orchestrator_pb2.RUN_STATE_CANCELLED,
)


class RunFailed(Failure):
    """A run that ended without its outputs; `run` says where it stopped and why."""

    def __init__(self, run: orchestrator_pb2.Run) -> None:
        super().__init__(run.error or f"run {run.id} was cancelled")
        self.run = run


def state_name(run: orchestrator_pb2.Run) -> str:
    """queued, running, succeeded, partial, failed or cancelled."""
    return orchestrator_pb2.RunState.Name(run.state).removeprefix("RUN_STATE_").lower()


@dataclass(frozen=True)
class Artifact:
    """An artifact in the store; nothing is fetched before one of its methods asks for it."""

    uri: str
    client: Client

    @property
    def name(self) -> str:
        return self.uri.rsplit("/", 1)[-1]

    def read(self) -> bytes:
        return b"".join(self.client.download_chunks(self.uri))

    def to_dataframe(self) -> pd.DataFrame:
        """The rows of a particle table, or of an exported CSV or STAR file's particles."""
        import pandas as pd

        from cryofleet.particles import Particles

        data = self.read()
        if self.name.endswith(".parquet"):
            return Particles.from_parquet(data).table
        if self.name.endswith(".csv"):
            return pd.read_csv(io.BytesIO(data))
        if self.name.endswith(".star"):
            return _read_star(data)
        raise InvalidArgument(f"{self.uri} is no table of particles")

    def to_array(self) -> NDArray[np.float32]:
        """A volume as `[z, y, x]`, a stack of them as `[item, z, y, x]`."""
        import mrcfile
        import numpy as np

        volume = mrcfile.mrcinterpreter.MrcInterpreter(io.BytesIO(self.read()))
        with contextlib.closing(volume):
            return np.array(volume.data, dtype=np.float32)

    def to_json(self) -> Any:
        return json.loads(self.read())

    def save(self, path: str | Path) -> Path:
        """Write the artifact to `path`: a file or, of a model, a folder. No file is ever seen half written."""
        path = Path(path)
        members = [entry.uri for entry in self.client.list(self.uri)]
        if members != [self.uri]:
            if not members:
                raise NotFound(f"nothing is stored at {self.uri}")
            for member in members:
                Artifact(member, self.client).save(path / member.removeprefix(self.uri + "/"))
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.part")
        try:
            with temporary.open("wb") as file:
                for chunk in self.client.download_chunks(self.uri):
                    file.write(chunk)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        return path


def _read_star(data: bytes) -> pd.DataFrame:
    """The particles of a STAR file."""
    import starfile

    with tempfile.NamedTemporaryFile(suffix=".star") as file:
        file.write(data)
        file.flush()
        blocks = starfile.read(file.name, always_dict=True)
    return cast("pd.DataFrame", blocks["particles"])


class RunHandle:
    """One run of a pipeline."""

    def __init__(self, client: Client, run: orchestrator_pb2.Run) -> None:
        self._client = client.in_project(run.project)
        self.record = run

    @property
    def id(self) -> str:
        return self.record.id

    @property
    def state(self) -> str:
        return state_name(self.record)

    @property
    def outputs(self) -> dict[str, Any]:
        """The pipeline's outputs by name: `Artifact`s, numbers, texts, or lists of them."""
        return {name: self._output(value) for name, value in json_format.MessageToDict(self.record.outputs).items()}

    def _output(self, value: Any) -> Any:
        if isinstance(value, str) and "://" in value:
            return Artifact(value, self._client)
        if isinstance(value, list):
            return [self._output(item) for item in value]
        return value

    def watch(self) -> Iterator[orchestrator_pb2.Run]:
        """The run whenever it changes, until it has ended; the orchestrator may be restarted meanwhile."""
        for run in self._client.watch(self.id):
            self.record = run
            yield run

    def wait(self, on_change: Callable[[orchestrator_pb2.Run], None] | None = None) -> RunHandle:
        """Wait until the run has ended.

        Raises RunFailed if it failed or was cancelled. A run with items set aside returns; its
        `state` is "partial".
        """
        for run in self.watch():
            if on_change is not None:
                on_change(run)
        if self.state in ("failed", "cancelled"):
            raise RunFailed(self.record)
        return self

    def refresh(self) -> RunHandle:
        self.record = self._client.get(self.id).record
        return self

    def cancel(self) -> RunHandle:
        self.record = self._client.orchestrate("CancelRun", orchestrator_pb2.CancelRunRequest(run_id=self.id)).run
        return self

    def resume(self) -> RunHandle:
        self.record = self._client.orchestrate("ResumeRun", orchestrator_pb2.ResumeRunRequest(run_id=self.id)).run
        return self

    def retry(self) -> RunHandle:
        """Start the items that were set aside once more."""
        self.record = self._client.orchestrate("RetryRun", orchestrator_pb2.RetryRunRequest(run_id=self.id)).run
        return self

    def forget(self) -> None:
        """Delete the record of the run, which must have ended."""
        self._client.forget(self.id)


class Client:
    """Talks to a platform: the one that CRYOFLEET_ORCHESTRATOR names, else this machine's own.

    This machine's platform is started where it is not up, unless `start` is False. Files of this machine that arguments
    name are uploaded, unless `uploads` is False: whoever calls for somebody else must not read files for them.
    """

    def __init__(
        self,
        settings: Settings | None = None,
        project: str = DEFAULT_PROJECT,
        start: bool = True,
        uploads: bool = True,
    ) -> None:
        self.settings = settings or Settings.from_environment()
        self.project = project
        self._start = start
        self._uploads = uploads
        self._channels: dict[str, grpc.Channel] = {}

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def in_project(self, project: str) -> Client:
        """This client for another project, over the same channels."""
        if project == self.project:
            return self
        twin = copy.copy(self)
        twin.project = project
        return twin

    def close(self) -> None:
        for channel in self._channels.values():
            channel.close()
        self._channels.clear()

    # Runs

    @tracing.spanned("submit")
    def run(self, pipeline: str | Path, **arguments: Any) -> RunHandle:
        """Start a pipeline, by name or by the path of its YAML file.

        Arguments are the pipeline's inputs and parameters. Where an input is the path of a file on
        this machine, the file is uploaded first.
        """
        request = orchestrator_pb2.SubmitRunRequest(
            project=self.project, arguments=self._arguments(pipeline, arguments), **_pipeline_fields(pipeline)
        )
        return RunHandle(self, self.orchestrate("SubmitRun", request).run)

    def estimate(self, pipeline: str | Path, **arguments: Any) -> orchestrator_pb2.EstimateRunResponse:
        """What a run would take; checks pipeline and arguments as `run` does."""
        request = orchestrator_pb2.EstimateRunRequest(
            project=self.project, arguments=self._arguments(pipeline, arguments), **_pipeline_fields(pipeline)
        )
        return cast(orchestrator_pb2.EstimateRunResponse, self.orchestrate("EstimateRun", request))

    def _arguments(self, pipeline: str | Path, arguments: Mapping[str, Any]) -> Struct:
        """Arguments as the orchestrator takes them; files of this machine among the pipeline's inputs are uploaded."""
        inputs = self.input_names(pipeline)
        prepared = Struct()
        prepared.update(
            {name: self._uploaded(value, name in inputs) for name, value in arguments.items() if value is not None}
        )
        return prepared

    def input_names(self, pipeline: str | Path) -> set[str]:
        """Names of the pipeline's arguments that are artifacts."""
        text = _pipeline_fields(pipeline).get("pipeline_yaml")
        if text is not None:
            with contextlib.suppress(yaml.YAMLError, AttributeError):
                return set(yaml.safe_load(text).get("inputs") or ())
            return set()  # the orchestrator says what is wrong with it
        described = [p for p in self.pipelines() if p.name == str(pipeline)]
        return {p.name for found in described for p in found.parameters if p.type in ARTIFACT_KINDS}

    def _uploaded(self, value: Any, is_artifact: bool) -> Any:
        """The value, each file of this machine in it replaced by the URI that it was uploaded to.

        Files are `Path`s and, where an artifact belongs, paths as text.
        """
        match value:
            case Path() if self._uploads:
                return self.upload(value)
            case str() if self._uploads and is_artifact and "://" not in value:
                return self.upload(Path(value))
            case Artifact():
                return value.uri
            case list() | tuple():
                return [self._uploaded(item, is_artifact) for item in value]
            case Mapping():
                # Fields that hold artifacts are named so throughout the contract.
                return {key: self._uploaded(item, key.endswith(("_uri", "_uris"))) for key, item in value.items()}
            case _:
                return value

    def get(self, run_id: str) -> RunHandle:
        response = self.orchestrate("GetRun", orchestrator_pb2.GetRunRequest(run_id=run_id))
        return RunHandle(self, response.run)

    def forget(self, run_id: str) -> None:
        """Delete the record of a run that has ended. What only it needed is collected as garbage later."""
        self.orchestrate("ForgetRun", orchestrator_pb2.ForgetRunRequest(run_id=run_id))

    def watch(self, run_id: str) -> Iterator[orchestrator_pb2.Run]:
        """The run whenever it changes, until it has ended."""
        while True:
            try:
                stub = orchestrator_pb2_grpc.OrchestratorServiceStub(self._orchestrator())
                for response in stub.WatchRun(orchestrator_pb2.WatchRunRequest(run_id=run_id), wait_for_ready=True):
                    yield response.run
                    if response.run.state in ENDED:
                        return
            except grpc.RpcError as error:
                failure = failure_from_rpc(error)
                if failure.status != "UNAVAILABLE":
                    raise failure from None
                if self._is_own(self.settings.orchestrator) and not local.is_up(self.settings):
                    raise Unavailable(
                        f"the platform went down; run {run_id} goes on at the next: cryofleet up"
                    ) from None
                token_source(self.settings)  # raises where it is the token that can't be had
                # The orchestrator is restarting; the run is durable and the watch goes on.
                time.sleep(_RECONNECT_SECONDS)

    def log(self, run_id: str, limit: int = 0) -> orchestrator_pb2.ReadLogResponse:
        """What the platform's processes logged about a run, as far as they keep it: the newest lines, 1000 where 0 is
        given, in order of time; and which instances could not be asked.
        """
        request = orchestrator_pb2.ReadLogRequest(run_id=run_id, limit=limit)
        return cast(orchestrator_pb2.ReadLogResponse, self.orchestrate("ReadLog", request))

    def runs(self, limit: int = 50) -> list[orchestrator_pb2.Run]:
        """The newest runs of the project."""
        request = orchestrator_pb2.ListRunsRequest(project=self.project, limit=limit)
        return list(self.orchestrate("ListRuns", request).runs)

    def pipelines(self) -> list[orchestrator_pb2.PipelineDescription]:
        response = self.orchestrate("ListPipelines", orchestrator_pb2.ListPipelinesRequest())
        return list(response.pipelines)

    def pools(self) -> list[orchestrator_pb2.PoolStatus]:
        """The services' instances with their slots."""
        return list(self.orchestrate("GetPools", orchestrator_pb2.GetPoolsRequest()).pools)

    def pause_pool(self, pool: str, because: str = "") -> orchestrator_pb2.PoolStatus:
        """Begin nothing more in a pool until it is resumed; `because` is for others to read."""
        request = orchestrator_pb2.PausePoolRequest(pool=pool, because=because)
        return cast(orchestrator_pb2.PoolStatus, self.orchestrate("PausePool", request).pool)

    def resume_pool(self, pool: str) -> orchestrator_pb2.PoolStatus:
        """Begin again in a pool that was paused."""
        request = orchestrator_pb2.ResumePoolRequest(pool=pool)
        return cast(orchestrator_pb2.PoolStatus, self.orchestrate("ResumePool", request).pool)

    def collect_garbage(self, older_than_hours: float, delete: bool) -> orchestrator_pb2.CollectGarbageResponse:
        """Results that no run and no pin needs; deleted only if `delete`."""
        request = orchestrator_pb2.CollectGarbageRequest(
            project=self.project, older_than_hours=older_than_hours, delete=delete
        )
        return cast(orchestrator_pb2.CollectGarbageResponse, self.orchestrate("CollectGarbage", request))

    def usage(self, every_project: bool = False) -> orchestrator_pb2.GetUsageResponse:
        """What this project, or every one that the caller may see, has stored and may store."""
        request = orchestrator_pb2.GetUsageRequest(project="" if every_project else self.project)
        return cast(orchestrator_pb2.GetUsageResponse, self.orchestrate("GetUsage", request))

    def pin(self, uri: str, unpin: bool = False) -> None:
        """Keep a result and what it was made from; or let it go again."""
        self.orchestrate("PinArtifact", orchestrator_pb2.PinArtifactRequest(uri=uri, unpin=unpin))

    def add_inbox(
        self, name: str, uri: str, pipeline: str | Path, arguments: Mapping[str, Any] | None = None, **options: Any
    ) -> orchestrator_pb2.Inbox:
        """Watch a folder or bucket prefix: each new, complete file there starts the pipeline once.

        `arguments` are the pipeline's, but for the input that gets the file; `options` are further fields of
        AddInboxRequest: settle_seconds, patterns, at_once and so on.
        """
        fields: dict[str, Any] = {**_pipeline_fields(pipeline), **options}
        request = orchestrator_pb2.AddInboxRequest(
            project=self.project, name=name, uri=uri, arguments=self._arguments(pipeline, arguments or {}), **fields
        )
        return cast(orchestrator_pb2.Inbox, self.orchestrate("AddInbox", request).inbox)

    def inboxes(self) -> list[orchestrator_pb2.Inbox]:
        """The project's inboxes."""
        request = orchestrator_pb2.ListInboxesRequest(project=self.project)
        return list(self.orchestrate("ListInboxes", request).inboxes)

    def inbox(
        self,
        name: str,
        limit: int = 50,
        state: orchestrator_pb2.InboxItemState.ValueType = orchestrator_pb2.INBOX_ITEM_STATE_UNSPECIFIED,
    ) -> orchestrator_pb2.GetInboxResponse:
        """An inbox and its newest items, in one state or in any."""
        request = orchestrator_pb2.GetInboxRequest(project=self.project, name=name, limit=limit, state=state)
        return cast(orchestrator_pb2.GetInboxResponse, self.orchestrate("GetInbox", request))

    def pause_inbox(self, name: str) -> orchestrator_pb2.Inbox:
        """Start nothing more from an inbox until it is resumed."""
        request = orchestrator_pb2.PauseInboxRequest(project=self.project, name=name)
        return cast(orchestrator_pb2.Inbox, self.orchestrate("PauseInbox", request).inbox)

    def resume_inbox(self, name: str) -> orchestrator_pb2.Inbox:
        """Start again what comes into an inbox that was paused."""
        request = orchestrator_pb2.ResumeInboxRequest(project=self.project, name=name)
        return cast(orchestrator_pb2.Inbox, self.orchestrate("ResumeInbox", request).inbox)

    def remove_inbox(self, name: str) -> None:
        """Watch no more, and forget what came in; its runs stay."""
        self.orchestrate("RemoveInbox", orchestrator_pb2.RemoveInboxRequest(project=self.project, name=name))

    def retry_inbox(self, name: str, numbers: Sequence[int] = ()) -> orchestrator_pb2.RetryInboxResponse:
        """Try items that were set aside once more: those of these numbers, or all."""
        request = orchestrator_pb2.RetryInboxRequest(project=self.project, name=name, numbers=numbers)
        return cast(orchestrator_pb2.RetryInboxResponse, self.orchestrate("RetryInbox", request))

    def orchestrate(self, method: str, request: Message) -> Any:
        """Call one of the orchestrator's methods; raises the Failure that it answers with."""
        stub = orchestrator_pb2_grpc.OrchestratorServiceStub(self._orchestrator())
        # To list a whole store may take long; nothing else takes its time.
        timeout = None if method in ("CollectGarbage", "GetUsage") else 120
        with _failures():
            return getattr(stub, method)(request, timeout=timeout)

    # Single operations

    def operations(self) -> dict[str, Operation]:
        return operations()

    def call(
        self,
        operation: str,
        on_progress: Callable[[common_pb2.Progress], None] | None = None,
        **parameters: Any,
    ) -> dict[str, Any]:
        """Call one operation, as `picking.Extract`, straight at its service and return its result.

        Raises the Failure that the service answers with.
        """
        found = find_operation(operation)
        request = request_from_mapping(found, self._uploaded(parameters, False))
        cast(Any, request).context.project = self.project
        call = self._service(found.service).unary_stream(
            found.full_name,
            request_serializer=found.request_class.SerializeToString,
            response_deserializer=found.response_class.FromString,
        )
        result: dict[str, Any] | None = None
        with _failures():
            for event in call(request):
                if event.WhichOneof("event") == "progress" and on_progress is not None:
                    on_progress(event.progress)
                elif event.WhichOneof("event") == "result":
                    result = result_to_mapping(event.result)
        if result is None:
            raise Unavailable(f"{operation} ended without a result")
        return result

    # Files

    def upload(self, path: str | Path) -> str:
        """Store a file and return its URI; a file that the store has already is not sent again."""
        from cryofleet.artifacts import digest_file

        path = Path(path)
        if path.is_dir():
            raise InvalidArgument(
                f"{path} is a folder; one of OME-Zarr becomes a file by: cryofleet convert {path} t.ozx"
            )
        if not path.is_file():
            raise NotFound(f"no such file: {path}")
        header = io_pb2.UploadHeader(
            context=self._context(),
            name=path.name,
            size_bytes=path.stat().st_size,
            digest=digest_file(path),
        )
        stub = io_pb2_grpc.IoServiceStub(self._service("io"))
        with _failures():
            # The header alone first: it is answered with the URI where the store has the file.
            answer = stub.Upload(iter([io_pb2.UploadRequest(header=header)]))
            if not answer.present:
                answer = stub.Upload(_upload_parts(header, path))
        return answer.uri

    def download_chunks(self, uri: str, offset_bytes: int = 0, length_bytes: int = 0) -> Iterator[bytes]:
        """The bytes of a stored object in pieces, verified by the server."""
        stub = io_pb2_grpc.IoServiceStub(self._service("io"))
        request = io_pb2.DownloadRequest(
            context=self._context(), uri=uri, offset_bytes=offset_bytes, length_bytes=length_bytes
        )
        with _failures():
            for response in stub.Download(request):
                yield response.chunk

    def list(self, uri: str) -> Iterator[io_pb2.ListResponse]:
        """Stored objects under a URI."""
        stub = io_pb2_grpc.IoServiceStub(self._service("io"))
        with _failures():
            yield from stub.List(io_pb2.ListRequest(context=self._context(), uri=uri))

    def cut_slice(self, request: io_pb2.CutSliceRequest) -> io_pb2.CutSliceResponse:
        """One slice of a stored volume, as a small picture; its context is set here."""
        request.context.CopyFrom(self._context())
        stub = io_pb2_grpc.IoServiceStub(self._service("io"))
        with _failures():
            return stub.CutSlice(request, timeout=60)

    def store_root(self) -> str:
        """URI of the root that the platform keeps its results under."""
        stub = runtime_pb2_grpc.RuntimeServiceStub(self._service("io"))
        with _failures():
            return stub.GetCapacity(runtime_pb2.GetCapacityRequest(), timeout=30).store

    def artifact(self, uri: str) -> Artifact:
        return Artifact(uri, self)

    # Channels

    def _is_own(self, address: str) -> bool:
        """Whether it is this machine's own platform that listens there."""
        return address.startswith(f"unix:{self.settings.run_folder}/")

    def _context(self) -> common_pb2.Context:
        return common_pb2.Context(project=self.project)

    def _orchestrator(self) -> grpc.Channel:
        return self._channel(self.settings.orchestrator, "the orchestrator")

    def _service(self, service: str) -> grpc.Channel:
        # Every instance answers for the runtime itself; io is the one that is always there.
        pool = self.settings.pools["io" if service == "runtime" else service]
        return self._channel(pool.split(",")[0], f"the {service} service")

    def _channel(self, address: str, what: str) -> grpc.Channel:
        if address not in self._channels:
            if self._is_own(address):
                if self._start:
                    local.start(self.settings)
                elif not local.is_up(self.settings):
                    raise Unavailable(f"{what} is not up on this machine; start the platform with: cryofleet up")
            self._channels[address] = open_blocking_channel(
                address, self.settings.tls, token=token_source(self.settings)
            )
        return self._channels[address]


def _pipeline_fields(pipeline: str | Path) -> dict[str, str]:
    """A pipeline's name, or the text of its file."""
    path = Path(pipeline)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        try:
            return {"pipeline_yaml": path.read_text(), "pipeline_file": path.name}
        except (OSError, UnicodeDecodeError) as error:
            raise NotFound(f"can't read the pipeline {path}: {error}") from None
    return {"pipeline": str(pipeline)}


def _upload_parts(header: io_pb2.UploadHeader, path: Path) -> Iterator[io_pb2.UploadRequest]:
    yield io_pb2.UploadRequest(header=header)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            yield io_pb2.UploadRequest(chunk=chunk)


@contextlib.contextmanager
def _failures() -> Iterator[None]:
    """Turns gRPC's errors into the Failures that the server raised."""
    try:
        yield
    except grpc.RpcError as error:
        raise failure_from_rpc(error) from None
