"use strict";
/*
 * The mathematics of the page, as functions of gamma = -log SNR like those of the Python package. Nothing here knows of
 * a page: an image is a Float64Array, several images lie one behind the other.
 *
 * States are x_t in units in which alpha^2 + sigma^2 = 1, those that the network sees. A schedule of another kind (the
 * straight path of flow matching, exploding variance) is the same process in other units of x_t.
 */
const Diffusion = (() => {
  const sigmoid = (z) => 1 / (1 + Math.exp(-z));

  // x_t = alpha_t x_0 + sigma_t eps with alpha^2 = sigmoid(-gamma), sigma^2 = sigmoid(gamma)
  const alpha = (gamma) => Math.sqrt(sigmoid(-gamma));
  const sigma = (gamma) => Math.sqrt(sigmoid(gamma));
  // 1 - r with r = SNR(t) / SNR(s) = exp(gamma_s - gamma_t): the part of sigma_t^2 that the step s -> t adds
  const stepFraction = (gammaS, gammaT) => -Math.expm1(gammaS - gammaT);

  // x_0 from the network's output and x_t; eps then follows from x_t = alpha x_0 + sigma eps
  const X0 = {
    EpsParameterization: (output, x, a, s) => (x - s * output) / a,
    X0Parameterization: (output) => output,
    VParameterization: (output, x, a, s) => a * x - s * output, // v = alpha eps - sigma x_0
    VelocityParameterization: (output, x, a, s) => (x - s * output) / (a + s), // u = eps - x_0
  };

  // log variance of p(x_s | x_t) for states s < t. beta: of q(x_t | x_s), sigma_t^2 (1 - r), and so in the schedule's own
  // units of x_t, which differ by log_unit_var = log(alpha^2 + sigma^2); beta-tilde: of q(x_s | x_t, x_0), sigma_s^2 (1 - r)
  const logBeta = (model, s, t) => logPart(model, s, t, t) + model.log_unit_var[t - 1] - model.log_unit_var[s - 1];
  const logBetaTilde = (model, s, t) => logPart(model, s, t, s);
  const logPart = (model, s, t, of) =>
    Math.log(sigmoid(model.gammaOf(of)) * stepFraction(model.gammaOf(s), model.gammaOf(t)));
  const LOG_VARIANCE = {
    FixedLargeVariance: logBeta,
    FixedSmallVariance: logBetaTilde,
    // v log beta + (1 - v) log beta-tilde with v = (variance output + 1) / 2 (Nichol & Dhariwal 2021, equation 15)
    LearnedRangeVariance: (model, s, t, varianceOutput) => {
      const v = (varianceOutput + 1) / 2;
      return v * logBeta(model, s, t) + (1 - v) * logBetaTilde(model, s, t);
    },
    // beta-tilde + c_0^2 E|x_0 - x0-hat|^2 / D with c_0 = (1 - r) alpha_s (Analytic-DPM, Bao et al. 2022)
    AnalyticVariance: (model, s, t) => {
      const [gs, gt] = [model.gammaOf(s), model.gammaOf(t)];
      const weight = stepFraction(gs, gt) * alpha(gs);
      return Math.log(Math.exp(logBetaTilde(model, s, t)) + weight ** 2 * Math.exp(gt + model.log_eps_mse[t - 1]));
    },
  };

  /* A model: what Python wrote of it (MODEL in model.js), and its network,
   * async (x Float32Array [B * D], told, labels or null) -> Float32Array, one or two images' worth for each image. */
  class Model {
    constructor(description, network) {
      Object.assign(this, description, { network });
      this.T = description.gamma.length;
      this.size = description.shape.reduce((a, b) => a * b);
    }

    // gamma of state n = 1..T
    gammaOf(n) {
      return this.gamma[n - 1];
    }

    // x_n ~ q(x_n | x_0) with the given standard normal eps
    noised(x0, n, eps) {
      const [a, s] = [alpha(this.gammaOf(n)), sigma(this.gammaOf(n))];
      return x0.map((value, i) => a * value + s * eps[i]);
    }

    /* The network's output at state n, with classifier-free guidance: output = free + scale (class - free). Every
     * parameterisation is linear in its output, so eps and x_0 are guided in the same way. */
    async output(x, n, cond) {
      const images = x.length / this.size;
      const { labels = null, guidance = 1 } = this.classes === null ? {} : cond;
      if (labels === null || guidance === 1) return this.network(Float32Array.from(x), this.told[n - 1], labels);
      const twice = new Float32Array(2 * x.length);
      twice.set(x);
      twice.set(x, x.length);
      const free = new Array(images).fill(this.classes);
      const both = await this.network(twice, this.told[n - 1], [...labels, ...free]);
      const [told, untold] = [both.subarray(0, both.length / 2), both.subarray(both.length / 2)];
      const channels = both.length / (2 * images); // the variance output, if there is one, stays that of the class
      return told.map((v, i) => (i % channels < this.size ? untold[i] + guidance * (v - untold[i]) : v));
    }

    // { x0, eps, varianceOutput } at state n; x0 is clipped to the data's range if the model's is
    async predict(x, n, cond) {
      const output = await this.output(x, n, cond);
      const [a, s] = [alpha(this.gammaOf(n)), sigma(this.gammaOf(n))];
      const each = output.length / (x.length / this.size); // values of the output for an image
      const at = (i) => Math.floor(i / this.size) * each + (i % this.size);
      const x0 = x.map((value, i) => {
        const guess = X0[this.parameterization](output[at(i)], value, a, s);
        return this.clip_x0 ? Math.min(1, Math.max(-1, guess)) : guess;
      });
      const eps = x.map((value, i) => (value - a * x0[i]) / s);
      return { x0, eps, varianceOutput: (i) => output[at(i) + this.size] };
    }

    // the decoder's most probable image, from x_1 and the prediction there
    decoded(x, n, x0) {
      // CategoricalDecoder reads q(x_1 | x_0) as a function of x_0, without the network
      const mean = this.decoder === "CategoricalDecoder" ? x.map((value) => value / alpha(this.gammaOf(n))) : x0;
      if (this.decoder === "PlainGaussian") return mean;
      const spacing = 2 / (this.levels - 1);
      return mean.map((v) => roundHalfEven((Math.min(1, Math.max(-1, v)) + 1) / spacing) * spacing - 1);
    }
  }

  /* Samplers: from state t to state s < t. normal() gives as many standard normal numbers as x_t has values, in an
   * array; a step returns x_s, the prediction of x_0 at x_t and what the next step is to know. */
  const SAMPLERS = {
    // x_s ~ p(x_s | x_t): mean r alpha_s / alpha_t x_t + (1 - r) alpha_s x0-hat (Ho et al. 2020, algorithm 2)
    AncestralSampler: async (model, x, t, s, cond, normal) => {
      const [gt, gs] = [model.gammaOf(t), model.gammaOf(s)];
      const { x0, varianceOutput } = await model.predict(x, t, cond);
      const fraction = stepFraction(gs, gt);
      const [kept, added] = [((1 - fraction) * alpha(gs)) / alpha(gt), fraction * alpha(gs)];
      const [z, logVariance] = [normal(), LOG_VARIANCE[model.variance]];
      const std = (i) => Math.exp(0.5 * logVariance(model, s, t, varianceOutput(i)));
      const constant = model.variance === "LearnedRangeVariance" ? null : std(0);
      return { x: x.map((value, i) => kept * value + added * x0[i] + (constant ?? std(i)) * z[i]), x0 };
    },
    // x_s = alpha_s x0-hat + sigma_s eps-hat (Song et al. 2021, equation 12, eta = 0)
    DDIMSampler: async (model, x, t, s, cond) => {
      const { x0, eps } = await model.predict(x, t, cond);
      const [a, b] = [alpha(model.gammaOf(s)), sigma(model.gammaOf(s))];
      return { x: x0.map((value, i) => a * value + b * eps[i]), x0 };
    },
    // DPM-Solver++ 2M (Lu et al. 2022): x_s = sigma_s / sigma_t x_t + alpha_s (1 - e^-h) D with h = (gamma_t - gamma_s) / 2
    // and D = x0 + h / (2 h_before) (x0 - x0_before)
    DPMSolverSampler: async (model, x, t, s, cond, normal, before) => {
      const [gt, gs] = [model.gammaOf(t), model.gammaOf(s)];
      const { x0 } = await model.predict(x, t, cond);
      const h = (gt - gs) / 2;
      const weight = before ? h / (before.gamma - gt) : 0;
      const [kept, added] = [sigma(gs) / sigma(gt), alpha(gs) * -Math.expm1(-h)];
      const D = (i) => (before ? x0[i] + weight * (x0[i] - before.x0[i]) : x0[i]);
      return { x: x.map((value, i) => kept * value + added * D(i)), x0, after: { gamma: gt, x0 } };
    },
    // Heun's method for dy/dk = eps-hat in y = x / alpha and k = sigma / alpha (Karras et al. 2022, algorithm 1)
    HeunSampler: async (model, x, t, s, cond) => {
      const [gt, gs] = [model.gammaOf(t), model.gammaOf(s)];
      const ratio = alpha(gs) / alpha(gt);
      const change = sigma(gs) - ratio * sigma(gt);
      const { x0, eps } = await model.predict(x, t, cond);
      const euler = x.map((value, i) => ratio * value + change * eps[i]);
      const next = await model.predict(euler, s, cond);
      return { x: x.map((value, i) => ratio * value + 0.5 * change * (eps[i] + next.eps[i])), x0 };
    },
  };

  /* From x_T to images, in `steps` steps: after each evaluation { n, x, x0 }, the state x_n and the prediction of x_0
   * there, and at the end { n: 0 } with the decoder's most probable image as both. */
  async function* draw(model, xT, { sampler, steps, cond = {}, normal }) {
    const states = strided(model.T, steps);
    let x = xT;
    let before;
    for (let k = states.length - 1; k > 1; k--) {
      const step = await SAMPLERS[sampler](model, x, states[k], states[k - 1], cond, normal, before);
      yield { n: states[k], x, x0: step.x0 };
      x = step.x;
      before = step.after;
    }
    const { x0 } = await model.predict(x, states[1], cond);
    yield { n: states[1], x, x0 };
    const image = model.decoded(x, states[1], x0);
    yield { n: 0, x: image, x0: image };
  }

  // the data, state 0, and `steps` states of the chain at nearly equal distances: strided_grid
  function strided(T, steps) {
    const step = T / steps;
    const at = (i) => (i < (steps + 1) / 2 ? step * i : T - step * (steps - i));
    return Array.from({ length: steps + 1 }, (_, i) => roundHalfEven(at(i)));
  }

  function roundHalfEven(value) {
    const floor = Math.floor(value);
    if (value - floor !== 0.5) return Math.round(value);
    return floor % 2 === 0 ? floor : floor + 1;
  }

  /* Standard normal numbers for images first, first + 1, ...: those of image k are a function of the seed and k alone,
   * however many images there are. (They are not those of torch.) */
  function normals(seed, images, size, first = 0) {
    const streams = Array.from({ length: images }, (_, k) => gaussian(uniform(seed, first + k)));
    return () => Float64Array.from({ length: images * size }, (_, i) => streams[Math.floor(i / size)]());
  }

  // sfc32, uniform in (0, 1)
  function uniform(seed, stream) {
    let [a, b, c, counter] = [seed | 0, stream | 0, 0x9e3779b9 | 0, 1];
    const next = () => {
      const sum = (((a + b) | 0) + counter) | 0;
      counter = (counter + 1) | 0;
      a = b ^ (b >>> 9);
      b = (c + (c << 3)) | 0;
      c = (c << 21) | (c >>> 11);
      c = (c + sum) | 0;
      return ((sum >>> 0) + 0.5) / 2 ** 32;
    };
    for (let i = 0; i < 16; i++) next();
    return next;
  }

  // Box and Muller, two at a time
  function gaussian(next) {
    let kept = null;
    return () => {
      if (kept !== null) {
        const value = kept;
        kept = null;
        return value;
      }
      const [radius, angle] = [Math.sqrt(-2 * Math.log(next())), 2 * Math.PI * next()];
      kept = radius * Math.sin(angle);
      return radius * Math.cos(angle);
    };
  }

  return { Model, SAMPLERS, alpha, sigma, draw, normals, strided };
})();
