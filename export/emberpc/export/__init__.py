"""Offline export: convert encoders to bundles. Modules import heavy libraries inside functions, to start fast."""

# The first import: it sets how the threads of OpenMP wait, which torch reads when it is loaded.
import emberpc.export.threads  # noqa: F401
