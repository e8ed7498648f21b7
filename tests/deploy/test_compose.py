"""The compose files: by compose's own schema, and what they say against the image, the server and the files beside."""

import re
import subprocess
import sysconfig
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from tests.support.deployment import DEPLOY, ENDING_SECONDS, load, options, stages

(COMPOSE,) = load("compose.yaml")
(GPU,) = load("compose.gpu.yaml")
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]


def mounts(service: str) -> dict[str, str]:
    """Source by target."""
    pairs = [volume.split(":") for volume in SERVICES[service]["volumes"]]
    return {target: source for source, target, *_ in pairs}


def here(service: str, path: str) -> Path:
    """The file of the repository that a container sees at `path`."""
    (target,) = [target for target in mounts(service) if Path(path).is_relative_to(target)]
    return DEPLOY / mounts(service)[target] / Path(path).relative_to(target)


def published(service: str) -> dict[int, str]:
    """The address and port of this machine by the container's port."""
    ports = [port.rpartition(":") for port in SERVICES[service]["ports"]]
    return {int(inside): outside for outside, _, inside in ports}


def test_the_files_have_composes_schema() -> None:
    program = Path(sysconfig.get_path("scripts")) / "check-jsonschema"
    files = [DEPLOY / "compose.yaml", DEPLOY / "compose.gpu.yaml"]
    command = [program, "--builtin-schema", "vendor.compose-spec", *files]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_all_ports_are_of_this_machine_alone() -> None:
    for service in SERVICES:
        for outside in published(service).values():
            assert outside.startswith("127.0.0.1:"), "nothing here asks who is there"


def test_the_server_is_the_image_and_its_parts_are_where_it_says() -> None:
    server, final = SERVICES["lorikeet"], stages()[-1]
    build = server["build"]
    assert (DEPLOY / build["context"] / build["dockerfile"]).samefile(DEPLOY / "Dockerfile")
    arguments = {value.partition("=")[0] for value in stages()[0].values("ARG")}
    assert set(build["args"]) <= arguments
    settings = options(final.command("CMD"))
    assert set(published("lorikeet")) == {settings["port"], settings["metrics_port"]}
    written = re.findall(r"/var/\S+/lorikeet", final.values("RUN")[0].partition("install -d")[2])
    assert set(mounts("lorikeet")) == set(written)
    assert {mounts("lorikeet")[path] for path in written} <= set(COMPOSE["volumes"])
    assert server["read_only"]
    assert server["tmpfs"] == ["/tmp"]


def test_the_server_has_time_to_finish() -> None:
    (seconds,) = re.fullmatch(r"(\d+)s", SERVICES["lorikeet"]["stop_grace_period"]).groups()  # type: ignore[union-attr]
    assert int(seconds) >= options(stages()[-1].command("CMD"))["grace"] + ENDING_SECONDS


def test_prometheus_reads_our_rules_and_scrapes_the_server() -> None:
    (flag,) = [word for word in SERVICES["prometheus"]["command"] if word.startswith("--config.file=")]
    config = here("prometheus", flag.partition("=")[2])
    said = yaml.safe_load(config.read_text())
    assert all(list(config.parent.glob(pattern)) for pattern in said["rule_files"])
    targets = [
        target for job in said["scrape_configs"] for entry in job["static_configs"] for target in entry["targets"]
    ]
    assert targets == [f"lorikeet:{options(stages()[-1].command('CMD'))['metrics_port']}"]
    assert "lorikeet" in SERVICES


def test_grafana_finds_prometheus_and_the_dashboard() -> None:
    provisioning = here("grafana", "/etc/grafana/provisioning")
    (source,) = [
        source
        for file in (provisioning / "datasources").glob("*.yml")
        for source in yaml.safe_load(file.read_text())["datasources"]
    ]
    address = urlsplit(source["url"])
    assert address.hostname in SERVICES
    assert address.port in published(address.hostname)
    (provider,) = [
        provider
        for file in (provisioning / "dashboards").glob("*.yml")
        for provider in yaml.safe_load(file.read_text())["providers"]
    ]
    dashboards = here("grafana", provider["options"]["path"])
    home = SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert here("grafana", home) in list(dashboards.glob("*.json"))


def test_the_gpu_is_for_the_server() -> None:
    assert set(GPU["services"]) == {"lorikeet"}
    (device,) = GPU["services"]["lorikeet"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]
