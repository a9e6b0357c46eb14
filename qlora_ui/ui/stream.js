// Keeps an answer from being lost between two of Gradio's streams. Runs in the page's head, before Gradio asks anything.
//
// Whatever a page asks is answered over one stream of events, which the server ends as soon as nothing is open. A question that
// reaches the server a moment later is answered to nobody: the page still takes the stream for open, so it opens no other, and waits
// until something else is asked (Gradio 6.31). A slow machine or a relay is enough. So the end of a stream is not told to the page
// while a question is open: the next stream goes on in its place.

const ask = window.fetch;
const open = new Set(); // ids of questions that the server has taken and not answered to the end
const early = new Set(); // ids that were answered before the page was told that they were taken

window.fetch = async (input, init) => {
  const path = new URL(input.url ?? input, location.href).pathname;
  const answer = await ask(input, init);
  if (path.endsWith("/queue/join") && answer.ok) {
    const { event_id } = await answer.clone().json();
    if (!early.delete(event_id)) open.add(event_id);
  }
  if (!path.endsWith("/queue/data") || !answer.ok) return answer;
  const { readable, writable } = new TransformStream();
  relay(answer, () => ask(input, init), writable.getWriter());
  return new Response(readable, answer);
};

async function relay(answer, askAgain, page) {
  const bytes = new TextEncoder();
  try {
    for (let goesOn = true; goesOn; ) {
      goesOn = false;
      for await (const events of arrivals(answer.body)) {
        const told = [];
        for (const event of events) {
          const { msg, event_id } = JSON.parse(event.slice("data: ".length));
          if (msg === "process_completed" && !open.delete(event_id)) early.add(event_id);
          goesOn = msg === "close_stream" && open.size > 0;
          if (!goesOn) told.push(`${event}\n\n`);
        }
        // What came together is told together, so that the page draws it once: one that is behind could not catch up else.
        if (told.length) await page.write(bytes.encode(told.join("")));
        if (goesOn) break;
      }
      if (goesOn) answer = await askAgain();
    }
    await page.close();
  } catch (trouble) {
    open.clear(); // nobody answers these any more
    page.abort(trouble).catch(() => {}); // Gradio says so, unless it was the page that went away
  }
}

async function* arrivals(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ; ) {
    const { done, value } = await reader.read();
    if (done) return;
    const whole = (rest + value).split("\n\n");
    rest = whole.pop();
    yield whole;
  }
}
