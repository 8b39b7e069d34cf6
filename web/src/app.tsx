/** The page. State and actions are in state.ts. */

import { useSignal, type Signal } from "@preact/signals";
import type { ComponentChildren } from "preact";
import { useEffect, useLayoutEffect, useRef } from "preact/hooks";
import { TOOLS, type Tool } from "./atlas";
import { sizesOf, type Model } from "./cascade";
import { saveGif, savePng, saveSheet } from "./downloads";
import { parsePalette, type Picture } from "./pictures";
import * as state from "./state";

const CHIPS = 12; // words of a group that are shown at first
const SCALES = [1, 2, 4, 8, 16];

export function App() {
  return (
    <>
      <Header />
      <main>
        <Prompt />
        <Stage />
        <Settings />
        <Words />
        <Shelf />
      </main>
      <Footer />
    </>
  );
}

function Header() {
  return (
    <header>
      <h1>{state.model.value?.name ?? "Draw creatures"}</h1>
      <p>
        A small diffusion model draws creatures from your words. It runs in this browser: nothing you type or draw
        leaves it.
      </p>
    </header>
  );
}

function Prompt() {
  const submit = (event: Event) => {
    event.preventDefault();
    state.draw();
    // On a narrow page the picture lies below the button.
    document.getElementById("stage")?.scrollIntoView({ block: "nearest", behavior: "smooth" });
  };
  useEffect(() => {
    const onKey = (event: KeyboardEvent) => event.key === "Escape" && state.stop();
    addEventListener("keydown", onKey);
    return () => removeEventListener("keydown", onKey);
  }, []);
  const loading = state.progress.value;
  return (
    <form id="draw" class="prompt" onSubmit={submit}>
      <label for="prompt">Prompt</label>
      <div class="row">
        <input
          id="prompt"
          type="text"
          maxLength={300}
          autocomplete="off"
          value={state.prompt.value}
          onInput={(event) => (state.prompt.value = event.currentTarget.value)}
        />
        {state.drawing.value ? (
          <button type="button" class="main" onClick={state.stop}>
            Stop
          </button>
        ) : (
          <button
            type="submit"
            class="main"
            disabled={loading !== null || !!(state.failure.value && !state.model.value)}
          >
            Draw
          </button>
        )}
      </div>
      {loading !== null && <progress max={1} value={loading} aria-label="Loading the model" />}
      <p class="status" role="status">
        {state.status.value}
      </p>
      {state.failure.value && (
        <p class="failure" role="alert">
          {state.failure.value}
        </p>
      )}
    </form>
  );
}

// ------------------------------------------------------------------------------------------------------- the drawing

function Stage() {
  const all = state.drawn.value;
  const of = state.stepsOf.value;
  if (all.length === 0)
    return (
      <section id="stage" class="stage empty" aria-label="Drawing">
        <p>The picture emerges here, from noise.</p>
      </section>
    );
  const begun = all.filter(({ frames }) => frames.length > 0);
  const newest = begun[state.drawing.value ? begun.length - 1 : 0]?.frames ?? []; // of the picture that is drawn now
  const last = newest.length - 1;
  const at = Math.min(state.step.value ?? last, last);
  const frame = newest[at];
  return (
    <section id="stage" class="stage" aria-label="Drawing">
      <div class={all.length === 1 ? "pictures single" : "pictures"}>
        {all.map((one, k) => (
          <button
            type="button"
            class="picture"
            aria-pressed={k === state.selected.value}
            aria-label={`${one.job.prompt}, seed ${one.job.to ?? one.job.seed}${one.frames.length ? "" : ", not drawn yet"}`}
            onClick={() => (state.selected.value = k)}
          >
            <Canvas picture={state.shown(one)} size={state.sampling.value!.size} />
          </button>
        ))}
      </div>
      {of > 0 && frame && (
        <div class="scrub">
          <label for="step">
            Step {at} of {of}
            <span class="detail">
              {frame.denoiser === null ? "finished" : `${frame.denoiser}, sigma ${frame.sigma.toPrecision(2)}`}
            </span>
          </label>
          <input
            id="step"
            type="range"
            min={0}
            max={of}
            value={at}
            onInput={(event) => {
              const value = event.currentTarget.valueAsNumber;
              state.step.value = value >= last ? null : value;
            }}
          />
          <label class="check">
            <input
              type="checkbox"
              checked={state.noisy.value}
              onChange={(event) => (state.noisy.value = event.currentTarget.checked)}
            />
            Noisy picture x instead of the prediction x0
          </label>
        </div>
      )}
      {state.isDone(all[state.selected.value].frames) && <Actions />}
    </section>
  );
}

