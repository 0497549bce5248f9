"""The files in docker/ are what they should be. That they train is seen by `test_docker.py`, where a Docker engine answers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

FILES = Path(__file__).parents[2] / "docker"
HAS_COMPOSE = (
    shutil.which("docker") and not subprocess.run(["docker", "compose", "version"], capture_output=True).returncode
)


@pytest.mark.skipif(not HAS_COMPOSE, reason="there is no 'docker compose' here: make test-docker brings it")
@pytest.mark.parametrize("files", [["compose.yaml"], ["compose.yaml", "compose.gpu.yaml"]])
def test_compose_understands_the_files(files: list[str]) -> None:
    options = [option for name in files for option in ("--file", str(FILES / name))]
    told = subprocess.run(
        ["docker", "compose", *options, "--profile", "submit", "config", "--format", "json"],
        env={**os.environ, "IMAGE": "given"},
        stdout=subprocess.PIPE,
        check=True,
    )
    services = json.loads(told.stdout)["services"]
    assert sorted(services) == ["master", "submit", "worker"]
    assert {service["image"] for service in services.values()} == {"given"}
    build = services["master"]["build"]
    assert Path(build["context"], build["dockerfile"]).is_file()


def discover_gpus(folder: Path, nvidia_smi: str) -> subprocess.CompletedProcess[str]:
    """What the script says where `nvidia-smi` is these lines of shell."""
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\n{nvidia_smi}\n")
    (folder / "nvidia-smi").chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run([FILES / "discover-gpus"], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("listed", "addresses"), [(r"0\n1\n", ["0", "1"]), (r"7\n", ["7"])])
def test_gpus_are_told_in_the_words_of_spark(listed: str, addresses: list[str], tmp_path: Path) -> None:
    assert json.loads(discover_gpus(tmp_path, f"printf '{listed}'").stdout) == {"name": "gpu", "addresses": addresses}


def test_gpus_that_do_not_answer_are_an_error(tmp_path: Path) -> None:
    told = discover_gpus(tmp_path, "exit 9")
    assert (told.returncode, told.stdout) == (9, "")
