"use strict";
/* Images on a canvas, and the schedule as curves. */
const Pictures = (() => {
  const CANVAS = 320; // pixels across, at least

  // images in [-1, 1], as many as there are, side by side; what is beyond is clipped
  function paint(canvas, images, [channels, height, width]) {
    const pixels = channels * height * width;
    const count = images.length / pixels;
    const columns = Math.ceil(Math.sqrt(count));
    const zoom = Math.ceil(CANVAS / (columns * width));
    const gap = Math.ceil(CANVAS / 100);
    const [across, down] = [zoom * width + gap, zoom * height + gap];
    canvas.width = columns * across - gap;
    canvas.height = Math.ceil(count / columns) * down - gap;
    const small = new OffscreenCanvas(width, height);
    const [context, smallContext] = [canvas.getContext("2d"), small.getContext("2d")];
    context.imageSmoothingEnabled = false;
    for (let k = 0; k < count; k++) {
      const picture = smallContext.createImageData(width, height);
      for (let i = 0; i < height * width; i++) {
        for (let c = 0; c < 3; c++) {
          const value = images[k * pixels + (channels === 3 ? c : 0) * height * width + i];
          picture.data[4 * i + c] = Math.round(127.5 * (value + 1)); // the array clips
        }
        picture.data[4 * i + 3] = 255;
      }
      smallContext.putImageData(picture, 0, 0);
      context.drawImage(small, (k % columns) * across, Math.floor(k / columns) * down, zoom * width, zoom * height);
    }
  }

  // alpha^2 and sigma^2 over the states, and where the slider stands
  function curves(svg, gamma, n) {
    const T = gamma.length;
    const [left, right, top, bottom] = [22, 312, 8, 92];
    const x = (state) => left + ((right - left) * (state - 1)) / Math.max(1, T - 1);
    const y = (value) => bottom - (bottom - top) * value;
    const every = Math.max(1, Math.floor(T / 200));
    const states = gamma.map((_, i) => i + 1).filter((state) => state % every === 0 || state === 1 || state === T);
    const line = (scale) => states.map((k) => `${x(k).toFixed(1)},${y(scale(gamma[k - 1]) ** 2).toFixed(1)}`).join(" ");
    svg.innerHTML =
      `<path class="axis" fill="none" d="M${left} ${top}V${bottom}H${right}"/>` +
      `<text x="${left - 6}" y="${top + 8}" text-anchor="end">1</text>` +
      `<text x="${left - 6}" y="${bottom}" text-anchor="end">0</text>` +
      `<text x="${right}" y="${bottom + 14}" text-anchor="end">t</text>` +
      `<polyline class="signal" points="${line(Diffusion.alpha)}"/>` +
      `<polyline class="noise" points="${line(Diffusion.sigma)}"/>` +
      `<text class="signal" x="${left + 10}" y="${top + 20}">α²</text>` +
      `<text class="noise" x="${left + 10}" y="${bottom - 12}">σ²</text>` +
      `<path class="now" d="M${x(n)} ${top}V${bottom}"/>`;
  }

  return { curves, paint };
})();
