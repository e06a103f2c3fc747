"""The gRPC server of emberpc: serves models and collections. It never imports torch, transformers or optimum."""

import os

# The library grpc reads both variables when it is first imported, so they are set before any module of this package.
# Without this variable, gRPC's core logs a line about each failure, beside the more precise line of this server.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
# Turns off gRPC's fork handlers, which stop and restart gRPC's threads in this process and in a forked child process.
# With them, about one in a hundred of the child processes that write a snapshot aborted. These processes do not call
# gRPC.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
