"""The shipped cluster files against Ray's own schema, KubeRay's fields and what an image of ours must keep to."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent.parent
CLUSTER = ROOT / "cluster"
LAUNCHER = [CLUSTER / "aws.yaml", CLUSTER / "gcp.yaml"]
KUBERAY = [CLUSTER / "kuberay" / "raycluster.yaml", CLUSTER / "kuberay" / "rayjob.yaml"]
IMAGES = [CLUSTER / "Dockerfile", CLUSTER / "Dockerfile.cuda"]
RAY_VERSION = re.search(r"^ray==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]  # type: ignore[index]

# The fields of KubeRay's ray.io/v1 (version 1.5): what is not here, a cluster would drop or refuse.
CLUSTER_SPEC = {
    "rayVersion", "enableInTreeAutoscaling", "autoscalerOptions", "authOptions", "gcsFaultToleranceOptions", "suspend",
    "headGroupSpec", "workerGroupSpecs", "headServiceAnnotations", "managedBy",
}  # fmt: skip
HEAD = {
    "rayStartParams", "labels", "resources", "template", "serviceType", "headService", "enableIngress",
}  # fmt: skip
WORKERS = {
    "groupName", "replicas", "minReplicas", "maxReplicas", "idleTimeoutSeconds", "labels", "resources", "numOfHosts",
    "rayStartParams", "template", "scaleStrategy", "suspend",
}  # fmt: skip
JOB_SPEC = {
    "entrypoint", "runtimeEnvYAML", "submissionMode", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished",
    "deletionStrategy", "backoffLimit", "activeDeadlineSeconds", "submitterConfig", "submitterPodTemplate",
    "clusterSelector", "suspend", "managedBy", "entrypointNumCpus", "entrypointNumGpus", "entrypointResources",
    "rayClusterSpec", "jobId", "metadata",
}  # fmt: skip
AUTOSCALER = {
    "version", "idleTimeoutSeconds", "upscalingMode", "resources", "env", "envFrom", "image", "imagePullPolicy",
    "securityContext", "volumeMounts",
}  # fmt: skip


def read(file: Path) -> dict[str, Any]:
    found = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("file", LAUNCHER, ids=lambda f: f.name)
def test_launcher_files_fit_rays_schema(file: Path) -> None:
    import jsonschema

    ray = pytest.importorskip("ray")
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(read(file), schema)
    wrong = read(file)
    wrong["available_node_types"]["train"]["max_workerz"] = 1
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, schema)


@pytest.mark.parametrize("file", LAUNCHER, ids=lambda f: f.name)
def test_launcher_files_keep_what_leads_off_spot_nodes(file: Path) -> None:
    tree = read(file)
    kinds = tree["available_node_types"]
    head = kinds[tree["head_node_type"]]
    assert head["resources"]["CPU"] == 0  # no training on the head
    for name, kind in kinds.items():
        config = kind["node_config"]
        spot = "InstanceMarketOptions" in config or {"preemptible": True} in config.get("scheduling", [])
        assert kind["labels"]["ray.io/market-type"] == ("spot" if spot else "on-demand"), name
        assert spot == (name == "train")
        if name != tree["head_node_type"]:
            assert kind["min_workers"] == 0  # nothing idles on the bill
    assert sum(k.get("max_workers", 0) for k in kinds.values()) <= tree["max_workers"]


@pytest.mark.parametrize("file", LAUNCHER, ids=lambda f: f.name)
def test_launcher_files_want_a_token_and_open_nothing(file: Path) -> None:
    tree = read(file)
    assert "-e RAY_AUTH_MODE=token" in tree["docker"]["run_options"]
    assert "/home/ray/.ray/auth_token" in tree["file_mounts"]
    head = " ".join(tree["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in head
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in head
    assert "0.0.0.0" not in file.read_text()


def clusters() -> list[tuple[str, dict[str, Any]]]:
    found = []
    for file in KUBERAY:
        tree = read(file)
        found.append((file.name, tree["spec"].get("rayClusterSpec", tree["spec"])))
    return found


@pytest.mark.parametrize("file", KUBERAY, ids=lambda f: f.name)
def test_kuberay_fields(file: Path) -> None:
    tree = read(file)
    assert tree["apiVersion"] == "ray.io/v1"
    if tree["kind"] == "RayJob":
        assert set(tree["spec"]) <= JOB_SPEC
        assert tree["spec"]["shutdownAfterJobFinishes"] is True
        assert tree["spec"]["activeDeadlineSeconds"] > 0
        assert isinstance(yaml.safe_load(tree["spec"]["runtimeEnvYAML"]), dict)
    else:
        assert tree["kind"] == "RayCluster"


@pytest.mark.parametrize(("name", "spec"), clusters())
def test_kuberay_clusters(name: str, spec: dict[str, Any]) -> None:
    assert set(spec) <= CLUSTER_SPEC
    assert spec["rayVersion"] == RAY_VERSION
    assert spec["enableInTreeAutoscaling"] is True
    assert set(spec["autoscalerOptions"]) <= AUTOSCALER
    assert spec["autoscalerOptions"]["version"] == "v2"
    assert spec["authOptions"] == {"mode": "token"}
    head = spec["headGroupSpec"]
    assert set(head) <= HEAD
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert head["labels"]["ray.io/market-type"] == "on-demand"
    markets = {g["labels"]["ray.io/market-type"] for g in spec["workerGroupSpecs"]}
    assert "spot" in markets
    for group in spec["workerGroupSpecs"]:
        assert set(group) <= WORKERS
        assert group["minReplicas"] == 0 <= group["replicas"] <= group["maxReplicas"]
        pod = group["template"]["spec"]
        spot = any("gke-spot" in key for key in pod.get("nodeSelector", {}))
        assert spot == (group["labels"]["ray.io/market-type"] == "spot")
    for group in [head, *spec["workerGroupSpecs"]]:
        assert all(isinstance(v, str) for v in group["rayStartParams"].values())
        pod = group["template"]["spec"]
        assert pod["restartPolicy"] == "Never"
        (container,) = pod["containers"]
        assert container["resources"]["requests"] == container["resources"]["limits"]  # what Ray takes as its own
        volumes = {v["name"]: v for v in pod["volumes"]}
        assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
        assert {m["name"] for m in container["volumeMounts"]} == set(volumes)
        assert container["securityContext"]["runAsNonRoot"] is True


def test_the_entry_point_of_the_job_is_a_command_line_of_ours() -> None:
    from raycon import pretrain
    from raycon.core.config import elastic_problems

    words = read(KUBERAY[1])["spec"]["entrypoint"].split()
    assert words[:3] == ["python", "-m", "raycon.pretrain"]
    config, _ = pretrain.parse(words[3:])
    assert config.run.dir.startswith("/mnt/shared/")  # a retry on another cluster finds it
    assert elastic_problems(config) == []


def instructions(file: Path) -> list[tuple[str, str]]:
    text = re.sub(r"\\\n", " ", file.read_text(encoding="utf-8"))
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in lines]


@pytest.mark.parametrize("file", IMAGES, ids=lambda f: f.name)
def test_images(file: Path) -> None:
    steps = instructions(file)
    known = {"FROM", "RUN", "USER", "WORKDIR", "ARG", "ENV", "COPY", "CMD"}
    assert {name for name, _ in steps} <= known
    (base,) = [text for name, text in steps if name == "FROM"]
    assert re.fullmatch(r"\S+:\d+\.\d+\.\d+\S*", base), f"{base}: pin the base image"
    for name, text in steps:
        if name == "RUN" and "apt-get install" in text:
            assert "--no-install-recommends" in text
            assert "rm -rf /var/lib/apt/lists/*" in text
        if name == "COPY":
            *sources, _ = [word for word in text.split() if not word.startswith("--")]
            for source in sources:
                assert (ROOT / source).exists(), f"{file.name} copies {source}, which is not here"
    environment = " ".join(text for name, text in steps if name == "ENV")
    assert "PIP_NO_CACHE_DIR=1" in environment
    assert "RAY_AUTH_MODE=token" in environment
    users = [i for i, (name, _) in enumerate(steps) if name == "USER"]
    assert steps[users[-1]][1] not in ("root", "0")
    assert users[0] < next(i for i, (name, text) in enumerate(steps) if "setup_machine" in text)  # pip not as root
    extras = re.search(r"RAYCON_EXTRAS=(\S+)", environment)
    defined = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert extras is not None
    for extra in extras[1].split(","):
        assert re.search(rf"^{extra} = \[", defined, re.MULTILINE), extra


def test_both_images_copy_all_that_the_package_needs() -> None:
    for file in IMAGES:
        copied = " ".join(text for name, text in instructions(file) if name == "COPY")
        for folder in ("raycon", "data_loaders", "tuning", "cluster", "pyproject.toml", "constraints.txt"):
            assert folder in copied, f"{file.name}: {folder}"
