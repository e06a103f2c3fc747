"""Compare the ways to a label on the user's own data: `emberpc compare`."""
