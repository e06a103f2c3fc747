"""Build requests, decode responses, and decide when to retry; nothing here does network I/O."""
