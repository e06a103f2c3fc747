"""Compare two encoders of one model with the inputs at the limits of the model.

OpenVINO checks no indexes: it gives an arbitrary vector for a token id without a row in the table of embeddings, and
for a text with more tokens than the model has positions. ONNX Runtime fails on such texts.
"""

from __future__ import annotations

import numpy as np

from emberpc.bundle import Bound
from emberpc.server.engine.models.encoders import Encoder
from emberpc.server.engine.tokenizing import TextTokenizer

#: Allowed difference between the outputs of an engine and those of ONNX Runtime in fp32, by precision of the engine.
#: bf16 has 8 binary digits, so its differences are about 1 % of the largest value.
ENGINE_BOUNDS = {
    "fp32": Bound(cosine_min=0.9999, difference_max=1e-2),
    "bf16": Bound(cosine_min=0.99, difference_max=5e-2),
}


def fault_at_the_limits(tokenizer: TextTokenizer, exact: Encoder, other: Encoder, precision: str) -> str:
    """Return what is wrong with an encoder's output for the longest text or the highest token id; empty: nothing.

    Args:
        tokenizer: tokenizer of the model.
        exact: the model's encoder in ONNX Runtime.
        other: the model's encoder in another engine.
        precision: precision of `other`.
    """
    highest = tokenizer.highest_id
    cases = {
        f"a text of {tokenizer.max_tokens} tokens": np.resize(np.arange(min(highest, 100) + 1), tokenizer.max_tokens),
        f"the token id {highest}": np.full(min(4, tokenizer.max_tokens), highest),
    }
    for case, ids in cases.items():
        try:
            expected = exact.run([ids])
        except Exception:  # the exceptions of ONNX Runtime have no common base class
            return f"the graph fails for {case} in ONNX Runtime, where OpenVINO gives an arbitrary vector"
        if faults := ENGINE_BOUNDS[precision].faults(expected, other.run([ids])):
            return f"for {case}: {'; '.join(faults)}"
    return ""
