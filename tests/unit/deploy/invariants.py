"""What must hold of every overlay: functions from resources to what is wrong with them, empty where nothing is."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from itertools import product
from typing import Any

from cryofleet.operations import operations
from cryofleet.server.execution import STOP_SECONDS
from cryofleet.settings import SERVICES, Settings
from tests.unit.deploy.manifests import (
    REPOSITORY,
    WORKLOADS,
    Pod,
    Resource,
    environment,
    matches,
    name_of,
    of_kind,
    one,
    pods,
    quantity,
)

Check = Callable[[list[Resource]], Iterable[str]]

GIVEN_SECRETS = {
    "storage": {"access-key", "secret-key"},
    "database": {"url", "password", "ca.crt"},
    "tokens": {"tokens"},
}
"""Secrets that a site makes before it applies an overlay, as docs/kubernetes.md says."""
OWN = ("service", "orchestrator", "page")
"""The components that are the platform's own servers."""
PAGE_ASKS = ("orchestrator", "io", "picking")
"""What the viewer calls with its visitors' tokens."""
_OUTSIDE = "outside"
_POD_NAME = {"fieldPath": "metadata.name"}
_SECRET_NAME = re.compile(r"PASSWORD|SECRET|TOKEN$|ACCESS_KEY|DATABASE$")


def _service_of(pod: Pod) -> str:
    """The service whose operations a workload runs: that of the name without -gpu."""
    return pod.labels["app.kubernetes.io/name"].removesuffix("-gpu")


def _own(resources: list[Resource]) -> Iterator[Pod]:
    """Pods of the platform's own servers."""
    return (pod for pod in pods(resources) if pod.labels["app.kubernetes.io/component"] in OWN)


def _pools(resources: list[Resource]) -> dict[str, Resource]:
    """The Deployments that the orchestrator gives tasks to, by name; the viewer's is none: it asks for its visitors."""
    return {
        each["metadata"]["name"]: each
        for each in of_kind(resources, "Deployment")
        if each["metadata"]["labels"]["app.kubernetes.io/component"] == "service"
    }


# Every container


def sizes_are_said(resources: list[Resource]) -> Iterator[str]:
    for pod in pods(resources):
        for container in pod.containers:
            for side, of in product(("requests", "limits"), ("cpu", "memory", "ephemeral-storage")):
                if of not in container.get("resources", {}).get(side, {}):
                    yield f"{pod.name}: no {side} of {of}"
            given = container.get("resources", {})
            if given.get("requests", {}).get("memory") != given.get("limits", {}).get("memory"):
                yield f"{pod.name}: memory that is limited is not requested: the node may run out of it"
        folders = [volume["emptyDir"] for volume in pod.spec.get("volumes", []) if "emptyDir" in volume]
        if any("sizeLimit" not in folder for folder in folders):
            yield f"{pod.name}: a temporary folder without sizeLimit"
            continue
        limit = sum(
            quantity(container.get("resources", {}).get("limits", {}).get("ephemeral-storage", 0))
            for container in pod.containers
        )
        if limit < sum(quantity(folder["sizeLimit"]) for folder in folders):
            yield f"{pod.name}: its temporary folders hold more than its ephemeral-storage"


def probes_are_there(resources: list[Resource]) -> Iterator[str]:
    for pod in pods(resources):
        if pod.name.startswith("Job/"):
            continue
        for container, probe in product(pod.spec["containers"], ("startupProbe", "readinessProbe", "livenessProbe")):
            if probe not in container:
                yield f"{pod.name}: no {probe}"
    for pod in _own(resources):
        (container,) = pod.spec["containers"]
        port = int(environment(container, resources).get("CRYOFLEET_HEALTH_PORT", 0))
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            if container.get(probe, {}).get("grpc", {}).get("port") != port:
                yield f"{pod.name}: {probe} does not ask the health service on its port {port}"
        start = container.get("startupProbe", {})
        if start.get("periodSeconds", 10) * start.get("failureThreshold", 3) < 120:
            yield f"{pod.name}: less than two minutes to start"


