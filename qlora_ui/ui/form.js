// What stands at the fields of the form and above them: which differ from the preset, which are wrong and why, and the way back. The
// body of gr.HTML's js_on_load on the hidden #form-values, a function of (element, trigger, props, server, upload, watch), mounted once
// outside the tabs. `declared` comes before it, from form.py: how each setting is declared and what each preset says. The value is
// [preset, ...settings] as the page has them; nobody else is asked while a person types.

const { names, knobs, presets, defaults, data_tab: onDataTab } = declared;
let [preset, values, drawing] = ["", null, false];

const fieldOf = (name) => document.getElementById(name === "model" ? "model-input" : `field-${name}`);
const inputOf = (name) => fieldOf(name)?.querySelector("input, textarea");
const own = (name) => presets[preset]?.[name] ?? defaults[name];
const shown = (value) => (value === "" ? "nothing" : String(value));

/** What a number's field says now, typed to its end or not. */
const typed = (name) => String((inputOf(name) ?? { value: values[name] ?? "" }).value);

/** Why a number is wrong, in the words of its declaration; what depends on several fields is the server's to say. */
function fault(name) {
  const { whole, low, high, requirement } = knobs[name] ?? {};
  if (!requirement) return "";
  const text = typed(name);
  const number = text.trim() === "" ? NaN : Number(text);
  if (number >= low && number <= high && (!whole || Number.isInteger(number))) return "";
  return `${name} is ${text || "empty"}: it must be ${requirement}.`;
}

function differs(name) {
  const value = knobs[name].requirement ? Number(typed(name)) : (values[name] ?? "");
  return (typeof value === "string" ? value.trim() : value) !== own(name);
}

/** The sentences that stand at fields: name -> sentence. The server's is of what it was told last, not of what is being typed. */
function faults() {
  const found = names.map((name) => [name, fault(name)]).filter(([, sentence]) => sentence);
  const said = document.querySelector("#start-box .problem[data-field]");
  const name = said?.dataset.field;
  // Of bounds the page speaks itself: the server's sentence may be of a number that was on its way to this one.
  const { requirement } = knobs[name] ?? {};
  const isOld = requirement && (Number(typed(name)) !== values[name] || said.textContent.includes(`it must be ${requirement}.`));
  return Object.fromEntries(said && !isOld ? [[name, said.textContent], ...found] : found);
}

function draw() {
  drawing = false;
  if (!values || !element.isConnected) return;
  const wrong = faults();
  const changed = names.filter((name) => knobs[name].of_preset && differs(name));
  for (const name of names) mark(name, changed.includes(name), wrong[name] ?? "");
  tell(changed);
  const start = document.querySelector("#start-button");
  const refusal = fault(names.find(fault) ?? "");
  if (start && start.title !== refusal) start.title = refusal;
}

const drawSoon = () => drawing || ((drawing = true), requestAnimationFrame(draw));

/** Make the node of that class in a field like this, or take it away; a node that stays keeps the focus. */
function put(field, kind, wanted, make) {
  const there = field.querySelector(`:scope > .${kind}`);
  if (there && !wanted) there.remove();
  if (!wanted) return null;
  return there ?? field.appendChild(Object.assign(make(), { className: kind }));
}

function mark(name, isChanged, sentence) {
  const field = fieldOf(name);
  if (!field) return;
  field.toggleAttribute("data-differs", isChanged);
  field.toggleAttribute("data-blamed", Boolean(sentence));
  const reset = put(field, "reset-field", isChanged, () => {
    const button = Object.assign(document.createElement("button"), { type: "button", textContent: "\u21ba" });
    button.addEventListener("click", () => goBack([name]));
    return button;
  });
  const words = `${knobs[name].label} differs from the preset. Reset it to ${shown(own(name))}`;
  if (reset && reset.title !== words) Object.assign(reset, { title: words, ariaLabel: words });
  const said = put(field, "fault", sentence, () => Object.assign(document.createElement("p"), { id: `fault-${name}`, role: "alert" }));
  if (said && said.textContent !== sentence) said.textContent = sentence;
  const input = inputOf(name);
  if (sentence) input?.setAttribute("aria-describedby", `fault-${name}`);
  else input?.removeAttribute("aria-describedby");
  input?.setAttribute("aria-invalid", String(Boolean(sentence)));
}

/** The line above the form; its room is there before it says anything. */
function tell(changed) {
  const line = document.querySelector("#form-differences .differences");
  const key = changed.join();
  if (!line || line.key === key) return;
  line.key = key;
  if (!changed.length) return line.replaceChildren("All settings are the preset's.");
  const button = (words, act) => {
    const made = Object.assign(document.createElement("button"), { type: "button", textContent: words });
    made.addEventListener("click", act);
    return made;
  };
  const fields = changed.flatMap((name, at) => [at ? ", " : "", button(knobs[name].label, () => show(name))]);
  const all = button("Reset all", () => goBack(changed));
  all.className = "reset-all";
  line.replaceChildren(`${changed.length === 1 ? "1 setting differs" : `${changed.length} settings differ`} from the preset: `, ...fields, " ", all);
}

/** Bring a field into sight, whichever tab or fold it is in, and put the cursor into it. */
async function show(name) {
  document.querySelector(onDataTab.includes(name) ? "#tab-data-button" : "#tab-train-button")?.click();
  const isSeen = () => fieldOf(name)?.checkVisibility();
  if (!isSeen()) document.querySelector("#advanced-settings > button:not(.open)")?.click();
  for (let tries = 0; tries < 40 && !isSeen(); tries++) await new Promise((resolve) => setTimeout(resolve, 50));
  fieldOf(name)?.scrollIntoView({ block: "center" });
  inputOf(name)?.focus({ preventScroll: true });
}

/** Gradio sets the fields: this event has them all as inputs and as outputs. */
function goBack(wish) {
  window.formReset = (now) => names.map((name, at) => (wish.includes(name) ? own(name) : now[at]));
  trigger("submit");
  inputOf(wish[0])?.focus({ preventScroll: true });
}

function take() {
  const told = JSON.parse(props.value || "null");
  if (!told) return;
  preset = told[0];
  values = Object.fromEntries(names.map((name, at) => [name, told[at + 1]]));
  drawSoon();
}

/** A start that the page knows to be refused leads to the field; of one that the server refuses, `showBlamed` does. */
document.addEventListener(
  "click",
  (event) => {
    if (!values || !event.target.closest?.("#start-button, #resume-with-button")) return;
    const wrong = names.find(fault);
    if (!wrong) return;
    event.preventDefault();
    event.stopImmediatePropagation();
    show(wrong);
  },
  true,
);
window.showBlamed = () => {
  const said = document.querySelector("#start-box .problem[data-field]");
  if (said && knobs[said.dataset.field]) show(said.dataset.field);
};
document.addEventListener("input", drawSoon, true);
new MutationObserver(drawSoon).observe(document.body, { childList: true, subtree: true });
watch("value", take);
take();
