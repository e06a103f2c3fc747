"""Convert between the words of the client, such as `cosine`, and the enum values of the API."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from emberpc.client.exceptions import InputError, InputTypeError
from emberpc.v1 import classification_pb2, index_pb2, model_pb2, types_pb2

INPUT_KINDS = {"passage": types_pb2.INPUT_KIND_PASSAGE, "query": types_pb2.INPUT_KIND_QUERY}
TRUNCATIONS = {
    "refuse": types_pb2.TRUNCATION_REFUSE,
    "end": types_pb2.TRUNCATION_END,
    "start": types_pb2.TRUNCATION_START,
}
DTYPES = {
    "float32": types_pb2.DATA_TYPE_FLOAT32,
    "float16": types_pb2.DATA_TYPE_FLOAT16,
    "int8": types_pb2.DATA_TYPE_INT8,
    "binary": types_pb2.DATA_TYPE_BINARY,
}
PRIORITIES = {"interactive": types_pb2.PRIORITY_INTERACTIVE, "bulk": types_pb2.PRIORITY_BULK}
DISTANCES = {
    "cosine": index_pb2.DISTANCE_COSINE,
    "dot_product": index_pb2.DISTANCE_DOT_PRODUCT,
    "euclidean": index_pb2.DISTANCE_EUCLIDEAN,
}
DURABILITIES = {"synced": index_pb2.DURABILITY_SYNCED}
STRATEGIES = {
    "exact": index_pb2.SEARCH_STRATEGY_EXACT,
    "hnsw": index_pb2.SEARCH_STRATEGY_HNSW,
    "lexical": index_pb2.SEARCH_STRATEGY_LEXICAL,
}
SEARCH_MODES = {
    "dense": index_pb2.SEARCH_MODE_DENSE,
    "lexical": index_pb2.SEARCH_MODE_LEXICAL,
    "hybrid": index_pb2.SEARCH_MODE_HYBRID,
}
FUSIONS = {
    "bounds": index_pb2.SEARCH_FUSION_BOUNDS,
    "scores": index_pb2.SEARCH_FUSION_SCORES,
    "ranks": index_pb2.SEARCH_FUSION_RANKS,
}
CLASSIFIER_KINDS = {
    "fine_tuned": classification_pb2.CLASSIFIER_KIND_FINE_TUNED,
    "examples": classification_pb2.CLASSIFIER_KIND_EXAMPLES,
}
#: Strategies of a classifier that is made from examples. The word is empty if the response states no strategy, as for a
#: fine-tuned classifier.
EXAMPLE_STRATEGIES = {
    "": classification_pb2.EXAMPLE_STRATEGY_UNSPECIFIED,
    "zero_shot": classification_pb2.EXAMPLE_STRATEGY_ZERO_SHOT,
    "nearest": classification_pb2.EXAMPLE_STRATEGY_NEAREST,
    "centroids": classification_pb2.EXAMPLE_STRATEGY_CENTROIDS,
    "linear": classification_pb2.EXAMPLE_STRATEGY_LINEAR,
}
REJECTION_SCORES = {
    "max_logit": classification_pb2.REJECTION_SCORE_MAX_LOGIT,
    "energy": classification_pb2.REJECTION_SCORE_ENERGY,
    "class_cosine": classification_pb2.REJECTION_SCORE_CLASS_COSINE,
    "nearest_prototype": classification_pb2.REJECTION_SCORE_NEAREST_PROTOTYPE,
}
TASKS = {"embedding": model_pb2.MODEL_TASK_EMBEDDING, "classification": model_pb2.MODEL_TASK_CLASSIFICATION}
STATES = {
    "loading": model_pb2.MODEL_STATE_LOADING,
    "ready": model_pb2.MODEL_STATE_READY,
    "unloading": model_pb2.MODEL_STATE_UNLOADING,
    "failed": model_pb2.MODEL_STATE_FAILED,
}

Value = TypeVar("Value", bound=int)


def value_of(name: str, word: str, table: Mapping[str, Value]) -> Value:
    """Return the enum value of a caller's word; errors call the argument `name`.

    Raises:
        InputError: `word` is not in `table`; the message lists the words of the table.
        InputTypeError: `word` is not a str.
    """
    if not isinstance(word, str):
        raise InputTypeError(f"{name} is of type {type(word).__name__}; it must be a str")
    if word not in table:
        raise InputError(f"{name} is {word!r}; use {' or '.join(map(repr, table))}")
    return table[word]


def word_of(value: Value, table: Mapping[str, Value]) -> str:
    """Return the word for an enum value; `unknown` if the value is not in `table`.

    For example, a value that only a newer server knows is not in `table`. UNSPECIFIED is not in most tables.
    """
    for word, known in table.items():
        if known == value:
            return word
    return "unknown"
