"""Compare strategies for classifiers on the user's own data: `emberpc compare`."""
