// The page at GET /: sends questions to POST /v1/answer and marks the answer in the text.
//
// Offsets are asked for in UTF-16 units, which is what JavaScript strings count, so text.slice(start, end) is the
// answer. Text of the user or of the server only ever becomes a text node; nothing is parsed as HTML.

const TOP_K = 5;
const PATIENCE_MS = 60_000; // for a question with all its attempts; the service has a shorter deadline for each
const BUSY = [429, 503]; // statuses that mean "not now"
const WAITING = "The service is busy at the moment. Your question will be sent again automatically…";

const SAMPLE = {
  text:
    "Marie Curie was born in Warsaw in 1867 and moved to Paris in 1891 to study physics at the Sorbonne. " +
    "In 1898 she and her husband Pierre discovered two new elements, polonium and radium. She received the Nobel " +
    "Prize in Physics in 1903 and, eight years later, the Nobel Prize in Chemistry.\n\n" +
    "During the First World War she fitted cars with X-ray machines so that surgeons could find bullets near the " +
    "front. The soldiers called these cars “little Curies”, and she drove one of them herself.",
  questions: [
    "Where was Marie Curie born?",
    "Which elements did she discover?",
    "What did the soldiers call the cars?",
  ],
};

const HEADLINES = {
  engine_unavailable: "The service cannot answer right now.",
  engine_overloaded: "The service is still busy.",
  engine_timeout: "The answer took too long.",
  engine_broken: "The service cannot answer right now.",
  engine_mismatch: "The service cannot answer right now.",
  stopping: "The service is being restarted.",
  body_too_large: "This is too much text.",
  unauthorized: "This service answers only with an API key.",
  rate_limited: "Too many questions with this API key.",
  validation: "This question cannot be answered as it is.",
  unreachable: "The service cannot be reached.",
};

const find = (id) => document.getElementById(id);
const form = find("form");
const question = find("question");
const texts = find("texts");
const panel = find("answer");
const verdict = find("verdict");

// In the storage of this tab: it survives a reload, but not the end of the tab.
const KEY = "bertqa-key";
const keyField = find("key");

let running = null; // AbortController of the question in flight
let asked = null; // the request of the shown answers: its body, and its texts with their numbers on the page

// ---- small builders ----

