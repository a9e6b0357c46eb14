// The live loss plot: the body of gr.HTML's js_on_load, a function of (element, trigger, props, server, upload, watch).
// It runs anew each time Gradio mounts the component, and that is every time its tab is selected.

const find = (selector) => element.querySelector(selector);
const host = element.closest("#loss-plot") ?? element; // carries the data attributes, for tests and scripts
const canvas = find("canvas");
const pen = canvas.getContext("2d");
const [empty, reset, tip, details] = [".empty", ".reset", ".tip", "details"].map(find);

// What was drawn outlives the component, so that coming back to the tab shows the same curve at once, zoom included.
const startOver = (run) =>
  (window.lossPlot = { run, stride: 0, count: 0, heldOutCount: 0, train: [], heldOut: [], smooth: [], total: 0, zoom: null });
let plot = window.lossPlot ?? startOver("");
let cursor = null; // the step under the crosshair
let drag = null; // {from, to} in pixels while the mouse draws a range
let behind = false; // the last request failed

// --- Points: ask for what is missing, one request at a time ---

let asking = false;
let askAgain = false;
let pause = 1000;

async function ask() {
  if (asking) return void (askAgain = true);
  asking = true;
  do {
    askAgain = false;
    const run = props.value?.run ?? "";
    if (run !== plot.run) plot = startOver(run); // never a moment of another run's points
    schedule();
    if (!run) break;
    // A failed call answers undefined (Gradio's client logs it), and so does one that hangs.
    const late = new Promise((resolve) => setTimeout(resolve, 20000));
    const answer = await Promise.race([server.loss_points(run, plot.stride, plot.count, plot.heldOutCount), late]);
    if (!element.isConnected) return; // a later mount shares the points: these would be added twice
    behind = !answer;
    if (!answer) {
      setTimeout(() => element.isConnected && ask(), pause);
      pause = Math.min(2 * pause, 30000);
      break;
    }
    pause = 1000;
    if ((props.value?.run ?? "") === run) take(answer);
    else askAgain = true;
  } while (askAgain);
  asking = false;
  schedule();
}

function take(answer) {
  if (answer.restart) Object.assign(plot, { train: [], heldOut: [], heldOutCount: 0 });
  append(plot.train, answer.train);
  append(plot.heldOut, answer.held_out);
  plot.stride = answer.stride;
  plot.count = answer.count;
  plot.heldOutCount += answer.held_out.length;
  plot.total = answer.total_steps;
  // An exponential moving average with bias correction. Its memory is counted in steps, not in points, so that the
  // line keeps its shape when the server halves the points.
  const memory = Math.max(6, plot.total / 50);
  let sum = 0;
  let weight = 0;
  plot.smooth = plot.train.map(([step, loss], i) => {
    const keep = Math.exp((i ? plot.train[i - 1][0] - step : -1) / memory);
    sum = keep * sum + (1 - keep) * loss;
    weight = keep * weight + (1 - keep);
    return [step, sum / weight];
  });
}

function append(points, more) {
  for (const [step, loss] of more) {
    if (!Number.isFinite(loss)) continue;
    // A run resumed from a checkpoint repeats some steps: what it says now is what holds.
    while (points.length && points.at(-1)[0] >= step) points.pop();
    points.push([step, loss]);
  }
}

// --- Numbers and places ---

const whole = (number) => number.toLocaleString("en-US", { maximumFractionDigits: 0 });
const short = (loss) => (loss >= 100 ? whole(loss) : loss >= 0.1 || loss <= 0 ? loss.toFixed(2) : loss.toPrecision(2));
const exact = (loss) => (loss >= 100 ? loss.toFixed(1) : loss >= 0.1 || loss <= 0 ? loss.toFixed(3) : loss.toPrecision(3));
const best = () => plot.heldOut.reduce((low, point) => (!low || point[1] < low[1] ? point : low), null);
const lastStep = () => Math.max(0, plot.train.at(-1)?.[0] ?? 0, plot.heldOut.at(-1)?.[0] ?? 0);
const wholeRange = () => [0, Math.max(1, plot.total, lastStep())];

