"""The vectors of a collection in memory: the HNSW graph, its snapshots on disk, the buffer, locks and threads."""