/** A picture without smoothing; an empty square of `size` px for none. */
function Canvas({ picture, size }: { picture: Picture | null; size: number }) {
  const canvas = useRef<HTMLCanvasElement>(null);
  const side = picture?.width ?? size;
  useLayoutEffect(() => {
    const context = canvas.current!.getContext("2d")!;
    if (picture) context.putImageData(new ImageData(picture.data as ImageDataArray, side, side), 0, 0);
    else context.clearRect(0, 0, side, side);
  }, [picture, side]);
  return <canvas ref={canvas} width={side} height={side} aria-hidden="true" />;
}

function Actions() {
  const tool = useSignal<Tool>("aseprite");
  const share = useSignal(0.3);
  const copied = useSignal("");
  const done = state.drawn.value.filter(({ frames }) => state.isDone(frames));
  const chosen = state.drawn.value[state.selected.value];
  const finished = ({ frames }: state.Drawn) => state.inPalette(frames[frames.length - 1].x0);
  const copy = async () => {
    try {
      await navigator.clipboard.writeText(location.href);
      copied.value = "The link is copied: it draws this picture again.";
    } catch {
      copied.value = "Copy the address of this page: it draws this picture again.";
    }
  };
  return (
    <div class="actions">
      <p class="caption">
        {chosen.job.prompt}, seed {chosen.job.seed}
        {chosen.job.to !== undefined && `, ${Math.round(100 * chosen.job.share!)} % towards seed ${chosen.job.to}`}
      </p>
      <div class="row wrap">
        <button type="button" onClick={() => savePng(chosen, finished(chosen), state.scale.value)}>
          PNG
        </button>
        {chosen.frames.length > 1 && (
          <button type="button" onClick={() => saveGif(chosen, finished(chosen), state.scale.value)}>
            GIF
          </button>
        )}
        <Select
          label="Enlarged"
          value={String(state.scale.value)}
          options={SCALES.map((scale) => [String(scale), `${scale} ×`])}
          onChange={(value) => (state.scale.value = Number(value))}
        />
        <Palette />
        <button type="button" onClick={copy}>
          Copy link
        </button>
      </div>
      <p role="status" class="hint">
        {copied.value}
      </p>
      <div class="row wrap">
        <button type="button" disabled={state.drawing.value} onClick={() => state.vary(share.value)}>
          Variations
        </button>
        <Range label="Difference" value={share} min={0.05} max={1} step={0.05} />
        <button
          type="button"
          onClick={() => saveSheet(done, done.map(finished), tool.value, state.model.value!.version)}
        >
          Sprite sheet
        </button>
        <Select
          label="Sheet for"
          value={tool.value}
          options={Object.entries(TOOLS).map(([name, { title }]) => [name, title])}
          onChange={(value) => (tool.value = value as Tool)}
        />
      </div>
    </div>
  );
}