/** Index of the last point at or before a step, -1 when there is none. */
function lastBefore(points, step) {
  let [low, high] = [0, points.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (points[middle][0] <= step) low = middle + 1;
    else high = middle;
  }
  return low - 1;
}

function nearest(step) {
  const i = lastBefore(plot.train, step);
  const [before, after] = [plot.train[i], plot.train[i + 1]];
  return !before || (after && after[0] - step < step - before[0]) ? i + 1 : i;
}

/** 1, 2 or 5 times a power of ten: the smallest such distance that gives at most about `wanted` ticks. */
function tickDistance(span, wanted) {
  const power = 10 ** Math.floor(Math.log10(span / wanted));
  return [1, 2, 5, 10].find((n) => n * power >= span / wanted) * power;
}

function ticks(from, to, distance) {
  const count = Math.floor(to / distance + 1e-9) - Math.ceil(from / distance - 1e-9);
  return Array.from({ length: count + 1 }, (_, i) => (Math.ceil(from / distance - 1e-9) + i) * distance);
}

/** Where everything goes: the plot's rectangle, its two ranges and the functions between loss, step and pixel. */
function layOut(width, height) {
  const [from, to] = plot.zoom ?? wholeRange();
  const narrow = width < 480;
  const inside = (points) => points.slice(Math.max(0, lastBefore(points, from)), lastBefore(points, to) + 2).map((point) => point[1]);
  let shown = inside(plot.train);
  if (shown.length >= 40) {
    // One spike must not press the rest flat: raw points beyond the 98th percentile may leave through the top.
    shown.sort((a, b) => a - b);
    shown = [shown[0], shown[Math.floor(0.98 * shown.length)]];
  }
  shown = [...shown, ...inside(plot.smooth), ...inside(plot.heldOut)];
  let [low, high] = shown.length ? [Math.min(...shown), Math.max(...shown)] : [0, 1];
  if (high - low < 1e-3 * Math.abs(high)) [low, high] = [low - 0.05 * Math.abs(high || 1), high + 0.05 * Math.abs(high || 1)];
  const [top, bottom] = [28, height - 26];
  const distance = tickDistance(high - low, Math.max(2, (bottom - top) / 42));
  [low, high] = [Math.floor(low / distance + 1e-9) * distance, Math.ceil(high / distance - 1e-9) * distance];
  const digits = Math.max(0, -Math.floor(Math.log10(distance) + 1e-9));
  const lossTicks = ticks(low, high, distance).map((loss) => [loss, loss.toFixed(digits)]);
  pen.font = look.font;
  const left = Math.ceil(Math.max(...lossTicks.map(([, text]) => pen.measureText(text).width))) + 10;
  // The names at the line ends always fit beside the plot, also when the lines reach its end; stacked where it is narrow.
  pen.font = look.bold;
  const room = pen.measureText("held-out").width;
  const right = width - Math.ceil(narrow ? room : room + pen.measureText(" 0.000").width) - 12;
  const x = (step) => left + ((step - from) / (to - from)) * (right - left);
  const y = (loss) => bottom - ((loss - low) / (high - low)) * (bottom - top);
  const step = (px) => from + ((Math.min(right, Math.max(left, px)) - left) / (right - left)) * (to - from);
  return { width, height, narrow, left, right, top, bottom, from, to, x, y, step, lossTicks };
}

// --- Drawing ---

let look = null; // colours and fonts as the theme has them now
let view = null;
let frame = 0;

