"""Work on one collection outside of searches and writes: backup, verification, duplicates, clusters, maintenance."""
