"""Search of a collection: dense, lexical, hybrid and filtered."""