/** Reduces finished pictures to a number of colours, or to the colours of a file. */
function Palette() {
  const file = useRef<HTMLInputElement>(null);
  const value = state.palette.value;
  const read = async () => {
    const [chosen] = file.current!.files!;
    if (!chosen) return;
    try {
      state.palette.value = parsePalette(await chosen.text(), chosen.name);
      state.failure.value = null;
    } catch (error) {
      state.failure.value = (error as Error).message;
    }
    file.current!.value = "";
  };
  const numbers = [4, 8, 16, 32].map((n): [string, string] => [String(n), `${n} colours`]);
  const loaded: [string, string][] = Array.isArray(value) ? [["loaded", `${value.length} from a file`]] : [];
  return (
    <>
      <Select
        label="Palette"
        value={Array.isArray(value) ? "loaded" : String(value ?? "")}
        options={[["", "as drawn"], ...numbers, ...loaded, ["file", "from a file …"]]}
        onChange={(chosen) => {
          if (chosen === "file") file.current!.click();
          else if (chosen !== "loaded") state.palette.value = chosen === "" ? null : Number(chosen);
        }}
      />
      <input ref={file} type="file" accept=".hex,.gpl" hidden aria-label="Palette file" onChange={read} />
    </>
  );
}

// ------------------------------------------------------------------------------------------------------- the settings

function Settings() {
  const model = state.model.value;
  const { defaults } = state;
  return (
    <fieldset class="settings">
      <legend>Settings</legend>
      <div class="row">
        <Whole label="Seed" value={state.seed} min={0} max={state.MAX_SEED} />
        <button
          type="button"
          aria-label="Random seed"
          title="Random seed"
          onClick={() => (state.seed.value = state.randomSeed())}
        >
          ⚄
        </button>
      </div>
      <Whole label="Pictures" value={state.number} min={1} max={state.MAX_NUMBER} />
      <Select
        label="Size"
        value={String(state.size.value)}
        options={(model ? sizesOf(model) : [64]).map((size) => [String(size), `${size} px`])}
        onChange={(value) => (state.size.value = Number(value))}
      />
      <Slider
        label="Steps"
        value={state.steps}
        fallback={defaults.value.steps}
        min={1}
        max={state.MAX_STEPS}
        step={1}
      />
      <Slider
        label="Guidance scale"
        value={state.guidance}
        fallback={defaults.value.guidance}
        min={1}
        max={8}
        step={0.25}
      />
    </fieldset>
  );
}

function Words() {
  const model = state.model.value;
  if (!model || Object.keys(model.words).length === 0) return null;
  return (
    <section class="words" aria-label="Words the model knows">
      <h2>Words it knows</h2>
      {Object.entries(model.words).map(([group, words]) => (
        <Group key={group} name={group} words={Object.keys(words)} />
      ))}
    </section>
  );
}

function Group({ name, words }: { name: string; words: string[] }) {
  const whole = useSignal(false);
  return (
    <div class="group" role="group" aria-label={name}>
      <span class="name">{name}</span>
      <div class="chips">
        {words.slice(0, whole.value ? words.length : CHIPS).map((word) => (
          <button
            type="button"
            class="chip"
            key={word}
            onClick={() => (state.prompt.value = withWord(state.prompt.value, word))}
          >
            {word}
          </button>
        ))}
        {words.length > CHIPS && (
          <button type="button" class="more" aria-expanded={whole.value} onClick={() => (whole.value = !whole.value)}>
            {whole.value ? "fewer" : `${words.length - CHIPS} more`}
          </button>
        )}
      </div>
    </div>
  );
}

/** The prompt with a word at its end, or without it if it is there. */
function withWord(prompt: string, word: string): string {
  const parts = prompt.split(/\s+/).filter(Boolean).join(" ");
  const pattern = new RegExp(`(^|[\\s,])${word}(?=$|[\\s,])`, "i");
  return (pattern.test(parts) ? parts.replace(pattern, "") : `${parts} ${word}`).trim();
}

// ------------------------------------------------------------------------------------------------------------- shelf