def pods_are_restricted(resources: list[Resource]) -> Iterator[str]:
    """Kubernetes' profile `restricted`, and a root file system that is only read."""
    for pod in pods(resources):
        spec = pod.spec
        security = spec.get("securityContext", {})
        if spec.get("automountServiceAccountToken") is not False:
            yield f"{pod.name}: is given a service account's token"
        if spec.get("enableServiceLinks") is not False:
            yield f"{pod.name}: Services of the namespace get into its environment"
        if security.get("runAsNonRoot") is not True or not security.get("runAsUser", 0) > 0:
            yield f"{pod.name}: may run as root"
        if security.get("seccompProfile", {}).get("type") != "RuntimeDefault":
            yield f"{pod.name}: no seccomp profile"
        if any(spec.get(word) for word in ("hostNetwork", "hostPID", "hostIPC")):
            yield f"{pod.name}: shares the host's namespaces"
        for volume in spec.get("volumes", []):
            if not set(volume) - {"name"} <= {"emptyDir", "secret", "configMap", "persistentVolumeClaim"}:
                yield f"{pod.name}: a volume of a kind that is not allowed: {volume}"
        for container in pod.containers:
            own = container.get("securityContext", {})
            if own.get("readOnlyRootFilesystem") is not True:
                yield f"{pod.name}: its root file system can be written to"
            if own.get("allowPrivilegeEscalation") is not False or own.get("privileged"):
                yield f"{pod.name}: may gain privileges"
            if own.get("capabilities") != {"drop": ["ALL"]}:
                yield f"{pod.name}: keeps capabilities"
            if own.get("runAsUser", 1) == 0:
                yield f"{pod.name}: runs as root"
            if any("hostPort" in port for port in container.get("ports", [])):
                yield f"{pod.name}: takes a port of the host"


def namespace_is_restricted(resources: list[Resource]) -> Iterator[str]:
    (namespace,) = of_kind(resources, "Namespace")
    for mode in ("enforce", "audit", "warn"):
        if namespace["metadata"]["labels"].get(f"pod-security.kubernetes.io/{mode}") != "restricted":
            yield f"pod security {mode} is not restricted"
    for resource in resources:
        if resource["kind"] != "Namespace" and resource["metadata"].get("namespace") != namespace["metadata"]["name"]:
            yield f"{name_of(resource)}: is not in the namespace"
    if of_kind(resources, "Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding"):
        yield "something has rights in the cluster"


def images_are_exact(resources: list[Resource]) -> Iterator[str]:
    version = re.search(r'^version = "(.+)"', (REPOSITORY / "pyproject.toml").read_text(), re.MULTILINE)
    assert version is not None
    for pod in pods(resources):
        for container in pod.containers:
            image, _, tag = container["image"].rpartition(":")
            if not image or "/" in tag or tag == "latest":
                yield f"{pod.name}: {container['image']} names no exact version"
            if "/cryofleet-" in container["image"] and tag.removesuffix("-cuda") != version[1]:
                yield f"{pod.name}: {container['image']} is not of this version, {version[1]}"
    for pod in _own(resources):
        (container,) = pod.spec["containers"]
        if not container["image"].rpartition(":")[0].endswith(f"/cryofleet-{_service_of(pod)}"):
            yield f"{pod.name}: runs {container['image']}"
        if ("nvidia.com/gpu" in container["resources"]["limits"]) != container["image"].endswith("-cuda"):
            yield f"{pod.name}: either a GPU or an image that can use one is missing"


# What it takes


