"""python sample.py "a blue water turtle" """

from pokediff.cli import main

if __name__ == "__main__":
    main(command="sample", prog="sample.py")
