"""The HNSW graph of a collection in memory: nodes, buffer, snapshots and locks."""