def memory_suffices(resources: list[Resource]) -> Iterator[str]:
    """What operations are granted, and what the process takes without any, fits into 95% of the limit."""
    resting = resting_bytes()
    for pod in _own(resources):
        (container,) = pod.spec["containers"]
        granted = int(environment(container, resources).get("CRYOFLEET_MEMORY_BYTES", 0))
        limit = quantity(container["resources"]["limits"]["memory"])
        if not granted:
            yield f"{pod.name}: operations are granted memory by the machine's, not the pod's"
        if granted + resting[_service_of(pod)] > 0.95 * limit:
            yield f"{pod.name}: {granted} and {resting[_service_of(pod)]} bytes do not fit into {limit:.0f}"


def resting_bytes() -> dict[str, int]:
    """Memory of each process without any operation, from the table in docs/kubernetes.md."""
    text = (REPOSITORY / "docs" / "kubernetes.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (\d+) MiB \|", text, re.MULTILINE)
    found = {name: int(size) * 2**20 for name, size in rows}
    assert set(found) == {*SERVICES, "orchestrator", "viewer"}, (
        "docs/kubernetes.md has lost its table of resting processes"
    )
    return found


def cores_suffice(resources: list[Resource]) -> Iterator[str]:
    for pod in _own(resources):
        (container,) = pod.spec["containers"]
        values = environment(container, resources)
        if values.get("OMP_NUM_THREADS") != values.get("CRYOFLEET_THREADS"):
            yield f"{pod.name}: libraries use other numbers of threads than operations are told"
        used = int(values.get("CRYOFLEET_SLOTS", 0)) * int(values.get("CRYOFLEET_THREADS", 0))
        if not used:
            yield f"{pod.name}: slots and threads are the machine's, not the pod's"
        if pod.labels["app.kubernetes.io/component"] == "service" and used != quantity(
            container["resources"]["limits"]["cpu"]
        ):
            yield f"{pod.name}: {used} threads and {container['resources']['limits']['cpu']} cores"


# Ending and being moved


def pods_end_in_time(resources: list[Resource]) -> Iterator[str]:
    """Nothing is killed in the middle of a step that may still go on."""
    stall_limits: dict[str, float] = {"orchestrator": 0.0, "viewer": 0.0}
    for operation in operations().values():
        stall_limits[operation.service] = max(stall_limits.get(operation.service, 0.0), operation.stall_limit_seconds)
    for pod in _own(resources):
        (container,) = pod.spec["containers"]
        drain = float(environment(container, resources).get("CRYOFLEET_DRAIN_SECONDS", 30))
        longest = stall_limits[_service_of(pod)]
        if drain < longest:
            yield f"{pod.name}: drains for {drain:.0f} s; a step may go on for {longest:.0f} s"
        # What outlasts the draining is told to stop, twice at most, and may take STOP_SECONDS each time.
        if pod.spec.get("terminationGracePeriodSeconds", 30) < drain + 2 * (STOP_SECONDS + 1.0) + 10.0:
            yield f"{pod.name}: is killed before it has drained"


def disruption_budgets_are_there(resources: list[Resource]) -> Iterator[str]:
    for resource in of_kind(resources, *WORKLOADS):
        labels = resource["spec"]["template"]["metadata"]["labels"]
        budgets = [
            each for each in of_kind(resources, "PodDisruptionBudget") if matches(each["spec"]["selector"], labels)
        ]
        if len(budgets) != 1:
            yield f"{name_of(resource)}: has {len(budgets)} disruption budgets"
        elif budgets[0]["spec"].get("maxUnavailable") != 1:
            yield f"{name_of(resource)}: its budget keeps nodes from being drained, or keeps nothing"


def orchestrators_have_names(resources: list[Resource]) -> Iterator[str]:
    """The executor's id is the pod's name, and that of a StatefulSet's pod is the same after a restart."""
    orchestrator = one(resources, "StatefulSet/orchestrator")
    for pod in _own([orchestrator]):
        sources = [each for each in pod.containers[0].get("env", []) if each["name"] == "CRYOFLEET_INSTANCE"]
        if [each.get("valueFrom") for each in sources] != [{"fieldRef": _POD_NAME}]:
            yield "the executor's id is not the pod's name"
    governing = one(resources, f"Service/{orchestrator['spec']['serviceName']}")
    if governing["spec"].get("clusterIP") != "None":
        yield "the Service that gives the orchestrators their names is not headless"


