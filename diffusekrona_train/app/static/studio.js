"use strict";
// Pages work without this file, but for the sliders: it sends forms in the background and puts in what has changed.
const $ = (selector, root = document) => root.querySelector(selector);
const csrf = $("meta[name=csrf]").content;
const later = (wait, work) => { let timer; return (...given) => { clearTimeout(timer); timer = setTimeout(() => work(...given), wait); }; };
const formOf = (values) => Object.entries(values).reduce((form, [name, value]) => { form.set(name, value); return form; }, new FormData());

function say(text) {
  $("#toast").textContent = text;
  clearTimeout(say.timer);
  say.timer = setTimeout(() => { $("#toast").textContent = ""; }, 7000);
}

async function post(url, body) {
  try {
    const answer = await fetch(url, { method: "POST", body, headers: { "x-csrf": csrf } });
    return await answer.json();
  } catch {
    return { error: "the studio does not answer; is it still running?" };
  }
}

function put(id, html) {
  const place = document.getElementById(id);
  if (!place) return;
  if (place.tagName === "SCRIPT") { place.textContent = html; grid?.update(JSON.parse(html)); return; }
  const open = $("details[open]", place), focused = place.contains(document.activeElement) && document.activeElement;
  if (open && focused) return; // a question is being answered
  const name = focused && [...place.querySelectorAll("a, button, input, summary")].indexOf(focused);
  place.innerHTML = html;
  if (focused) place.querySelectorAll("a, button, input, summary")[name]?.focus();
}
// ---- a run's samples: for each prompt a slider over steps and one over strengths ----
const grid = $("#grid") && {
  root: $("#grid"), strengths: $("#grid").dataset.strengths.split(" ").map(Number), cards: [], data: null, wanted: null,
  update(data) {
    const before = this.data, last = before?.steps.length - 1;
    this.data = data;
    if (!data.steps.length) return;
    if (!this.cards.length) data.prompts.forEach((one, number) => this.add(one, number));
    for (const card of this.cards) {
      const followed = !before?.steps.length || +card.step.value === last || !card.touched;
      card.step.max = data.steps.length - 1;
      if (followed) card.step.value = data.steps.length - 1;
      this.show(card);
    }
    $("#grid-note").textContent = data.error || "";
    if (this.wanted && !data.busy) { const again = this.wanted; this.wanted = null; this.make(again); }
  },
  add(one, number) {
    const card = document.createElement("figure");
    card.className = "sample";
    card.innerHTML = `<figcaption></figcaption><div class="shot"><img alt=""><span class="waits" hidden></span></div>
      <label><span>Step</span><input type="range" min="0" value="0" step="1"><output></output></label>
      <label><span>Strength</span><input type="range" min="0" max="${this.strengths.length - 1}" value="${this.strengths.indexOf(1)}" step="1"><output></output></label>`;
    $("figcaption", card).textContent = one.prompt;
    const [step, strength] = card.querySelectorAll("input"), [stepOut, strengthOut] = card.querySelectorAll("output");
    const made = { number, step, strength, stepOut, strengthOut, image: $("img", card), waits: $(".waits", card), touched: false };
    for (const slider of [step, strength]) slider.addEventListener("input", () => this.moved(made));
    this.cards.push(made);
    this.root.append(card);
  },
  moved(card) {
    const all = $("#together").checked ? this.cards : [card];
    for (const other of all) {
      other.touched = true;
      [other.step.value, other.strength.value] = [card.step.value, card.strength.value];
      this.show(other);
    }
    this.ask(card);
  },
  place(card) { return [this.data.steps[+card.step.value], this.strengths[+card.strength.value]]; },
  show(card) {
    const [step, strength] = this.place(card), row = this.data.prompts[card.number].images;
    const source = strength === 1 || step === 0 ? row[step] : strength === 0 ? row[0] : this.data.made[`${step}@${strength}`]?.[card.number];
    card.stepOut.textContent = step === this.data.best ? `${step} ★` : step || "base";
    card.step.setAttribute("aria-valuetext", `step ${step}${step === this.data.best ? ", the best checkpoint" : ""}`);
    card.strengthOut.textContent = strength;
    card.strength.setAttribute("aria-valuetext", `strength ${strength}`);
    card.image.classList.toggle("pixelated", this.data.small);
    card.image.alt = `${this.data.prompts[card.number].prompt}, step ${step}, strength ${strength}`;
    if (source && card.image.getAttribute("src") !== source) card.image.src = source;
    card.image.style.opacity = source ? 1 : 0.35;
    card.waits.hidden = Boolean(source);
    card.waits.textContent = this.data.checkpoints.includes(step) ? "Generating…" : "There is no checkpoint of this step.";
  },
  ask: later(450, (card) => {
    const [step, strength] = grid.place(card);
    const there = strength === 0 || strength === 1 || step === 0 || grid.data.made[`${step}@${strength}`]?.[card.number];
    if (!there && grid.data.checkpoints.includes(step)) grid.make([step, strength]);
  }),
  async make([step, strength]) {
    if (this.data.busy) { this.wanted = [step, strength]; return; }
    const answer = await post(this.root.dataset.post, formOf({ step, strength }));
    if (answer.error) $("#grid-note").textContent = answer.error;
  },
};
if (grid) grid.update(JSON.parse($("#samples").textContent));
// ---- what has changed comes by itself ----
if ($("main").dataset.events) {
  const source = new EventSource($("main").dataset.events);
  source.onmessage = (message) => Object.entries(JSON.parse(message.data)).forEach(([id, html]) => put(id, html));
  source.addEventListener("gone", () => { source.close(); location.href = "/"; });
  addEventListener("pagehide", () => source.close());
}
// ---- forms that stay on their page ----
for (const form of document.querySelectorAll("form[data-quiet]")) {
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const answer = await post(form.action, new FormData(form));
    if (answer.error || answer.said) say(answer.error || answer.said);
  });
}
for (const slider of document.querySelectorAll(".slider input")) {
  slider.addEventListener("input", () => { slider.nextElementSibling.textContent = slider.value; });
}
// ---- a new subject ----
const drop = $("#drop"), subject = $("#subject");
if (drop) {
  let round = 0;
  const place = (answer) => {
    const typing = document.activeElement?.name?.startsWith("caption:");
    for (const [id, html] of Object.entries(answer.html || {})) {
      if (id === "photos" ? !typing : id !== "models" || $("[data-unsure]")) put(id, html);
    }
  };
  const refresh = async () => {
    const mine = ++round, answer = await post(subject.dataset.fields, new FormData(subject));
    if (mine !== round) return; // something was typed since
    place(answer);
    if (answer.yaml) $("#yaml").textContent = answer.yaml;
    $("#problem").textContent = answer.error || (answer.count ? answer.problem : "");
    drop.dataset.count = answer.count ?? drop.dataset.count;
    const more = await post("/new/look", new FormData());
    if (mine === round) place(more);
  };
  const soon = later(500, refresh);
  subject.addEventListener("input", soon);
  subject.addEventListener("click", async (event) => {
    const button = event.target.closest(".remove");
    if (!button) return;
    event.preventDefault();
    const answer = await post("/new/remove", formOf({ photo: button.value }));
    if (answer.error) say(answer.error);
    refresh();
  });
  const send = async (files) => {
    const wrong = [];
    for (const [index, file] of [...files].entries()) {
      say(`Adding ${index + 1} of ${files.length}…`);
      const answer = await post(drop.action, formOf({ photos: file }));
      if (answer.error) wrong.push(answer.error);
    }
    say("");
    $("#wrong").textContent = wrong.join("; ");
    refresh();
  };
  $("#files").addEventListener("change", (event) => { send(event.target.files); event.target.value = ""; });
  for (const [name, over] of [["dragover", true], ["dragenter", true], ["dragleave", false], ["drop", false]]) {
    document.addEventListener(name, (event) => { event.preventDefault(); drop.classList.toggle("over", over); });
  }
  document.addEventListener("drop", (event) => send(event.dataTransfer.files));
  refresh();
}