function readLook() {
  const style = getComputedStyle(element);
  const colour = (name) => style.getPropertyValue(name).trim();
  const font = (weight) => `${weight} ${style.fontSize} ${style.fontFamily}`;
  return {
    font: font(400), bold: font(600), ground: style.backgroundColor, ink: style.color,
    quiet: colour("--loss-quiet"), grid: colour("--border-color-primary"),
    train: colour("--loss-train"), trainInk: colour("--loss-train-ink"),
    heldOut: colour("--loss-held"), heldOutInk: colour("--loss-held-ink"),
  };
}

function schedule() {
  frame ||= requestAnimationFrame(draw);
}

function draw() {
  frame = 0;
  const [width, height] = [canvas.clientWidth, canvas.clientHeight];
  if (!width || !element.isConnected) return; // hidden: ResizeObserver calls when it shows again
  const [pixelsWide, pixelsHigh] = [Math.round(width * devicePixelRatio), Math.round(height * devicePixelRatio)];
  if (canvas.width !== pixelsWide || canvas.height !== pixelsHigh) Object.assign(canvas, { width: pixelsWide, height: pixelsHigh });
  look ??= readLook();
  pen.setTransform(devicePixelRatio, 0, 0, devicePixelRatio, 0, 0);
  pen.clearRect(0, 0, width, height);
  view = layOut(width, height);
  const some = plot.train.length + plot.heldOut.length > 0;
  drawAxes(some);
  if (some) {
    drawCurves();
    drawEnds();
  }
  drawRange();
  drawCrosshair();
  empty.hidden = some;
  reset.hidden = !plot.zoom;
  if (plot.zoom) reset.textContent = `Steps ${whole(plot.zoom[0])}–${whole(plot.zoom[1])} · Show all`;
  const facts = { run: plot.run, points: plot.train.length, heldOut: plot.heldOut.length, lastStep: lastStep() };
  Object.assign(host.dataset, facts);
  describeSoon();
}

function line(points, colour, width) {
  pen.beginPath();
  for (const [step, loss] of points) pen.lineTo(view.x(step), view.y(loss));
  Object.assign(pen, { strokeStyle: colour, lineWidth: width, lineJoin: "round", lineCap: "round" });
  pen.stroke();
}

function dot([step, loss], colour, radius) {
  pen.beginPath();
  pen.arc(view.x(step), Math.max(view.top - 4, view.y(loss)), radius, 0, 7);
  pen.fillStyle = colour;
  pen.fill();
}

function text(words, x, y, colour, font, align = "left") {
  // A halo of the ground colour keeps words readable over lines.
  Object.assign(pen, { font, textAlign: align, textBaseline: "middle", lineWidth: 4, strokeStyle: look.ground, fillStyle: colour, lineJoin: "round" });
  pen.strokeText(words, x, y);
  pen.fillText(words, x, y);
}

function drawAxes(some) {
  const { left, right, top, bottom, from, to, x, y, width, lossTicks } = view;
  pen.lineWidth = 1;
  pen.strokeStyle = look.grid;
  for (const [loss, words] of lossTicks) {
    const level = Math.round(y(loss)) + 0.5;
    pen.globalAlpha = level > bottom - 1 ? 1 : 0.55;
    pen.beginPath();
    pen.moveTo(some ? left : 0, level);
    pen.lineTo(some ? right : width, level);
    pen.stroke();
    pen.globalAlpha = 1;
    if (some) text(words, left - 8, level, look.quiet, look.font, "right");
    pen.lineWidth = 1;
    pen.strokeStyle = look.grid;
  }
  if (behind) text("The server does not answer. Trying again.", width / 2, 8, look.quiet, look.font, "center");
  if (!some) return;
  text("loss", 0, 8, look.quiet, look.font);
  text("step", width, bottom + 17, look.quiet, look.font, "right");
  const distance = Math.max(1, tickDistance(to - from, Math.max(2, (right - left) / 75)));
  const marks = ticks(from, to, distance);
  if (!plot.zoom) {
    // The end of the run is always named: it says how far there is to go.
    while (x(to) - x(marks.at(-1)) < 12 + 7 * whole(to).length) marks.pop();
    marks.push(to);
  }
  for (const mark of marks) text(whole(mark), x(mark), bottom + 17, look.quiet, look.font, "center");
}

