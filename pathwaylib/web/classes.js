const percent = (share) => {
  const value = 100 * share;
  return `${value > 0 && value < 10 ? value.toFixed(1) : value.toFixed(0)}\u00a0%`;
};

// A line of name, bar and value; `mark` puts a stroke on the bar.
const row = (name, share, value, mark) => {
  const [title, bar, text] = ["div", "div", "div"].map((tag) => document.createElement(tag));
  title.textContent = name;
  bar.className = "bar";
  bar.setAttribute("aria-hidden", "true");
  const fill = document.createElement("span");
  fill.style.width = `${100 * share}%`;
  bar.append(fill);
  if (mark !== undefined) {
    const stroke = document.createElement("i");
    stroke.style.left = `${100 * mark}%`;
    bar.append(stroke);
  }
  text.className = "value";
  text.textContent = value;
  return [title, bar, text];
};

const start = (root) => {
  const find = (query) => root.querySelector(query);
  const [choice, slider] = [find("select"), find("input[type=range]")];
  data.classes.forEach((name, index) => choice.add(new Option(name, index)));
  slider.max = data.shares.length - 1;
  slider.value = data.first;

  const show = () => {
    const name = data.classes[choice.value];
    const { kept, sites, inputs } = data.pathways[choice.value][slider.value];
    const share = String(data.shares[slider.value]);
    find("output").textContent = share;
    slider.setAttribute("aria-valuetext", `τ ${share}`);
    find(".name").textContent = name;
    find(".kept").textContent =
      `Class ${name}, τ = ${share}: ${kept.toLocaleString("en-GB")} of ${data.neurons.toLocaleString("en-GB")} neurons (${percent(kept / data.neurons)}).`;
    find(".sites").replaceChildren(...data.sites.flatMap((site, i) => row(site, sites[i], percent(sites[i]))));
    const lines = data.inputs.map((input, i) => {
      const line = row(input, inputs[i].inside, `${percent(inputs[i].called)} called so`, inputs[i].whole);
      line.forEach((part) => part.classList.toggle("own", inputs[i].own));
      return line;
    });
    find(".inputs").replaceChildren(...lines.flat());
    const said = (own) => {
      const some = inputs.filter((input) => input.own === own);
      const count = some.reduce((total, input) => total + input.count, 0);
      return count ? percent(some.reduce((total, input) => total + input.called * input.count, 0) / count) : "none given";
    };
    find(".now").textContent = `Called ${name} inside the pathway: ${said(true)} of its own inputs, ${said(false)} of all others.`;
  };
  choice.addEventListener("change", show);
  slider.addEventListener("input", show);
  show();
};
