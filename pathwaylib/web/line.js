const short = (value) => (value === 0 ? "0" : value.toPrecision(3).replace("-", "−"));

const start = (root) => {
  const find = (query) => root.querySelector(query);
  const [choice, slider] = [find("select"), find("input[type=range]")];
  data.directions.forEach((name, index) => choice.add(new Option(name, index)));
  slider.value = 0;
  const plots = data.networks.map(({ name }) => {
    const title = document.createElement("p");
    title.className = "note";
    title.textContent = `Response to ${data.target}: ${name}`;
    const plot = document.createElement("div");
    find(".networks").append(title, plot);
    return plot;
  });

  const show = () => {
    const share = slider.value / slider.max;
    const at = share * data.length;
    const width = Math.max(260, find(".networks").clientWidth);
    const said = data.networks.map(({ name, walks }, index) => {
      const { ends, values, slopes } = walks[choice.value];
      const piece = Math.max(0, ends.findIndex((end) => end >= at && end > 0) - 1);
      const value = values[piece] + slopes[piece] * (at - ends[piece]);
      const place = plane(width, [...values, 0], (part) => short(part * data.length));
      const [x, y] = [(distance) => place.x(distance / data.length), place.y];
      const tangent = [0, data.length].map((end) => [x(end), y(value + slopes[piece] * (end - at))]);
      const bottom = HEIGHT - EDGE.bottom;
      const kinks = ends.slice(1, -1);
      plots[index].innerHTML = picture(width, `${name}: ${kinks.length} kinks up to distance ${short(data.length)}`,
        `<defs><clipPath id="${key}-${index}"><rect x="${EDGE.left}" y="0" width="${width - EDGE.left - EDGE.right}" height="${bottom}"/></clipPath></defs>` +
        place.frame +
        kinks.map((kink) => `<line class="kink" x1="${x(kink)}" x2="${x(kink)}" y1="${bottom - 8}" y2="${bottom}"/>`).join("") +
        `<line class="cursor" x1="${x(at)}" x2="${x(at)}" y1="${EDGE.top}" y2="${bottom}"/>` +
        `<g clip-path="url(#${key}-${index})">${line("tangent", tangent)}</g>` +
        line("response", ends.map((end, i) => [x(end), y(values[i])])) +
        line("piece", [piece, piece + 1].map((i) => [x(ends[i]), y(values[i])])) +
        `<circle class="dot" cx="${x(at)}" cy="${y(value)}" r="5"/>`);
      return `${name}: piece ${piece + 1} of ${kinks.length + 1}, from ${short(ends[piece])} to ${short(ends[piece + 1])}, slope ${short(slopes[piece])}.`;
    });
    find("output").textContent = short(at);
    slider.setAttribute("aria-valuetext", `distance ${short(at)}`);
    find(".now").textContent = said.join("\n");
  };
  choice.addEventListener("change", show);
  slider.addEventListener("input", show);
  show();
  new ResizeObserver(show).observe(find(".networks"));
};