function Shelf() {
  const kept = state.shelf.value;
  if (kept.length === 0) return null;
  return (
    <section class="shelf" aria-label="Shelf">
      <h2>Drawn before</h2>
      <div class="thumbnails">
        {kept.map((one) => (
          <button
            type="button"
            class="picture"
            key={one.id}
            title={`${one.job.prompt}, seed ${one.job.seed}`}
            aria-label={`Open ${one.job.prompt}, seed ${one.job.seed}`}
            onClick={() => {
              state.open(one);
              document.getElementById("stage")?.scrollIntoView({ block: "nearest", behavior: "smooth" });
            }}
          >
            <Canvas picture={one.picture} size={one.sampling.size} />
          </button>
        ))}
      </div>
      <button type="button" class="more" onClick={() => void state.clearShelf()}>
        Delete all {state.counted(kept.length)} from this browser
      </button>
    </section>
  );
}

function Footer() {
  const model = state.model.value;
  return (
    <footer>
      {model && <Rights model={model} />}
      <p>
        {state.offline.value ? "This page works offline now. " : ""}
        Made with pokediff {model?.version}; the same prompt, seed and settings give the picture that its{" "}
        <code>sample.py --precision fp32 --best-of 1</code> draws.
      </p>
    </footer>
  );
}

function Rights({ model }: { model: Model }) {
  return (
    <p>
      {model.rights}
      {model.attribution && (
        <>
          {" "}
          <a href={model.attribution}>Authors of the training pictures</a>
        </>
      )}
    </p>
  );
}

// ------------------------------------------------------------------------------------------------------------ fields

function Select(props: {
  label: string;
  value: string;
  options: [string, string][];
  onChange: (value: string) => void;
}) {
  return (
    <label class="field">
      <span aria-hidden="true">{props.label}</span>
      <select
        aria-label={props.label}
        value={props.value}
        onChange={(event) => props.onChange(event.currentTarget.value)}
      >
        {props.options.map(([value, text]) => (
          <option key={value} value={value} selected={value === props.value}>
            {text}
          </option>
        ))}
      </select>
    </label>
  );
}

/** A whole number; another value falls back to the last good one. */
function Whole(props: { label: string; value: Signal<number>; min: number; max: number }) {
  const { label, value, min, max } = props;
  return (
    <label class="field">
      <span>{label}</span>
      <input
        type="number"
        form="draw" // so that Enter draws
        inputMode="numeric"
        min={min}
        max={max}
        step={1}
        value={value.value}
        onChange={(event) => {
          const entered = event.currentTarget.valueAsNumber;
          if (Number.isFinite(entered)) value.value = Math.min(max, Math.max(min, Math.round(entered)));
          event.currentTarget.value = String(value.value);
        }}
      />
    </label>
  );
}

function Range(props: { label: string; value: Signal<number>; min: number; max: number; step: number }) {
  return (
    <Labelled label={`${props.label} ${props.value.value}`}>
      <input
        type="range"
        min={props.min}
        max={props.max}
        step={props.step}
        value={props.value.value}
        onInput={(event) => (props.value.value = event.currentTarget.valueAsNumber)}
      />
    </Labelled>
  );
}

/** A slider whose value may be the model's default (null). */
function Slider(props: {
  label: string;
  value: Signal<number | null>;
  fallback: number;
  min: number;
  max: number;
  step: number;
}) {
  const { label, value, fallback } = props;
  return (
    <Labelled label={`${label} ${value.value ?? fallback}${value.value === null ? " (default)" : ""}`}>
      <input
        type="range"
        min={props.min}
        max={props.max}
        step={props.step}
        value={value.value ?? fallback}
        onInput={(event) => {
          const chosen = event.currentTarget.valueAsNumber;
          value.value = chosen === fallback ? null : chosen;
        }}
      />
    </Labelled>
  );
}

function Labelled({ label, children }: { label: string; children: ComponentChildren }) {
  return (
    <label class="field wide">
      <span>{label}</span>
      {children}
    </label>
  );
}
