"""Measure the time of a single text through the server, compared with its inference alone.

Texts of several lengths are embedded one after another; the host should be idle otherwise. Each text is embedded twice:
in this process, with a session that has one thread and otherwise the server's settings, and through gRPC. Only the time
through gRPC includes tokenizing. For each length, the script prints the medians of both times over the texts, and the
median of their ratios. It measures `--rounds` texts of each length, but a quarter of that from 128 tokens on. Lengths
above the model's limit are left out. A text may be faster through the server, since a server that has only one text to
run may use all cores for it.

    python -m benchmarks.server.latency BUNDLE [--rounds 200] [--engine openvino] [--precision bf16] [-o RESULT.json]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from time import perf_counter

import grpc

from benchmarks.shared.load import add_engine_options, engine_flags, host, middle, runtimes_of, serving
from emberpc.export.data.stdlib_texts import read_stdlib
from emberpc.server.engine import Model, Truncation
from emberpc.server.errors import items_of
from emberpc.server.memory import keep_freed_memory
from emberpc.v1 import embedding_pb2, embedding_pb2_grpc

SHORT, LONG = (8, 16, 32), (128, 256, 512)
#: Number of tokens by the name of each kind of text, in the order of the measurements. Short texts are measured again
#: after the long texts, which may have changed the state of the server, such as its memory.
KINDS = {
    **{str(tokens): tokens for tokens in (*SHORT, *LONG)},
    **{f"{tokens}, after long ones": tokens for tokens in SHORT},
}


def texts_of(model: Model, tokens: int, count: int) -> list[str]:
    """Return `count` texts of words from docstrings, each with about `tokens` tokens, special tokens included.

    A text has as many words as fit into `tokens` tokens, but at least one word, even if this word has more tokens.
    """
    words = [word for doc in read_stdlib()[:2000] for word in doc.text.split() if word.isalpha()]
    found: list[str] = []
    place = 0
    while len(found) < count:
        low, high = 1, tokens
        while low < high:  # find the maximum number of words within the number of tokens
            middle_ = (low + high + 1) // 2
            fits = model.tokenizer.count([" ".join(words[place : place + middle_])], "")[0] <= tokens
            low, high = (middle_, high) if fits else (low, middle_ - 1)
        found.append(" ".join(words[place : place + low]))
        place = (place + low + 1) % (len(words) - tokens)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="an embedding model, exported")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("-o", "--output", type=Path, help="JSON file for the figures")
    add_engine_options(parser)
    arguments, flags = parser.parse_known_args()
    keep_freed_memory()
    model = Model.load("bare", arguments.bundle, runtimes=runtimes_of(arguments))
    results = {}
    with (
        serving(arguments.bundle, "--cache-bytes", "0", *engine_flags(arguments), *flags) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        embed = embedding_pb2_grpc.EmbeddingServiceStub(channel).Embed
        for kind, tokens in KINDS.items():
            if tokens > model.manifest.max_tokens:
                continue
            rounds = arguments.rounds if tokens in SHORT else arguments.rounds // 4
            bare, served = [], []
            for i, text in enumerate(texts_of(model, tokens, rounds + 10)):
                (tokenized,) = model.tokenizer.tokenize([text], "", Truncation.END, items_of("texts"))
                request = embedding_pb2.EmbedRequest(texts=[text])
                start = perf_counter()
                model.encoder.run([tokenized.ids])
                between = perf_counter()
                embed(request)
                if i >= 10:  # the first texts are not counted: they warm up both sides
                    bare.append(1000 * (between - start))
                    served.append(1000 * (perf_counter() - between))
            own, theirs = middle(served), middle(bare)
            ratio = middle([one / other for one, other in zip(served, bare, strict=True)])
            results[kind] = {"served_ms": own, "inference_ms": theirs, "ratio": ratio}
            print(f"{kind} tokens: inference {theirs:.2f} ms, served {own:.2f} ms, {ratio:.2f} times")
    if arguments.output:
        arguments.output.write_text(json.dumps({"host": host(), "lone": results}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
