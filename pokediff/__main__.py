"""python -m pokediff VERB, and accelerate launch -m pokediff evaluate, which shares the drawing among processes."""

from pokediff.cli import main

main()
