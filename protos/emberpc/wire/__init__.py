"""The hand-written part of the API: encode and decode blocks of vectors, and errors.

Client and server both use this package, so that their formats always agree. The
package needs protobuf and numpy only.
"""
