// The loss plot in words, for screen readers and whoever prefers a table; every four seconds at most. Follows loss_plot.js in the same
// function.

let [described, describing] = [0, 0];

function describe() {
  [describing, described] = [0, Date.now()];
  const [training, heldOut, low] = [plot.smooth.at(-1), plot.heldOut.at(-1), best()];
  const parts = [`Loss curve: step ${whole(lastStep())} of ${whole(wholeRange()[1])}`];
  if (training) parts.push(`training loss ${short(training[1])}`);
  if (heldOut) parts.push(`held-out loss ${short(heldOut[1])}, best ${short(low[1])} at step ${whole(low[0])}`);
  if (overfitFrom()) parts.push(`overfitting since step ${whole(overfitFrom()[0])}`);
  if (behind) parts.push("the server does not answer");
  canvas.setAttribute("aria-label", parts.length > 1 ? parts.join(", ") : empty.textContent);
  if (details.open) fillTable();
}

/** At most `most` of a list, evenly, counted from its end so that the newest is always there. */
const thin = (list, most) => list.filter((_, i) => (list.length - 1 - i) % Math.ceil(list.length / most) === 0);

function fillTable() {
  const heldOut = new Map(thin(plot.heldOut, 50));
  const indexes = thin([...plot.train.keys()], 200 - heldOut.size);
  const training = new Map(indexes.map((i) => [plot.train[i][0], [plot.train[i][1], plot.smooth[i][1]]]));
  const steps = [...new Set([...training.keys(), ...heldOut.keys()])].sort((a, b) => b - a);
  const cell = (tag, more) => Object.assign(document.createElement(tag), more);
  const rows = steps.map((step) => {
    const losses = [...(training.get(step) ?? [null, null]), heldOut.get(step) ?? null];
    const row = cell("tr");
    row.append(cell("th", { textContent: whole(step), scope: "row" }));
    row.append(...losses.map((loss) => cell("td", { textContent: loss === null ? "" : exact(loss) })));
    return row;
  });
  find("tbody").replaceChildren(...rows);
  find("caption").textContent = `${whole(indexes.length)} of ${whole(plot.train.length)} training points, newest first`;
}

details.open = Boolean(window.lossPlotTable);
details.addEventListener("toggle", () => {
  window.lossPlotTable = details.open;
  if (details.open) fillTable();
});
