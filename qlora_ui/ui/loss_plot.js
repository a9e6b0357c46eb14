// The live loss plot: the body of gr.HTML's js_on_load, a function of (element, trigger, props, server, upload, watch).
// It runs anew each time Gradio mounts the component: when its tab is first opened, when its column is shown again.
// Words, hands and tools have files of their own, which follow this one in the same function.

const find = (selector) => element.querySelector(selector);
const host = element.closest("#loss-plot") ?? element; // carries the data attributes, for tests and scripts
const canvas = find("canvas");
const pen = canvas.getContext("2d");
const [empty, reset, tip, details] = [".empty", ".reset", ".tip", "details"].map(find);

// What was drawn outlives the component: a later mount shows the same curve at once, zoom included.
const startOver = (run) =>
  (window.lossPlot = { run, rewinds: 0, stride: 0, count: 0, heldOutCount: 0, train: [], heldOut: [], smooth: [], total: 0, zoom: null });
let plot = window.lossPlot ?? startOver("");
const chosen = (window.lossPlotChosen ??= { log: false, hidden: [] }); // for every run that this page will show
const visible = (series) => !chosen.hidden.includes(series);
let cursor = null; // the step under the crosshair
let drag = null; // {from, to} in pixels, while the mouse marks a range
let [look, view, frame] = [null, null, 0]; // colours and fonts; where things are; the requested animation frame

// --- Points: ask for those that are missing, one request at a time ---

let [asking, askAgain, behind] = [false, false, false];

async function ask() {
  forgetOtherRun();
  if (asking) return void (askAgain = true);
  asking = true;
  do {
    askAgain = false;
    forgetOtherRun();
    if (!plot.run) break;
    const asked = plot;
    // A failed call answers undefined (Gradio's client logs it), and so does one that hangs.
    const late = new Promise((resolve) => setTimeout(resolve, 20000));
    const answer = await Promise.race([server.loss_points(...cursorOf(plot)), late]);
    if (!element.isConnected) return; // a later mount owns the points now and would get these twice
    behind = !answer;
    if (behind) setTimeout(() => element.isConnected && ask(), 2000);
    else if (plot === asked) take(answer);
  } while (askAgain && !behind);
  asking = false;
  schedule();
}

// The page's one question a second brings the points too: it says what is here, and hands over what it got for that.
window.lossPlotCursor = () => (element.isConnected && !asking && plot.run ? cursorOf(plot) : null);
window.lossPlotTake = (asked, answer) => {
  if (!element.isConnected) return;
  if (!answer || String(asked) !== String(window.lossPlotCursor())) return void ask(); // a call of the plot's own came between
  take(answer);
  schedule();
};
const cursorOf = ({ run, rewinds, stride, count, heldOutCount }) => [run, rewinds, stride, count, heldOutCount];

/** The plot never shows a moment of another run than its value names. */
function forgetOtherRun() {
  const run = props.value?.run ?? "";
  if (run !== plot.run) plot = startOver(run);
  schedule();
}

function take(answer) {
  if (answer.restart) Object.assign(plot, { train: [], heldOut: [], heldOutCount: 0 });
  append(plot.train, answer.train);
  append(plot.heldOut, answer.held_out);
  Object.assign(plot, { rewinds: answer.rewinds, stride: answer.stride, count: answer.count, total: answer.total_steps });
  plot.heldOutCount += answer.held_out.length;
  // An exponential moving average with bias correction. Its memory is counted in steps, not in points, so that the
  // line keeps its shape when the server halves the number of points.
  const memory = Math.max(6, plot.total / 50);
  let [sum, weight] = [0, 0];
  plot.smooth = plot.train.map(([step, loss], i) => {
    const keep = Math.exp((i ? plot.train[i - 1][0] - step : -1) / memory);
    [sum, weight] = [keep * sum + (1 - keep) * loss, keep * weight + (1 - keep)];
    return [step, sum / weight];
  });
}

