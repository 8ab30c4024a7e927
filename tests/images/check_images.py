"""Every image for real: built by buildah on a Debian base made here, started without root on a read-only root file
system, called from outside. Part of no usual run, for it takes many minutes: `make test-images`.

Runs as root on Debian or Ubuntu, for it makes the base by debootstrap and runs images in chroot isolation; what it
needs of the distribution's packages it installs. CRYOFLEET_IMAGES_FOLDER says where the wheelhouse, the base and the
images are kept from one run to the next, and IMAGES names those that are tested, all where it is left out.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import HTTPCookieProcessor, HTTPSHandler, build_opener

import grpc
import numpy as np
import pandas as pd
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cryofleet.access.certificates import make_set
from cryofleet.channels import open_blocking_channel
from cryofleet.client import Client
from cryofleet.particles import Particles
from cryofleet.settings import SERVICES, Settings
from cryofleet.v1 import viewer_pb2, viewer_pb2_grpc
from cryofleet.volumes import VolumeInfo, encode_volume
from tests.conftest import REPOSITORY
from tests.faults.certificates import issue

pytestmark = pytest.mark.timeout(3600)

# The learning service's is the largest and comes last.
IMAGES = ("io", "orchestrator", "simulation", "viewer", "picking", "alignment", "learning")
WITH_TORCH = ("picking", "alignment", "learning")
SUITES = {(3, 11): "bookworm", (3, 13): "trixie"}
"""The Debian whose Python is the one that makes the wheelhouse."""
FOLDER = Path(os.environ.get("CRYOFLEET_IMAGES_FOLDER", "/var/tmp/cryofleet-images"))
RUNNING = FOLDER / "running"
BASE = "localhost/cryofleet-base:test"
USER = 10001
COMPILERS = ("cc", "gcc", "g++", "c++", "clang", "ld", "as", "make", "rustc", "nvcc")
START_SECONDS = 180.0
STOP_SECONDS = 60.0

# Waits until the root file system is read-only, then is the container's process, then waits until it is writable again:
# buildah itself can neither set up nor take down a container whose root it can't write to.
READ_ONLY_WHILE = """
touch /tmp/waits
until test -e /tmp/read-only; do sleep 0.1; done
"$@" & child=$!
wait $child; status=$?
while test -e /tmp/read-only; do sleep 0.1; done
exit $status
"""


SETTINGS = {
    "viewer": {
        "PAGE": "127.0.0.1:0",
        "TLS_CERTIFICATE": "/inputs/certificates/viewer/tls.crt",
        "TLS_KEY": "/inputs/certificates/viewer/tls.key",
        "TLS_AUTHORITY": "/inputs/certificates/viewer/ca.crt",
    }
}
"""A service's own, beside those of all: the page is served over TLS."""


@dataclass(frozen=True)
class Inputs:
    """Files that the container finds in /inputs."""

    volume: str = "file:///inputs/volume.mrc"
    box: str = "file:///inputs/box.mrc"
    particles: str = "file:///inputs/particles.parquet"


def write_inputs(folder: Path) -> None:
    rng = np.random.default_rng(1)
    volume = rng.normal(0, 1, (24, 32, 32)).astype(np.float32)
    (folder / "volume.mrc").write_bytes(encode_volume(volume, VolumeInfo((24, 32, 32), 10.0, "dark", -60, 60)))
    box = VolumeInfo((24, 24, 24), 10.0, "dark", -60, 60)
    (folder / "box.mrc").write_bytes(encode_volume(volume[:, :24, :24], box))
    rows = {name: rng.uniform(8, 16, 6) for name in "xyz"}
    table = pd.DataFrame({"id": np.arange(6), **rows, "class_id": np.array([0, 1, 2, 0, 1, 2], dtype=np.int32)})
    (folder / "particles.parquet").write_bytes(Particles(table, 10.0, "t", (24, 32, 32)).to_parquet())
    certificates = folder / "certificates"
    make_set(certificates)
    issue(certificates, "viewer", days=1)
    for path in (certificates / "viewer", *(certificates / "viewer").iterdir()):
        os.chown(path, USER, USER)


