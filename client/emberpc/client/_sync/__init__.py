"""The client for threads. The modules of `_aio` are generated from these modules, except `transport.py`."""
