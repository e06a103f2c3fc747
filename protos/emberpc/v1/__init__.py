"""The generated messages and services of emberpc.v1. Made by `make protos`; not edited by hand."""
