"""The gRPC services of emberpc.v1: they convert requests for the pipelines and the engine, and results to responses."""
