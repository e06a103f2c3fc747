"""The modules `*_pb2*`, which `make protos` generates from the .proto files of emberpc.v1. Do not edit the modules."""
