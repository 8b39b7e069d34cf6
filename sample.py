"""python sample.py --prompt "a blue water turtle" """

from pokediff.cli import run, sample

if __name__ == "__main__":
    run(sample, None, "sample.py")
