"use strict";
const stops = STOPS.map(s => [1, 3, 5].map(i => parseInt(s.slice(i, i + 2), 16)));

function colour(value, low, high, log) {
  if (!Number.isFinite(value) || (log && value <= 0)) return null;
  let share = log ? Math.log(Math.max(value, low) / low) / Math.log(high / low) : (value - low) / (high - low);
  share = high > low ? Math.min(1, Math.max(0, share)) : 0.5;
  const where = share * (stops.length - 1), index = Math.min(Math.floor(where), stops.length - 2);
  return "rgb(" + stops[index].map((a, i) => Math.round(a + (where - index) * (stops[index + 1][i] - a))).join() + ")";
}

for (const slider of document.querySelectorAll(".heat input[type=range]")) {
  const figure = slider.closest(".heat"), steps = JSON.parse(slider.dataset.steps);
  const low = +figure.dataset.low, high = +figure.dataset.high, log = figure.dataset.log === "1";
  slider.addEventListener("input", () => {
    const step = steps[+slider.value];
    slider.setAttribute("aria-valuetext", "step " + step);
    slider.parentElement.querySelector("output").textContent = step;
    for (const panel of figure.querySelectorAll(".panel")) {
      const own = JSON.parse(panel.dataset.steps);  // a run that was not measured at this step shows the one before
      const index = own.reduce((best, s, i) => s <= step ? i : best, -1);
      for (const cell of panel.querySelectorAll("rect")) {
        const value = index < 0 ? NaN : parseFloat(cell.dataset.values.split(" ")[index]);
        const fill = colour(value, low, high, log);
        cell.classList.toggle("none", fill === null);
        if (fill === null) cell.removeAttribute("fill"); else cell.setAttribute("fill", fill);
        cell.dataset.tip = cell.dataset.cell + ": " + (Number.isNaN(value) ? "no value" : value);
      }
    }
  });
}

const tip = document.getElementById("tip");
document.addEventListener("mousemove", event => {
  const text = event.target.dataset && event.target.dataset.tip;
  tip.style.display = text ? "block" : "none";
  if (!text) return;
  tip.textContent = text;
  tip.style.left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 6) + "px";
  tip.style.top = Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 6) + "px";
});
