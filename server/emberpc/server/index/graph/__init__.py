"""The vectors of a collection in memory: the HNSW graph, its snapshots on disk, the buffer, locks and threads.

In this package a label is the number of the record that a vector belongs to, as in hnswlib. It is not a class.
"""
