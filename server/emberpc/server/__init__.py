"""The gRPC server of emberpc: serves models and collections. Its code imports no torch, transformers or optimum."""

import os

# The library grpc reads environment variables when it is first imported. So they are set here, before a module of this
# package imports grpc. A value that the user has set stays. With NONE, gRPC's core logs nothing: this server has a
# clearer message for a failure such as a port in use.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
# Turns off gRPC's fork handlers, which stop and restart gRPC's threads in this process and in a forked child process.
# With them, about one in a hundred of the child processes that write a snapshot aborted. These processes do not call
# gRPC.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
# ONNX Runtime 1.32 keeps an id of this host in the home directory and sends usage events to its makers.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
