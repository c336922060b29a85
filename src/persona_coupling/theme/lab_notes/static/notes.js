/* What the pages do beyond reading: colours, folding, enlarging, excerpts of what a search found. */
"use strict";

const root = document.documentElement;

function schemes() {
  const button = document.querySelector(".scheme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const say = () => {
    button.querySelector(".scheme-name").textContent = dark() ? "Light" : "Dark";
    button.setAttribute("aria-label", dark() ? "Use light colours" : "Use dark colours");
  };
  button.hidden = false;
  button.addEventListener("click", () => {
    const wanted = dark() ? "light" : "dark";
    root.dataset.theme = wanted === (system.matches ? "dark" : "light") ? "" : wanted;
    try { localStorage.setItem("lab-notes-theme", root.dataset.theme); } catch (error) { /* a private window */ }
    say();
  });
  system.addEventListener("change", say);
  say();
}

function folding() {
  const folds = [...document.querySelectorAll("details.hide")];
  const button = document.querySelector(".unfold");
  if (!button || !folds.length) return;
  const say = () => {
    const all = folds.every((fold) => fold.open);
    button.textContent = all ? "Hide all code" : "Show all code";
    button.setAttribute("aria-pressed", String(all));
  };
  button.hidden = false;
  button.addEventListener("click", () => {
    const open = !folds.every((fold) => fold.open);
    folds.forEach((fold) => { fold.open = open; });
    say();
  });
  folds.forEach((fold) => fold.addEventListener("toggle", say));
}

function enlarging() {
  const dialog = document.querySelector(".enlarged");
  const shown = dialog.querySelector("img");
  for (const image of document.querySelectorAll(".cell_output img")) {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "zoom";
    button.setAttribute("aria-label", "Enlarge the figure: " + image.alt);
    (image.closest("a.image-reference") || image).replaceWith(button); // the link is for who has no scripts
    button.append(image);
    button.addEventListener("click", () => {
      const caption = button.closest("figure")?.querySelector(".caption-text");
      shown.src = image.src;
      shown.alt = image.alt;
      dialog.querySelector("figcaption").textContent = caption ? caption.textContent : "";
      dialog.showModal();
    });
  }
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog || event.target === shown) dialog.close();
  });
}

function scrolling() {
  for (const output of document.querySelectorAll(".cell_output .output, .highlight")) {
    if (output.scrollWidth > output.clientWidth + 1) {
      output.tabIndex = 0;
      output.setAttribute("role", "region");
      output.setAttribute("aria-label", "Wide content, scrolls sideways");
    }
  }
}

function contents() {
  const fold = document.querySelector(".rail-fold");
  if (!fold) return;
  const wide = matchMedia("(min-width: 66rem)");
  const follow = () => { fold.open = wide.matches; };
  wide.addEventListener("change", follow);
  follow();
}

/* Sphinx lists pages; each gets the sections in which a word of the query stands, from a script instead of a fetch. */
function excerpts() {
  const results = document.getElementById("search-results");
  if (!results || typeof EXCERPTS === "undefined") return;
  const words = (new URLSearchParams(location.search).get("q") || "").toLowerCase().split(/[^\p{L}\p{N}_′]+/u);
  const wanted = words.filter((word) => word.length > 1);
  const stems = wanted.map((word) => (word.length > 5 ? word.slice(0, -2) : word));
  const add = (item) => {
    const link = item.querySelector("a");
    if (!link || item.querySelector(".excerpts")) return;
    const page = link.getAttribute("href").replace(/\.html.*$/, "");
    const list = document.createElement("ul");
    list.className = "excerpts";
    for (const [anchor, heading, text] of EXCERPTS[page] || []) {
      const lower = text.toLowerCase();
      const places = stems.map((stem) => lower.indexOf(stem)).filter((place) => place >= 0);
      if (!places.length || list.children.length === 3) continue;
      const row = document.createElement("li");
      const there = document.createElement("a");
      there.href = page + ".html#" + anchor;
      there.textContent = heading === link.textContent ? "Introduction" : heading;
      row.append(there, ...marked(text, Math.min(...places), stems));
      list.append(row);
    }
    if (list.children.length) item.append(list);
  };
  new MutationObserver(() => results.querySelectorAll("ul.search > li").forEach(add))
    .observe(results, { childList: true, subtree: true });
}

function marked(text, place, stems) {
  const from = Math.max(0, text.lastIndexOf(" ", Math.max(0, place - 60)) + 1);
  const to = text.length <= place + 130 ? text.length : text.lastIndexOf(" ", place + 130);
  const piece = (from ? "… " : "") + text.slice(from, to) + (to < text.length ? " …" : "");
  const pattern = stems.map((stem) => stem.replace(/[.*+?^${}()|[\]\\]/g, "\\$&") + "[\\p{L}\\p{N}]*").join("|");
  return piece.split(new RegExp(`(${pattern})`, "giu")).map((part, at) => {
    if (at % 2 === 0) return part;
    const mark = document.createElement("mark");
    mark.textContent = part;
    return mark;
  });
}

document.addEventListener("DOMContentLoaded", () => {
  [schemes, folding, enlarging, scrolling, contents, excerpts].forEach((begin) => begin());
});
