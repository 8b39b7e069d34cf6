"""accelerate launch train.py --config configs/pokemon-32.yaml --data data/bulbapedia"""

from pokediff.cli import run, train

if __name__ == "__main__":
    run(train, None, "train.py")
