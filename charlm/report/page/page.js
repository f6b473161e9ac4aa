"use strict";
const tip = document.getElementById("tip");
let marked = null;

function hide() {
  tip.hidden = true;
  if (marked) marked.classList.remove("on");
  marked = null;
}

function show(passage, span) {
  if (span === marked) return;
  hide();
  marked = span;
  span.classList.add("on");
  const place = passage.spans.indexOf(span);
  const [, bits, symbols, likeliest] = passage.data[place];
  const head = document.createElement("b");
  head.textContent = `${span.textContent}  ${bits.toFixed(2)} bits` + (symbols > 1 ? ` in ${symbols} symbols` : "");
  const table = document.createElement("table");
  for (const [text, probability] of likeliest) {
    const row = table.insertRow();
    row.insertCell().textContent = text === " " ? "␣" : text;
    row.insertCell().textContent = `${(100 * probability).toFixed(1)} %`;
  }
  tip.replaceChildren(head, table);
  tip.hidden = false;
  const box = span.getClientRects()[0];
  const left = Math.min(box.left, document.documentElement.clientWidth - tip.offsetWidth - 8);
  const below = box.bottom + tip.offsetHeight + 8 < window.innerHeight;
  tip.style.left = `${Math.max(8, left) + window.scrollX}px`;
  tip.style.top = `${(below ? box.bottom + 6 : box.top - tip.offsetHeight - 6) + window.scrollY}px`;
}

for (const element of document.querySelectorAll(".passage")) {
  const data = JSON.parse(element.nextElementSibling.textContent);
  const passage = { data, spans: Array.from(element.querySelectorAll("span")) };
  const pointed = (event) => {
    if (event.target.matches(".passage span")) show(passage, event.target);
  };
  element.addEventListener("pointerover", pointed);
  element.addEventListener("click", pointed);
  element.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && hide());
  element.addEventListener("keydown", (event) => {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!by) return;
    event.preventDefault();
    const next = passage.spans[passage.spans.indexOf(marked) + by];
    if (next) show(passage, next);
  });
  element.addEventListener("blur", hide);
}
document.addEventListener("keydown", (event) => event.key === "Escape" && hide());
document.addEventListener("click", (event) => event.target.closest(".passage") || hide());
