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
  return Object.entries(table ?? {}).filter(([, value]) => value !== null && String(value) !== "").map(([name, value]) => [name.replaceAll("_", " "), worded(name, value)]);
}

function worded(name, value) {
  if (name.endsWith("_bytes")) return `${(value / 1e9).toPrecision(3)} GB`;
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
