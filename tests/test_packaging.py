"""launch/constraints.txt against pyproject.toml, without a network."""

from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
IN_THE_IMAGE = ("deepspeed", "hf")
"""Extras that can be built into the image."""


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def pinned() -> dict[str, Requirement]:
    lines = (ROOT / "launch/constraints.txt").read_text().splitlines()
    requirements = [Requirement(line) for line in lines if not line.startswith("#")]
    names = [canonicalize_name(each.name) for each in requirements]
    assert names == sorted(set(names))
    return dict(zip(names, requirements, strict=True))


def test_every_version_is_one_public_version(pinned: dict[str, Requirement]) -> None:
    """No range, no address, no local version such as +cpu: PyTorch's CPU and CUDA builds both satisfy it."""
    for requirement in pinned.values():
        (one,) = requirement.specifier
        assert one.operator == "==" and not one.version.endswith(".*"), requirement
        assert Version(one.version).local is None and requirement.url is None, requirement


def test_every_dependency_is_pinned_within_its_range(project: dict[str, Any], pinned: dict[str, Requirement]) -> None:
    wanted = list(project["dependencies"])
    for extra in IN_THE_IMAGE:
        wanted += project["optional-dependencies"][extra]
    for requirement in map(Requirement, wanted):
        (one,) = pinned[canonicalize_name(requirement.name)].specifier
        assert requirement.specifier.contains(one.version), f"{requirement}, but launch/constraints.txt has {one}"