# Names


def names_lead_somewhere(resources: list[Resource]) -> Iterator[str]:
    """Services have pods, pools have Services, and all names that something is reached by are in its certificate."""
    every = list(pods(resources))
    for service in of_kind(resources, "Service"):
        found = [pod for pod in every if matches({"matchLabels": service["spec"]["selector"]}, pod.labels)]
        if len(found) != 1:
            yield f"{name_of(service)}: has the pods of {len(found)} workloads"
            continue
        names = {port.get("name") for container in found[0].containers for port in container.get("ports", [])}
        if not {port["targetPort"] for port in service["spec"]["ports"]} <= names:
            yield f"{name_of(service)}: names a port that its pods do not have"
    services = {each["metadata"]["name"]: each for each in of_kind(resources, "Service")}
    (container,) = one(resources, "StatefulSet/orchestrator")["spec"]["template"]["spec"]["containers"]
    values = environment(container, resources)
    reached = set()
    for name in SERVICES:
        for address in values[f"CRYOFLEET_POOL_{name.upper()}"].split(","):
            host, _, port = address.removeprefix("dns:///").rpartition(":")
            reached.add(host)
            pool = services.get(host)
            if pool is None or pool["spec"].get("clusterIP") != "None":
                yield f"pool {name}: {host} is no headless Service"
            elif int(port) not in {each["port"] for each in pool["spec"]["ports"]}:
                yield f"pool {name}: {host} has no port {port}"
            if host.removesuffix("-gpu") != name:
                yield f"pool {name}: {host} runs something else"
    pools = _pools(resources).keys()
    if pools != reached:
        yield f"the orchestrator does not know these, or knows others: {sorted(pools ^ reached)}"
    for ingress in of_kind(resources, "Ingress"):
        for path in (path for rule in ingress["spec"]["rules"] for path in rule["http"]["paths"]):
            backend = path["backend"]["service"]
            ports = services.get(backend["name"], {}).get("spec", {}).get("ports", [])
            if backend["port"]["name"] not in {port["name"] for port in ports}:
                yield f"{name_of(ingress)}: leads to {backend['name']}, which has no port {backend['port']['name']}"
    certificates = {each["spec"]["secretName"]: each["spec"] for each in of_kind(resources, "Certificate")}
    for pod in every:
        for volume in pod.spec.get("volumes", []):
            if volume["name"] != "tls":
                continue
            certificate = certificates.get(volume["secret"]["secretName"], {})
            own = pod.labels["app.kubernetes.io/name"]
            if own in services and not {own, f"{own}.cryofleet.svc"} <= set(certificate.get("dnsNames", [])):
                yield f"{pod.name}: its certificate does not bear its names"
            if own in services and "server auth" not in certificate.get("usages", []):
                yield f"{pod.name}: its certificate is not a server's"
    for pod in _own(resources):
        if not any(volume["name"] == "tls" for volume in pod.spec.get("volumes", [])):
            yield f"{pod.name}: has no certificate"


