"""This module is a remote storage of fsspec that several processes see: vault:// is a folder."""

from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem


class Vault(LocalFileSystem):
    """Keeps all files below `root`.

    refused: part of the names of files that cannot be written.
    """

    protocol = "vault"
    root = ""
    refused: str | None = None

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        text = str(path)
        if text.startswith("vault://"):
            text = f"{cls.root}/{text.removeprefix('vault://')}"
        return text.rstrip("/")

    def put_file(self, path1: str, path2: str, *args: Any, **kwargs: Any) -> None:
        self._check(path2)
        super().put_file(path1, path2, *args, **kwargs)

    def pipe_file(self, path: str, *args: Any, **kwargs: Any) -> None:
        self._check(path)
        super().pipe_file(path, *args, **kwargs)

    def _check(self, path: str) -> None:
        if self.refused is not None and self.refused in path:
            raise PermissionError("Access Denied")


def open_vault(folder: Path) -> None:
    """Let vault:// be this folder in this process."""
    Vault.root = str(folder)
    fsspec.register_implementation("vault", Vault, clobber=True)
