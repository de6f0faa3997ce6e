"""The Kubernetes and SkyPilot manifests have the fields that their schedulers know, and start a run as launch/ does."""

from __future__ import annotations

import copy
import re
import subprocess
from typing import Any

import pytest
import yaml
from torch.distributed.run import get_args_parser

from tests.docs import checking
from tests.docs.schemas import KUBERNETES, SKYPILOT, faults
from tests.helpers.commands import ROOT

JOB = yaml.safe_load((ROOT / "launch/kubernetes.yaml").read_text())
TASK = yaml.safe_load((ROOT / "launch/skypilot.yaml").read_text())
MASTER = JOB["spec"]["pytorchReplicaSpecs"]["Master"]
CONTAINER = MASTER["template"]["spec"]["containers"][0]


def test_manifests_fit_their_schemas():
    assert faults(JOB, KUBERNETES) == []
    assert faults(TASK, SKYPILOT) == []


@pytest.mark.parametrize(
    ("path", "value", "fault"),
    [
        (("spec", "nprocPerNode"), 8, ".spec.nprocPerNode: 8 is no string"),
        (("spec", "replicas"), 2, ".spec: replicas is unknown"),
        (("kind",), "TFJob", ".kind: 'TFJob' is not allowed"),
        (("metadata", "name"), "Bft_1", ".metadata.name: 'Bft_1' does not match"),
        (("spec", "pytorchReplicaSpecs"), {}, ".spec.pytorchReplicaSpecs: Master is missing"),
    ],
)
def test_a_wrong_manifest_is_refused(path: tuple[str, ...], value: Any, fault: str):
    job = copy.deepcopy(JOB)
    inner = job
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    (found,) = faults(job, KUBERNETES)
    assert found.startswith(fault)


def test_kubernetes_starts_the_same_on_every_pod():
    assert JOB["spec"]["pytorchReplicaSpecs"]["Worker"]["template"] == MASTER["template"]
    assert CONTAINER["resources"]["limits"]["nvidia.com/gpu"] == int(JOB["spec"]["nprocPerNode"])
    volumes = {volume["name"] for volume in MASTER["template"]["spec"]["volumes"]}
    assert {mount["name"] for mount in CONTAINER["volumeMounts"]} == volumes
    checking.check([*CONTAINER["command"], *CONTAINER["args"]])


def test_skypilot_starts_torchrun_on_its_nodes():
    variables = {
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NUM_GPUS_PER_NODE": "8",
        "SKYPILOT_NODE_RANK": "1",
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
    }
    script = "torchrun() { printf '%s\\n' \"$@\"; }\n" + TASK["run"]
    done = subprocess.run(
        ["bash", "-eu", "-c", script], env=TASK["envs"] | variables, capture_output=True, text=True, check=True
    )
    words = done.stdout.splitlines()
    checking.check(["torchrun", *words])
    parsed = get_args_parser().parse_args(words)
    assert (parsed.nnodes, parsed.nproc_per_node, parsed.node_rank) == ("2", "8", 1)
    assert (parsed.master_addr, parsed.training_script_args) == ("10.0.0.1", ["train", TASK["envs"]["RECIPE"]])


def test_skypilot_installs_as_the_dockerfile_does():
    dockerfile = (ROOT / "Dockerfile").read_text()
    base = re.search(r"^ARG BASE_IMAGE=(\S+)$", dockerfile, re.MULTILINE).group(1)
    assert TASK["resources"]["image_id"] == f"docker:{base}"
    requirements, package = TASK["setup"].strip().splitlines()
    assert requirements == "python launch/image.py install pyproject.toml"
    assert "python build/image.py install build/pyproject.toml" in dockerfile
    for option in package.split()[2:]:
        assert option in dockerfile, option


def test_the_environment_is_that_of_the_slurm_scripts():
    library = (ROOT / "launch/lib.sh").read_text()
    job = {item["name"]: item["value"] for item in CONTAINER["env"]}
    task = {name: value for name, value in TASK["envs"].items() if name != "RECIPE"}
    assert job == task
    for name, value in job.items():
        assert f"export {name}=${{{name}:-{value}}}\n" in library, name