def call_io(client: Client) -> None:
    uri = client.call("io.Filter", volume_uri=Inputs.volume, sigma_angstrom=20.0)["volume_uri"]
    smoothed = client.artifact(uri).to_array()
    assert smoothed.shape == (24, 32, 32)
    assert smoothed.std() < 0.5  # of white noise with 1


def call_picking(client: Client) -> None:
    result = client.call("picking.SampleGrid", tomogram_uri=Inputs.volume, spacing_angstrom=80.0)
    assert result["count"] == 3 * 4 * 4


def call_alignment(client: Client) -> None:
    result = client.call(
        "alignment.MakeMask", volume_uri=Inputs.box, shape="ellipsoid", radii_angstrom=[80.0, 80.0, 60.0]
    )
    assert 0 < result["share"] < 1


def call_learning(client: Client) -> None:
    result = client.call("learning.SelectClusters", particles_uri=Inputs.particles, groups=["ring:1,3"])
    assert result["count"] == 4


def call_simulation(client: Client) -> None:
    result = client.call("simulation.SimulateDensity", name="double-ring", voxel_size_angstrom=20.0, box_size_voxels=16)
    assert result["density_uri"].startswith("file:///var/lib/cryofleet/store/")


def call_orchestrator(client: Client) -> None:
    assert "discover" in {pipeline.name for pipeline in client.pipelines()}
    assert {pool.name for pool in client.pools()} == set(SERVICES)


def call_viewer(client: Client) -> None:
    url = viewer_pb2_grpc.ViewerServiceStub(client._service("io")).GetPage(viewer_pb2.GetPageRequest(), timeout=30).url
    assert url.startswith("https://127.0.0.1:")
    site = url.partition("login")[0]
    authority = RUNNING / "viewer" / "inputs" / "certificates" / "viewer" / "ca.crt"
    tls = ssl.create_default_context(cafile=authority)
    browser = build_opener(HTTPSHandler(context=tls), HTTPCookieProcessor())
    with browser.open(site, timeout=30) as answer:
        assert answer.url == f"{site}login?next=%2F"
        assert "signs you in" in answer.read().decode()
    with browser.open(url, timeout=30) as answer:
        assert answer.url == site
        page = answer.read().decode()
    # All that the page asks for comes from the image: it names no other place, and what it names is there.
    assert "://" not in page
    files = set(re.findall(r"static/[\w./@^?=-]+", page))
    assert {"bokeh", "panel", "tabulator"} <= {Path(file).name.partition(".")[0] for file in files}
    for file in files:
        with browser.open(site + file, timeout=30) as answer:
            assert answer.read(), file


CALLS: dict[str, Callable[[Client], None]] = {
    "io": call_io,
    "orchestrator": call_orchestrator,
    "simulation": call_simulation,
    "viewer": call_viewer,
    "picking": call_picking,
    "alignment": call_alignment,
    "learning": call_learning,
}


