"""Storage of a collection: SQLite tables, files and the data directory."""
