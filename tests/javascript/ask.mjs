// Asks through the real client of Hugging Face. One argument: JSON {client, endpointUrl, request, options}.
// Prints {"answer": what the client returned} or {"error": the message it threw, "status": HTTP status if any}.
import { HfInference, InferenceClient } from "@huggingface/inference";

const { client, endpointUrl, request, options } = JSON.parse(process.argv[2]);
const clients = {
  InferenceClient: () => new InferenceClient("", { endpointUrl }),
  HfInference: () => new HfInference("").endpoint(endpointUrl),
};

try {
  const answer = await clients[client]().questionAnswering(request, options);
  console.log(JSON.stringify({ answer }));
} catch (error) {
  console.log(JSON.stringify({ error: error.message, status: error.httpResponse?.status ?? null }));
}
