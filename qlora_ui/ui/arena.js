// The keys 1 to 4 vote while nobody is typing: the body of gr.HTML's js_on_load. A tab that was left takes its listener with it.

document.addEventListener("keydown", (event) => {
  const typing = event.target.closest?.("input, textarea, select, [contenteditable='true']");
  const other = event.ctrlKey || event.metaKey || event.altKey || event.repeat;
  if (typing || other || !element.isConnected || !element.checkVisibility()) return;
  document.querySelectorAll("#arena-ballot button")[["1", "2", "3", "4"].indexOf(event.key)]?.click();
});