def run(*command: str | Path, timeout: float = 1800) -> str:
    """What the command prints; fails the test with all that it said where it fails."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=timeout, check=False)
    if done.returncode:
        pytest.fail(f"{' '.join(map(str, command))} ended with {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done.stdout.strip()


@pytest.fixture(scope="session", autouse=True)
def buildah() -> None:
    """buildah and debootstrap, with a storage of their own in FOLDER."""
    if os.getuid() != 0:
        pytest.fail("this needs root: it makes a base image by debootstrap and runs images in chroot isolation")
    missing = [tool for tool in ("buildah", "debootstrap") if shutil.which(tool) is None]
    if missing:
        if shutil.which("apt-get") is None:
            pytest.fail(f"this needs {' and '.join(missing)}, and there is no apt-get to install them with")
        os.environ["DEBIAN_FRONTEND"] = "noninteractive"
        run("apt-get", "update")
        run("apt-get", "install", "--yes", "--no-install-recommends", *missing)
    FOLDER.mkdir(parents=True, exist_ok=True)
    storage = FOLDER / "storage.conf"
    storage.write_text(f'[storage]\ndriver = "overlay"\ngraphroot = "{FOLDER}/storage"\nrunroot = "{FOLDER}/run"\n')
    os.environ["CONTAINERS_STORAGE_CONF"] = str(storage)
    os.environ["BUILDAH_ISOLATION"] = "chroot"


@pytest.fixture(scope="session")
def wheelhouse(buildah: None) -> Path:
    folder = FOLDER / "wheelhouse"
    said = [REPOSITORY / name for name in ("pyproject.toml", "constraints.txt", "images/tools.txt")]
    stamp = hashlib.sha256(b"".join(path.read_bytes() for path in said)).hexdigest()
    made_from = folder / "made-from"
    if not made_from.exists() or made_from.read_text() != stamp:
        shutil.rmtree(folder, ignore_errors=True)
        os.environ["PYTHON"] = sys.executable
        run(REPOSITORY / "images" / "wheelhouse.sh", folder)
        made_from.write_text(stamp)
    return folder


@pytest.fixture(scope="session")
def base(buildah: None) -> str:
    suite = SUITES.get(sys.version_info[:2])
    if suite is None:
        pytest.fail(f"no Debian has Python {sys.version_info[0]}.{sys.version_info[1]}; run this by one of {SUITES}")
    os.environ["SUITE"] = suite
    run(REPOSITORY / "images" / "debootstrap-base.sh", BASE, FOLDER / "base")
    return BASE


@dataclass(frozen=True)
class Built:
    """An image, what it was built for, and its configuration."""

    service: str
    name: str
    config: dict[str, Any]


@pytest.fixture(scope="session", params=os.environ.get("IMAGES", " ".join(IMAGES)).split())
def built(request: pytest.FixtureRequest, wheelhouse: Path, base: str, say: Callable[[str], None]) -> Built:
    service = request.param
    name = f"localhost/cryofleet-{service}:test"
    os.environ.update(
        BUILDER="buildah", BASE=base, WHEELHOUSE=str(wheelhouse), TAG="test", SBOMS=str(FOLDER / "sboms"), TORCH="cpu"
    )
    os.environ["REVISION"] = "0123456789abcdef"
    # Layers matter to a registry, which there is none of here, and cost half as much time again.
    os.environ["BUILD_OPTIONS"] = "--layers=false"
    start = time.monotonic()
    run(REPOSITORY / "images" / "build.sh", service)
    seconds = time.monotonic() - start
    inspected = json.loads(run("buildah", "inspect", "--type", "image", name))
    size = run("buildah", "images", "--format", "{{.Size}}", name)
    say(f"{service}: built in {seconds:.0f} s, {size}")
    return Built(service, name, inspected["Docker"]["config"])


@pytest.fixture(scope="session")
def say(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Prints a line that is seen although pytest captures what tests print."""
    capture = request.config.pluginmanager.getplugin("capturemanager")

    def say_line(line: str) -> None:
        with capture.global_and_fixture_disabled():
            print(f"\n    {line}")

    return say_line


@pytest.fixture(scope="session")
def root(built: Built) -> Iterator[Path]:
    """The image's file system, mounted here."""
    with container(built.name) as (_, folder):
        yield folder


@contextmanager
def container(image: str) -> Iterator[tuple[str, Path]]:
    name = run("buildah", "from", "--pull-never", image)
    try:
        yield name, Path(run("buildah", "mount", name))
    finally:
        run("buildah", "rm", name)


def dockerfile(service: str) -> str:
    return (REPOSITORY / "images" / service / "Dockerfile").read_text()


@pytest.mark.parametrize("service", IMAGES)
def test_the_dockerfiles_differ_only_where_the_images_do(service: str) -> None:
    def with_a_name_for(text: str) -> list[str]:
        own = "COPY orchestrator orchestrator\nRUN sh code.sh orchestrator\n"
        changes = {
            own: "COPY services/__init__.py services/\nCOPY services/NAME services/NAME\nRUN sh code.sh services\n",
            '"orchestrator"]': '"services.NAME"]',
            "ARG TORCH=cpu\n": "",
        }
        for old, new in changes.items():
            text = text.replace(old, new)
        text = re.sub(rf"(?<!docker\.)\b{service}\b", "NAME", re.sub(r'description="[^"]*"', "", text))
        return text.splitlines()[1:]

    expected = re.sub(r'description="[^"]*"', "", dockerfile("simulation").replace("simulation", "NAME"))
    assert with_a_name_for(dockerfile(service)) == expected.splitlines()[1:]
    assert ("ARG TORCH=cpu" in dockerfile(service)) == (service in WITH_TORCH)


