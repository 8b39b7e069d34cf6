/** The networks of a model, by ONNX Runtime's WebAssembly; in a worker. */

import * as ort from "onnxruntime-web/wasm";
import runtimeScript from "onnxruntime-web/ort-wasm-simd-threaded.mjs?url";
import runtimeBinary from "onnxruntime-web/ort-wasm-simd-threaded.wasm?url";
import type { Denoiser, Model } from "./cascade";
import type { Run } from "./denoise";
import { PromptTokenizer } from "./text";

const CACHE = "pokediff"; // of the service worker, too
const MAX_THREADS = 8;

/** Told while files are loaded: bytes so far and in all. */
export type Progress = (loaded: number, total: number) => void;

export class Networks {
  private readonly loaded = new Set<string>(); // files
  private readonly sessions = new Map<string, ort.InferenceSession>();
  private tokenizer: PromptTokenizer | null = null;
  private readonly vectors = new Map<string, Float32Array>();

  constructor(
    private readonly model: Model,
    private readonly site: URL,
  ) {
    ort.env.wasm.wasmPaths = { mjs: absolute(runtimeScript) };
    ort.env.wasm.numThreads = threads();
    this.vectors.set("", Float32Array.from(model.nullText));
  }

  /** Load these denoisers, and what every drawing needs, as far as it is not loaded yet. Throws an Error with a sentence. */
  async load(denoisers: readonly Denoiser[], progress: Progress): Promise<void> {
    const runtime = { file: absolute(runtimeBinary), bytes: this.model.runtimeBytes };
    const files = [runtime, this.model.tokenizer, this.model.textEncoder, ...denoisers].filter(
      ({ file }) => !this.loaded.has(file),
    );
    const total = files.reduce((sum, { bytes }) => sum + bytes, 0);
    let before = 0;
    for (const { file, bytes } of files) {
      const content = await read(new URL(file, this.site), (part) => progress(before + Math.min(part, bytes), total));
      if (file === runtime.file) ort.env.wasm.wasmBinary = content;
      else if (file === this.model.tokenizer.file) this.makeTokenizer(content);
      else this.sessions.set(file, await ort.InferenceSession.create(content, { executionProviders: ["wasm"] }));
      this.loaded.add(file);
      progress((before += bytes), total);
    }
  }

  private makeTokenizer(content: Uint8Array): void {
    const { tokenizer, textEncoder } = this.model;
    const file = JSON.parse(new TextDecoder().decode(content));
    this.tokenizer = new PromptTokenizer(file, tokenizer.config, textEncoder.maxTokens, textEncoder.endToken);
  }

  /** The text vector of a prompt, and whether words of it were cut; "" gives that of no condition. */
  async encode(prompt: string): Promise<{ vector: Float32Array; cut: boolean }> {
    const { ids, cut } = this.tokenizer!.encode(prompt);
    let vector = this.vectors.get(prompt);
    if (vector === undefined) {
      const shape = [1, ids.length];
      const { pooled } = await this.sessions.get(this.model.textEncoder.file)!.run({
        input_ids: new ort.Tensor("int64", BigInt64Array.from(ids, BigInt), shape),
        attention_mask: new ort.Tensor("int64", new BigInt64Array(ids.length).fill(1n), shape),
      });
      vector = pooled.data as Float32Array;
      this.vectors.set(prompt, vector);
    }
    return { vector, cut };
  }

  /** x0 of a denoiser; see `Run`. */
  readonly run: Run = async (denoiser, rows, { x, timestep, text, low_res }) => {
    const { channels } = this.model;
    const pictures = (values: Float32Array, side: number) =>
      new ort.Tensor("float32", values, [rows, channels, side, side]);
    const inputs: Record<string, ort.Tensor> = {
      x: pictures(x, denoiser.imageSize),
      timestep: new ort.Tensor("float32", timestep, [rows]),
      text: new ort.Tensor("float32", text, [rows, text.length / rows]),
    };
    if (low_res) inputs.low_res = pictures(low_res, denoiser.imageSize / denoiser.upscale);
    const { x0 } = await this.sessions.get(denoiser.file)!.run(inputs);
    return x0.data as Float32Array;
  };
}

/** Threads need shared memory, which browsers give to cross-origin isolated pages only. */
export function threads(): number {
  return self.crossOriginIsolated ? Math.min(MAX_THREADS, navigator.hardwareConcurrency) : 1;
}

const absolute = (url: string) => new URL(url, self.location.href).href;

/** A file of the site, from the cache where there is one. Throws an Error with a sentence when it cannot be had. */
async function read(url: URL, progress: (bytes: number) => void): Promise<Uint8Array> {
  const cache = "caches" in self ? await caches.open(CACHE).catch(() => null) : null; // secure hosts only
  const kept = await cache?.match(url);
  if (kept) return new Uint8Array(await kept.arrayBuffer());
  let response: Response;
  try {
    response = await fetch(url);
  } catch {
    throw new Error(`${nameOf(url)} could not be loaded: check the connection and reload the page.`);
  }
  if (!response.ok || response.body === null)
    throw new Error(`${nameOf(url)} could not be loaded: the server answered ${response.status}.`);
  const parts: Uint8Array[] = [];
  let length = 0;
  try {
    for (const reader = response.body.getReader(); ;) {
      const { done, value } = await reader.read();
      if (done) break;
      parts.push(value);
      progress((length += value.length));
    }
  } catch {
    throw new Error(`The connection was lost while ${nameOf(url)} was loaded: reload the page.`);
  }
  const content = new Uint8Array(await new Blob(parts as BlobPart[]).arrayBuffer());
  await cache?.put(url, new Response(content)).catch(() => undefined); // a full disk: it works without
  return content;
}

const nameOf = (url: URL) => url.pathname.split("/").pop();
