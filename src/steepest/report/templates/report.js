"use strict";
(() => {
  const value = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  // "var(--s0)" and "var(--s0)/0.2" become colors of the theme in force.
  const color = (text) => {
    const [, name, alpha] = text.match(/^var\((--[\w-]+)\)(?:\/([\d.]+))?$/) || [];
    if (!name) return text;
    const hex = value(name);
    if (alpha === undefined) return hex;
    const [r, g, b] = [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
    return `rgba(${r},${g},${b},${alpha})`;
  };
  const themed = (item) => {
    if (typeof item === "string") return color(item);
    if (Array.isArray(item)) return item.map(themed);
    if (item === null || typeof item !== "object") return item;
    return Object.fromEntries(Object.entries(item).map(([key, v]) => [key, themed(v)]));
  };

  const touch = matchMedia("(pointer: coarse)").matches;
  const layoutOf = (div, own) => {
    const beside = div.clientWidth > 700;
    const axis = (a) => ({
      gridcolor: value("--line"), linecolor: value("--line"), zeroline: false, automargin: true,
      ...a, title: { ...a.title, standoff: 8, font: { size: 12, color: value("--soft") } },
    });
    return {
      ...own, width: div.clientWidth, height: div.clientHeight,
      xaxis: axis(own.xaxis), yaxis: axis(own.yaxis),
      margin: { l: 56, r: 12, t: 12, b: 44 },
      font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: value("--ink") },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      hoverlabel: { bgcolor: value("--raised"), bordercolor: value("--line"), font: { color: value("--ink") }, align: "left" },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: value("--line"), activecolor: value("--soft") },
      hovermode: "closest", dragmode: touch ? false : "zoom", uirevision: "keep", showlegend: true,
      legend: beside ? { x: 1.01, y: 1 } : { orientation: "h", x: 0, y: -0.2, yanchor: "top" },
    };
  };

  const source = document.getElementById("chart-data");
  const charts = source ? JSON.parse(source.textContent) : {};
  const options = { displaylogo: false, modeBarButtons: [["toImage", "resetScale2d"]] };
  const draw = (id) => {
    const div = document.getElementById(`chart-${id}`);
    return Plotly.react(div, themed(charts[id].data), themed(layoutOf(div, charts[id].layout)), options);
  };
  const drawAll = () => Object.keys(charts).forEach(draw);
  drawAll();
  const resized = new ResizeObserver((entries) => {
    for (const { target } of entries) {
      const { width, height } = target.layout;
      if (target.clientWidth !== width || target.clientHeight !== height) draw(target.id.slice("chart-".length));
    }
  });
  for (const id of Object.keys(charts)) {
    const div = document.getElementById(`chart-${id}`);
    div.on("plotly_click", (event) => { location.hash = event.points[0].customdata[0]; });
    resized.observe(div);
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  matchMedia("print").addEventListener("change", drawAll);

  const compare = (a, b, sign) => {
    if (a === "" || b === "") return (a === "") - (b === "");  // what is unknown comes last
    const [x, y] = [Number(a), Number(b)];
    return sign * (Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b) : x - y);
  };
  for (const button of document.querySelectorAll(".sortable th button")) {
    button.addEventListener("click", () => {
      const head = button.closest("th");
      const sign = head.ariaSort === "ascending" ? -1 : 1;
      for (const other of head.parentNode.children) other.removeAttribute("aria-sort");
      head.ariaSort = sign === 1 ? "ascending" : "descending";
      const body = head.closest("table").tBodies[0];
      const key = (row) => row.cells[head.cellIndex].dataset.sort;
      body.append(...[...body.rows].sort((a, b) => compare(key(a), key(b), sign)));
    });
  }
})();
