"""The client for threads. `_aio` is generated from it, except `transport.py`."""
