// The sample answers: the body of gr.HTML's js_on_load, a function of (element, trigger, props, server, upload, watch). The value says
// whose: a run's id, or "live" for the run that live.js shows, which says when there are news. Rounds are asked for once.

const slider = element.querySelector("input");
const stepWords = element.querySelector("output");
const said = element.querySelector(".said");
const nobody = said.firstElementChild;
const all = (window.samplesShown ??= {}); // outlives a mount
const startOver = (run) => ({ run, serial: 0, rounds: [], at: null }); // `at` is the step that was chosen; null follows the newest
const key = props.value === "live" ? "live" : "chosen";
let shown = (all[key] ??= startOver(""));
let [asking, drawn] = [false, null];

async function show(run, serial) {
  if (!element.isConnected) return;
  if (run !== shown.run) shown = all[key] = startOver(run);
  draw();
  if (!run || asking || serial === shown.serial) return;
  asking = true;
  const late = new Promise((resolve) => setTimeout(resolve, 20000));
  const answer = await Promise.race([server.rounds([run, shown.rounds.map((round) => round.serial)]), late]);
  asking = false;
  if (run !== shown.run) return show(shown.run, -1); // another was chosen meanwhile, and could not ask
  if (!answer) return; // a failed call answers undefined; the next news ask again
  const known = new Map([...shown.rounds, ...answer.news].map((round) => [round.serial, round]));
  Object.assign(shown, { serial: answer.serial, rounds: answer.rounds.map((number) => known.get(number)) });
  draw();
}

function draw() {
  const { rounds, at } = shown;
  const last = rounds.length - 1;
  const chosen = at === null ? -1 : rounds.findLastIndex(({ step }) => step <= at);
  const place = chosen < 0 ? last : chosen;
  const round = rounds[place];
  if (Number(slider.max) !== Math.max(0, last)) slider.max = Math.max(0, last);
  if (Number(slider.value) !== Math.max(0, place)) slider.value = Math.max(0, place);
  slider.disabled = last < 1;
  if (drawn === (round?.serial ?? 0)) return;
  drawn = round?.serial ?? 0;
  const words = round ? (round.step ? `after step ${round.step.toLocaleString("en")}` : "before step 1") : "";
  stepWords.textContent = words;
  slider.setAttribute("aria-valuetext", words);
  said.replaceChildren(...(round ? round.said.map(pair) : [nobody]));
}

function pair({ prompt, base, adapter }) {
  const article = document.createElement("article");
  const answers = make("div", "pair", "");
  for (const [name, answer] of Object.entries({ base, adapter })) {
    const side = make("div", name, "");
    side.append(make("span", "", name), make("p", "", answer || "(nothing)"));
    answers.append(side);
  }
  article.append(make("p", "prompt", prompt), answers);
  return article;
}

const make = (tag, className, textContent) => Object.assign(document.createElement(tag), { className, textContent });

slider.addEventListener("input", () => {
  const place = Number(slider.value);
  shown.at = place === shown.rounds.length - 1 ? null : shown.rounds[place].step;
  draw();
});
if (key === "live") {
  window.showSamples = show;
  window.showNews?.();
} else {
  watch("value", () => show(props.value, -1));
  show(props.value, -1);
}
