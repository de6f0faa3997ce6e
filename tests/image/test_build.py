"""The Dockerfile built on a base that looks like NVIDIA's: its own torch, Transformer Engine and apex, which stay."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.commands import ROOT

BASE, IMAGE = "localhost/bft-test-base", "localhost/bft-test"
PYTHON = Path(sys.base_prefix)
STUBS = {"torch": "2.12.0a0+test", "triton": "3.6.0", "transformer_engine": "2.15.0", "apex": "0.1"}
"""Packages of the base, by metadata alone: what pip looks at."""

LIBRARIES = (
    "ca-certificates",
    "libffi8",
    "libssl3",
    "zlib1g",
    "libbz2-1.0",
    "liblzma5",
    "libsqlite3-0",
    "libreadline8",
)
"""What that Python's own modules are linked to."""


def buildah(*words: object) -> str:
    done = subprocess.run(["buildah", *map(str, words)], capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    root = tmp_path_factory.mktemp("base") / "root"
    release = platform.freedesktop_os_release()["VERSION_CODENAME"]  # whose libraries this Python is linked to
    debootstrap = ["debootstrap", "--variant=minbase", f"--include={','.join(LIBRARIES)}", release, str(root)]
    subprocess.run(debootstrap, check=True, capture_output=True, timeout=900)
    shutil.copytree(PYTHON, root / PYTHON.relative_to("/"), symlinks=True)
    packages = root / PYTHON.relative_to("/") / f"lib/python3.{sys.version_info.minor}/site-packages"
    for name, version in STUBS.items():
        info = packages / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (info / "RECORD").write_text("")
    (root / "root").chmod(0o755)  # where that Python may lie; the image's user is not root
    Path(root / "etc/pip.conf").write_text(_pip_settings())
    container = buildah("from", "scratch").strip()
    buildah("copy", "-q", container, root, "/")
    path = f"{PYTHON}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    buildah("config", "--env", f"PATH={path}", "--env", "PIP_BREAK_SYSTEM_PACKAGES=1", container)
    buildah("commit", "-q", "--rm", container, BASE)
    shutil.rmtree(root)
    certificates = ("--volume", "/etc/ssl/certs:/etc/ssl/certs:ro")
    build = ("--isolation", "chroot", "--format", "docker", "--network", "host", *certificates)
    buildah("build", *build, "--build-arg", f"BASE_IMAGE={BASE}", "--tag", IMAGE, ROOT)
    yield IMAGE
    buildah("rmi", "--force", IMAGE, BASE)


def _pip_settings() -> str:
    """This machine's index, without its constraints and folders, which the image does not see."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    lines = [line.partition("=") for line in listed.stdout.splitlines()]
    kept = {
        key.rpartition(".")[2]: value.strip("'") for key, _, value in lines if "index-url" in key or "trusted" in key
    }
    kept = {key: " ".join(word for word in value.split() if "file:" not in word) for key, value in kept.items()}
    return "[global]\n" + "".join(f"{key} = {value}\n" for key, value in kept.items() if value)


def in_image(image: str, *words: str, options: tuple[object, ...] = ()) -> str:
    """Run a command in the image."""
    container = buildah("from", image).strip()
    try:
        return buildah("run", "--isolation", "chroot", *options, container, "--", *words)
    finally:
        buildah("rm", container)


def test_image(image: str):
    """The command is there, and the base's packages are what they were."""
    code = f"from importlib.metadata import version as v; print({{n: v(n) for n in {list(STUBS)}}} == {STUBS})"
    assert in_image(image, "python", "-c", code).strip() == "True"
    assert "bft-megatron" in in_image(image, "bft-megatron", "--help")


@pytest.mark.parametrize("user", ["0", "4321"])
def test_a_mounted_folder_can_be_written_to(image: str, user: str, tmp_path: Path):
    """By root, and by a user who has no entry in the image and owns the folder."""
    tmp_path.chmod(0o755)
    os.chown(tmp_path, int(user), int(user))
    options = ("--user", f"{user}:{user}", "--volume", f"{tmp_path}:/w", "--workingdir", "/w")
    in_image(image, "sh", "-c", "bft-megatron --version > written && touch $HOME/cache", options=options)
    assert (tmp_path / "written").read_text().startswith("bft-megatron ")
    assert (tmp_path / "written").stat().st_uid == int(user)
