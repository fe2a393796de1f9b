"""Addresses ``moco-d2://NAME`` for Detectron2's paths: published weights, downloaded and converted on first use."""

from __future__ import annotations

from typing import IO, Any

from detectron2.utils.file_io import PathHandler, PathManager

from moco_d2.convert.catalog import PREFIX, fetch


class PublishedWeightsHandler(PathHandler):
    """Maps the names of :mod:`moco_d2.convert.catalog` to converted files in the cache."""

    def _get_supported_prefixes(self) -> list[str]:
        return [PREFIX]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        self._check_kwargs(kwargs)
        return str(fetch(path))

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> IO[Any]:
        self._check_kwargs(kwargs)
        if mode not in ("r", "rb"):
            raise ValueError(f"{path} cannot be opened with mode {mode!r}; published weights are read-only")
        return open(fetch(path), mode, buffering)


PathManager.register_handler(PublishedWeightsHandler())
