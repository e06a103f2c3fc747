"""The command line `emberpc`: a thin front over the rooms; needs the extra [cli]."""
