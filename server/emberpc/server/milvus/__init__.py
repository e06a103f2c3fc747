"""The index backend on Milvus, for collections beyond one machine. Needs the extra `milvus`; imports no services."""

from emberpc.server.milvus.backend import MilvusIndex

__all__ = ["MilvusIndex"]
