"""The interface's ImageService: image names stand for environments of the machine, so there is nothing to
download.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from localcluster import images
from localcluster.cri import convert
from localcluster.cri.interface import Method


class ImageService:
    """Images. Every public coroutine is a method of the interface: request message in, response out."""

    def __init__(self, images_file: Path, pb: Any) -> None:
        """`pb` holds the interface's messages. The images file is read for every call: it may change."""
        self._images_file, self._pb = images_file, pb

    def methods(self) -> dict[str, Method]:
        """The implemented methods by the interface's names."""
        return {
            "ListImages": self.list_images,
            "ImageStatus": self.image_status,
            "PullImage": self.pull_image,
            "RemoveImage": self.remove_image,
            "ImageFsInfo": self.image_fs_info,
        }

    async def list_images(self, request: Any) -> Any:
        """All images, or the one asked for."""
        known = images.read(self._images_file)
        name = request.filter.image.image
        found = [known[images.normalize(name)]] if images.normalize(name) in known else []
        return self._pb.ListImagesResponse(
            images=[convert.image(self._pb, i) for i in (found if name else known.values())]
        )

    async def image_status(self, request: Any) -> Any:
        """The image, or an empty response if there is none."""
        found = images.read(self._images_file).get(images.normalize(request.image.image))
        return self._pb.ImageStatusResponse(image=convert.image(self._pb, found) if found else None)

    async def pull_image(self, request: Any) -> Any:
        """Succeeds for known images; unknown ones are not available."""
        return self._pb.PullImageResponse(
            image_ref=images.find(images.read(self._images_file), request.image.image).name
        )

    async def remove_image(self, _: Any) -> Any:
        """Nothing to remove."""
        return self._pb.RemoveImageResponse()

    async def image_fs_info(self, _: Any) -> Any:
        """Images take no space of their own."""
        filesystem = convert.filesystem(self._pb, self._images_file.parent)
        return self._pb.ImageFsInfoResponse(
            image_filesystems=[filesystem], container_filesystems=[filesystem]
        )
