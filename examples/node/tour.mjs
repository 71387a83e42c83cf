// What an application does with OpenAI's client, once: node examples/node/tour.mjs http://127.0.0.1:8000 MODEL
// Prints one JSON object with what came back.
import OpenAI from "openai";
import { zodResponseFormat, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";

const [url, model] = process.argv.slice(2, 4);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 2 });
const hello = [{ role: "user", content: "Hello" }];
const Place = z.object({ city: z.string(), degrees: z.number() });
const found = {};

const whole = await client.chat.completions.create({ model, messages: hello });
found.chat = whole.choices[0].message.content;

found.stream = "";
const stream = await client.chat.completions.create({ model, messages: hello, stream: true, stream_options: { include_usage: true } });
for await (const chunk of stream) {
  found.stream += chunk.choices[0]?.delta?.content ?? "";
  found.usage = chunk.usage?.total_tokens ?? null;
}

const runner = client.chat.completions.runTools({
  model,
  messages: [{ role: "user", content: "What is the weather in Oslo?" }],
  tools: [
    {
      type: "function",
      function: {
        name: "get_weather",
        description: "The weather in a city",
        parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
        parse: JSON.parse,
        function: ({ city }) => ((found.toolArgument = city), "sunny"),
      },
    },
  ],
});
found.tools = await runner.finalContent();

const parsed = await client.chat.completions.parse({
  model,
  messages: [{ role: "user", content: "A place" }],
  response_format: zodResponseFormat(Place, "place"),
});
found.parsed = parsed.choices[0].message.parsed;

const response = await client.responses.create({ model, input: "Hello" });
found.response = response.output_text;
const again = await client.responses.create({ model, input: "Hello", previous_response_id: response.id });
found.previous = again.previous_response_id === response.id;

found.events = [];
for await (const event of client.responses.stream({ model, input: "Hello" })) {
  if (found.events.at(-1) !== event.type) found.events.push(event.type);
}
const place = await client.responses.parse({ model, input: "A place", text: { format: zodTextFormat(Place, "place") } });
found.parsedResponse = place.output_parsed;

try {
  await client.chat.completions.create({ model: "nobody", messages: hello });
} catch (error) {
  found.error = [error instanceof OpenAI.NotFoundError, error.status, error.code, error.param, Boolean(error.requestID)];
}
found.models = (await client.models.list()).data.map((one) => one.id);
console.log(JSON.stringify(found));
