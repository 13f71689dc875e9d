"""Build hook: before a wheel or an editable install is made, write the type stubs that tools/lazy_stubs.py describes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class StubsHook(BuildHookInterface):
    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        root = Path(self.root)
        sys.path.insert(0, str(root / "tools"))  # the build frontend does not put the project on the path
        import lazy_stubs

        # The stubs are git-ignored, and what git ignores is left out of a wheel unless it is named here.
        build_data["artifacts"] += [f"/{path.relative_to(root).as_posix()}" for path in lazy_stubs.write(root / "src")]