def test_configuration(built: Built) -> None:
    config = built.config
    assert config["User"] == f"{USER}:{USER}"  # a number: Kubernetes can't tell whether a name is root
    assert list(config["Volumes"]) == ["/var/lib/cryofleet"]
    assert config["Healthcheck"]["Test"] == ["CMD", "python", "-m", "cryofleet.health"]
    labels = config["Labels"]
    assert labels["org.opencontainers.image.title"] == f"cryofleet-{built.service}"
    assert labels["org.opencontainers.image.version"] == "0.1.0"
    assert labels["org.opencontainers.image.revision"] == "0123456789abcdef"
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"


def test_only_its_own_code_is_in_it(built: Built, root: Path) -> None:
    own = root / "opt" / "cryofleet"
    folders = {path.name for path in own.iterdir() if path.is_dir() and not path.name.endswith(".dist-info")}
    if built.service == "orchestrator":
        assert folders == {"bin", "cryofleet", "orchestrator"}
        assert (own / "orchestrator" / "pipelines" / "discover.yaml").is_file()
    else:
        assert folders == {"bin", "cryofleet", "services"}
        services = {path.name for path in (own / "services").iterdir() if path.is_dir()}
        assert services - {"__pycache__"} == {built.service}


def test_its_packages_are_its_own(built: Built, root: Path) -> None:
    (packages,) = (root / "opt" / "venv" / "lib").glob("python3*/site-packages")
    assert (packages / "torch").exists() == (built.service in WITH_TORCH)
    if built.service in WITH_TORCH:
        assert "+cpu" in (packages / "torch" / "version.py").read_text()
    assert (packages / "dbos").exists() == (built.service == "orchestrator")
    for tool in ("pip", "hatchling", "cyclonedx_py", "pytest"):
        assert not (packages / tool).exists(), tool


def test_no_compiler_and_no_cache_is_in_it(root: Path) -> None:
    places = [root / place for place in ("usr/bin", "usr/local/bin", "usr/sbin", "usr/local/sbin", "opt/venv/bin")]
    # Its links lead into the container's file system, which is_symlink looks at and exists does not.
    found = [place / name for place in places for name in COMPILERS if os.path.lexists(place / name)]
    assert not found
    for left in ("wheelhouse", "source", "tools", "root/.cache", "tmp/wheel"):
        folder = root / left
        assert not folder.exists() or not any(folder.iterdir()), left
    assert {path.parent.name for path in root.rglob("*.whl")} <= {"_bundled", "python-wheels"}  # ensurepip's own


def test_nothing_of_it_belongs_to_its_user_or_can_be_written_by_all(root: Path) -> None:
    volume = root / "var" / "lib" / "cryofleet"
    shared = {root / place for place in ("tmp", "var/tmp", "run/lock")}
    wrong = []
    for folder, folders, files in os.walk(root):
        for name in (*folders, *files):
            path = Path(folder, name)
            if path.is_symlink() or path == volume or path in shared or root / "dev" in (path, *path.parents):
                continue
            status = path.lstat()
            if status.st_uid == USER or status.st_mode & 0o002:
                wrong.append(path)
    assert not wrong
    assert volume.stat().st_uid == USER


def test_its_bill_of_materials(built: Built, root: Path) -> None:
    inside = (root / "opt" / "venv" / "sbom.cdx.json").read_text()
    assert inside.strip() == (FOLDER / "sboms" / f"{built.service}.cdx.json").read_text().strip()
    bill = json.loads(inside)
    assert bill["bomFormat"] == "CycloneDX"
    assert bill["metadata"]["component"]["name"] == "cryofleet"
    components = {component["name"].lower(): component["version"] for component in bill["components"]}
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)$", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE))
    assert components["grpcio"] == pinned["grpcio"]
    assert ("torch" in components) == (built.service in WITH_TORCH)
    (packages,) = (root / "opt" / "venv" / "lib").glob("python3*/site-packages")
    assert len(components) == len(list(packages.glob("*.dist-info")))


def the_service(buildah_process: int, module: str) -> psutil.Process:
    """The process of the service itself, which chroot isolation shows among this machine's."""
    for process in psutil.Process(buildah_process).children(recursive=True):
        words = process.cmdline()
        if words and Path(words[0]).name == "python" and words[1:3] == ["-m", module]:
            return process
    raise LookupError(f"no process of {module}")


