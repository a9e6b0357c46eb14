// The hands on the loss plot: pointer, touch, keyboard. Follows loss_plot.js in the same function.

function zoomTo(a, b) {
  const [start, end] = wholeRange();
  const [from, to] = [Math.max(start, Math.min(a, b)), Math.min(end, Math.max(a, b))];
  if (from <= start && to >= end) plot.zoom = null;
  else if (lastBefore(plot.train, to) - lastBefore(plot.train, from) >= 2) plot.zoom = [from, to]; // less is an empty frame
  schedule();
}

function leave() {
  [cursor, drag] = [null, null];
  schedule();
}

function showAll() {
  [plot.zoom, drag] = [null, null];
  schedule();
}

canvas.addEventListener("pointerdown", (event) => {
  if (event.button || !plot.train.length) return;
  cursor = view.step(event.offsetX);
  schedule();
  if (event.pointerType === "touch") return; // a finger reads the curve; if it zoomed, scrolling the page would too
  canvas.setPointerCapture(event.pointerId);
  drag = { from: event.offsetX, to: event.offsetX };
});
canvas.addEventListener("pointermove", (event) => {
  cursor = view && view.step(event.offsetX);
  if (drag) drag.to = event.offsetX;
  schedule();
});
canvas.addEventListener("pointerup", () => {
  if (drag && Math.abs(drag.to - drag.from) > 6) zoomTo(view.step(drag.from), view.step(drag.to));
  drag = null;
  schedule();
});
canvas.addEventListener("pointerleave", (event) => event.pointerType === "touch" || leave()); // a tapped point stays
canvas.addEventListener("pointercancel", leave);
canvas.addEventListener("blur", leave);
canvas.addEventListener("dblclick", showAll);
reset.addEventListener("click", () => (showAll(), canvas.focus()));

canvas.addEventListener("keydown", (event) => {
  if (event.key === "Escape") return showAll();
  const [from, to] = plot.zoom ?? wholeRange();
  const [first, last] = [lastBefore(plot.train, from - 1e-9) + 1, lastBefore(plot.train, to)];
  const [now, jump] = [cursor === null ? last + 1 : nearest(cursor), event.shiftKey ? 10 : 1];
  const target = { ArrowLeft: now - jump, ArrowRight: now + jump, Home: first, End: last }[event.key];
  const half = { "+": (to - from) / 4, "=": (to - from) / 4, "-": to - from }[event.key]; // of the range after zooming
  if ((target === undefined && !half) || last < first || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault(); // or the page scrolls
  if (half) return zoomTo((cursor ?? (from + to) / 2) - half, (cursor ?? (from + to) / 2) + half);
  const i = Math.min(last, Math.max(first, target));
  cursor = plot.train[i][0];
  schedule();
  const heldOut = plot.heldOut.find(([step]) => step === cursor);
  find(".spoken").textContent =
    `Step ${whole(cursor)}: training ${exact(plot.train[i][1])}, smoothed ${exact(plot.smooth[i][1])}` +
    (heldOut ? `, held-out ${exact(heldOut[1])}` : "");
});
