// Streams one answer over gRPC: node examples/node/grpc_chat.mjs 127.0.0.1:9000 ossia-nano "question"
// With a deadline, and again after a refusal that says when to come back.
import path from "node:path";
import { fileURLToPath } from "node:url";
import { setTimeout as sleep } from "node:timers/promises";
import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";

const protos = path.join(path.dirname(fileURLToPath(import.meta.url)), "../../protos");
const options = { includeDirs: [protos], keepCase: true, enums: String, defaults: true, oneofs: true };
const definition = protoLoader.loadSync("ossia/v1/inference.proto", options);
const { Inference } = grpc.loadPackageDefinition(definition).ossia.v1;

// Refused at the door: a status. Refused behind it: an event.
const RETRIED = [grpc.status.UNAVAILABLE, grpc.status.RESOURCE_EXHAUSTED, "ERROR_CODE_UNAVAILABLE", "ERROR_CODE_OVERLOADED"];

async function stream(client, request, deadline, onEvent) {
  const call = client.Chat(request, { deadline });
  for await (const event of call) {
    if (event.event === "error") throw Object.assign(new Error(event.error.message), event.error);
    onEvent(event);
  }
}

async function main(address, model, question) {
  const client = new Inference(address, grpc.credentials.createInsecure());
  const request = { model, messages: [{ role: "ROLE_USER", content: [{ text: question }] }] };
  const deadline = Date.now() + 60_000;
  let hasBegun = false;
  for (let attempt = 0; ; attempt++) {
    try {
      await stream(client, request, deadline, (event) => {
        if (event.event !== "channel_delta") return;
        hasBegun = true;
        if (event.channel_delta.channel === "CHANNEL_FINAL") process.stdout.write(event.channel_delta.text);
      });
      break;
    } catch (error) {
      if (hasBegun || attempt === 2 || !RETRIED.includes(error.code)) throw error;
      await sleep(1000 * (error.retry_after_s || 0.1 * 2 ** attempt * (0.5 + Math.random() / 2)));
    }
  }
  process.stdout.write("\n");
  client.close();
}

main(...process.argv.slice(2, 5)).catch((error) => {
  console.error(error.details || error.message);
  process.exitCode = 1;
});
