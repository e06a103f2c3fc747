"""Work on collections besides searches and writes: backups, verification, duplicates, clusters, maintenance, expiry."""
