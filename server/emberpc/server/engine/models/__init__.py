"""Models that are served: loading, versions, calibration."""
