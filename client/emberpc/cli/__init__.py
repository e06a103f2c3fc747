"""The command line `emberpc`, which needs the extra [cli]. Its commands call the client, the server and the export."""
