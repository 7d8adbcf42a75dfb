# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The dictionary ``postgresql`` of a task, completed from the cluster's record."""

from __future__ import annotations

import dataclasses
import typing as t

from ...common.errors import TdeError
from ...storage.image import StorageWish, storage_wish
from ..options import OfServer, absolute_path, with_recorded


@dataclasses.dataclass(frozen=True)
class Options(OfServer):
    """What the engine works with; ``given`` is what the record keeps."""

    coverage: str
    data_directory: str | None
    mount_point: str | None
    image: str | None
    image_size: str | None
    bin_directory: str | None
    os_user: str
    create_cluster: bool
    debian_cluster: str | None
    initdb_options: tuple[str, ...]

    @property
    def given(self) -> dict[str, t.Any]:
        """The options as plain data."""
        return {**dataclasses.asdict(self), "initdb_options": list(self.initdb_options), "storage": self.storage}

    @property
    def storage(self) -> str:
        return "image" if self.image else "directory"

    def storage_wish(self, *, sized: bool) -> StorageWish | None:
        """The storage wished for, None if no mount point was named.

        :param sized: whether the image is made or grown, too.
        """
        if self.mount_point is None:
            return None
        return storage_wish(self.mount_point, self.image, self.image_size if sized else None)


def complete(given: t.Mapping[str, t.Any], recorded: t.Mapping[str, t.Any]) -> Options:
    """Options of a task; what it leaves out is taken from the record.

    :param given: the task's dictionary; :param recorded: the record's, empty if there is none.
    :raises TdeError: ``invalid_option``.
    """
    merged = with_recorded(given, recorded)
    storage = given.get("storage") or recorded.get("storage") or "directory"
    image = merged.get("image")
    if recorded.get("image") and given.get("image") is None:
        storage = "image"
    if storage == "image" and image is None:
        raise TdeError("invalid_option", "is needed for storage: image", obj="option image")
    options = Options(
        coverage=merged.get("coverage") or "tablespaces",
        data_directory=absolute_path("data_directory", merged.get("data_directory")),
        mount_point=absolute_path("mount_point", merged.get("mount_point")),
        image=absolute_path("image", image) if storage == "image" else None,
        image_size=merged.get("image_size"),
        bin_directory=absolute_path("bin_directory", merged.get("bin_directory")),
        os_user=merged.get("os_user") or "postgres",
        create_cluster=bool(merged.get("create_cluster")),
        debian_cluster=merged.get("debian_cluster"),
        initdb_options=tuple(merged.get("initdb_options") or ()),
    )
    if recorded.get("coverage") == "cluster" and options.coverage == "tablespaces" and recorded.get("data_directory"):
        # A cluster that is covered wholly stays so; the default of a shorter task does not change that.
        options = dataclasses.replace(options, coverage="cluster")
    return options


def check_present(options: Options) -> None:
    """What a keystore needs to know.

    :raises TdeError: ``invalid_option``.
    """
    if options.mount_point is None:
        raise TdeError(
            "invalid_option",
            "is missing",
            obj="option mount_point",
            next_step="Name root's own folder above all encrypted places.",
        )
    if options.coverage == "cluster":
        if options.data_directory is None:
            raise TdeError(
                "invalid_option", "is missing", obj="option data_directory", next_step="With coverage: cluster it is the place."
            )
        if not options.data_directory.startswith(f"{options.mount_point}/"):
            raise TdeError(
                "invalid_option",
                f"{options.data_directory} does not lie under mount_point {options.mount_point}",
                obj="option data_directory",
            )