function append(points, more) {
  for (const [step, loss] of more) {
    if (!Number.isFinite(loss)) continue;
    while (points.length && points.at(-1)[0] >= step) points.pop(); // a resumed run repeats steps: what it says now holds
    points.push([step, loss]);
  }
}

// --- Numbers and places ---

const whole = (number) => number.toLocaleString("en-US", { maximumFractionDigits: 0 });
const short = (loss) => (loss >= 1000 ? loss.toExponential(0) : loss.toFixed(loss >= 0.1 ? 2 : 3)); // five characters at most
const exact = (loss) => (loss >= 1000 ? loss.toExponential(2) : loss >= 0.1 || loss <= 0 ? loss.toFixed(3) : loss.toPrecision(3));
const best = () => plot.heldOut.reduce((low, point) => (!low || point[1] < low[1] ? point : low), null);
/** The best held-out point where at least the two newest ones are above it: what was learnt since does not carry over to unseen rows. */
const overfitFrom = () => (plot.heldOut.length > 2 && plot.heldOut.slice(-2).every(([, loss]) => loss > best()[1]) ? best() : null);
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

/** Index of the training point closest to a step: they lie one stride apart. */
const nearest = (step) => Math.max(0, lastBefore(plot.train, step + plot.stride / 2));

/** The multiples of 1, 2 or 5 times a power of ten that lie in a range, about `wanted` of them. */
function ticks(from, to, wanted, outwards = false) {
  const power = 10 ** Math.floor(Math.log10((to - from) / wanted));
  const distance = [1, 2, 5, 10].find((n) => n * power >= (to - from) / wanted - 1e-12) * power;
  const [down, up] = [(n) => Math.floor(n / distance + 1e-9), (n) => Math.ceil(n / distance - 1e-9)];
  const [first, last] = outwards ? [down(from), up(to)] : [up(from), down(to)];
  const digits = Math.max(0, -Math.floor(Math.log10(distance) + 1e-9));
  return Array.from({ length: last - first + 1 }, (_, i) => ({ at: (first + i) * distance, digits }));
}

/** The same for a logarithmic axis: 1, 2 and 5 of each decade, their powers of ten alone where these are too many. */
function logTicks(low, high, wanted) {
  const even = ticks(low, high, wanted);
  if (high / low < 4 && even.length > 1) return even;
  const [first, last] = [Math.floor(Math.log10(low)), Math.ceil(Math.log10(high))];
  const leading = (last - first) * 3 > 2 * wanted ? [1] : [1, 2, 5];
  const marks = Array.from({ length: last - first + 1 }, (_, i) => leading.map((n) => n * 10 ** (first + i))).flat();
  const [down, up] = [marks.filter((at) => at <= low).at(-1), marks.find((at) => at >= high)];
  return marks.filter((at) => at >= down && at <= up).map((at) => ({ at, digits: Math.max(0, -Math.floor(Math.log10(at) + 1e-9)) }));
}

