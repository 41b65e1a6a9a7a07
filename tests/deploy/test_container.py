"""The container's files: what a linter would look at, sizes that follow from what is served, and one place a fact."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from running import dashboard_metrics
from served import make_student, make_teacher

from cliplet.deploy import container
from cliplet.deploy.container import (
    BASE_IMAGE,
    CARRIED_OTHERWISE,
    CERTIFICATE,
    KEY,
    SERVER_FLAGS,
    ContainerOptions,
    container_command,
    not_carried,
    serve_command,
    write_container_files,
)
from cliplet.deploy.page import HEALTH_PATH, READY_PATH
from cliplet.deploy.repository import Served, ServeSettings, plan_served, shared_memory_bytes
from cliplet.deploy.serve_commands import start
from cliplet.deploy.server_options import Ports, ServerOptions
from cliplet.errors import EnvironmentError_, UsageError
from cliplet.server_address import PAGE_PORT, TOKEN_VARIABLE

PORTS = {**vars(Ports()), "page": PAGE_PORT}
Plan = Callable[..., tuple[list[Served], ServeSettings]]


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """Two bundles, planned with given settings."""
    folder = tmp_path_factory.mktemp("bundles")
    bundles = [("teacher", make_teacher(folder / "t")), ("student", make_student(folder / "s"))]

    def planned(**settings: Any) -> tuple[list[Served], ServeSettings]:
        chosen = ServeSettings(**{"target": "container", **settings})
        return plan_served(bundles, chosen)[0], chosen

    return planned


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> ContainerOptions:
    wheel = tmp_path_factory.mktemp("dist") / "cliplet-9-py3-none-any.whl"
    wheel.write_bytes(b"wheel")
    return ContainerOptions(wheel=wheel)


@pytest.fixture(scope="module")
def written(plan: Plan, options: ContainerOptions, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("out") / "server"
    write_container_files(folder, *plan(), options)
    return folder


def documents(file: Path) -> list[Any]:
    return list(yaml.safe_load_all(file.read_text()))


def instructions(folder: Path) -> list[tuple[str, str]]:
    """Of the Dockerfile, comments and line ends gone."""
    text = re.sub(r"\\\n", " ", (folder / "Dockerfile").read_text())
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(line.split()[0], line.split(None, 1)[1]) for line in lines]


def with_gpu(plan: Plan, options: ContainerOptions, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    served, _ = plan()
    # Only what the settings say of the device goes into the files; engines for a GPU cannot be built here.
    monkeypatch.setattr(container, "shared_memory_bytes", lambda *_: 1)
    write_container_files(folder, served, ServeSettings(device="cuda", target="container"), options)
    return folder


# Dockerfile.


def test_dockerfile_keeps_the_rules_of_its_trade(written: Path) -> None:
    found = instructions(written)
    words = [word for word, _ in found]
    assert words[0] == "FROM" and found[0][1] == BASE_IMAGE and re.search(r":\d\d\.\d\d-py3$", BASE_IMAGE)
    assert "ADD" not in words and words.count("CMD") == 1 and words.count("HEALTHCHECK") == 1
    users = [value for word, value in found if word == "USER"]
    assert users == ["1000:1000"] and words.index("USER") > words.index("RUN")
    run = dict(found)["RUN"]
    assert (
        "--no-cache-dir" in run
        and "/opt/cliplet/cliplet-9-py3-none-any.whl[edge,serve]" in run
        and "--constraint" in run
    )
    command = json.loads(dict(found)["CMD"])
    assert command[:2] == ["cliplet", "serve"]
    assert "bundles/" in next(value for word, value in found if word == "COPY" and "--chown" in value)


def test_health_is_that_every_model_answers(written: Path) -> None:
    check = dict(instructions(written))["HEALTHCHECK"]
    probe = json.loads(check[check.index("[") :])
    assert probe[:2] == ["python3", "-c"] and f"127.0.0.1:{PAGE_PORT}{READY_PATH}" in probe[2]
    compile(probe[2], "probe", "exec")


def test_wheel_comes_with_it(written: Path, plan: Plan, tmp_path: Path) -> None:
    name = "cliplet-9-py3-none-any.whl"
    assert (written / name).read_bytes() == b"wheel"
    assert name in dict(reversed(instructions(written)))["COPY"]
    with pytest.raises(UsageError):
        ContainerOptions(wheel=tmp_path / "none.whl")
    with pytest.raises(UsageError, match="no wheel") as told:
        write_container_files(tmp_path / "out", *plan())
    assert "python -m build --wheel" in told.value.fix and not (tmp_path / "out").exists()


def test_bundles_are_whole_copies(written: Path, plan: Plan) -> None:
    for one in plan()[0]:
        assert one.plan.bundle is not None
        source = one.plan.bundle.folder
        names = {p.relative_to(source) for p in source.rglob("*")}
        copied = written / "bundles" / one.name
        assert names == {p.relative_to(copied) for p in copied.rglob("*")}
        assert all(
            (copied / n).read_bytes() == (source / n).read_bytes() for n in names if (source / n).is_file()
        )
    ignored = (written / ".dockerignore").read_text().split()
    assert ignored[0] == "*" and {"!bundles", "!constraints.txt"} <= set(ignored)


# One place a fact: ports, paths, sizes.


def test_ports_and_paths_are_the_same_everywhere(written: Path) -> None:
    exposed = set(map(int, dict(instructions(written))["EXPOSE"].split()))
    (compose,) = documents(written / "compose.yaml")
    published = [tuple(p.split(":")) for p in compose["services"]["cliplet"]["ports"]]
    deployment, service = documents(written / "kubernetes.yaml")
    (pod,) = deployment["spec"]["template"]["spec"]["containers"]
    named = {p["name"]: p["containerPort"] for p in pod["ports"]}
    assert exposed == {int(p[2]) for p in published} == set(PORTS.values())
    assert named == PORTS
    assert {p["name"]: p["port"] for p in service["spec"]["ports"]} == PORTS
    assert {p["targetPort"] for p in service["spec"]["ports"]} == set(named)
    (prometheus,) = documents(written / "prometheus.yaml")
    assert prometheus["scrape_configs"][0]["static_configs"][0]["targets"] == [
        f"localhost:{PORTS['metrics']}"
    ]
    annotations = deployment["spec"]["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == str(PORTS["metrics"])
    probes = {name: pod[f"{name}Probe"] for name in ("startup", "readiness", "liveness")}
    paths = {name: probe["httpGet"] for name, probe in probes.items()}
    assert paths == {
        "startup": {"path": READY_PATH, "port": "page"},
        "readiness": {"path": READY_PATH, "port": "page"},
        "liveness": {"path": HEALTH_PATH, "port": "page"},
    }
    # A probe has to outlast the check that it waits for, and the start may take as long as it may.
    assert probes["readiness"]["timeoutSeconds"] > ServerOptions().deadline_s
    waits = probes["startup"]["failureThreshold"] * probes["startup"]["periodSeconds"]
    assert waits >= ServerOptions().ready_timeout_s
    assert (
        deployment["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
        > ServerOptions().exit_timeout_s
    )


def test_sizes_follow_from_what_is_served(plan: Plan, options: ContainerOptions, tmp_path: Path) -> None:
    sizes = {}
    for batch in (1, 32):
        served, settings = plan(max_batch_size=batch)
        write_container_files(tmp_path / str(batch), served, settings, options)
        (compose,) = documents(tmp_path / str(batch) / "compose.yaml")
        pod = documents(tmp_path / str(batch) / "kubernetes.yaml")[0]["spec"]["template"]["spec"]
        shm, tmp = (v["emptyDir"] for v in pod["volumes"])
        service = compose["services"]["cliplet"]
        assert shm["medium"] == "Memory" and shm["sizeLimit"] == f"{service['shm_size'][:-1]}Mi"
        assert service["tmpfs"] == [f"/tmp:size={tmp['sizeLimit'][:-2]}m,mode=1777"]
        limit = service["deploy"]["resources"]["limits"]["memory"]
        assert pod["containers"][0]["resources"]["limits"]["memory"] == f"{limit[:-1]}Mi"
        assert f"--shm-size={service['shm_size']}" in container_command(served, settings)
        sizes[batch] = int(service["shm_size"][:-1]), int(limit[:-1])
        assert sizes[batch][0] * 2**20 >= shared_memory_bytes(served, settings)
        assert sizes[batch][1] > sizes[batch][0] + int(tmp["sizeLimit"][:-2])
    assert sizes[32][0] > sizes[1][0] and sizes[32][1] > sizes[1][1]


def test_every_size_of_batch_is_warmed_up(plan: Plan) -> None:
    """Also the largest, where it is larger than the usual one."""
    served, _ = plan(max_batch_size=64)
    graph = served[0].graphs[0]
    _, best, most = graph.profile.batch
    assert most == 64 > best
    for tensor in graph.contract.inputs:
        shapes = graph.shapes(tensor)
        assert [shape[0] for shape in shapes] == [1, best, 64]
        assert shapes[2][1:] == shapes[1][1:], "with the usual views and canvas"


# Compose and Kubernetes: closed as far as it goes.


def test_compose_is_closed(written: Path) -> None:
    service = documents(written / "compose.yaml")[0]["services"]["cliplet"]
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    assert service["read_only"] is True and service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"] and service["restart"] == "unless-stopped"
    assert service["environment"] == {"CLIPLET_TOKEN": "${CLIPLET_TOKEN:-}"}
    assert "reservations" not in service["deploy"]["resources"]


def test_kubernetes_is_closed_and_consistent(written: Path) -> None:
    deployment, service = documents(written / "kubernetes.yaml")
    assert (deployment["apiVersion"], deployment["kind"]) == ("apps/v1", "Deployment")
    assert (service["apiVersion"], service["kind"]) == ("v1", "Service")
    template = deployment["spec"]["template"]
    labels = template["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == labels == service["spec"]["selector"]
    pod = template["spec"]
    (own,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == container.USER
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert own["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert {m["name"] for m in own["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    assert {m["mountPath"] for m in own["volumeMounts"]} == {"/dev/shm", "/tmp"}
    assert own["image"] == documents(written / "compose.yaml")[0]["services"]["cliplet"]["image"]
    assert "type" not in service["spec"], "reached from within the cluster alone"


def test_gpu_is_asked_for_where_it_is_used(
    plan: Plan, options: ContainerOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: Path
) -> None:
    folder = with_gpu(plan, options, tmp_path / "gpu", monkeypatch)
    (compose,) = documents(folder / "compose.yaml")
    devices = compose["services"]["cliplet"]["deploy"]["resources"]["reservations"]["devices"]
    assert devices == [{"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}]
    limits = documents(folder / "kubernetes.yaml")[0]["spec"]["template"]["spec"]["containers"][0][
        "resources"
    ]["limits"]
    assert limits["nvidia.com/gpu"] == "1"
    assert (
        "--device" in json.loads(dict(instructions(folder))["CMD"])
        and "--gpus=1" in (folder / "Dockerfile").read_text()
    )
    for file in ("compose.yaml", "kubernetes.yaml", "Dockerfile"):
        assert "gpu" not in re.sub("(?m)^#.*", "", (written / file).read_text()).lower(), file


# Commands.


def test_command_is_one_that_docker_and_cliplet_take(plan: Plan) -> None:
    served, settings = plan(max_batch_size=4)
    options = ContainerOptions(ports=Ports(http=9000, grpc=0), page_port=9080)
    words = shlex.split(container_command(served, settings, options))
    image = words.index(options.image)
    run, inner = words[:image], words[image + 1 :]
    assert run[:2] == ["docker", "run"] and all(w.startswith("--") for w in run[2:])
    published = [w.removeprefix("--publish=") for w in run if w.startswith("--publish")]
    assert published == [
        "127.0.0.1:9000:8000",
        "127.0.0.1::8001",
        "127.0.0.1:8002:8002",
        "127.0.0.1:9080:8080",
    ]
    mounted = {w.split(":")[-2].rpartition("/")[2] for w in run if w.startswith("--volume")}
    assert mounted == {"teacher", "student"}
    assert inner == serve_command(served, settings)


def test_without_a_page_its_port_is_not_published(
    plan: Plan, options: ContainerOptions, tmp_path: Path
) -> None:
    closed = replace(options, page_port=None)
    assert f":{PAGE_PORT}" not in container_command(*plan(), closed)
    assert f":{PAGE_PORT}" in container_command(*plan(), replace(options, page_port=0))
    write_container_files(tmp_path, *plan(), closed)
    (compose,) = documents(tmp_path / "compose.yaml")
    assert len(compose["services"]["cliplet"]["ports"]) == 3


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"views": "1+2x2", "threshold": 0.25, "max_pixels": 10**6},
        {"instances": 2, "threads": 3, "max_batch_size": 4, "max_queue": 9, "queue_delay_us": 7},
        {"runtime": "onnx", "precision": "fp32", "cache": True},
    ],
)
def test_the_containers_words_mean_the_same_settings(plan: Plan, settings: dict[str, Any]) -> None:
    served, chosen = plan()
    chosen = ServeSettings(**settings, target="container")
    options = ContainerOptions(cache_bytes=32 << 20)
    words = serve_command(served, chosen, options)
    parsed = start.make_context("start", words[2:]).params
    assert parsed["bundles"] == tuple(f"{o.name}=/opt/cliplet/bundles/{o.name}" for o in served)
    assert parsed["host"] == "0.0.0.0" and parsed["restart"]
    for name, value in settings.items():
        assert (parsed["cache_mib"] == 32) if name == "cache" else (parsed[name] == value), name


def test_the_containers_server_is_run_the_same_way(plan: Plan, tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    cert.write_text("certificate")
    key.write_text("key")
    how: dict[str, Any] = {
        "take_turns": True,
        "http_threads": 3,
        "log_verbose": 1,
        "ready_timeout_s": 300.5,
        "exit_timeout_s": 60,
        "deadline_s": 12.0,
    }
    assert how.keys() == SERVER_FLAGS.keys()
    server = ServerOptions(**how, host="0.0.0.0", tls_cert=cert, tls_key=key)
    options = ContainerOptions(page_hosts=("a.example", "b.example"))
    words = shlex.split(container_command(*plan(), options, server))
    image = words.index(options.image)
    run, inner = words[:image], words[image + 1 :]
    assert {f"--volume={cert}:{CERTIFICATE}:ro", f"--volume={key}:{KEY}:ro"} <= set(run)
    assert "--stop-timeout=80" in run, "docker does not kill it before its own time is over"
    assert "--health-timeout=16s" in run, "nor takes it for unhealthy before it has answered"
    # With TLS, all but gRPC is for the container itself.
    assert [w for w in run if w.startswith("--publish")] == ["--publish=0.0.0.0:8001:8001"]
    # Its files lie in the container alone, where a click option would look for them.
    tls = [words.index(word) for word in ("--tls-cert", "--tls-key")]
    assert [words[place + 1] for place in tls] == [CERTIFICATE, KEY]
    del words[min(tls) : max(tls) + 2]
    parsed = start.make_context("start", words[words.index("serve") + 1 :]).params
    assert {name: parsed[name] for name in how} == how
    assert parsed["page_hosts"] == options.page_hosts
    assert len(inner) == len(serve_command(*plan(), options, server))
    assert any("HTTP" in word for word in not_carried(server))


def test_no_option_of_the_server_is_dropped_silently(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    assert not_carried(ServerOptions()) == []
    assert not_carried(ServerOptions(backoff_s=9.0, deadline_s=9.0)) == ["backoff_s"]
    (told,) = not_carried(ServerOptions(token="sesame"))
    assert TOKEN_VARIABLE in told and "sesame" not in told
    monkeypatch.setenv(TOKEN_VARIABLE, "sesame")
    assert not_carried(ServerOptions(token="sesame")) == []
    names = {field.name for field in fields(ServerOptions)}
    assert SERVER_FLAGS.keys() | CARRIED_OTHERWISE <= names and not SERVER_FLAGS.keys() & CARRIED_OTHERWISE


# Writing.


def test_written_again_in_place_and_nothing_else_touched(
    plan: Plan, options: ContainerOptions, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    first = write_container_files(folder, *plan(), options)
    (folder / "notes.txt").write_text("mine")
    (folder / "bundles" / "old").mkdir()
    (folder / "Dockerfile").write_text("old")
    served, settings = plan()
    second = write_container_files(folder, served[:1], settings, options)
    assert first == second and all(file.is_file() for file in second)
    assert (folder / "notes.txt").read_text() == "mine" and (folder / "Dockerfile").read_text() != "old"
    assert [p.name for p in (folder / "bundles").iterdir()] == ["teacher"]
    assert not [p.name for p in folder.iterdir() if p.name.endswith(".tmp") or p.name.startswith(".bundles")]
    assert "$" not in re.sub(
        r"\$\{CLIPLET_TOKEN:-\}", "", "".join(p.read_text() for p in second if p.name != "grafana.json")
    )


def test_refusals(plan: Plan, options: ContainerOptions, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        write_container_files(tmp_path, [], ServeSettings())
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentError_):
        write_container_files(tmp_path / "file" / "out", *plan(), options)


# Dashboard.


def test_dashboard_is_one_that_grafana_takes(written: Path) -> None:
    board = json.loads((written / "grafana.json").read_text())
    panels = board["panels"]
    assert len({p["id"] for p in panels}) == len(panels) > 10 and board["schemaVersion"] > 30
    variables = {v["name"] for v in board["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", (written / "grafana.json").read_text())) - {
        "__all",
        "__rate_interval",
    }
    assert used == variables == {"datasource", "model"}
    cells = [
        (p["gridPos"]["x"] + x, p["gridPos"]["y"] + y)
        for p in panels
        for x in range(p["gridPos"]["w"])
        for y in range(p["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24, "no panel covers another"
    for panel in panels:
        for target in panel.get("targets", []):
            expression = target["expr"]
            assert expression.count("(") == expression.count(")")
            assert "rate(" in expression or not re.search(
                r"_us\b|_success|_failure|exec_count|_hits_|_misses_", expression
            )
    assert {
        "nv_inference_request_success",
        "nv_inference_request_failure",
        "nv_gpu_utilization",
    } <= dashboard_metrics()
