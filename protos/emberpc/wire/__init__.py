"""The hand-written part of the API: encode and decode blocks of vectors, and errors.

Client and server both use this package, so that both have the same formats. The package
needs no libraries but protobuf and numpy.
"""
