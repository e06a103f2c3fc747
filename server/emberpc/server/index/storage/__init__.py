"""Storage of collections: the data directory, its files, and the SQLite tables."""
