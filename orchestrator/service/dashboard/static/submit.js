// Submitting: the text becomes JSON on the server, the API plans it, and only what was planned can be sent.
import { send } from "/static/api.js";

const toml = document.getElementById("toml"), plan = document.getElementById("plan"), wrong = document.getElementById("wrong");
const refused = document.getElementById("refused"), check = document.getElementById("check"), button = document.getElementById("send");
let planned = null;

document.getElementById("recipe").addEventListener("change", ({ target }) => target.form.requestSubmit());
document.getElementById("take").hidden = true;

document.getElementById("submission").addEventListener("submit", async (event) => {
  event.preventDefault();
  wrong.textContent = refused.textContent = "";
  plan.hidden = true;
  check.disabled = true;
  try {
    const config = await send("POST", "/submit/read", { toml: toml.value });
    const answer = await send("POST", "/v1/runs?dry_run=true", config);
    planned = { config, key: key() };
    show(answer);
  } catch (error) {
    wrong.textContent = error.message;
    wrong.scrollIntoView({ block: "center" });
  } finally {
    check.disabled = false;
  }
});

toml.addEventListener("input", () => { planned = null; plan.hidden = true; });

button.addEventListener("click", async () => {
  if (!planned) return;
  refused.textContent = "";
  button.disabled = true;
  try {
    const run = await send("POST", "/v1/runs", planned.config, { "Idempotency-Key": planned.key });
    location.assign(`/runs/${run.id}`);
  } catch (error) {
    refused.textContent = error.message;
    button.disabled = false;
  }
});

function key() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

function show({ config, plan: found, warnings, estimate }) {
  const rows = [["run", config.name], ...flat(found).filter(([name]) => name !== "notes"), ...flat(estimate)];
  document.getElementById("planned").replaceChildren(...rows.map(rowOf));
  document.getElementById("warnings").replaceChildren(...(warnings ?? found?.notes ?? []).map((text) => {
    const item = document.createElement("li");
    item.textContent = text;
    return item;
  }));
  plan.hidden = false;
  button.disabled = false;
  button.focus();
  plan.scrollIntoView({ block: "nearest" });
}

function flat(table) {
  const said = Object.entries(table ?? {}).filter(([, value]) => value !== null && String(value) !== "");
  return said.map(([name, value]) => [name.replace(/_bytes$/, " memory").replaceAll("_", " "), worded(name, value)]);
}

/** As words.size says it. */
function size(bytes) {
  const power = Math.min(4, Math.max(0, Math.floor(Math.log10(bytes || 1) / 3)));
  return `${+(bytes / 1000 ** power).toPrecision(3)} ${["bytes", "kB", "MB", "GB", "TB"][power]}`;
}

function worded(name, value) {
  if (name.endsWith("_bytes")) return size(value);
  if (typeof value === "number") return value.toLocaleString("en");
  return Array.isArray(value) ? value.join("\n") : typeof value === "object" ? JSON.stringify(value) : String(value);
}

function rowOf([name, value]) {
  const row = document.createElement("tr"), head = document.createElement("th"), cell = document.createElement("td");
  head.scope = "row";
  head.textContent = name;
  cell.textContent = value;
  cell.className = "said";
  row.append(head, cell);
  return row;
}
