// The curves of one run, or of several on the same axes: numbers from /v1/runs/{id}/metrics, drawn by uPlot.
import { say, send } from "/static/api.js";

const POINTS = 5000, MARGIN = 1.08;
const axes = document.querySelectorAll("[data-axis]"), alone = !axes.length;
const plots = new Map();
let box = null, axis = "step", tables = [], held = [];

const FORMATS = {
  share: (value) => `${(100 * value).toFixed(1)}%`,
  whole: (value) => Math.round(value).toLocaleString("en"),
  plain: (value) => (Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en") : String(+value.toPrecision(3))),
};
const AXES = { step: "step #", tokens_trained: "# tokens", seconds_total: "# s" }, nothing = "–";

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

/** The mean of each point and its neighbours, a twentieth of the curve in all. As plots.running_mean. */
function runningMean(values) {
  const reach = Math.floor(values.length / 40);
  return values.map((value, centre) => {
    if (value === null) return null;
    const near = values.slice(Math.max(0, centre - reach), centre + reach + 1).filter((one) => one !== null);
    return near.reduce((sum, one) => sum + one, 0) / near.length;
  });
}

/** What a figure draws: [{xs, ys, stroke, width, dots, shows}]. `shows` is the readout that the line belongs to. */
function linesOf(figure) {
  const own = figure.querySelector(".now.dots"), found = [];
  for (const readout of figure.querySelectorAll(".now[data-key]")) {
    const { columns } = tables[readout.dataset.at], xs = columns[axis], ys = columns[readout.dataset.key];
    const strong = colour(`--line-${readout.dataset.line}`), pale = `${strong}59`;
    const dots = "held" in figure.dataset ? held[readout.dataset.at] ?? [] : [], several = dots.length && !alone;
    if (xs?.length && ys?.some((y) => y !== null)) {
      const smooth = ys.length > 40;
      if (smooth && alone) found.push({ xs, ys, stroke: pale, width: 1, shows: readout });
      const shows = (smooth && alone) || several ? null : readout;
      found.push({ xs, ys: smooth ? runningMean(ys) : ys, stroke: several ? pale : strong, width: 1.8, shows });
    }
    if (own) own.hidden = !dots.length;
    if (dots.length) {
      const looks = alone ? { stroke: colour("--ink"), width: 0, shows: own } : { stroke: strong, width: 1.8, shows: readout };
      found.push({ xs: dots.map(([step]) => across(columns, step)), ys: dots.map(([, y]) => y), dots: true, ...looks });
    }
  }
  return found;
}

/** Where a step lies on the axis. */
function across(columns, step) {
  if (axis === "step") return step;
  const at = columns.step.findLastIndex((one) => one <= step);
  return at < 0 ? 0 : columns[axis]?.[at] ?? 0;
}

/** Whether a part of the axis was dragged out: it does not reach to an end of what there is. */
function zoomed({ data: [xs] }, low, high) {
  return low > xs[0] || high < xs.at(-1);
}

function scaleOf(figure) {
  const zero = "zero" in figure.dataset;
  return (self, low, high) => {
    if (low === null || high === null) return [0, 1];
    const bottom = zero ? Math.min(0, low) : low - (high - low || 1) * 0.06;
    return [bottom, high === bottom ? bottom + 1 : bottom + (high - bottom) * MARGIN];
  };
}

function optionsOf(figure, lines) {
  const plot = figure.querySelector(".plot"), format = FORMATS[figure.querySelector(".now").dataset.format];
  const muted = colour("--muted"), rule = colour("--rule"), font = "11px system-ui, sans-serif";
  const tick = (value) => (value >= 10000 ? `${+(value / 1000).toPrecision(3)}k` : format(value).replace(".0%", "%"));
  const wide = (value) => (value >= 1e6 ? `${+(value / 1e6).toPrecision(3)}M` : value >= 10000 ? `${+(value / 1000).toPrecision(3)}k` : String(+value.toPrecision(6)));
  return {
    width: plot.clientWidth,
    height: plot.clientHeight,
    legend: { show: false },
    padding: [6, 16, 0, 0],
    scales: { x: { time: false, range: (self, low, high) => (zoomed(self, low, high) ? [low, high] : [0, Math.max(high, 1)]) }, y: { range: scaleOf(figure) } },
    cursor: { sync: { key: "potstill" }, y: false, points: { size: 6 }, drag: { x: true, y: false } },
    axes: [
      { stroke: muted, font, size: 26, gap: 4, grid: { show: false }, ticks: { stroke: rule, width: 1, size: 4 }, values: (self, all) => all.map(wide), space: 60 },
      { stroke: muted, font, size: 46, gap: 5, grid: { stroke: rule, width: 1 }, ticks: { show: false }, values: (self, all) => all.map(tick), space: 34 },
    ],
    series: [{}, ...lines.map(({ stroke, width, dots, xs }) => ({
      stroke, width, spanGaps: true,
      points: dots ? { show: true, size: 7, fill: stroke, stroke } : { show: xs.length === 1, size: 6, fill: stroke },
    }))],
    hooks: { setCursor: [(self) => readOut(figure, lines, self)] },
  };
}

/** Writes what the lines are at the cursor, or at their end, beside their names. */
function readOut(figure, lines, plot) {
  const at = plot?.cursor.idx ?? null, x = at === null ? null : FORMATS.whole(plot.data[0][at]);
  figure.querySelector(".at").textContent = x === null ? "" : AXES[axis].replace("#", x);
  lines.forEach(({ shows, ys }, number) => {
    if (!shows) return;
    const value = (at === null ? ys : plot.data[number + 1].slice(0, at + 1)).findLast((y) => y !== null && y !== undefined);
    shows.textContent = `${shows.dataset.label} ${value === undefined ? nothing : FORMATS[shows.dataset.format](value)}`;
  });
}

function describe(figure, lines) {
  const title = figure.querySelector("b").textContent.trim(), plot = figure.querySelector(".plot");
  const ends = lines.filter(({ shows }) => shows).map(({ shows, ys }) => {
    const [first, last] = [ys.find((y) => y !== null), ys.findLast((y) => y !== null)].map(FORMATS[shows.dataset.format]);
    return `${shows.dataset.label} from ${first} to ${last}`;
  });
  plot.setAttribute("aria-label", `${title}: ${ends.join("; ") || "not measured"}`);
}

function draw(figure) {
  const plot = figure.querySelector(".plot"), lines = linesOf(figure);
  plots.get(figure)?.destroy();
  plots.delete(figure);
  describe(figure, lines);
  plot.querySelector(".absent")?.remove();
  if (!lines.length) {
    const absent = document.createElement("p");
    absent.className = "absent";
    absent.textContent = "not measured";
    plot.append(absent);
    return;
  }
  const data = uPlot.join(lines.map(({ xs, ys }) => [xs, ys]));
  plots.set(figure, new uPlot(optionsOf(figure, lines), data, plot));
  readOut(figure, lines, null);
}

function drawAll() {
  for (const figure of box.querySelectorAll(".curve")) draw(figure);
}

async function load() {
  const keys = new Set([...box.querySelectorAll(".now[data-key]")].map((one) => one.dataset.key).concat("tokens_trained", "seconds_total"));
  const ask = (run) => send("GET", `/v1/runs/${run}/metrics?max_points=${POINTS}&keys=${[...keys].join(",")}`);
  try {
    tables = await Promise.all(box.dataset.runs.split(",").map(ask));
    drawAll();
  } catch (error) { say(error.message, true); }
}

/** A step as it was reported goes to the end; one that was done again, after a run went back, asks for all. */
function add(values) {
  const { columns } = tables[0], last = columns.step.at(-1) ?? 0;
  if (values.step <= last || columns.step.length > 2 * POINTS) return load();
  for (const key of Object.keys(columns)) columns[key].push(values[key] ?? null);
  return null;
}

/** The figures of the page, which may come only with the first step. */
function begin() {
  const found = document.getElementById("curves");
  if (!found || found === box) return;
  box = found;
  held = JSON.parse(box.dataset.heldOut);
  new ResizeObserver(() => {
    for (const [figure, plot] of plots) {
      const { clientWidth: width, clientHeight: height } = figure.querySelector(".plot");
      if (width && width !== plot.width) plot.setSize({ width, height });
    }
  }).observe(box);
  load();
}

let waiting = false;

function soon() {
  if (waiting) return;
  waiting = true;
  setTimeout(() => { waiting = false; drawAll(); }, 1000);
}

document.addEventListener("run-event", ({ detail: { type, data } }) => {
  if (!tables.length) return;
  if (type === "metrics") { add(data); soon(); }
  if (type === "eval.finished" && data.stage !== "teacher") { held[0].push([data.step, data.accuracy]); soon(); }
});
document.addEventListener("colours-changed", () => { if (box) drawAll(); });
document.addEventListener("htmx:after:swap", begin);
for (const button of axes)
  button.addEventListener("click", () => {
    axis = button.dataset.axis;
    for (const one of axes) one.setAttribute("aria-pressed", String(one === button));
    drawAll();
  });
begin();
