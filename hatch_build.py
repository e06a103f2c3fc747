"""Metadata of the package: the README as its description, without links that only work in the repository."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

#: The public address of the repository's files at the built version, such as https://HOST/OWNER/emberpc/blob/v0.1.0;
#: set where a release is built. Without it a package page shows the words of a link and no link.
_ADDRESS = "EMBERPC_REPOSITORY_URL"
_RELATIVE_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?![a-z]+:|#)([^)]+)\)")


class DescriptionHook(MetadataHookInterface):
    """Sets `project.readme`, which pyproject.toml declares as dynamic."""

    PLUGIN_NAME = "custom"

    def update(self, metadata: dict[str, Any]) -> None:
        """Set the README's text."""
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        address = os.environ.get(_ADDRESS, "").rstrip("/")
        metadata["readme"] = {"content-type": "text/markdown", "text": absolute(text, address)}


def absolute(text: str, address: str) -> str:
    """Return a Markdown text with an address before each relative link; without an address, only a link's words."""

    def replace(found: re.Match[str]) -> str:
        image, words, path = found.groups()
        if not address:
            return f"*{words}*" if image else words
        raw = "?raw=true" if image else ""
        return f"{image}[{words}]({address}/{path}{raw})"

    return _RELATIVE_LINK.sub(replace, text)
