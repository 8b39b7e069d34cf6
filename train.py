"""accelerate launch train.py --config configs/pokemon.yaml --data data/bulbapedia"""

from pokediff.cli import main

if __name__ == "__main__":
    main(command="train", prog="train.py")
