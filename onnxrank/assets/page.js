"use strict";
const chooser = document.getElementById("candidates");
if (chooser) {
  chooser.addEventListener("change", () => {
    for (const part of document.querySelectorAll("[data-candidates]")) {
      part.hidden = part.dataset.candidates !== chooser.value;
    }
  });
}
