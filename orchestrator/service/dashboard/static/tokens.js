// The heat map's readout: what is known of the token under the pointer, or of the one that the keyboard is at.
const reading = document.getElementById("reading");

function read(token) {
  const name = document.createElement("b");
  name.textContent = token.textContent;
  reading.replaceChildren(name, ` ${token.dataset.of}`);
}

for (const text of document.querySelectorAll(".tokens")) {
  text.setAttribute("role", "group");
  text.setAttribute("aria-label", "Tokens: walk with the arrow keys");
  for (const token of text.children) {
    token.dataset.of = token.title;
    token.removeAttribute("title");
    token.tabIndex = -1;
  }
  if (text.firstElementChild) text.firstElementChild.tabIndex = 0;
  text.addEventListener("pointerover", ({ target }) => { if (target !== text) read(target); });
  text.addEventListener("focusin", ({ target }) => { if (target !== text) read(target); });
  text.addEventListener("click", ({ target }) => { if (target !== text) go(text, target); });
  text.addEventListener("keydown", (event) => {
    const tokens = [...text.children], at = tokens.indexOf(document.activeElement);
    const to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: tokens.length - 1 }[event.key];
    if (at < 0 || to === undefined) return;
    event.preventDefault();
    if (tokens[to]) go(text, tokens[to]);
  });
}

function go(text, token) {
  text.querySelector('[tabindex="0"]').tabIndex = -1;
  token.tabIndex = 0;
  token.focus();
}
