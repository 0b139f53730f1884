// What a room would see wrong on the slide that is shown: a list of sentences, empty if nothing.
// Sizes are in pixels of the screen, which is as wide as the window.
function auditSlide() {
  const SMALLEST = 15;  // height of a line's letters and their descenders: 1/48 of 720
  const SMALLEST_LABEL = 11;  // size of a figure's tick labels
  const POINTS = 12, DOTS = 100;  // of those labels and of the figures (figures/style.py)
  const slide = Reveal.getCurrentSlide();
  const room = {left: 0, top: 0, right: innerWidth, bottom: innerHeight};
  const found = [];
  const tell = (what, text) => found.push(`${what}: ${text.trim().replace(/\s+/g, " ").slice(0, 60)}`);
  const isSeen = node => node.checkVisibility({opacityProperty: true, visibilityProperty: true})
    && !(node.closest("details:not([open])") && !node.closest("summary"));

  // Everything with ink: lines of text, formulas, pictures.
  const ink = [];
  const walker = document.createTreeWalker(slide, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const parent = node.parentElement;
    if (!node.textContent.trim() || parent.closest("aside, mjx-container, script, style")) continue;
    if (!isSeen(parent)) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    for (const box of range.getClientRects())
      if (box.width > 0 && box.height > 0) ink.push({box, text: node.textContent, parent, isText: true});
    if (parent.matches(".jp-OutputArea pre, .jp-OutputArea pre *")) {
      const lines = node.textContent.replace(/\n$/, "").split("\n").length;
      const high = Math.round(range.getBoundingClientRect().height / range.getClientRects()[0].height / 1.12);
      if (high > lines + 1 && lines > 1) tell("table broken by wrapped lines", node.textContent);
    }
    const isCode = parent.closest("pre, code");
    if (!isCode && /\$[^$]+\$|\\\(|\\\[|\\frac|\\begin\{/.test(node.textContent))
      tell("formula not drawn", node.textContent);
  }
  for (const node of slide.querySelectorAll("mjx-container > svg"))
    ink.push({box: node.getBoundingClientRect(), text: "formula", parent: node.parentElement});
  for (const node of slide.querySelectorAll("img, .jp-RenderedSVG svg")) {
    if (node.matches("img") && !node.naturalWidth) tell("picture not loaded", node.alt || "picture");
    ink.push({box: node.getBoundingClientRect(), text: node.alt || "picture", parent: node, isPicture: true});
  }

  if (!ink.some(({parent}) => !parent.closest(".running-head"))) found.push("empty");
  for (const {box, text, parent, isText, isPicture} of ink) {
    if (box.right > room.right + 1 || box.bottom > room.bottom + 1 || box.left < -1 || box.top < -1)
      tell("cut off", text);
    let holder = parent;  // what scrolls or hides its excess
    while (holder && holder !== slide) {
      const style = getComputedStyle(holder), edge = holder.getBoundingClientRect();
      if (style.overflowX !== "visible" && (box.right > edge.right + 2 || box.bottom > edge.bottom + 2)) {
        tell("hidden by its box", text);
        break;
      }
      holder = holder.parentElement;
    }
    const isAside = parent.closest(".running-head, .folded-note, sup, sub");
    if (isText && !isAside && box.height < SMALLEST) tell(`letters ${box.height.toFixed(0)} px high`, text);
    if (isPicture && parent.naturalWidth > 300) {
      const label = box.width / parent.naturalWidth * DOTS / 72 * POINTS;
      if (label < SMALLEST_LABEL) tell(`labels of ${label.toFixed(0)} px`, text);
    }
  }

  // Ink on ink, but for the boxes of one line of text, which touch.
  for (let i = 0; i < ink.length; i++) {
    for (let j = i + 1; j < ink.length; j++) {
      const a = ink[i].box, b = ink[j].box;
      const width = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      const height = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      if (width <= 3 || height <= 3) continue;
      const smaller = Math.min(a.width * a.height, b.width * b.height);
      if (width * height > 0.3 * smaller) tell("overlap", `${ink[i].text.slice(0, 25)} | ${ink[j].text.slice(0, 25)}`);
    }
  }

  for (const node of slide.querySelectorAll("mjx-container")) {
    if (node.querySelectorAll("svg").length < 1) tell("formula not drawn", node.textContent);
    if (node.querySelector("[data-mjx-error], [data-mml-node=merror]")) tell("formula with an error", node.textContent);
    if (node.querySelector("[fill=red]")) tell("formula with an unknown command", node.textContent);
    const next = node.nextElementSibling;
    if (next?.matches("mjx-container") && next.innerHTML === node.innerHTML && node.getAttribute("display")
        && !(node.nextSibling.textContent || "").trim()) tell("formula drawn twice", "display");
  }
  return [...new Set(found)];
}
