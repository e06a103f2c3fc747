"""The gRPC server: serves bundles and an index. Never imports torch, transformers or optimum."""
