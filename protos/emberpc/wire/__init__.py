"""The hand-written part of the API: encode and decode vectors and errors.

Client and server use the same functions, so that their formats always agree.
This package needs protobuf and numpy only.
"""
