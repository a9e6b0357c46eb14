// What an open page asks once a second, and where the answer goes: the body of gr.HTML's js_on_load on the hidden #seen, a function
// of (element, trigger, props, server, upload, watch). It is mounted once, outside the tabs, and is the only writer of the run bar's
// line, the progress line, the tiles and the log. Its value says what the buttons were last drawn for; a change of it redraws them.

const EVERY_MS = 1000;
const LATE_MS = 20000;
const MOST_LINES = 60;
const MOST_MISSED = 3; // questions without an answer, after which the page says that it does not know
const AWAY = "The app does not answer. It said last: ";
const page = Math.random().toString(36).slice(2);
const shown = { version: "", run: "", parts: {}, lines: [], count: -1, answers: 0 };
let [asking, askAgain, timer, missed] = [false, false, 0, 0];

async function ask() {
  if (asking) return void (askAgain = true);
  [asking, askAgain] = [true, false];
  clearTimeout(timer);
  const curve = window.lossPlotCursor?.() ?? null;
  // A failed call answers undefined (Gradio's client logs it), and so does one that hangs: the next one may succeed.
  const late = new Promise((resolve) => setTimeout(resolve, LATE_MS));
  const answer = await Promise.race([server.news([page, shown.version, shown.run, shown.count, curve]), late]);
  asking = false;
  if (!element.isConnected) return; // a later mount asks for itself
  missed = answer ? 0 : missed + 1;
  if (answer?.version) take(answer, curve);
  else if (answer) window.showNews(); // instead of what was said while there was no answer
  else if (missed >= MOST_MISSED) sayAway();
  if (document.hidden) return; // visibilitychange goes on
  timer = setTimeout(ask, askAgain || answer?.behind ? 0 : 1000 * answer?.wait || EVERY_MS);
}

function take({ version, run, redraw, parts, log, answers, curve: points }, asked) {
  Object.assign(shown, { version, run, answers });
  Object.assign(shown.parts, parts);
  if (log.start !== shown.count) shown.lines = [];
  shown.lines = [...shown.lines, ...log.lines].slice(-MOST_LINES);
  shown.count = log.count;
  window.showNews();
  window.lossPlotTake?.(asked, points);
  if (redraw && redraw !== props.value) {
    props.value = redraw;
    window.runsChanged?.();
    window.queueChanged?.();
  }
}

/** Write what is known into what is in the page; a tab that is opened later calls it for itself. */
window.showNews = () => {
  for (const [id, html] of Object.entries(shown.parts)) {
    const place = document.querySelector(`#${id} .prose:not(:empty)`);
    if (!place || place.news === html) continue;
    place.news = html;
    const fresh = place.cloneNode(false);
    fresh.innerHTML = html;
    fresh.querySelectorAll("time[data-at]").forEach(byThisClock);
    renew(place, fresh);
  }
  showLog();
  window.showMoreCurves?.(shown.run, shown.version);
  window.showSamples?.(shown.run, shown.answers);
};

function sayAway() {
  const place = document.querySelector("#status-line .prose:not(:empty)");
  if (!place || place.news === AWAY) return;
  place.news = AWAY;
  place.querySelector(".status").prepend(AWAY);
  place.querySelector("[aria-live]")?.replaceChildren(AWAY);
}

/** A moment in the time of the person who reads it: the server may stand in another zone. */
function byThisClock(time) {
  const at = new Date(1000 * time.dataset.at);
  const weekday = at.toDateString() === new Date().toDateString() ? {} : { weekday: "short" };
  time.textContent = at.toLocaleTimeString("en-GB", { hour: "2-digit", minute: "2-digit", ...weekday });
}

function showLog() {
  const box = document.querySelector("#log-box pre");
  if (!box || shown.count < 0 && !shown.lines.length) return;
  const missing = box.run === shown.run ? shown.count - box.count : Infinity;
  if (missing === 0) return;
  if (!(missing > 0 && missing <= shown.lines.length)) box.replaceChildren();
  // One text node a line: a screen reader reads only what was added, and a selection stays.
  box.append(...shown.lines.slice(box.childNodes.length ? -missing : 0).map((line) => `${line}\n`));
  while (box.childNodes.length > MOST_LINES) box.firstChild.remove();
  Object.assign(box, { run: shown.run, count: shown.count });
}

/** Make a node like a fresh one and keep what is the same, so that transitions run, live regions speak and open details stay open. */
function renew(old, fresh) {
  if (old.isEqualNode(fresh)) return;
  if (old.nodeName !== fresh.nodeName || old.childNodes.length !== fresh.childNodes.length) return old.replaceWith(fresh);
  if (old.nodeType === Node.TEXT_NODE) old.data = fresh.data;
  for (const { name, value } of fresh.attributes ?? []) if (old.getAttribute(name) !== value) old.setAttribute(name, value);
  const children = [...fresh.childNodes]; // a copy: replaceWith takes them out
  [...old.childNodes].forEach((child, i) => renew(child, children[i]));
}

document.addEventListener("visibilitychange", () => document.hidden || !element.isConnected || ask());
watch("value", ask);
ask();
