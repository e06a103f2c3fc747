"""Offline: turns encoders into bundles. Heavy libraries are imported where they are used, not here."""
