"""Search of a collection: dense, lexical, hybrid and filtered; choice of ef, and measurement of recall."""
