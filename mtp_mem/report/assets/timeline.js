// Says what lies under the pointer (or under the arrow keys' line): the band, its tensors, and where they were made.
"use strict";
for (const figure of document.querySelectorAll("figure.timeline")) {
  const data = JSON.parse(figure.querySelector("script.data").textContent);
  const svg = figure.querySelector("svg");
  const line = svg.querySelector(".cursor");
  const tip = figure.querySelector(".tip");
  let column = 0;
  let band = 0;

  const bytes = (n) => {
    for (const [unit, name] of [[2 ** 30, "GiB"], [2 ** 20, "MiB"], [2 ** 10, "KiB"]]) {
      if (n >= unit) return `${(n / unit).toFixed(n < 10 * unit ? 2 : 1)} ${name}`;
    }
    return `${n} B`;
  };
  const origin = (i) => data.origins[i].filter(Boolean).reverse().join(", in ") || "before the step";
  const nearest = (event) => {
    let low = 0;
    let high = data.events.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (data.events[middle] < event) low = middle + 1;
      else high = middle;
    }
    return low > 0 && event - data.events[low - 1] < data.events[low] - event ? low - 1 : low;
  };
  const say = (tag, text) => {
    const element = document.createElement(tag);
    element.textContent = text; // text, never markup: names come from a file
    tip.append(element);
  };

  const show = () => {
    const event = data.events[column];
    const row = data.rows[column];
    const live = data.tensors.filter(([c, , , born, died]) => c === band && born <= event && event < died);
    live.sort((a, b) => b[1] - a[1]);
    tip.replaceChildren();
    say("strong", `${data.categories[band]}: ${bytes(row[band])} of ${bytes(row.reduce((a, b) => a + b))}`);
    for (const [, nbytes, made] of live.slice(0, 6)) say("div", `${bytes(nbytes)}  made by ${origin(made)}`);
    const rest = row[band] - live.slice(0, 6).reduce((sum, tensor) => sum + tensor[1], 0);
    if (rest > 0) say("div", `${bytes(rest)}  in ${live.length > 6 ? "smaller ones and " : ""}what was live before the step`);
    say("div", `event ${event}: ${origin(data.made[column])}`);
    const x = data.width * event / data.last;
    line.setAttribute("x1", x);
    line.setAttribute("x2", x);
    line.removeAttribute("visibility");
  };

  svg.addEventListener("pointermove", (pointer) => {
    const box = svg.getBoundingClientRect();
    const view = svg.viewBox.baseVal;
    const x = view.x + (pointer.clientX - box.left) / box.width * view.width;
    const y = view.y + (pointer.clientY - box.top) / box.height * view.height;
    column = nearest(Math.max(0, Math.min(data.last, x / data.width * data.last)));
    const height = (1 - y / data.height) * data.top;
    const row = data.rows[column];
    let sum = 0;
    band = row.findLastIndex((n) => n > 0);
    for (let i = 0; i < row.length; i++) {
      sum += row[i];
      if (row[i] > 0 && height <= sum) {
        band = i;
        break;
      }
    }
    show();
  });
  svg.addEventListener("keydown", (key) => {
    const step = {ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1]}[key.key];
    if (!step) return;
    key.preventDefault();
    column = Math.max(0, Math.min(data.events.length - 1, column + step[0]));
    band = Math.max(0, Math.min(data.categories.length - 1, band + step[1]));
    show();
  });
}
