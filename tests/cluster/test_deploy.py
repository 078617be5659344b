"""Files for deployment fit each other, the command line and Ray's own schema; nothing here can build or apply them."""

from __future__ import annotations

import json
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("ray")

from ray.serve.schema import ServeDeploySchema

from multimodal.cli import main
from multimodal.cluster.serving import NAME, ServingSettings, build

ROOT = Path(__file__).parent.parent.parent
DEPLOY = ROOT / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
SERVE = yaml.safe_load((DEPLOY / "serve.yaml").read_text())
MANIFEST = yaml.safe_load((DEPLOY / "rayservice.yaml").read_text())
IN_KUBERNETES = yaml.safe_load(MANIFEST["spec"]["serveConfigV2"])


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"\\\n\s*", "", "\n".join(line for line in DOCKERFILE.splitlines() if not line.startswith("#")))
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in text.splitlines() if line)]


def pods() -> list[dict[str, Any]]:
    cluster = MANIFEST["spec"]["rayClusterConfig"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [container for group in groups for container in group["template"]["spec"]["containers"]]


@pytest.mark.parametrize("config", [SERVE, IN_KUBERNETES], ids=["serve.yaml", "rayservice.yaml"])
class TestServe:
    def test_is_what_ray_takes(self, config: dict[str, Any]) -> None:
        ServeDeploySchema.model_validate(config)

    def test_names_what_is_here(self, config: dict[str, Any]) -> None:
        (application,) = config["applications"]
        module, name = application["import_path"].split(":")
        assert getattr(import_module(module), name) is build and application["name"] == NAME
        assert build(application["args"]) is not None  # Ray hands them over as they stand
        assert ServingSettings(**application["args"]).replicas == "auto"


def test_both_are_the_same_service() -> None:
    (here,), (there,) = SERVE["applications"], IN_KUBERNETES["applications"]
    assert IN_KUBERNETES["http_options"]["host"] == "0.0.0.0" and "store" in there["args"]  # others reach it: with keys
    assert here == {**there, "args": {key: value for key, value in there["args"].items() if key != "store"}}
    assert SERVE["http_options"]["host"] == "127.0.0.1"  # where nothing stands before it, nobody else reaches it


class TestKubernetes:
    def test_kind(self) -> None:
        assert (MANIFEST["apiVersion"], MANIFEST["kind"]) == ("ray.io/v1", "RayService")

    def test_ray_is_that_of_the_image(self) -> None:
        pinned = re.search(r"^ray==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
        assert pinned and MANIFEST["spec"]["rayClusterConfig"]["rayVersion"] == pinned[1]

    def test_ports(self) -> None:
        for pod in pods():
            ports = {port["name"]: port["containerPort"] for port in pod["ports"]}
            assert ports["serve"] == IN_KUBERNETES["http_options"]["port"]

    def test_a_replica_fits_into_a_worker(self) -> None:
        worker = next(pod for pod in pods() if pod["name"] == "ray-worker")
        assert int(worker["resources"]["limits"]["cpu"]) >= SERVE["applications"][0]["args"]["num_cpus"]

    def test_image_is_one_that_is_built(self) -> None:
        built = set(re.findall(r"--tag (\S+)", DOCKERFILE))
        assert {pod["image"] for pod in pods()} <= built


class TestDockerfile:
    def test_instructions(self) -> None:
        known = {"ARG", "FROM", "ENV", "RUN", "WORKDIR", "COPY", "USER", "EXPOSE", "CMD"}
        assert {word for word, _ in instructions()} == known

    def test_devices_are_stages(self) -> None:
        stages = {rest.split(" AS ")[1] for word, rest in instructions() if word == "FROM" and " AS " in rest}
        assert stages == {"cpu", "cuda"}
        assert ("ARG", "DEVICE=cpu") in instructions() and ("FROM", "${DEVICE}") in instructions()
        assert set(re.findall(r"DEVICE=(\w+)", DOCKERFILE)) <= stages

    def test_what_is_copied_is_here(self) -> None:
        for word, rest in instructions():
            if word == "COPY":
                assert all((ROOT / name).exists() for name in rest.split()[:-1]), rest

    def test_what_the_package_needs_is_copied(self) -> None:
        copied = [name for word, rest in instructions() if word == "COPY" for name in rest.split()[:-1]]
        assert {"pyproject.toml", "constraints.txt", "multimodal", "assets"} <= set(copied)

    def test_commands_are_there(self) -> None:
        (start,) = (json.loads(rest) for word, rest in instructions() if word == "CMD")
        assert start[:2] == ["serve", "run"] and yaml.safe_load((ROOT / start[2]).read_text()) == SERVE
        (port,) = (rest for word, rest in instructions() if word == "EXPOSE")
        assert int(port) == SERVE["http_options"]["port"]
        for command in re.findall(r"^RUN multimodal (\w+)", DOCKERFILE, re.MULTILINE):
            with pytest.raises(SystemExit) as ended:
                main([command, "--help"])
            assert ended.value.code == 0

    def test_extras_are_there(self) -> None:
        import tomllib

        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        wanted = re.search(r"'\.\[([\w,]+)\]'", DOCKERFILE)
        assert wanted and set(wanted[1].split(",")) <= set(extras)

    def test_nobody_is_root(self) -> None:
        users = [rest for word, rest in instructions() if word == "USER"]
        assert users == ["multimodal"]
