const DIVERGING = [[33, 102, 172], [146, 197, 222], [247, 247, 247], [244, 165, 130], [178, 24, 43]];
const VIRIDIS = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];

const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));

// A colour at position v of 0 to 1 on a scale of evenly spaced colours.
const colour = (scale, v) => {
  const at = Math.min(Math.max(v, 0), 1) * (scale.length - 1);
  const low = Math.min(Math.floor(at), scale.length - 2);
  return scale[low].map((c, i) => c + (scale[low + 1][i] - c) * (at - low));
};

const draw = (canvas, height, width, rgb) => {
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d");
  const image = context.createImageData(width, height);
  for (let i = 0; i < width * height; i += 1) {
    image.data.set([...rgb(i), 255], 4 * i);
  }
  context.putImageData(image, 0, 0);
};

const percent = (share) => {
  const value = 100 * share;
  return `${value > 0 && value < 10 ? value.toFixed(1) : value.toFixed(0)}\u00a0%`;
};

const start = (root) => {
  const find = (query) => root.querySelector(query);
  const slider = find("input[type=range]");
  const choice = find("select");
  data.images.forEach((image, number) => {
    choice.add(new Option(`${number + 1}: ${data.classes[image.target]}`, number));
  });
  const sites = data.sites.map((site) => {
    const cell = document.createElement("div");
    cell.className = "cell";
    const canvas = document.createElement("canvas");
    canvas.setAttribute("role", "img");
    const caption = document.createElement("div");
    caption.className = "caption";
    cell.append(canvas, caption);
    find(".sites").append(cell);
    return { ...site, canvas, caption };
  });
  slider.max = data.sparsities.length - 1;
  slider.value = Math.max(0, data.sparsities.findLastIndex?.((s) => s <= 0.9) ?? 0);

  const show = () => {
    const image = data.images[choice.value];
    const frame = data.frames[slider.value][choice.value];
    const sparsity = String(data.sparsities[slider.value]);
    const [height, width] = data.size;
    const name = data.classes[image.target];
    find("output").textContent = sparsity;
    slider.setAttribute("aria-valuetext", `sparsity ${sparsity}`);
    const pixels = bytes(image.pixels);
    draw(find(".picture"), height, width, (i) => pixels.subarray(3 * i, 3 * i + 3));
    find(".picture").setAttribute("aria-label", `image explained for the class ${name}`);
    const map = bytes(frame.map);
    draw(find(".map"), height, width, (i) => colour(DIVERGING, (map[i] - 1) / 254));
    sites.forEach((site, number) => {
      const shares = bytes(frame.sites[number]);
      draw(site.canvas, site.drawn[0], site.drawn[1], (i) => colour(VIRIDIS, shares[i] / 255));
      site.caption.textContent = `${site.name} ${percent(frame.shares[number])}`;
      site.canvas.setAttribute("aria-label", `${site.name}, ${site.shape.join(" × ")}: ${percent(frame.shares[number])} kept`);
    });
    find(".kept").textContent =
      `The pathway keeps ${frame.kept.toLocaleString("en-GB")} of ${data.neurons.toLocaleString("en-GB")} neurons.`;
    const answers = { full: ["Whole network", image.full], inside: ["Pathway network", frame.answer] };
    Object.entries(answers).forEach(([part, [who, answer]]) => {
      find(`.${part}`).textContent =
        `${who}: predicts ${data.classes[answer.predicted]} (${percent(answer.top)}); ${name} has ${percent(answer.target)}`;
      find(`.${part}-bar span`).style.width = `${100 * answer.target}%`;
    });
  };
  slider.addEventListener("input", show);
  choice.addEventListener("change", show);
  show();
};
