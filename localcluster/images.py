"""Images: in this cluster, an image name stands for an environment of the machine (search path and
variables).
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from localcluster.errors import ImageError

_SYSTEM_PATH = ("/usr/local/bin", "/usr/bin", "/bin", "/usr/local/sbin", "/usr/sbin", "/sbin")
NONROOT = 65532  # the "nonroot" user of distroless images, which the project's own images use too


@dataclass(frozen=True)
class Image:
    """What containers of one image start with.

    Attributes:
        name: full name with tag.
        path: directories put before the system's in PATH.
        environment: variables.
        entrypoint: the command of a container that names none.
        user: the user id that the image declares; recorded, not enforced (containers run as the cluster's
            user).
        content: the directory that a volume of this image (an OCI artifact such as a model) shows; empty: the
            image is for containers only.
    """

    name: str
    path: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    entrypoint: tuple[str, ...] = ()
    user: int = 0
    content: str = ""

    @property
    def variables(self) -> dict[str, str]:
        """The environment that a container of this image begins with."""
        base = {"PATH": ":".join((*self.path, *_SYSTEM_PATH)), "HOME": "/tmp", "LANG": "C.UTF-8"}  # noqa: S108 - the container's own /tmp
        return {**base, **self.environment}


def normalize(name: str) -> str:
    """The full form of an image name: without Docker Hub's implied prefix, with a tag.

    >>> normalize("docker.io/library/busybox")
    'busybox:latest'
    """
    for prefix in ("docker.io/library/", "docker.io/"):
        name = name.removeprefix(prefix)
    has_tag = ":" in name.rpartition("/")[2]
    return name if has_tag or "@" in name else f"{name}:latest"


def defaults(tools: Mapping[str, Path]) -> list[Image]:
    """The images every cluster knows: the project's own, run from the checkout's environment, and two for
    tests.
    """
    environment = str(Path(sys.prefix) / "bin")
    project = [
        Image(f"ghcr.io/moe-operator/{name}:dev", (environment,), user=NONROOT)
        for name in ("worker", "operator")
    ]
    images = [*project, Image("busybox:latest"), Image("python:3", (environment,), entrypoint=("python3",))]
    if "otelcol" in tools:
        folder = str(tools["otelcol"].parent)
        images.append(
            Image("ghcr.io/moe-operator/otelcol:dev", (folder,), entrypoint=("otelcol",), user=NONROOT)
        )
    return images


def write_defaults(path: Path, tools: Mapping[str, Path]) -> None:
    """Writes a new cluster's images file."""
    _write(path, {image.name: image for image in defaults(tools)})


def _write(path: Path, images: Mapping[str, Image]) -> None:
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps({name: asdict(image) for name, image in images.items()}, indent=1))
    temporary.replace(path)


def read(path: Path) -> dict[str, Image]:
    """All images of a cluster, by full name."""
    return {name: _image(values) for name, values in json.loads(path.read_text()).items()}


def _image(values: dict[str, object]) -> Image:
    converted = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    return Image(**converted)  # type: ignore[arg-type]


def find(images: Mapping[str, Image], name: str) -> Image:
    """The image of that name; raises ImageError naming those that exist."""
    image = images.get(normalize(name))
    if image is None:
        known = ", ".join(sorted(images))
        raise ImageError(
            f"this local cluster has no image {name}: "
            "its images are environments of this machine, not downloads. "
            f"Known: {known}. Add one with `python -m localcluster load-image {name} --path DIRECTORY`"
        )
    return image


def content(images: Mapping[str, Image], name: str, sub_path: str = "") -> str:
    """The directory that a volume of the image shows; raises ImageError if it has none."""
    image = find(images, name)
    folder = Path(image.content) / sub_path
    if not image.content or not folder.is_dir():
        raise ImageError(
            f"image {image.name} has no directory /{sub_path} for a volume: "
            f"add one with `python -m localcluster load-image {name} --content DIRECTORY`"
        )
    if not folder.resolve().is_relative_to(Path(image.content).resolve()):
        raise ImageError(f"image {image.name}: /{sub_path} leads out of it; use a path below its root")
    return str(folder)


def load(file: Path, image: Image) -> None:
    """Adds or replaces an image in a cluster's images file; raises ImageError where a directory of its path
    is missing.
    """
    for directory in image.path:
        if not Path(directory).is_dir():
            raise ImageError(
                f"image {image.name}: {directory} is not a directory; "
                "--path takes directories with executables"
            )
    if image.entrypoint and shutil.which(image.entrypoint[0], path=image.variables["PATH"]) is None:
        raise ImageError(
            f"image {image.name}: its entrypoint {image.entrypoint[0]} is not in "
            f"{', '.join(image.path) or 'PATH'}"
        )
    _write(file, {**read(file), normalize(image.name): image})