def secrets_are_elsewhere(resources: list[Resource]) -> Iterator[str]:
    """No secret's content is in a manifest, and each one that is used is made by cert-manager or by the site."""
    for resource in of_kind(resources, "Secret"):
        yield f"{name_of(resource)}: a Secret in the manifests"
    made = {each["spec"]["secretName"] for each in of_kind(resources, "Certificate")}

    def check(where: str, secret: str, keys: set[str]) -> Iterator[str]:
        known = {"tls.crt", "tls.key", "ca.crt"} if secret in made else GIVEN_SECRETS.get(secret)
        if known is None or not keys <= known:
            yield f"{where}: nobody makes {secret} with {sorted(keys)}"

    for resource in of_kind(resources, "ConfigMap"):
        for name, value in resource.get("data", {}).items():
            if (_SECRET_NAME.search(name) and not name.endswith("_FILE")) or re.search(r"://[^/\s]*:[^/\s]*@", value):
                yield f"{name_of(resource)}: {name} holds a secret"
    for pod in pods(resources):
        for container in pod.containers:
            for variable in container.get("env", []):
                name = variable["name"]
                if "value" in variable and _SECRET_NAME.search(name) and not name.endswith("_FILE"):
                    yield f"{pod.name}: {name} stands in the manifest"
                if reference := variable.get("valueFrom", {}).get("secretKeyRef"):
                    yield from check(pod.name, reference["name"], {reference["key"]})
            if any("secretRef" in source for source in container.get("envFrom", [])):
                yield f"{pod.name}: takes a whole Secret into its environment"
        for volume in pod.spec.get("volumes", []):
            if secret := volume.get("secret"):
                yield from check(pod.name, secret["secretName"], {item["key"] for item in secret.get("items", [])})
                if secret.get("defaultMode", 0o644) & 0o007:
                    yield f"{pod.name}: others may read {secret['secretName']}"


# The network


def flows(resources: list[Resource]) -> set[tuple[str, str, int]]:
    """All connections that the policies let through: from, to, port.

    Ends are workloads by their name, namespaces as namespace/NAME, and addresses outside.
    """
    policies = of_kind(resources, "NetworkPolicy")
    ends = {pod.labels["app.kubernetes.io/name"]: pod.labels for pod in pods(resources)}
    ports = {
        port["containerPort"] for pod in pods(resources) for each in pod.containers for port in each.get("ports", [])
    }
    found = set()
    for name, labels in ends.items():
        for other, port in _peers(policies, "Egress", labels, ends, ports):
            if other not in ends or (name, port) in _peers(policies, "Ingress", ends[other], ends, ports):
                found.add((name, other, port))
        for other, port in _peers(policies, "Ingress", labels, ends, ports):
            if other not in ends:
                found.add((other, name, port))
    return found


def _peers(
    policies: list[Resource], direction: str, labels: dict[str, str], ends: dict[str, dict[str, str]], ports: set[int]
) -> set[tuple[str, int]]:
    found = set()
    chosen = [
        policy["spec"]
        for policy in policies
        if direction in policy["spec"]["policyTypes"] and matches(policy["spec"]["podSelector"], labels)
    ]
    if not chosen:  # not isolated: whatever it likes
        return {(other, port) for other, port in product([*ends, _OUTSIDE], ports)}
    side = "to" if direction == "Egress" else "from"
    for spec in chosen:
        for rule in spec.get(direction.lower(), []):
            allowed = {port["port"] for port in rule["ports"]} if "ports" in rule else ports
            for peer in rule.get(side, [{"everything": True}]):
                found |= set(product(_ends_of(peer, ends), allowed))
    return found


def _ends_of(peer: dict[str, Any], ends: dict[str, dict[str, str]]) -> list[str]:
    if "ipBlock" in peer:
        return [f"{_OUTSIDE} {peer['ipBlock']['cidr']}"]
    if "namespaceSelector" in peer:
        selector = {
            **peer["namespaceSelector"].get("matchLabels", {}),
            **peer.get("podSelector", {}).get("matchLabels", {}),
        }
        return ["namespace " + " ".join(selector.values())]
    if "podSelector" in peer:
        return [name for name, labels in ends.items() if matches(peer["podSelector"], labels)]
    return [*ends, _OUTSIDE]


