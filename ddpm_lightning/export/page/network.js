"use strict";
/*
 * The network, run by ONNX Runtime Web. RUNTIME (runtime.js) holds its two files, or says where they are with a hash of
 * each; NETWORK (model.js) is the ONNX graph. Embedded bytes are base64 of gzip, so that the page needs no server.
 */
const Network = (() => {
  async function unpacked(base64) {
    const packed = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  }

  async function fetched(name, integrity) {
    try {
      const response = await fetch(RUNTIME.url + name, { integrity });
      if (!response.ok) throw new Error(`status ${response.status}`);
      return new Uint8Array(await response.arrayBuffer());
    } catch (error) {
      throw new Error(
        `${RUNTIME.url + name} could not be loaded (${error.message}). The page needs it to run the network: ` +
          "check the connection, or export with --runtime, which puts it into the page's folder.",
      );
    }
  }

  const file = ({ name, integrity, embedded }) => (embedded ? unpacked(embedded) : fetched(name, integrity));

  /* async (x Float32Array [B * D], told, labels or null) -> Float32Array; tell(text) is told what is going on */
  async function load(description, tell) {
    tell("loading ONNX Runtime …");
    const [script, wasm] = await Promise.all(RUNTIME.files.map(file));
    const ort = await import(URL.createObjectURL(new Blob([script], { type: "text/javascript" })));
    ort.env.wasm.wasmBinary = wasm;
    ort.env.wasm.numThreads = 1; // more need headers that a static page cannot set
    tell("loading the network …");
    const session = await ort.InferenceSession.create(await unpacked(NETWORK), { executionProviders: ["wasm"] });
    let last = Promise.resolve(); // a session runs one evaluation at a time
    const run = async (x, told, labels) => {
      const images = x.length / description.shape.reduce((a, b) => a * b);
      const inputs = {
        x: new ort.Tensor("float32", x, [images, ...description.shape]),
        t: new ort.Tensor("float32", new Float32Array(images).fill(told), [images]),
      };
      if (description.classes !== null) {
        const whole = (labels ?? new Array(images).fill(description.classes)).map(BigInt);
        inputs.label = new ort.Tensor("int64", BigInt64Array.from(whole), [images]);
      }
      return (await session.run(inputs)).output.data;
    };
    return (...inputs) => (last = last.catch(() => {}).then(() => run(...inputs)));
  }

  return { load };
})();
