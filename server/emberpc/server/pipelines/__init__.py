"""Work that joins models and collections, such as embed-and-search. Imports no protobuf, gRPC or index backend."""
