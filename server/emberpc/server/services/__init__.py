"""The gRPC services of emberpc.v1. Each method reads a request, calls a pipeline and writes the response."""