def only_what_is_needed_flows(resources: list[Resource]) -> list[str]:
    services = set(_pools(resources))
    small = any(each["metadata"]["name"] == "database" for each in of_kind(resources, "StatefulSet"))
    needed: set[tuple[str, str, int]] = set()
    for service in services:
        needed |= {("orchestrator", service, 50051), ("namespace monitoring prometheus", service, 9100)}
    for client_of in ("orchestrator", "io"):
        needed.add(("namespace true", client_of, 50051))
    needed |= {("viewer", each, 50051) for each in PAGE_ASKS}
    needed |= {
        ("namespace true", "viewer", 8443),
        ("namespace monitoring prometheus", "viewer", 9100),
        ("namespace monitoring prometheus", "orchestrator", 9100),
        ("namespace keda keda-operator", "orchestrator", 9100),
    }
    if small:
        needed |= {(each, "storage", 9000) for each in (*services, "orchestrator", "bucket")}
        needed.add(("orchestrator", "database", 5432))
    else:
        needed |= {(each, "outside 192.0.2.16/28", 443) for each in (*services, "orchestrator")}
        needed.add(("orchestrator", "outside 192.0.2.0/28", 5432))
    ends = [pod.labels["app.kubernetes.io/name"] for pod in pods(resources)]
    needed |= {(each, "namespace kube-system kube-dns", 53) for each in ends}
    found = flows(resources)
    return [
        *(f"{a} reaches {b} on {port}" for a, b, port in sorted(found - needed)),
        *(f"{a} does not reach {b} on {port}" for a, b, port in sorted(needed - found)),
    ]


def denied_by_default(resources: list[Resource]) -> list[str]:
    for policy in of_kind(resources, "NetworkPolicy"):
        spec = policy["spec"]
        if (
            spec["podSelector"] == {}
            and set(spec["policyTypes"]) == {"Ingress", "Egress"}
            and not (spec.get("ingress") or spec.get("egress"))
        ):
            return []
    return ["no policy denies what no other one allows"]


# Scaling and pools of nodes


def pools_are_scaled(resources: list[Resource]) -> Iterator[str]:
    """By slots that are queued and running, of the orchestrator's page that has them."""
    scaled = {each["spec"]["scaleTargetRef"]["name"]: each["spec"] for each in of_kind(resources, "ScaledObject")}
    if not scaled and "StatefulSet/database" in {name_of(each) for each in resources}:
        return  # a small site has fixed instances
    deployments = _pools(resources)
    for name in deployments.keys() ^ scaled.keys():
        yield f"{name}: a pool without a ScaledObject, or one without a pool"
    for name in deployments.keys() & scaled.keys():
        spec, (pod,) = scaled[name], pods([deployments[name]])
        if "replicas" in deployments[name]["spec"]:
            yield f"{name}: applying its manifest would undo its scaling"
        gpu = name.endswith("-gpu")
        if gpu and (spec["minReplicaCount"], spec["cooldownPeriod"]) != (0, 600):
            yield f"{name}: does not go down to zero after ten minutes"
        if not gpu and spec["minReplicaCount"] < 1:
            yield f"{name}: goes down to zero, with operations that every run begins with"
        if spec["maxReplicaCount"] <= max(1, spec["minReplicaCount"]):
            yield f"{name}: does not grow"
        (trigger,) = spec["triggers"]
        values = environment(pod.containers[0], resources)
        if trigger["type"] != "metrics-api" or trigger.get("metricType") != "AverageValue":
            yield f"{name}: is not scaled by slots"
        about = trigger["metadata"]
        if about["targetValue"] != values["CRYOFLEET_SLOTS"]:
            yield f"{name}: its target is {about['targetValue']} and it has {values['CRYOFLEET_SLOTS']} slots"
        part = "gpu" if gpu else "cpu" if f"{name}-gpu" in deployments else "all"
        if about["valueLocation"] != f"pools.{_service_of(pod)}.{part}":
            yield f"{name}: is scaled by {about['valueLocation']}"
        if about["url"] != "http://orchestrator.cryofleet.svc:9100/slots" or about["format"] != "json":
            yield f"{name}: asks {about['url']}"


