import { render } from "preact";
import { App } from "./app";
import { start } from "./state";

const root = document.getElementById("app")!;
root.replaceChildren();
render(<App />, root);
void start();
