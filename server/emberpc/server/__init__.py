"""The gRPC server: serves bundles and an index. Never imports torch, transformers or optimum."""

import os

# Both are read when grpc is first imported, by whichever module of this package.
# gRPC's core would write a line of its own about every failure that is reported here in a better one.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
# Its handlers of forks stop and restart its threads, in this process and in the child
# that writes a snapshot: one in some hundred of those ended in an abort. That child never calls gRPC.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
