// A chat with the model of this server. Conversations stay in this browser.
const at = (id) => document.getElementById(id);
const STORE = "recurrentgemma";
const FRESH = { chats: [], current: null, system: "", temperature: 0.7, tokens: 1024, key: "" };
const state = { ...FRESH, ...read() };
let model = null;
let answering = null;

function read() {
  try {
    return JSON.parse(localStorage.getItem(STORE)) || {};
  } catch {
    return {};
  }
}

function keep() {
  try {
    localStorage.setItem(STORE, JSON.stringify(state));
  } catch {
    tell("This browser keeps no more: delete a conversation.");
  }
}

const chat = () => state.chats.find((one) => one.id === state.current);
const title = (one) => one.turns[0]?.content.slice(0, 60) || "New conversation";

function tell(problem) {
  at("problem").textContent = problem;
  at("problem").hidden = !problem;
}

function make(kind, fields) {
  return Object.assign(document.createElement(kind), fields);
}

function showList() {
  at("list").replaceChildren(
    ...state.chats.map((one) => {
      const button = make("button", { type: "button", textContent: title(one) });
      if (one.id === state.current) button.setAttribute("aria-current", "true");
      button.onclick = () => open(one.id);
      return button;
    }),
  );
}

function showTurn(turn, busy) {
  const part = make("div", { className: `turn ${turn.role}${busy ? " busy" : ""}` });
  const who = make("b", { textContent: turn.role === "user" ? "You" : "Model" });
  const words = make("p", { textContent: turn.content });
  part.append(who, words);
  at("said").append(part);
  return [part, words];
}

function showChat() {
  at("said").replaceChildren();
  for (const turn of chat()?.turns || []) showTurn(turn);
  at("said").scrollTop = at("said").scrollHeight;
  at("remove").hidden = !chat();
}

function open(id) {
  stop();
  state.current = id;
  tell("");
  keep();
  showList();
  showChat();
  toggleMenu(false);
  at("words").focus();
}

function stop() {
  answering?.abort();
}

function toggleMenu(wanted) {
  const opened = at("side").classList.toggle("open", wanted);
  at("menu").setAttribute("aria-expanded", String(opened));
}

function setBusy(busy) {
  at("send").hidden = busy;
  at("stop").hidden = !busy;
}

function headers() {
  const key = state.key ? { authorization: `Bearer ${state.key}` } : {};
  return { "content-type": "application/json", ...key };
}

// The objects of a stream of server-sent events, one by one.
async function* objects(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      if (part === "data: [DONE]") return;
      if (part.startsWith("data: ")) yield JSON.parse(part.slice(6));
    }
  }
}

async function failure(reply) {
  try {
    return (await reply.json()).error.message;
  } catch {
    return `The server answered with ${reply.status}.`;
  }
}

async function answer(one) {
  const said = state.system ? [{ role: "system", content: state.system }] : [];
  const turn = { role: "assistant", content: "" };
  const request = {
    messages: [...said, ...one.turns],
    stream: true,
    temperature: Number(state.temperature),
    max_tokens: Number(state.tokens),
  };
  const control = (answering = new AbortController());
  const [part, words] = showTurn(turn, true);
  setBusy(true);
  try {
    const reply = await fetch("v1/chat/completions", {
      method: "POST",
      headers: headers(),
      body: JSON.stringify(request),
      signal: control.signal,
    });
    if (!reply.ok) throw new Error(await failure(reply));
    for await (const chunk of objects(reply.body)) {
      if (chunk.error) throw new Error(chunk.error.message);
      turn.content += chunk.choices[0]?.delta.content || "";
      const box = at("said");
      const atEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 60;
      words.textContent = turn.content;
      if (atEnd) box.scrollTop = box.scrollHeight;
    }
    if (!turn.content) tell("The model ended its answer without a word.");
  } catch (error) {
    if (error.name !== "AbortError") tell(`No answer: ${error.message}`);
  } finally {
    part.classList.remove("busy");
    if (turn.content) one.turns.push(turn);
    else part.remove();
    keep();
    if (answering === control) {
      answering = null;
      setBusy(false);
    }
  }
}

function send() {
  const content = at("words").value.trim();
  if (!content || answering) return;
  if (!chat()) {
    state.current = crypto.randomUUID?.() || String(Date.now());
    state.chats.unshift({ id: state.current, turns: [] });
  }
  const one = chat();
  const last = one.turns.at(-1);
  if (last?.role === "user") one.turns.pop(); // it had no answer
  one.turns.push({ role: "user", content });
  at("words").value = "";
  grow();
  tell("");
  keep();
  showList();
  showChat();
  answer(one);
}

function grow() {
  at("words").style.height = "auto";
  at("words").style.height = `${at("words").scrollHeight + 2}px`;
}

function bind(id, name) {
  at(id).value = state[name];
  at(id).oninput = () => {
    state[name] = at(id).value;
    at("shown").textContent = state.temperature;
    keep();
  };
}

async function start() {
  for (const name of ["system", "temperature", "tokens", "key"]) bind(name, name);
  at("shown").textContent = state.temperature;
  at("form").onsubmit = (event) => {
    event.preventDefault();
    send();
  };
  at("words").oninput = grow;
  at("words").onkeydown = (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      send();
    }
  };
  document.onkeydown = (event) => {
    if (event.key === "Escape") {
      stop();
      toggleMenu(false);
    }
  };
  at("stop").onclick = stop;
  at("new").onclick = () => open(null);
  at("menu").onclick = () => toggleMenu();
  at("remove").onclick = () => {
    state.chats = state.chats.filter((one) => one.id !== state.current);
    open(null);
  };
  showList();
  showChat();
  at("words").focus();
  try {
    const reply = await fetch("v1/models", { headers: headers() });
    if (!reply.ok) throw new Error(await failure(reply));
    model = (await reply.json()).data[0].id;
    at("model").textContent = model;
    document.title = model;
  } catch (error) {
    tell(error.message);
  }
}

start();
