"""Plugins: find them, load them on first use, and call the hooks of the one that owns a model."""

from __future__ import annotations

from qeff_proxy.plugins.entry_points import PackageEntry
from qeff_proxy.plugins.hooks import Hooks
from qeff_proxy.plugins.manager import LoadedPlugin, PluginReport, Plugins, PluginState

__all__ = ["Hooks", "LoadedPlugin", "PackageEntry", "PluginReport", "PluginState", "Plugins"]
