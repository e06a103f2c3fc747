"""The client for threads. The modules of `_aio` are generated from these, except `__init__.py` and `transport.py`."""
