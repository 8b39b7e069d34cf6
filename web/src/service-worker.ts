/**
 * Serves the site from the cache, so that it works offline (offline.ts fills the cache), and adds the headers that give
 * a page threads and keep it to its own host, for hosts that send none.
 */

export {};
const worker = self as unknown as ServiceWorkerGlobalScope;

const CACHE = "pokediff";
declare const POLICY: string; // of index.html; vite.config.ts
const HEADERS = {
  "Content-Security-Policy": POLICY,
  "Cross-Origin-Opener-Policy": "same-origin",
  "Cross-Origin-Embedder-Policy": "require-corp",
  "Cross-Origin-Resource-Policy": "same-origin",
};
const HASHED = /\/(assets|model)\/[^/]+$/; // names with a hash of the content: kept for ever

worker.addEventListener("install", () => void worker.skipWaiting());
worker.addEventListener("activate", (event) => event.waitUntil(worker.clients.claim()));
worker.addEventListener("fetch", (event) => {
  const { request } = event;
  const own = new URL(request.url).origin === worker.location.origin;
  if (request.method === "GET" && own) event.respondWith(answer(request));
});

async function answer(request: Request): Promise<Response> {
  const cache = await caches.open(CACHE);
  const find = () => cache.match(request.mode === "navigate" ? worker.registration.scope : request);
  if (HASHED.test(new URL(request.url).pathname)) return isolated((await find()) ?? (await fetch(request)));
  try {
    return isolated(await fetch(request)); // a new version, where there is one
  } catch (error) {
    const kept = await find();
    if (kept === undefined) throw error;
    return isolated(kept);
  }
}

function isolated(response: Response): Response {
  if (response.status === 0 || response.redirected) return response;
  const headers = new Headers(response.headers);
  for (const [name, value] of Object.entries(HEADERS)) headers.set(name, value);
  return new Response(response.body, { status: response.status, statusText: response.statusText, headers });
}
