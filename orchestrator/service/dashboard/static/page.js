// What every page does: colours, signing out, dialogs, buttons and forms that speak JSON, times, and following a run.
import { changed, say, send } from "/static/api.js";

const root = document.documentElement;

// Colours: as the system, light, dark, and round again.
const theme = document.getElementById("theme");
const NAMES = { "": "as the system", light: "light", dark: "dark" };
const NEXT = { "": "light", light: "dark", dark: "" };

function nameTheme() {
  theme.setAttribute("aria-label", `Colours: ${NAMES[root.dataset.theme || ""]}`);
  theme.title = theme.getAttribute("aria-label");
}

theme.addEventListener("click", () => {
  const chosen = NEXT[root.dataset.theme || ""];
  if (chosen) root.dataset.theme = chosen;
  else delete root.dataset.theme;
  try {
    if (chosen) localStorage.setItem("potstill-theme", chosen);
    else localStorage.removeItem("potstill-theme");
  } catch { /* it lasts until the page is left */ }
  nameTheme();
  document.dispatchEvent(new CustomEvent("colours-changed"));
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => document.dispatchEvent(new CustomEvent("colours-changed")));
nameTheme();

document.getElementById("sign-out")?.addEventListener("click", async () => {
  try {
    await send("POST", "/logout");
    location.assign("/login");
  } catch (error) { say(error.message, true); }
});

// Buttons and dialogs.
document.addEventListener("click", async (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  if (button.dataset.opens) document.getElementById(button.dataset.opens).showModal();
  if ("closes" in button.dataset) button.closest("dialog").close();
  if (button.dataset.post) await press(button);
});

async function press(button) {
  button.disabled = true;
  try {
    await send("POST", button.dataset.post);
    say(button.dataset.said);
    changed();
  } catch (error) {
    say(error.message, true);
  } finally {
    button.disabled = false;
  }
}

// Forms: their fields are the body's, the answer's id is where the page goes.
document.addEventListener("submit", async (event) => {
  const form = event.target.closest("form[data-json]");
  if (!form) return;
  event.preventDefault();
  const problem = form.querySelector(".problem"), button = event.submitter;
  problem.textContent = "";
  if (button) button.disabled = true;
  try {
    const fields = fieldsOf(form), method = form.dataset.json;
    const address = method === "DELETE" ? `${form.action}?${new URLSearchParams(fields)}` : form.action;
    const answer = await send(method, address, fields, headersOf(form));
    form.closest("dialog")?.close();
    if (form.dataset.said) say(form.dataset.said);
    if (form.dataset.goes) location.assign(form.dataset.goes + ("goesAsIs" in form.dataset ? "" : answer?.id ?? ""));
    else changed();
  } catch (error) {
    problem.textContent = error.message;
  } finally {
    if (button) button.disabled = false;
  }
});

function headersOf(form) {
  const headers = {};
  if ("once" in form.dataset) headers["Idempotency-Key"] = onceOf(form);
  if (form.dataset.ifMatch) headers["If-Match"] = form.dataset.ifMatch;
  return headers;
}

function fieldsOf(form) {
  const fields = {};
  for (const field of form.elements) {
    if (!field.name || (field.type === "radio" && !field.checked)) continue;
    if ("omitEmpty" in field.dataset && !field.value.trim()) continue;
    fields[field.name] = valueOfField(field);
  }
  return fields;
}

function valueOfField(field) {
  if ("settings" in field.dataset) return settingsOf(field.value);
  return "number" in field.dataset ? Number(field.value) : field.value.trim();
}

/** `optim.lr = 2e-4` a line. What is no JSON value is text. */
function settingsOf(text) {
  const settings = {};
  for (const line of text.split("\n").map((one) => one.trim()).filter(Boolean)) {
    const at = line.indexOf("=");
    if (at < 1) throw new Error(`“${line}” is no setting: write name = value.`);
    settings[line.slice(0, at).trim()] = valueOf(line.slice(at + 1).trim());
  }
  return settings;
}

function valueOf(text) {
  try { return JSON.parse(text); } catch { return text; }
}

/** One key for what the form says now: sent twice it is done once, changed it is another request. */
function onceOf(form) {
  const said = JSON.stringify(fieldsOf(form));
  if (form.saidBefore !== said) {
    form.saidBefore = said;
    form.onceKey = Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
  }
  return form.onceKey;
}

// Times: the words of words.py, kept true.
const MINUTE = 60, HOUR = 3600, DAY = 86400;

function rounded(seconds) {
  if (seconds < HOUR) return `${Math.max(1, Math.floor(seconds / MINUTE))} min`;
  return seconds < 2 * DAY ? `${Math.floor(seconds / HOUR)} h` : `${Math.floor(seconds / DAY)} days`;
}

setInterval(() => {
  for (const time of document.querySelectorAll("time")) {
    const past = (Date.now() - Date.parse(time.dateTime)) / 1000;
    if (past < 30 * DAY && past > -MINUTE) time.textContent = past < MINUTE ? "just now" : `${rounded(past)} ago`;
  }
}, 20000);

// Whatever asks by itself rests while nobody looks, and says so when the service is away.
document.addEventListener("htmx:before:request", (event) => {
  if (document.hidden) event.preventDefault();
});
let away = false;
document.addEventListener("htmx:error", () => {
  if (!away) say("The service does not answer. This page goes on asking.", true);
  away = true;
});
document.addEventListener("htmx:after:swap", () => {
  if (away) say("The service answers again.");
  away = false;
});

// Following a run: its events come as they happen, while the page is seen. A browser has few connections to one host.
const head = document.getElementById("head");
if (head && head.dataset.final === "no") {
  let source, seen = Number(head.dataset.after);
  const open = () => {
    source = new EventSource(`/v1/runs/${head.dataset.run}/events?after=${seen}`);
    source.addEventListener("run.event", ({ data, lastEventId }) => {
      seen = Number(lastEventId);
      document.dispatchEvent(new CustomEvent("run-event", { detail: JSON.parse(data) }));
      changed();
    });
    source.addEventListener("end", () => { source.close(); source = null; changed(); });
  };
  document.addEventListener("visibilitychange", () => {
    if (document.hidden) source?.close();
    else if (source) { open(); changed(); }
  });
  if (!document.hidden) open();
  else document.addEventListener("visibilitychange", open, { once: true });
}
