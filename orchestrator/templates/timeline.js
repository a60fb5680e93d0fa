const scroll = document.querySelector(".scroll"), time = document.querySelector(".time");
const svg = time.querySelector(".drawing"), tip = document.querySelector(".tip");
const perUnit = svg.dataset.seconds / svg.viewBox.baseVal.width;
const say = (seconds) => seconds >= 100 ? seconds.toFixed(0) + " s" : seconds >= 1 ? seconds.toFixed(2) + " s"
  : (1000 * seconds).toPrecision(3) + " ms";

svg.addEventListener("pointermove", (event) => {
  const mark = event.target.closest("rect");
  tip.hidden = !mark;
  if (!mark) return;
  const start = +svg.dataset.first + mark.getAttribute("x") * perUnit, what = mark.dataset.of;
  tip.textContent = `${mark.getAttribute("class")}${what ? " · " + what : ""} · ${say(mark.getAttribute("width") * perUnit)}`
    + ` · from ${start.toFixed(2)} s`;
  const right = event.clientX + 14 + tip.offsetWidth > innerWidth;
  tip.style.left = (right ? event.clientX - 10 - tip.offsetWidth : event.clientX + 14) + "px";
  tip.style.top = event.clientY + 16 + "px";
});
svg.addEventListener("pointerleave", () => { tip.hidden = true; });

let zoom = 1;
function widen(factor, at = scroll.clientWidth / 2) {
  const share = (scroll.scrollLeft + at) / time.offsetWidth;
  zoom = Math.min(64, Math.max(1, zoom * factor));
  time.style.width = 100 * zoom + "%";
  scroll.scrollLeft = share * time.offsetWidth - at;
}
document.querySelector(".wider").addEventListener("click", () => widen(2));
document.querySelector(".narrower").addEventListener("click", () => widen(0.5));
scroll.addEventListener("wheel", (event) => {
  if (!event.ctrlKey && !event.metaKey) return;
  event.preventDefault();
  widen(Math.exp(-event.deltaY / 200), event.clientX - scroll.getBoundingClientRect().left);
}, { passive: false });
