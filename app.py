"""The demo as a hosted Gradio space, or in a container: the environment names the address."""

import os

from pokediff.cli import main

if __name__ == "__main__":
    host, port = os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"), os.environ.get("GRADIO_SERVER_PORT", "7860")
    main(["--host", host, "--port", port], command="demo", prog="app.py")
