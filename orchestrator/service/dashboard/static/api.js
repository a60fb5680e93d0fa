// How the pages talk to /v1, and to their reader.

/** Sends a body as JSON. Gives the answer's body; throws an Error whose message is a sentence for people. */
export async function send(method, address, body, headers = {}) {
  let response;
  try {
    response = await fetch(address, {
      method,
      headers: { "Content-Type": "application/json", Accept: "application/json", ...headers },
      body: method === "DELETE" || method === "GET" ? undefined : JSON.stringify(body ?? {}),
    });
  } catch {
    throw new Error("The service does not answer. Nothing was changed, as far as this page knows.");
  }
  const text = await response.text();
  const value = text && (response.headers.get("content-type") || "").includes("json") ? JSON.parse(text) : null;
  if (response.ok) return value;
  throw new Error(sentence(value?.error, response.status));
}

function sentence(error, status) {
  if (!error) return `The service answered with status ${status}.`;
  const lines = error.details?.length ? error.details.map(({ loc, message }) => lineOf(loc, message)) : [error.message];
  return lines.map((line) => (/^[\w.]+: /.test(line) ? line : line.charAt(0).toUpperCase() + line.slice(1))).join("\n");
}

function lineOf(loc, message) {
  const setting = (loc || "").replace(/^\/(body\/)?/, "").replaceAll("/", ".");
  return setting && !message.startsWith(setting) ? `${setting}: ${message}` : message;
}

let fading;

/** Shows a sentence for a while, and has it read out. */
export function say(text, bad = false) {
  const notice = document.getElementById("notice");
  clearTimeout(fading);
  notice.textContent = text;
  notice.classList.toggle("bad", bad);
  notice.hidden = false;
  fading = setTimeout(() => { notice.hidden = true; }, bad ? 12000 : 5000);
}

/** Lets every part of the page that depends on what happened ask again. */
export function changed() {
  document.body.dispatchEvent(new CustomEvent("run-changed"));
}
