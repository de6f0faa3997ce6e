"""The fields of the launch manifests, as far as we use them, and a check of a manifest against them.

KUBERNETES holds facts of Kubeflow's Training Operator 1.9 (manifests/base/crds/kubeflow.org_pytorchjobs.yaml, and
`RestartPolicy` and `CleanPodPolicy` in pkg/apis/kubeflow.org/v1/common_types.go). SKYPILOT holds facts of SkyPilot
0.14.1 (`get_task_schema` and `_get_single_resources_schema` in sky/utils/schemas.py). Both are written as JSON schemas
are; a field that is not listed is refused here, though the originals have more.
"""

from __future__ import annotations

import re
from typing import Any

TYPES = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool}


def faults(value: Any, schema: dict[str, Any], where: str = "") -> list[str]:
    """Return what a value breaks of a schema, each with its place; the keywords are those of JSON Schema."""
    if isinstance(value, bool) != (schema["type"] == "boolean") or not isinstance(value, TYPES[schema["type"]]):
        return [f"{where}: {value!r} is no {schema['type']}"]
    found = [f"{where}: {value!r} is not allowed"] if value not in schema.get("enum", [value]) else []
    if "pattern" in schema and not re.fullmatch(schema["pattern"], value):
        found.append(f"{where}: {value!r} does not match {schema['pattern']}")
    if isinstance(value, list):
        for i, item in enumerate(value):
            found += faults(item, schema["items"], f"{where}[{i}]")
    if isinstance(value, dict):
        known, others = schema.get("properties", {}), schema.get("additionalProperties")
        found += [f"{where}: {name} is missing" for name in schema.get("required", []) if name not in value]
        for name, item in value.items():
            if kind := known.get(name, others):
                found += faults(item, kind, f"{where}.{name}")
            else:
                found.append(f"{where}: {name} is unknown")
    return found


def _object(required: tuple[str, ...] = (), **properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "required": required, "properties": properties}


def _map(values: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": values}


def _list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


def _one_of(*values: str) -> dict[str, Any]:
    return {"type": "string", "enum": values}


TEXT, COUNT = {"type": "string"}, {"type": "integer"}

CONTAINER = _object(
    ("name",),
    name=_one_of("pytorch"),  # PytorchJobDefaultContainerName, by which the operator finds it
    image=TEXT,
    workingDir=TEXT,
    command=_list(TEXT),
    args=_list(TEXT),
    env=_list(_object(("name",), name=TEXT, value=TEXT)),
    resources=_object(limits=_map(COUNT)),
    volumeMounts=_list(_object(("mountPath", "name"), name=TEXT, mountPath=TEXT)),
)
VOLUME = _object(
    ("name",),
    name=TEXT,
    persistentVolumeClaim=_object(("claimName",), claimName=TEXT),
    emptyDir=_object(medium=_one_of("Memory"), sizeLimit={"type": "string", "pattern": r"\d+(Mi|Gi)"}),
)
POD = _object(("containers",), containers=_list(CONTAINER), volumes=_list(VOLUME), terminationGracePeriodSeconds=COUNT)
REPLICA = _object(
    replicas=COUNT,
    restartPolicy=_one_of("Always", "OnFailure", "Never", "ExitCode"),
    template=_object(spec=POD),
)
KUBERNETES = _object(
    ("apiVersion", "kind", "metadata", "spec"),
    apiVersion=_one_of("kubeflow.org/v1"),
    kind=_one_of("PyTorchJob"),
    metadata=_object(name={"type": "string", "pattern": "[a-z0-9]([a-z0-9-]*[a-z0-9])?"}),
    spec=_object(
        ("pytorchReplicaSpecs",),
        nprocPerNode=TEXT,
        runPolicy=_object(backoffLimit=COUNT, cleanPodPolicy=_one_of("All", "Running", "None")),
        pytorchReplicaSpecs=_object(("Master",), Master=REPLICA, Worker=REPLICA),
    ),
)
SKYPILOT = _object(
    name=TEXT,
    workdir=TEXT,
    num_nodes=COUNT,
    resources=_object(accelerators=TEXT, image_id=TEXT),
    envs=_map(TEXT),
    setup=TEXT,
    run=TEXT,
)
