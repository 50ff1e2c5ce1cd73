"use strict";
// Marks which tokens of a prompt a layer's heads kept. Neighbours of one level share one element,
// so that long prompts stay fast.
for (const viewer of document.querySelectorAll(".kept-text")) {
  const { tokens, layers } = JSON.parse(document.getElementById(viewer.dataset.source).textContent);
  const [layerBox, headBox, status, prompt] = [".layer", ".head", ".status", ".prompt"].map(
    (name) => viewer.querySelector(name),
  );
  const LEVELS = 5;
  const bytes = (mask) => Uint8Array.from(atob(mask), (letter) => letter.charCodeAt(0));

  function levelsOf(masks) {
    const counts = new Uint16Array(tokens.length);
    for (const mask of masks.map(bytes)) {
      for (let i = 0; i < counts.length; i++) counts[i] += (mask[i >> 3] >> (i & 7)) & 1;
    }
    return counts.map((count) => Math.ceil((count * LEVELS) / masks.length));
  }

  function show() {
    const { masks, dense_reason: reason, beyond_window: beyond } = layers[layerBox.value];
    const head = Number(headBox.value);
    headBox.disabled = reason !== null;
    const chosen = head < 0 ? masks : masks.slice(head, head + 1);
    const levels = chosen.length ? levelsOf(chosen) : new Uint16Array(tokens.length).fill(LEVELS);
    const content = document.createDocumentFragment();
    let kept = 0;
    for (let start = 0, end; start < tokens.length; start = end) {
      for (end = start + 1; end < tokens.length && levels[end] === levels[start]; end++);
      const run = document.createElement(levels[start] ? "mark" : "span");
      run.className = "h" + (reason === null ? levels[start] : "");
      run.textContent = tokens.slice(start, end).join("");
      content.append(run);
      if (levels[start]) kept += end - start;
    }
    prompt.replaceChildren(content);
    const by = head < 0 ? "at least one head" : "head " + head;
    const share = ((100 * kept) / tokens.length).toFixed(1);
    const verb = beyond ? "attended to beyond the sliding window by every query of" : "kept by";
    status.textContent =
      reason === null
        ? `${kept.toLocaleString("en")} of ${tokens.length.toLocaleString("en")} tokens (${share}%) ${verb} ${by}.`
        : `This layer ran dense, over all tokens: ${reason}.`;
  }

  const sparse = layers.findIndex((layer) => layer.dense_reason === null);
  layerBox.value = Math.max(sparse, 0);
  headBox.value = -1;
  layerBox.addEventListener("change", show);
  headBox.addEventListener("change", show);
  show();
}
