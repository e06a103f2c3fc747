"""The client for asyncio: generated from `_sync` by `tools/generate_async_client.py`, except `transport.py`."""
