"""The gRPC services of emberpc.v1. Each method reads a request message, calls a pipeline and writes the response."""
