"""Build hook: a wheel carries the YAML configs as ``marl_memory/configs``; a checkout reads them where they lie."""

from __future__ import annotations

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class ConfigsHook(BuildHookInterface):
    """Copy ``configs/`` into standard wheels only: in an editable install a copy would grow stale."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "standard":
            build_data["force_include"]["configs"] = "marl_memory/configs"
