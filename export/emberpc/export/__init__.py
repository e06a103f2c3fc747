"""Offline export: convert encoders to bundles. Modules import heavy libraries inside functions, to start fast."""
