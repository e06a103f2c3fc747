"""The gRPC server of emberpc: serves models and collections. It never imports torch, transformers or optimum."""

import os

# grpc reads both variables when any module of this package first imports it.
# Without this, gRPC's core logs its own line about each failure. The server logs a better line already.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
# gRPC's fork handlers stop and restart its threads, in this process and in the child process that writes a snapshot.
# With them, about one in a hundred of those child processes aborted. The child process never calls gRPC.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
