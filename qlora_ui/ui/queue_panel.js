// The queue: the body of gr.HTML's js_on_load, a function of (element, trigger, props, server, upload, watch).
// It asks when it is shown, when live.js has seen a change, and after each click. All text is set as text, never as markup.

const find = (selector) => element.querySelector(selector);
const [says, problem, list, sweeps, ended] = [".state-of-queue", ".problem", "ol", ".sweeps", ".ended"].map(find);
let [asking, askAgain] = [false, false];
const clicks = [];  // while another is being answered: none is lost

async function ask(what = "", id = "") {
  if (asking) return void (what ? clicks.push([what, id]) : (askAgain = true));
  asking = true;
  const answer = await server.queue([what, id]);
  asking = false;
  if (!element.isConnected) return;
  if (answer) draw(answer);
  if (clicks.length) return ask(...clicks.shift());
  if (askAgain) {
    askAgain = false;
    ask();
  }
}

function draw({ said, going, line, entries, ended: runs, sweeps: made }) {
  says.textContent = line;
  problem.textContent = said;
  problem.hidden = !said;
  find(".start").hidden = going;
  find(".start").disabled = !entries.length;
  find(".hold").hidden = !going;
  const focused = element.contains(document.activeElement) ? document.activeElement.dataset.key : "";
  list.replaceChildren(...entries.map((entry, place) => waiting(entry, place, entries.length)));
  sweeps.replaceChildren(...made.map(sweep));
  ended.hidden = !runs.length;
  find(".ended ul").replaceChildren(...runs.map(result));
  if (focused) [...element.querySelectorAll("[data-key]")].find((part) => part.dataset.key === focused && !part.disabled)?.focus();
  Object.assign(element.dataset, { waiting: entries.length, ended: runs.length, going });
}

function waiting({ id, title, about, trouble }, place, count) {
  const item = made("li", "");
  const words = made("div", "words");
  words.append(made("b", "", title), made("span", "quiet", about));
  if (trouble) words.append(made("span", "trouble", `Could not begin: ${trouble}`));
  const remove = button("Remove", `Remove ${title}`, `remove ${id}`, () => {
    if (remove.dataset.sure) return ask("remove", id);
    remove.dataset.sure = "yes";
    remove.textContent = "Remove it?";
  });
  remove.onblur = () => {
    delete remove.dataset.sure;
    remove.textContent = "Remove";
  };
  const up = button("\u2191", `Move ${title} up`, `up ${id}`, () => ask("up", id));
  const down = button("\u2193", `Move ${title} down`, `down ${id}`, () => ask("down", id));
  [up.disabled, down.disabled] = [place === 0, place === count - 1];
  item.dataset.entry = id;
  item.append(words, up, down, remove);
  return item;
}

function sweep({ name, runs, said }) {
  const item = made("p", "sweep");
  item.append(made("b", "", `Sweep ${name}`), made("span", "quiet", said));
  item.append(button("Compare its runs", `Compare the runs of ${name}`, `sweep ${name}`, () => show(runs)));
  return item;
}

function result({ run, title, state, said }) {
  const item = made("li", "");
  const name = button(title, "", `run ${run}`, () => show([run]));
  const end = made("span", "state", said);
  end.dataset.state = state;
  item.dataset.run = run;
  item.append(name, end);
  return item;
}

function show(runs) {
  window.chooseRuns?.(runs);
  document.querySelector("#runs-shown")?.scrollIntoView({ behavior: "smooth" });
}

function made(tag, className, text = "") {
  return Object.assign(document.createElement(tag), { className, textContent: text });
}

function button(text, label, key, onclick) {
  const one = Object.assign(made("button", "", text), { type: "button", onclick });
  if (label) one.setAttribute("aria-label", label);
  one.dataset.key = key;
  return one;
}

find(".start").onclick = () => ask("start");
find(".hold").onclick = () => ask("hold");
window.queueChanged = () => element.isConnected && element.offsetParent && ask();
ask();