function drawCurves() {
  const { left, right, top, bottom, from, to } = view;
  const near = (points) => points.slice(Math.max(0, lastBefore(points, from)), lastBefore(points, to) + 2);
  pen.save();
  pen.beginPath();
  pen.rect(left - 6, top - 6, right - left + 12, bottom - top + 12); // dots on the border stay round
  pen.clip();
  pen.globalAlpha = 0.35;
  line(near(plot.train), look.train, 1);
  pen.globalAlpha = 1;
  line(near(plot.smooth), look.train, 2);
  if (plot.smooth.length) dot(plot.smooth.at(-1), look.train, 3);
  const heldOut = near(plot.heldOut);
  line(heldOut, look.heldOut, 2);
  for (const point of heldOut) {
    dot(point, look.ground, 5);
    dot(point, look.heldOut, 3.5);
  }
  const low = best();
  if (low) {
    pen.beginPath();
    pen.arc(view.x(low[0]), view.y(low[1]), 7.5, 0, 7);
    Object.assign(pen, { strokeStyle: look.heldOut, lineWidth: 1.5 });
    pen.stroke();
  }
  pen.restore();
}

/** The name and the last number of each line, at its end; the name alone where the zoom cuts the line off. */
function drawEnds() {
  const { from, to, x, y, narrow, top, bottom, right } = view;
  const ends = [];
  for (const [name, points, ink] of [["training", plot.smooth, look.trainInk], ["held-out", plot.heldOut, look.heldOutInk]]) {
    const i = lastBefore(points, to);
    const [here, next] = [points[i], points[i + 1]];
    if (!here || (!next && here[0] < from && name === "training")) continue;
    const share = next ? (to - here[0]) / (next[0] - here[0]) : 0;
    const loss = next ? here[1] + share * (next[1] - here[1]) : here[1];
    ends.push({ name, ink, loss, level: y(loss), end: next ? right : x(here[0]), value: next ? "" : short(loss) });
  }
  if (!ends.length) return;
  const column = Math.min(right, Math.max(...ends.map(({ end }) => end))) + 12;
  for (const { name, end, level } of ends) {
    if (name !== "held-out" || column - 12 - end < 14) continue;
    // Measured only now and then: its last value carries on, dotted, to its name beside the newer training step.
    pen.setLineDash([1, 5]);
    line([[view.step(end + 10), 0], [view.step(column - 12), 0]].map(([step]) => [step, ends.find((e) => e.name === name).loss]), look.heldOut, 1.5);
    pen.setLineDash([]);
  }
  const tall = narrow ? 31 : 17;
  const clamp = (level) => Math.min(bottom - tall / 2, Math.max(top + tall / 2 - 8, level));
  ends.sort((a, b) => a.level - b.level);
  for (const end of ends) end.level = clamp(end.level);
  if (ends.length === 2 && ends[1].level - ends[0].level < tall) {
    const middle = Math.min(bottom - tall, Math.max(top + tall - 8, (ends[0].level + ends[1].level) / 2));
    [ends[0].level, ends[1].level] = [middle - tall / 2, middle + tall / 2];
  }
  for (const { name, value, level, ink } of ends) {
    text(name, column, narrow && value ? level - 7 : level, ink, look.font);
    const beside = column + pen.measureText(name + " ").width;
    if (value) text(value, narrow ? column : beside, narrow ? level + 7 : level, ink, look.bold);
  }
}

function drawRange() {
  if (!drag || Math.abs(drag.to - drag.from) < 3) return;
  const [a, b] = [drag.from, drag.to].map((px) => view.x(view.step(px))).sort((p, q) => p - q);
  Object.assign(pen, { globalAlpha: 0.14, fillStyle: look.train });
  pen.fillRect(a, view.top - 6, b - a, view.bottom - view.top + 6);
  pen.globalAlpha = 1;
}

