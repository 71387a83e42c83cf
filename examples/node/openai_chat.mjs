// Streams one answer with OpenAI's client: node examples/node/openai_chat.mjs http://127.0.0.1:8000 ossia-nano "question"
import OpenAI from "openai";

const [url, model, question] = process.argv.slice(2, 5);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none" });
const stream = await client.chat.completions.create({ model, messages: [{ role: "user", content: question }], stream: true });
for await (const chunk of stream) process.stdout.write(chunk.choices[0]?.delta?.content ?? "");
process.stdout.write("\n");
