"""The map of a collection: which records, where they lie, what groups they make, and the page that shows it."""
