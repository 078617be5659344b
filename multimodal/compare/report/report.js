"use strict";
// Shows single questions: fifty at a time, from the one JSON value whose layout questions.py tells. Everything that
// a data set or a pipeline said goes in as text (textContent), so that no answer can become a part of the page.
(function () {
  const STEP = 50;
  const SVG = "http://www.w3.org/2000/svg"; // a name, not an address
  const list = document.getElementById("list");
  if (!list) return; // a run without rows
  const data = JSON.parse(document.getElementById("data").textContent);
  const count = document.getElementById("count");
  const more = document.getElementById("more");
  const field = (id) => document.getElementById(id);
  let found = [];
  let shown = 0;

  function make(tag, className, text) {
    const node = document.createElement(tag);
    if (className) node.className = className;
    if (text !== undefined) node.textContent = text;
    return node;
  }

  function seconds(value) {
    if (value === null) return "";
    return value >= 1 ? value.toFixed(2) + " s" : Math.round(value * 1000) + " ms";
  }

  function picture(number, label) {
    const [uri, problem] = data.pictures[number];
    if (!uri) return make("p", "gone", "No picture: " + problem);
    const image = make("img");
    image.alt = label;
    image.decoding = "async";
    image.src = uri;
    return image;
  }

  function overlay(number, boxes) {
    const frame = make("div", "overlay");
    frame.append(picture(number, "The picture, with the text that was found framed"));
    if (!data.pictures[number][0]) return frame;
    const drawing = document.createElementNS(SVG, "svg");
    drawing.setAttribute("viewBox", "0 0 1 1");
    drawing.setAttribute("preserveAspectRatio", "none");
    drawing.setAttribute("aria-hidden", "true");
    for (const box of boxes) {
      const frame = document.createElementNS(SVG, "rect");
      ["x", "y", "width", "height"].forEach((name, place) => frame.setAttribute(name, String(Math.max(box[place], 0))));
      drawing.append(frame);
    }
    frame.append(drawing);
    return frame;
  }

  function step([name, took, cached, text, boxes, number]) {
    const node = make("div", "step");
    const title = make("h4", "", name + " ");
    title.append(make("span", "", (took ? seconds(took) : "") + (cached ? ", kept from an earlier question" : "")));
    node.append(title);
    if (boxes >= 0 && number >= 0) node.append(overlay(number, data.boxes[boxes]));
    if (text >= 0) node.append(make("pre", "", data.texts[text]));
    return node;
  }

  function mark(score, task) {
    const [name, share] = data.metrics[task];
    if (score === null) return make("span", "verdict-mark", "");
    if (!share) return make("span", "verdict-mark", name + " " + score.toFixed(2));
    if (score >= 1) return make("span", "verdict-mark right", "✓ right");
    if (score <= 0) return make("span", "verdict-mark wrong", "✗ wrong");
    return make("span", "verdict-mark", "≈ " + Math.round(100 * score) + " %");
  }

  function answer([pipeline, text, score, sure, took, notes, error, steps], task) {
    const node = make("div", "answer p" + (pipeline % 8));
    const head = make("header");
    const name = make("span", "name");
    data.pipelines[pipeline].split(/(?<=_)/).forEach((part) => name.append(part, make("wbr"))); // may break after "_"
    head.append(name);
    head.append(error ? make("span", "verdict-mark failed", "⚠ error") : mark(score, task));
    node.append(head);
    const said = make("p", error ? "said failed" : "said", error || text || "(said nothing)");
    said.dir = "auto";
    node.append(said);
    const facts = [sure === null ? "" : "confidence " + Math.round(100 * sure) + " %", seconds(took)];
    const line = facts.filter(Boolean).join(" · ");
    if (line) node.append(make("p", "took", line));
    if (steps.length || notes) {
      const more = make("details");
      more.append(make("summary", "", "What it saw"));
      more.addEventListener("toggle", () => {
        if (more.open && more.children.length === 1) more.append(make("p", "took", notes), ...steps.map(step));
      });
      node.append(more);
    }
    return node;
  }

  function card(place) {
    const [task, id, asked, target, kinds, pictures, , , answers] = data.questions[place];
    const node = make("li", pictures.length ? "question" : "question no-pictures");
    if (pictures.length) {
      const side = make("div", "pictures");
      side.append(...pictures.map((number) => picture(number, "The picture that the question is about")));
      node.append(side);
    }
    const body = make("div");
    const about = [data.tasks[task], id, ...kinds.map((kind) => data.kinds[kind])].join(" · ");
    const right = make("p", "target", "Right answer: ");
    const text = make("b", "", target);
    text.dir = "auto";
    right.append(text);
    const question = make("p", "asked", asked);
    question.dir = "auto";
    const box = make("div", "answers");
    box.append(...answers.map((each) => answer(each, task)));
    body.append(make("p", "about", about), question, right, box);
    node.append(body);
    return node;
  }

  let texts = null; // what is searched, made when the first search is made
  function searched(place) {
    if (!texts) {
      texts = data.questions.map((each) =>
        [each[1], each[2], each[3], ...each[8].map((said) => said[1] + " " + said[6])].join("\n").toLowerCase());
    }
    return texts[place];
  }

  function fill(select, names) {
    names.forEach((name, place) => {
      const option = make("option", "", name);
      option.value = String(place);
      select.append(option);
    });
    if (names.length < 2) select.parentElement.style.display = "none"; // nothing to choose
  }

  function page() {
    const next = found.slice(shown, shown + STEP);
    list.append(...next.map(card));
    shown += next.length;
    more.hidden = shown >= found.length;
    more.textContent = "Show " + Math.min(STEP, found.length - shown) + " more";
    const all = data.questions.length.toLocaleString("en");
    const some = found.length.toLocaleString("en");
    count.textContent = found.length
      ? "Showing " + shown.toLocaleString("en") + " of " + some + " questions" + (some === all ? "." : " that fit, " + all + " in all.")
      : "No question fits. There are " + all + " in all.";
  }

  function filter() {
    const [task, kind] = [field("task").value, field("kind").value];
    const [disagree, failed] = [field("disagree").checked, field("failed").checked];
    const search = field("search").value.trim().toLowerCase();
    found = [];
    data.questions.forEach((each, place) => {
      if (task !== "" && each[0] !== Number(task)) return;
      if (kind !== "" && !each[4].includes(Number(kind))) return;
      if (disagree && !each[6]) return;
      if (failed && !each[7]) return;
      if (search && !searched(place).includes(search)) return;
      found.push(place);
    });
    list.replaceChildren();
    shown = 0;
    page();
  }

  let waiting = 0;
  fill(field("task"), data.tasks);
  fill(field("kind"), data.kinds);
  const form = field("filters");
  form.hidden = false;
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("change", filter);
  field("search").addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(filter, 150);
  });
  more.addEventListener("click", page);
  filter();
})();
