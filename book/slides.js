// One slide at a time. Arrows or a click: on and back; N: notes below; P: a second window with notes and clock.
(() => {
  const slides = [...document.querySelectorAll("section")], presenter = location.search === "?presenter";
  const foot = document.body.appendChild(document.createElement("footer")), begun = Date.now();
  let at = 0, other = presenter ? window.opener : null;
  document.documentElement.classList.toggle("notes", presenter);
  function show(to, tell = true) {
    at = Math.min(slides.length - 1, Math.max(0, to));
    slides.forEach((slide, k) => slide.classList.toggle("shown", k === at));
    history.replaceState(null, "", `#${at + 1}`);
    if (tell && other) other.postMessage(at, "*");
    clock();
  }
  function clock() {
    const planned = slides.slice(0, at + 1).reduce((sum, slide) => sum + Number(slide.dataset.minutes), 0);
    const now = presenter ? ` · now minute ${Math.floor((Date.now() - begun) / 60000)}` : "";
    foot.textContent = `${at + 1} / ${slides.length} · ${slides[at].dataset.minutes} min, done at minute ${planned}${now}`;
  }
  addEventListener("message", (event) => Number.isInteger(event.data) && show(event.data, false));
  addEventListener("keydown", (event) => {
    if (event.target.closest("input, select, button, [tabindex]")) return;
    if (["ArrowRight", "PageDown", " "].includes(event.key)) show(at + 1);
    else if (["ArrowLeft", "PageUp"].includes(event.key)) show(at - 1);
    else if (event.key === "n") document.documentElement.classList.toggle("notes");
    else if (event.key === "p") other = open(`${location.pathname}?presenter#${at + 1}`, "presenter", "width=900,height=700");
    else return;
    event.preventDefault();
  });
  foot.addEventListener("click", () => show(at + 1));
  setInterval(clock, 10000);
  show((Number(location.hash.slice(1)) || 1) - 1, false);
})();
