"""Collections in Milvus: the index past one machine. Needs the extra `milvus`; knows nothing of emberpc's own RPCs."""

from emberpc.server.milvus.backend import MilvusIndex

__all__ = ["MilvusIndex"]