/** The plot's rectangle, its two ranges and the ways between loss, step and pixel. */
function layOut(width, height) {
  const [from, to] = plot.zoom ?? wholeRange();
  const seen = (points) => points.slice(Math.max(0, lastBefore(points, from)), lastBefore(points, to) + 2);
  const losses = (points) => seen(points).map((point) => point[1]);
  let shown = visible("raw") ? losses(plot.train) : [];
  // One spike must not press the rest flat: of many raw points the highest 2 % may leave through the top.
  if (shown.length >= 40) shown = shown.sort((a, b) => a - b).slice(0, Math.ceil(0.98 * shown.length));
  if (visible("smooth")) shown.push(...losses(plot.smooth));
  if (visible("held")) shown.push(...losses(plot.heldOut));
  if (chosen.log) shown = shown.filter((loss) => loss > 0);
  const scale = chosen.log && shown.length ? Math.log : (loss) => loss;
  let [low, high] = shown.length ? [Math.min(...shown), Math.max(...shown)] : [0, 1];
  const least = 0.02 * Math.abs(high) || 0.02; // a flat line has a range too
  if (high - low < least) [low, high] = scale === Math.log ? [low / 1.02, high * 1.02] : [low - least, high + least];
  const [top, bottom] = [28, height - 26];
  const lossTicks = (scale === Math.log ? logTicks : ticks)(low, high, (bottom - top) / 42, true);
  [low, high] = [Math.min(low, lossTicks[0].at), Math.max(high, lossTicks.at(-1).at)].map(scale);
  pen.font = look.font;
  const left = 10 + Math.ceil(Math.max(...lossTicks.map(({ at, digits }) => pen.measureText(at.toFixed(digits)).width)));
  // The names at the line ends fit beside the plot also when the lines reach its end; stacked where it is narrow.
  const narrow = width < 480;
  pen.font = look.bold;
  const right = width - 12 - Math.ceil(pen.measureText(narrow ? "held-out" : "held-out 0.000").width);
  const x = (step) => left + ((step - from) / (to - from)) * (right - left);
  // A loss of zero has no logarithm: it leaves through the bottom.
  const y = (loss) => bottom - (Math.max(-1e3, scale(Math.max(0, loss)) - low) / (high - low)) * (bottom - top);
  const place = ([step, loss]) => [x(step), y(loss)];
  const step = (px) => from + ((Math.min(right, Math.max(left, px)) - left) / (right - left)) * (to - from);
  return { width, narrow, left, right, top, bottom, from, to, seen, x, y, place, step, lossTicks };
}

// --- Drawing ---

