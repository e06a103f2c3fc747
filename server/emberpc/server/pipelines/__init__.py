"""The work of the calls, with models, collections or both. Imports no protobuf, gRPC or index backend."""