def pools_have_nodes(resources: list[Resource]) -> Iterator[str]:
    facility = bool(of_kind(resources, "ScaledObject"))
    for pod in _own(resources):
        if pod.labels["app.kubernetes.io/component"] != "service":
            continue
        kind = "gpu" if pod.name.endswith("-gpu") else "cpu"
        resources_of = pod.containers[0]["resources"]
        gpus = {side: resources_of[side].get("nvidia.com/gpu") for side in ("requests", "limits")}
        if set(gpus.values()) != ({"1"} if kind == "gpu" else {None}):
            yield f"{pod.name}: asks for {gpus} GPUs"
        if not facility:
            continue
        if pod.spec.get("nodeSelector", {}).get("cryofleet.io/pool") != kind:
            yield f"{pod.name}: is not kept to the nodes of its pool"
        tolerated = {each["key"]: each for each in pod.spec.get("tolerations", [])}
        if tolerated.get("cryofleet.io/pool", {}).get("value") != kind:
            yield f"{pod.name}: does not tolerate the taint of its pool"
        if ("nvidia.com/gpu" in tolerated) != (kind == "gpu"):
            yield f"{pod.name}: GPU nodes are closed to it, or open without need"


def the_page_has_no_rights(resources: list[Resource]) -> Iterator[str]:
    """The viewer acts by its visitors' tokens alone, which those it asks must know."""
    for pod in pods(resources):
        (container,) = pod.containers
        values = environment(container, resources)
        name = pod.labels["app.kubernetes.io/name"]
        if name in PAGE_ASKS and "CRYOFLEET_TOKENS" not in values:
            yield f"{pod.name}: does not know the visitors' tokens"
        if pod.labels["app.kubernetes.io/component"] != "page":
            continue
        for secret in ("CRYOFLEET_S3_SECRET_KEY", "CRYOFLEET_DATABASE", "CRYOFLEET_TOKEN", "CRYOFLEET_TOKENS"):
            if secret in values:
                yield f"{pod.name}: is given {secret}"
        trusted = set(Settings.from_environment({}).platform_names)
        certificate = one(resources, f"Certificate/{name}")["spec"]
        if trusted & {certificate["commonName"], *certificate["dnsNames"]}:
            yield f"{pod.name}: its certificate stands for the platform"
        if one(resources, f"Deployment/{name}")["spec"].get("replicas") != 1:
            yield f"{pod.name}: visitors are known to one pod, and another may be asked"
        asked = {values[v].removeprefix("dns:///") for v in ("CRYOFLEET_ORCHESTRATOR", "CRYOFLEET_POOL_IO")}
        asked.add(values["CRYOFLEET_POOL_PICKING"].removeprefix("dns:///"))
        if asked != {f"{each}:50051" for each in PAGE_ASKS}:
            yield f"{pod.name}: asks {sorted(asked)}"
        hosts = {rule["host"] for each in of_kind(resources, "Ingress") for rule in each["spec"]["rules"]}
        named = {host for each in of_kind(resources, "Ingress") for tls in each["spec"]["tls"] for host in tls["hosts"]}
        if not hosts == named <= set(values["CRYOFLEET_PAGE_ORIGINS"].split()):
            yield f"{pod.name}: browsers know it as {sorted(hosts)}, which it does not take"


CHECKS: tuple[Check, ...] = (
    sizes_are_said,
    probes_are_there,
    pods_are_restricted,
    namespace_is_restricted,
    images_are_exact,
    memory_suffices,
    cores_suffice,
    pods_end_in_time,
    disruption_budgets_are_there,
    orchestrators_have_names,
    names_lead_somewhere,
    secrets_are_elsewhere,
    denied_by_default,
    only_what_is_needed_flows,
    pools_are_scaled,
    pools_have_nodes,
    the_page_has_no_rights,
)
