"""An export on disk: its folder, its manifest, and the hashes of its files."""

from __future__ import annotations

from qeff_proxy.artifact.export_folder import cache_home, export_folder, find_export, read_export
from qeff_proxy.artifact.manifest_schema import Export, ExportedPart

__all__ = ["Export", "ExportedPart", "cache_home", "export_folder", "find_export", "read_export"]
