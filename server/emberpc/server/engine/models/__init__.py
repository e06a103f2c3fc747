"""Models that are served: load them, hold their versions by name, and measure the best size of micro-batches."""
