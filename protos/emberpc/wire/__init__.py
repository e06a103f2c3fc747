"""The hand-written half of the contract: how vectors and errors travel.

Used by client and server alike, so that neither can read what the other did
not write. Needs protobuf and numpy only.
"""
