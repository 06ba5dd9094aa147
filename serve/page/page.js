// The demo page: one question, two models, one choice. Talks to the OpenAI endpoint that serves it, and to nothing else.

const byId = (id) => document.getElementById(id);
const log = byId("log"), text = byId("text"), composer = byId("composer"), statusLine = byId("status");
const MAX_BYTES = 20 * 2 ** 20;
const KINDS = byId("file").accept.split(",");
const HEALTH_EVERY_MS = 2000, START_MS = 15 * 60_000;

let models = {};          // by id, as /v1/models gives them
let pictures = [];        // data URLs to send with the next question
let history = [];         // messages of the conversation so far, each content a list of parts
let kept = null;          // the answer with which the conversation goes on
let running = null;       // AbortController while answers are written
let adding = Promise.resolve();  // until the pictures that were given last are there
let loads = 0;            // how often the models were asked for

function say(message, isError = false) {
  statusLine.textContent = message;
  statusLine.classList.toggle("error", isError);
}

function headers(more = {}) {
  const key = byId("key").value.trim();
  return { ...(key && { Authorization: `Bearer ${key}` }), ...more };
}

async function errorOf(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered ${response.status}`;
  }
}

async function loadModels() {
  const load = ++loads;
  const response = await fetch("v1/models", { headers: headers() });
  if (response.status === 401) {
    byId("settings").open = true;
    byId("key").focus();
    const wrong = byId("key").value.trim();
    throw new Error(wrong ? "This API key is not valid." : "This server asks for an API key: give it in the settings.");
  }
  if (!response.ok) throw new Error(await errorOf(response));
  models = Object.fromEntries((await response.json()).data.map((model) => [model.id, model]));
  for (const [side, preferred] of [["left", "base"], ["right", "aligned"]]) {
    const select = byId(side), before = select.value;
    select.replaceChildren(...Object.keys(models).map((id) => new Option(id, id)));
    select.value = models[before] ? before : preferred;
  }
  byId("max-tokens").max = models.base.max_model_len;
  const deadline = performance.now() + START_MS;
  let starting = await isStarting();
  say(starting ? "The engines are still starting; this takes a minute or so." : "");
  while (starting) {
    if (performance.now() > deadline) throw new Error("The engines did not start; the server says why.");
    await new Promise((resolve) => setTimeout(resolve, HEALTH_EVERY_MS));
    if (load !== loads) return;  // asked again meanwhile
    starting = await isStarting();
    if (!starting) say("");
  }
}

async function isStarting() {
  return (await fetch("health")).status === 503;
}

// Pictures: chosen, dropped or pasted.

// How many more pictures the conversation may have; those of earlier questions are sent again.
function room() {
  const most = models[byId("left").value]?.max_images ?? 1;
  const sent = history.flatMap((message) => message.content).filter((part) => part.type === "image_url").length;
  return most - sent - pictures.length;
}

function addPictures(files) {
  const given = [...files];
  adding = adding.then(() => addEach(given)).catch((error) => say(error.message, true));
  return adding;
}

async function addEach(files) {
  for (const file of files) {
    if (!KINDS.includes(file.type)) {
      say(`${file.name} is not a PNG, JPEG, WebP, GIF or BMP picture.`, true);
    } else if (file.size > MAX_BYTES) {
      say(`${file.name} is over 20 MiB; make it smaller.`, true);
    } else if (room() < 1) {
      say("This model takes no more pictures in one conversation; begin a new one, or remove one.", true);
    } else {
      const url = await new Promise((resolve, reject) => {
        const reader = new FileReader();
        reader.onload = () => resolve(reader.result);
        reader.onerror = () => reject(reader.error);
        reader.readAsDataURL(file);
      });
      const image = new Image();
      image.src = url;
      try {
        await image.decode();
      } catch {
        say(`${file.name} cannot be read as a picture.`, true);
        continue;
      }
      pictures.push(url);
      say(`Picture added; ${pictures.length} to send.`);
    }
  }
  showThumbnails();
  text.focus();
}

function showThumbnails() {
  byId("thumbnails").replaceChildren(...pictures.map((url, index) => {
    const item = document.createElement("li"), image = new Image(), remove = document.createElement("button");
    image.src = url;
    image.alt = `Picture ${index + 1} to send`;
    remove.type = "button";
    remove.textContent = "×";
    remove.setAttribute("aria-label", `Remove picture ${index + 1}`);
    remove.onclick = () => {
      pictures.splice(index, 1);
      showThumbnails();
      text.focus();
    };
    item.append(image, remove);
    return item;
  }));
}

// One turn.

// The place of who uses the keyboard must not be lost; on a phone it would only bring up its own.
function focusText() {
  if (!matchMedia("(pointer: coarse)").matches) text.focus();
}

function clone(id) {
  return byId(id).content.firstElementChild.cloneNode(true);
}

async function ask() {
  await adding;
  const question = text.value.trim();
  if (running) return;
  if (!question) {
    say(pictures.length ? "Ask something about the picture." : "Ask something first.", true);
    text.focus();
    return;
  }
  const wrong = byId("settings").querySelector("input:invalid");
  if (wrong) {
    byId("settings").open = true;
    wrong.reportValidity();
    return;
  }
  if (kept) history.push({ role: "assistant", content: [{ type: "text", text: kept }] });
  kept = null;
  const parts = pictures.map((url) => ({ type: "image_url", image_url: { url } }));
  history.push({ role: "user", content: [...parts, { type: "text", text: question }] });
  const turn = clone("turn");
  turn.querySelector(".asked p").textContent = question;
  turn.querySelector(".pictures").replaceChildren(...pictures.map((url, index) => {
    const image = new Image();
    image.src = url;
    image.alt = `Picture ${index + 1} of the question`;
    return image;
  }));
  byId("welcome").hidden = true;
  log.append(turn);
  const asked = pictures;
  compose("", []);
  if (!(await answer(turn, [...history])) && !text.value) compose(question, asked);
}

function compose(question, withPictures) {
  text.value = question;
  text.rows = 1;
  pictures = withPictures;
  showThumbnails();
}

async function answer(turn, messages) {
  running = new AbortController();
  focusText();
  byId("send").hidden = true;
  byId("stop").hidden = false;
  say("Both models are answering.");
  const blind = byId("blind").checked;
  const names = [byId("left").value, byId("right").value];
  if (blind && Math.random() < 0.5) names.reverse();
  const sides = names.map((name, index) => {
    const card = clone("answer");
    card.querySelector("h2").textContent = blind ? ["Left", "Right"][index] : name;
    turn.querySelector(".answers").append(card);
    return { name, card, id: null, text: "", done: false };
  });
  turn.scrollIntoView({ block: "end" });
  await Promise.all(sides.map((side) => stream(side, messages, running.signal)));
  running = null;
  if (document.activeElement === byId("stop")) focusText();
  byId("send").hidden = false;
  byId("stop").hidden = true;
  if (!turn.isConnected) return true;  // a new conversation was begun meanwhile
  const usable = sides.filter((side) => side.text);
  kept = usable.length ? usable[usable.length - 1].text : null;
  if (!usable.length) history.pop();
  const votable = sides.every((side) => side.done && side.id);
  if (!blind || !votable) reveal(sides);
  if (votable) offerVotes(turn, sides);
  else turn.querySelector(".votes").hidden = true;
  say(votable && !usable.length ? "Both answers are empty; the question is in the box again." : "");
  const read = sides.map((side, index) => `${["Left", "Right"][index]}: ${side.text || "no answer"}`);
  byId("announced").textContent = read.join(" ");
  turn.scrollIntoView({ block: "end" });
  return usable.length > 0;
}

async function stream(side, messages, signal) {
  const paragraph = side.card.querySelector("p"), began = performance.now();
  try {
    const response = await fetch("v1/chat/completions", {
      method: "POST",
      headers: headers({ "Content-Type": "application/json", "X-Raylign-Remember": "1" }),
      body: JSON.stringify({
        model: side.name,
        messages,
        stream: true,
        temperature: Number(byId("temperature").value),
        max_tokens: Number(byId("max-tokens").value),
      }),
      signal,
    });
    if (!response.ok) throw new Error(await errorOf(response));
    side.id = response.headers.get("x-raylign-answer");
    side.version = `${response.headers.get("x-raylign-version")} · ${response.headers.get("x-raylign-revision")}`;
    for await (const event of events(response.body)) {
      if (event.error) throw new Error(event.error.message);
      const piece = event.choices[0]?.delta?.content ?? "";
      side.text += side.text ? piece : piece.trimStart();
      paragraph.textContent = side.text;
    }
    side.done = true;
    if (!side.text) {
      paragraph.classList.add("empty");
      paragraph.textContent = "An empty answer.";
    }
    side.card.querySelector(".time").textContent = `${((performance.now() - began) / 1000).toFixed(1)} s`;
  } catch (error) {
    if (error.name !== "AbortError") {
      paragraph.classList.add("error");
      paragraph.textContent = `${side.text} ${error.message}`.trim();
    } else {
      side.card.querySelector(".time").textContent = "stopped";
    }
  }
  side.card.setAttribute("aria-busy", "false");
  side.card.querySelector(".copy").hidden = !side.text;
  side.card.querySelector(".copy").onclick = async () => {
    await copy(side.text);
    say("Copied.");
  };
}

async function copy(words) {
  if (navigator.clipboard) return navigator.clipboard.writeText(words);
  const field = document.createElement("textarea");  // plain http beyond loopback has no clipboard
  field.value = words;
  document.body.append(field);
  field.select();
  document.execCommand("copy");
  field.remove();
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data: {")) yield JSON.parse(line.slice(6));
    }
  }
}

function reveal(sides) {
  for (const side of sides) {
    side.card.querySelector("h2").textContent = side.name;
    side.card.querySelector("code").textContent = side.version ?? "";
  }
}

function offerVotes(turn, sides) {
  const votes = turn.querySelector(".votes");
  votes.disabled = false;
  for (const button of votes.querySelectorAll("button")) {
    button.onclick = async () => {
      votes.disabled = true;
      focusText();
      const body = JSON.stringify({ first: sides[0].id, second: sides[1].id, choice: button.value });
      const response = await fetch("v1/preferences", {
        method: "POST", headers: headers({ "Content-Type": "application/json" }), body,
      }).catch((error) => ({ ok: false, json: () => { throw error; }, status: "nothing" }));
      if (!response.ok) {
        votes.disabled = false;
        say(await errorOf(response), true);
        return;
      }
      button.setAttribute("aria-pressed", "true");
      const chosen = { first: sides[0], second: sides[1] }[button.value];
      if (chosen) {
        chosen.card.classList.add("chosen");
        if (turn === log.lastElementChild) kept = chosen.text;
      }
      reveal(sides);
      const same = chosen && sides[0].text === sides[1].text;
      say(same ? "Thank you; but the answers are the same, so nothing can be learned." : "Thank you, your choice is kept.");
    };
  }
}

// Wiring.

composer.addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
text.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    ask();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  if (byId("settings").open) {
    byId("settings").open = false;
    byId("settings").querySelector("summary").focus();
  } else {
    running?.abort();
  }
});
text.addEventListener("input", () => {
  text.rows = Math.min(6, text.value.split("\n").length);
});
byId("stop").onclick = () => running?.abort();
byId("clear").onclick = () => {
  running?.abort();
  history = [];
  kept = null;
  compose("", []);
  for (const turn of log.querySelectorAll(".turn")) turn.remove();
  byId("welcome").hidden = false;
  say("A new conversation.");
  text.focus();
};
byId("attach").onclick = () => byId("file").click();
byId("file").onchange = async () => {
  await addPictures(byId("file").files);
  byId("file").value = "";
};
document.addEventListener("paste", (event) => {
  if (event.clipboardData.files.length) {
    event.preventDefault();
    addPictures(event.clipboardData.files);
  }
});
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  composer.classList.add("over");
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) composer.classList.remove("over");
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  composer.classList.remove("over");
  addPictures(event.dataTransfer.files);
});
byId("theme").onchange = () => {
  document.documentElement.dataset.theme = byId("theme").value;
};
document.addEventListener("click", (event) => {
  if (!byId("settings").contains(event.target)) byId("settings").open = false;
});
byId("key").onchange = async () => {
  try {
    await loadModels();
    byId("settings").open = false;
    text.focus();
  } catch (error) {
    say(error.message, true);
  }
};
loadModels().catch((error) => say(error.message, true));