def serving(address: str) -> bool:
    with open_blocking_channel(address) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=2)
        except grpc.RpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def test_it_serves_without_root_on_a_read_only_file_system(
    built: Built, tmp_path: Path, say: Callable[[str], None]
) -> None:
    service = built.service
    module = "orchestrator" if service == "orchestrator" else f"services.{service}"
    assert built.config["Entrypoint"] == ["python", "-m", module]
    # Not pytest's own folders: their paths are too long for sockets.
    here = RUNNING / service
    shutil.rmtree(here, ignore_errors=True)
    state, temporary, inputs = here / "state", here / "tmp", here / "inputs"
    for folder, mode in ((state, 0o700), (temporary, 0o1777), (inputs, 0o755)):
        folder.mkdir(parents=True)
        folder.chmod(mode)
    os.chown(state, USER, USER)
    write_inputs(inputs)
    volumes = [f"--volume={state}:/var/lib/cryofleet", f"--volume={temporary}:/tmp", f"--volume={inputs}:/inputs:ro"]
    said = {"READ_ONLY_ROOTS": "file:///inputs", "SLOTS": "2", **SETTINGS.get(service, {})}
    environment = [f"--env=CRYOFLEET_{name}={value}" for name, value in said.items()]
    log = here / "log"
    with container(built.name) as (name, root), container(built.name) as (other, _), log.open("wb") as output:
        # Of the image's own volume and one that is given for the same place, buildah 1.28 takes either, by chance.
        for each in (name, other):
            run("buildah", "config", "--volume", "/var/lib/cryofleet-", each)
        # Places that buildah would make, and can't once the root is read-only.
        (root / "inputs").mkdir()
        (root / "run" / ".containerenv").touch()
        words = ["sh", "-c", READ_ONLY_WHILE, "sh", *built.config["Entrypoint"]]
        start = time.monotonic()
        process = subprocess.Popen(
            ["buildah", "run", *volumes, *environment, name, "--", *words], stdout=output, stderr=output
        )
        try:
            await_that((temporary / "waits").exists, process, log)
            run("mount", "-o", "remount,ro", root)
            (temporary / "read-only").touch()
            address = f"unix:{state}/run/{service}.sock"
            await_that(lambda: serving(address), process, log)
            say(f"{service}: serves after {time.monotonic() - start:.1f} s")
            status = Path(f"/proc/{the_service(process.pid, module).pid}/status").read_text()
            assert re.search(rf"^Uid:\s+{USER}\s+{USER}\s+{USER}\s+{USER}$", status, re.MULTILINE)
            assert re.search(r"^CapEff:\s+0+$", status, re.MULTILINE)
            with pytest.raises(OSError, match="Read-only"):
                (root / "opt" / "x").touch()

            settings = Settings(
                home=tmp_path,
                store="",
                pools={service: address, "io": address},
                orchestrator=address,
            )
            with Client(settings, start=False) as client:
                CALLS[service](client)

            # The image's own health check, from a container of its own beside it.
            check = ["buildah", "run", *volumes, *environment, other, "--", *built.config["Healthcheck"]["Test"][1:]]
            run(*check)
            the_service(process.pid, module).terminate()
            await_that(lambda: not serving(address), None, log)
            assert subprocess.run(check, capture_output=True, check=False).returncode == 1
        finally:
            subprocess.run(["mount", "-o", "remount,rw", str(root)], check=False)
            (temporary / "read-only").unlink(missing_ok=True)
            try:
                code = process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.kill()
                process.kill()
                code = process.wait(STOP_SECONDS)
    text = log.read_text()
    assert code == 0, text
    assert '"message": "stopped"' in text
    assert "Traceback" not in text
    assert "Read-only file system" not in text


def await_that(condition: Callable[[], bool], process: subprocess.Popen[bytes] | None, log: Path) -> None:
    """Returns once the condition holds; fails the test where the process ends before, or time does."""
    end = time.monotonic() + START_SECONDS
    while not condition():
        if process is not None and process.poll() is not None:
            pytest.fail(f"it ended with {process.returncode}\n{log.read_text()}")
        if time.monotonic() > end:
            pytest.fail(f"nothing after {START_SECONDS:.0f} s\n{log.read_text()}")
        time.sleep(0.1)
