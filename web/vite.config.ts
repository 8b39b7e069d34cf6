import { readFileSync } from "node:fs";
import { defineConfig } from "vite";

const page = readFileSync(new URL("index.html", import.meta.url), "utf8");
const [, policy] = /Content-Security-Policy"\s+content="([^"]*)"/.exec(page)!;

export default defineConfig({
  base: "./", // the site may lie in any folder of a host
  oxc: { jsx: { runtime: "automatic", importSource: "preact" } },
  resolve: { conditions: ["onnxruntime-web-use-extern-wasm", "module", "browser", "development|production"] },
  worker: { format: "es" },
  define: { POLICY: JSON.stringify(policy) }, // for the service worker, which sends it as a header
  build: {
    target: "es2022",
    assetsInlineLimit: 0, // the page's Content-Security-Policy allows files only
    rolldownOptions: {
      input: { index: "index.html", "service-worker": "src/service-worker.ts" },
      output: {
        // A service worker keeps its address; every other file has a hash in its name.
        entryFileNames: ({ name }) => (name === "service-worker" ? "[name].js" : "assets/[name]-[hash].js"),
      },
    },
  },
});
