// What the figures with plots share.
const HEIGHT = 176;
const EDGE = { left: 62, right: 12, top: 10, bottom: 26 };

const number = (value) => (value < 0 ? "−" : "") + Math.abs(value).toFixed(Math.abs(value) < 10 ? 3 : 2);

// Two to five round numbers between two ends.
const ticks = (low, high) => {
  const rough = (high - low) / 4;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
  const found = [];
  for (let at = Math.ceil(low / step); at * step <= high; at += 1) {
    found.push(at * step);
  }
  return { found, digits: Math.max(0, -Math.floor(Math.log10(step) + 1e-9)) };
};

// A plot over 0 to 1: places for its values, and its frame as text; `label` names the places 0, 0.25, ...
const plane = (width, values, label = String) => {
  const ends = [Math.min(...values), Math.max(...values)];
  const room = 0.06 * (ends[1] - ends[0]) || 1;
  const [low, high] = [ends[0] - room, ends[1] + room];
  const x = (share) => EDGE.left + share * (width - EDGE.left - EDGE.right);
  const y = (value) => EDGE.top + ((high - value) / (high - low)) * (HEIGHT - EDGE.top - EDGE.bottom);
  const { found, digits } = ticks(low, high);
  const lines = found.map((value) =>
    `<line class="frame" x1="${x(0)}" x2="${x(1)}" y1="${y(value)}" y2="${y(value)}"/>` +
    `<text x="${EDGE.left - 6}" y="${y(value) + 4}" text-anchor="end">${value.toFixed(digits).replace("-", "−")}</text>`);
  // On a phone five names would touch.
  const names = (width < 420 ? [0, 0.5, 1] : [0, 0.25, 0.5, 0.75, 1]).map((share) =>
    `<text x="${x(share)}" y="${HEIGHT - 8}" text-anchor="${share === 1 ? "end" : "middle"}">${label(share)}</text>`);
  return { x, y, frame: lines.join("") + names.join("") };
};

const line = (kind, points) => `<polyline class="${kind}" points="${points.map((point) => point.join()).join(" ")}"/>`;

const picture = (width, label, content) =>
  `<svg role="img" aria-label="${label}" width="${width}" height="${HEIGHT}" viewBox="0 0 ${width} ${HEIGHT}">${content}</svg>`;
