"""python -m pokediff COMMAND, and accelerate launch -m pokediff evaluate, whose processes share the drawing."""

from pokediff.cli import main

if __name__ == "__main__":
    main()
