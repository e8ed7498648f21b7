"""The Kubernetes manifest: by Kubernetes' own schemas, and what it says against the image and the command line."""

from typing import Any

import kubernetes_validate
import pytest

from tests.support.deployment import ENDING_SECONDS, is_below, load, options, stages

OBJECTS = {document["kind"]: document for document in load("kubernetes/lorikeet.yaml")}
POD: dict[str, Any] = OBJECTS["StatefulSet"]["spec"]["template"]
(CONTAINER,) = POD["spec"]["containers"]
FINAL = stages()[-1]
PORTS = {port["name"]: port["containerPort"] for port in CONTAINER["ports"]}


@pytest.mark.parametrize("kind", list(OBJECTS))
@pytest.mark.parametrize("version", ["1.30", "1.37"])  # the first that knows preStop.sleep without a gate; the latest
def test_the_manifest_has_kubernetes_schema(kind: str, version: str) -> None:
    kubernetes_validate.validate(OBJECTS[kind], version, strict=True)


def test_the_arguments_are_ones_that_the_command_line_takes() -> None:
    settings, of_image = options(CONTAINER["args"]), options(FINAL.command("CMD"))
    assert "command" not in CONTAINER, "the image's entry point is kept"
    assert {"grpc": settings["port"], "metrics": settings["metrics_port"]} == PORTS
    same = ("host", "metrics_host", "port", "metrics_port", "store", "log_format")
    assert [settings[name] for name in same] == [of_image[name] for name in same]


def test_the_parts_find_each_other() -> None:
    labels = POD["metadata"]["labels"]
    service, stateful, policy = (OBJECTS[kind] for kind in ("Service", "StatefulSet", "NetworkPolicy"))
    assert service["spec"]["selector"] == stateful["spec"]["selector"]["matchLabels"] == labels
    assert policy["spec"]["podSelector"]["matchLabels"] == labels
    assert stateful["spec"]["serviceName"] == service["metadata"]["name"]
    assert {port["targetPort"] for port in service["spec"]["ports"]} == set(PORTS)
    assert {port["name"]: port["port"] for port in service["spec"]["ports"]} == PORTS
    allowed = [port["port"] for rule in policy["spec"]["ingress"] for port in rule["ports"]]
    assert sorted(allowed) == sorted(PORTS)
    assert POD["metadata"]["annotations"]["prometheus.io/port"] == str(PORTS["metrics"])


def test_probes_ask_the_server_for_its_health() -> None:
    """No service is named: "" is the server as a whole, as in `lorikeet health`."""
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert CONTAINER[probe]["grpc"] == {"port": PORTS["grpc"]}
    alive, ready = CONTAINER["livenessProbe"], CONTAINER["readinessProbe"]
    assert alive["periodSeconds"] * alive["failureThreshold"] > 10 * ready["periodSeconds"] * ready["failureThreshold"]


def test_a_pod_has_time_to_finish() -> None:
    waits = CONTAINER["lifecycle"]["preStop"]["sleep"]["seconds"]
    unready = CONTAINER["readinessProbe"]["periodSeconds"]
    assert waits >= unready
    needs = waits + options(CONTAINER["args"])["grace"] + ENDING_SECONDS
    assert POD["spec"]["terminationGracePeriodSeconds"] >= needs


def test_the_pod_is_confined_to_the_user_and_the_folders_of_the_image() -> None:
    (user,) = FINAL.values("USER")
    uid, gid = map(int, user.split(":"))
    pod = POD["spec"]["securityContext"]
    assert (pod["runAsUser"], pod["runAsGroup"], pod["fsGroup"], pod["runAsNonRoot"]) == (uid, gid, gid, True)
    own = CONTAINER["securityContext"]
    assert own["readOnlyRootFilesystem"]
    assert not own["allowPrivilegeEscalation"]
    assert own["capabilities"] == {"drop": ["ALL"]}
    mounted = {mount["mountPath"]: mount["name"] for mount in CONTAINER["volumeMounts"]}
    claims = {claim["metadata"]["name"] for claim in OBJECTS["StatefulSet"]["spec"]["volumeClaimTemplates"]}
    volumes = {volume["name"] for volume in POD["spec"]["volumes"]}
    assert set(mounted.values()) == claims | volumes
    written = FINAL.values("RUN")[0].partition("install -d -o lorikeet -g lorikeet ")[2].split()
    assert set(mounted) == {*written, "/tmp"}
    (kept,) = [path for path in mounted if is_below(options(CONTAINER["args"])["store"], path)]
    assert mounted[kept] in claims


def test_it_has_a_gpu() -> None:
    assert CONTAINER["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert options(CONTAINER["args"])["device"] == "cuda"