function drawCrosshair() {
  const i = cursor === null || drag ? -1 : nearest(cursor);
  tip.hidden = !plot.train[i];
  if (tip.hidden) return;
  const [step] = plot.train[i];
  const at = Math.round(view.x(step)) + 0.5;
  Object.assign(pen, { strokeStyle: look.quiet, lineWidth: 1, globalAlpha: 0.6 });
  pen.beginPath();
  pen.moveTo(at, view.top - 6);
  pen.lineTo(at, view.bottom);
  pen.stroke();
  pen.globalAlpha = 1;
  const heldOut = plot.heldOut[lastBefore(plot.heldOut, step)];
  for (const [point, colour] of [[plot.train[i], look.train], [plot.smooth[i], look.train], [heldOut?.[0] === step && heldOut, look.heldOut]]) {
    if (!point) continue;
    dot(point, look.ground, 5);
    dot(point, colour, 3.5);
  }
  find(".at").textContent = `step ${whole(step)}`;
  find(".raw b").textContent = exact(plot.train[i][1]);
  find(".smooth b").textContent = exact(plot.smooth[i][1]);
  find(".held span").textContent = heldOut && heldOut[0] !== step ? `held-out, at ${whole(heldOut[0])}` : "held-out";
  find(".held b").textContent = heldOut ? exact(heldOut[1]) : "–";
  const beside = at + 14 + tip.offsetWidth > view.width ? at - 14 - tip.offsetWidth : at + 14;
  tip.style.transform = `translate(${Math.max(0, beside)}px, ${view.top - 4}px)`;
}

// --- In words: for screen readers and whoever prefers a table; every few seconds at most ---

let described = 0;
let describing = 0;

function describeSoon() {
  describing ||= setTimeout(describe, Math.max(0, described + 4000 - Date.now()));
}

function describe() {
  [describing, described] = [0, Date.now()];
  const [training, heldOut, low] = [plot.smooth.at(-1), plot.heldOut.at(-1), best()];
  const parts = [`Loss curve: step ${whole(lastStep())} of ${whole(wholeRange()[1])}`];
  if (training) parts.push(`training loss ${short(training[1])}`);
  if (heldOut) parts.push(`held-out loss ${short(heldOut[1])}, best ${short(low[1])} at step ${whole(low[0])}`);
  const words = training || heldOut ? parts.join(", ") : empty.textContent;
  if (canvas.ariaLabel !== words) canvas.ariaLabel = words;
  if (details.open) fillTable();
}

/** Every n-th, counted from the end, so that the newest is always there. */
const thin = (list, most) => list.filter((_, i) => (list.length - 1 - i) % Math.ceil(list.length / most) === 0);

function fillTable() {
  const rows = new Map();
  const heldOut = thin(plot.heldOut, 50);
  const indexes = thin([...plot.train.keys()], 200 - heldOut.length);
  for (const i of indexes) rows.set(plot.train[i][0], [plot.train[i][1], plot.smooth[i][1], null]);
  for (const [step, loss] of heldOut) rows.set(step, [...(rows.get(step) ?? [null, null]).slice(0, 2), loss]);
  const cell = (tag, words) => Object.assign(document.createElement(tag), { textContent: words });
  const sorted = [...rows].sort(([a], [b]) => b - a);
  find("tbody").replaceChildren(
    ...sorted.map(([step, losses]) => {
      const row = document.createElement("tr");
      row.append(Object.assign(cell("th", whole(step)), { scope: "row" }), ...losses.map((loss) => cell("td", loss === null ? "" : exact(loss))));
      return row;
    }),
  );
  find("caption").textContent = `${whole(indexes.length)} of ${whole(plot.train.length)} training points, newest first`;
}

// --- Hands: pointer, touch, keyboard ---

