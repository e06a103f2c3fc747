// Calls Embed, Search and Classify of a running emberpc server, from the .proto files alone.
//
//   npm install
//   node client.js [HOST:PORT] [COLLECTION]
//
// COLLECTION must have a model; without it, a small one is made, searched and deleted again.

const path = require("node:path");
const grpc = require("@grpc/grpc-js");
const protoLoader = require("@grpc/proto-loader");
const protobuf = require("protobufjs");

const PROTOS = path.join(__dirname, "..", "..", "protos");
const definition = protoLoader.loadSync(
  ["embedding", "index", "classification", "model", "errors"].map((name) => `emberpc/v1/${name}.proto`),
  { includeDirs: [PROTOS], keepCase: true, longs: Number, enums: String, oneofs: true },
);
const { v1 } = grpc.loadPackageDefinition(definition).emberpc;

const address = process.argv[2] || "localhost:50051";
const credentials = grpc.credentials.createInsecure();
const options = { "grpc.max_receive_message_length": -1 };
const stub = (service) => new v1[service](address, credentials, options);

/** Calls a method with a deadline of 30 seconds; a promise of the response. */
function call(client, method, request) {
  return new Promise((resolve, reject) => {
    const deadline = new Date(Date.now() + 30_000);
    client[method](request, { deadline }, (error, response) => (error ? reject(error) : resolve(response)));
  });
}

/** Turns a block of vectors (FLOAT32) into an array of Float32Array. */
function rows(vectors) {
  const { data, rows, dimensions } = vectors;
  // The bytes may start anywhere in their buffer; a Float32Array must start at a multiple of four.
  const values = new Float32Array(new Uint8Array(data).buffer);
  return Array.from({ length: rows }, (_, i) => values.subarray(i * dimensions, (i + 1) * dimensions));
}

/** The wrong fields that an error names, from its google.rpc details. */
function violations(error) {
  const [packed] = error.metadata?.get("grpc-status-details-bin") ?? [];
  if (!packed) return [];
  const { details } = decode("ErrorStatus", packed);
  return details
    .filter((detail) => detail.type_url.endsWith("google.rpc.BadRequest"))
    .flatMap((detail) => decode("BadRequest", detail.value).field_violations);
}

function decode(message, bytes) {
  const root = new protobuf.Root();
  root.resolvePath = (origin, target) => (target.startsWith("google/") ? null : path.join(PROTOS, target));
  return root.loadSync("emberpc/v1/errors.proto", { keepCase: true }).lookupType(`emberpc.v1.${message}`).decode(bytes);
}

const dot = (a, b) => a.reduce((sum, value, i) => sum + value * b[i], 0);

async function main() {
  const embedding = stub("EmbeddingService");
  const index = stub("IndexService");

  const texts = ["a kitten asleep on the sofa", "the cat naps on the couch", "interest rates rose again"];
  const embedded = await call(embedding, "Embed", { texts });
  const [kitten, cat, rates] = rows(embedded.embeddings);
  console.log(`Embed: ${texts.length} vectors of ${embedded.embeddings.dimensions} by ${embedded.model.name}`);
  console.log(`  kitten/cat ${dot(kitten, cat).toFixed(3)}, kitten/rates ${dot(kitten, rates).toFixed(3)}`);

  let collection = process.argv[3];
  const own = !collection;
  if (own) {
    collection = `node-example-${process.pid}`;
    await call(index, "CreateCollection", { collection: { name: collection, model: embedded.model.name } });
    const records = texts.map((text, i) => ({ id: `text-${i}`, text }));
    await call(index, "UpsertRecords", { collection, records });
  }
  const query = "a sleeping pet";
  const { results } = await call(index, "Search", { collection, queries: [{ text: query }], top_k: 3 });
  console.log(`Search: "${query}" in ${collection}`);
  for (const { record, score } of results[0].hits) console.log(`  ${score.toFixed(3)}  ${record.id}  ${record.text}`);
  if (own) await call(index, "DeleteCollection", { name: collection });

  const { models } = await call(stub("ModelService"), "ListModels", {});
  const classifier = models.find((model) => model.task === "MODEL_TASK_CLASSIFICATION");
  if (classifier) {
    const request = { classifier: classifier.name, texts: ["write a record to the log file"], top_k: 3 };
    const { classifications } = await call(stub("ClassificationService"), "Classify", request);
    console.log(`Classify: "${request.texts[0]}" by ${classifier.name}`);
    for (const { label, score } of classifications[0].scores) console.log(`  ${score.toFixed(3)}  ${label}`);
  } else {
    console.log("Classify: the server has no classifier");
  }

  try {
    await call(embedding, "Embed", { model: embedded.model.name, texts: ["good", ""] });
  } catch (error) {
    const [{ field, description }] = violations(error);
    console.log(`An error: ${grpc.status[error.code]}, ${field} ${description}`);
  }
}

main().catch((error) => {
  console.error(`error: ${error.details || error.message}`);
  process.exitCode = 1;
});
