"""The gRPC server of emberpc: serves models and collections. Its code imports no torch, transformers or optimum."""

import os

# Libraries read environment variables when they are first imported. So the variables are set here, before a module of
# this package imports grpc, numpy or onnxruntime. A value that the user has set stays.
# With NONE, gRPC's core logs nothing: this server has a clearer message for a failure such as a port in use.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
# Turns off gRPC's fork handlers, which stop and restart gRPC's threads in this process and in a forked child process.
# With them, about one in a hundred of the child processes that write a snapshot aborted. These processes do not call
# gRPC.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
# ONNX Runtime 1.32 keeps an id of this host in the home directory and sends usage events to its makers.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
# The server needs no threads of OpenBLAS (`index/graph/child_process.py` says why). When numpy is imported, OpenBLAS
# starts a thread for each core. These threads spin, which took 0.07 CPU-seconds of a start on two cores.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