function element(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

function percent(score) {
  if (score > 0 && score < 0.001) return "under 0.1%";
  if (score > 0.999 && score < 1) return "over 99.9%";
  return `${(100 * score).toFixed(1)}%`;
}

function milliseconds(value) {
  return `${value.toFixed(value < 10 ? 2 : value < 100 ? 1 : 0)} ms`;
}

function sentence(text) {
  const trimmed = text.trim();
  const begun = trimmed.charAt(0).toUpperCase() + trimmed.slice(1);
  return /[.!?]$/.test(begun) ? begun : `${begun}.`;
}

// ---- the texts ----

function addText(value = "") {
  const field = find("text-template").content.firstElementChild.cloneNode(true);
  const area = field.querySelector("textarea");
  area.value = value;
  area.addEventListener("input", () => clearProblem(area));
  field.querySelector(".remove").addEventListener("click", () => {
    const neighbour = field.previousElementSibling ?? field.nextElementSibling;
    field.remove();
    numberTexts();
    neighbour.querySelector("textarea").focus();
  });
  texts.append(field);
  numberTexts();
  return area;
}

function numberTexts() {
  const fields = [...texts.children];
  fields.forEach((field, index) => {
    const [area, label, remove, problem] = ["textarea", "label", ".remove", ".problem"].map((part) =>
      field.querySelector(part),
    );
    const name = fields.length > 1 ? `Text ${index + 1}` : "Text";
    area.id = `text-${index + 1}`;
    area.rows = fields.length > 1 ? 5 : 11;
    label.htmlFor = area.id;
    label.textContent = name;
    problem.id = `${area.id}-problem`;
    area.setAttribute("aria-describedby", problem.id);
    remove.hidden = fields.length === 1;
    remove.setAttribute("aria-label", `Remove ${name.toLowerCase()}`);
  });
  showSamples();
}

const areas = () => [...texts.querySelectorAll("textarea")];

// Sample questions are useful only with the sample text.
function showSamples() {
  find("samples").hidden = areas()[0]?.value !== SAMPLE.text;
}

// ---- asking ----

function problemOf(field) {
  return find(`${field.id}-problem`);
}

function clearProblem(field) {
  field.removeAttribute("aria-invalid");
  problemOf(field).textContent = "";
  problemOf(field).hidden = true;
}

function showProblem(field, message) {
  field.setAttribute("aria-invalid", "true");
  problemOf(field).textContent = message;
  problemOf(field).hidden = false;
  field.focus();
}

// Returns the request from the form, or null after showing what is missing.
function readForm() {
  const filled = areas()
    .map((area, index) => ({ text: area.value, number: index + 1, area }))
    .filter(({ text }) => text.trim() !== "");
  [question, keyField, ...areas()].forEach(clearProblem);
  if (filled.length === 0) showProblem(areas()[0], "Please enter the text that contains the answer.");
  if (question.value.trim() === "") showProblem(question, "Please type a question.");
  if (filled.length === 0 || question.value.trim() === "") return null;

  const contexts = filled.map(({ text }) => text);
  const body = {
    question: question.value,
    ...(contexts.length === 1 ? { context: contexts[0] } : { contexts }),
    top_k: TOP_K,
    offset_unit: "utf16",
    ...(find("choice").value && { model: find("choice").value }),
  };
  return { body, texts: filled };
}

function withKey(headers = {}) {
  const key = sessionStorage.getItem(KEY);
  return key ? { ...headers, authorization: `Bearer ${key}` } : headers;
}

async function post(body, signal) {
  let response;
  try {
    response = await fetch("v1/answer", {
      method: "POST",
      headers: withKey({ "content-type": "application/json" }),
      body: JSON.stringify(body),
      signal,
    });
  } catch (error) {
    if (signal.aborted) throw signal.reason;
    return { failure: { error: "Check that it is running, and your connection to it.", error_type: "unreachable" } };
  }
  const reply = await response.json().catch(() => null);
  if (response.ok && Array.isArray(reply?.answers)) return { reply };
  const error = typeof reply?.error === "string" ? reply.error : `The service answered with status ${response.status}.`;
  const wait = BUSY.includes(response.status) ? Math.max(Number(response.headers.get("retry-after")) || 0, 1) : null;
  return { failure: { error, error_type: reply?.error_type, field: reply?.field }, wait };
}

// Retries while the service is busy: after the seconds in its reply and up to half as many more, so that rejected
// clients do not all return at once.
async function postUntilAnswered(body, signal) {
  const end = performance.now() + PATIENCE_MS;
  for (;;) {
    const outcome = await post(body, signal);
    const wait = outcome.wait && 1000 * outcome.wait * (1 + Math.random() / 2);
    if (!wait || performance.now() + wait > end) return outcome;
    find("failure").replaceChildren(); // from an earlier attempt
    find("waiting").textContent = WAITING;
    await pause(wait, signal);
  }
}

function pause(milliseconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, milliseconds);
    signal.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(signal.reason);
    });
  });
}

async function ask() {
  const request = readForm();
  if (!request) return;
  if (keyField.value) sessionStorage.setItem(KEY, keyField.value.trim());
  running?.abort(new DOMException("superseded", "AbortError"));
  const mine = new AbortController();
  running = mine;
  const timer = setTimeout(() => mine.abort(new DOMException("too slow", "TimeoutError")), PATIENCE_MS);
  setBusy(true);

  let outcome;
  try {
    outcome = await postUntilAnswered(request.body, mine.signal);
  } catch (reason) {
    if (reason.name === "TimeoutError") {
      const error = `No answer came within ${PATIENCE_MS / 1000} seconds.`;
      outcome = { failure: { error, error_type: "engine_timeout" } };
    }
  } finally {
    clearTimeout(timer);
  }
  if (running !== mine) return; // a newer question replaced this one
  running = null;
  setBusy(false);
  asked = request;
  if (outcome.failure) showFailure(outcome.failure);
  else showReply(outcome.reply);
  if (outcome.reply && !find("key-field").hidden) {
    find("key-field").hidden = true;
    offerModels(); // without the key, the service did not list them
  }
}

