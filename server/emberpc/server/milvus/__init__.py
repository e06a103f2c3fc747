"""The index backend on Milvus, for collections that are too large for one host. Needs the extra `milvus` (pymilvus)."""

from emberpc.server.milvus.backend import MilvusIndex

__all__ = ["MilvusIndex"]
