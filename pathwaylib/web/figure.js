// A notebook may hold the same figure several times; each is started once.
document.querySelectorAll(`.pathwaylib-figure[data-key="${key}"]:not([data-started])`).forEach((root) => {
  root.setAttribute("data-started", "");
  start(root);
});
