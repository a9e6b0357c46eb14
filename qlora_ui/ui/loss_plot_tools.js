// The buttons above the loss plot: what is drawn, on which axis, and the points and the picture as files. Follows loss_plot.js in the
// same function, so that a mount is one script.

const tools = Object.fromEntries([...element.querySelectorAll("[data-tool]")].map((button) => [button.dataset.tool, button]));

function press() {
  for (const series of ["raw", "smooth", "held"]) tools[series].setAttribute("aria-pressed", visible(series));
  tools.log.setAttribute("aria-pressed", chosen.log);
  schedule();
}

function showOrHide(series) {
  chosen.hidden = visible(series) ? [...chosen.hidden, series] : chosen.hidden.filter((other) => other !== series);
}

function offer(blob, ending) {
  const [href, download] = [URL.createObjectURL(blob), `${plot.run || "no-run"}-loss.${ending}`];
  Object.assign(document.createElement("a"), { href, download }).click();
  setTimeout(() => URL.revokeObjectURL(href), 10000); // the browser has taken it by then
}

/** All points that the page has, a line for each step that has any. Of a long run they are means, and the column says of how many. */
function asCsv() {
  const columns = [plot.train, plot.smooth, plot.heldOut].map((points) => new Map(points));
  const steps = [...new Set(columns.flatMap((column) => [...column.keys()]))].sort((a, b) => a - b);
  const rows = steps.map((step) => [step, ...columns.map((column) => column.get(step) ?? "")].join());
  const training = plot.stride > 1 ? `training_mean_of_${plot.stride}` : "training";
  return [`step,${training},smoothed,held_out`, ...rows].map((row) => `${row}\n`).join("");
}

/** The canvas on the ground that lies behind it in the page, at the screen's own resolution. */
function asPicture() {
  cursor = null;
  draw();
  const picture = Object.assign(document.createElement("canvas"), { width: canvas.width + 32, height: canvas.height + 32 });
  const brush = picture.getContext("2d");
  brush.fillStyle = look.ground;
  brush.fillRect(0, 0, picture.width, picture.height);
  brush.drawImage(canvas, 16, 16);
  return picture;
}

for (const series of ["raw", "smooth", "held"]) tools[series].addEventListener("click", () => (showOrHide(series), press()));
tools.log.addEventListener("click", () => ((chosen.log = !chosen.log), press()));
tools.csv.addEventListener("click", () => offer(new Blob([asCsv()], { type: "text/csv" }), "csv"));
tools.png.addEventListener("click", () => asPicture().toBlob((blob) => offer(blob, "png")));
press();
