"""Work that joins models and collections, such as embed-and-search. Knows no protobuf, no gRPC and no index backend."""
