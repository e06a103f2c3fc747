"""Settings of a collection, with which a collection like it can be created.

An export stores them in a Parquet file, or for JSON Lines prints them as a command.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
from dataclasses import dataclass

from emberpc.cli.errors import CliError
from emberpc.client import Client, Collection
from emberpc.client.types import Distance, Truncation


@dataclass(frozen=True)
class CollectionSettings:
    """The settings of a collection, and the fingerprint of its model.

    The settings are arguments of `Client.create_collection`, with the same meanings. `model_fingerprint` (hex)
    identifies the model that made the vectors; empty: unknown, or there is no model.
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
    def of(collection: Collection) -> CollectionSettings:
        """Return the settings of an existing collection, with the fingerprint of its model."""
        return CollectionSettings(
            **{field.name: getattr(collection, field.name) for field in dataclasses.fields(CollectionSettings)}
        )

    def to_json(self) -> str:
        """Return the settings and the fingerprint as a JSON object, to store in a file."""
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_json(text: str | bytes, name: str) -> CollectionSettings:
        """Parse the JSON of `to_json`. Settings that are missing get their defaults; unknown settings are ignored.

        Args:
            text: the JSON. A newer version of emberpc may have written it, with further settings.
            name: name of the file, for messages.

        Raises:
            CliError: the text is not a JSON object, or a setting has the wrong type. Values are not checked.
        """
        damaged = CliError(f"{name}: the settings of the collection in it are damaged; export the collection again")
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            raise damaged from None
        if not isinstance(found, dict):
            raise damaged
        known = {
            field.name: found[field.name] for field in dataclasses.fields(CollectionSettings) if field.name in found
        }
        indexed = known.setdefault("indexed_fields", [])
        if not isinstance(indexed, list) or not all(isinstance(field, str) for field in indexed):
            raise damaged
        settings = CollectionSettings(**{**known, "indexed_fields": tuple(indexed)})
        for field in dataclasses.fields(CollectionSettings):
            if not isinstance(getattr(settings, field.name), type(field.default)):
                raise damaged
        return settings

    def create(self, client: Client, name: str) -> Collection:
        """Create the collection `name` with these settings, and return it.

        The fingerprint is not used. Raises EmberpcError if the call fails, for example because the collection exists;
        InputError or InputTypeError for a setting that the client refuses, such as an unknown distance.
        """
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
        """Return the shell command that creates the collection `name` with these settings.

        Settings that are empty or 0, which mean the default, are left out. So is the fingerprint: it has no option.
        """
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