function zoomTo(from, to) {
  const [start, end] = wholeRange();
  [from, to] = [Math.max(start, from), Math.min(end, to)];
  const points = lastBefore(plot.train, to) - lastBefore(plot.train, from);
  if (from <= start && to >= end) plot.zoom = null;
  else if (points >= 2) plot.zoom = [from, to]; // less would be an empty frame
  schedule();
}

function showAll() {
  [plot.zoom, drag] = [null, null];
  schedule();
}

canvas.addEventListener("pointerdown", (event) => {
  if (event.button || !view || !plot.train.length) return;
  // A finger reads the curve; only mouse and pen draw a range, or scrolling the page would zoom.
  if (event.pointerType !== "touch") {
    canvas.setPointerCapture(event.pointerId);
    drag = { from: event.offsetX, to: event.offsetX };
  }
  cursor = view.step(event.offsetX);
  schedule();
});
canvas.addEventListener("pointermove", (event) => {
  if (!view) return;
  if (drag) drag.to = event.offsetX;
  cursor = view.step(event.offsetX);
  schedule();
});
canvas.addEventListener("pointerup", () => {
  const range = drag && [drag.from, drag.to].map(view.step).sort((a, b) => a - b);
  const wide = drag && Math.abs(drag.to - drag.from) > 6;
  drag = null;
  if (wide) zoomTo(...range);
  schedule();
});
function leave() {
  [cursor, drag] = [null, null];
  schedule();
}
canvas.addEventListener("pointercancel", leave);
canvas.addEventListener("pointerleave", (event) => event.pointerType !== "touch" && leave()); // a tapped point stays
canvas.addEventListener("blur", leave);
canvas.addEventListener("dblclick", showAll);
reset.addEventListener("click", () => (showAll(), canvas.focus()));

canvas.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && (plot.zoom || drag)) return showAll();
  const [from, to] = plot.zoom ?? wholeRange();
  const [first, last] = [lastBefore(plot.train, from - 1e-9) + 1, lastBefore(plot.train, to)];
  const now = cursor === null ? last + 1 : nearest(cursor);
  const jump = event.shiftKey ? 10 : 1;
  const target = { ArrowLeft: now - jump, ArrowRight: now + jump, Home: first, End: last }[event.key];
  const scale = { "+": 0.5, "=": 0.5, "-": 2 }[event.key];
  if ((target === undefined && !scale) || last < first || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault(); // the page does not scroll
  if (scale) {
    const [centre, half] = [cursor ?? (from + to) / 2, (scale * (to - from)) / 2];
    return zoomTo(centre - half, centre + half);
  }
  const i = Math.min(last, Math.max(first, target));
  cursor = plot.train[i][0];
  const heldOut = plot.heldOut.find(([step]) => step === cursor);
  find(".spoken").textContent =
    `Step ${whole(cursor)}: training ${exact(plot.train[i][1])}, smoothed ${exact(plot.smooth[i][1])}` +
    (heldOut ? `, held-out ${exact(heldOut[1])}` : "");
  schedule();
});

details.open = Boolean(window.lossPlotTable);
details.addEventListener("toggle", () => {
  window.lossPlotTable = details.open;
  if (details.open) fillTable();
});

// --- What else asks for a new drawing: size, theme, another screen's pixels ---

const themes = new MutationObserver(refresh);
const sizes = new ResizeObserver(refresh);
function refresh() {
  if (!element.isConnected) return void (themes.disconnect(), sizes.disconnect()); // or every visit of the tab would leave a pair
  look = null;
  schedule();
}
themes.observe(document.body, { attributes: true, attributeFilter: ["class"] });
sizes.observe(canvas);
(function watchPixelRatio() {
  if (!element.isConnected) return;
  matchMedia(`(resolution: ${devicePixelRatio}dppx)`).addEventListener("change", () => (watchPixelRatio(), refresh()), { once: true });
})();

watch("value", ask);
ask();
