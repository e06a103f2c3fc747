"""What a collection was made with, so that an import can make it again."""

from __future__ import annotations

import dataclasses
import json
import shlex
from dataclasses import dataclass

from emberpc.cli.errors import CliError
from emberpc.client import Client, Collection
from emberpc.client.types import Distance, Truncation


@dataclass(frozen=True)
class Settings:
    """What a collection is made with; 0 and empty leave it to the server, as in `Client.create_collection`.

    `model_fingerprint` tells which model made the vectors; empty: not known.
    """

    model: str = ""
    model_fingerprint: str = ""
    dimensions: int = 0
    distance: Distance = "cosine"
    truncation: Truncation = "refuse"
    m: int = 0
    ef_construction: int = 0
    indexed_fields: tuple[str, ...] = ()

    @staticmethod
    def of(collection: Collection) -> Settings:
        """Return those of a collection."""
        return Settings(**{field.name: getattr(collection, field.name) for field in dataclasses.fields(Settings)})

    def to_json(self) -> str:
        """Return them as a file keeps them."""
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_json(text: str | bytes, name: str) -> Settings:
        """Read what `to_json` wrote; those that this version does not know are left out.

        Raises:
            CliError: it is something else; `name` is where it stands.
        """
        damaged = CliError(f"{name}: what it tells of its collection is damaged; export the collection anew")
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            raise damaged from None
        if not isinstance(found, dict):
            raise damaged
        known = {field.name: found[field.name] for field in dataclasses.fields(Settings) if field.name in found}
        indexed = known.setdefault("indexed_fields", [])
        if not isinstance(indexed, list) or not all(isinstance(field, str) for field in indexed):
            raise damaged
        settings = Settings(**{**known, "indexed_fields": tuple(indexed)})
        for field in dataclasses.fields(Settings):
            if not isinstance(getattr(settings, field.name), type(field.default)):
                raise damaged
        return settings

    def create(self, client: Client, name: str) -> Collection:
        """Create a collection with them."""
        return client.create_collection(
            name,
            model=self.model,
            dimensions=self.dimensions,
            distance=self.distance,
            truncation=self.truncation,
            m=self.m,
            ef_construction=self.ef_construction,
            indexed_fields=self.indexed_fields,
        )

    def command(self, name: str) -> str:
        """Return the command that creates a collection with them."""
        options = {
            "--model": self.model,
            "--dimensions": self.dimensions,
            "--distance": self.distance,
            "--truncation": self.truncation,
            "--m": self.m,
            "--ef-construction": self.ef_construction,
        }
        words = [word for option, value in options.items() if value for word in (option, str(value))]
        words += [word for field in self.indexed_fields for word in ("--indexed-field", field)]
        return shlex.join(["emberpc", "collection", "create", name, *words])
