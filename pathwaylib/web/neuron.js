// A step function given by its value in each of n equal cells; `until` cells of it.
const stairs = (values, { x, y }, until = values.length) =>
  values.slice(0, until).flatMap((value, i) => [[x(i / values.length), y(value)], [x((i + 1) / values.length), y(value)]]);

const area = (kind, values, place, until) =>
  `<polygon class="${kind}" points="${[[place.x(0), place.y(0)], ...stairs(values, place, until), [place.x(until / values.length), place.y(0)]].map((point) => point.join()).join(" ")}"/>`;

const start = (root) => {
  const find = (query) => root.querySelector(query);
  const [choice, inside, slider] = [find("select.site"), find("select.neuron"), find("input[type=range]")];
  data.sites.forEach((site, index) => choice.add(new Option(site.name, index)));
  slider.max = data.steps;
  slider.value = data.steps;

  const fill = () => {
    const { neurons } = data.sites[choice.value];
    inside.replaceChildren(...neurons.map((neuron, index) => new Option(neuron.name, index)));
    inside.value = Math.min(1, neurons.length - 1);
  };

  const show = () => {
    const site = data.sites[choice.value];
    const { name, alone, along, taylor } = site.neurons[inside.value];
    const cell = Number(slider.value);
    const alpha = cell / data.steps;
    const slopes = alone.slice(1).map((value, i) => (value - alone[i]) * data.steps);
    const sum = (values, until = data.steps) => values.slice(0, until).reduce((total, value) => total + value, 0) / data.steps;
    const full = alone[data.steps];
    const width = Math.max(260, find(".plot").clientWidth);

    const above = plane(width, [...alone, full - taylor]);
    find(".response").innerHTML = picture(width, `response from ${number(alone[0])} at α = 0 to ${number(full)} at α = 1; the tangent starts at ${number(full - taylor)}`,
      above.frame +
      `<line class="cursor" x1="${above.x(alpha)}" x2="${above.x(alpha)}" y1="${EDGE.top}" y2="${HEIGHT - EDGE.bottom}"/>` +
      line("tangent", [[above.x(0), above.y(full - taylor)], [above.x(1), above.y(full)]]) +
      line("alone", alone.map((value, i) => [above.x(i / data.steps), above.y(value)])) +
      `<circle class="alone-dot" cx="${above.x(alpha)}" cy="${above.y(alone[cell])}" r="5"/>`);

    const below = plane(width, [...slopes, ...along, taylor, 0]);
    find(".slope").innerHTML = picture(width, `slope at α = 1: ${number(taylor)}; area alone ${number(sum(slopes))}, while the whole site grows ${number(sum(along))}`,
      below.frame + area("alone-area", slopes, below, cell) + area("along-area", along, below, cell) +
      `<line class="cursor" x1="${below.x(alpha)}" x2="${below.x(alpha)}" y1="${EDGE.top}" y2="${HEIGHT - EDGE.bottom}"/>` +
      line("alone", stairs(slopes, below)) + line("along", stairs(along, below)) +
      `<circle class="taylor-dot" cx="${below.x(1)}" cy="${below.y(taylor)}" r="5"/>`);

    find("output").textContent = alpha.toFixed(2);
    slider.setAttribute("aria-valuetext", `α ${alpha.toFixed(2)}`);
    find(".title").textContent = `Response to ${data.target} (logit): ${name} of ${site.name}`;
    find(".now").textContent =
      `At α = ${alpha.toFixed(2)} the response is ${number(alone[cell])}. Area under the slope so far: ` +
      `${number(sum(slopes, cell))} alone, ${number(sum(along, cell))} while the whole site grows.`;
    find(".taylor-value").textContent = number(taylor);
    find(".alone-value").textContent = number(full - alone[0]);
    find(".along-value").textContent = number(sum(along));
  };
  choice.addEventListener("change", () => { fill(); show(); });
  inside.addEventListener("change", show);
  slider.addEventListener("input", show);
  choice.value = data.first;
  fill();
  show();
  new ResizeObserver(show).observe(find(".plot"));
};
