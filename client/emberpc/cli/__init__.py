"""The command line `emberpc`. It calls the client, the server and the export; it needs the extra [cli]."""
