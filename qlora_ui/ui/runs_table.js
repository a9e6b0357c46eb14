// The table of runs: the body of gr.HTML's js_on_load, a function of (element, trigger, props, server, upload, watch).
// Its value is the list of the ids that are chosen; a change of it shows them beside each other. All text is set as text, never as markup.

const find = (selector) => element.querySelector(selector);
const [search, body, said, head] = ["input", "tbody", ".said", "thead"].map(find);
const COLUMNS = ["title", "state", "model", "data", "step", "best_loss", "started", "size_bytes"];
const whole = (number) => number.toLocaleString("en-US");
const SHOWN = {
  step: (row) => (row.total_steps ? `${whole(row.step)} / ${whole(row.total_steps)}` : "–"),
  best_loss: (row) => (row.best_loss == null ? "–" : row.best_loss.toFixed(3)),
  started: (row) => new Date(row.started * 1000).toLocaleString([], { dateStyle: "medium", timeStyle: "short" }),
  size_bytes: (row) => (row.size_bytes < 1e6 ? `${Math.ceil(row.size_bytes / 1e3)} kB` : `${(row.size_bytes / 1e6).toFixed(row.size_bytes < 1e7 ? 1 : 0)} MB`),
};
let rows = [];
let order = { by: "started", down: true };
let asking = false;

const chosen = () => props.value ?? [];
const choose = (ids) => {
  props.value = ids;
  const address = new URL(location.href);
  if (ids.length === 1) address.searchParams.set("run", ids[0]);
  else address.searchParams.delete("run");
  history.replaceState(history.state, "", address);
  draw();
};

async function ask() {
  if (asking) return;
  asking = true;
  const answer = await server.run_rows();
  asking = false;
  if (!answer || !element.isConnected) return;
  rows = answer;
  const gone = chosen().filter((id) => !rows.some((row) => row.id === id));
  if (gone.length) choose(chosen().filter((id) => !gone.includes(id)));
  draw();
}

function draw() {
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  const text = (row) => `${row.id} ${row.title} ${row.notes} ${row.state} ${row.model} ${row.data}`.toLowerCase();
  const found = rows.filter((row) => words.every((word) => text(row).includes(word)));
  const last = order.down ? -Infinity : Infinity; // what has no such figure comes last
  const key = (row) => row[order.by] ?? last;
  found.sort((a, b) => (key(a) < key(b) ? -1 : key(a) > key(b) ? 1 : 0) * (order.down ? -1 : 1));
  const focused = document.activeElement?.closest("tr")?.dataset.run;
  const kind = document.activeElement?.tagName;
  body.replaceChildren(...found.map(line));
  if (focused) body.querySelector(`tr[data-run="${focused}"] ${kind}`)?.focus();
  said.textContent = rows.length ? `${whole(found.length)} of ${whole(rows.length)} runs` : "No run yet. Train one: it will be found here.";
  head.querySelectorAll("th[data-by]").forEach((cell) => {
    const sorted = cell.dataset.by === order.by;
    cell.setAttribute("aria-sort", sorted ? (order.down ? "descending" : "ascending") : "none");
  });
  element.dataset.rows = rows.length;
}

function line(row) {
  const made = document.createElement("tr");
  made.dataset.run = row.id;
  const box = Object.assign(document.createElement("input"), { type: "checkbox", checked: chosen().includes(row.id) });
  box.setAttribute("aria-label", `Compare ${row.title}`);
  box.onchange = () => choose(box.checked ? [...chosen(), row.id] : chosen().filter((id) => id !== row.id));
  made.classList.toggle("chosen", box.checked);
  made.insertCell().append(box);
  for (const column of COLUMNS) {
    const cell = made.insertCell();
    cell.className = column;
    const text = SHOWN[column]?.(row) ?? row[column];
    if (column === "title") {
      const name = Object.assign(document.createElement("button"), { type: "button", textContent: text, title: row.id });
      name.onclick = () => choose([row.id]);
      cell.append(name);
    } else if (column === "state") {
      const mark = Object.assign(document.createElement("span"), { className: "state", textContent: text });
      mark.dataset.state = text;
      cell.append(mark);
    } else {
      cell.textContent = text;
      cell.title = text;
    }
  }
  made.insertCell().append(spark(row.spark));
  return made;
}

function spark(values) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 80 20");
  svg.setAttribute("aria-hidden", "true");
  if (values.length > 1) {
    const [low, high] = [Math.min(...values), Math.max(...values)];
    const path = document.createElementNS(svg.namespaceURI, "polyline");
    const point = (value, i) => `${(1 + (i / (values.length - 1)) * 78).toFixed(1)},${(18 - ((value - low) / (high - low || 1)) * 16).toFixed(1)}`;
    path.setAttribute("points", values.map(point).join(" "));
    svg.append(path);
  }
  return svg;
}

search.oninput = draw;
head.querySelectorAll("th[data-by] button").forEach((button) => {
  button.onclick = () => {
    const by = button.closest("th").dataset.by;
    order = { by, down: by === order.by ? !order.down : ["started", "size_bytes", "step"].includes(by) };
    draw();
  };
});
watch("value", draw);
window.chooseRuns = choose;
window.runsChanged = () => element.isConnected && element.offsetParent && ask();
ask();