function readLook() {
  const style = getComputedStyle(element);
  const colour = (name) => style.getPropertyValue(name).trim();
  const font = (weight) => `${weight} ${style.fontSize} ${style.fontFamily}`;
  return {
    font: font(400), bold: font(600), ground: style.backgroundColor,
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
  const pixels = { width: Math.round(width * devicePixelRatio), height: Math.round(height * devicePixelRatio) };
  if (canvas.width !== pixels.width || canvas.height !== pixels.height) Object.assign(canvas, pixels);
  pen.setTransform(devicePixelRatio, 0, 0, devicePixelRatio, 0, 0);
  pen.clearRect(0, 0, width, height);
  look ??= readLook();
  view = layOut(width, height);
  const some = plot.train.length + plot.heldOut.length > 0;
  drawAxes(some);
  if (some) drawCurves();
  if (some) drawEnds();
  if (drag) {
    const [a, b] = [drag.from, drag.to].map((px) => view.x(view.step(px)));
    Object.assign(pen, { globalAlpha: 0.14, fillStyle: look.train });
    pen.fillRect(a, view.top - 6, b - a, view.bottom - view.top + 6);
    pen.globalAlpha = 1;
  }
  drawCrosshair();
  empty.hidden = some;
  reset.hidden = !plot.zoom;
  if (plot.zoom) reset.textContent = `Steps ${whole(plot.zoom[0])}–${whole(plot.zoom[1])} · Show all`;
  Object.assign(host.dataset, { run: plot.run, points: plot.train.length, heldOut: plot.heldOut.length, lastStep: lastStep() });
  host.dataset.overfitFrom = overfitFrom()?.[0] ?? "";
  describing ||= setTimeout(describe, Math.max(0, described + 4000 - Date.now()));
}

function line(places, colour, width = 1, alpha = 1) {
  pen.beginPath();
  for (const [x, y] of places) pen.lineTo(x, y);
  Object.assign(pen, { strokeStyle: colour, lineWidth: width, globalAlpha: alpha, lineJoin: "round", lineCap: "round" });
  pen.stroke();
  pen.globalAlpha = 1;
}

/** A point with a gap around it, so that it stands out of the lines. */
function dot(point, colour, radius) {
  const [x, y] = view.place(point);
  for (const [size, fill] of [[radius + 1.5, look.ground], [radius, colour]]) {
    pen.beginPath();
    pen.arc(x, Math.max(view.top - 4, y), size, 0, 7);
    pen.fillStyle = fill;
    pen.fill();
  }
}

/** Words with a halo of the ground colour, which keeps them readable over lines. */
function text(words, x, y, colour, textAlign = "left", font = look.font) {
  Object.assign(pen, { font, textAlign, textBaseline: "middle" });
  Object.assign(pen, { lineWidth: 4, lineJoin: "round", strokeStyle: look.ground, fillStyle: colour });
  pen.strokeText(words, x, y);
  pen.fillText(words, x, y);
}

function drawAxes(some) {
  const { left, right, bottom, to, from, x, y, width, lossTicks } = view;
  for (const { at, digits } of lossTicks) {
    const level = Math.round(y(at)) + 0.5;
    line([[some ? left : 0, level], [some ? right : width, level]], look.grid, 1, 0.55);
    if (some) text(at.toFixed(digits), left - 8, level, look.quiet, "right");
  }
  line([[some ? left : 0, bottom + 0.5], [some ? right : width, bottom + 0.5]], look.grid);
  if (behind) text("The server does not answer. Trying again.", left + 8, bottom - 12, look.quiet);
  if (!some) return;
  text(chosen.log ? "loss, logarithmic" : "loss", 0, 8, look.quiet);
  const marks = ticks(from, to, Math.min(to - from, Math.max(2, (right - left) / 75))).map(({ at }) => at);
  if (!plot.zoom) {
    // The end of the run is always named: it says how far there is to go.
    while (x(to) - x(marks.at(-1)) < 12 + 7 * whole(to).length) marks.pop();
    marks.push(to);
  }
  for (const mark of marks) text(whole(mark), x(mark), bottom + 17, look.quiet, "center");
  text("step", right + 8 + pen.measureText(whole(to)).width / 2, bottom + 17, look.quiet);
}

function drawCurves() {
  const { left, right, top, bottom, from, to, seen, place } = view;
  const heldOut = visible("held") ? seen(plot.heldOut) : [];
  pen.save();
  pen.beginPath();
  pen.rect(left, top - 6, right - left, bottom - top + 6);
  pen.clip();
  if (visible("held")) shadeOverfitting();
  if (visible("raw")) line(seen(plot.train).map(place), look.train, 1, 0.35);
  if (visible("smooth")) line(seen(plot.smooth).map(place), look.train, 2);
  line(heldOut.map(place), look.heldOut, 2);
  pen.restore(); // dots on the border stay round
  const inside = (point) => point && point[0] >= from && point[0] <= to;
  const radius = Math.min(3.5, Math.max(1.5, (right - left) / heldOut.length / 4));
  if (visible("smooth") && inside(plot.smooth.at(-1))) dot(plot.smooth.at(-1), look.train, 3);
  for (const point of heldOut.filter(inside)) dot(point, look.heldOut, radius);
  if (visible("held") && inside(best())) {
    pen.beginPath();
    pen.arc(...place(best()), 7.5, 0, 7);
    Object.assign(pen, { strokeStyle: look.heldOut, lineWidth: 1.5 });
    pen.stroke();
  }
}

function shadeOverfitting() {
  const { left, right, top, bottom, x } = view;
  const from = overfitFrom();
  if (!from) return;
  const [start, end] = [Math.max(left, x(from[0])), Math.min(right, x(lastStep()))];
  Object.assign(pen, { globalAlpha: 0.1, fillStyle: look.heldOut });
  pen.fillRect(start, top - 6, end - start, bottom - top + 6);
  pen.globalAlpha = 1;
  pen.font = look.font;
  if (end - start > pen.measureText("overfitting").width + 16) text("overfitting", start + 8, top + 6, look.heldOutInk);
}

/** The name and the last number of each line, at its end; the name alone where the zoom cuts the line off. */
function drawEnds() {
  const { to, from, x, y, narrow, top, bottom, right } = view;
  const ends = [];
  const training = visible("smooth") ? plot.smooth : visible("raw") ? plot.train : [];
  const measured = visible("held") ? plot.heldOut : [];
  for (const [name, points, ink] of [["training", training, look.trainInk], ["held-out", measured, look.heldOutInk]]) {
    const i = lastBefore(points, to);
    const [last, next] = [points[i], points[i + 1]];
    if (!last || (last[0] < from && !next)) continue; // the line ends left of the zoom
    const loss = next ? last[1] + ((to - last[0]) / (next[0] - last[0])) * (next[1] - last[1]) : last[1];
    ends.push({ name, ink, value: next ? "" : short(loss), end: next ? right : x(last[0]), level: y(loss) });
  }
  const column = 12 + Math.max(...ends.map(({ end }) => end));
  // Held-out loss is measured now and then: dots lead on from its last point to its name beside the newer training step.
  const heldOut = ends.find(({ name }) => name === "held-out");
  pen.setLineDash([0.5, 4]);
  if (heldOut && column - heldOut.end > 28) line([[heldOut.end + 12, heldOut.level], [column - 8, heldOut.level]], look.heldOut, 1.5);
  pen.setLineDash([]);
  const tall = narrow ? 31 : 17;
  const within = (level, half) => Math.min(bottom - half, Math.max(top - 8 + half, level));
  ends.sort((a, b) => a.level - b.level);
  const [upper, lower] = ends;
  if (lower && lower.level - upper.level < tall) {
    const middle = within((upper.level + lower.level) / 2, tall);
    [upper.level, lower.level] = [middle - tall / 2, middle + tall / 2];
  }
  for (const { name, value, level, ink } of ends) {
    const lift = narrow && value ? 7 : 0;
    text(name, column, within(level, tall / 2) - lift, ink);
    text(value, narrow ? column : column + pen.measureText(`${name} `).width, within(level, tall / 2) + lift, ink, "left", look.bold);
  }
}

function drawCrosshair() {
  const i = cursor === null || drag ? -1 : nearest(cursor);
  tip.hidden = !plot.train[i];
  if (tip.hidden) return;
  const [step, loss] = plot.train[i];
  const at = Math.round(view.x(step)) + 0.5;
  line([[at, view.top - 6], [at, view.bottom]], look.quiet, 1, 0.6);
  const heldOut = plot.heldOut[lastBefore(plot.heldOut, step)];
  for (const series of ["raw", "smooth", "held"]) find(`.tip .${series}`).hidden = !visible(series);
  if (visible("raw")) dot(plot.train[i], look.train, 2.5);
  if (visible("smooth")) dot(plot.smooth[i], look.train, 3.5);
  if (visible("held") && heldOut?.[0] === step) dot(heldOut, look.heldOut, 3.5);
  find(".at").textContent = `step ${whole(step)}`;
  find(".raw b").textContent = exact(loss);
  find(".smooth b").textContent = exact(plot.smooth[i][1]);
  find(".held span").textContent = heldOut && heldOut[0] !== step ? `held-out at ${whole(heldOut[0])}` : "held-out";
  find(".held b").textContent = heldOut ? exact(heldOut[1]) : "–";
  const beside = at + 14 + tip.offsetWidth > view.width ? at - 14 - tip.offsetWidth : at + 14;
  tip.style.transform = `translate(${Math.max(0, beside)}px, ${view.top - 4}px)`;
}

// --- What else calls for a new drawing: size, theme, another screen's pixels ---

const gone = new AbortController();
const themes = new MutationObserver(refresh);
const sizes = new ResizeObserver(refresh);
function refresh() {
  look = null;
  if (element.isConnected) return schedule();
  themes.disconnect(); // or every mount would leave its canvas and its listeners behind
  sizes.disconnect();
  gone.abort();
}
themes.observe(document.body, { attributes: true, attributeFilter: ["class"] });
sizes.observe(canvas); // calls once now, and once when the component leaves the page
window.addEventListener("resize", refresh, { signal: gone.signal });

watch("value", ask);
ask();
