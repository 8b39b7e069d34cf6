"""The demo as a hosted Gradio space, or in a container: the address to listen at comes from the environment."""

import os

from pokediff.cli import demo, run

if __name__ == "__main__":
    host, port = os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"), os.environ.get("GRADIO_SERVER_PORT", "7860")
    run(demo, ["--host", host, "--port", port], "app.py")
