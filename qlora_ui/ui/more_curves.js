// The small curves: the body of gr.HTML's js_on_load, a function of (element, trigger, props, server, upload, watch). Points are asked
// for only while the section is open, when live.js says that there are news.

const details = element.querySelector("details");
const startOver = (run) => (window.moreCurves = { run, rewinds: -1, total: 0, curves: {} });
let more = window.moreCurves ?? startOver(""); // outlives a mount
let [asking, askAgain] = [false, false];

const say = {
  learning_rate: (rate) => rate.toExponential(1),
  grad_norm: (norm) => norm.toPrecision(3),
  tokens_per_second: (speed) => speed.toLocaleString("en-US", { maximumFractionDigits: 0 }),
  memory_gib: (memory) => `${memory.toFixed(1)} GiB`,
};

/** `version` is that of the news; without one the points are asked for in any case. */
window.showMoreCurves = async (run, version) => {
  if (!element.isConnected) return;
  if (run !== more.run) {
    more = startOver(run);
    draw();
  }
  if (!details.open || !run || (version && version === more.version)) return;
  more.version = version;
  if (asking) return void (askAgain = true);
  [asking, askAgain] = [true, false];
  const known = Object.entries(more.curves).map(([name, { stride, points }]) => [name, [stride, points.length]]);
  const late = new Promise((resolve) => setTimeout(resolve, 20000));
  const answer = await Promise.race([server.more_points([run, more.rewinds, Object.fromEntries(known)]), late]);
  asking = false;
  if (answer && run === more.run) take(answer);
  else more.version = ""; // a failed call answers undefined; the next question asks again
  if (askAgain) window.showMoreCurves(more.run);
};

function take({ rewinds, total_steps: total, curves }) {
  for (const [name, { restart, stride, points }] of Object.entries(curves))
    more.curves[name] = { stride, points: [...(restart ? [] : more.curves[name].points), ...points] };
  Object.assign(more, { rewinds, total });
  draw();
}

function draw() {
  for (const figure of element.querySelectorAll("figure")) {
    const name = figure.dataset.curve;
    const points = more.curves[name]?.points ?? [];
    const values = points.map(([, value]) => value);
    const [low, high] = [Math.min(...values), Math.max(...values)];
    const width = Math.max(1, more.total, points.at(-1)?.[0] ?? 0);
    const level = (value) => (high > low ? 96 - ((value - low) / (high - low)) * 92 : 50);
    const places = points.map(([step, value]) => `${((step / width) * 100).toFixed(2)},${level(value).toFixed(2)}`);
    const [now, range] = points.length ? [say[name](values.at(-1)), `${say[name](low)} to ${say[name](high)}`] : ["–", "\u00a0"];
    figure.dataset.points = points.length;
    figure.querySelector("polyline").setAttribute("points", places.join(" "));
    figure.querySelector("b").textContent = now;
    figure.querySelector("small").textContent = range;
    const said = points.length ? `${now} at step ${points.at(-1)[0]}, ${range}` : "no step yet";
    figure.querySelector("svg").setAttribute("aria-label", `${figure.querySelector("figcaption").firstChild.data}: ${said}`);
  }
}

details.open = Boolean(window.moreCurvesOpen);
details.addEventListener("toggle", () => {
  window.moreCurvesOpen = details.open;
  window.showMoreCurves(more.run);
});
draw();
window.showNews?.();