function setBusy(busy) {
  panel.setAttribute("aria-busy", String(busy));
  find("submit").textContent = busy ? "Asking…" : "Ask";
  find("waiting").textContent = "";
}

// ---- showing ----

function showFailure({ error, error_type: type, field }) {
  verdict.replaceChildren();
  find("details").hidden = true;
  find("failure").replaceChildren(
    element("p", {}, element("strong", {}, HEADLINES[type] ?? "The question could not be answered.")),
    element("p", {}, sentence(error)),
  );
  if (type === "unauthorized") {
    find("key-field").hidden = false;
    document.querySelector("nav [href=info]").hidden = true; // a link cannot send the key
    showProblem(keyField, sentence(error));
    return;
  }
  const culprit = fieldNamed(field);
  if (culprit) {
    showProblem(culprit, sentence(error));
    return;
  }
  const retry = element("button", { type: "button", class: "quiet" }, "Try again");
  retry.addEventListener("click", () => {
    find("submit").focus(); // the retry button is about to be removed
    ask();
  });
  find("failure").append(element("p", {}, "Your question and text are still here."), retry);
  bringIntoView(panel);
}

// Returns the form field for a field name from the server: question, context, contexts or contexts[i].
function fieldNamed(name) {
  if (name === "question") return question;
  const index = /^contexts?(?:(?:\[|\.)(\d+))?/.exec(name ?? "");
  return index ? asked.texts[Number(index[1] ?? 0)]?.area : null;
}

function showReply(reply) {
  find("failure").replaceChildren();
  find("copied").textContent = "";
  for (const id of ["command", "command-label"]) find(id).hidden = true;

  const several = asked.texts.length > 1;
  const best = reply.answers[0];
  if (reply.has_answer && best) {
    const place = several ? `, in text ${asked.texts[best.context_index].number}` : "";
    verdict.replaceChildren(
      element("p", { class: best.text.length > 120 ? "best long" : "best" }, best.text),
      element("p", { class: "sure" }, `Score ${percent(best.score)}${place}`),
    );
  } else {
    verdict.replaceChildren(
      element("p", { class: "best" }, `The ${several ? "texts do" : "text does"} not seem to answer this.`),
      element("p", { class: "sure" }, `“No answer” scores ${percent(reply.null_score)}`),
    );
  }
  if (reply.truncated) {
    verdict.append(
      element(
        "p",
        { class: "note" },
        `The question is too long for the model (${reply.question_tokens} tokens); only its beginning was read.`,
      ),
    );
  }

  find("ranking-title").textContent = reply.has_answer ? "Answers, best first" : "Closest guesses, not reliable";
  find("ranking-title").hidden = reply.answers.length === 0;
  find("ranking").replaceChildren(...reply.answers.map((answer) => rankingItem(answer, several)));
  find("details").hidden = false;
  select(reply.has_answer ? best : null);

  const { tokenize_ms: tokenize, infer_ms: infer, decode_ms: decode, total_ms: total } = reply.timings;
  const figures = { Tokenize: tokenize, Engine: infer, Decode: decode, Total: total };
  find("timings").replaceChildren(
    ...Object.entries(figures).map(([name, value]) => figure(name, milliseconds(value))),
    figure("Windows", String(reply.windows)),
  );
  find("model").textContent = `Model ${reply.model}`;
  bringIntoView(panel);
}

function figure(name, value) {
  return element("div", {}, element("dt", {}, name), element("dd", {}, value));
}

function rankingItem(answer, several) {
  const bar = element("span", { class: "bar", "aria-hidden": "true" });
  bar.style.setProperty("--score", `${100 * answer.score}%`);
  const place = several ? `Text ${asked.texts[answer.context_index].number} · ` : "";
  const button = element(
    "button",
    { type: "button", "aria-pressed": "false" },
    element("span", { class: "words" }, answer.text),
    " ",
    element("span", { class: "score" }, `${place}${percent(answer.score)}`),
    bar,
  );
  button.answer = answer;
  for (const event of ["click", "focus"]) button.addEventListener(event, () => select(answer));
  return element("li", {}, button);
}

// Marks one answer in the texts, or none.
function select(answer) {
  for (const button of find("ranking").querySelectorAll("button")) {
    button.setAttribute("aria-pressed", String(button.answer === answer));
  }
  const passage = find("passage");
  passage.replaceChildren(
    ...asked.texts.flatMap(({ text, number }, index) => {
      const paragraph = element("p", { dir: "auto" });
      if (answer?.context_index === index) {
        const { start, end } = answer;
        paragraph.append(text.slice(0, start), element("mark", {}, text.slice(start, end)), text.slice(end));
      } else {
        paragraph.append(text);
      }
      return asked.texts.length > 1 ? [element("h4", {}, `Text ${number}`), paragraph] : [paragraph];
    }),
  );
  const mark = passage.querySelector("mark");
  if (!mark) {
    passage.scrollTop = 0;
    return;
  }
  // A third from the top of the passage, so that the words before the answer are visible too.
  passage.scrollTop += mark.getBoundingClientRect().top - passage.getBoundingClientRect().top - passage.clientHeight / 3;
}

// Scrolls the page only if the top of the panel is not visible, as on a narrow screen.
function bringIntoView(node) {
  const { top } = node.getBoundingClientRect();
  if (top >= 0 && top < window.innerHeight / 2) return;
  const calm = window.matchMedia("(prefers-reduced-motion: reduce)").matches;
  node.scrollIntoView({ block: "start", behavior: calm ? "auto" : "smooth" });
}

// ---- copy as curl ----

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

// A here-document with a quoted delimiter: the shell changes nothing in it, and unlike an argument, it has no length
// limit. The JSON is one line that begins with a brace, so no text can end it early. Control and direction characters,
// which a terminal would interpret, are written as JSON escapes.
function curlCommand(body) {
  const json = JSON.stringify(body).replace(
    /[\u007f-\u009f\u00ad\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]/g,
    (character) => `\\u${character.charCodeAt(0).toString(16).padStart(4, "0")}`,
  );
  const url = quoted(new URL("v1/answer", document.baseURI).href);
  const key = sessionStorage.getItem(KEY) ? ` -H "authorization: Bearer $BERTQA_API_KEY"` : "";
  return `curl -sS ${url}${key} -H 'content-type: application/json' --data-binary @- <<'JSON'\n${json}\nJSON\n`;
}

async function copyCommand() {
  const command = curlCommand(asked.body);
  try {
    await navigator.clipboard.writeText(command);
    find("copied").textContent = "Copied. Paste it into a terminal.";
  } catch {
    // No clipboard: neither HTTPS nor localhost, or no permission.
    for (const id of ["command", "command-label"]) find(id).hidden = false;
    find("command").value = command;
    find("command").focus();
    find("command").select();
    find("copied").textContent = "Your browser does not allow copying from this page. The command is selected: press Ctrl + C.";
  }
}

// ---- the models ----

// Shows the choice only if there is more than one model.
async function offerModels() {
  const reply = await fetch("v1/models", { headers: withKey() })
    .then((response) => response.json())
    .catch(() => null);
  if (!(reply?.models?.length > 1)) return;
  find("choice").replaceChildren(...reply.models.map(({ name }) => element("option", { value: name }, name)));
  find("choice").value = reply.default;
  find("choice-field").hidden = false;
}

// ---- start ----

form.addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !event.repeat) {
    event.preventDefault();
    ask();
  }
});
question.addEventListener("input", () => clearProblem(question));
keyField.addEventListener("input", () => clearProblem(keyField));
texts.addEventListener("input", showSamples);
find("add-text").addEventListener("click", () => addText().focus());
find("copy").addEventListener("click", copyCommand);
find("samples")
  .querySelector("ul")
  .append(
    ...SAMPLE.questions.map((text) => {
      const button = element("button", { type: "button" }, text);
      button.addEventListener("click", () => {
        question.value = text;
        ask();
      });
      return element("li", {}, button);
    }),
  );
offerModels();
addText(SAMPLE.text);
question.value = SAMPLE.questions[0];
